"""Our stochastic solvers beside those of benchopt's `benchmark_bilevel` on its data set `simulated`.

    git clone https://github.com/benchopt/benchmark_bilevel CLONE && pip install benchopt jaxopt
    python benchmarks/beside_benchopt.py --clone CLONE --output benchmarks/results/beside_benchopt
    python benchmarks/beside_benchopt.py --report benchmarks/results/beside_benchopt

Two questions, of the benchmark's own solver classes, data and objectives, none of which is copied here:

- Iterates: does its solver make the steps of ours, given the same samples and step sizes? 50 steps in float64. Its code
  takes its samples by a function, for which we put one that reads them from a list, in the order in which it asks;
  where it takes one batch for two purposes, ours gets the same batch for both. Series of random length have the lengths
  that ours drew. Where its first step is not the published one, it starts from our state after that step.
- Gradient: ||grad h||^2 after 256 and 512 outer steps, in float32, with samples drawn (as simulated.py counts them),
  seconds per step and compile seconds. Its solvers have their default parameters and its own sampler.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import simulated
from simulated import BATCH, CHUNK, METHODS, SEEDS, STEPS, K, M, Setting, falling

import funcbilevel as fb
from funcbilevel.contrib.benchopt import benchmark_problem
from funcbilevel.tasks._experiment import store, table

TASK = "beside_benchopt"
COMPARED = 50
"""Steps of which the iterates are compared."""
SMALL = {"n_samples_inner": 512, "n_samples_outer": 512, "dim_inner": 20, "dim_outer": 20}
"""The sizes for that, of which nothing hangs; the defaults compile for half a minute each in float64."""
FAST = 0.02
"""Solvers with fewer seconds per step are run on five orders of the samples, the others on one."""


# The benchmark.


class Clone(NamedTuple):
    """The benchmark's code.

    Attributes:
        path: of the clone.
        commit: its hash.
    """

    path: Path
    commit: str

    def load(self, name: str) -> Any:
        """The module of `name`, such as "solvers/soba"."""
        spec: Any = importlib.util.spec_from_file_location(name.replace("/", "_"), self.path / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def solver(self, file: str, objective: Mapping[str, Any], **parameters: Any) -> tuple[Any, Any]:
        """The module of a solver, and the solver on the objective."""
        module = self.load(f"solvers/{file}")
        solver = module.Solver.get_instance(**parameters)
        solver.run_once = lambda *_: None  # its warm-up; we compile by ourselves
        solver.set_objective(**objective)
        return module, solver

    def problem(self, **sizes: int) -> tuple[dict[str, Any], Any]:
        """What the benchmark gives to `set_objective`, and its metrics (theta, omega) -> dict."""
        data = self.load("datasets/simulated").Dataset.get_instance(**sizes).get_data()
        objective = self.load("objective").Objective.get_instance()
        objective.set_data(**data)
        return objective.get_objective(), data["metrics"]


def opened(path: Path) -> Clone:
    path = path.resolve()
    sys.path.insert(0, str(path))  # its modules import benchmark_utils
    commit = subprocess.run(
        ["git", "-C", str(path), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    return Clone(path, commit)


# Iterates.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Listed(fb.FiniteSum):
    """A sum whose draws are those of a list."""

    blocks: Any = None

    def index(self, i: Any) -> jax.Array:
        """That of draw number i."""
        return self.blocks[self.first + i]


def listed(state: dict[str, Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The benchmark's kind of sampler: state -> (start, index, weight, state)."""
    block = state["blocks"][state["next"]]
    return BATCH * block, block, 1.0 / state["num_blocks"], state | {"next": state["next"] + 1}


Order = Callable[[int], tuple[Sequence[int], Sequence[int]]]
Adopt = Callable[[Any, Any, dict[str, Any], fb.BilevelState], Any]


