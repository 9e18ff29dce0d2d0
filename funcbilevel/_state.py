"""States of solvers as plain NumPy arrays, for any file format."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from funcbilevel._typing import PyTree

Arrays: TypeAlias = dict[str, np.ndarray[Any, Any]]


def state_to_arrays(state: PyTree) -> Arrays:
    """A state as a flat dict of NumPy arrays, which every file format takes.

    A path such as `outer_params/w` names each array. Typed PRNG keys become their key data; types that NumPy does not
    know, such as bfloat16, become unsigned integers with the same bits, since `np.savez` would forget the type.

    Arguments:
        state: a `BilevelState`, over seeds too, or any other pytree of arrays, numbers and keys. Where arrays lie on
            devices of several processes, all of these have to call it.

    Returns:
        path -> array.

    Raises:
        TypeError: a leaf is not an array or a number.
        ValueError: two leaves have the same path.

    Example: a run that goes on from a file, bit by bit as if it had not been interrupted.
        >>> np.savez("run.npz", **fb.state_to_arrays(state))  # doctest: +SKIP
        >>> start = solver.init(key, outer_params, inner_batch)  # doctest: +SKIP
        >>> state = fb.state_from_arrays(np.load("run.npz"), start)  # doctest: +SKIP

        The dict goes into `flax.serialization.to_bytes`, `orbax.checkpoint.StandardCheckpointer().save` and
        `pickle.dump` as well. Its entries:

        >>> fb.state_to_arrays({"w": jnp.ones(2), "key": jax.random.key(7)})
        {'key': array([0, 7], dtype=uint32), 'w': array([1., 1.], dtype=float32)}
    """
    arrays: Arrays = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = leaf_name(path)
        if name in arrays:
            raise ValueError(f"state_to_arrays: two leaves of state have the path {name!r}; rename one of them.")
        array = on_host(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == np.bool_):
            raise TypeError(
                f"state_to_arrays: state must hold arrays, numbers and keys, got {type(leaf).__name__} at {name!r}; "
                "take it out, and save it beside the arrays."
            )
        arrays[name] = np.array(array.view(stored_dtype(array.dtype)))
    return arrays


def state_from_arrays(arrays: Mapping[str, Any], like: PyTree) -> PyTree:
    """The inverse of `state_to_arrays`.

    Arguments:
        arrays: path -> array; also what `np.load` gives of an npz file.
        like: a state of the same solver, such as `solver.init(...)` or `jax.eval_shape` of it: structure, shapes,
            dtypes and kinds of keys are taken from it, and the devices over which its arrays are divided.

    Returns:
        A state with the structure of `like` and the values of `arrays`.

    Raises:
        ValueError: an array is missing, or has no place in `like`, or has another shape.
        TypeError: an array has another dtype.

    Example:
        >>> like = {"w": jnp.zeros(2), "key": jax.random.key(0)}
        >>> arrays = {"w": np.ones(2, np.float32), "key": np.array([0, 7], np.uint32)}
        >>> fb.state_from_arrays(arrays, like)["key"] == jax.random.key(7)
        Array(True, dtype=bool)
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [leaf_name(path) for path, _ in leaves]
    missing, extra = sorted(set(names) - set(arrays)), sorted(set(arrays) - set(names))
    if missing or extra:
        raise ValueError(
            f"state_from_arrays: arrays must be those of a state like `like`, got {_list(missing)} missing and "
            f"{_list(extra)} too many; they belong to another solver, model or optimizer, or to another version of it."
        )
    restored = [_restored(name, np.asarray(arrays[name]), leaf) for name, (_, leaf) in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(structure, restored)


def _restored(name: str, array: np.ndarray[Any, Any], leaf: Any) -> Any:
    shapes = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    shape, dtype = np.shape(shapes), shapes.dtype if hasattr(shapes, "dtype") else np.asarray(shapes).dtype
    if array.shape != shape:
        raise ValueError(
            f"state_from_arrays: arrays[{name!r}] must have shape {shape}, got {array.shape}; it belongs to another "
            "solver, number of seeds, model, or kind of key."
        )
    if array.dtype not in (dtype, stored_dtype(dtype)):
        raise TypeError(
            f"state_from_arrays: arrays[{name!r}] must have dtype {stored_dtype(dtype)}"
            f"{'' if stored_dtype(dtype) == dtype else f' (the bits of {dtype})'}, got {array.dtype}; it belongs to a "
            "run with another precision."
        )
    array = array.view(dtype)
    if isinstance(leaf, np.ndarray):
        return array.copy()
    if not hasattr(leaf, "dtype"):  # a number of Python's
        return array.item()
    value = with_kind_of(leaf, jnp.asarray(array))
    sharding = getattr(leaf, "sharding", None)
    return value if sharding is None or len(sharding.device_set) == 1 else jax.device_put(value, sharding)


def with_kind_of(leaf: Any, array: jax.Array) -> jax.Array:
    """A typed key made of its data, if the leaf is one; else the array."""
    return jax.random.wrap_key_data(array, impl=_implementation(leaf)) if is_key(leaf) else array


def spans_processes(x: Any) -> bool:
    """Whether this process holds a part of an array only."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def on_host(x: Any) -> Any:
    """As a NumPy array, whole on each process; all of them have to ask for it."""
    if spans_processes(x) and not x.is_fully_replicated:
        from jax.experimental import multihost_utils  # noqa: PLC0415 (not without several processes)

        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def leaf_name(path: tuple[Any, ...]) -> str:
    """'a/0/b', in which '/' within a name is '~1' and '~' is '~0', as in JSON pointers."""
    parts = (jax.tree_util.keystr((key,), simple=True) for key in path)
    return "/".join(part.replace("~", "~0").replace("/", "~1") for part in parts)


def is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _implementation(leaf: Any) -> Any:
    """The kind of a key, or of the shape of one."""
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def stored_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype itself if it is NumPy's own, and unsigned integers of that size if not."""
    dtype = np.dtype(dtype)
    return dtype if dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}")


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return "none" if not names else shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
