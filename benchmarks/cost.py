"""What a hypergradient and an outer step cost under each estimator, next to their floor.

    python benchmarks/cost.py --quick                                      # in CI: a table, and checks of its figures
    python benchmarks/cost.py --output benchmarks/results/cost/sweeps.jsonl         # all sweeps, resumable
    python benchmarks/cost.py --memory-only --output <file>                # compiles only: a busy machine does no harm
    JAX_NUM_CPU_DEVICES=2 python benchmarks/cost.py --sweeps seeds --output <file>               # over devices too
    python benchmarks/cost_report.py benchmarks/results/cost/sweeps.jsonl

The problem is a functional regression; see cost_models.py. A cell is a size of it; M = K = T = steps throughout. Two
things are measured in every cell: `gradient`, one `fb.hypergradient` (of `itd`, the T inner steps that it
differentiates through included), and `step`, one whole outer step (M inner steps, the hypergradient, the update).
`floor` is what FuncID with a learned adjoint cannot do without, as bare optax steps in scans: M on the prediction
network (`step` only), K on the adjoint network with both batches, and one gradient of the outer objective. All
methods of a cell are timed in turns in one process. Memory is XLA's temporary buffers: exact and repeatable.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cost_models import INPUTS, PROBLEM, Network, batches, inner_objective, network, outer_objective, perceptron
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from turns import times_in_turns

import funcbilevel as fb
from funcbilevel.tasks._experiment import store

__all__ = ["PROBLEM", "batches", "estimators", "measure", "perceptron"]


class Cell(NamedTuple):
    """A size of the problem.

    Attributes:
        model: of cost_models.py. "mlp-remat" computes its hidden layers anew in derivatives, "mlp-bf16" computes in
            bfloat16 and keeps float32 around it.
        depth, width: of the network.
        batch: samples per level.
        steps: M = K = T.
        outputs: columns of the prediction.
        outer: outer parameters are [outer, outputs].
    """

    model: str = "mlp"
    depth: int = 4
    width: int = 256
    batch: int = 512
    steps: int = 20
    outputs: int = 1
    outer: int = INPUTS


BASE = {
    "mlp": Cell(),
    "cnn": Cell("cnn", batch=64),
    "transformer": Cell("transformer", batch=64),
    "mlp-remat": Cell("mlp-remat", depth=8),
    "mlp-bf16": Cell("mlp-bf16", depth=8),
}

# One sweep varies one factor around the base; "targets" adds the last corner of depth {4, 8} x width {256, 1024}.
SWEEPS: dict[str, Sequence[Mapping[str, int]]] = {
    "steps": [{"steps": n} for n in (1, 5, 10, 20, 50, 100)],
    "depth": [{"depth": n} for n in (2, 4, 8, 16)],
    "width": [{"width": n} for n in (64, 256, 1024)],
    "batch": [{"batch": n} for n in (64, 512, 4096)],
    "outputs": [{"outputs": n} for n in (1, 10, 100)],
    "outer": [{"outer": n} for n in (INPUTS, 1_000, 100_000)],
    "targets": [{"depth": 8, "width": 1024}],
    "option": [{"depth": 8}],
}
DEFAULT_SWEEPS = {
    "mlp": tuple(SWEEPS),
    "cnn": ("steps", "depth"),
    "transformer": ("steps", "depth"),
    "mlp-remat": ("option",),
    "mlp-bf16": ("option",),
}
WHATS = ("gradient", "step")


def cells(models: Iterable[str], sweeps: Iterable[str] | None = None) -> list[Cell]:
    """The cells of the sweeps, each once."""
    return list(
        dict.fromkeys(
            BASE[model]._replace(**change)
            for model in models
            for sweep in sweeps or DEFAULT_SWEEPS[model]
            for change in SWEEPS[sweep]
        )
    )


# What is measured.

OPTIMIZER = optax.adam(1e-3, eps_root=1e-12)


def estimators(features: Any, optimizer: optax.GradientTransformation, steps: int) -> dict[str, fb.Estimator]:
    return {
        "funcid-linear": fb.funcid(fb.linear_adjoint(features, ridge=1e-3)),
        "funcid-learned": fb.funcid(fb.learned_adjoint(optimizer, steps)),
        # At an untrained network the Hessian is indefinite, and conjugate gradients would stop at the first negative
        # curvature: with this damping it is definite, and they make their steps.
        "aid-cg": fb.aid(fb.cg(steps, damping=200.0)),
        "aid-neumann": fb.aid(fb.neumann(steps, step_size=1e-2, damping=1e-2)),
        "aid-gmres": fb.aid(fb.gmres(steps, damping=1e-2)),
        "itd": fb.itd(steps),
        "itd-remat": fb.itd(steps, remat=True),
        "itd-forward": fb.itd(steps, mode="forward"),
        "alternating": fb.alternating(),
    }


METHODS = ("floor", *estimators(lambda params, x: x, OPTIMIZER, 1))
UNPRODUCTIVE = {("alternating", "gradient")}  # no adjoint: nothing to measure beside the outer gradient
FORWARD_LIMIT = 10
"""Forward mode carries a tangent per outer parameter: beyond this many its memory is reported, and no time."""


def floor(
    model: fb.Model, optimizer: optax.GradientTransformation, inner_steps: int, adjoint_steps: int
) -> Callable[..., Any]:
    """Bare optax steps of the two networks, so many of each, and one gradient of the outer objective."""

    def train(loss: Callable[[Any], jax.Array], carry: Any, steps: int) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, opt_state = carry
            updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, carry, None, length=steps)[0] if steps else carry

    def run(outer_params: Any, prediction_carry: Any, adjoint_carry: Any, inner: Any, outer: Any) -> Any:
        # Without leaves in these models, but of their structure.
        _, model_state = jax.eval_shape(lambda: model.init(jax.random.key(0), inner[0]))

        def values(params: Any, x: jax.Array) -> jax.Array:
            return model.apply(params, model_state, x)[0]

        prediction_carry = train(
            lambda p: inner_objective(outer_params, values(p, inner[0]), inner), prediction_carry, inner_steps
        )
        adjoint_carry = train(
            lambda p: 0.5 * jnp.mean(values(p, inner[0]) ** 2) + jnp.mean(values(p, outer[0]) * outer[1]),
            adjoint_carry,
            adjoint_steps,
        )
        gradient = jax.grad(lambda w, p: outer_objective(w, values(p, outer[0]), outer), argnums=(0, 1))(
            outer_params, prediction_carry[0]
        )
        return outer_params - 1e-3 * gradient[0], prediction_carry, adjoint_carry, gradient[1]

    return run


def solver_of(
    cell: Cell, net: Network, method: str, outer_optimizer: optax.GradientTransformation
) -> tuple[fb.Estimator, fb.BilevelSolver]:
    """A method's estimator and its solver in a cell."""
    estimator = estimators(net.features, OPTIMIZER, cell.steps)[method]
    solver = fb.bilevel(
        PROBLEM,
        net.model,
        estimator,
        inner_optimizer=OPTIMIZER,
        outer_optimizer=outer_optimizer,
        inner_steps=cell.steps,
    )
    return estimator, solver


