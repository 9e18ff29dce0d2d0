"""Small functions on pytrees of arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from funcbilevel._typing import Metrics, PyTree


def tree_vdot(a: PyTree, b: PyTree) -> jax.Array:
    """<a, b>, summed over all leaves, in float32 at least: in half precision the squares of small numbers are zero."""

    # Not `vdot`, whose contraction JAX refuses over an axis that is sharded explicitly.
    def vdot(x: jax.Array, y: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
        return jnp.sum(x.astype(dtype) * y.astype(dtype))

    return _last(jax.lax.cumsum, jnp.stack(jax.tree.leaves(jax.tree.map(vdot, a, b))))


def _last(cumulative: Callable[[jax.Array], jax.Array], scalars: jax.Array) -> jax.Array:
    """The last of the cumulative sums, or maxima, of a vector.

    A sum of as many scalars as a network has leaves, or a reduction of them, is to XLA a chain of additions, and it
    compiles a copy of a chain into everything that uses the result: three quarters of the program of a deep network.
    """
    return cumulative(scalars)[-1]


def moments(phi: jax.Array, t: jax.Array) -> jax.Array:
    """phi' t, [p, ...], on every device: over samples that are sharded explicitly, JAX wants to be told so."""
    mesh = jax.typeof(phi).sharding.mesh
    replicated: dict[str, Any] = {"out_sharding": NamedSharding(mesh, PartitionSpec())} if mesh.explicit_axes else {}
    return jnp.tensordot(phi, t, (0, 0), **replicated)


def tree_norm(tree: PyTree) -> jax.Array:
    """Euclidean norm of all leaves together, in float32 at least."""
    return jnp.sqrt(tree_vdot(tree, tree))


def working_dtype(tree: PyTree) -> Any:
    """The dtype that holds all leaves, float32 at least: in which to compute with vectors like `tree`."""
    return jnp.result_type(jnp.float32, *(jnp.result_type(x) for x in jax.tree.leaves(tree)))


def tree_cast(tree: PyTree, dtypes: Any) -> PyTree:
    """All leaves in one dtype; or each in that of the same leaf of a tree."""
    if isinstance(dtypes, jnp.dtype):
        return jax.tree.map(lambda x: x.astype(dtypes), tree)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, dtypes)


def tree_size(tree: PyTree) -> jax.Array:
    """A power of two near the largest absolute value: tree / size neither over- nor underflows when it is squared.

    A scalar; 1 if all is zero or not all finite. Held fixed by differentiation.
    """
    dtype = working_dtype(tree)
    sizes = [jnp.max(jnp.abs(x)).astype(dtype) for x in jax.tree.leaves(tree) if x.size]
    if not sizes:
        return jnp.ones((), dtype)
    limit = 2.0 ** (int(jnp.finfo(dtype).maxexp) - 28)  # size and 1 / size are normal numbers
    largest = jax.lax.stop_gradient(jnp.stack(sizes))
    bits, mantissa = (jnp.uint32, 23) if dtype == jnp.float32 else (jnp.uint64, 52)
    exponent = jax.lax.bitcast_convert_type(jnp.clip(largest, 1.0 / limit, limit), bits) >> mantissa << mantissa
    powers = jnp.where(largest > 0, jax.lax.bitcast_convert_type(exponent, dtype), 0.0)
    # The maximum comes last, so that little is left for XLA to copy into every use; see `_last`.
    size = _last(jax.lax.cummax, jnp.where(jnp.isfinite(largest), powers, jnp.inf))
    return jnp.where(jnp.isfinite(size) & (size > 0), size, 1.0)


def tree_scaled(tree: PyTree, scale: jax.Array) -> PyTree:
    """tree * scale."""
    # Of two such products XLA would multiply known factors with one another first, and those under- and overflow.
    return jax.lax.optimization_barrier(jax.tree.map(lambda x: x * scale.astype(x.dtype), tree))


def tree_add_scaled(a: PyTree, scale: Any, b: PyTree) -> PyTree:
    """a + scale * b, in the dtypes of a."""
    return jax.tree.map(lambda x, y: x + jnp.asarray(scale, x.dtype) * y, a, b)


def tree_where(condition: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """a if condition (a scalar) else b, leaf by leaf."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def num_bytes(tree: PyTree) -> int:
    """Size of all leaves together."""
    return sum(jnp.size(x) * jnp.result_type(x).itemsize for x in jax.tree.leaves(tree))


def evaluated_after(earlier: PyTree, tree: PyTree) -> PyTree:
    """`tree`, but what is made of it comes after `earlier` in the compiled program; zeros where that is not finite.

    For the sake of memory. `jax.lax.optimization_barrier` has that purpose, but XLA drops it on CPUs before it puts
    the program in order; a condition stays.
    """
    finite = all_finite([x.ravel()[:1] for x in jax.tree.leaves(earlier)])
    return jax.lax.cond(finite, lambda t: t, lambda t: jax.tree.map(jnp.zeros_like, t), tree)


def own_buffer(x: Any) -> Any:
    """x in a buffer of its own, lest a donating step meets it twice; without weak type, lest it compiles twice."""
    return jnp.copy(jax.lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", False) else x)


def all_finite(*trees: PyTree) -> jax.Array:
    """Scalar bool: no floating leaf holds NaN or inf."""
    leaves = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])) if leaves else jnp.array(True)


def stays_finite(before: PyTree, after: PyTree) -> jax.Array:
    """Scalar bool: what was finite before still is. (An optimizer's state may start with inf.)"""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return all_finite([jnp.where(jnp.isfinite(x), y, 0) for x, y in pairs if jnp.issubdtype(x.dtype, jnp.inexact)])


METRICS = (
    *("inner_objective", "outer_objective", "hypergradient_norm", "explicit_norm", "implicit_norm"),
    *("inner_finite", "adjoint_finite", "outer_finite", "inner_gradient_norm", "inner_gradient_relative"),
    *("linear_residual", "linear_converged", "linear_curvature", "active_set_size", "strict_complementarity"),
    *("adjoint_objective", "adjoint_inputs_match", "adjoint_inconsistent", "penalty_objective"),
    *("newton_residual", "newton_objective"),
)


def scalar_metrics(level: str, aux: PyTree) -> Metrics:
    """Flattens aux to `level/path` -> scalar; a leaf with several elements is reported by its mean."""

    def scalar(name: str, x: Any) -> jax.Array:
        try:
            x = jnp.asarray(x)
        except TypeError as error:
            raise TypeError(
                f"{level}_objective: aux must hold numbers or arrays, got {type(x).__name__} at {name!r}; drop it."
            ) from error
        return x if x.ndim == 0 else jnp.mean(x)

    leaves = [(path_name(path) or "aux", x) for path, x in jax.tree_util.tree_flatten_with_path(aux)[0]]
    names = [name for name, _ in leaves]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{level}_objective: two entries of aux have the name {name!r} once their keys are joined by '/'; "
                "rename one of them."
            )
        if name in METRICS:
            raise ValueError(
                f"{level}_objective: aux holds {name!r}, the name of one of the solver's own metrics; rename it."
            )
    return {f"{level}/{name}": scalar(name, x) for name, x in leaves}


def path_name(path: tuple[Any, ...]) -> str:
    """'a/0/b' for the key path of a leaf; empty for a tree that is a single leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def at_path(path: tuple[Any, ...]) -> str:
    """`['a/0/b']`, to stand behind the name of the pytree in a message; empty for a tree that is a single leaf."""
    return f"['{name}']" if (name := path_name(path)) else ""
