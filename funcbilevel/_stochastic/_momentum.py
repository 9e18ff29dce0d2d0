"""Recursive momentum at both levels, which SUSTAIN and MRBO share: they differ in the series for the inverse."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcbilevel._bilevel import BilevelSolver, BilevelState
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._loop import Draws, Levels, inner_step, outer_step, solver
from funcbilevel._stochastic._oracles import (
    Report,
    Series,
    by_inverse,
    inner_gradient,
    recursive_momentum,
    report_of,
)
from funcbilevel._typing import InnerParams, Key, OuterParams


class MomentumState(NamedTuple):
    """The point of the step before, and the two momenta.

    Attributes:
        omega_before, theta_before: like outer_params and inner_params.
        inner, outer: h^G, like inner_params, and h^F, like outer_params.
    """

    omega_before: OuterParams
    theta_before: InnerParams
    inner: InnerParams
    outer: OuterParams


def double_momentum(
    name: str,
    problem: ParametricProblem,
    levels: Levels,
    series: Series,
    inner_weight: Callable[[jax.Array], Any],
    outer_weight: Callable[[jax.Array], Any],
) -> BilevelSolver:
    """Moves theta along h^G and omega along h^F, both taken at the point of before.

    Inner draws: 0 for the gradient, 1 for the cross derivative, then those of the series. Outer: 0.
    """

    def own(omega: OuterParams, theta: InnerParams, *_: object) -> MomentumState:
        return MomentumState(omega, theta, jax.tree.map(jnp.zeros_like, theta), jax.tree.map(jnp.zeros_like, omega))

    def update(state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]:
        omega_before, theta_before, inner, outer = state.estimator_state
        point, before, t = (state.outer_params, state.inner_params), (omega_before, theta_before), state.step
        inverse, metrics = series.at(problem, lambda i: draws.inner(2 + i), key, t)

        def gradient(point: tuple[OuterParams, InnerParams]) -> tuple[InnerParams, jax.Array]:
            value, gradient = inner_gradient(problem, *point, draws.inner(0))
            return gradient, value

        def hypergradient(point: tuple[OuterParams, InnerParams]) -> tuple[OuterParams, Any]:
            return by_inverse(problem, *point, draws.inner(1), draws.outer(0), inverse)

        inner, G = recursive_momentum(gradient, point, before, inner, inner_weight(t), t)
        outer, now = recursive_momentum(hypergradient, point, before, outer, outer_weight(t), t)
        after = outer_step(levels, outer, inner_step(levels, inner, state))
        after = after._replace(estimator_state=MomentumState(*point, inner, outer))
        return after, report_of(now, outer, G, metrics)

    return solver(name, problem, levels, own, update, inner_draws=2 + series.num_draws, outer_draws=1)