def call(cell: Cell, what: str, method: str) -> tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]:
    """A function, and a function that makes its arguments (or, under `jax.eval_shape`, their shapes)."""
    net = network(cell.model, cell.depth, cell.width, cell.outputs)
    steps = cell.steps

    def data() -> tuple[Any, Any]:
        return batches(cell.batch, net.inputs, cell.outer, cell.outputs)

    def initial() -> jax.Array:
        return jnp.zeros((cell.outer, cell.outputs))

    if method == "floor":

        def floor_arguments() -> tuple[Any, ...]:
            inner, outer = data()
            carries = []
            for seed in (1, 2):
                params, _ = net.model.init(jax.random.key(seed), inner[0])
                carries.append((params, OPTIMIZER.init(params)))
            return initial(), *carries, inner, outer

        return floor(net.model, OPTIMIZER, steps if what == "step" else 0, steps), floor_arguments

    estimator, solver = solver_of(cell, net, method, optax.sgd(1e-3))

    def step_arguments() -> tuple[Any, ...]:
        inner, outer = data()
        return solver.init(jax.random.key(1), initial(), inner), inner, outer

    def gradient(outer_params: Any, inner_params: Any, warm_start: Any, inner: Any, outer: Any) -> fb.Hypergradient:
        return fb.hypergradient(
            PROBLEM,
            net.model,
            estimator,
            outer_params,
            inner_params,
            inner,
            outer,
            inner_optimizer=OPTIMIZER,
            state=warm_start,
        )

    def gradient_arguments() -> tuple[Any, ...]:
        state, inner, outer = step_arguments()
        return state.outer_params, state.inner_params, state.estimator_state, inner, outer

    return (solver.step, step_arguments) if what == "step" else (gradient, gradient_arguments)


