"""The gradient-norm penalty: the inner level's stationarity as a penalty on the outer objective."""

import jax
import optax

from funcbilevel._described import described
from funcbilevel._estimator import Estimator
from funcbilevel._estimators._penalty import penalised
from funcbilevel._problem import ParametricProblem, inner_value, mean_over_devices
from funcbilevel._tree import tree_vdot
from funcbilevel._typing import Batch, InnerParams, OuterParams


@described
def gradient_penalty(
    optimizer: optax.GradientTransformation, num_steps: int, penalty: float, warm_start: bool = True
) -> Estimator:
    r"""The penalty on the norm of the inner gradient, with lambda = `penalty`.

    .. math::
        y &\approx \arg\min_y \tfrac1\lambda L_{out}(\omega, y)
            + \tfrac12 \|\partial_\theta L_{in}(\omega, y)\|^2, \\
        \nabla F(\omega) &\approx \partial_\omega L_{out}(\omega, y)
            + \tfrac\lambda2\, \partial_\omega \|\partial_\theta L_{in}(\omega, y)\|^2 .

    One Hessian-vector product per step of y. The bias is of order 1/lambda where the inner objective is strongly
    convex in theta; where it is not, y may settle at any stationary point, a maximum included.

    Order: second. Memory: one vector like theta, and its optimizer's state.

    Arguments:
        optimizer: any optax optimizer, for y.
        num_steps: K >= 1, its steps per outer step.
        penalty: lambda > 0.
        warm_start: whether y and the optimizer state go on from the previous outer step; if not, y starts at theta.

    Returns:
        An `Estimator` for either kind of problem. Metrics: `adjoint_finite` (y is finite) and `penalty_objective`,
        what y minimises, at the last step.

    Raises:
        TypeError: `optimizer` is not one.
        ValueError: `num_steps` < 1, `penalty` <= 0.

    Example:
        >>> estimator = fb.gradient_penalty(optax.adam(1e-3), num_steps=20, penalty=100.0)

    References:
        Mehra and Hamm, *Penalty method for inversion-free deep bilevel optimization*, ACML 2021,
        https://arxiv.org/abs/1911.03432
    """

    def half_squared_norm(
        problem: ParametricProblem, outer_params: OuterParams, y: InnerParams, theta: InnerParams, inner_batch: Batch
    ) -> jax.Array:
        del theta
        grad = jax.grad(lambda y: inner_value(problem, outer_params, y, inner_batch)[0])(y)
        grad = mean_over_devices(problem, grad)
        return 0.5 * tree_vdot(grad, grad)

    return penalised("gradient_penalty", half_squared_norm, optimizer, num_steps, penalty, warm_start)
