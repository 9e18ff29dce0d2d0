"""The adjoint of FuncID as a linear function of features, fitted exactly."""

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_at_least, check_number
from funcbilevel._described import described
from funcbilevel._estimator import Adjoint, AdjointSystem, no_state
from funcbilevel._features import Features, check_is_features, evaluate_features
from funcbilevel._fit import FitState
from funcbilevel._model import Model
from funcbilevel._ridge import ridge_solution
from funcbilevel._tree import moments, tree_cast, working_dtype
from funcbilevel._typing import Inputs, Key, Metrics, Prediction, PyTree


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

    def fit(
        system: AdjointSystem, model: Model, inner: FitState, state: PyTree, key: Key | None, /
    ) -> tuple[Prediction, PyTree, Metrics]:
        del model, key
        W, phi_P, metrics = solve(system, inner)
        return jax.tree.map(lambda W: jnp.tensordot(phi_P, W, 1), W), state, metrics

    def solve(system: AdjointSystem, inner: FitState) -> tuple[PyTree, jax.Array, Metrics]:
        C, d, v_P, x_P, x_Q, mean = system
        phi_P, phi_Q = (evaluate_features("linear_adjoint", features, inner, x) for x in (x_P, x_Q))
        wide = working_dtype((phi_Q, d))
        rhs = jax.tree.map(lambda d: -mean(moments(phi_Q.astype(wide), d)), tree_cast(d, wide))
        W, metrics = ridge_solution(C, rhs, phi_P, v_P, ridge, num_steps, mean)
        return W, phi_P, metrics

    def newton(
        system: AdjointSystem, model: Model, inner: FitState, state: PyTree, key: Key | None, /
    ) -> tuple[Prediction, Prediction, PyTree, Metrics]:
        del model, key
        C, g, v_P, x_P, x_Q, mean = system
        phi_P, phi_Q = (evaluate_features("linear_adjoint", features, inner, x) for x in (x_P, x_Q))
        wide = working_dtype((phi_P, g))
        rhs = jax.tree.map(lambda g: mean(moments(phi_P.astype(wide), g)), tree_cast(g, wide))
        W, metrics = ridge_solution(C, rhs, phi_P, v_P, ridge, num_steps, mean)
        N_P, N_Q = (jax.tree.map(lambda W, phi=phi: jnp.tensordot(phi, W, 1), W) for phi in (phi_P, phi_Q))
        return N_P, N_Q, state, {"newton_residual": metrics["linear_residual"]}

    def evaluate(W: PyTree, inner: FitState, x_P: Inputs, x: Inputs) -> Prediction:
        del x_P
        phi = evaluate_features("linear_adjoint", features, inner, x)
        return jax.tree.map(lambda W: jnp.tensordot(phi, W, 1), W)

    return Adjoint(no_state, fit, newton=newton, coefficients=lambda *system: solve(*system)[0], evaluate=evaluate)
