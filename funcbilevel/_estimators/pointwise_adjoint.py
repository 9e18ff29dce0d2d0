"""The adjoint of FuncID as one free value per sample."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_like
from funcbilevel._described import described
from funcbilevel._estimator import Adjoint, AdjointSystem, no_state
from funcbilevel._fit import FitState
from funcbilevel._linear_solvers import in_working_dtype, linear_metrics, rescaled
from funcbilevel._model import Model
from funcbilevel._tree import tree_cast, tree_scaled, tree_size, working_dtype
from funcbilevel._typing import Inputs, Key, LinearMap, Metrics, Prediction, PyTree


@described
def pointwise_adjoint() -> Adjoint:
    r"""One unrestricted value per sample: :math:`a_i = -C_i^{-1} d_i`, with C_i the k-by-k block of C at sample i.

    Where C_i is singular (softmax cross-entropy does not see a shift of all logits, and C_i annihilates it), a_i is
    :math:`-C_i^+ d_i`, the solution of least norm: directions in which C_i vanishes to rounding are left out. That is
    the right answer where d_i lies in the range of C_i; samples where it does not are counted.

    For batches that hold the same inputs in the same order, and an inner objective that is a mean of terms of one
    sample each (C is then block diagonal; if it is not, `linear_residual` shows it).

    Exact for the unrestricted empirical problem. As an estimate of the population's hypergradient it is unbiased
    where, given the input, d and the cross derivative are independent (model-based reinforcement learning), and
    **biased where they are not (instrumental variables)**: there it answers another question, in which the
    confounding comes back; use `linear_adjoint` or `learned_adjoint`.

    Returns:
        An `Adjoint` for `funcid`. Its metrics: `linear_residual`, `linear_converged`, `linear_curvature` of C a = -d;
        `adjoint_inconsistent`, the number of samples whose equation C_i a_i = -d_i has no solution
        (`linear_converged` is then false); and `adjoint_inputs_match`, whether the two batches held the same inputs.

    Raises:
        ValueError: (at trace time) the inputs of the two batches differ in structure or shape.

    Example:
        >>> estimator = fb.funcid(fb.pointwise_adjoint())

    References:
        Petrulionyte, Mairal, Arbel, NeurIPS 2024, https://arxiv.org/abs/2403.20233 (the exact adjoint of the
        reinforcement-learning experiment).
    """

    def fit(
        system: AdjointSystem, model: Model, inner: FitState, state: PyTree, key: Key | None, /
    ) -> tuple[Prediction, PyTree, Metrics]:
        del model, inner, key
        C, d, _, x_P, x_Q, _ = system
        _check_shapes(x_P, x_Q)
        rhs = jax.tree.map(jnp.negative, tree_cast(d, working_dtype(d)))
        a_P = _solve_blocks(in_working_dtype(C, d), rhs)
        product, unit = rescaled(C, d)(a_P), 1.0 / tree_size(d)
        inconsistent = _inconsistent(product, rhs)
        near_one = tuple(tree_scaled(t, unit) for t in (product, rhs, a_P))
        metrics = linear_metrics(near_one[0], near_one[1], near_one[2], d)
        metrics["linear_converged"] &= inconsistent == 0
        metrics |= {"adjoint_inconsistent": inconsistent, "adjoint_inputs_match": _same(x_P, x_Q)}
        return a_P, state, metrics

    def newton(
        system: AdjointSystem, model: Model, inner: FitState, state: PyTree, key: Key | None, /
    ) -> tuple[Prediction, Prediction, PyTree, Metrics]:
        del model, inner, key
        C, g, _, x_P, x_Q, _ = system
        _check_shapes(x_P, x_Q)
        rhs = tree_cast(g, working_dtype(g))
        N = _solve_blocks(in_working_dtype(C, g), rhs)
        residual = linear_metrics(rescaled(C, g)(N), rhs, N, g)["linear_residual"]
        return N, N, state, {"newton_residual": residual}

    def coefficients(system: AdjointSystem, inner: FitState) -> PyTree:
        del inner
        d = tree_cast(system.d, working_dtype(system.d))
        return _solve_blocks(in_working_dtype(system.curvature, system.d), jax.tree.map(jnp.negative, d))

    def evaluate(W: PyTree, inner: FitState, x_P: Inputs, x: Inputs) -> Prediction:
        del inner
        _check_shapes(x_P, x)
        return _right_if(_same(x_P, x), W)

    return Adjoint(no_state, fit, newton=newton, coefficients=coefficients, evaluate=evaluate)


def _check_shapes(x_P: Inputs, x_Q: Inputs) -> None:
    mend = (
        "both batches must hold the same inputs in the same order. For inputs that differ use fb.linear_adjoint or "
        "fb.learned_adjoint."
    )
    shapes_P, shapes_Q = jax.eval_shape(lambda: (x_P, x_Q))
    check_like("pointwise_adjoint", "inputs of outer_batch", shapes_Q, shapes_P, mend)


def _same(x_P: Inputs, x_Q: Inputs) -> jax.Array:
    """Whether the two batches hold the same inputs."""
    pairs = zip(jax.tree.leaves(x_P), jax.tree.leaves(x_Q), strict=True)
    return jnp.all(jnp.stack([jnp.array_equal(p, q) for p, q in pairs]))


def _right_if(condition: jax.Array, tree: PyTree) -> PyTree:
    """`tree`, with NaN for its derivative if the condition is false."""
    identity = jax.custom_jvp(lambda condition, tree: tree)

    def rule(primals: tuple[jax.Array, PyTree], tangents: tuple[Any, PyTree]) -> tuple[PyTree, PyTree]:
        condition, tree = primals
        return identity(condition, tree), jax.tree.map(lambda t: t * jnp.where(condition, 1.0, jnp.nan), tangents[1])

    identity.defjvp(rule)
    return identity(condition, tree)


def _rows(tree: Prediction) -> jax.Array:
    """The outputs of all leaves taken together, as k numbers per sample: [n, k]."""
    return jnp.concatenate([x.reshape(x.shape[0], -1) for x in jax.tree.leaves(tree)], axis=1)


def _solve_blocks(C: LinearMap, rhs: Prediction) -> Prediction:
    """a_i = C_i^+ rhs_i for every sample i."""
    leaves, structure = jax.tree.flatten(rhs)
    widths = [math.prod(x.shape[1:]) for x in leaves]
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]

    def unflat(rows: jax.Array) -> PyTree:
        parts = jnp.split(rows, ends[:-1], axis=1)
        return jax.tree.unflatten(structure, [p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)])

    rows = _rows(rhs)
    # Column j of every block at once: C applied to the j-th unit vector at each sample. [k, n, k]
    columns = jax.vmap(lambda e: _rows(C(unflat(jnp.broadcast_to(e, rows.shape)))))(jnp.eye(ends[-1], dtype=rows.dtype))
    blocks = jnp.moveaxis(columns, 0, 2)  # [n, k, k]

    def product(x: jax.Array) -> jax.Array:
        return jnp.sum(blocks * x[:, None, :], axis=2)

    # So that the derivative is that of the solution, and not one through eigenvectors.
    return unflat(jax.lax.custom_linear_solve(product, rows, lambda _, y: _solve(blocks, y), symmetric=True))


def _solve(B: jax.Array, y: jax.Array) -> jax.Array:
    """x_i = B_i^+ y_i for symmetric B [n, k, k] and y [n, k]; LAPACK, once per sample, is slow where k is 1 or 2."""
    k, eps = y.shape[1], jnp.finfo(y.dtype).eps
    if k == 1:
        b = B[..., 0]
        return jnp.where(b == 0, 0.0, y / jnp.where(b == 0, 1.0, b))
    if k == 2:
        size = jnp.max(jnp.abs(B), axis=(1, 2))
        size = jnp.where(size == 0, 1.0, size)
        ((p, q), (r, s)), (u, v) = jnp.moveaxis(B / size[:, None, None], 0, 2), (y / size[:, None]).T
        determinant, trace = p * s - q * r, p + s
        singular = (jnp.abs(determinant) <= 8 * eps)[None]  # the largest eigenvalue is between 1 and 2
        by_cramer = jnp.stack([s * u - q * v, p * v - r * u]) / jnp.where(singular, 1.0, determinant[None])
        # B = lambda e e' has the trace lambda and the pseudo-inverse B / lambda^2.
        of_rank_one = jnp.stack([p * u + q * v, r * u + s * v]) / jnp.where(trace == 0, 1.0, trace**2)[None]
        return jnp.where(singular, of_rank_one, by_cramer).T
    eigenvalues, U = jnp.linalg.eigh(B)
    kept = jnp.abs(eigenvalues) > 4 * k * eps * jnp.max(jnp.abs(eigenvalues), axis=1, keepdims=True)
    inverse = jnp.where(kept, 1.0 / jnp.where(kept, eigenvalues, 1.0), 0.0)
    inverse = jnp.where(jnp.isnan(eigenvalues), jnp.nan, inverse)
    return jnp.einsum("nij,nj,nkj,nk->ni", U, inverse, U, y)


def _inconsistent(product: Prediction, rhs: Prediction) -> jax.Array:
    """How many samples' equations are not solved, by the scale of the largest right-hand side; NaN counts."""
    error = jnp.max(jnp.abs(_rows(product) - _rows(rhs)), axis=1)
    return jnp.sum(~(error <= jnp.sqrt(jnp.finfo(error.dtype).eps) * jnp.max(jnp.abs(_rows(rhs)))))
