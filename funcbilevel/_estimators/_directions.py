"""What the zeroth-order methods share: averages over random directions of the outer variable."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from funcbilevel._tree import tree_add_scaled
from funcbilevel._typing import Key, OuterParams


def mean_over_directions(
    function: str, slope: Callable[[OuterParams], jax.Array], key: Key | None, omega: OuterParams, num_directions: int
) -> OuterParams:
    """The mean of slope(u) u over standard normal directions u like omega, one after the other."""
    if key is None:
        raise ValueError(f"{function}: key is None, but directions are drawn by it; pass key=jax.random.key(seed).")
    leaves, structure = jax.tree.flatten(omega)
    zero = jax.tree.map(jnp.zeros_like, omega)

    def add(total: OuterParams, key: Key) -> tuple[OuterParams, None]:
        keys = jax.random.split(key, len(leaves))
        u = jax.tree.unflatten(structure, [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)])
        return tree_add_scaled(total, slope(u) / num_directions, u), None

    return jax.lax.scan(add, zero, jax.random.split(key, num_directions))[0]
