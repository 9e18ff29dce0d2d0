"""All stochastic solvers and the parametric estimators on the quadratic problem of the field's benchmark.

    python benchmarks/simulated.py --output benchmarks/results/simulated
    python benchmarks/simulated.py --report benchmarks/results/simulated
    python benchmarks/simulated.py --quick

The problem is `simulated` of benchopt's `benchmark_bilevel` (see simulated_problem.py). Batches of 64; step sizes and
their schedules are the defaults of the benchmark's solver of that name, with two exceptions: F2SA has the ones that the
benchmark's configuration names as its best (by default it hardly moves in 512 steps), and VRBO passes over the data
every 16 steps, as SRBA does (by default every 4,096). Methods that the benchmark has not get those of their nearest kin
(MA-SOBA: SOBA's; F3SA, V-PBGD, MEHA: F2SA's; estimators: AmIGO's). Each is run on five random orders of the samples.

The figure of merit is ||grad h||^2 of the value function h, by the exact inner solution on all samples, after 256 and
512 outer steps. Samples drawn count every draw of a batch once, whatever is computed on it, and whole passes over the
data; of a Neumann series of random length as many as it has products on average. The script fails if a method ends with
a larger gradient than it began with.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import simulated_problem
from simulated_problem import PROBLEM, START, Data, gradient_squared

import funcbilevel as fb
from funcbilevel.tasks._experiment import figures, store, table

TASK = "simulated"
BATCH, CHUNK, STEPS, SEEDS = 64, 64, 512, 5
NUM_SAMPLES = 1024
M = K = 10
"""Inner steps and Hessian products of the double-loop methods."""


def falling(size: float, power: float) -> Callable[[Any], Any]:
    """size (t + 1)^-power."""
    return lambda t: size / (1.0 + t) ** power


def growing(first: float, size: float, power: float) -> Callable[[Any], Any]:
    """first + sum_{s < t} size (s + 1)^-power, of F2SA."""
    sums = np.append(0.0, np.cumsum(size / np.arange(1, 100_001) ** power))
    return lambda t: jnp.asarray(first + sums, jnp.float32)[t]


class Method(NamedTuple):
    """A method with its settings.

    Attributes:
        name: as published.
        family: in the figure.
        build: makes the solver of a problem.
        settings: what tells it from others of the same name.
        period: outer steps from one pass over all samples to the next; 0: none but perhaps at the start.
        passes: over all samples at the start.
        fresh: whether every inner step draws, or one batch serves an outer step.
        unused: of the draws that a step numbers, how many a random length leaves out on average.
    """

    name: str
    family: str
    build: Callable[[fb.ParametricProblem], fb.BilevelSolver]
    settings: Mapping[str, Any] = {}
    period: int = 0
    passes: int = 0
    fresh: bool = True
    unused: float = 0.0

    @property
    def label(self) -> str:
        """In records, table and figure."""
        size = f"({self.settings['steps']})" if "steps" in self.settings else ""
        return f"{self.name}{size}{'' if self.fresh else ', one batch'}"


def _sizes(power: float = 0.0, outer: float | None = None, linear: bool = True) -> dict[str, Any]:
    """Step sizes of the levels; by default constant and the same."""
    outer = power if outer is None else outer
    levels = {"inner_optimizer": falling(0.1, power), "outer_optimizer": falling(0.1, outer)}
    return levels | ({"linear_optimizer": falling(0.1, power)} if linear else {})


def _solvers() -> Iterator[Method]:
    def of(function: Any, family: str, *, passes: int = 0, **arguments: Any) -> Method:
        return Method(
            *(function.__name__, family, lambda problem: function(problem, **arguments)),
            period=arguments.get("period", 0),
            passes=passes,
            unused=(arguments.get("neumann_terms", 1) - 1) / 2,
        )

    one, two, first = "single loop", "double loop", "first order"
    series: Any = {"neumann_step_size": 0.1}
    momenta: Any = {"inner_momentum": falling(0.5, 2 / 3), "outer_momentum": falling(0.5, 2 / 3)}
    yield of(fb.soba, one, **_sizes(0.5))
    yield of(fb.ma_soba, one, **_sizes(0.5), momentum=0.5)
    yield of(fb.saba, one, **_sizes(), passes=1)
    yield of(fb.srba, one, **_sizes(), period=2 * NUM_SAMPLES // BATCH // 2)
    yield of(fb.fsla, one, **_sizes(0.5), momentum=falling(0.1, 0.5))
    yield of(fb.sustain, one, **_sizes(1 / 3, linear=False), **series, **momenta, neumann_terms=K)
    yield of(fb.mrbo, one, **_sizes(1 / 3, linear=False), **series, **momenta, neumann_steps=K)
    yield of(fb.ttsa, one, **_sizes(0.4, 0.6, linear=False), **series, neumann_terms=K)
    yield of(
        *(fb.vrbo, two),
        **(_sizes(linear=False) | series),
        **{"inner_steps": M, "neumann_steps": K, "period": 2 * NUM_SAMPLES // BATCH // 2},
    )
    yield of(fb.bsa, two, **_sizes(0.5, linear=False), **series, inner_steps=M, neumann_terms=K)
    yield of(fb.stocbio, two, **_sizes(linear=False), **series, inner_steps=M, neumann_steps=K)
    yield of(fb.amigo, two, **_sizes(), inner_steps=M, linear_steps=K)
    sizes = _sizes(4 / 7, linear=False)
    penalty: Any = {"penalty": growing(1.0, 0.01, 1 / 7), "penalty_optimizer": falling(0.1, 5 / 7)}
    penalised: Any = {**sizes, **penalty}
    yield of(fb.f2sa, first, **penalised, inner_steps=M)
    yield of(fb.f3sa, first, **penalised, momentum=0.5)
    yield of(fb.pbgd, first, **penalised, inner_steps=M)
    yield of(fb.pbgd_free, first, **sizes, penalty=penalty["penalty"], inner_steps=M)
    yield of(fb.bome, first, **_sizes(linear=False), solution_optimizer=0.1, solution_steps=M)
    proximal: Any = {"proximal_optimizer": falling(0.1, 4 / 7), "proximal_weight": 1.0}
    yield of(fb.meha, first, **sizes, **proximal, penalty=lambda t: (1.0 + t) ** 0.3)


def _estimators() -> Iterator[Method]:
    def of(name: str, estimator: fb.Estimator, fresh: bool = True, **settings: Any) -> Method:
        def build(problem: fb.ParametricProblem) -> fb.BilevelSolver:
            sizes: Any = {"inner_optimizer": optax.sgd(0.1), "outer_optimizer": optax.sgd(0.1)}
            return fb.bilevel(problem, None, estimator, **sizes, inner_steps=M)

        draws = {"draws": "fresh" if fresh else "one batch"}
        return Method(name, "estimator", build, settings | draws, fresh=fresh)

    for steps in (10, 30, 100):
        yield of("aid-cg", fb.aid(fb.cg(steps)), steps=steps)
        yield of("aid-cg", fb.aid(fb.cg(steps)), fresh=False, steps=steps)
    yield of("aid-cg-damped", fb.aid(fb.cg(30, damping=0.1)), steps=30)
    yield of("aid-nystrom-cg", fb.aid(fb.nystrom_cg(10, rank=20, damping=0.1)), steps=10)
    yield of("aid-normal-cg", fb.aid(fb.normal_cg(10)), steps=10)
    yield of("aid-gmres", fb.aid(fb.gmres(10)), steps=10)
    yield of("aid-gmres", fb.aid(fb.gmres(10)), fresh=False, steps=10)
    yield of("aid-gmres", fb.aid(fb.gmres(30)), steps=30)
    yield of("aid-gradient-descent", fb.aid(fb.gradient_descent(K, 0.1)), steps=K)
    yield of("aid-neumann", fb.aid(fb.neumann(K, 0.1)), steps=K)
    yield of("aid-neumann", fb.aid(fb.neumann(100, 0.1)), steps=100)
    yield of("aid-identity", fb.aid(fb.identity()))
    yield of("itd", fb.itd(M), steps=M)
    yield of("pzobo", fb.pzobo(M, 10, radius=0.1), steps=M)
    yield of("darts", fb.darts(0.1))
    yield of("alternating", fb.alternating())


METHODS = {method.label: method for method in (*_solvers(), *_estimators())}
FAMILIES = {"single loop": "C0", "double loop": "C1", "first order": "C2", "estimator": "C3"}


# Measuring.


class _Counted(fb.FiniteSum):
    """Writes down at which place of the run a step begins to draw."""

    places: list[int]

    def __post_init__(self) -> None:
        if isinstance(self.first, int):
            self.places.append(self.first)


def draws_per_step(solver: fb.BilevelSolver, state: fb.BilevelState, sources: Sequence[fb.FiniteSum]) -> list[int]:
    """How many batches of each source one outer step draws: the place at which the step after step 0 begins."""
    counts: list[int] = []
    counted: list[fb.FiniteSum] = []
    for source in sources:
        kind = dataclasses.dataclass(frozen=True)(type("Counted", (_Counted,), {"places": []}))
        counted.append(kind(source.data, source.key, source.replace))
    jax.eval_shape(lambda: solver.step(state._replace(step=1), *counted))
    counts = [max(source.places) for source in counted]
    return counts


def samples_drawn(method: Method, per_step: float, steps: int, num_samples: int) -> float:
    """Of both levels, in `steps` outer steps."""
    passes = method.passes + (-(-steps // method.period) if method.period else 0)
    return per_step * BATCH * steps + passes * 2 * num_samples


class Setting(NamedTuple):
    """What a method is measured on.

    Attributes:
        task: in records.
        problem: with its objectives on a batch.
        levels: the samples of the inner and the outer sum, in their order, and how many make a block.
        omega, theta: where all start.
        gradient: omega -> the squared norm of the value function's gradient.
        n: the samples of each level.
    """

    task: str
    problem: fb.ParametricProblem
    levels: Sequence[tuple[Any, int]]
    omega: jax.Array
    theta: jax.Array
    gradient: Callable[[np.ndarray], float]
    n: int


def drawn_anew(data: Data) -> Setting:
    n, q = data.inner.b.shape
    start = (jnp.full(q, START), jnp.zeros(data.inner.a.shape[1]))
    levels = [(level, BATCH) for level in data]
    return Setting(TASK, PROBLEM, levels, *start, lambda omega: gradient_squared(data, omega), n)


def measure(method: Method, setting: Setting, steps: int, seeds: int, chunk: int = CHUNK) -> Iterator[store.Record]:
    """One record for each order of the samples."""
    solver, omega, theta = method.build(setting.problem), setting.omega, setting.theta

    def sources(seed: int) -> tuple[fb.FiniteSum, ...]:
        keys = jax.random.split(jax.random.key(seed))
        levels = zip(setting.levels, keys, strict=True)
        return tuple(fb.finite_sum(data, size, key=key) for (data, size), key in levels)

    def init(seed: int) -> fb.BilevelState:
        inner, outer = sources(seed)
        return solver.init(jax.random.key(seed), omega, inner, theta, outer)

    def advance(state: fb.BilevelState, inner: fb.FiniteSum, outer: fb.FiniteSum) -> fb.BilevelState:
        def step(state: fb.BilevelState, _: None) -> tuple[fb.BilevelState, None]:
            at = (lambda s: s) if method.fresh else (lambda s: s.block(s.index(state.step)))
            return solver.step(state, at(inner), at(outer))[0], None

        return jax.lax.scan(step, state, None, length=chunk)[0]

    first = init(0)
    start = time.perf_counter()
    compiled = jax.jit(advance).lower(first, *sources(0)).compile()
    compile_seconds = time.perf_counter() - start
    jax.block_until_ready(compiled(first, *sources(0)))
    per_step = sum(draws_per_step(solver, first, sources(0))) - method.unused if method.fresh else 2

    for seed in range(seeds):
        state, drawn = init(seed), sources(seed)
        metrics = {"gradient_start": setting.gradient(np.asarray(omega)), "compile_seconds": compile_seconds}
        times: list[float] = []
        for done in range(chunk, steps + 1, chunk):
            start = time.perf_counter()
            state = jax.block_until_ready(compiled(state, *drawn))
            times.append((time.perf_counter() - start) / chunk)
            if done in (steps // 2, steps):
                metrics[f"gradient_{done}"] = setting.gradient(np.asarray(state.outer_params))
                metrics[f"samples_{done}"] = samples_drawn(method, per_step, done, setting.n)
        metrics["seconds_per_step"] = statistics.median(times)
        settings = {"n": setting.n, "p": theta.size, "q": omega.size, "batch": BATCH, "steps": steps}
        settings |= {"family": method.family} | {f"own_{name}": value for name, value in method.settings.items()}
        yield store.record(setting.task, method.label, seed, settings, metrics, sum(times))


def diverged(records: Sequence[store.Record]) -> list[str]:
    """The methods that on some order ended worse than they began."""
    names: dict[str, None] = {}
    for record in records:
        metrics = store.values(record)
        if not metrics[f"gradient_{record['settings']['steps']}"] <= metrics["gradient_start"]:
            names[record["method"]] = None
    return list(names)


# Reporting.


class Row(NamedTuple):
    """A method's medians over the orders of the samples, and the range of its last figure."""

    label: str
    family: str
    half: float
    last: float
    low: float
    high: float
    samples: float
    seconds: float
    compiling: float