def measure(
    what: str = "step",
    methods: Sequence[str] = ("floor", "funcid-learned", "funcid-linear", "aid-cg", "itd", "alternating"),
    repeats: int = 15,
    **factors: Any,
) -> fb.CostTable:
    """Costs of `methods` in the cell that has these factors, in turns in one process."""
    calls = {method: call(Cell(**factors), what, method) for method in methods}
    return fb.measure_costs({m: (function, arguments()) for m, (function, arguments) in calls.items()}, repeats)


def rounding_error(cell: Cell, method: str) -> float:
    """|g - g_32| / |g_32| of the hypergradients g of the cell's model and g_32 of the same in float32."""
    gradients = []
    for kind in (cell.model, "mlp"):
        function, arguments = call(cell._replace(model=kind), "gradient", method)
        gradients.append(jax.jit(function)(*arguments()).gradient)
    return float(jnp.linalg.norm(gradients[0] - gradients[1]) / jnp.linalg.norm(gradients[1]))


def memory(cell: Cell, what: str, method: str) -> dict[str, float]:
    """Bytes of one compiled function, without running it or making its arguments."""
    function, arguments = call(cell, what, method)
    analysis = jax.jit(function).lower(*jax.eval_shape(arguments)).compile().memory_analysis()
    return {
        "temp_bytes": analysis.temp_size_in_bytes,
        "argument_bytes": analysis.argument_size_in_bytes,
        "output_bytes": analysis.output_size_in_bytes,
    }


# Records, one line per measurement.


def settings_of(cell: Cell, what: str) -> dict[str, Any]:
    return {"what": what} | cell._asdict()


def missing(cell: Cell, what: str, methods: Iterable[str], done: Iterable[store.Record], timed: bool) -> list[str]:
    """The methods of a cell of which `done` holds no line; with `timed`, none that has a time."""
    settings = settings_of(cell, what)
    there = {
        r["method"] for r in done if r["settings"] == settings and (not can_time(cell, r["method"], timed) or _time(r))
    }
    return [m for m in methods if m not in there and (m, what) not in UNPRODUCTIVE]


def can_time(cell: Cell, method: str, timed: bool = True) -> bool:
    return timed and not (method == "itd-forward" and cell.outer * cell.outputs > FORWARD_LIMIT)


def repeats_of(cell: Cell, most: int) -> int:
    """Fewer calls in large cells: as many as fit into the time of `most` calls of the base, but at least 3."""

    def work(c: Cell) -> int:
        return c.depth * c.width**2 * c.batch * c.steps

    return max(3, min(most, round(most * work(BASE[cell.model]) / work(cell))))


def records(cell: Cell, what: str, methods: Sequence[str], repeats: int, timed: bool = True) -> Iterator[store.Record]:
    """Measures methods of one cell. Times come with that of the floor in the same turns, whether asked for or not."""
    settings = settings_of(cell, what)
    for method in (m for m in methods if not can_time(cell, m, timed)):
        yield store.record("cost", method, 0, settings, memory(cell, what, method), 0.0)
    turns = [m for m in methods if can_time(cell, m, timed)]
    if not turns:
        return
    table = measure(what, ("floor", *(m for m in turns if m != "floor")), repeats_of(cell, repeats), **cell._asdict())
    floor_seconds = table.rows[0].seconds
    for row in (r for r in table.rows if r.name in turns):
        metrics = {k: v for k, v in row._asdict().items() if k != "name" and v is not None}
        metrics["floor_seconds"] = floor_seconds
        if cell.model == "mlp-bf16" and what == "gradient" and row.name != "floor":
            metrics["error"] = rounding_error(cell, row.name)
        yield store.record("cost", row.name, 0, settings, metrics, row.compile_seconds + row.seconds)


def _time(record: store.Record) -> float | None:
    return record["metrics"].get("seconds")


# Seeds under vmap.


SEEDS_CELL = Cell(depth=2, width=32, batch=128, steps=10)
SEEDS_METHODS = ("funcid-linear", "funcid-learned", "aid-cg", "itd")
FACTORISING = () if "NPROC" in os.environ else ("funcid-linear",)
"""Batched factorisations on as many CPU devices as XLA has threads, NPROC of them, deadlock jaxlib 0.10."""


