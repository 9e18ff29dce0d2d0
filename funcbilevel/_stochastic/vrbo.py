"""VRBO: SPIDER's variance reduction at both levels, with an inner loop and a pass over the data in each period."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_number
from funcbilevel._bilevel import BilevelSolver, BilevelState
from funcbilevel._described import described
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._loop import (
    Draws,
    Schedule,
    StepSize,
    inner_step,
    optimizers,
    outer_step,
    schedule,
    solver,
)
from funcbilevel._stochastic._oracles import (
    Estimate,
    Report,
    by_inverse,
    cross_product,
    fixed_series,
    hessian_product,
    inner_gradient,
    outer_gradients,
    recursive_momentum,
    report_of,
)
from funcbilevel._tree import tree_add_scaled
from funcbilevel._typing import InnerParams, Key, OuterParams, PyTree


class VrboState(NamedTuple):
    """The estimates of the inner gradient, like inner_params, and of the hypergradient, like outer_params."""

    inner: InnerParams
    outer: OuterParams


@described
def vrbo(
    problem: ParametricProblem,
    *,
    inner_optimizer: StepSize,
    outer_optimizer: StepSize,
    inner_steps: int,
    period: int,
    neumann_steps: int,
    neumann_step_size: Schedule,
) -> BilevelSolver:
    r"""VRBO, the variance-reduction-based bilevel optimizer: SPIDER's recursive estimates at both levels.

    With g the inner gradient and f the hypergradient by a Neumann series of `neumann_steps` products (as in `mrbo`),

    1. every `period` steps :math:`h^G = g(\omega, \theta)` and :math:`h^F = f(\omega, \theta)` on all of the data;
    2. :math:`\omega \leftarrow \omega - \alpha h^F`;
    3. at this omega, M = `inner_steps` times, with fresh draws and z = (omega, theta), z' the one before the last move:

    .. math::
        h^G \leftarrow h^G + g(z) - g(z'), \qquad h^F \leftarrow h^F + f(z) - f(z'), \qquad
        \theta \leftarrow \theta - \beta h^G .

    (In the first of them z' is the point of before step 2.)

    Order: second. Draws per step: inner, in each of the M turns, 0 (gradient), 1 (cross derivative), 2, ..., K + 1
    (Hessian products); outer one for each turn; every one at both points. And every `period` steps a pass over both
    sums, K + 2 passes over the inner one. Memory: one vector like theta and two like omega.

    Arguments:
        problem, inner_optimizer, outer_optimizer: as for `soba`.
        inner_steps: M >= 1. (The paper counts t = 0, ..., m: M = m + 1.)
        period: q >= 1, outer steps from one pass over the data to the next.
        neumann_steps: K >= 1.
        neumann_step_size: > 0, below 2 / the largest eigenvalue of the Hessian; a number or a schedule.

    Returns:
        A `BilevelSolver`, whose batches are `FiniteSum`s, at `init` too (see `saba`).

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind; a source is not a `FiniteSum`.

    Example:
        >>> mse = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> solver = fb.vrbo(
        ...     fb.ParametricProblem(mse, mse), inner_optimizer=0.1, outer_optimizer=0.01,
        ...     inner_steps=3, period=8, neumann_steps=10, neumann_step_size=0.1,
        ... )

    References:
        Yang, Ji, Liang, NeurIPS 2021, https://arxiv.org/abs/2106.04692, algorithm 2.
    """
    levels = optimizers("vrbo", inner_optimizer, outer_optimizer)
    for name, value in (("inner_steps", inner_steps), ("period", period), ("neumann_steps", neumann_steps)):
        check_number("vrbo", name, value)
    size = schedule("vrbo", "neumann_step_size", neumann_step_size, positive=True)
    series, each = fixed_series(neumann_steps, size), 2 + neumann_steps

    def own(omega: OuterParams, theta: InnerParams, *_: object) -> VrboState:
        return VrboState(jax.tree.map(jnp.zeros_like, theta), jax.tree.map(jnp.zeros_like, omega))

    def whole(omega: OuterParams, theta: InnerParams, draws: Draws, key: Key, step: jax.Array) -> VrboState:
        """Both estimates on all of the data."""
        inner, outer = draws.inner.source, draws.outer.source
        gradient = inner.mean(lambda batch: inner_gradient(problem, omega, theta, batch)[1])
        F = outer.mean(lambda batch: outer_gradients(problem, omega, theta, batch))

        def add(carry: tuple[PyTree, PyTree], _: None) -> tuple[tuple[PyTree, PyTree], None]:
            term, total = carry
            product = inner.mean(lambda batch: hessian_product(problem, omega, theta, batch, term))
            term = tree_add_scaled(term, -size(step), product)
            return (term, tree_add_scaled(total, 1.0, term)), None

        (_, total), _ = jax.lax.scan(add, (F.d, F.d), None, length=neumann_steps)
        u = jax.tree.map(lambda x: jnp.asarray(size(step), x.dtype) * x, total)
        cross = inner.mean(lambda batch: cross_product(problem, omega, theta, batch, u))
        return VrboState(gradient, tree_add_scaled(F.g_exp, -1.0, cross))

    def update(state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]:
        t, point = state.step, (state.outer_params, state.inner_params)
        estimates: VrboState = jax.lax.cond(
            t % period == 0, lambda _: whole(*point, draws, key, t), lambda _: state.estimator_state, None
        )
        direction = estimates.outer
        state = outer_step(levels, direction, state)

        def turn(carry: Any, i: jax.Array) -> tuple[Any, tuple[jax.Array, Estimate]]:
            state, before, (inner, outer) = carry
            now = (state.outer_params, state.inner_params)
            inverse, _ = series.at(problem, lambda k: draws.inner(each * i + 2 + k), key, t)

            def gradient(z: tuple[OuterParams, InnerParams]) -> tuple[InnerParams, jax.Array]:
                value, gradient = inner_gradient(problem, *z, draws.inner(each * i))
                return gradient, value

            def hypergradient(z: tuple[OuterParams, InnerParams]) -> tuple[OuterParams, Estimate]:
                return by_inverse(problem, *z, draws.inner(each * i + 1), draws.outer(i), inverse)

            later = jnp.ones((), jnp.int32)  # SPIDER is STORM with weight 0, never at its first step
            inner, G = recursive_momentum(gradient, now, before, inner, 0.0, later)
            outer, estimate = recursive_momentum(hypergradient, now, before, outer, 0.0, later)
            return (inner_step(levels, inner, state), now, VrboState(inner, outer)), (G, estimate)

        (state, _, estimates), (G, seen) = jax.lax.scan(turn, (state, point, estimates), jnp.arange(inner_steps))
        last = jax.tree.map(lambda x: x[-1], (seen, G))
        return state._replace(estimator_state=estimates), report_of(last[0], direction, last[1], {})

    draws = each * inner_steps
    return solver("vrbo", problem, levels, own, update, inner_draws=draws, outer_draws=inner_steps, finite_sums=True)
