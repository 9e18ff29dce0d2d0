"""F3SA: F2SA with a recursive momentum on each of its six gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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
    schedule,
    solver,
)
from funcbilevel._stochastic._oracles import (
    Report,
    inner_gradient,
    inner_gradients,
    outer_gradients,
    penalty_report,
    recursive_momentum,
)
from funcbilevel._tree import tree_add_scaled
from funcbilevel._typing import InnerParams, Key, OuterParams


class F3saState(NamedTuple):
    """What F3SA carries.

    Attributes:
        penalised: y, with its optimizer's state.
        before: (omega, theta, y) of the step before.
        lower: momenta of d_theta G at theta, d_theta F and d_theta G at y.
        upper: momenta of d_omega F and d_omega G at y, d_omega G at theta.
    """

    penalised: PenaltyState
    before: tuple[OuterParams, InnerParams, InnerParams]
    lower: tuple[InnerParams, InnerParams, InnerParams]
    upper: tuple[OuterParams, OuterParams, OuterParams]


@described
def f3sa(
    problem: ParametricProblem,
    *,
    inner_optimizer: StepSize,
    penalty_optimizer: StepSize,
    outer_optimizer: StepSize,
    penalty: Schedule,
    momentum: Schedule,
) -> BilevelSolver:
    r"""F3SA, the faster F2SA: a recursive momentum on each gradient.

    For a gradient q at its point z, with the same samples in both terms,
    :math:`h_t[q] = q(z_t) + (1 - \eta) (h_{t-1}[q] - q(z_{t-1}))`, and h = q at t = 0. Then

    .. math::
        \theta_{t+1} &= \theta_t - \gamma\, h[\partial_\theta G(\omega_t, \theta_t)], \\
        y_{t+1} &= y_t - \alpha \bigl(h[\partial_\theta F(\omega_t, y_t)]
            + \lambda\, h[\partial_\theta G(\omega_t, y_t)]\bigr), \\
        \omega_{t+1} &= \omega_t - \xi \bigl(h[\partial_\omega F(\omega_t, y_{t+1})]
            + \lambda (h[\partial_\omega G(\omega_t, y_{t+1})] - h[\partial_\omega G(\omega_t, \theta_{t+1})])\bigr) .

    Order: first. Draws per step: inner 0 (theta), 1 (y), 2 (omega, at y), 3 (omega, at theta); outer 0 (y), 1 (omega);
    each at two points. Memory: six vectors like theta and four like omega.

    Arguments:
        problem, inner_optimizer, penalty_optimizer, outer_optimizer, penalty: as for `f2sa`.
        momentum: eta in (0, 1], a number or a schedule of the outer step.

    Returns:
        A `BilevelSolver`, as `f2sa`; y is `estimator_state.penalised.y`.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> mse = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> solver = fb.f3sa(
        ...     fb.ParametricProblem(mse, mse), inner_optimizer=0.1, penalty_optimizer=0.01, outer_optimizer=0.01,
        ...     penalty=10.0, momentum=0.5,
        ... )

    References:
        Kwon, Kwon, Wright, Nowak, ICML 2023, https://arxiv.org/abs/2301.10945, algorithm 2.
    """
    levels = optimizers("f3sa", inner_optimizer, outer_optimizer)
    for_y = optimizer_of("f3sa", "penalty_optimizer", penalty_optimizer)
    at = schedule("f3sa", "penalty", penalty, positive=True)
    eta = schedule("f3sa", "momentum", momentum, positive=True)

    def own(omega: OuterParams, theta: InnerParams, *_: object) -> F3saState:
        zero_theta, zero_omega = (jax.tree.map(jnp.zeros_like, x) for x in (theta, omega))
        return F3saState(
            PenaltyState(theta, for_y.init(theta)), (omega, theta, theta), (zero_theta,) * 3, (zero_omega,) * 3
        )

    def update(state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]:
        del key
        (y, opt_state), (omega_before, theta_before, y_before), lower, upper = state.estimator_state
        omega, theta, t = state.outer_params, state.inner_params, state.step

        def below(z: Any) -> tuple[Any, jax.Array]:
            omega, theta, y = z
            G, of_theta = inner_gradient(problem, omega, theta, draws.inner(0))
            of_y = inner_gradient(problem, omega, y, draws.inner(1))[1]
            return (of_theta, outer_gradients(problem, omega, y, draws.outer(0)).d, of_y), G

        def above(z: Any) -> tuple[Any, Any]:
            omega, theta, y = z
            F = outer_gradients(problem, omega, y, draws.outer(1))
            at_y = inner_gradients(problem, omega, y, draws.inner(2))[1]
            return (F.g_exp, at_y, inner_gradients(problem, omega, theta, draws.inner(3))[1]), F

        now, before = (omega, theta, y), (omega_before, theta_before, y_before)
        lower, G = recursive_momentum(below, now, before, lower, eta(t), t)
        after = inner_step(levels, lower[0], state)
        new_y, opt_state = moved(for_y, tree_add_scaled(lower[1], at(t), lower[2]), opt_state, y, t)
        # The upper gradients are at the lower variables of after: one step before, these were those of now.
        upper, F = recursive_momentum(
            above, (omega, after.inner_params, new_y), (omega_before, theta, y), upper, eta(t), t
        )
        report = penalty_report(F._replace(g_exp=upper[0]), upper[1], upper[2], at(t), G)
        after = outer_step(levels, report.direction, after)
        return after._replace(estimator_state=F3saState(PenaltyState(new_y, opt_state), now, lower, upper)), report

    return solver("f3sa", problem, levels, own, update, inner_draws=4, outer_draws=2)
