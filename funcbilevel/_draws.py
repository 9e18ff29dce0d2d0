"""Where samples come from: one batch for everything, a batch for each draw, or a sampler."""

from typing import Any, NamedTuple

import jax

from funcbilevel._arguments import check_callable, check_leading_axis
from funcbilevel._typing import Batch, Key


class Minibatches(NamedTuple):
    """Several inner batches for one outer step, in place of `inner_batch`: inner step i gets the i-th.

    Attributes:
        batches: a pytree of arrays with a leading axis of S, the batches stacked. S is the solver's `inner_steps` M, or
            M + 1. What comes after the inner steps (curvature, adjoint and cross derivative) sees the last one: that of
            the last inner step, or a fresh one.

    A NamedTuple, and so a pytree: `solver.run` and `fb.train` take it with an axis of outer steps before the others.

    Example: 10 inner steps, each on 32 samples of its own, and 32 fresh ones for the hypergradient.
        >>> batches = fb.Minibatches((jnp.zeros((11, 32, 5)), jnp.zeros((11, 32))))
    """

    batches: Any


class Sampler(NamedTuple):
    """A source of inner batches, in place of `inner_batch`: every draw calls it with a key of its own.

    Each inner step draws once, and what comes after them (curvature, adjoint, cross derivative) draws one batch more.
    The keys derive from the solver's, so that a run can be repeated.

    Attributes:
        sample: the pure function `key -> batch`, as a `jax.tree_util.Partial`, which binds the arrays that it draws
            from, and which a compiled program takes as an argument.

    Example: 32 of 1,000 samples, with replacement.
        >>> def sample(x, y, key):
        ...     rows = jax.random.randint(key, (32,), 0, len(x))
        ...     return x[rows], y[rows]
        >>> source = fb.Sampler(jax.tree_util.Partial(sample, jnp.zeros((1000, 5)), jnp.zeros(1000)))
    """

    sample: Any


def draw(
    function: str, source: Batch | Minibatches | Sampler, key: Key | None, i: Any, inner_steps: int | None = None
) -> Batch:
    """The i-th batch of `source`: number `inner_steps` is that of the hypergradient.

    `key` is the same for all i. A plain batch is every draw's; of stacked ones the last serves all that come after it.
    With `inner_steps`, stacked batches must be as many as the draws, or one fewer.
    """
    if isinstance(source, Minibatches):
        size = check_leading_axis(function, "draws", inner_batches=source.batches)
        if inner_steps is not None and size not in (inner_steps, inner_steps + 1):
            raise ValueError(
                f"{function}: inner_batch is fb.Minibatches of {size} batches, expected inner_steps={inner_steps} (one "
                f"for each inner step) or {inner_steps + 1} (and one for the hypergradient); stack that many."
            )
        at = jax.numpy.minimum(i, size - 1)
        return jax.tree.map(lambda x: x[at], source.batches)
    if isinstance(source, Sampler):
        check_callable(function, "Sampler.sample", source.sample)
        if key is None:
            raise ValueError(
                f"{function}: key is None, but inner_batch is an fb.Sampler, which draws by it; pass "
                "key=jax.random.key(seed)."
            )
        return source.sample(jax.random.fold_in(key, i))
    return source