class Twin(NamedTuple):
    """A solver of the benchmark, and how it is given what ours has.

    Attributes:
        file: of its solver.
        order: length of the random series -> the numbers of our inner and of our outer draws, in its order; numbers
            beyond one step's are those of the next step.
        draws: how many of each ours makes in a step.
        parameters: other than its defaults.
        shared: our inner draws that have to be the samples of an earlier one: number -> that one.
        adopt: (module, solver, what it carries at its start, our state after step 0) -> what it carries instead.
        first: the first step that is its own.
        build: ours; None: that of simulated.py.
        inner: our state -> what it calls inner_var; None: not compared, since it is not of the same moment.
        said: what had to be done, or in what it departs.
    """

    file: str
    order: Order
    draws: tuple[int, int]
    parameters: Mapping[str, Any] = {}
    shared: Mapping[int, int] = {}
    adopt: Adopt | None = None
    first: int = 0
    build: Callable[[fb.ParametricProblem], fb.BilevelSolver] | None = None
    inner: Callable[[fb.BilevelState], Any] | None = lambda state: state.inner_params
    said: str = ""


def full_memory(module: Any, solver: Any, carry: Any, state: fb.BilevelState) -> Any:
    del state
    memory = module.init_memory(
        *(solver.f_inner, solver.f_outer, solver.inner_var, solver.outer_var, jnp.zeros_like(solver.inner_var)),
        n_inner_samples=solver.n_inner_samples,
        n_outer_samples=solver.n_outer_samples,
        state_inner_sampler=solver.state_inner_sampler,
        state_outer_sampler=solver.state_outer_sampler,
        batch_size_inner=solver.batch_size_inner,
        batch_size_outer=solver.batch_size_outer,
        inner_size=solver.inner_var.shape[0],
        outer_size=solver.outer_var.shape[0],
        mode="full",
    )
    return memory, carry[1]


def after_first(carry: Any, state: fb.BilevelState, **more: Any) -> Any:
    now = {"inner_var": state.inner_params, "outer_var": state.outer_params}
    return carry | now | {"state_lr": carry["state_lr"] | {"i_step": 1}} | more


def momenta(module: Any, solver: Any, carry: Any, state: fb.BilevelState) -> Any:
    own = state.estimator_state
    return after_first(
        carry,
        state,
        memory_inner=jnp.stack([own.theta_before, own.inner]),
        memory_outer=jnp.stack([own.omega_before, own.outer]),
    )


def fsla_momentum(module: Any, solver: Any, carry: Any, state: fb.BilevelState) -> Any:
    own = state.estimator_state
    memory = jnp.stack([own.omega_before, own.momentum])
    return after_first(carry, state, v=own.linear.u, memory_outer=memory)


def inner_of_first(module: Any, solver: Any, carry: Any, state: fb.BilevelState) -> Any:
    return carry | {"inner_var": state.inner_params}


def bsa_shifted(problem: fb.ParametricProblem) -> fb.BilevelSolver:
    """Its inner loop has the step size of the outer step before."""
    return fb.bsa(
        *(problem,),
        inner_optimizer=lambda t: 0.1 / jnp.maximum(t, 1.0) ** 0.5,
        outer_optimizer=falling(0.1, 0.5),
        neumann_step_size=0.1,
        inner_steps=M,
        neumann_terms=K,
    )


def held(problem: fb.ParametricProblem) -> fb.BilevelSolver:
    """VRBO whose omega stays."""
    return fb.vrbo(
        *(problem,),
        inner_optimizer=0.1,
        outer_optimizer=1e-30,
        neumann_step_size=0.1,
        inner_steps=M,
        neumann_steps=K,
        period=16,
    )


def vrbo_order(_: int) -> tuple[Sequence[int], Sequence[int]]:
    """In each of M turns: the gradient, then the products; the cross derivative shares the gradient's samples."""
    each = K + 2
    return [each * turn + i for turn in range(M) for i in (0, *range(2, each))], range(M)


def f2sa_order(_: int) -> tuple[Sequence[int], Sequence[int]]:
    """In each turn first y, then theta."""
    return [i for turn in range(M) for i in (2 * turn + 1, 2 * turn)] + [2 * M, 2 * M + 1], range(M + 1)


