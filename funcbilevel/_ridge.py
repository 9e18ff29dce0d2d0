"""The exact minimiser of a quadratic over linear functions of features: the linear adjoint's and a linear head's."""

import jax
import jax.numpy as jnp

from funcbilevel._linear_solvers import conjugate_gradients, in_working_dtype, linear_metrics, nan_unless
from funcbilevel._tree import moments, tree_cast, tree_scaled, tree_size, working_dtype
from funcbilevel._typing import LinearMap, Metrics, PyTree


def ridge_solution(
    C: LinearMap,
    rhs: PyTree,
    phi: jax.Array,
    v: PyTree,
    ridge: float,
    num_steps: int,
    mean: LinearMap,
    spectrum: jax.Array | None = None,
) -> tuple[PyTree, Metrics]:
    r"""The W that minimises

    .. math:: \tfrac12 \langle \Phi W, C[\Phi W]\rangle - \langle rhs, W\rangle + \tfrac{ridge}2 \|W\|^2 .

    Conjugate gradients on W, preconditioned by the Gram matrix of the features: one iteration when C is a multiple of
    the identity. Without ridge W is the solution of least norm: directions in which the Gram matrix vanishes to
    rounding are left out. Differentiable in C, rhs and phi (implicitly, by another solve), as often as one likes.

    Arguments:
        C: symmetric positive semidefinite map on pytrees with leaves [n, ...].
        rhs: pytree with leaves [p, ...].
        phi: features, [n, p].
        v: a pytree like those that C takes.
        ridge: >= 0.
        num_steps: most iterations.
        mean: the mean of a pytree over the problem's mapped axis, over which samples are spread.
        spectrum: the diagonal of Phi' Phi, [p], where that is known to be diagonal.

    Returns:
        W, leaves [p, ...] in float32 at least, NaN where C or rhs holds NaN; and the `linear_metrics` of the
        preconditioned system.
    """
    dtype, size, computed_in = working_dtype((phi, rhs, v)), tree_size(rhs), v
    curvature, phi, rhs = in_working_dtype(C, v), phi.astype(dtype), tree_scaled(tree_cast(rhs, dtype), 1.0 / size)
    v = tree_cast(v, working_dtype(v))
    # Coordinates Z with W = U D Z, where Phi' Phi = U diag(lam) U' and D is diagonal: the system matrix
    # D (U' Phi' C Phi U + ridge) D is the identity if C is a multiple of it. Only coordinates, so held fixed.
    lam, U = _eigen(phi, mean) if spectrum is None else (spectrum.astype(dtype), jnp.eye(len(spectrum), dtype=dtype))
    scale = jax.lax.stop_gradient(mean(_mean_curvature(curvature, v)))
    D = jax.tree.map(lambda c: _inverse_sqrt(jnp.multiply.outer(lam, c) + ridge), scale)
    phi = phi @ U

    def values(Z: PyTree) -> PyTree:  # phi U D Z
        return tree_cast(jax.tree.map(lambda D, Z: jnp.tensordot(phi, D * Z, 1), D, Z), v)

    def matvec(Z: PyTree) -> PyTree:
        products = mean(jax.tree.map(lambda t: moments(phi, t), curvature(values(Z))))
        return jax.tree.map(lambda D, Z, m: D * m + ridge * D * D * Z, D, Z, products)

    right = jax.tree.map(lambda D, r: D * jnp.tensordot(U.T, r, 1), D, rhs)
    Z = conjugate_gradients(matvec, right, None, num_steps)
    W = jax.tree.map(lambda D, Z: jnp.tensordot(U, D * Z, 1), D, Z)
    metrics = linear_metrics(matvec(Z), right, Z, computed_in)
    return nan_unless(~jnp.isnan(metrics["linear_residual"]), tree_scaled(W, size)), metrics


def _eigen(phi: jax.Array, mean: LinearMap) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors of Phi' Phi, held fixed."""
    lam, U = jnp.linalg.eigh(jax.lax.stop_gradient(mean(moments(phi, phi))))
    return lam, U


def _mean_curvature(C: LinearMap, like: PyTree) -> PyTree:
    """The mean over the batch of the diagonal of C, estimated from one product with random signs.

    Exact if C is diagonal; positive, so that it can scale a preconditioner whatever C is.
    """

    def signs(i: int, v: jax.Array) -> jax.Array:
        return jax.random.rademacher(jax.random.fold_in(jax.random.key(0), i), v.shape, v.dtype)

    leaves, structure = jax.tree.flatten(like)
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
