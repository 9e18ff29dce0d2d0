"""SOBA: one stochastic step at each of three levels at once."""

from funcbilevel._bilevel import BilevelSolver, BilevelState
from funcbilevel._described import described
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._loop import (
    Draws,
    LinearState,
    Report,
    StepSize,
    inner_step,
    linear_start,
    linear_step,
    optimizers,
    outer_step,
    solver,
)
from funcbilevel._stochastic._oracles import directions, report
from funcbilevel._typing import InnerParams, Key


@described
def soba(
    problem: ParametricProblem, *, inner_optimizer: StepSize, linear_optimizer: StepSize, outer_optimizer: StepSize
) -> BilevelSolver:
    r"""SOBA, the stochastic bilevel algorithm: theta, u and omega move together, none waits for another.

    With i a draw of the inner samples and j one of the outer ones, and all derivatives at (omega, theta, u) of before,

    .. math::
        \theta &\leftarrow \theta - \rho\, \partial_\theta G_i, \\
        u &\leftarrow u - \rho_u (\partial^2_\theta G_i\, u - \partial_\theta F_j), \\
        \omega &\leftarrow \omega - \gamma (\partial_\omega F_j - \partial^2_{\omega\theta} G_i\, u) .

    Order: second (one product with the Hessian and the cross derivative, in one pass). Draws per step: one inner
    (number 0) and one outer. Memory: one vector like theta. The linear system has no inverse and no loop of its own; u
    starts at zero.

    Arguments:
        problem: a `ParametricProblem`; of a functional one, `fb.parametrize(problem, model)`.
        inner_optimizer, linear_optimizer, outer_optimizer: for theta, u and omega: each a number or a schedule of the
            outer step (gradient descent with that step size, the published update), or an optax optimizer.

    Returns:
        A `BilevelSolver`. Batches may be plain ones, `Minibatches`, a `Sampler` or a `FiniteSum`, of either level;
        `run` takes `num_steps` where both are sources for all steps. `linear_residual` in the metrics is :math:`|Hu -
        \partial_\theta F| / |\partial_\theta F|` on the step's samples.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> import jax, jax.numpy as jnp, funcbilevel as fb
        >>> problem = fb.ParametricProblem(
        ...     lambda w, u, x: jnp.mean((u - w * x) ** 2), lambda w, u, x: jnp.mean((u - 2.0 * x) ** 2)
        ... )
        >>> solver = fb.soba(problem, inner_optimizer=0.2, linear_optimizer=0.2, outer_optimizer=0.1)
        >>> data = fb.finite_sum(jnp.linspace(0.5, 1.5, 8), batch_size=2)
        >>> state = solver.init(jax.random.key(0), 0.0, data, 0.0)
        >>> state, metrics = jax.jit(solver.run, static_argnums=3)(state, data, data, 400)
        >>> bool(abs(state.outer_params - 2.0) < 0.1)
        True

    References:
        Dagreou, Ablin, Vaiter, Moreau, *A framework for bilevel optimization that enables stochastic and global
        variance reduction algorithms*, NeurIPS 2022, https://arxiv.org/abs/2201.13409, algorithm 1 and section 3.1.
    """
    levels = optimizers("soba", inner_optimizer, outer_optimizer, linear_optimizer)

    def own(omega: object, theta: InnerParams, *_: object) -> LinearState:
        return linear_start(levels, theta)

    def update(state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]:
        del key
        omega, theta, linear = state.outer_params, state.inner_params, state.estimator_state
        D = directions(problem, omega, theta, linear.u, draws.inner(0), draws.outer(0))
        after = outer_step(levels, D.omega, inner_step(levels, D.theta, state))
        after = after._replace(estimator_state=linear_step(levels, D.u, linear, state.step))
        return after, report(D, D.omega)

    return solver("soba", problem, levels, own, update, inner_draws=1, outer_draws=1)
