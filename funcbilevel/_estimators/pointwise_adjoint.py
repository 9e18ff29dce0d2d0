"""The adjoint of FuncID as one free value per sample."""

import math

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_like
from funcbilevel._described import described
from funcbilevel._estimator import Adjoint, AdjointSystem, no_state
from funcbilevel._fit import FitState
from funcbilevel._linear_solvers import linear_metrics
from funcbilevel._model import Model
from funcbilevel._typing import Key, LinearMap, Metrics, Prediction, PyTree


@described
def pointwise_adjoint() -> Adjoint:
    r"""One unrestricted value per sample: :math:`a_i = -C_i^{-1} d_i`, with C_i the k-by-k block of C at sample i.

    For batches that hold the same inputs in the same order, and an inner objective that is a mean of terms of one
    sample each (C is then block diagonal; if it is not, `linear_residual` shows it).

    Exact for the unrestricted empirical problem. As an estimate of the population's hypergradient it is unbiased
    where, given the input, d and the cross derivative are independent (model-based reinforcement learning), and
    **biased where they are not (instrumental variables)**: there it answers another question, in which the
    confounding comes back; use `linear_adjoint` or `learned_adjoint`.

    Returns:
        An `Adjoint` for `funcid`. Its metrics: `linear_residual`, `linear_converged`, `linear_curvature` of C a = -d,
        and `adjoint_inputs_match`, whether the two batches did hold the same inputs.

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
        shapes_P, shapes_Q = jax.eval_shape(lambda: (x_P, x_Q))
        mend = (
            "both batches must hold the same inputs in the same order. For inputs that differ use fb.linear_adjoint or "
            "fb.learned_adjoint."
        )
        check_like("pointwise_adjoint", "inputs of outer_batch", shapes_Q, shapes_P, mend)
        rhs = jax.tree.map(jnp.negative, d)
        a_P = _solve_blocks(C, rhs)
        same = [jnp.array_equal(p, q) for p, q in zip(jax.tree.leaves(x_P), jax.tree.leaves(x_Q), strict=True)]
        metrics = linear_metrics(C, rhs, a_P) | {"adjoint_inputs_match": jnp.all(jnp.stack(same))}
        return a_P, state, metrics

    return Adjoint(no_state, fit)


def _solve_blocks(C: LinearMap, rhs: Prediction) -> Prediction:
    """a_i = C_i^-1 rhs_i for every sample i, the outputs of all leaves taken together as k numbers."""
    leaves, structure = jax.tree.flatten(rhs)
    widths = [math.prod(x.shape[1:]) for x in leaves]
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]

    def flat(tree: PyTree) -> jax.Array:  # [n, k]
        return jnp.concatenate([x.reshape(x.shape[0], -1) for x in jax.tree.leaves(tree)], axis=1)

    def unflat(rows: jax.Array) -> PyTree:
        parts = jnp.split(rows, ends[:-1], axis=1)
        return jax.tree.unflatten(structure, [p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)])

    rows = flat(rhs)
    # Column j of every block at once: C applied to the j-th unit vector at each sample. [k, n, k]
    columns = jax.vmap(lambda e: flat(C(unflat(jnp.broadcast_to(e, rows.shape)))))(jnp.eye(ends[-1], dtype=rows.dtype))
    blocks = jnp.moveaxis(columns, 0, 2)  # [n, k, k]
    return unflat(_solve(blocks, rows))


def _solve(B: jax.Array, y: jax.Array) -> jax.Array:
    """x_i = B_i^-1 y_i for B [n, k, k] and y [n, k]; LAPACK, called once per sample, is slow where k is 1 or 2."""
    if y.shape[1] == 1:
        return y / B[..., 0]
    if y.shape[1] == 2:
        ((p, q), (r, s)), (u, v) = jnp.moveaxis(B, 0, 2), y.T  # Cramer's rule
        return jnp.stack([s * u - q * v, p * v - r * u], axis=1) / (p * s - q * r)[:, None]
    return jnp.linalg.solve(B, y[..., None])[..., 0]
