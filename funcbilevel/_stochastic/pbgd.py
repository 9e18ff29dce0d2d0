"""PBGD: gradient descent on F + penalty * (G - min G), by first derivatives alone."""

from funcbilevel._arguments import check_number
from funcbilevel._bilevel import BilevelSolver, BilevelState
from funcbilevel._described import described
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._double_loop import inner_loop
from funcbilevel._stochastic._loop import (
    Draws,
    PenaltyState,
    Schedule,
    StepSize,
    moved,
    optimizer_of,
    optimizers,
    outer_step,
    penalty_start,
    schedule,
    solver,
)
from funcbilevel._stochastic._oracles import Report, inner_gradients, outer_gradients, penalty_report
from funcbilevel._tree import tree_add_scaled
from funcbilevel._typing import Key


@described
def pbgd(
    problem: ParametricProblem,
    *,
    inner_optimizer: StepSize,
    penalty_optimizer: StepSize,
    outer_optimizer: StepSize,
    penalty: Schedule,
    inner_steps: int,
) -> BilevelSolver:
    r"""V-PBGD, penalty-based bilevel gradient descent with the value-function gap as penalty.

    theta follows the inner solution by M steps from where the outer step before left it; then omega and y move together
    along the gradient of :math:`F(\omega, y) + \lambda (G(\omega, y) - G(\omega, \theta))` with theta held fixed:

    .. math::
        \theta &\leftarrow \theta - \beta\, \partial_\theta G(\omega, \theta) \quad (M\ \text{times}), \\
        y &\leftarrow y - \alpha (\partial_\theta F(\omega, y) + \lambda\, \partial_\theta G(\omega, y)), \\
        \omega &\leftarrow \omega - \alpha' (\partial_\omega F(\omega, y)
            + \lambda (\partial_\omega G(\omega, y) - \partial_\omega G(\omega, \theta))),

    with omega and y of before in the last two lines.

    Order: first. Draws per step: inner 0, ..., M - 1 (theta), M (all of the last two lines, at y and at theta); outer
    0. The paper's method is deterministic: all draws are the same full batch. Memory: one vector like theta.

    Arguments:
        problem, inner_optimizer, penalty_optimizer, outer_optimizer: as for `f2sa`; the paper has one step size alpha
            for both y and omega, of the order of 1 / lambda.
        penalty: lambda > 0, a number or a schedule of the outer step.
        inner_steps: M >= 1.

    Returns:
        A `BilevelSolver`, as `f2sa`.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> mse = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> solver = fb.pbgd(
        ...     fb.ParametricProblem(mse, mse), inner_optimizer=0.1, penalty_optimizer=0.01, outer_optimizer=0.01,
        ...     penalty=10.0, inner_steps=5,
        ... )

    References:
        Shen and Chen, *On penalty-based bilevel gradient descent method*, ICML 2023, https://arxiv.org/abs/2302.05185,
        algorithm 1.
    """
    levels = optimizers("pbgd", inner_optimizer, outer_optimizer)
    for_y = optimizer_of("pbgd", "penalty_optimizer", penalty_optimizer)
    at = schedule("pbgd", "penalty", penalty, positive=True)
    check_number("pbgd", "inner_steps", inner_steps)

    def update(state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]:
        del key
        omega, (y, opt_state), t = state.outer_params, state.estimator_state, state.step
        state, G = inner_loop(problem, levels, state, draws.inner, inner_steps)
        F = outer_gradients(problem, omega, y, draws.outer(0))
        _, at_y, of_y = inner_gradients(problem, omega, y, draws.inner(inner_steps))
        _, at_theta, _ = inner_gradients(problem, omega, state.inner_params, draws.inner(inner_steps))
        y, opt_state = moved(for_y, tree_add_scaled(F.d, at(t), of_y), opt_state, y, t)
        report = penalty_report(F, at_y, at_theta, at(t), G)
        after = outer_step(levels, report.direction, state)
        return after._replace(estimator_state=PenaltyState(y, opt_state)), report

    return solver("pbgd", problem, levels, penalty_start(for_y), update, inner_draws=inner_steps + 1, outer_draws=1)
