"""Many runs in one compiled program: on an axis of runs (seeds, divisions of data) and one of cells (settings)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbilevel.tasks._experiment.grid import Callback


def stack(trees: Sequence[Any]) -> Any:
    """Trees of NumPy arrays as one, with a new leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def tiled(hypers: Sequence[Any], num_runs: int) -> Any:
    """The cells' hyper-parameters, the same for every run, [runs, cells]."""
    return jax.tree.map(lambda *values: np.tile(np.array(values, np.float32), (num_runs, 1)), *hypers)


def over(function: Callable[..., Any], in_cells: tuple[int | None, ...]) -> Callable[..., Any]:
    """The function of one cell, compiled for [runs, cells]; `in_cells` are the arguments' axes of cells, if any."""
    return jax.jit(jax.vmap(jax.vmap(function, in_axes=in_cells)))


def in_chunks(
    advance: Callable[[Any, slice], tuple[Any, jax.Array]],
    states: Any,
    num_steps: int,
    callback: Callback | None,
    chunk: int,
) -> Any:
    """The states after all steps, which `advance(states, steps)` makes; the callback sees each chunk's mean values."""
    for start in range(0, num_steps, chunk):
        states, values = jax.block_until_ready(advance(states, slice(start, start + chunk)))
        if callback is not None:
            callback(states, {"outer_objective": np.mean(values, axis=(0, 1))})
    return states


def repeat(step: Callable[[Any, jax.Array], tuple[Any, Any]], state: Any, first: Any, count: Any) -> tuple[Any, Any]:
    """(state, metrics of the last step) of steps `(state, number) -> (state, metrics)`, a traced count of them."""
    shapes = jax.eval_shape(lambda s: step(s, jnp.zeros((), jnp.int32))[1], state)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.fori_loop(first, first + count, lambda i, carry: step(carry[0], i), (state, zeros))
