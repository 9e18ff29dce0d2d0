"""Small functions on pytrees of arrays."""

import operator
from typing import Any

import jax
import jax.numpy as jnp

from funcbilevel._typing import Metrics, PyTree


def tree_vdot(a: PyTree, b: PyTree) -> jax.Array:
    """<a, b>, summed over all leaves."""
    return jax.tree.reduce(operator.add, jax.tree.map(jnp.vdot, a, b))


def tree_norm(tree: PyTree) -> jax.Array:
    """Euclidean norm of all leaves together."""
    return jnp.sqrt(tree_vdot(tree, tree))


def tree_add_scaled(a: PyTree, scale: Any, b: PyTree) -> PyTree:
    """a + scale * b, in the dtypes of a."""
    return jax.tree.map(lambda x, y: x + jnp.asarray(scale, x.dtype) * y, a, b)


def tree_where(condition: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """a if condition (a scalar) else b, leaf by leaf."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def all_finite(*trees: PyTree) -> jax.Array:
    """Scalar bool: no floating leaf holds NaN or inf."""
    leaves = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])) if leaves else jnp.array(True)


def scalar_metrics(level: str, aux: PyTree) -> Metrics:
    """Flattens aux to `level/path` -> scalar; a leaf with several elements is reported by its mean."""

    def scalar(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        return x if x.ndim == 0 else jnp.mean(x)

    leaves, _ = jax.tree_util.tree_flatten_with_path(aux)
    return {f"{level}/{path_name(path) or 'aux'}": scalar(x) for path, x in leaves}


def path_name(path: tuple[Any, ...]) -> str:
    """'a/0/b' for the key path of a leaf; empty for a tree that is a single leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
