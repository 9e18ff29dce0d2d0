"""AmIGO: warm-started stochastic steps on the inner level and on the linear system."""

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_number
from funcbilevel._bilevel import BilevelSolver, BilevelState
from funcbilevel._described import described
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._double_loop import inner_loop
from funcbilevel._stochastic._loop import (
    Draws,
    LinearState,
    StepSize,
    linear_start,
    linear_step,
    optimizers,
    outer_step,
    solver,
)
from funcbilevel._stochastic._oracles import (
    Estimate,
    Report,
    cross_product,
    hessian_product,
    outer_gradients,
    report_of,
)
from funcbilevel._tree import tree_add_scaled
from funcbilevel._typing import InnerParams, Key, OuterParams


@described
def amigo(
    problem: ParametricProblem,
    *,
    inner_optimizer: StepSize,
    linear_optimizer: StepSize,
    outer_optimizer: StepSize,
    inner_steps: int,
    linear_steps: int,
) -> BilevelSolver:
    r"""AmIGO, amortized implicit gradient optimization: both loops go on from where the outer step before left them.

    M steps on fresh draws, then K steps on fresh draws at the last theta, then one:

    .. math::
        \theta &\leftarrow \theta - \alpha\, \partial_\theta G_i(\omega, \theta), \\
        u &\leftarrow u - \beta (\partial^2_\theta G_{i'}\, u - \partial_\theta F_j), \\
        \omega &\leftarrow \omega - \gamma (\partial_\omega F_j - \partial^2_{\omega\theta} G_{i''}\, u) .

    The outer samples j are one draw.

    Order: second. Draws per step: inner 0, ..., M - 1 (gradients), M, ..., M + K - 1 (Hessian products), M + K (cross
    derivative); outer 0. Memory: one vector like theta.

    Arguments:
        problem, inner_optimizer, linear_optimizer, outer_optimizer: as for `soba`.
        inner_steps: M >= 1.
        linear_steps: K >= 1.

    Returns:
        A `BilevelSolver`, as `soba`.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> sizes = {"inner_optimizer": 0.1, "linear_optimizer": 0.1, "outer_optimizer": 0.01}
        >>> mse = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> solver = fb.amigo(fb.ParametricProblem(mse, mse), **sizes, inner_steps=10, linear_steps=10)

    References:
        Arbel and Mairal, *Amortized implicit differentiation for stochastic bilevel optimization*, ICLR 2022,
        https://arxiv.org/abs/2111.14580, algorithms 1 to 3.
    """
    levels = optimizers("amigo", inner_optimizer, outer_optimizer, linear_optimizer)
    check_number("amigo", "inner_steps", inner_steps)
    check_number("amigo", "linear_steps", linear_steps)

    def own(omega: OuterParams, theta: InnerParams, *_: object) -> LinearState:
        return linear_start(levels, theta)

    def update(state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]:
        del key
        state, G = inner_loop(problem, levels, state, draws.inner, inner_steps)
        omega, theta = state.outer_params, state.inner_params
        F = outer_gradients(problem, omega, theta, draws.outer(0))

        def solve(linear: LinearState, i: jax.Array) -> tuple[LinearState, None]:
            Hu = hessian_product(problem, omega, theta, draws.inner(inner_steps + i), linear.u)
            return linear_step(levels, tree_add_scaled(Hu, -1.0, F.d), linear, state.step), None

        linear, _ = jax.lax.scan(solve, state.estimator_state, jnp.arange(linear_steps))
        cross = cross_product(problem, omega, theta, draws.inner(inner_steps + linear_steps), linear.u)
        direction = tree_add_scaled(F.g_exp, -1.0, cross)
        now = Estimate(F, F.g_exp, jax.tree.map(jnp.negative, cross))
        after = outer_step(levels, direction, state)._replace(estimator_state=linear)
        return after, report_of(now, direction, G, {})

    draws = inner_steps + linear_steps + 1
    return solver("amigo", problem, levels, own, update, inner_draws=draws, outer_draws=1)
