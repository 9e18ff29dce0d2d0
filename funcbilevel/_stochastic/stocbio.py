"""stocBiO: inner stochastic steps, then a hypergradient with a Neumann series on fresh samples."""

from funcbilevel._arguments import check_number
from funcbilevel._bilevel import BilevelSolver
from funcbilevel._described import described
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._double_loop import double_loop
from funcbilevel._stochastic._loop import Schedule, StepSize, optimizers, schedule
from funcbilevel._stochastic._oracles import fixed_series


@described
def stocbio(
    problem: ParametricProblem,
    *,
    inner_optimizer: StepSize,
    outer_optimizer: StepSize,
    inner_steps: int,
    neumann_steps: int,
    neumann_step_size: Schedule,
) -> BilevelSolver:
    r"""stocBiO, the stochastic bilevel optimizer.

    M inner steps :math:`\theta \leftarrow \theta - \alpha\, \partial_\theta G_i(\omega, \theta)` on fresh draws, from
    where the outer step before left theta, then

    .. math::
        \omega \leftarrow \omega - \beta \Bigl(\partial_\omega F_j - \partial^2_{\omega\theta} G_{i_0}\, s
            \sum_{k=0}^{K} \prod_{l=1}^{k} (I - s\, \partial^2_\theta G_{i_l})\, \partial_\theta F_j\Bigr)

    at the last theta, with fresh draws in every factor.

    Order: second. Draws per step: inner 0, ..., M - 1 (gradients), M (cross derivative), M + 1, ..., M + K (Hessian
    products); outer 0. Memory: none.

    Arguments:
        problem, inner_optimizer, outer_optimizer: as for `soba`.
        inner_steps: M >= 1.
        neumann_steps: K >= 1.
        neumann_step_size: s > 0, below 2 / the largest eigenvalue of the Hessian; a number or a schedule.

    Returns:
        A `BilevelSolver`, as `soba`.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> mse = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> solver = fb.stocbio(
        ...     fb.ParametricProblem(mse, mse), inner_optimizer=0.1, outer_optimizer=0.01,
        ...     inner_steps=10, neumann_steps=10, neumann_step_size=0.1,
        ... )

    References:
        Ji, Yang, Liang, *Bilevel optimization: convergence analysis and enhanced design*, ICML 2021,
        https://arxiv.org/abs/2010.07962, algorithms 2 and 3.
    """
    levels = optimizers("stocbio", inner_optimizer, outer_optimizer)
    check_number("stocbio", "neumann_steps", neumann_steps)
    series = fixed_series(neumann_steps, schedule("stocbio", "neumann_step_size", neumann_step_size, positive=True))
    return double_loop("stocbio", problem, levels, series, inner_steps)
