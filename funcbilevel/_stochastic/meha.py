"""MEHA: a single loop on the Moreau envelope of the inner objective, by first derivatives alone."""

import jax

from funcbilevel._arguments import check_positive
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
from funcbilevel._typing import InnerParams, Key


@described
def meha(
    problem: ParametricProblem,
    *,
    inner_optimizer: StepSize,
    proximal_optimizer: StepSize,
    outer_optimizer: StepSize,
    penalty: Schedule,
    proximal_weight: float,
) -> BilevelSolver:
    r"""MEHA, the Moreau-envelope based Hessian-free algorithm, for inner problems that need not be convex.

    y follows the proximal point of theta, the minimiser of :math:`G(\omega, y) + \frac1{2\gamma}\|y - \theta\|^2`; the
    penalty c is on the gap between G and its Moreau envelope:

    .. math::
        y &\leftarrow y - \eta \bigl(\partial_\theta G(\omega, y) + \tfrac1\gamma (y - \theta)\bigr), \\
        \omega &\leftarrow \omega - \alpha \bigl(\tfrac1c \partial_\omega F(\omega, \theta)
            + \partial_\omega G(\omega, \theta) - \partial_\omega G(\omega, y)\bigr), \\
        \theta &\leftarrow \theta - \beta \bigl(\tfrac1c \partial_\theta F(\omega, \theta)
            + \partial_\theta G(\omega, \theta) - \tfrac1\gamma (\theta - y)\bigr),

    each line with the newest values.

    Order: first. Draws per step: inner 0 (y), 1 (omega, at theta and at y), 2 (theta); outer 0 (omega), 1 (theta). The
    paper's method is deterministic: all draws are the same full batch. Memory: one vector like theta.

    Arguments:
        problem: a `ParametricProblem`; of a functional one, `fb.parametrize(problem, model)`.
        inner_optimizer, proximal_optimizer, outer_optimizer: for theta, y and omega: each a number or a schedule of the
            outer step, or an optax optimizer.
        penalty: c > 0, a number or a schedule of the outer step, such as `lambda t: c * (t + 1.0) ** 0.3`.
        proximal_weight: gamma > 0, below 1 / the weak convexity of G.

    Returns:
        A `BilevelSolver`, as `soba`; y is `estimator_state.y`. `explicit_norm` is that of d_omega F and `implicit_norm`
        that of c (d_omega G(theta) - d_omega G(y)), as of other penalty methods; `hypergradient_norm` is that of the
        direction of omega, 1/c of their sum.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> mse = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> solver = fb.meha(
        ...     fb.ParametricProblem(mse, mse), inner_optimizer=0.1, proximal_optimizer=0.1, outer_optimizer=0.1,
        ...     penalty=lambda t: (1.0 + t) ** 0.3, proximal_weight=1.0,
        ... )

    References:
        Liu, Liu, Yao, Zeng, Zhang, *Moreau envelope for nonconvex bi-level optimization: a single-loop and Hessian-free
        solution strategy*, ICML 2024, https://arxiv.org/abs/2405.09927, algorithm 1.
    """
    levels = optimizers("meha", inner_optimizer, outer_optimizer)
    proximal = optimizer_of("meha", "proximal_optimizer", proximal_optimizer)
    at = schedule("meha", "penalty", penalty, positive=True)
    check_positive("meha", "proximal_weight", proximal_weight)

    def update(state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]:
        del key
        omega, theta, (y, opt_state), t = state.outer_params, state.inner_params, state.estimator_state, state.step
        c = at(t)

        def pulled(gradient: InnerParams, y: InnerParams) -> InnerParams:
            """gradient + (y - theta) / gamma."""
            return jax.tree.map(lambda g, y, theta: g + (y - theta) / proximal_weight, gradient, y, theta)

        of_y = inner_gradient(problem, omega, y, draws.inner(0))[1]
        y, opt_state = moved(proximal, pulled(of_y, y), opt_state, y, t)
        F = outer_gradients(problem, omega, theta, draws.outer(0))
        G, at_theta, _ = inner_gradients(problem, omega, theta, draws.inner(1))
        _, at_y, _ = inner_gradients(problem, omega, y, draws.inner(1))
        report = penalty_report(F, at_theta, at_y, c, G)
        report = report._replace(direction=jax.tree.map(lambda x: x / c, report.direction))
        after = outer_step(levels, report.direction, state)
        d = outer_gradients(problem, after.outer_params, theta, draws.outer(1)).d
        gradient = inner_gradient(problem, after.outer_params, theta, draws.inner(2))[1]
        after = inner_step(levels, tree_add_scaled(pulled(gradient, y), 1.0 / c, d), after)
        return after._replace(estimator_state=PenaltyState(y, opt_state)), report

    return solver("meha", problem, levels, penalty_start(proximal), update, inner_draws=3, outer_draws=2)