def seeds_settings(num_seeds: int, outer_steps: int) -> dict[str, Any]:
    return settings_of(SEEDS_CELL, "seeds") | {"num_seeds": num_seeds, "outer_steps": outer_steps}


def seeds_records(
    methods: Sequence[str], num_seeds: int = 20, outer_steps: int = 20, repeats: int = 7
) -> Iterator[store.Record]:
    """`num_seeds` runs of a small functional regression: one program under vmap against one after the other.

    Where JAX has several devices, `spread` is the program under vmap with the seeds spread over them.
    """
    cell = SEEDS_CELL
    mesh = Mesh(np.array(jax.devices()), ("seeds",))
    net = network(cell.model, cell.depth, cell.width, cell.outputs)
    inner, outer = batches(cell.batch)
    stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (outer_steps, *x.shape)), (inner, outer))
    keys = jax.random.split(jax.random.key(0), num_seeds)
    for method in methods:
        _, solver = solver_of(cell, net, method, optax.adam(1e-2))
        states = jax.vmap(lambda key, s=solver: s.init(key, jnp.zeros((INPUTS, 1)), inner))(keys)
        run = jax.jit(solver.run)
        single = [jax.tree.map(lambda x, i=i: x[i], states) for i in range(num_seeds)]

        def sequential(run: Any = run, states: Any = single) -> None:
            for state in states:
                jax.block_until_ready(run(state, *stacked))

        together = jax.jit(jax.vmap(solver.run, in_axes=(0, None, None)))
        calls = {"sequential": sequential, "vmap": lambda f=together, s=states: f(s, *stacked)}
        if num_seeds % mesh.size == 0 and mesh.size > 1 and method not in FACTORISING:
            spread = jax.device_put(states, NamedSharding(mesh, PartitionSpec("seeds")))
            same = jax.device_put(stacked, NamedSharding(mesh, PartitionSpec()))
            calls["spread"] = lambda f=together, s=spread, b=same: f(s, *b)
        times = times_in_turns(calls, repeats)
        seconds = {name: float(np.median(values)) for name, values in times.items()}
        metrics = {f"{name}_seconds": value for name, value in seconds.items()}
        metrics["speed_up"] = seconds["sequential"] / seconds["vmap"]
        if "spread" in seconds:
            metrics |= {"spread_speed_up": seconds["sequential"] / seconds["spread"], "devices": mesh.size}
        settings = seeds_settings(num_seeds, outer_steps)
        yield store.record("cost", method, 0, settings, metrics, sum(map(sum, times.values())))


# The figures that CI checks.


