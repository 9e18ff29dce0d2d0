"""What the linear and the kernel adjoint share: functions in the span of features, fitted exactly."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from funcbilevel._estimator import Adjoint, AdjointInit, AdjointSystem
from funcbilevel._fit import FitState
from funcbilevel._model import Model
from funcbilevel._ridge import ridge_solution
from funcbilevel._tree import moments, tree_cast, working_dtype
from funcbilevel._typing import Inputs, Key, Metrics, Prediction, PyTree

Features: TypeAlias = Callable[[Inputs], jax.Array]

# (inner, x_P) -> the features phi, inputs -> [n, p], and the diagonal of their Gram matrix on x_P, if it is diagonal.
FeaturesOn: TypeAlias = Callable[[FitState, Inputs], tuple[Features, jax.Array | None]]


def adjoint_in_span(init: AdjointInit, features_on: FeaturesOn, ridge: float, num_steps: int) -> Adjoint:
    """The adjoint a(x) = phi(x) W, its Newton step, and its coefficients W."""

    def minimiser(
        system: AdjointSystem, phi_P: jax.Array, spectrum: jax.Array | None, phi: jax.Array, t: Prediction
    ) -> tuple[PyTree, Metrics]:
        """argmin over W of 1/2 <phi_P W, C[phi_P W]> - <phi W, t> + ridge/2 |W|^2."""
        wide = working_dtype((phi, t))
        rhs = jax.tree.map(lambda t: system.mean(moments(phi.astype(wide), t)), tree_cast(t, wide))
        return ridge_solution(system.curvature, rhs, phi_P, system.v_P, ridge, num_steps, system.mean, spectrum)

    def solve(system: AdjointSystem, inner: FitState) -> tuple[PyTree, jax.Array, Metrics]:
        phi, spectrum = features_on(inner, system.x_P)
        phi_P, phi_Q = phi(system.x_P), phi(system.x_Q)
        W, metrics = minimiser(system, phi_P, spectrum, phi_Q, jax.tree.map(jnp.negative, system.d))
        return W, phi_P, metrics

    def fit(
        system: AdjointSystem, model: Model, inner: FitState, state: PyTree, key: Key | None, /
    ) -> tuple[Prediction, PyTree, Metrics]:
        del model, key
        W, phi_P, metrics = solve(system, inner)
        return _values(phi_P, W), state, metrics

    def newton(
        system: AdjointSystem, model: Model, inner: FitState, state: PyTree, key: Key | None, /
    ) -> tuple[Prediction, Prediction, PyTree, Metrics]:
        del model, key
        phi, spectrum = features_on(inner, system.x_P)
        phi_P, phi_Q = phi(system.x_P), phi(system.x_Q)
        W, metrics = minimiser(system, phi_P, spectrum, phi_P, system.d)
        return _values(phi_P, W), _values(phi_Q, W), state, {"newton_residual": metrics["linear_residual"]}

    def evaluate(W: PyTree, inner: FitState, x_P: Inputs, x: Inputs) -> Prediction:
        phi, _ = features_on(inner, x_P)
        return _values(phi(x), W)

    return Adjoint(init, fit, newton=newton, coefficients=lambda *system: solve(*system)[0], evaluate=evaluate)


def _values(phi: jax.Array, W: PyTree) -> Prediction:
    return jax.tree.map(lambda W: jnp.tensordot(phi, W, 1), W)