def rows(records: Sequence[store.Record]) -> list[Row]:
    """One for each method, the least last gradient first."""
    of_method: dict[str, list[store.Record]] = {}
    for record in records:
        of_method.setdefault(record["method"], []).append(record)
    made: list[Row] = []
    for label, of in of_method.items():
        steps = of[0]["settings"]["steps"]
        values = [store.values(record) for record in of]
        last = [v[f"gradient_{steps}"] for v in values]

        def median(name: str, values: Sequence[Mapping[str, float]] = values) -> float:
            return float(np.median([v[name] for v in values]))

        made.append(
            Row(
                *(label, of[0]["settings"]["family"], median(f"gradient_{steps // 2}"), float(np.median(last))),
                *(min(last), max(last), median(f"samples_{steps}"), median("seconds_per_step")),
                median("compile_seconds"),
            )
        )
    return sorted(made, key=lambda row: np.nan_to_num(row.last, nan=np.inf))


def report(records: Sequence[store.Record]) -> str:
    """The table, in Markdown."""
    settings, machine = records[0]["settings"], records[0]["machine"]
    steps = settings["steps"]
    header = (
        *("method", "family", f"‖∇h‖² after {steps // 2}", f"after {steps}", "least and largest"),
        *("samples drawn", "µs per step", "compile s"),
    )
    lines = (
        (
            *(f"`{r.label}`", r.family, f"{r.half:.3g}", f"{r.last:.3g}", f"{r.low:.3g}, {r.high:.3g}"),
            *(f"{r.samples:,.0f}", f"{1e6 * r.seconds:.0f}", f"{r.compiling:.2f}"),
        )
        for r in rows(records)
    )
    start = store.values(records[0])["gradient_start"]
    seeds = len({record["seed"] for record in records})
    return (
        "# The field's quadratic benchmark\n\n"
        f"`simulated`: {settings['n']} samples at each level, {settings['p']} inner and {settings['q']} outer "
        f"parameters, batches of {settings['batch']}; medians over {seeds} orders of the samples. "
        f"‖∇h‖² is {start:.3g} at the start. Step sizes are the benchmark's, not tuned here, so that the "
        f"table ranks settings as much as methods. float32, {machine['cpu']}.\n\n"
        + table.markdown(header, lines)
        + _closing(diverged(records))
    )