FIRST = "it starts its momentum from zero, at a point that is zero; it goes on from our first step"
SHARED = "one batch for inner gradient and cross derivative, and so for ours"
TWINS: dict[str, Twin] = {
    "soba": Twin("soba", lambda _: ([0], [0]), (1, 1)),
    "saba": Twin(
        *("saba", lambda _: ([0], [0]), (1, 1)),
        adopt=full_memory,
        said="its parameter for a full memory is never read, and its memory starts from zero; here it is filled by its "
        "own function",
    ),
    "srba": Twin("srba", lambda _: ([0], [0]), (1, 1), parameters={"period_frac": 1.0}),
    "fsla": Twin("fsla", lambda _: ([0, 1, 2], [0, 1]), (3, 2), adopt=fsla_momentum, first=1, said=FIRST),
    "sustain": Twin(
        *("sustain", lambda p: ([0, *range(2, 2 + p)], [0]), (K + 1, 1)),
        shared={1: 0},
        adopt=momenta,
        first=1,
        said=f"{SHARED}; {FIRST}",
    ),
    "mrbo": Twin(
        *("mrbo", lambda _: ([0, *range(2, 2 + K)], [0]), (K + 2, 1)),
        shared={1: 0},
        adopt=momenta,
        first=1,
        said=f"{SHARED}; {FIRST}",
    ),
    "vrbo": Twin(
        *("vrbo", vrbo_order, ((K + 2) * M, M)),
        parameters={"period_frac": 1.0},
        shared={(K + 2) * turn + 1: (K + 2) * turn for turn in range(M)},
        said="in the first turn of its inner loop the older point is the last inner point but one with the new omega, "
        "so that the change of omega never enters the estimates; ours is the point of before the outer step",
    ),
    "vrbo, omega held": Twin(
        *("vrbo", vrbo_order, ((K + 2) * M, M)),
        parameters={"period_frac": 1.0, "outer_ratio": 1e29},
        shared={(K + 2) * turn + 1: (K + 2) * turn for turn in range(M)},
        build=held,
        said="the same with an outer step size of zero: what is left comes of the last inner point but one",
    ),
    "ttsa": Twin("ttsa", lambda p: ([0, *range(2, 2 + p)], [0]), (K + 1, 1), shared={1: 0}, said=SHARED),
    "bsa": Twin(
        *("bsa", lambda p: ([*range(M + 1, M + 1 + p), M, *range(2 * M, 3 * M)], [0]), (2 * M, 1)),
        adopt=inner_of_first,
        build=bsa_shifted,
        inner=None,
        said="outer step before inner steps, in the paper after them; it starts from our first inner solution",
    ),
    "stocbio": Twin("stocbio", lambda _: ([*range(M), *range(M + 1, M + 1 + K), M], [0]), (M + 1 + K, 1)),
    "amigo": Twin("amigo", lambda _: (range(2 * M + 1), [0]), (2 * M + 1, 1)),
    "f2sa": Twin(
        *("f2sa", f2sa_order, (2 * M + 2, M + 1)),
        parameters={"step_size": 0.1, "delta_lmbda": 0.01},
        inner=lambda state: state.estimator_state.y,
    ),
}


def keys_of_lengths() -> jax.Array:
    """For each length p < K a key for which the benchmark's code draws p."""
    seeds: dict[int, Any] = {}
    for seed in range(1000):
        key = jax.random.PRNGKey(seed)
        seeds.setdefault(int(jax.random.randint(key, (1,), 0, K)[0]), key)
    return jnp.stack([seeds[p] for p in range(K)])


