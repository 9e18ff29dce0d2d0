"""A number of optax steps in one scan: the inner fit and the adjoint fit alike."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from funcbilevel._described import fields_that_differ
from funcbilevel._typing import Key, Metrics, ModelState, PyTree


class FitState(NamedTuple):
    """What a fit carries.

    Attributes:
        params: the parameters being fitted.
        opt_state: the state of the optax optimizer.
        model_state: the model's non-trainable state.
    """

    params: PyTree
    opt_state: optax.OptState
    model_state: ModelState

    def __repr__(self) -> str:
        return fields_that_differ(self)


# (params, model_state, key, step) -> ((value, (metrics, model_state)), gradient)
ValueAndGrad: TypeAlias = Callable[
    [PyTree, ModelState, Key | None, jax.Array], tuple[tuple[jax.Array, tuple[Metrics, ModelState]], PyTree]
]


class Fit(NamedTuple):
    """The result of a fit.

    Attributes:
        state: after the last step.
        first, value: the objective at the first and at the last step, before that step's update.
        metrics: those of the objective at the last step.
    """

    state: FitState
    first: jax.Array
    value: jax.Array
    metrics: Metrics


def fit(
    value_and_grad: ValueAndGrad,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    state: FitState,
    key: Key | None,
    *,
    first_step: int = 0,
    remat: bool = False,
    **extra: Any,
) -> Fit:
    """Runs `num_steps` optimizer steps; step i gets its number `first_step + i`, and the key folded with it.

    Optimizers that take extra arguments (line searches, `reduce_on_plateau`, ...) get `value`, `grad` and
    `value_fn` as `optax` names them, and what is in `extra`.
    """
    update = optax.with_extra_args_support(optimizer).update

    def step(state: FitState, i: jax.Array) -> tuple[FitState, tuple[jax.Array, Metrics]]:
        params, opt_state, model_state = state
        step_key = None if key is None else jax.random.fold_in(key, i)
        (value, (metrics, new_model_state)), grad = value_and_grad(params, model_state, step_key, i)

        def value_fn(params: PyTree, **_: Any) -> jax.Array:
            return value_and_grad(params, model_state, step_key, i)[0][0]

        updates, opt_state = update(grad, opt_state, params, value=value, grad=grad, value_fn=value_fn, **extra)
        params = optax.apply_updates(params, updates)
        return FitState(params, opt_state, new_model_state), (value, metrics)

    steps = first_step + jnp.arange(num_steps)
    state, trace = jax.lax.scan(jax.checkpoint(step) if remat else step, state, steps)
    values, metrics = trace
    return Fit(state, values[0], values[-1], jax.tree.map(lambda x: x[-1], metrics))
