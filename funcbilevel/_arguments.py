"""Plain checks of single arguments: numbers, callables, optimizers, pytrees of floats."""

import inspect
import math
import numbers
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from funcbilevel._described import show
from funcbilevel._tree import at_path
from funcbilevel._typing import PyTree

# Numbers.


def check_number(function: str, name: str, value: Any, low: int = 1) -> None:
    """An int of at least `low`: a number of steps is part of the compiled program."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{function}: {name} must be a Python int, got {value!r} of type {type(value).__name__}.")
    if value < low:
        raise ValueError(f"{function}: {name} must be at least {low}, got {value}.")


def check_at_least(function: str, name: str, value: Any, low: float) -> None:
    """A finite number >= `low`; a traced value passes unseen."""
    _check_range(function, name, value, f">= {low:g}", lambda x: x >= low)


def check_positive(function: str, name: str, value: Any) -> None:
    """A finite number > 0; a traced value passes unseen."""
    _check_range(function, name, value, "> 0", lambda x: x > 0)


def _check_range(function: str, name: str, value: Any, expected: str, holds: Callable[[float], bool]) -> None:
    if isinstance(value, Tracer):
        return
    is_number = isinstance(value, numbers.Real) or (hasattr(value, "dtype") and np.shape(value) == ())
    if isinstance(value, bool) or not is_number:
        raise TypeError(f"{function}: {name} must be a number {expected}, got {value!r}.")
    if not (math.isfinite(value) and holds(float(value))):
        raise ValueError(f"{function}: {name} must be a finite number {expected}, got {value!r}.")


def check_correction(function: str, correction: Any) -> bool:
    """Whether there is a correction at all: a finite number >= 0, that is not 0."""
    check_at_least(function, "correction", correction, 0.0)
    return isinstance(correction, Tracer) or float(correction) != 0.0


# Functions and optimizers.


def check_callable(function: str, name: str, value: Any, arguments: str = "", keywords: tuple[str, ...] = ()) -> None:
    """That it is callable and, as far as its signature tells, with the positional `arguments` ("path, leaf")."""
    if not callable(value):
        raise TypeError(f"{function}: {name} must be callable, got {type(value).__name__}.")
    if not arguments or (signature := signature_of(value)) is None:
        return
    positional = arguments.split(", ")
    try:
        signature.bind(*positional, **dict.fromkeys(keywords))
    except TypeError as error:
        count = f"{len(positional)} argument{'s' * (len(positional) > 1)} ({arguments})"
        by_name = f" and the keyword arguments {' and '.join(keywords)}" if keywords else ""
        raise TypeError(
            f"{function}: {name} must take {count}{by_name}, got {show(value)}({', '.join(signature.parameters)}) "
            f"({error}); change its parameters, or wrap it in a lambda."
        ) from error


def signature_of(function: Any) -> inspect.Signature | None:
    """How it can be called, if that is known.

    JAX's wrappers (`jit`, `vmap`, `custom_vjp`, ...) take what the wrapped function takes. Others may not, whatever
    `functools.wraps` says of them.
    """
    module = getattr(function, "__globals__", {}).get("__name__", "jax")
    try:
        return inspect.signature(function, follow_wrapped=module.partition(".")[0] in ("jax", "flax", "optax"))
    except (TypeError, ValueError):
        return None


def check_optimizer(function: str, name: str, optimizer: Any) -> None:
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        raise TypeError(
            f"{function}: {name} must be an optax.GradientTransformation, got {_shown(optimizer)}; "
            "call the optimizer's factory, for example optax.adam(1e-3)."
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 and "\n" not in text else f"an object of type {type(value).__name__}"


# Random keys.


def check_key(function: str, key: Any, outer_params: PyTree = None) -> None:
    """One random key, of the new style or the old."""
    if _is_key(key) and np.shape(key) == (() if _is_typed_key(key) else np.shape(key)[-1:]):
        return
    if key is None:
        raise TypeError(f"{function}: key is None, but random numbers are drawn; pass jax.random.key(0), for example.")
    if any(_is_key(leaf) for leaf in jax.tree.leaves(outer_params)):
        raise TypeError(
            f"{function}: key must be a random key, got {show(key)}, and outer_params holds one: the two are swapped; "
            "the order is key, outer_params, inner_batch."
        )
    if _is_key(key):
        raise TypeError(
            f"{function}: key must be one random key, got several, {show(key)}; use jax.vmap to run over seeds."
        )
    raise TypeError(
        f"{function}: key must be a random key, got {show(key)} of type {type(key).__name__}; make one from a seed, "
        "for example jax.random.key(0)."
    )


def _is_typed_key(x: Any) -> bool:
    return jnp.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.prng_key)


def _is_key(x: Any) -> bool:
    raw = getattr(x, "dtype", None) == np.uint32 and np.shape(x)[-1:] in ((2,), (4,))  # of jax.random.PRNGKey
    return _is_typed_key(x) or raw


# Pytrees.


def as_float_tree(function: str, name: str, tree: PyTree) -> PyTree:
    """`tree` as JAX arrays without weak types, so that a compiled step sees the same types for ever."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    if not leaves:
        raise ValueError(f"{function}: {name} is an empty pytree ({tree!r}); it must hold at least one array.")
    arrays = [_as_float_array(function, f"{name}{at_path(path)}", leaf) for path, leaf in leaves]
    return jax.tree.unflatten(structure, arrays)