def difference(ours: Any, theirs: Any) -> float:
    """The largest over the steps of |ours - theirs| / |ours|."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.max(np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(ours, axis=1)))


def compare(clone: Clone, name: str, twin: Twin, objective: Mapping[str, Any]) -> dict[str, float]:
    """How far apart the iterates are; in float64."""
    module, solver = clone.solver(twin.file, objective, **twin.parameters)
    sizes = (objective["n_inner_samples"], objective["n_outer_samples"])
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, n // BATCH, (COMPARED + 1, k)) for n, k in zip(sizes, twin.draws, strict=True)]
    for draw, same in twin.shared.items():
        drawn[0][:, draw] = drawn[0][:, same]
    theta, omega = objective["inner_var0"], objective["outer_var0"]
    problem = benchmark_problem(objective["f_inner"], objective["f_outer"], BATCH, BATCH)
    ours = (twin.build or METHODS[name].build)(problem)

    def source(n: int, blocks: np.ndarray) -> Listed:
        starts = jnp.arange(n // BATCH)[:, None] * BATCH
        return Listed(starts, jax.random.key(0), True, blocks=jnp.asarray(blocks.ravel()))

    sources = [source(n, blocks) for n, blocks in zip(sizes, drawn, strict=True)]

    @jax.jit
    def run(*sources: Listed) -> Any:
        def step(state: fb.BilevelState, _: None) -> Any:
            state, metrics = ours.step(state, *sources)
            return state, (state, metrics.get("neumann_length", 0))

        start = ours.init(jax.random.key(1), omega, sources[0], theta, sources[1])
        return jax.lax.scan(step, start, None, length=COMPARED)[1]

    states, lengths = run(*sources)
    lengths = np.broadcast_to(np.asarray(lengths), (COMPARED,))
    rows: list[list[np.ndarray]] = [[], []]
    for t, p in enumerate(lengths):
        for level, numbers in enumerate(twin.order(int(p))):
            flat = drawn[level].ravel()[[t * twin.draws[level] + i for i in numbers]]
            rows[level].append(np.pad(flat, (0, max(twin.draws[level] - len(flat), 0))))
    carry = solver.init()
    if twin.adopt is not None:
        carry = twin.adopt(module, solver, carry, jax.tree.map(lambda x: x[0], states))
    step = solver.get_step(listed, listed)

    def given(carry: Any, x: Any) -> Any:
        inner, outer, key = x
        own = carry[1] if isinstance(carry, tuple) else carry
        for level, blocks, n in (("inner", inner, sizes[0]), ("outer", outer, sizes[1])):
            own = own | {
                f"state_{level}_sampler": {
                    "blocks": blocks,
                    "next": jnp.int32(0),
                    "num_blocks": jnp.float32(n // BATCH),
                }
            }
        if "key" in own:
            typed = jnp.issubdtype(own["key"].dtype, jax.dtypes.prng_key)
            own = own | {"key": jax.random.wrap_key_data(key) if typed else key}
        return (carry[0], own) if isinstance(carry, tuple) else own

    def one(carry: Any, x: Any) -> Any:
        carry, _ = step(given(carry, x[:3]), x[3])
        own = carry[1] if isinstance(carry, tuple) else carry
        return carry, (own["outer_var"], own["inner_var"])

    xs = (*(jnp.asarray(np.stack(r)) for r in rows), keys_of_lengths()[lengths], jnp.arange(COMPARED))
    xs = jax.tree.map(lambda x: x[twin.first :], xs)
    carry = given(carry, jax.tree.map(lambda x: x[0], xs[:3]))
    _, (omegas, thetas) = jax.jit(lambda carry, xs: jax.lax.scan(one, carry, xs))(carry, xs)
    states = jax.tree.map(lambda x: x[twin.first :], states)
    found = {"omega": difference(states.outer_params, omegas)}
    if twin.inner is not None:
        found["theta"] = difference(twin.inner(states), thetas)
    moved = states.outer_params[-1] - omega
    return found | {"moved": float(jnp.linalg.norm(moved) / jnp.linalg.norm(omega))}


def compare_bome(clone: Clone, objective: Mapping[str, Any]) -> dict[str, float]:
    """BOME's solver has no step: it runs on all samples until a callback ends it."""
    _, solver = clone.solver("bome", objective)
    seen: list[tuple[Any, Any]] = []

    def callback() -> bool:
        seen.append((solver.outer_var, solver.inner_var))
        return len(seen) <= COMPARED

    solver.run(callback)
    sizes = (objective["n_inner_samples"], objective["n_outer_samples"])
    ours = METHODS["bome"].build(benchmark_problem(objective["f_inner"], objective["f_outer"], *sizes))
    state = ours.init(jax.random.key(0), objective["outer_var0"], [0], objective["inner_var0"])

    def step(state: fb.BilevelState, _: None) -> Any:
        state, _ = ours.step(state, [0], [0])
        return state, (state.outer_params, state.inner_params)

    _, (omegas, thetas) = jax.jit(lambda s: jax.lax.scan(step, s, None, length=COMPARED))(state)
    their_omegas, their_thetas = (np.stack(x) for x in zip(*seen[1:], strict=True))
    moved = np.linalg.norm(their_omegas[-1] - seen[0][0]) / np.linalg.norm(seen[0][0])
    return {
        "omega": difference(omegas, their_omegas),
        "theta": difference(thetas, their_thetas),
        "moved": float(moved),
    }


