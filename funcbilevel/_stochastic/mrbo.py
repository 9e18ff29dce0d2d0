"""MRBO: recursive momentum at both levels, with a Neumann series of fixed length."""

from funcbilevel._arguments import check_number
from funcbilevel._bilevel import BilevelSolver
from funcbilevel._described import described
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._loop import Schedule, StepSize, optimizers, schedule
from funcbilevel._stochastic._momentum import double_momentum
from funcbilevel._stochastic._oracles import fixed_series


@described
def mrbo(
    problem: ParametricProblem,
    *,
    inner_optimizer: StepSize,
    outer_optimizer: StepSize,
    inner_momentum: Schedule,
    outer_momentum: Schedule,
    neumann_steps: int,
    neumann_step_size: Schedule,
) -> BilevelSolver:
    r"""MRBO, the momentum-based recursive bilevel optimizer: a recursive momentum at both levels.

    With g the stochastic inner gradient and f the stochastic hypergradient at (omega, theta), the same samples in both
    terms, and eta the weights of what is new,

    .. math::
        h^G_t &= g(\omega_t, \theta_t) + (1 - \eta^G_t) (h^G_{t-1} - g(\omega_{t-1}, \theta_{t-1})), \\
        h^F_t &= f(\omega_t, \theta_t) + (1 - \eta^F_t) (h^F_{t-1} - f(\omega_{t-1}, \theta_{t-1})), \\
        \theta_{t+1} &= \theta_t - \lambda_t h^G_t, \qquad \omega_{t+1} = \omega_t - \gamma_t h^F_t,

    and without the second terms at t = 0. The hypergradient has a Neumann series with fresh draws in every factor,

    .. math::
        f = \partial_\omega F_j - \partial^2_{\omega\theta} G_{i_0}\, s \sum_{k=0}^{K} \prod_{l=1}^{k} (I - s\,
            \partial^2_\theta G_{i_l})\, \partial_\theta F_j .

    Order: second. Draws per step: inner 0 (gradient), 1 (cross derivative), 2, ..., K + 1 (Hessian products); outer 0.
    Each at both points. Memory: two vectors like theta and two like omega.

    Arguments:
        problem, inner_optimizer, outer_optimizer: as for `soba`; the paper lets both step sizes decrease as t^(-1/3).
        inner_momentum, outer_momentum: eta^G and eta^F in (0, 1], numbers or schedules of the outer step; in the paper
            they decrease as t^(-2/3).
        neumann_steps: K >= 1.
        neumann_step_size: s > 0, below 2 / the largest eigenvalue of the Hessian; a number or a schedule.

    Returns:
        A `BilevelSolver`, as `soba`; `hypergradient_norm` is that of h^F.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> mse = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> solver = fb.mrbo(
        ...     fb.ParametricProblem(mse, mse), inner_optimizer=0.1, outer_optimizer=0.01,
        ...     inner_momentum=0.5, outer_momentum=0.5, neumann_steps=10, neumann_step_size=0.1,
        ... )

    References:
        Yang, Ji, Liang, *Provably faster algorithms for bilevel optimization*, NeurIPS 2021,
        https://arxiv.org/abs/2106.04692, algorithm 1.
    """
    levels = optimizers("mrbo", inner_optimizer, outer_optimizer)
    check_number("mrbo", "neumann_steps", neumann_steps)
    series = fixed_series(neumann_steps, schedule("mrbo", "neumann_step_size", neumann_step_size, positive=True))
    weights = (
        schedule("mrbo", "inner_momentum", inner_momentum, positive=True),
        schedule("mrbo", "outer_momentum", outer_momentum, positive=True),
    )
    return double_momentum("mrbo", problem, levels, series, *weights)