def _as_float_array(function: str, name: str, leaf: Any) -> jax.Array:
    if _is_typed_key(leaf):
        raise TypeError(f"{function}: {name} must be an array of floats, got a random key; pass keys as such.")
    try:
        array = jnp.asarray(leaf)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{function}: {name} must be an array of floats, got {type(leaf).__name__}.") from error
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(
            f"{function}: {name} must be an array of floats, got dtype {array.dtype}; keep its real and its "
            "imaginary part as two leaves and combine them in the objectives, by jax.lax.complex(re, im): the "
            "gradients by both are exact."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{function}: {name} must be floating-point, got dtype {array.dtype}; it is optimised by gradients. "
            "Convert it, for example with jnp.asarray(x, jnp.float32), or close over it in the objectives."
        )
    return jax.lax.convert_element_type(array, array.dtype)  # drops the weak type


def check_leading_axis(function: str, axis: str, **batches: PyTree) -> int:
    """The size of the common leading axis of every leaf, which stands for `axis` ("outer steps")."""
    sizes: dict[str, int] = {}
    for name, tree in batches.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            if np.ndim(leaf) == 0:
                raise ValueError(
                    f"{function}: {name}{at_path(path)} is a scalar, expected a leading axis of {axis}; stack one "
                    "batch for each."
                )
            sizes[f"{name}{at_path(path)}"] = np.shape(leaf)[0]
    if not sizes:
        raise ValueError(
            f"{function}: {', '.join(batches)} hold no arrays; stack batches along a leading axis of {axis}."
        )
    if len(set(sizes.values())) != 1:
        raise ValueError(
            f"{function}: all leaves of {' and '.join(batches)} must have the same leading axis ({axis}), got {sizes}."
        )
    return next(iter(sizes.values()))


def check_shapes(
    function: str, name: str, got: PyTree, expected: PyTree, mend: str, free: Collection[int] = ()
) -> None:
    """Same structure and shapes; an expected axis of a length in `free` may have another."""
    if jax.tree.structure(got) != jax.tree.structure(expected):
        raise ValueError(f"{function}: {name} must be like {show(expected)}, got {show(got)}; {mend}")
    pairs = zip(jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(expected), strict=True)
    for (path, x), y in pairs:
        shape = np.shape(x)
        if len(shape) != len(y.shape) or any(a not in (b, *free) and b not in free for a, b in zip(shape, y.shape)):
            raise ValueError(f"{function}: {name}{at_path(path)} must have shape {y.shape}, got {shape}; {mend}")


def check_like(function: str, name: str, got: PyTree, expected: PyTree, mend: str) -> None:
    """Same structure, shapes and dtypes; `got` and `expected` hold arrays or shapes."""
    if jax.tree.structure(got) != jax.tree.structure(expected):
        raise ValueError(
            f"{function}: {name} has tree structure {jax.tree.structure(got)}, expected "
            f"{jax.tree.structure(expected)}; {mend}"
        )
    pairs = zip(jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(expected), strict=True)
    for (path, x), y in pairs:
        if x.shape != y.shape:
            raise ValueError(f"{function}: {name}{at_path(path)} has shape {x.shape}, expected {y.shape}; {mend}")
        if x.dtype != y.dtype:
            raise TypeError(f"{function}: {name}{at_path(path)} has dtype {x.dtype}, expected {y.dtype}; {mend}")