NOT_COMPARED = {
    "pzobo": "its random directions come from a chain of keys that ours, which draws them one after the other, has not",
    "jaxopt_gd, jaxopt_itd": "JAXopt's gradient descent with a line search: not our method, see the page of peers",
    "optuna": "a black-box search, five trials a step; not run",
}


REMARKS = {name: twin.said for name, twin in TWINS.items()} | {"bome": "all samples in each draw"}


def iterates(clone: Clone, names: Sequence[str]) -> Iterator[store.Record]:
    objective, _ = clone.problem(**SMALL)
    for name in names:
        start = time.perf_counter()
        found = compare_bome(clone, objective) if name == "bome" else compare(clone, name, TWINS[name], objective)
        settings = {"what": "iterates", "steps": COMPARED} | SMALL
        yield store.record(TASK, name, 0, settings | _versions(clone), found, time.perf_counter() - start)


def _versions(clone: Clone) -> dict[str, str]:
    return {"benchmark_commit": clone.commit, "benchopt": importlib.metadata.version("benchopt")}


# Gradients.


class Theirs(NamedTuple):
    """One of the benchmark's solvers with parameters.

    Attributes:
        file: of its solver.
        parameters: other than its defaults.
        period: outer steps from one pass over the samples to the next.
        per_step: samples of one step, of those that run on all samples; 0: counted.
    """

    file: str
    parameters: Mapping[str, Any] = {}
    period: int = 0
    per_step: int = 0


N = 1024
THEIRS: dict[str, Theirs] = {
    "SOBA": Theirs("soba"),
    "SABA": Theirs("saba"),
    "SRBA": Theirs("srba", period=16),
    "FSLA": Theirs("fsla"),
    "SUSTAIN": Theirs("sustain"),
    "MRBO": Theirs("mrbo"),
    "VRBO": Theirs("vrbo", period=4096),
    "VRBO, period 16": Theirs("vrbo", {"period_frac": 0.5}, period=16),
    "TTSA": Theirs("ttsa"),
    "BSA": Theirs("bsa"),
    "StocBiO": Theirs("stocbio"),
    "AmIGO": Theirs("amigo"),
    "F2SA": Theirs("f2sa"),
    "F2SA, its best": Theirs("f2sa", {"step_size": 0.1, "delta_lmbda": 0.01}),
    "BOME": Theirs("bome", per_step=(M + 2) * N),
    "PZOBO": Theirs("pzobo", per_step=(M + 1) * N),
    "jaxopt_ITD": Theirs("jaxopt_itd", {"inner_solver": "gd", "warm_start": True}, per_step=(M + 1) * N),
}


def samples_per_step(theirs: Theirs) -> float:
    """On average over the lengths of a random series, without passes over all samples."""
    if theirs.per_step:
        return theirs.per_step
    orders = [next(t for t in TWINS.values() if t.file == theirs.file).order(p) for p in range(K)]
    return BATCH * statistics.mean(len(inner) + len(outer) for inner, outer in orders)


def compiled_epoch(theirs: Theirs, solver: Any) -> Callable[[Any, int], Any]:
    """(what it carries, steps done) -> what it carries after CHUNK steps: the solver's own program."""
    if theirs.file == "saba":
        memory, carry = solver.init()
        program = solver.one_epoch.lower(carry, memory, CHUNK).compile()
        return lambda carry, _: program(carry[1], carry[0])
    if theirs.file in ("srba", "vrbo"):
        program = solver.one_epoch.lower(solver.init(), CHUNK, 0).compile()
        return program
    program = solver.one_epoch.lower(solver.init(), CHUNK).compile()
    return lambda carry, _: program(carry)


