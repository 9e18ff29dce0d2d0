"""Batches that do not fit: a model, or an objective, that goes through its samples part by part."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbilevel._arguments import check_callable, check_number
from funcbilevel._check import check_is_model, is_sparse, num_rows
from funcbilevel._described import described
from funcbilevel._model import Model
from funcbilevel._tree import at_path
from funcbilevel._typing import Inputs, Key, ModelState, Prediction, PyTree


@described
def microbatched(model: Model, size: int) -> Model:
    r"""The same model, which goes through at most `size` samples at a time and keeps the activations of none.

    Gradient accumulation for all levels of a `FunctionalProblem` at once: the inner fit, a learned adjoint, the cross
    derivative and Hessian products see the model through its predictions alone, which are small and stay whole. The
    backward pass computes the activations of each part anew (rematerialisation): about 4/3 of the operations of a
    training step, and the memory of `size` samples.

    Values and derivatives are those of the whole batch. Batch statistics, with `train=True`, are those of the parts,
    one after the other, and dropout draws anew for each. Objectives may be any function of the whole prediction: a
    contrastive or ranking loss stays what it is.

    Arguments:
        model: any `Model`; every leaf of its inputs has samples in front.
        size: samples in a part, >= 1. Where it does not divide the batch, what is left is a part of its own, and the
            program holds the model twice. Part i takes samples i, i + m, i + 2m, ... of m parts, so that a batch that
            is divided over devices stays where it is.

    Returns:
        A `Model` with the parameters and the state of `model`, the one for the other at any time.

    Raises:
        TypeError: `model` is not a `Model`, or `size` is not an integer; (at trace time) inputs have no sample axis, or
            are sparse.
        ValueError: `size` < 1; (at trace time) the leaves of the inputs differ in their number of samples.

    Example:
        >>> import flax.linen as nn, funcbilevel as fb
        >>> model = fb.microbatched(fb.from_linen(nn.Dense(1)), size=256)

    References:
        Chen, Xu, Zhang, Guestrin, *Training Deep Nets with Sublinear Memory Cost*, 2016,
        https://arxiv.org/abs/1604.06174 (rematerialisation).
    """
    check_is_model("microbatched", "model", model)
    check_number("microbatched", "size", size)

    def apply(
        params: PyTree, model_state: ModelState, inputs: Inputs, /, *, train: bool = False, key: Key | None = None
    ) -> tuple[Prediction, ModelState]:
        count, part_of, rest = _parts("microbatched", "inputs", inputs, size)
        if count == 0:
            return model.apply(params, model_state, rest, train=train, key=key)

        def of_part(params: PyTree, state: ModelState, x: Inputs, i: Any) -> tuple[Prediction, ModelState]:
            return model.apply(params, state, x, train=train, key=None if key is None else jax.random.fold_in(key, i))

        recomputed = jax.checkpoint(of_part, prevent_cse=False)

        def step(state: ModelState, i: jax.Array) -> tuple[ModelState, Prediction]:
            prediction, after = recomputed(params, state, part_of(i), i)
            return (after if train else state), prediction

        state, predictions = jax.lax.scan(step, model_state, jnp.arange(count))
        prediction = jax.tree.map(_joined, predictions)
        if rest is not None:
            last, after = of_part(params, state, rest, count)
            prediction = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), prediction, last)
            state = after if train else state
        return prediction, state

    return model._replace(apply=apply)


def microbatched_objective(objective: Callable[..., Any], size: int) -> Callable[..., Any]:
    r"""An objective that is a mean over samples, computed on at most `size` samples at a time: gradient accumulation.

    For a `ParametricProblem`, whose objectives call the network themselves. The value is the mean of the parts' values,
    weighted by their numbers of samples, and so are all derivatives, of any order. The backward pass computes the
    activations of each part anew, as `microbatched` does.

    Arguments:
        objective: `(outer_params, inner_params, batch) -> value` or `(value, aux)`, a mean over the samples of `batch`
            (or a mean and what does not depend on the batch, such as a penalty). Aux is averaged in the same way.
        size: samples in a part, >= 1; what is left is a part of its own.

    Returns:
        An objective with the same arguments. Every leaf of its batch has the same number of samples in front.

    Raises:
        TypeError: `objective` is not callable, or `size` is not an integer; (at trace time) a leaf of the batch has no
            sample axis, or is sparse.
        ValueError: `size` < 1; (at trace time) the leaves of the batch differ in their number of samples.

    Example: a mean over 10 samples in parts of four.
        >>> import jax.numpy as jnp, funcbilevel as fb
        >>> whole = lambda w, u, x: jnp.mean((u - w * x) ** 2)
        >>> in_parts = fb.microbatched_objective(whole, 4)
        >>> x = jnp.arange(10.0)
        >>> bool(jnp.allclose(in_parts(1.0, 2.0, x), whole(1.0, 2.0, x)))
        True
    """
    check_callable("microbatched_objective", "objective", objective, "outer_params, inner_params, batch")
    check_number("microbatched_objective", "size", size)

    @wraps(objective)
    def in_parts(outer_params: PyTree, inner_params: PyTree, batch: PyTree) -> Any:
        count, part_of, rest = _parts("microbatched_objective", "batch", batch, size)
        if count == 0:
            return objective(outer_params, inner_params, rest)
        recomputed = jax.checkpoint(objective, prevent_cse=False)
        like = jax.eval_shape(lambda: objective(outer_params, inner_params, part_of(0)))

        def step(total: PyTree, i: jax.Array) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, recomputed(outer_params, inner_params, part_of(i))), None

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.result_type(x.dtype, jnp.float32)), like)
        total, _ = jax.lax.scan(step, zero, jnp.arange(count))
        if rest is None:
            return jax.tree.map(lambda x: x / count, total)
        left = jax.tree.leaves(rest)[0].shape[0]
        last = objective(outer_params, inner_params, rest)
        return jax.tree.map(lambda x, y: (size * x + left * y) / (size * count + left), total, last)

    return in_parts


def _parts(function: str, argument: str, batch: PyTree, size: int) -> tuple[int, Callable[[Any], PyTree], PyTree]:
    """How many parts of `size` samples, i -> the i-th of them, and what is left or None."""
    for path, x in jax.tree_util.tree_leaves_with_path(batch, is_leaf=is_sparse):
        if is_sparse(x):
            raise TypeError(
                f"{function}: every leaf of {argument} must be dense, to be taken apart by samples, got "
                f"{type(x).__name__} at {argument}{at_path(path)}; pass {argument}.todense(), or do without parts."
            )
        if np.ndim(x) == 0:
            raise TypeError(
                f"{function}: every leaf of {argument} must have samples in front, got the scalar {x!r} at "
                f"{argument}{at_path(path)}; close over it, or give it a sample axis."
            )
    numbers = num_rows(batch)
    if len(numbers) != 1:
        raise ValueError(
            f"{function}: the leaves of {argument} must have one number of samples in front, got {sorted(numbers)}."
        )
    (n,) = numbers
    if n <= size:
        return 0, lambda i: batch, batch
    count, left = divmod(n, size)
    whole = jax.tree.map(lambda x: jnp.reshape(x[: n - left], (size, count, *np.shape(x)[1:])), batch)

    def part_of(i: Any) -> PyTree:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), whole)

    return count, part_of, jax.tree.map(lambda x: x[n - left :], batch) if left else None


def _joined(x: jax.Array) -> jax.Array:
    """[parts, size, ...] of every `parts`-th sample, in their first order."""
    return jnp.reshape(jnp.swapaxes(x, 0, 1), (-1, *x.shape[2:]))
