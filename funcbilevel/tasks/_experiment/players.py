"""What the training of two players has in common: methods, rates, steps that keep NaN out, a solver around them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import funcbilevel as fb
from funcbilevel.tasks._experiment.methods import Method, table


def finite(value: jax.Array, gradient: Any) -> jax.Array:
    """Scalar bool: neither an objective nor its gradient holds NaN or inf, nor do the gradient's squares overflow.

    Adam's step and state are then finite. XLA makes one loop of a step and its condition if the condition comes first;
    to look for NaN in what the step has made costs a quarter more time for a whole step of networks as small as these.
    """
    return jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(gradient))


def move(
    optimizer: optax.GradientTransformation, gradient: Any, state: Any, params: Any, condition: jax.Array
) -> tuple[Any, Any]:
    """(parameters, optimizer state) after one step, or as they were if the condition is false."""
    updates, new_state = optimizer.update(gradient, state, params)
    new = optax.apply_updates(params, updates), new_state
    return jax.tree.map(partial(jnp.where, condition), new, (params, state))


Step = Callable[[fb.BilevelState, Any, Any], tuple[fb.BilevelState, dict[str, jax.Array]]]


def solver_of_step(
    leader_optimizer: optax.GradientTransformation, follower_optimizer: optax.GradientTransformation, step: Step
) -> fb.BilevelSolver:
    """The solver of a step that `fb.bilevel` has not: of two players of a parametric problem who move at once.

    Arguments:
        leader_optimizer, follower_optimizer: whose states the step finds in its state.
        step: `(state, inner batch, outer batch) -> (state, metrics)`.
    """

    def init(
        key: Any, outer_params: Any, inner_batch: Any, inner_params: Any = None, outer_batch: Any = None
    ) -> fb.BilevelState:
        del inner_batch, outer_batch
        return fb.BilevelState(
            step=jnp.zeros((), jnp.int32),
            outer_params=outer_params,
            inner_params=inner_params,
            model_state=(),
            inner_opt_state=follower_optimizer.init(inner_params),
            outer_opt_state=leader_optimizer.init(outer_params),
            estimator_state=(),
            key=key,
        )

    def run(state: fb.BilevelState, inner_batches: Any, outer_batches: Any) -> tuple[fb.BilevelState, Any]:
        return jax.lax.scan(lambda s, batches: step(s, *batches), state, (inner_batches, outer_batches))

    return fb.BilevelSolver(init, step, run)


def cosine(count: Any, num_steps: Any) -> Any:
    """From 1 to 0 by half a cosine. (`optax.cosine_decay_schedule` does not take a traced number of steps.)"""
    return 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count / num_steps, 1.0)))


def adam(rate: Any, num_steps: Any) -> optax.GradientTransformation:
    """Adam, its rate falling to zero as a cosine; rate and number of steps may be traced."""
    # eps_root: `itd` differentiates the root of a second moment, which may be zero.
    return optax.adam(lambda count: rate * cosine(count, num_steps), eps_root=1e-16)


# Methods.


@dataclass(frozen=True)
class PlayersSetting:
    """What decides the compiled program of two players' training; a task has defaults of its own, and adds to it.

    Attributes:
        width: of each hidden layer.
        batch_size: samples per step, drawn anew for each.
        inner_steps: the follower's steps per step of the leader.
        solver_steps, damping: of conjugate gradients in `aid-cg`.
    """

    width: int
    batch_size: int
    inner_steps: int = 1
    solver_steps: int = 5
    damping: float = 0.1


def estimators(
    play: Callable[[Callable[[Any], fb.Estimator]], Callable[..., Any]],
    trials: tuple[Mapping[str, Any], ...],
    chosen: int = 0,
) -> dict[str, Method]:
    """The methods by which follower and leader move in turn.

    Args:
        play: makes the `build` of a method of `PlayersSetting -> estimator`.
        trials, chosen: of each method.
    """
    methods = (
        Method(
            "aid-cg",
            "implicit differentiation, its linear system by conjugate gradients",
            play(lambda setting: fb.aid(fb.cg(setting.solver_steps, setting.damping))),
            colour="C3",
        ),
        Method("alternating", "each player by its own gradient", play(lambda _: fb.alternating()), colour="C1"),
        Method(
            "itd",
            "the follower's steps differentiated",
            play(lambda setting: fb.itd(setting.inner_steps)),
            colour="C4",
        ),
    )
    return table(*(method._replace(trials=trials, chosen=chosen) for method in methods))


class Learner(NamedTuple):
    """A way to train, in pure functions.

    Attributes:
        init: initial parameters -> state.
        step: (state, follower's batch, leader's batch) -> (state, leader's objective).
        result: state -> what is measured at the end.
    """

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, jax.Array]]
    result: Callable[[Any], Any]


def turns(
    solver: fb.BilevelSolver, divide: Callable[[Any], tuple[Any, Any]], result: Callable[[fb.BilevelState], Any]
) -> Learner:
    """The follower moves, then the leader; `divide` gives (leader's, follower's) initial parameters."""

    def init(params: Any) -> fb.BilevelState:
        leader, follower = divide(params)
        return solver.init(jax.random.key(0), leader, None, follower)

    def step(state: fb.BilevelState, inner: Any, outer: Any) -> tuple[fb.BilevelState, jax.Array]:
        state, metrics = solver.step(state, inner, outer)
        return state, metrics["outer_objective"]

    return Learner(init, step, result)


def descent(
    objective: Callable[[Any, Any], jax.Array],
    optimizer: optax.GradientTransformation,
    result: Callable[[Any], Any] = lambda params: params,
) -> Learner:
    """All parameters descend one objective, `(params, leader's batch) -> value`; `result` is of the parameters."""

    def step(state: tuple[Any, Any], inner: Any, outer: Any) -> tuple[Any, jax.Array]:
        del inner
        params, opt_state = state
        value, gradient = jax.value_and_grad(objective)(params, outer)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return Learner(lambda params: (params, optimizer.init(params)), step, lambda state: result(state[0]))
