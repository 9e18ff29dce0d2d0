"""The linear head of a model of `variable_projection`: solved for on the inner batch, and differentiated through."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from funcbilevel._model import Model
from funcbilevel._problem import FunctionalProblem, inner_derivatives, inner_value, mean_over_devices
from funcbilevel._tree import moments, tree_vdot
from funcbilevel._typing import Batch, OuterParams


def solve_head(
    problem: FunctionalProblem, model: Model, outer_params: OuterParams, phi: jax.Array, inner_batch: Batch
) -> jax.Array:
    """V = argmin L_in(omega, phi V) + ridge/2 |V|^2, [p, k], for an L_in that is quadratic in the prediction."""
    assert model.head is not None
    zero = phi @ jnp.zeros((phi.shape[1], model.head.num_outputs), phi.dtype)  # sharded as the samples are
    g, C = inner_derivatives(problem, outer_params, zero, inner_batch)  # d_v L_in(omega, v) = g + C v
    mean = partial(mean_over_devices, problem)
    # The outer mean is for the derivative: the solve's transpose takes cotangents that are alike on all devices.
    return mean(model.head.fit(C, -mean(moments(phi, g)), phi, zero, mean)).astype(phi.dtype)


def at_optimal_head(problem: FunctionalProblem, ridge: float) -> Callable[..., jax.Array]:
    """(omega, phi, V, batch) -> L_in(omega, phi V) + ridge/2 |V|^2 at the V that minimises it.

    Its derivative in V is zero there, so that the first derivative is the partial one, with V held fixed; further
    derivatives see V move. Plain differentiation would say the same, and solve for V's derivative in vain.
    """

    def value(outer_params: OuterParams, phi: jax.Array, V: jax.Array, batch: Batch) -> jax.Array:
        return inner_value(problem, outer_params, phi @ V, batch)[0] + ridge_term(ridge, V)

    def partial_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        omega, phi, V, batch = primals
        d_omega, d_phi, _, d_batch = tangents
        return jax.jvp(
            lambda omega, phi, batch: value(omega, phi, V, batch), (omega, phi, batch), (d_omega, d_phi, d_batch)
        )

    at_optimum = jax.custom_jvp(value)
    at_optimum.defjvp(partial_jvp)
    return at_optimum


def ridge_term(ridge: float, V: jax.Array | None) -> jax.Array:
    """ridge/2 |V|^2, the head's part of the inner objective."""
    return 0.5 * ridge * tree_vdot(V, V)
