"""MA-SOBA: SOBA with a moving average of the hypergradient."""

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
from funcbilevel._stochastic._oracles import Report, directions, report
from funcbilevel._tree import tree_add_scaled
from funcbilevel._typing import InnerParams, Key, OuterParams


class MASobaState(NamedTuple):
    """u with its optimizer's state, and the moving average h, like outer_params."""

    linear: LinearState
    average: OuterParams


@described
def ma_soba(
    problem: ParametricProblem,
    *,
    inner_optimizer: StepSize,
    linear_optimizer: StepSize,
    outer_optimizer: StepSize,
    momentum: Schedule,
) -> BilevelSolver:
    r"""SOBA with a moving average h of the hypergradient, which spares it the smoothness of second derivatives.

    With i and j draws of the inner and the outer samples, all derivatives at (omega, theta, u) of before, and tau the
    weight of what is new,

    .. math::
        \omega &\leftarrow \omega - \gamma h, \\
        \theta &\leftarrow \theta - \rho\, \partial_\theta G_i, \\
        u &\leftarrow u - \rho_u (\partial^2_\theta G_i\, u - \partial_\theta F_j), \\
        h &\leftarrow (1 - \tau) h + \tau (\partial_\omega F_j - \partial^2_{\omega\theta} G_i\, u) .

    h starts at zero, so that omega first moves in the second step. (`soba` with an outer optimizer that has momentum
    moves along the new average instead.)

    Order: second. Draws per step: one inner and one outer, number 0 of each. Memory: one vector like theta, one like
    omega.

    Arguments:
        problem, inner_optimizer, linear_optimizer, outer_optimizer: as for `soba`.
        momentum: tau in (0, 1], a number or a schedule of the outer step.

    Returns:
        A `BilevelSolver`, as `soba`; `hypergradient_norm` is that of h.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> sizes = {"inner_optimizer": 0.1, "linear_optimizer": 0.1, "outer_optimizer": 0.01}
        >>> mse = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> solver = fb.ma_soba(fb.ParametricProblem(mse, mse), **sizes, momentum=0.1)

    References:
        Chen, Xiao, Balasubramanian, *Optimal algorithms for stochastic bilevel optimization under relaxed smoothness
        conditions*, JMLR 2024, https://arxiv.org/abs/2306.12067, algorithm 1.
    """
    levels = optimizers("ma_soba", inner_optimizer, outer_optimizer, linear_optimizer)
    tau = schedule("ma_soba", "momentum", momentum, positive=True)

    def own(omega: OuterParams, theta: InnerParams, *_: object) -> MASobaState:
        return MASobaState(linear_start(levels, theta), jax.tree.map(jnp.zeros_like, omega))

    def update(state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]:
        del key
        linear, h = state.estimator_state
        D = directions(problem, state.outer_params, state.inner_params, linear.u, draws.inner(0), draws.outer(0))
        after = outer_step(levels, h, inner_step(levels, D.theta, state))
        new = jax.tree.map(jnp.subtract, D.omega, h)
        after = after._replace(
            estimator_state=MASobaState(
                linear_step(levels, D.u, linear, state.step), tree_add_scaled(h, tau(state.step), new)
            )
        )
        return after, report(D, h)

    return solver("ma_soba", problem, levels, own, update, inner_draws=1, outer_draws=1)
