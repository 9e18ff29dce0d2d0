"""What the tasks' own training has in common: a step that keeps NaN out, a solver around it, rates, stacked data."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcbilevel as fb


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

    def init(key: Any, outer_params: Any, inner_batch: Any, inner_params: Any = None) -> fb.BilevelState:
        del inner_batch
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


def stack(trees: Sequence[Any]) -> Any:
    """Trees of NumPy arrays as one, with a new leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
