"""The library's parametric methods as solvers of benchopt's `benchmark_bilevel`.

A solver file of that benchmark, such as `solvers/fb_saba.py`, is then

    import funcbilevel as fb
    from funcbilevel.contrib.benchopt import benchmark_solver

    def build(problem, step_size, outer_ratio):
        return fb.saba(
            problem, inner_optimizer=step_size, linear_optimizer=step_size, outer_optimizer=step_size / outer_ratio
        )

    Solver = benchmark_solver("fb-SABA", build, {"step_size": [0.1], "outer_ratio": [1.0]})

The benchmark's objectives are functions `f(inner_var, outer_var, start, batch_size)` of the samples from `start` on,
and so the samples that the methods draw are numbers `start`, one for each block of `batch_size` consecutive samples.
The order of the blocks is that of `fb.finite_sum`, which is not the benchmark's own. Needs benchopt (`pip install
benchopt`).
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import funcbilevel as fb


def benchmark_problem(f_inner: Any, f_outer: Any, inner_batch_size: int, outer_batch_size: int) -> fb.ParametricProblem:
    """The benchmark's objectives as a problem, whose batches are arrays [1] of `start`.

    Arguments:
        f_inner, f_outer: `(inner_var, outer_var, start, batch_size) -> scalar`.
        inner_batch_size, outer_batch_size: how many samples from `start` on.

    Example:
        >>> f = lambda theta, omega, start, batch_size: (theta - omega) ** 2
        >>> float(benchmark_problem(f, f, 64, 64).inner_objective(1.0, 3.0, [0]))
        4.0
    """
    return fb.ParametricProblem(
        lambda omega, theta, batch: f_inner(theta, omega, start=batch[0], batch_size=inner_batch_size),
        lambda omega, theta, batch: f_outer(theta, omega, start=batch[0], batch_size=outer_batch_size),
    )


def benchmark_samples(num_samples: int, batch_size: int, key: Any, replace: bool = False) -> fb.FiniteSum:
    """The `start` of each block of `batch_size` samples; samples beyond the last whole block are left out.

    Example:
        >>> benchmark_samples(200, 64, jax.random.key(0)).data[:, 0]
        Array([  0,  64, 128], dtype=int32)
    """
    return fb.finite_sum(jnp.arange(num_samples // batch_size) * batch_size, 1, key=key, replace=replace)


def benchmark_solver(
    name: str, build: Callable[..., fb.BilevelSolver], parameters: Mapping[str, Sequence[Any]], reference: str = ""
) -> Any:
    """A class of benchopt that runs a solver of this library.

    Arguments:
        name: in the benchmark's tables.
        build: `(problem, **parameters) -> fb.BilevelSolver`.
        parameters: name -> values that the benchmark tries. `batch_size` (64, or "full"), `eval_freq` (128, outer steps
            between two evaluations) and `random_state` (1) are added, if they are not there; they are not given to
            `build`.
        reference: what the benchmark's page says of the method; the docstring of the class.

    Returns:
        A subclass of `benchopt.BaseSolver`; bind it to the name `Solver` in the solver file.

    Raises:
        ImportError: benchopt is not installed.
        TypeError: `build` does not take the parameters.

    Example:
        >>> def build(problem, step_size):
        ...     return fb.soba(
        ...         problem, inner_optimizer=step_size, linear_optimizer=step_size, outer_optimizer=step_size
        ...     )
        >>> Solver = benchmark_solver("fb-SOBA", build, {"step_size": [0.1]})  # doctest: +SKIP
    """
    try:
        base: Any = importlib.import_module("benchopt").BaseSolver
        criterion: Any = importlib.import_module("benchopt.stopping_criterion").SufficientProgressCriterion
    except ImportError as error:
        raise ImportError("benchmark_solver: benchopt is not installed; pip install benchopt.") from error
    inspect.signature(build).bind(None, **dict.fromkeys(parameters))

    def set_objective(
        self: Any,
        f_inner: Any,
        f_outer: Any,
        n_inner_samples: int,
        n_outer_samples: int,
        inner_var0: Any,
        outer_var0: Any,
        **_: Any,
    ) -> None:
        sizes = (n_inner_samples, n_outer_samples)
        batch_sizes = sizes if self.batch_size == "full" else (self.batch_size, self.batch_size)
        problem = benchmark_problem(f_inner, f_outer, *batch_sizes)
        solver = build(problem, **{k: getattr(self, k) for k in parameters})
        key, *keys = jax.random.split(jax.random.key(self.random_state), 3)
        sources = [benchmark_samples(*sample) for sample in zip(sizes, batch_sizes, keys, strict=True)]
        self.start = partial(jax.jit(solver.init), key, outer_var0, sources[0], inner_var0, outer_batch=sources[1])
        advance = jax.jit(solver.run, static_argnames="num_steps", donate_argnums=0)
        self.advance = lambda state: advance(state, *sources, num_steps=self.eval_freq)[0]
        self.advance(self.start())  # compiled before the clock runs

    def run(self: Any, callback: Callable[[], bool]) -> None:
        self.state = self.start()
        while callback():
            self.state = jax.block_until_ready(self.advance(self.state))

    def get_result(self: Any) -> dict[str, Any]:
        return {"inner_var": self.state.inner_params, "outer_var": self.state.outer_params}

    members: dict[str, Any] = {
        "__doc__": reference or build.__doc__ or f"{name}, from funcbilevel.",
        "name": name,
        "parameters": {"batch_size": [64], "eval_freq": [128], "random_state": [1], **parameters},
        "requirements": ["pip:funcbilevel"],
        "stopping_criterion": criterion(patience=100, strategy="callback"),
        "get_next": staticmethod(lambda stop_val: stop_val + 1),
        "set_objective": set_objective,
        "run": run,
        "get_result": get_result,
    }
    return type("Solver", (base,), members)
