"""The adjoint of FuncID as a linear function of features, fitted exactly."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from funcbilevel._check import check_at_least, check_callable, check_number
from funcbilevel._estimator import Adjoint, AdjointSystem, no_state
from funcbilevel._fit import FitState
from funcbilevel._linear_solvers import conjugate_gradients, linear_metrics
from funcbilevel._model import Model
from funcbilevel._typing import InnerParams, Inputs, Key, LinearMap, Metrics, Prediction, PyTree


def linear_adjoint(
    features: Callable[[InnerParams, Inputs], jax.Array] | Model, ridge: float = 0.0, num_steps: int = 500
) -> Adjoint:
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
    if not isinstance(features, Model):
        check_callable("linear_adjoint", "features", features)
    check_at_least("linear_adjoint", "ridge", ridge, 0.0)
    check_number("linear_adjoint", "num_steps", num_steps)

    def evaluate(inner: FitState, inputs: Inputs) -> jax.Array:
        if isinstance(features, Model):
            phi, _ = features.apply(inner.params, inner.model_state, inputs)
        else:
            phi = features(inner.params, inputs)
        _check_features(phi, inputs)
        return phi

    def fit(
        system: AdjointSystem, model: Model, inner: FitState, state: PyTree, key: Key | None, /
    ) -> tuple[Prediction, PyTree, Metrics]:
        del model, key
        C, d, v_P, x_P, x_Q, mean = system
        phi_P, phi_Q = evaluate(inner, x_P), evaluate(inner, x_Q)

        # Coordinates Z with W = U D Z, where Phi_P' Phi_P = U diag(lam) U' and D is diagonal: the system matrix
        # D (U' Phi_P' C Phi_P U + ridge) D is the identity if C is a multiple of it.
        lam, U = jnp.linalg.eigh(mean(_moments(phi_P, phi_P)))
        phi_P, phi_Q = phi_P @ U, phi_Q @ U
        scale = mean(_mean_curvature(C, v_P))
        D = jax.tree.map(lambda c: _inverse_sqrt(jnp.multiply.outer(lam, c) + ridge), scale)

        def values(phi: jax.Array, Z: PyTree) -> Prediction:  # phi U D Z
            return jax.tree.map(lambda D, Z: jnp.tensordot(phi, D * Z, 1), D, Z)

        def moments(phi: jax.Array, t: Prediction) -> PyTree:  # D U' phi' t
            return mean(jax.tree.map(lambda D, t: D * _moments(phi, t), D, t))

        def matvec(Z: PyTree) -> PyTree:
            return jax.tree.map(lambda D, Z, m: m + ridge * D * D * Z, D, Z, moments(phi_P, C(values(phi_P, Z))))

        rhs = jax.tree.map(jnp.negative, moments(phi_Q, d))
        Z = conjugate_gradients(matvec, rhs, jax.tree.map(jnp.zeros_like, rhs), num_steps)
        return values(phi_P, Z), state, linear_metrics(matvec, rhs, Z)

    return Adjoint(no_state, fit)


def _moments(phi: jax.Array, t: jax.Array) -> jax.Array:
    """phi' t, [p, ...], on every device: over samples that are sharded explicitly, JAX wants to be told so."""
    mesh = jax.typeof(phi).sharding.mesh
    replicated: dict[str, Any] = {"out_sharding": NamedSharding(mesh, PartitionSpec())} if mesh.explicit_axes else {}
    return jnp.tensordot(phi, t, (0, 0), **replicated)


def _mean_curvature(C: LinearMap, v_P: Prediction) -> PyTree:
    """The mean over the batch of the diagonal of C, estimated from one product with random signs.

    Exact if C is diagonal; positive, so that it can scale a preconditioner whatever C is.
    """

    def signs(i: int, v: jax.Array) -> jax.Array:
        return jax.random.rademacher(jax.random.fold_in(jax.random.key(0), i), v.shape, v.dtype)

    leaves, structure = jax.tree.flatten(v_P)
    probe = jax.tree.unflatten(structure, [signs(i, v) for i, v in enumerate(leaves)])

    def mean(e: jax.Array, Ce: jax.Array) -> jax.Array:
        c = jnp.abs(jnp.mean(e * Ce, axis=0))
        return jnp.maximum(c, jnp.sqrt(jnp.finfo(c.dtype).eps) * jnp.max(c))

    return jax.tree.map(mean, probe, C(probe))


def _inverse_sqrt(h: jax.Array) -> jax.Array:
    """h^(-1/2) for h of shape [p, ...], and 0 where h is zero up to the rounding error of a p-by-p Gram matrix."""
    cutoff = h.shape[0] * jnp.finfo(h.dtype).eps * jnp.max(h, axis=0, keepdims=True)
    kept = h > cutoff
    return jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, h, 1.0)), 0.0)


def _check_features(phi: Any, inputs: Inputs) -> None:
    sizes = {x.shape[0] for x in jax.tree.leaves(inputs) if x.ndim > 0}
    if not hasattr(phi, "shape") or phi.ndim != 2 or phi.shape[0] not in sizes:
        got = f"shape {phi.shape}" if hasattr(phi, "shape") else type(phi).__name__
        raise ValueError(
            "linear_adjoint: features must return an array of shape [n, p] with "
            f"n = {' or '.join(map(str, sorted(sizes)))} rows, got {got}; flatten each sample's features to one row."
        )
    if not jnp.issubdtype(phi.dtype, jnp.floating):
        raise TypeError(
            f"linear_adjoint: features must be floating-point, got dtype {phi.dtype}; convert them, for example with "
            "phi.astype(jnp.float32)."
        )
