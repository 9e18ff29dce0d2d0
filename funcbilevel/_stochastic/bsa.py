"""BSA: inner stochastic steps, then a hypergradient with a Neumann series of random length."""

from funcbilevel._arguments import check_number
from funcbilevel._bilevel import BilevelSolver
from funcbilevel._described import described
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._double_loop import double_loop
from funcbilevel._stochastic._loop import Schedule, StepSize, optimizers, schedule
from funcbilevel._stochastic._oracles import random_series


@described
def bsa(
    problem: ParametricProblem,
    *,
    inner_optimizer: StepSize,
    outer_optimizer: StepSize,
    inner_steps: int,
    neumann_terms: int,
    neumann_step_size: Schedule,
) -> BilevelSolver:
    r"""BSA, the bilevel stochastic approximation.

    M inner steps :math:`\theta \leftarrow \theta - \beta\, \partial_\theta G_i(\omega, \theta)` on fresh draws, then

    .. math::
        \omega \leftarrow \omega - \alpha \Bigl(\partial_\omega F_j - \partial^2_{\omega\theta} G_{i_0}\, K s
            \prod_{l=1}^{p} (I - s\, \partial^2_\theta G_{i_l})\, \partial_\theta F_j\Bigr)

    at the last theta, with p uniform on 0, ..., K - 1 and fresh draws in every factor: in expectation the Neumann
    series of K terms, at half its price.

    theta starts where the outer step before left it; in the paper every outer step starts anew from the first theta.

    Order: second. Draws per step: inner 0, ..., M - 1 (gradients), M (cross derivative), M + 1, ..., M + K - 1 (Hessian
    products, of which p are made); outer 0. Memory: none.

    Arguments:
        problem, inner_optimizer, outer_optimizer: as for `soba`.
        inner_steps: M >= 1.
        neumann_terms: K >= 1.
        neumann_step_size: s > 0, at most 1 / the largest eigenvalue of the Hessians; a number or a schedule.

    Returns:
        A `BilevelSolver`, as `soba`; `neumann_length` in the metrics is p.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> mse = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> solver = fb.bsa(
        ...     fb.ParametricProblem(mse, mse), inner_optimizer=0.1, outer_optimizer=0.01,
        ...     inner_steps=10, neumann_terms=10, neumann_step_size=0.1,
        ... )

    References:
        Ghadimi and Wang, *Approximation methods for bilevel programming*, 2018, https://arxiv.org/abs/1802.02246,
        algorithms 2 and 3.
    """
    levels = optimizers("bsa", inner_optimizer, outer_optimizer)
    check_number("bsa", "neumann_terms", neumann_terms)
    series = random_series(neumann_terms, schedule("bsa", "neumann_step_size", neumann_step_size, positive=True))
    return double_loop("bsa", problem, levels, series, inner_steps)