def _closing(bad: Sequence[str]) -> str:
    if not bad:
        return "\nNo method ends worse than it began.\n"
    return f"\nWorse at the end than at the start: {', '.join(bad)}.\n"


def draw(records: Sequence[store.Record], path: Path) -> None:
    """Gradient after half and all of the steps, samples and time, one line for each method."""
    shown = rows(records)[::-1]
    steps = records[0]["settings"]["steps"]
    y = np.arange(len(shown))
    colours = [FAMILIES[row.family] for row in shown]
    start = store.values(records[0])["gradient_start"]
    half, last = (np.nan_to_num([getattr(row, name) for row in shown], nan=np.inf) for name in ("half", "last"))
    beyond = last > 10 * start
    half, last = np.minimum(half, 10 * start), np.minimum(last, 10 * start)
    with figures.drawn(path, figsize=(10, 1.2 + 0.21 * len(shown))) as figure:
        gradient, samples, seconds = figure.subplots(1, 3, sharey=True, width_ratios=(2.2, 1, 1))
        gradient.hlines(y, last, half, colors=colours, lw=1, alpha=0.5)
        gradient.scatter(half, y, s=22, facecolors="white", edgecolors=colours, zorder=3)
        for which, marker in ((~beyond, "o"), (beyond, ">")):
            gradient.scatter(last[which], y[which], s=26, c=np.array(colours)[which], marker=marker, zorder=3)
        gradient.axvline(start, color="0.6", ls="--", lw=1)
        gradient.set(
            title=f"‖∇h‖² after {steps // 2} (hollow) and {steps} steps; dashed: start; >: beyond", xscale="log"
        )
        samples.barh(y, [row.samples / steps for row in shown], color=colours, alpha=0.7)
        samples.set(title="Samples per step", xscale="log")
        seconds.barh(y, [1e6 * row.seconds for row in shown], color=colours, alpha=0.7)
        seconds.set(title="µs per step", xscale="log")
        gradient.set_yticks(y, [row.label for row in shown], fontsize=8)
        gradient.set_ylim(-0.7, len(shown) - 0.3)
        for axes in (gradient, samples, seconds):
            axes.grid(axis="x", alpha=0.3)
        for family, colour in FAMILIES.items():
            gradient.scatter([], [], color=colour, label=family)
        handles, labels = gradient.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)


