"""What the methods share: init, step and run around a method's `update`."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax

from funcbilevel._arguments import (
    as_float_tree,
    check_at_least,
    check_callable,
    check_key,
    check_leading_axis,
    check_optimizer,
    check_positive,
)
from funcbilevel._bilevel import BilevelSolver, BilevelState, check_state
from funcbilevel._check import check_inner, check_objectives
from funcbilevel._data import batch_form
from funcbilevel._draws import FiniteSum, Minibatches, Source, draw, placed, run_steps
from funcbilevel._estimator import Estimator, no_state
from funcbilevel._problem import FunctionalProblem, ParametricProblem, reduce_over_devices
from funcbilevel._stochastic._oracles import Report
from funcbilevel._tree import all_finite, own_buffer, stays_finite, tree_norm, tree_where
from funcbilevel._typing import Batch, InnerParams, Key, Metrics, OuterParams, PyTree

Schedule: TypeAlias = "float | Callable[[jax.Array], Any]"
StepSize: TypeAlias = "float | Callable[[jax.Array], Any] | optax.GradientTransformation"


class Reader(NamedTuple):
    """The samples of one level in one outer step: reader(i) is draw number i."""

    name: str
    source: Any
    key: Key

    def __call__(self, i: Any) -> Batch:
        return draw("step", self.source, self.key, i, self.name)


class Draws(NamedTuple):
    """The samples of one outer step."""

    inner: Reader
    outer: Reader


class OwnInit(Protocol):
    def __call__(self, omega: OuterParams, theta: InnerParams, inner: Any, outer: Any, /) -> PyTree: ...


class Update(Protocol):
    def __call__(self, state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]: ...


class Levels(NamedTuple):
    """The optimizers of the levels."""

    inner: optax.GradientTransformationExtraArgs
    linear: optax.GradientTransformationExtraArgs
    outer: optax.GradientTransformationExtraArgs


def optimizers(function: str, inner: StepSize, outer: StepSize, linear: StepSize = 1.0) -> Levels:
    """A number or a schedule is gradient descent with that step size; schedules count outer steps."""
    return Levels(
        optimizer_of(function, "inner_optimizer", inner),
        optimizer_of(function, "linear_optimizer", linear),
        optimizer_of(function, "outer_optimizer", outer),
    )


def optimizer_of(function: str, name: str, size: StepSize) -> optax.GradientTransformationExtraArgs:
    if isinstance(size, tuple):
        check_optimizer(function, name, size)
        transformation: Any = size
        return optax.with_extra_args_support(transformation)
    at = schedule(function, name, size, positive=True)

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Any:
        del params
        return jax.tree.map(lambda d: -jnp.asarray(at(extra["step"]), d.dtype) * d, updates), state

    def init(params: PyTree) -> Any:
        del params
        return optax.EmptyState()

    return optax.GradientTransformationExtraArgs(init, update)


def schedule(function: str, name: str, value: Schedule, *, positive: bool = False) -> Callable[[jax.Array], Any]:
    """outer step -> number."""
    if callable(value):
        check_callable(function, name, value, "step")
        return value
    check_positive(function, name, value) if positive else check_at_least(function, name, value, 0.0)
    return lambda _: value


def moved(
    optimizer: optax.GradientTransformationExtraArgs, direction: PyTree, opt_state: Any, params: PyTree, step: jax.Array
) -> tuple[PyTree, Any]:
    """`params` after one step of the optimizer along -direction, and the optimizer's state."""
    updates, opt_state = optimizer.update(direction, opt_state, params, step=step)
    return optax.apply_updates(params, updates), opt_state


class PenaltyState(NamedTuple):
    """y, like inner_params: what pays for leaving the inner solution; and the state of its optimizer."""

    y: InnerParams
    opt_state: optax.OptState


def penalty_start(optimizer: optax.GradientTransformation) -> OwnInit:
    """y = theta."""
    return lambda omega, theta, inner, outer: PenaltyState(theta, optimizer.init(theta))


