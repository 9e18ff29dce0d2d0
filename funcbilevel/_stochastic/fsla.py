"""FSLA: SOBA's three steps one after the other, and a recursive momentum on the hypergradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from funcbilevel._bilevel import BilevelSolver, BilevelState
from funcbilevel._described import described
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._loop import (
    Draws,
    LinearState,
    Schedule,
    StepSize,
    inner_step,
    linear_start,
    linear_step,
    optimizers,
    outer_step,
    schedule,
    solver,
)
from funcbilevel._stochastic._oracles import (
    Estimate,
    Report,
    by_inverse,
    hessian_product,
    inner_gradient,
    outer_gradients,
    recursive_momentum,
    report_of,
)
from funcbilevel._tree import tree_add_scaled
from funcbilevel._typing import InnerParams, Key, OuterParams


class FslaState(NamedTuple):
    """u with its optimizer's state; omega of the step before; and the momentum h."""

    linear: LinearState
    omega_before: OuterParams
    momentum: OuterParams


@described
def fsla(
    problem: ParametricProblem,
    *,
    inner_optimizer: StepSize,
    linear_optimizer: StepSize,
    outer_optimizer: StepSize,
    momentum: Schedule,
) -> BilevelSolver:
    r"""FSLA, the fully single loop algorithm: theta, then u, then omega, with a momentum of the hypergradient.

    With :math:`g_{ij}(\omega, \theta, u) = \partial_\omega F_j(\omega, \theta) - \partial^2_{\omega\theta} G_i(\omega,
    \theta)\, u`, eta the momentum's weight of what is new, and fresh draws for each line,

    .. math::
        \theta_{t+1} &= \theta_t - \rho\, \partial_\theta G_{i}(\omega_t, \theta_t), \\
        u_{t+1} &= u_t - \rho_u (\partial^2_\theta G_{i'}(\omega_t, \theta_{t+1})\, u_t
            - \partial_\theta F_{j}(\omega_t, \theta_{t+1})), \\
        h_t &= g_{i''j'}(\omega_t, \theta_{t+1}, u_{t+1})
            + (1 - \eta) (h_{t-1} - g_{i''j'}(\omega_{t-1}, \theta_t, u_t)), \\
        \omega_{t+1} &= \omega_t - \gamma h_t,

    and without the second term of h at t = 0.

    Order: second. Draws per step: inner 0 (gradient), 1 (Hessian product), 2 (cross derivative, at both points); outer
    0 (for u), 1 (for the hypergradient, at both points). Memory: one vector like theta, two like omega.

    Arguments:
        problem, inner_optimizer, linear_optimizer, outer_optimizer: as for `soba`.
        momentum: eta in (0, 1], a number or a schedule of the outer step.

    Returns:
        A `BilevelSolver`, as `soba`; `hypergradient_norm` is that of h.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> sizes = {"inner_optimizer": 0.1, "linear_optimizer": 0.1, "outer_optimizer": 0.01}
        >>> mse = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> solver = fb.fsla(fb.ParametricProblem(mse, mse), **sizes, momentum=0.5)

    References:
        Li, Gu, Huang, *A fully single loop algorithm for bilevel optimization without Hessian inverse*, AAAI 2022,
        https://arxiv.org/abs/2112.04660, algorithm 1.
    """
    levels = optimizers("fsla", inner_optimizer, outer_optimizer, linear_optimizer)
    eta = schedule("fsla", "momentum", momentum, positive=True)

    def own(omega: OuterParams, theta: InnerParams, *_: object) -> FslaState:
        return FslaState(linear_start(levels, theta), omega, jax.tree.map(jnp.zeros_like, omega))

    def update(state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]:
        del key
        omega, theta, t = state.outer_params, state.inner_params, state.step
        linear, omega_before, h = state.estimator_state
        G, gradient = inner_gradient(problem, omega, theta, draws.inner(0))
        after = inner_step(levels, gradient, state)
        F = outer_gradients(problem, omega, after.inner_params, draws.outer(0))
        Hu = hessian_product(problem, omega, after.inner_params, draws.inner(1), linear.u)
        new = linear_step(levels, tree_add_scaled(Hu, -1.0, F.d), linear, t)

        def estimate(point: tuple[OuterParams, InnerParams, InnerParams]) -> tuple[OuterParams, Estimate]:
            omega, theta, u = point
            return by_inverse(problem, omega, theta, draws.inner(2), draws.outer(1), lambda *_: u)

        point, before = (omega, after.inner_params, new.u), (omega_before, theta, linear.u)
        h, now = recursive_momentum(estimate, point, before, h, eta(t), t)
        after = outer_step(levels, h, after)._replace(estimator_state=FslaState(new, omega, h))
        return after, report_of(now, h, G, {})

    return solver("fsla", problem, levels, own, update, inner_draws=3, outer_draws=2)
