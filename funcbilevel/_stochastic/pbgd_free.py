"""PBGD-Free: PBGD without the value function, and so without a second inner problem."""

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_number
from funcbilevel._bilevel import BilevelSolver, BilevelState
from funcbilevel._described import described
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._loop import (
    Draws,
    Schedule,
    StepSize,
    inner_step,
    optimizers,
    outer_step,
    schedule,
    solver,
)
from funcbilevel._stochastic._oracles import Report, inner_gradient, outer_gradients
from funcbilevel._tree import all_finite, tree_add_scaled
from funcbilevel._typing import Key


@described
def pbgd_free(
    problem: ParametricProblem,
    *,
    inner_optimizer: StepSize,
    outer_optimizer: StepSize,
    penalty: Schedule,
    inner_steps: int = 1,
) -> BilevelSolver:
    r"""PBGD-Free, the value-function-free variant of `pbgd`: no second inner problem, a single loop for M = 1.

    M times, with fresh draws,

    .. math::
        \theta \leftarrow \theta - \beta \bigl(\partial_\theta G(\omega, \theta)
            + \tfrac1\lambda\, \partial_\theta F(\omega, \theta)\bigr)

    towards the minimiser of :math:`F + \lambda G`, and then

    .. math:: \omega \leftarrow \omega - \alpha\, \partial_\omega F(\omega, \theta) .

    What it leaves out of the penalised gradient, :math:`\lambda (\partial_\omega G(\omega, \theta) - \partial_\omega
    \min G)`, tends to the implicit part of the hypergradient as lambda grows. The paper proves convergence where that
    is small: where F is flat in theta around the inner solution. Elsewhere omega stops at another point, and where F
    does not depend on omega (hyper-cleaning, weights of losses, regularisers) it never moves: take `pbgd` or `f2sa`
    there.

    Order: first. Draws per step: inner 0, ..., M - 1 (theta); outer 0, ..., M - 1 (theta), M (omega). The paper's
    method is deterministic: all draws are the same full batch. Memory: none.

    Arguments:
        problem: a `ParametricProblem`; of a functional one, `fb.parametrize(problem, model)`.
        inner_optimizer, outer_optimizer: for theta and omega: each a number or a schedule of the outer step, or an
            optax optimizer.
        penalty: lambda > 0, a number or a schedule of the outer step. (The paper's gamma.)
        inner_steps: M >= 1; the paper's single loop has 1.

    Returns:
        A `BilevelSolver`, as `soba`; `implicit_norm` is 0.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> mse = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> solver = fb.pbgd_free(
        ...     fb.ParametricProblem(mse, mse), inner_optimizer=0.1, outer_optimizer=0.01, penalty=10.0
        ... )

    References:
        Jiang, Xiao, Chen, Chen, *Beyond value functions: single-loop bilevel optimization under flatness conditions*,
        2025, https://arxiv.org/abs/2507.20400.
    """
    levels = optimizers("pbgd_free", inner_optimizer, outer_optimizer)
    at = schedule("pbgd_free", "penalty", penalty, positive=True)
    check_number("pbgd_free", "inner_steps", inner_steps)

    def update(state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]:
        del key
        omega, weight = state.outer_params, at(state.step)

        def turn(state: BilevelState, i: jax.Array) -> tuple[BilevelState, jax.Array]:
            G, gradient = inner_gradient(problem, omega, state.inner_params, draws.inner(i))
            d = outer_gradients(problem, omega, state.inner_params, draws.outer(i)).d
            return inner_step(levels, tree_add_scaled(gradient, 1.0 / weight, d), state), G

        state, values = jax.lax.scan(turn, state, jnp.arange(inner_steps))
        F = outer_gradients(problem, omega, state.inner_params, draws.outer(inner_steps))
        none = jax.tree.map(jnp.zeros_like, omega)
        metrics = F.aux | {"outer_finite": all_finite(F.value), "penalty": jnp.asarray(weight, F.value.dtype)}
        return outer_step(levels, F.g_exp, state), Report(values[-1], F.value, F.g_exp, none, F.g_exp, metrics)

    return solver(
        *("pbgd_free", problem, levels, lambda *_: (), update), inner_draws=inner_steps, outer_draws=inner_steps + 1
    )