def measure_theirs(clone: Clone, name: str, objective: Mapping[str, Any], metrics: Any) -> Iterator[store.Record]:
    theirs = THEIRS[name]

    def gradient(omega: Any) -> float:
        return float(metrics(objective["inner_var0"], omega)["value"])

    begun = {"gradient_start": gradient(objective["outer_var0"])}
    per_step = samples_per_step(theirs)
    drawn = {
        f"samples_{done}": per_step * done + (-(-done // theirs.period) * 2 * N if theirs.period else 0)
        for done in (STEPS // 2, STEPS)
    }
    setting = {"what": "gradient", "steps": STEPS, "seeds": SEEDS, "family": "benchopt", "batch": BATCH}
    setting |= {f"own_{key}": value for key, value in theirs.parameters.items()} | _versions(clone)
    _, solver = clone.solver(theirs.file, objective, **theirs.parameters)
    if not hasattr(solver, "one_epoch"):  # a Python loop over steps
        times: list[float] = []
        found: dict[str, float] = {}
        last = time.perf_counter()

        def callback() -> bool:
            nonlocal last
            jax.block_until_ready((solver.inner_var, solver.outer_var))
            times.append(time.perf_counter() - last)
            done = len(times) - 1
            if done in (STEPS // 2, STEPS):
                found[f"gradient_{done}"] = gradient(solver.outer_var)
            last = time.perf_counter()
            return done < STEPS

        solver.run(callback)
        each = statistics.median(times[1:])
        found |= {"seconds_per_step": each, "compile_seconds": times[1] - each}
        yield store.record(TASK, name, 0, setting, begun | drawn | found, sum(times))
        return
    start = time.perf_counter()
    epoch = compiled_epoch(theirs, solver)
    compile_seconds = time.perf_counter() - start
    jax.block_until_ready(epoch(solver.init(), 0))
    for seed in range(1, SEEDS + 1):
        keys = jax.random.split(jax.random.PRNGKey(seed), 2)
        solver.random_state = seed
        solver.state_inner_sampler["key"], solver.state_outer_sampler["key"] = keys
        carry, times, found = solver.init(), [], {}
        for done in range(CHUNK, STEPS + 1, CHUNK):
            start = time.perf_counter()
            carry = jax.block_until_ready(epoch(carry, done - CHUNK))
            times.append((time.perf_counter() - start) / CHUNK)
            if done in (STEPS // 2, STEPS):
                own = carry[1] if isinstance(carry, tuple) else carry
                found[f"gradient_{done}"] = gradient(own["outer_var"])
        found |= {"seconds_per_step": statistics.median(times), "compile_seconds": compile_seconds}
        yield store.record(TASK, name, seed, setting, begun | drawn | found, sum(times) * CHUNK)
        if found["seconds_per_step"] > FAST:
            return


OURS = [name for name, method in METHODS.items() if method.family != "estimator"]
OURS += ["aid-gradient-descent(10)"]
FIRST_RUN = {"SABA", "SOBA", "SRBA", "AMIGO", "AID-GRADIENT-DESCENT(10)"}
"""What a run that is broken off has; the rest follows by name, the dearest at the end."""


def measure_ours(clone: Clone, name: str, objective: Mapping[str, Any], metrics: Any) -> Iterator[store.Record]:
    starts = jnp.arange(N // BATCH) * BATCH
    setting = Setting(
        task=TASK,
        problem=benchmark_problem(objective["f_inner"], objective["f_outer"], BATCH, BATCH),
        levels=[(starts, 1), (starts, 1)],
        omega=objective["outer_var0"],
        theta=objective["inner_var0"],
        gradient=lambda omega: float(metrics(objective["inner_var0"], omega)["value"]),
        n=N,
    )
    for record in simulated.measure(METHODS[name], setting, STEPS, SEEDS):
        record["settings"] |= {"what": "gradient"} | _versions(clone)
        yield record
        if record["metrics"]["seconds_per_step"] > FAST:
            return


def gradients(clone: Clone, names: Sequence[str]) -> Iterator[store.Record]:
    objective, metrics = clone.problem()
    for name in names:
        measure = measure_theirs if name in THEIRS else measure_ours
        yield from measure(clone, name, objective, metrics)


# Reporting.


def iterates_table(records: Sequence[store.Record]) -> str:
    rows: list[tuple[str, ...]] = []
    for record in records:
        values, said = store.values(record), REMARKS[record["method"]]
        theta = f"{values['theta']:.1e}" if "theta" in values else "-"
        equal = max(values["omega"], values.get("theta", 0.0)) <= 1e-6
        rows.append(
            (
                *(f"`{record['method']}`", f"{values['omega']:.1e}", theta),
                *("yes" if equal else "no", said or "-"),
            )
        )
    rows += [(f"`{name}`", "-", "-", "not compared", said) for name, said in NOT_COMPARED.items()]
    return table.markdown(("solver", "omega", "theta", "to 1e-6", "remarks"), rows)


def is_ours(row: simulated.Row) -> bool:
    return row.family != "benchopt"


def best(rows: Sequence[simulated.Row]) -> str:
    """Of ours and of theirs the least gradient, after half and after all of the steps."""
    lines: list[str] = []
    if len({is_ours(row) for row in rows}) < 2:
        return ""
    for steps, of in ((STEPS // 2, lambda row: row.half), (STEPS, lambda row: row.last)):
        ours, theirs = (min((r for r in rows if is_ours(r) == which), key=of) for which in (True, False))
        said = [
            f"`{r.label}` {of(r):.3g} with {r.samples * steps / STEPS:,.0f} samples in {1e3 * r.seconds * steps:.0f} ms"
            for r in (ours, theirs)
        ]
        lines.append(f"After {steps} steps the least is {said[0]} of ours, {said[1]} of the benchmark's.")
    return "\n".join(lines)


def report(records: Sequence[store.Record]) -> str:
    which = {what: [r for r in records if r["settings"]["what"] == what] for what in ("iterates", "gradient")}
    settings, machine = records[0]["settings"], records[0]["machine"]
    rows = simulated.rows(which["gradient"])
    header = (
        *("solver", "of", f"‖∇h‖² after {STEPS // 2}", f"after {STEPS}"),
        *("samples drawn", "µs per step", "compile s"),
    )
    lines = (
        (
            *(f"`{r.label}`", "funcbilevel" if is_ours(r) else "benchmark", f"{r.half:.3g}", f"{r.last:.3g}"),
            *(f"{r.samples:,.0f}", f"{1e6 * r.seconds:.0f}", f"{r.compiling:.2f}"),
        )
        for r in rows
    )
    return (
        "# Beside the field's benchmark\n\n"
        f"benchopt {settings['benchopt']}, `benchmark_bilevel` at commit `{settings['benchmark_commit'][:12]}`, its "
        f"data set `simulated`, its objectives, {machine['cpu']}.\n\n"
        f"## Iterates\n\nThe largest relative difference over {COMPARED} steps in float64, same samples and step sizes."
        f"\n\n{iterates_table(which['iterates'])}\n"
        "## Gradient\n\nMedians over five orders of the samples of what takes less than 20 ms a step, one order of the "
        "rest; float32. The benchmark's solvers have their default parameters, its sampler, which draws the last batch "
        "of every epoch twice, and its own compiled program; ours the same step sizes.\n\n"
        f"{table.markdown(header, lines)}\n"
        f"{best(rows)}\n"
    )


def write(directory: Path) -> None:
    store.replace(directory / "table.md", report(store.read(directory / "runs.jsonl")).encode())


COMPARISONS = [*TWINS, "bome"]
NAMES = sorted([*THEIRS, *OURS], key=lambda name: ("VRBO" in name.upper(), name.upper() not in FIRST_RUN, name.upper()))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--output", type=Path, help="directory; what it holds is not measured again")
    group.add_argument("--report", type=Path, help="make the table of this directory anew")
    parser.add_argument("--clone", type=Path, help="of github.com/benchopt/benchmark_bilevel")
    parser.add_argument("--only", nargs="+", choices={*COMPARISONS, *NAMES}, metavar="SOLVER")
    parser.add_argument("--what", nargs="+", choices=("iterates", "gradient"), default=("iterates", "gradient"))
    args = parser.parse_args(argv)
    if args.report is not None:
        write(args.report)
        return
    if args.clone is None:
        parser.error("--clone is missing: the path of a clone of github.com/benchopt/benchmark_bilevel")
    jax.config.update("jax_enable_compilation_cache", False)  # compile seconds are those of the compiler
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    path, clone = output / "runs.jsonl", opened(args.clone)
    done = {(r["settings"]["what"], r["method"]) for r in store.read(path)} if path.exists() else set()
    for what, names, make in (("iterates", COMPARISONS, iterates), ("gradient", NAMES, gradients)):
        if what not in args.what:
            continue
        wanted = [n for n in args.only or names if n in names and (what, n) not in done]
        with tempfile.TemporaryDirectory() as scratch, jax.enable_x64(what == "iterates"):
            os.chdir(scratch)  # its data set keeps a cache where it runs, of the other precision, too
            for record in make(clone, wanted):
                store.append(path, [record])
            os.chdir(output)
    write(output)


if __name__ == "__main__":
    main()
