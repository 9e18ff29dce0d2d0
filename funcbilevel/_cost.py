"""What a compiled function costs: compile time, run time, memory and arithmetic."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from funcbilevel._arguments import check_number
from funcbilevel._bilevel import BilevelSolver, bilevel
from funcbilevel._estimator import Estimator
from funcbilevel._model import Model
from funcbilevel._problem import Problem
from funcbilevel._typing import Batch, InnerParams, Key, OuterParams


class Cost(NamedTuple):
    """The cost of one call of a compiled function.

    Attributes:
        name: what was measured.
        compile_seconds: tracing, lowering and compiling.
        seconds: median run time of a call, compilation apart.
        seconds_low, seconds_high: first and third quartile of the run times.
        temp_bytes: XLA's temporary buffers (exact and repeatable).
        argument_bytes, output_bytes: sizes of what goes in and comes out.
        flops: floating-point operations by XLA's count, which takes the body of a loop once; None if not given.
        peak_bytes: the device's measured peak so far, where the device tells (GPUs); else None.
    """

    name: str
    compile_seconds: float
    seconds: float
    seconds_low: float
    seconds_high: float
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    flops: float | None
    peak_bytes: int | None


class CostTable(NamedTuple):
    """Costs measured side by side; `str` of it is a table.

    Attributes:
        rows: one `Cost` per name, the first being what the others are compared with.
    """

    rows: tuple[Cost, ...]

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        first = self.rows[0]
        lines = [f"{'':{width}}  {'ms':>9}  {'quartiles':>17}  {'ratio':>6}  {'temp MiB':>9}  {'compile s':>9}"]
        for row in self.rows:
            quartiles = f"{1e3 * row.seconds_low:.2f}-{1e3 * row.seconds_high:.2f}"
            lines.append(
                f"{row.name:{width}}  {1e3 * row.seconds:>9.2f}  {quartiles:>17}  {row.seconds / first.seconds:>6.2f}  "
                f"{row.temp_bytes / 2**20:>9.2f}  {row.compile_seconds:>9.2f}"
            )
        return "\n".join(lines)


def cost(function: Callable[..., Any] | BilevelSolver, *args: Any, repeats: int = 10) -> Cost:
    """Compiles `function(*args)` and measures it.

    Arguments:
        function: any function of pytrees of arrays (it is jitted), or a `BilevelSolver`, whose `step` is measured.
        args: its arguments; for a solver `state, inner_batch, outer_batch`.
        repeats: timed calls, each blocked on, after two untimed ones; >= 1.

    Returns:
        A `Cost`.

    Raises:
        ValueError: `repeats` < 1.

    Example:
        >>> import jax.numpy as jnp, funcbilevel as fb
        >>> fb.cost(lambda x: x @ x, jnp.ones((64, 64))).temp_bytes >= 0
        True
    """
    return measure_costs({_name(function): (function, args)}, repeats).rows[0]


def compare_costs(
    problem: Problem,
    model: Model | None,
    estimators: Mapping[str, Estimator],
    outer_params: OuterParams,
    inner_batch: Batch,
    outer_batch: Batch,
    *,
    inner_optimizer: optax.GradientTransformation,
    outer_optimizer: optax.GradientTransformation,
    inner_steps: int = 1,
    inner_params: InnerParams | None = None,
    key: Key | None = None,
    repeats: int = 10,
) -> CostTable:
    """One whole outer step under each estimator, measured in turns in one process.

    Arguments:
        problem, model: as in `bilevel`.
        estimators: name -> estimator.
        outer_params, inner_batch, outer_batch: what to measure on.
        inner_optimizer, outer_optimizer, inner_steps: as in `bilevel`.
        inner_params: as in the solver's `init`.
        key: random key of the initial state; default `jax.random.key(0)`.
        repeats: timed calls of each; they take turns, so that a slow moment of the machine meets all alike.

    Returns:
        A `CostTable`; print it.

    Raises:
        ValueError, TypeError: as `bilevel`.

    Example:
        >>> print(fb.compare_costs(problem, model, {"alternating": fb.alternating()}, ...))  # doctest: +SKIP
    """
    key = jax.random.key(0) if key is None else key

    def step(estimator: Estimator) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        solver = bilevel(
            problem,
            model,
            estimator,
            inner_optimizer=inner_optimizer,
            outer_optimizer=outer_optimizer,
            inner_steps=inner_steps,
        )
        state = jax.jit(solver.init)(key, outer_params, inner_batch, inner_params)
        return solver.step, (state, inner_batch, outer_batch)

    return measure_costs({name: step(estimator) for name, estimator in estimators.items()}, repeats)


def measure_costs(
    calls: Mapping[str, tuple[Callable[..., Any] | BilevelSolver, tuple[Any, ...]]], repeats: int = 10
) -> CostTable:
    """Measures several calls `name -> (function, arguments)` side by side, taking turns.

    Arguments:
        calls: what to measure; the first one is what the table's ratios refer to.
        repeats: timed calls of each, after two untimed ones.

    Returns:
        A `CostTable` with one row per name.

    Raises:
        ValueError: `repeats` < 1 or no calls.

    Example:
        >>> x = jnp.ones(8)
        >>> table = fb.measure_costs({"sin": (jnp.sin, (x,)), "exp": (jnp.exp, (x,))}, repeats=2)
    """
    check_number("measure_costs", "repeats", repeats)
    if not calls:
        raise ValueError("measure_costs: calls is empty; pass at least one name -> (function, arguments).")
    compiled: dict[str, tuple[Any, tuple[Any, ...], float]] = {}
    for name, (function, args) in calls.items():
        start = time.perf_counter()
        step = function.step if isinstance(function, BilevelSolver) else function
        executable = jax.jit(step).lower(*args).compile()
        compiled[name] = executable, args, time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(2 + repeats):
        for name, (executable, args, _) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(executable(*args))
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return CostTable(
        tuple(_cost(name, executable, seconds, times[name]) for name, (executable, _, seconds) in compiled.items())
    )


def _cost(name: str, executable: Any, compile_seconds: float, times: list[float]) -> Cost:
    memory = executable.memory_analysis()
    analysis = executable.cost_analysis() or {}
    statistics = jax.local_devices()[0].memory_stats() or {}
    low, median, high = (float(q) for q in np.quantile(times, (0.25, 0.5, 0.75)))
    return Cost(
        name=name,
        compile_seconds=compile_seconds,
        seconds=median,
        seconds_low=low,
        seconds_high=high,
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        flops=analysis.get("flops"),
        peak_bytes=statistics.get("peak_bytes_in_use"),
    )


def _name(function: Any) -> str:
    return "step" if isinstance(function, BilevelSolver) else getattr(function, "__name__", type(function).__name__)
