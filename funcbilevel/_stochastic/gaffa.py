"""GAFFA: a single loop on the doubly regularised gap function of an inner problem with constraints."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from funcbilevel._arguments import check_callable, check_positive
from funcbilevel._bilevel import BilevelSolver, BilevelState
from funcbilevel._described import described
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._loop import (
    Draws,
    Schedule,
    StepSize,
    inner_step,
    moved,
    optimizer_of,
    optimizers,
    outer_step,
    schedule,
    solver,
)
from funcbilevel._stochastic._oracles import Report, inner_gradients, outer_gradients, penalty_report
from funcbilevel._tree import tree_add_scaled
from funcbilevel._typing import InnerParams, Key, OuterParams


class GaffaState(NamedTuple):
    """What follows the inner solution and its multipliers.

    Attributes:
        y: the proximal point of theta, like inner_params.
        opt_state: of its optimizer.
        z: the multipliers of the constraints, [m].
    """

    y: InnerParams
    opt_state: optax.OptState
    z: jax.Array


@described
def gaffa(
    problem: ParametricProblem,
    *,
    constraint: Callable[[OuterParams, InnerParams], jax.Array],
    inner_optimizer: StepSize,
    proximal_optimizer: StepSize,
    outer_optimizer: StepSize,
    penalty: Schedule,
    multiplier_step_size: Schedule,
    proximal_weight: float,
    multiplier_weight: float,
    multiplier_bound: float,
) -> BilevelSolver:
    r"""GAFFA, a gap-function method for inner problems with constraints, by first derivatives alone.

    The inner problem is :math:`\min_\theta G(\omega, \theta)` where :math:`g(\omega, \theta) \leq 0`. The penalty
    is on the doubly regularised gap function, which is zero where theta is a solution with multipliers z, and positive
    elsewhere:

    .. math::
        \max_{y,\ \lambda \geq 0}\ G(\omega, \theta) + \lambda^\top g(\omega, \theta) - \tfrac1{2\gamma_2}\|\lambda -
        z\|^2 - G(\omega, y) - z^\top g(\omega, y) - \tfrac1{2\gamma_1}\|y - \theta\|^2 .

    One gradient step follows the maximiser y, and lambda is known; then omega, theta and z move together, along the
    gradient of F / c + gap:

    .. math::
        y &\leftarrow y - \eta \bigl(\partial_\theta G(\omega, y) + \partial_\theta g(\omega, y)^\top z
            + \tfrac1{\gamma_1} (y - \theta)\bigr), \qquad
            \lambda = \max(0, z + \gamma_2\, g(\omega, \theta)), \\
        \omega &\leftarrow \omega - \alpha \bigl(\tfrac1c \partial_\omega F + \partial_\omega G(\omega, \theta)
            + \partial_\omega g(\omega, \theta)^\top \lambda - \partial_\omega G(\omega, y)
            - \partial_\omega g(\omega, y)^\top z\bigr), \\
        \theta &\leftarrow \theta - \beta \bigl(\tfrac1c \partial_\theta F + \partial_\theta G(\omega, \theta)
            + \partial_\theta g(\omega, \theta)^\top \lambda - \tfrac1{\gamma_1} (\theta - y)\bigr), \\
        z &\leftarrow \mathrm{clip}\bigl(z - \alpha_z (\tfrac1{\gamma_2} (\lambda - z) - g(\omega, y)),\ 0,\ r\bigr),

    with omega, theta and z of before in all of them. Without constraints this is `meha`, but that there theta moves
    after omega.

    Order: first. Draws per step: inner 0 (y), 1 (the rest); outer 0. The paper's method is deterministic: all draws are
    the same full batch. Memory: one vector like theta, one like the constraints.

    Arguments:
        problem: a `ParametricProblem`; of a functional one, `fb.parametrize(problem, model)`.
        constraint: g, `(outer_params, inner_params) -> [m]`, of which every entry has to be <= 0; convex in theta.
        inner_optimizer, proximal_optimizer, outer_optimizer: for theta, y and omega: each a number or a schedule of the
            outer step, or an optax optimizer.
        penalty: c > 0, a number or a schedule of the outer step, such as `lambda t: c * (t + 1.0) ** 0.3`.
        multiplier_step_size: alpha_z > 0, a number or a schedule. (In the paper those of omega, theta and z are one.)
        proximal_weight, multiplier_weight: gamma_1 and gamma_2 > 0.
        multiplier_bound: r > 0, above the multipliers of the solution.

    Returns:
        A `BilevelSolver`, as `soba`; y and z are in `estimator_state`, `constraint_violation` in the metrics is the
        largest entry of max(0, g). `hypergradient_norm` is that of the direction of omega.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind; `constraint` gives no array [m].

    Example: theta follows omega, but at most to 1; a solution is omega = 3 and theta = 1 with the multiplier 4.
        >>> import jax, jax.numpy as jnp, funcbilevel as fb
        >>> problem = fb.ParametricProblem(
        ...     lambda w, theta, _: jnp.sum((theta - w) ** 2),
        ...     lambda w, theta, _: jnp.sum((theta - 2.0) ** 2 + 0.1 * (w - 3.0) ** 2),
        ... )
        >>> solver = fb.gaffa(
        ...     problem, constraint=lambda w, theta: theta - 1.0, inner_optimizer=0.05, proximal_optimizer=0.05,
        ...     outer_optimizer=0.05, penalty=lambda t: (1.0 + t) ** 0.3, multiplier_step_size=0.05,
        ...     proximal_weight=1.0, multiplier_weight=1.0, multiplier_bound=10.0,
        ... )
        >>> batches = jnp.zeros(10_000)
        >>> state = solver.init(jax.random.key(0), jnp.zeros(1), batches[0], jnp.zeros(1))
        >>> state, metrics = jax.jit(solver.run)(state, batches, batches)
        >>> bool(metrics["constraint_violation"][-1] < 0.2), bool(state.estimator_state.z[0] > 2.5)
        (True, True)

    References:
        Yao, Yin, Zeng, Zhang, *Overcoming lower-level constraints in bilevel optimization: a novel approach with
        regularized gap functions*, ICLR 2025, https://arxiv.org/abs/2406.01992, algorithm 1.
    """
    levels = optimizers("gaffa", inner_optimizer, outer_optimizer)
    proximal = optimizer_of("gaffa", "proximal_optimizer", proximal_optimizer)
    check_callable("gaffa", "constraint", constraint, "outer_params, inner_params")
    at = schedule("gaffa", "penalty", penalty, positive=True)
    size = schedule("gaffa", "multiplier_step_size", multiplier_step_size, positive=True)
    check_positive("gaffa", "proximal_weight", proximal_weight)
    check_positive("gaffa", "multiplier_weight", multiplier_weight)
    check_positive("gaffa", "multiplier_bound", multiplier_bound)

    def own(omega: OuterParams, theta: InnerParams, *_: object) -> GaffaState:
        g = jax.eval_shape(constraint, omega, theta)
        if not isinstance(g, jax.ShapeDtypeStruct) or len(g.shape) != 1:
            got = f"shape {g.shape}" if isinstance(g, jax.ShapeDtypeStruct) else type(g).__name__
            raise ValueError(
                f"gaffa: constraint must give an array [m], one entry for each constraint, got {got}; stack the "
                "constraints with jnp.stack, or ravel them."
            )
        return GaffaState(theta, proximal.init(theta), jnp.zeros(g.shape, g.dtype))

    def with_constraint(
        omega: OuterParams, theta: InnerParams, batch: object, weights: Callable[[jax.Array], jax.Array]
    ) -> tuple[jax.Array, OuterParams, InnerParams, jax.Array]:
        """G; the gradients of G + weights(g)^T g, the weights held fixed, by omega and by theta; and g."""
        G, by_omega, by_theta = inner_gradients(problem, omega, theta, batch)
        g, pull = jax.vjp(constraint, omega, theta)
        more = pull(weights(g))
        return G, tree_add_scaled(by_omega, 1.0, more[0]), tree_add_scaled(by_theta, 1.0, more[1]), g

    def update(state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]:
        del key
        omega, theta, t = state.outer_params, state.inner_params, state.step
        y, opt_state, z = state.estimator_state
        c = at(t)

        def pulled(gradient: InnerParams, y: InnerParams) -> InnerParams:
            """gradient + (y - theta) / gamma_1."""
            return jax.tree.map(lambda d, y, x: d + (y - x) / proximal_weight, gradient, y, theta)

        _, _, of_y, _ = with_constraint(omega, y, draws.inner(0), lambda _: z)
        y, opt_state = moved(proximal, pulled(of_y, y), opt_state, y, t)

        def multiplier(g: jax.Array) -> jax.Array:
            return jnp.maximum(z + multiplier_weight * g, 0.0)

        F = outer_gradients(problem, omega, theta, draws.outer(0))
        G, at_theta, of_theta, g = with_constraint(omega, theta, draws.inner(1), multiplier)
        _, at_y, _, g_y = with_constraint(omega, y, draws.inner(1), lambda _: z)
        report = penalty_report(F, at_theta, at_y, c, G)
        violation = jnp.max(jnp.maximum(g, 0.0), initial=0.0)
        report = report._replace(
            direction=jax.tree.map(lambda x: x / c, report.direction),
            metrics=report.metrics | {"constraint_violation": violation},
        )
        of_z = (multiplier(g) - z) / multiplier_weight - g_y
        after = inner_step(levels, tree_add_scaled(pulled(of_theta, y), 1.0 / c, F.d), state)
        after = outer_step(levels, report.direction, after)
        z = jnp.clip(z - jnp.asarray(size(t), z.dtype) * of_z, 0.0, multiplier_bound)
        return after._replace(estimator_state=GaffaState(y, opt_state, z)), report

    return solver("gaffa", problem, levels, own, update, inner_draws=2, outer_draws=1)