def write(directory: Path) -> list[store.Record]:
    """Table and figure of a directory's records."""
    records = store.read(directory / "runs.jsonl")
    store.replace(directory / "table.md", report(records).encode())
    draw(records, directory / "simulated.png")
    return records


QUICK = ("soba", "saba", "aid-cg(30)")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--output", type=Path, help="directory; methods that it holds are not measured again")
    group.add_argument("--report", type=Path, help="make table and figure of this directory anew")
    group.add_argument("--quick", action="store_true", help="few steps of few methods on a small problem")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all, with --quick a few")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_compilation_cache", False)  # compile seconds are those of the compiler
    if args.report is not None:
        write(args.report)
        return
    if args.quick:
        setting = drawn_anew(simulated_problem.generate(192, 8, 6))
        names = args.methods or QUICK
        records = [record for name in names for record in measure(METHODS[name], setting, 64, 1, chunk=32)]
        print(report(records))
    else:
        args.output.mkdir(parents=True, exist_ok=True)
        path, setting = args.output / "runs.jsonl", drawn_anew(simulated_problem.generate(NUM_SAMPLES))
        done = {record["method"] for record in store.read(path)} if path.exists() else set()
        for name in args.methods or METHODS:
            if name not in done:
                store.append(path, list(measure(METHODS[name], setting, STEPS, SEEDS)))
        records = write(args.output)
    if bad := diverged(records):
        raise SystemExit(f"end worse than they began: {', '.join(bad)}")


if __name__ == "__main__":
    main()
