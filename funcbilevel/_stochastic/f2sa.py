"""F2SA: the inner problem with and without a penalty on the outer objective, by first derivatives alone."""

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_number
from funcbilevel._bilevel import BilevelSolver, BilevelState
from funcbilevel._described import described
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._loop import (
    Draws,
    PenaltyState,
    Schedule,
    StepSize,
    inner_step,
    moved,
    optimizer_of,
    optimizers,
    outer_step,
    penalty_start,
    schedule,
    solver,
)
from funcbilevel._stochastic._oracles import Report, inner_gradient, inner_gradients, outer_gradients, penalty_report
from funcbilevel._tree import tree_add_scaled
from funcbilevel._typing import Key


@described
def f2sa(
    problem: ParametricProblem,
    *,
    inner_optimizer: StepSize,
    penalty_optimizer: StepSize,
    outer_optimizer: StepSize,
    penalty: Schedule,
    inner_steps: int = 1,
) -> BilevelSolver:
    r"""F2SA, the fully first-order stochastic approximation, with a penalty lambda that grows.

    theta follows the inner solution, y the minimiser of :math:`F + \lambda G`. M times, with fresh draws for each term,

    .. math::
        \theta &\leftarrow \theta - \gamma\, \partial_\theta G_i(\omega, \theta), \\
        y &\leftarrow y - \alpha (\partial_\theta F_j(\omega, y) + \lambda\, \partial_\theta G_{i'}(\omega, y)), \\

    and then, with fresh ones again,

    .. math::
        \omega \leftarrow \omega - \xi \bigl(\partial_\omega F_j(\omega, y)
            + \lambda (\partial_\omega G_i(\omega, y) - \partial_\omega G_{i'}(\omega, \theta))\bigr) .

    The hypergradient's error is of the order of 1 / lambda. Let the step size of y shrink as lambda grows.

    Order: first. Draws per step: inner, in each of the M turns, 0 (theta) and 1 (y), then 2 M (at y) and 2 M + 1 (at
    theta); outer 0, ..., M - 1 (y), M (omega). Memory: one vector like theta.

    Arguments:
        problem: a `ParametricProblem`; of a functional one, `fb.parametrize(problem, model)`.
        inner_optimizer, penalty_optimizer, outer_optimizer: for theta, y and omega: each a number or a schedule of the
            outer step, or an optax optimizer.
        penalty: lambda > 0, a number or a schedule of the outer step; in the paper lambda grows by delta_t ~ t^(-6/7).
        inner_steps: M >= 1.

    Returns:
        A `BilevelSolver`, as `soba`. `inner_params` of the state is theta; y is `estimator_state.y`. `outer_objective`
        is at y.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> mse = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> solver = fb.f2sa(
        ...     fb.ParametricProblem(mse, mse), inner_optimizer=0.1, outer_optimizer=0.01,
        ...     penalty_optimizer=lambda t: 0.1 / (1.0 + 0.1 * t), penalty=lambda t: 1.0 + 0.1 * t,
        ... )

    References:
        Kwon, Kwon, Wright, Nowak, *A fully first-order method for stochastic bilevel optimization*, ICML 2023,
        https://arxiv.org/abs/2301.10945, algorithm 1.
    """
    levels = optimizers("f2sa", inner_optimizer, outer_optimizer)
    for_y = optimizer_of("f2sa", "penalty_optimizer", penalty_optimizer)
    at = schedule("f2sa", "penalty", penalty, positive=True)
    check_number("f2sa", "inner_steps", inner_steps)

    def update(state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]:
        del key
        omega, t = state.outer_params, state.step
        weight = at(t)

        def turn(
            carry: tuple[BilevelState, PenaltyState], i: jax.Array
        ) -> tuple[tuple[BilevelState, PenaltyState], jax.Array]:
            state, (y, opt_state) = carry
            G, gradient = inner_gradient(problem, omega, state.inner_params, draws.inner(2 * i))
            F = outer_gradients(problem, omega, y, draws.outer(i))
            _, at_y = inner_gradient(problem, omega, y, draws.inner(2 * i + 1))
            y, opt_state = moved(for_y, tree_add_scaled(F.d, weight, at_y), opt_state, y, t)
            return (inner_step(levels, gradient, state), PenaltyState(y, opt_state)), G

        (state, (y, opt_state)), values = jax.lax.scan(turn, (state, state.estimator_state), jnp.arange(inner_steps))
        theta = state.inner_params
        F = outer_gradients(problem, omega, y, draws.outer(inner_steps))
        _, at_y, _ = inner_gradients(problem, omega, y, draws.inner(2 * inner_steps))
        _, at_theta, _ = inner_gradients(problem, omega, theta, draws.inner(2 * inner_steps + 1))
        report = penalty_report(F, at_y, at_theta, weight, values[-1])
        after = outer_step(levels, report.direction, state)
        return after._replace(estimator_state=PenaltyState(y, opt_state)), report

    draws = 2 * inner_steps + 2
    return solver("f2sa", problem, levels, penalty_start(for_y), update, inner_draws=draws, outer_draws=inner_steps + 1)
