"""BOME: joint descent on both variables, along a direction that a dynamic barrier keeps near the inner solution."""

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_number, check_positive
from funcbilevel._bilevel import BilevelSolver, BilevelState
from funcbilevel._described import described
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._loop import (
    Draws,
    StepSize,
    inner_step,
    moved,
    optimizer_of,
    optimizers,
    outer_step,
    solver,
)
from funcbilevel._stochastic._oracles import Report, inner_gradient, inner_gradients, outer_gradients, penalty_report
from funcbilevel._tree import tree_add_scaled, tree_vdot
from funcbilevel._typing import InnerParams, Key


@described
def bome(
    problem: ParametricProblem,
    *,
    inner_optimizer: StepSize,
    solution_optimizer: StepSize,
    outer_optimizer: StepSize,
    solution_steps: int,
    barrier: float = 0.5,
) -> BilevelSolver:
    r"""BOME, bilevel optimization made easy: F is descended under a constraint on the value-function gap.

    T steps from theta give :math:`\hat\theta`, which is held fixed in
    :math:`q(\omega, \theta) = G(\omega, \theta) - G(\omega, \hat\theta)`; then, with all derivatives by both variables,

    .. math::
        \lambda &= \max\Bigl(0, \eta - \frac{\langle \partial F, \partial q\rangle}{\|\partial q\|^2}\Bigr), \\
        (\omega, \theta) &\leftarrow (\omega, \theta) - \xi (\partial F + \lambda\, \partial q) .

    (The barrier phi of the paper is :math:`\eta \|\partial q\|^2`, its first choice.)

    Order: first. Draws per step: inner 0, ..., T - 1 (the steps to the solution), T (q); outer 0. The paper's method is
    deterministic: all draws are the same full batch. Memory: none.

    Arguments:
        problem: a `ParametricProblem`; of a functional one, `fb.parametrize(problem, model)`.
        inner_optimizer, outer_optimizer: for theta and omega; the paper has one step size xi for both. A number or a
            schedule of the outer step, or an optax optimizer.
        solution_optimizer: of the T steps, whose optimizer starts anew at every outer step.
        solution_steps: T >= 1.
        barrier: eta > 0.

    Returns:
        A `BilevelSolver`, as `soba`; `penalty` in the metrics is lambda, `implicit_norm` that of
        :math:`\lambda\, \partial_\omega q`.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> mse = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> solver = fb.bome(
        ...     fb.ParametricProblem(mse, mse), inner_optimizer=0.1, outer_optimizer=0.1, solution_optimizer=0.1,
        ...     solution_steps=10,
        ... )

    References:
        Ye, Liu, Wright, Stone, Liu, *BOME! Bilevel optimization made easy*, NeurIPS 2022,
        https://arxiv.org/abs/2209.08709, algorithm 1.
    """
    levels = optimizers("bome", inner_optimizer, outer_optimizer)
    to_solution = optimizer_of("bome", "solution_optimizer", solution_optimizer)
    check_number("bome", "solution_steps", solution_steps)
    check_positive("bome", "barrier", barrier)

    def update(state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]:
        del key
        omega, theta, t = state.outer_params, state.inner_params, state.step

        def descend(carry: tuple[InnerParams, object], i: jax.Array) -> tuple[tuple[InnerParams, object], None]:
            solution, opt_state = carry
            gradient = inner_gradient(problem, omega, solution, draws.inner(i))[1]
            return moved(to_solution, gradient, opt_state, solution, t), None

        (solution, _), _ = jax.lax.scan(descend, (theta, to_solution.init(theta)), jnp.arange(solution_steps))
        F = outer_gradients(problem, omega, theta, draws.outer(0))
        G, at_theta, q_theta = inner_gradients(problem, omega, theta, draws.inner(solution_steps))
        _, at_solution, _ = inner_gradients(problem, omega, solution, draws.inner(solution_steps))
        dq = (tree_add_scaled(at_theta, -1.0, at_solution), q_theta)
        squared = tree_vdot(dq, dq)
        slope = tree_vdot((F.g_exp, F.d), dq) / jnp.where(squared > 0, squared, 1.0)
        weight = jnp.where(squared > 0, jnp.maximum(barrier - slope, 0.0), 0.0)
        report = penalty_report(F, at_theta, at_solution, weight, G)
        after = inner_step(levels, tree_add_scaled(F.d, weight, q_theta), state)
        return outer_step(levels, report.direction, after), report

    return solver("bome", problem, levels, lambda *_: (), update, inner_draws=solution_steps + 1, outer_draws=1)