class LinearState(NamedTuple):
    """u ~ H^-1 d_theta F, like inner_params, and the state of its optimizer."""

    u: InnerParams
    opt_state: optax.OptState


def linear_start(levels: Levels, theta: InnerParams) -> LinearState:
    """u = 0."""
    u = jax.tree.map(jnp.zeros_like, theta)
    return LinearState(u, levels.linear.init(u))


def linear_step(levels: Levels, direction: InnerParams, state: LinearState, step: jax.Array) -> LinearState:
    return LinearState(*moved(levels.linear, direction, state.opt_state, state.u, step))


def inner_step(levels: Levels, direction: InnerParams, state: BilevelState) -> BilevelState:
    theta, opt_state = moved(levels.inner, direction, state.inner_opt_state, state.inner_params, state.step)
    return state._replace(inner_params=theta, inner_opt_state=opt_state)


def outer_step(levels: Levels, direction: OuterParams, state: BilevelState) -> BilevelState:
    omega, opt_state = moved(levels.outer, direction, state.outer_opt_state, state.outer_params, state.step)
    return state._replace(outer_params=omega, outer_opt_state=opt_state)


def solver(
    name: str,
    problem: ParametricProblem,
    levels: Levels,
    own: OwnInit,
    update: Update,
    *,
    inner_draws: int,
    outer_draws: int,
    finite_sums: bool = False,
    guarded: str | None = None,
) -> BilevelSolver:
    """The solver of which `update` makes one outer step.

    Arguments:
        name: of the method, for messages.
        levels: the optimizers; their states at the two outer levels are in `BilevelState`.
        own: `(omega, theta, inner source, outer source) -> what the method carries`.
        update: `(state, draws, key) -> (state, Report)`; it leaves step and key alone.
        inner_draws, outer_draws: how many each outer step makes.
        finite_sums: whether both sources must be `FiniteSum`s, and `init` gets both.
        guarded: the field of what the method carries that is held back where numbers are not finite; None: all of it.
            The rest has to stay finite by itself: a large memory must not be copied in every step.
    """
    if isinstance(problem, FunctionalProblem):
        raise TypeError(
            f"{name}: problem must be an fb.ParametricProblem, got a FunctionalProblem; make one of it with "
            "fb.parametrize(problem, model), and start from the model's parameters."
        )
    if not isinstance(problem, ParametricProblem):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{name}: problem must be an fb.ParametricProblem, got {type(problem).__name__}.")
    estimator = Estimator(no_state, _not_called, description=f"fb.{name}")
    told: set[str] = set()
    counts = {"inner_batch": inner_draws, "outer_batch": outer_draws}

    def check_source(function: str, argument: str, source: Source) -> None:
        if finite_sums and not isinstance(source, FiniteSum):
            where = ", and pass both at init" if source is None else ""
            raise TypeError(
                f"{function}: {argument} must be an fb.FiniteSum, because fb.{name} needs all of the data, got "
                f"{type(source).__name__}; make one with fb.finite_sum(data, batch_size){where}."
            )
        if isinstance(source, Minibatches):
            size = check_leading_axis(function, "draws", **{f"{argument}.batches": source.batches})
            if size != counts[argument]:
                raise ValueError(
                    f"{function}: {argument} is fb.Minibatches of {size} batches, expected {counts[argument]}, as many "
                    f"as fb.{name} draws in an outer step; stack that many."
                )

    def init(
        key: Key,
        outer_params: OuterParams,
        inner_batch: Source,
        inner_params: InnerParams | None = None,
        outer_batch: Source = None,
    ) -> BilevelState:
        check_key("init", key, outer_params)
        omega = as_float_tree("init", "outer_params", outer_params)
        if inner_params is None:
            raise ValueError(
                "init: inner_params is None, but a ParametricProblem has no model to draw them from; pass "
                "inner_params=<the starting point of the inner level>."
            )
        theta = as_float_tree("init", "inner_params", inner_params)
        for argument, source in (("inner_batch", inner_batch), ("outer_batch", outer_batch)):
            if source is not None or finite_sums:
                check_source("init", argument, source)
        batch = None
        if inner_batch is not None:
            batch = draw("init", inner_batch, key, 0)
            check_inner("init", problem, None, omega, theta, (), batch, told)
        state = BilevelState(
            step=jnp.zeros((), jnp.int32),
            outer_params=omega,
            inner_params=theta,
            model_state=(),
            inner_opt_state=levels.inner.init(theta),
            outer_opt_state=levels.outer.init(omega),
            estimator_state=own(omega, theta, inner_batch, outer_batch),
            key=key,
            outer_model_state=(),
            batch_form=batch_form(batch),
        )
        return jax.tree.map(own_buffer, state)

    def step(state: BilevelState, inner_batch: Source, outer_batch: Source) -> tuple[BilevelState, Metrics]:
        check_state("step", state)
        check_source("step", "inner_batch", inner_batch)
        check_source("step", "outer_batch", outer_batch)
        key, inner_key, outer_key, own_key = jax.random.split(state.key, 4)
        draws = Draws(
            Reader("inner_batch", placed(inner_batch, state.step * inner_draws), inner_key),
            Reader("outer_batch", placed(outer_batch, state.step * outer_draws), outer_key),
        )
        omega, theta = state.outer_params, state.inner_params
        check_objectives("step", problem, None, estimator, omega, theta, (), draws.inner(0), draws.outer(0), told)
        after, report = update(state, draws, own_key)
        explicit, implicit = _like(report.explicit, omega), _like(report.implicit, omega)

        inner = all_finite(after.inner_params, report.inner_value) & stays_finite(
            state.inner_opt_state, after.inner_opt_state
        )
        mine, mine_before = (
            s.estimator_state if guarded is None else getattr(s.estimator_state, guarded) for s in (after, state)
        )
        own = stays_finite(mine_before, mine) & all_finite(implicit)
        above = all_finite(report.outer_value, explicit) & report.metrics.get("outer_finite", True)
        outer = above & all_finite(after.outer_params) & stays_finite(state.outer_opt_state, after.outer_opt_state)
        flags = {
            "inner_finite": inner | ~all_finite(omega),
            "adjoint_finite": own | ~(inner & above),
            "outer_finite": outer,
        }
        flags = reduce_over_devices(problem, flags)
        sound = reduce_over_devices(problem, {"all": inner & own & outer})["all"]
        inner = reduce_over_devices(problem, {"inner": inner})["inner"]
        mine = tree_where(sound, mine, mine_before)
        after = after._replace(
            inner_params=tree_where(inner, after.inner_params, theta),
            inner_opt_state=tree_where(inner, after.inner_opt_state, state.inner_opt_state),
            outer_params=tree_where(sound, after.outer_params, omega),
            outer_opt_state=tree_where(sound, after.outer_opt_state, state.outer_opt_state),
            estimator_state=mine if guarded is None else after.estimator_state._replace(**{guarded: mine}),
        )
        metrics = reduce_over_devices(problem, report.metrics) | {
            "inner_objective": report.inner_value,
            "outer_objective": report.outer_value,
            "hypergradient_norm": tree_norm(report.direction),
            "explicit_norm": tree_norm(explicit),
            "implicit_norm": tree_norm(implicit),
            **flags,
        }
        return after._replace(step=state.step + 1, key=key), metrics

    def run(
        state: BilevelState, inner_batches: Source, outer_batches: Source, num_steps: int | None = None
    ) -> tuple[BilevelState, Metrics]:
        return run_steps(step, state, inner_batches, outer_batches, num_steps)

    return BilevelSolver(init, step, run)


def _not_called(*_: Any) -> Any:
    raise AssertionError("a method's estimator stands in messages only")


def _like(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)