class Check(NamedTuple):
    """A figure and what it must not exceed."""

    name: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether it is within its limit."""
        return self.value <= self.limit


def memory_checks() -> Iterator[Check]:
    """Figures of one outer step at batch 512, width 256; they are exact, so that the limits are those we promise."""
    temp = {
        (method, depth, steps): memory(Cell(depth=depth, steps=steps), "step", method)["temp_bytes"]
        for method, depth, steps in (
            ("funcid-learned", 8, 20),
            ("funcid-learned", 8, 100),
            ("funcid-learned", 4, 20),
            ("aid-cg", 8, 20),
            ("aid-cg", 4, 20),
            ("itd", 8, 20),
        )
    }
    funcid = temp["funcid-learned", 8, 20]
    slopes = {m: temp[m, 8, 20] - temp[m, 4, 20] for m in ("funcid-learned", "aid-cg")}
    yield Check("bytes, depth 8, K = 20: FuncID / AID-CG", funcid / temp["aid-cg", 8, 20], 0.6)
    yield Check("bytes, depth 8, K = 20: FuncID / ITD", funcid / temp["itd", 8, 20], 0.05)
    yield Check("bytes, K = 100 against 20: |FuncID - 1|", abs(temp["funcid-learned", 8, 100] / funcid - 1), 0.01)
    yield Check("bytes per layer: FuncID / AID-CG", slopes["funcid-learned"] / slopes["aid-cg"], 1.0)


def time_checks(step: fb.CostTable, gradient: fb.CostTable) -> Iterator[Check]:
    """Ratios of times, with wide margins: a busy machine must not fail them."""
    steps, gradients = ({row.name: row.seconds_low for row in table.rows} for table in (step, gradient))
    yield Check("time, outer step: FuncID / floor", steps["funcid-learned"] / steps["floor"], 1.5)
    yield Check("time, gradient: FuncID-linear / AID-CG", gradients["funcid-linear"] / gradients["aid-cg"], 0.25)


def quick(output: Path | None) -> list[Check]:
    """Two cells and the checks; under three minutes on two cores."""
    tables: dict[str, fb.CostTable] = {}
    for what, cell, methods in (
        ("step", Cell(steps=10), ("floor", "funcid-learned", "funcid-linear", "aid-cg", "itd", "alternating")),
        ("gradient", Cell(depth=8), ("floor", "funcid-learned", "funcid-linear", "aid-cg")),
    ):
        print(f"\n{what}, {title(cell)}; ratio: to the floor", flush=True)
        tables[what] = measure(what, methods, 9 if what == "step" else 5, **cell._asdict())
        print(tables[what], flush=True)
        for row in tables[what].rows if output else ():
            metrics = {k: v for k, v in row._asdict().items() if k != "name" and v is not None}
            metrics["floor_seconds"] = tables[what].rows[0].seconds
            settings = settings_of(cell, what)
            _append(output, store.record("cost", row.name, 0, settings, metrics, row.compile_seconds + row.seconds))
    checks = [*memory_checks(), *time_checks(tables["step"], tables["gradient"])]
    print()
    for check in checks:
        print(f"{check.name:44} {check.value:7.3f}  at most {check.limit:.3g}{'' if check.met else '   FAILED'}")
    return checks


def title(cell: Cell) -> str:
    return (
        f"{cell.model}, depth {cell.depth}, width {cell.width}, batch {cell.batch}, M = K = T = {cell.steps}, "
        f"outputs {cell.outputs}, outer parameters {cell.outer * cell.outputs}"
    )


def _append(path: Path | None, record: store.Record) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        store.append(path, [record])


# The command line.


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; `advance(description of what comes next)`."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True, highlight=False),
    )
    with bar:
        task = bar.add_task("", total=total)

        def advance(description: str, by: int = 0) -> None:
            bar.update(task, description=description, advance=by)

        yield advance


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="two cells and checks of their figures, as CI runs them")
    parser.add_argument("--models", nargs="+", choices=BASE, default=list(BASE))
    parser.add_argument("--sweeps", nargs="+", choices=(*SWEEPS, "seeds"), help="default: all of them for the mlp")
    parser.add_argument("--what", nargs="+", choices=WHATS, default=WHATS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--memory-only", action="store_true", help="compile, but do not run")
    parser.add_argument("--repeats", type=int, default=11, help="timed calls in the base cells; larger ones have fewer")
    parser.add_argument("--output", type=Path, help="JSON lines; what the file holds already is not measured again")
    args = parser.parse_args(argv)
    if not args.quick and args.output is None:
        parser.error("--output is needed for the sweeps; or pass --quick.")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}.")
    return args


def run_sweeps(args: argparse.Namespace) -> None:
    """Measures what the output file does not hold yet."""
    done = list(store.read(args.output)) if args.output.exists() else []
    seeds = args.sweeps is None or "seeds" in args.sweeps
    sweeps = args.sweeps and [s for s in args.sweeps if s != "seeds"]
    work = [
        (cell, what, methods)
        for cell in (cells(args.models, sweeps) if sweeps != [] else [])
        for what in args.what
        if (methods := missing(cell, what, args.methods, done, not args.memory_only))
    ]
    there = {r["method"] for r in done if r["settings"] == seeds_settings(20, 20)}
    seeds_methods = [m for m in SEEDS_METHODS if seeds and m in args.methods and m not in there]
    seeds_methods = [] if args.memory_only else seeds_methods
    with progress(sum(len(methods) for *_, methods in work) + len(seeds_methods)) as advance:
        for cell, what, methods in work:
            advance(f"{what}, {title(cell)}")
            for record in records(cell, what, methods, args.repeats, not args.memory_only):
                _append(args.output, record)
                advance(f"{what}, {title(cell)}", 1)
            jax.clear_caches()
        for record in seeds_records(seeds_methods):
            _append(args.output, record)
            advance("20 seeds", 1)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if not args.quick:
        run_sweeps(args)
    elif not all(check.met for check in quick(args.output)):
        sys.exit("benchmarks/cost.py: a figure exceeds its limit")


if __name__ == "__main__":
    main()
