"""TTSA: one inner and one outer stochastic step in turn, at two time scales."""

from funcbilevel._arguments import check_number
from funcbilevel._bilevel import BilevelSolver
from funcbilevel._described import described
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._double_loop import double_loop
from funcbilevel._stochastic._loop import Schedule, StepSize, optimizers, schedule
from funcbilevel._stochastic._oracles import random_series


@described
def ttsa(
    problem: ParametricProblem,
    *,
    inner_optimizer: StepSize,
    outer_optimizer: StepSize,
    neumann_terms: int,
    neumann_step_size: Schedule,
) -> BilevelSolver:
    r"""TTSA, the two-timescale stochastic approximation.

    .. math::
        \theta_{t+1} &= \theta_t - \beta_t\, \partial_\theta G_i(\omega_t, \theta_t), \\
        \omega_{t+1} &= \omega_t - \alpha_t\, f(\omega_t, \theta_{t+1}),

    with f the stochastic hypergradient whose Neumann series is cut at random: with p uniform on 0, ..., K - 1 and fresh
    draws in every factor,

    .. math::
        f = \partial_\omega F_j - \partial^2_{\omega\theta} G_{i_0}\, K s \prod_{l=1}^{p} (I - s\,
            \partial^2_\theta G_{i_l})\, \partial_\theta F_j .

    The paper projects omega onto a convex set; here it is free, or kept in a set by the outer optimizer (such as
    `optax.chain(optax.sgd(...), optax.keep_params_nonnegative())`).

    Order: second. Draws per step: inner 0 (gradient), 1 (cross derivative), 2, ..., K (Hessian products, of which p are
    made); outer 0. Memory: none.

    Arguments:
        problem, inner_optimizer, outer_optimizer: as for `soba`; in the paper alpha decreases faster than beta, as
            t^(-3/5) and t^(-2/5).
        neumann_terms: K >= 1.
        neumann_step_size: s > 0, at most 1 / the largest eigenvalue of the Hessians; a number or a schedule.

    Returns:
        A `BilevelSolver`, as `soba`; `neumann_length` in the metrics is p.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> mse = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> solver = fb.ttsa(
        ...     fb.ParametricProblem(mse, mse), inner_optimizer=lambda t: 0.1 / (1.0 + t) ** 0.4,
        ...     outer_optimizer=lambda t: 0.1 / (1.0 + t) ** 0.6, neumann_terms=10, neumann_step_size=0.1,
        ... )

    References:
        Hong, Wai, Wang, Yang, *A two-timescale stochastic algorithm framework for bilevel optimization*, SIAM J. Optim.
        2023, https://arxiv.org/abs/2007.05170, algorithm 1.
    """
    levels = optimizers("ttsa", inner_optimizer, outer_optimizer)
    check_number("ttsa", "neumann_terms", neumann_terms)
    series = random_series(neumann_terms, schedule("ttsa", "neumann_step_size", neumann_step_size, positive=True))
    return double_loop("ttsa", problem, levels, series, 1)
