"""SUSTAIN: recursive momentum at both levels, with a Neumann series of random length."""

from funcbilevel._arguments import check_number
from funcbilevel._bilevel import BilevelSolver
from funcbilevel._described import described
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._loop import Schedule, StepSize, optimizers, schedule
from funcbilevel._stochastic._momentum import double_momentum
from funcbilevel._stochastic._oracles import random_series


@described
def sustain(
    problem: ParametricProblem,
    *,
    inner_optimizer: StepSize,
    outer_optimizer: StepSize,
    inner_momentum: Schedule,
    outer_momentum: Schedule,
    neumann_terms: int,
    neumann_step_size: Schedule,
) -> BilevelSolver:
    r"""SUSTAIN: a recursive momentum on the inner gradient and one on the hypergradient, at a single time scale.

    With g the stochastic inner gradient and f the stochastic hypergradient at (omega, theta), the same samples in both
    terms, and eta the weights of what is new,

    .. math::
        h^G_t &= g(\omega_t, \theta_t) + (1 - \eta^G_t) (h^G_{t-1} - g(\omega_{t-1}, \theta_{t-1})), \\
        h^F_t &= f(\omega_t, \theta_t) + (1 - \eta^F_t) (h^F_{t-1} - f(\omega_{t-1}, \theta_{t-1})), \\
        \theta_{t+1} &= \theta_t - \beta_t h^G_t, \qquad \omega_{t+1} = \omega_t - \alpha_t h^F_t,

    and without the second terms at t = 0. The hypergradient has a Neumann series cut at random: with p uniform on
    0, ..., K - 1 and fresh draws in every factor,

    .. math::
        f = \partial_\omega F_j - \partial^2_{\omega\theta} G_{i_0}\, K s \prod_{l=1}^{p} (I - s\,
            \partial^2_\theta G_{i_l})\, \partial_\theta F_j .

    Order: second. Draws per step: inner 0 (gradient), 1 (cross derivative), 2, ..., K (Hessian products, of which p are
    made); outer 0. Each at both points. Memory: two vectors like theta and two like omega.

    Arguments:
        problem, inner_optimizer, outer_optimizer: as for `soba`; the paper lets both step sizes decrease as t^(-1/3).
        inner_momentum, outer_momentum: eta^G and eta^F in (0, 1], numbers or schedules of the outer step; in the paper
            they decrease as t^(-2/3).
        neumann_terms: K >= 1.
        neumann_step_size: s > 0, at most 1 / the largest eigenvalue of the Hessians; a number or a schedule.

    Returns:
        A `BilevelSolver`, as `soba`; `hypergradient_norm` is that of h^F, `neumann_length` is p.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> mse = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> solver = fb.sustain(
        ...     fb.ParametricProblem(mse, mse), inner_optimizer=0.1, outer_optimizer=0.01,
        ...     inner_momentum=0.5, outer_momentum=0.5, neumann_terms=10, neumann_step_size=0.1,
        ... )

    References:
        Khanduri, Zeng, Hong, Wai, Wang, Yang, *A near-optimal algorithm for stochastic bilevel optimization via
        double-momentum*, NeurIPS 2021, https://arxiv.org/abs/2102.07367, algorithm 1.
    """
    levels = optimizers("sustain", inner_optimizer, outer_optimizer)
    check_number("sustain", "neumann_terms", neumann_terms)
    series = random_series(neumann_terms, schedule("sustain", "neumann_step_size", neumann_step_size, positive=True))
    weights = (
        schedule("sustain", "inner_momentum", inner_momentum, positive=True),
        schedule("sustain", "outer_momentum", outer_momentum, positive=True),
    )
    return double_momentum("sustain", problem, levels, series, *weights)
