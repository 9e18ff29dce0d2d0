"""What the double-loop methods share: inner steps on fresh samples, then a hypergradient, then an outer step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_number
from funcbilevel._bilevel import BilevelSolver, BilevelState
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._loop import Draws, Levels, inner_step, outer_step, solver
from funcbilevel._stochastic._oracles import Report, Series, by_inverse, inner_gradient, report_of
from funcbilevel._typing import Key


def inner_loop(
    problem: ParametricProblem, levels: Levels, state: BilevelState, batch: Callable[[Any], Any], num_steps: int
) -> tuple[BilevelState, jax.Array]:
    """`num_steps` inner steps, step i on batch(i); and G at the last of them."""

    def step(state: BilevelState, i: jax.Array) -> tuple[BilevelState, jax.Array]:
        value, gradient = inner_gradient(problem, state.outer_params, state.inner_params, batch(i))
        return inner_step(levels, gradient, state), value

    state, values = jax.lax.scan(step, state, jnp.arange(num_steps))
    return state, values[-1]


def double_loop(
    name: str, problem: ParametricProblem, levels: Levels, series: Series, inner_steps: int
) -> BilevelSolver:
    """M inner steps; the hypergradient at the last theta, with `series` for the inverse; one outer step.

    Inner draws: 0, ..., M - 1 for the steps, M for the cross derivative, then those of the series. Outer: 0.
    """
    check_number(name, "inner_steps", inner_steps)

    def update(state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]:
        state, G = inner_loop(problem, levels, state, draws.inner, inner_steps)
        inverse, metrics = series.at(problem, lambda i: draws.inner(inner_steps + 1 + i), key, state.step)
        direction, now = by_inverse(
            problem, state.outer_params, state.inner_params, draws.inner(inner_steps), draws.outer(0), inverse
        )
        return outer_step(levels, direction, state), report_of(now, direction, G, metrics)

    draws = inner_steps + 1 + series.num_draws
    return solver(name, problem, levels, lambda *_: (), update, inner_draws=draws, outer_draws=1)
