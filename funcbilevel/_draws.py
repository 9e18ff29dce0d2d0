"""Where samples come from: one batch for everything, a batch for each draw, a sampler, or a finite sum.

An outer step numbers what it draws: 0, 1, ... for each of its two sources. The draw of a plain batch is that batch,
whatever its number; of `Minibatches` the one at that place in the stack; of a `Sampler` a batch from a key folded with
the number; of a `FiniteSum` a block of the data, whose index depends on nothing but the draw's place in the whole run.
So a method says once what it draws ("0: inner gradient, 1: Hessian product, 2: cross derivative"), and every kind of
source serves it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_callable, check_key, check_leading_axis, check_number
from funcbilevel._typing import Batch, Key, PyTree


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FiniteSum:
    """Data on the device in n blocks of b samples, of which each draw is one, with an index that is known.

    Made by `finite_sum`; a pytree, which a jitted function takes as an argument. In place of `inner_batch` or
    `outer_batch`; methods that keep a memory of the sum's terms (`saba`) or pass over all of it (`srba`, `vrbo`) need
    it.

    Attributes:
        data: a pytree of arrays [n, b, ...].
        key: the random key of the order.
        replace: whether each draw is independent, or each epoch of n draws a permutation.
        first: the place in the run of draw number 0; a solver's step sets it.
    """

    data: Any
    key: Key
    replace: bool = dataclasses.field(metadata={"static": True})
    first: Any = 0

    @property
    def num_blocks(self) -> int:
        """n."""
        return jax.tree.leaves(self.data)[0].shape[0]

    def index(self, i: Any) -> jax.Array:
        """The block, an int32 scalar, that draw number i takes."""
        position = jnp.asarray(self.first + i)
        if self.replace:
            return jax.random.randint(jax.random.fold_in(self.key, position), (), 0, self.num_blocks)
        epoch, place = jnp.divmod(position, self.num_blocks)
        return jax.random.permutation(jax.random.fold_in(self.key, epoch), self.num_blocks)[place]

    def block(self, index: Any) -> Batch:
        """The samples of one block, leaves [b, ...]."""
        return jax.tree.map(lambda x: x[index], self.data)

    def mean(self, f: Any) -> PyTree:
        """The mean of f(block) over all blocks, one block after the other."""
        shapes = jax.eval_shape(lambda: f(self.block(0)))
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(lambda t, block: (jax.tree.map(jnp.add, t, f(block)), None), zero, self.data)
        return jax.tree.map(lambda x: x / self.num_blocks, total)


Source: TypeAlias = "Batch | Minibatches | Sampler | FiniteSum"


def finite_sum(data: Batch, batch_size: int, *, key: Key | None = None, replace: bool = False) -> FiniteSum:
    """Data on the device as the sum over its blocks of `batch_size` consecutive samples.

    Draws go through the blocks in shuffled epochs, or pick them with replacement. The order depends on `key` alone, and
    not on the solver's, so that solvers can be compared on the same draws. Each seed of a vmapped solver needs a key of
    its own for draws of its own: `dataclasses.replace(source, key=keys)`, with `in_axes` that say so.

    Where the samples stand in an order of their own (sorted by label), shuffle them once before: blocks do not change.

    Arguments:
        data: a pytree of arrays with a leading axis of N samples.
        batch_size: b, which divides N. The published finite-sum methods have b = 1.
        key: decides the order; None: `jax.random.key(0)`.
        replace: False: shuffled epochs (each block once in n draws, in an order of its own in each epoch); True:
            independent draws.

    Returns:
        A `FiniteSum` of n = N / b blocks.

    Raises:
        ValueError: `batch_size` does not divide N; leaves have different leading axes.
        TypeError: `batch_size` is not an int.

    Example:
        >>> import jax.numpy as jnp, funcbilevel as fb
        >>> source = fb.finite_sum((jnp.zeros((12, 5)), jnp.arange(12)), batch_size=3)
        >>> source.num_blocks, sorted(int(source.index(i)) for i in range(4))
        (4, [0, 1, 2, 3])
        >>> source.block(1)[1]
        Array([3, 4, 5], dtype=int32)
    """
    name = "finite_sum"
    check_number(name, "batch_size", batch_size)
    size = check_leading_axis(name, "samples", data=data)
    if size % batch_size:
        raise ValueError(
            f"{name}: batch_size must divide the number of samples, got batch_size={batch_size} for {size}; drop "
            f"{size % batch_size} samples, or choose another batch_size."
        )
    key = jax.random.key(0) if key is None else key
    check_key(name, key)
    blocks = jax.tree.map(lambda x: jnp.reshape(jnp.asarray(x), (-1, batch_size, *x.shape[1:])), data)
    return FiniteSum(blocks, key, replace)


def placed(source: Source, first: Any) -> Source:
    """The source with its draw number 0 at place `first` of the run; of a `FiniteSum` alone that makes a difference."""
    return dataclasses.replace(source, first=first) if isinstance(source, FiniteSum) else source


def draw(function: str, source: Source, key: Key | None, i: Any, name: str = "inner_batch") -> Batch:
    """The i-th batch of `source`; of `bilevel`'s, number `inner_steps` is that of the hypergradient.

    `key` is the same for all i. A plain batch is every draw's; of stacked ones the last serves all that come after it.
    """
    if isinstance(source, Minibatches):
        size = check_leading_axis(function, "draws", **{f"{name}.batches": source.batches})
        at = jnp.minimum(i, size - 1)
        return jax.tree.map(lambda x: x[at], source.batches)
    if isinstance(source, Sampler):
        check_callable(function, "Sampler.sample", source.sample)
        if key is None:
            raise ValueError(
                f"{function}: key is None, but {name} is an fb.Sampler, which draws by it; pass "
                "key=jax.random.key(seed)."
            )
        return source.sample(jax.random.fold_in(key, i))
    return source.block(source.index(i)) if isinstance(source, FiniteSum) else source


def check_draws(function: str, source: Batch | Minibatches | Sampler, inner_steps: int) -> None:
    """That stacked batches are as many as the draws, or one fewer."""
    if isinstance(source, Minibatches):
        size = check_leading_axis(function, "draws", inner_batches=source.batches)
        if size not in (inner_steps, inner_steps + 1):
            raise ValueError(
                f"{function}: inner_batch is fb.Minibatches of {size} batches, expected inner_steps={inner_steps} (one "
                f"for each inner step) or {inner_steps + 1} (and one for the hypergradient); stack that many."
            )


def run_steps(
    step: Callable[[Any, Any, Any], tuple[Any, Any]], state: Any, inner: Any, outer: Any, num_steps: int | None
) -> tuple[Any, Any]:
    """One scan of steps over the leading axis of the batches; a `Sampler` or a `FiniteSum` is one for all."""

    def moving(source: Any) -> Any:
        return jax.tree.map(lambda x: None if _is_source(x) else x, source, is_leaf=_is_source)

    batches = {"inner_batches": moving(inner), "outer_batches": moving(outer)}
    if jax.tree.leaves(batches) or not any(map(_is_source, jax.tree.leaves((inner, outer), is_leaf=_is_source))):
        check_leading_axis("run", "outer steps", **batches)
    elif num_steps is None:
        raise ValueError(
            "run: num_steps is None, but the sources give samples for any number of outer steps; pass "
            "num_steps=<how many>."
        )

    def one(state: Any, now: dict[str, Any]) -> tuple[Any, Any]:
        def at(source: Any, batch: Any) -> Any:
            return jax.tree.map(lambda s, x: s if _is_source(s) else x, source, batch, is_leaf=_is_source)

        return step(state, at(inner, now["inner_batches"]), at(outer, now["outer_batches"]))

    return jax.lax.scan(one, state, batches, length=num_steps)


def _is_source(x: Any) -> bool:
    return isinstance(x, (Sampler, FiniteSum))
