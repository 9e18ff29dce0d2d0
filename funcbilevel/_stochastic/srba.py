"""SRBA: SOBA with SARAH's variance reduction, by one pass over the data in each period."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_number, check_positive
from funcbilevel._bilevel import BilevelSolver, BilevelState
from funcbilevel._described import described
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._loop import (
    Draws,
    LinearState,
    StepSize,
    inner_step,
    linear_start,
    linear_step,
    optimizers,
    outer_step,
    solver,
)
from funcbilevel._stochastic._oracles import (
    Directions,
    Products,
    Report,
    directions,
    joined,
    outer_gradients,
    products,
    report,
)
from funcbilevel._tree import tree_norm
from funcbilevel._typing import InnerParams, Key, OuterParams, PyTree


class SrbaState(NamedTuple):
    """u with its optimizer's state; the point (omega, theta, u) of the step before; and its three directions."""

    linear: LinearState
    before: tuple[OuterParams, InnerParams, InnerParams]
    estimates: tuple[InnerParams, InnerParams, OuterParams]


@described
def srba(
    problem: ParametricProblem,
    *,
    inner_optimizer: StepSize,
    linear_optimizer: StepSize,
    outer_optimizer: StepSize,
    period: int,
    radius: float | None = None,
) -> BilevelSolver:
    r"""SRBA, the stochastic recursive bilevel algorithm: SARAH's estimates of SOBA's three directions.

    With z = (theta, u, omega), D(z) its three directions on all of the data and :math:`D_{ij}(z)` on one block of each
    sum, as in `soba`,

    .. math::
        \Delta_t &= D(z_t) \quad\text{if t is a multiple of the period, and otherwise} \\
        \Delta_t &= D_{ij}(z_t) - D_{ij}(z_{t-1}) + \Delta_{t-1}, \\
        z_{t+1} &= \Pi(z_t - (\rho, \rho_u, \gamma) \Delta_t),

    where Pi brings u back into the ball of the radius.

    Order: second. Draws per step: one block of the inner and one of the outer `FiniteSum` (number 0 of each), at which
    derivatives are taken twice; every `period` steps one pass over both sums instead. Memory: three vectors like theta
    and two like omega, whatever the number of samples.

    Arguments:
        problem, inner_optimizer, linear_optimizer, outer_optimizer: as for `soba`.
        period: steps from one pass over the data to the next, >= 1; the paper has it of the order of the number of
            blocks.
        radius: bound on |u|, > 0, such as max |d_theta F| / mu, with mu the strong convexity of G; None: none.

    Returns:
        A `BilevelSolver`, whose batches are `FiniteSum`s, at `init` too (see `saba`).

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind; a source is not a `FiniteSum`.

    Example:
        >>> sizes = {"inner_optimizer": 0.1, "linear_optimizer": 0.1, "outer_optimizer": 0.01}
        >>> mse = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> solver = fb.srba(fb.ParametricProblem(mse, mse), **sizes, period=16)

    References:
        Dagreou, Moreau, Vaiter, Ablin, *A lower bound and a near-optimal algorithm for bilevel empirical risk
        minimization*, AISTATS 2024, https://arxiv.org/abs/2302.08766, algorithm 1.
    """
    levels = optimizers("srba", inner_optimizer, outer_optimizer, linear_optimizer)
    check_number("srba", "period", period)
    if radius is not None:
        check_positive("srba", "radius", radius)

    def own(omega: OuterParams, theta: InnerParams, *_: object) -> SrbaState:
        linear = linear_start(levels, theta)
        return SrbaState(linear, (omega, theta, linear.u), (linear.u, linear.u, jax.tree.map(jnp.zeros_like, omega)))

    def whole(omega: OuterParams, theta: InnerParams, u: InnerParams, draws: Draws) -> Directions:
        inner: Products = draws.inner.source.mean(lambda batch: products(problem, omega, theta, batch, u))
        F = draws.outer.source.mean(lambda batch: outer_gradients(problem, omega, theta, batch))
        return joined(inner.gradient, inner.Hu, inner.cross, F, inner.value)

    def recursive(
        z: tuple[PyTree, PyTree, PyTree], state: SrbaState, draws: Draws
    ) -> tuple[Directions, tuple[PyTree, PyTree, PyTree]]:
        i, j = draws.inner(0), draws.outer(0)
        # Of both points at once, so that they are one program.
        both = jax.tree.map(lambda *x: jnp.stack(x), z, state.before)
        D = jax.vmap(lambda omega, theta, u: directions(problem, omega, theta, u, i, j))(*both)
        moves = jax.tree.map(lambda x, e: x[0] - x[1] + e, (D.theta, D.u, D.omega), state.estimates)
        return jax.tree.map(lambda x: x[0], D), moves

    def update(state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]:
        del key
        own_state: SrbaState = state.estimator_state
        z = (state.outer_params, state.inner_params, own_state.linear.u)

        def full(_: None) -> tuple[Directions, tuple[PyTree, PyTree, PyTree]]:
            D = whole(z[0], z[1], z[2], draws)
            return D, (D.theta, D.u, D.omega)

        D, moves = jax.lax.cond(state.step % period == 0, full, lambda _: recursive(z, own_state, draws), None)
        after = outer_step(levels, moves[2], inner_step(levels, moves[0], state))
        linear = linear_step(levels, moves[1], own_state.linear, state.step)
        if radius is not None:
            size = tree_norm(linear.u)
            shrink = jnp.where(size > radius, radius / jnp.where(size > 0, size, 1.0), 1.0)
            linear = linear._replace(u=jax.tree.map(lambda x: shrink.astype(x.dtype) * x, linear.u))
        return after._replace(estimator_state=SrbaState(linear, z, moves)), report(D, moves[2])

    return solver("srba", problem, levels, own, update, inner_draws=1, outer_draws=1, finite_sums=True)
