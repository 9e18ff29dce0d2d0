"""What `train` does about NaN besides raising: a fresh start of what may have caused it, or a way back."""

import dataclasses
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_callable, check_number
from funcbilevel._bilevel import BilevelSolver, BilevelState
from funcbilevel._typing import Batch


@dataclasses.dataclass(frozen=True)
class Rollback:
    """A policy of `train` for NaN: back to the last checkpoint, and on from there with smaller steps.

    A last checkpoint may bear the seeds of it, numbers that are huge but finite. Where NaN comes again before the run
    has got further than it was by `Checkpoint.every` steps, it goes back to the checkpoint before that one; the next
    time further still; and so on, to the oldest that is kept, or to the run's start if none has been removed.

    Attributes:
        max_times: how often at most in a run, >= 1; after that NaN raises.
        factor: by which inner and outer steps shrink each time, in (0, 1).
        solver: scale -> the solver to go on with, where `train` cannot make it itself. It multiplies the updates of
            both optimizers of a solver that is straight from `fb.bilevel`; for any other (a stochastic method, a
            wrapped step), give a function that makes it with learning rates multiplied by `scale`.

    Metrics then have `step_scale`, factor to the power of the number of rollbacks so far.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    Example: an outer step that is three times too long.
        >>> import tempfile
        >>> problem = fb.ParametricProblem(lambda w, u, _: (u - w) ** 2, lambda w, u, _: jnp.cosh(3 * u) + w**2)
        >>> solver = fb.bilevel(
        ...     problem, None, fb.aid(fb.cg(1)), inner_optimizer=optax.sgd(0.5), outer_optimizer=optax.sgd(0.3)
        ... )
        >>> start = solver.init(jax.random.key(0), 1.0, None, 0.0)
        >>> import warnings
        >>> with warnings.catch_warnings(action="ignore"):
        ...     state, metrics = fb.train(
        ...         solver, start, lambda key, step: ((), ()), 200, chunk=10, on_nonfinite=fb.Rollback(5),
        ...         checkpoint=fb.Checkpoint(tempfile.mkdtemp(), every=10),
        ...     )
        >>> bool(metrics["step_scale"][-1] < 1), bool(abs(state.outer_params) < 1e-3)
        (True, True)
    """

    max_times: int
    factor: float = 0.5
    solver: Callable[[float], BilevelSolver] | None = None

    def __post_init__(self) -> None:
        check_number("Rollback", "max_times", self.max_times)
        if isinstance(self.factor, bool) or not isinstance(self.factor, (int, float)):  # pyright: ignore
            raise TypeError(f"Rollback: factor must be a number in (0, 1), got {self.factor!r}.")
        if not 0 < self.factor < 1:
            raise ValueError(f"Rollback: factor must be a number in (0, 1), got {self.factor!r}.")
        if self.solver is not None:
            check_callable("Rollback", "solver", self.solver, "scale")


def with_smaller_steps(solver: BilevelSolver, policy: Rollback, rollbacks: int) -> BilevelSolver:
    """The solver after so many rollbacks, its metrics with `step_scale`; the same object for the same arguments."""
    scaled = _scaled(solver, policy.solver, policy.factor**rollbacks)
    return _with_metric(scaled, policy.factor**rollbacks)


@lru_cache(maxsize=64)
def _scaled(solver: BilevelSolver, make: Callable[[float], BilevelSolver] | None, scale: float) -> BilevelSolver:
    if make is not None:
        made = make(scale)
        if not isinstance(made, BilevelSolver):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Rollback: solver must return a BilevelSolver, got {type(made).__name__}.")
        return made
    return solver if scale == 1.0 else solver.init.setup.scaled(scale)  # pyright: ignore


def check_can_scale(solver: BilevelSolver, policy: Rollback) -> None:
    """That there is a way to make the solver's steps smaller."""
    setup = getattr(solver.init, "setup", None)
    if policy.solver is None and (setup is None or setup.step is not solver.step):
        raise ValueError(
            "train: on_nonfinite is fb.Rollback, but the solver is not straight from fb.bilevel, so that train cannot "
            "make its steps smaller; pass fb.Rollback(..., solver=<function of a scale that makes the solver with its "
            "learning rates multiplied by it>)."
        )


@lru_cache(maxsize=64)
def _with_metric(solver: BilevelSolver, scale: float) -> BilevelSolver:
    def step(state: BilevelState, inner_batch: Batch, outer_batch: Batch) -> Any:
        after, metrics = solver.step(state, inner_batch, outer_batch)
        return after, metrics | {"step_scale": jnp.full_like(metrics["outer_objective"], scale)}

    return solver._replace(step=step)


# A fresh start of moments and warm starts.


def refreshed(solver: BilevelSolver, state: BilevelState, inner_batch: Batch, broken: Any) -> BilevelState | None:
    """The state with both optimizers' floats and the estimator's as `solver.init` makes them, counts as they are.

    Arguments:
        solver: whose `init` is called again.
        state: of one run, or of several seeds.
        inner_batch: of one step.
        broken: bool, or one for each seed: only those are changed.

    Returns:
        None if `init` makes a state of another form, so that nothing can be taken from it.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # said when the run began
            return _refresh(solver)(state, inner_batch, jnp.asarray(broken))
    except Exception:  # whatever the user's model or init raise where they are called again
        return None


@lru_cache(maxsize=16)
def _refresh(solver: BilevelSolver) -> Any:
    def one(state: BilevelState, inner_batch: Batch, broken: jax.Array) -> BilevelState:
        fresh = solver.init(state.key, state.outer_params, inner_batch, state.inner_params)
        names = ("inner_opt_state", "outer_opt_state", "estimator_state")

        def choose(old: jax.Array, new: jax.Array) -> jax.Array:
            if not jnp.issubdtype(old.dtype, jnp.inexact):
                return old
            return jnp.where(broken, new.astype(old.dtype), old)

        return state._replace(
            **{name: jax.tree.map(choose, getattr(state, name), getattr(fresh, name)) for name in names}
        )

    def all_seeds(state: BilevelState, inner_batch: Batch, broken: jax.Array) -> BilevelState:
        function = one
        seeds = state.step.shape
        shared = any(jnp.shape(x)[: len(seeds)] != seeds for x in jax.tree.leaves(inner_batch))
        for _ in seeds:
            function = jax.vmap(function, in_axes=(0, None if shared else 0, 0))
        return function(state, inner_batch, broken)

    return jax.jit(all_seeds)
