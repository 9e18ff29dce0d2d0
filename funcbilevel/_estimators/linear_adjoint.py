"""The adjoint of FuncID as a linear function of features, fitted exactly."""

from collections.abc import Callable

import jax

from funcbilevel._arguments import check_at_least, check_number
from funcbilevel._described import described
from funcbilevel._estimator import Adjoint, no_state
from funcbilevel._estimators._span import adjoint_in_span
from funcbilevel._features import Features, check_is_features, evaluate_features
from funcbilevel._fit import FitState
from funcbilevel._typing import Inputs


@described
def linear_adjoint(features: Features, ridge: float = 0.0, num_steps: int = 500) -> Adjoint:
    r"""a(x) = phi(x) W on frozen features phi, with W the exact minimiser of

    .. math::
        \tfrac12 \langle \Phi_P W, C[\Phi_P W]\rangle + \langle \Phi_Q W, d\rangle + \tfrac{ridge}2 \|W\|^2 .

    Solved by conjugate gradients on W, preconditioned by the Gram matrix of the features: one iteration when C is
    a multiple of the identity (squared error), and a p-by-p matrix is the largest ever formed. Without ridge W is
    the solution of least norm: directions in which the Gram matrix vanishes to rounding are left out.

    Arguments:
        features: `(inner_params, inputs) -> [n, p]`, used as given (no column is added); or a `Model` that shares
            the prediction model's parameters and state, such as `from_linen(module, method="features")`.
        ridge: >= 0.
        num_steps: most conjugate-gradient steps; they stop as soon as the residual is rounding error.

    Returns:
        An `Adjoint` for `funcid`. Its metrics: `linear_residual`, `linear_converged` and `linear_curvature` of the
        preconditioned system.

    Raises:
        ValueError: `ridge` < 0, `num_steps` < 1; (at trace time) features of another shape than [n, p].
        TypeError: `features` is not callable; (at trace time) they are not floating-point.

    Example: the last hidden layer of a network whose parameters are `{"hidden": ..., "head": ...}`.
        >>> adjoint = fb.linear_adjoint(lambda params, x: jnp.tanh(x @ params["hidden"]), ridge=1e-3)

    References:
        Petrulionyte, Mairal, Arbel, NeurIPS 2024, https://arxiv.org/abs/2403.20233 (closed-form adjoint of the
        instrumental regression).
    """
    check_is_features("linear_adjoint", features)
    check_at_least("linear_adjoint", "ridge", ridge, 0.0)
    check_number("linear_adjoint", "num_steps", num_steps)

    def features_on(inner: FitState, x_P: Inputs) -> tuple[Callable[[Inputs], jax.Array], None]:
        del x_P
        return lambda x: evaluate_features("linear_adjoint", features, inner, x), None

    return adjoint_in_span(no_state, features_on, ridge, num_steps)
