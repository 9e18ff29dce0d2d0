"""The commonest silent mistake in a regression: a prediction [n, 1] against targets [n], which broadcast to [n, n]."""

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from funcbilevel._tree import at_path
from funcbilevel._typing import Batch, Prediction, PyTree


def broadcasts_samples(
    objective: Callable[[Prediction, Batch], Any], prediction: Prediction, batch: Batch, jaxpr: Any
) -> str:
    """What is wrong if the objective pairs every sample with every other by mistake; empty if it does not.

    A mistake is what NumPy's rank promotion does to a prediction of shape [n, 1] or [n], and what it no longer does
    when the trailing axis is dropped or added: from the prediction, or from all that have such a shape. Pairs that are
    written down (v @ v.T, v[:, None] - v[None]) stay, or fail.

    Arguments:
        objective: of the prediction and the batch.
        prediction: shapes.
        batch: what the objective is given besides.
        jaxpr: of the objective's derivative, which is searched first: few programs hold an array of n * n at all.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path((prediction, batch))
    leaves = [leaf for _, leaf in paths]
    of_prediction = len(jax.tree.leaves(prediction))
    rows = {v.shape[0] for v in leaves[:of_prediction]}
    found = {i: np.shape(v)[1:] for i, v in enumerate(leaves) if np.shape(v)[:1] and np.shape(v)[0] in rows - {1}}
    columns, flat = ([i for i, rest in found.items() if rest == shape] for shape in ((1,), ()))
    suspects = [i for i in (*columns, *flat) if i < of_prediction]
    if not suspects or jax.config.jax_numpy_rank_promotion != "allow":  # pyright: ignore[reportAttributeAccessIssue]
        return ""
    equations = list(_equations(jaxpr.jaxpr))
    shapes = {getattr(v.aval, "shape", ()) for equation in equations for v in equation.outvars}
    if not any(shape.count(n) > 1 for shape in shapes for n in rows):
        return ""
    has_loop = any(equation.primitive.name in ("scan", "while") for equation in equations)

    def pairs(changed: list[int]) -> list[tuple[tuple[int, ...], ...]]:
        """The operands of promotions to n * n and more, with the trailing axis of some leaves dropped or added."""

        def call(given: list[Any]) -> Any:
            values = dict(zip((*range(of_prediction), *changed), given, strict=True))
            return objective(*jax.tree.unflatten(structure, [values.get(i, v) for i, v in enumerate(leaves)]))

        given = [_other(leaves[i]) if i in changed else leaves[i] for i in (*range(of_prediction), *changed)]
        promoted = _promotions(call, given, has_loop)
        return [operands for operands in promoted if any(np.broadcast_shapes(*operands).count(n) > 1 for n in rows)]

    before = pairs([])
    attempts = [suspects, *([i] for i in suspects if len(suspects) > 1)]
    attempts += [alike for alike in (columns, flat) if set(alike) & set(suspects)]
    for changed in attempts if before else []:
        try:
            after = pairs(changed)
        except Exception:  # the axis is made use of
            continue
        if len(after) < len(before):
            i = next(i for i in changed if i in suspects)
            got, other = leaves[i].shape, _other(leaves[i]).shape
            return (
                f"broadcasts arrays of shapes {' and '.join(map(str, before[0]))} to all pairs of samples, "
                f"{np.broadcast_shapes(*before[0])}, because prediction{at_path(paths[i][0][1:])} has "
                f"shape {got}; let the model return {other}, or give the array that it meets the shape {got}."
            )
    return ""


def _other(leaf: Any) -> jax.ShapeDtypeStruct:
    shape = np.shape(leaf)
    return jax.ShapeDtypeStruct(shape[:1] if len(shape) == 2 else (*shape, 1), leaf.dtype)


def _promotions(f: Callable[[PyTree], Any], shapes: PyTree, has_loop: bool) -> list[tuple[tuple[int, ...], ...]]:
    """The shapes of the operands wherever NumPy's rank promotion takes place in f, as JAX reports them.

    Its warnings come from inside of compiled functions, which are traced once only: so all is called uncompiled. Loops
    would then be unrolled; of a program with loops, JAX's error tells the first promotion.
    """

    def call(v: PyTree) -> Any:
        with jax.numpy_rank_promotion("raise" if has_loop else "warn"), jax.disable_jit(not has_loop):
            return jax.tree.leaves(f(v))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            jax.eval_shape(call, shapes)
            texts = [str(w.message) for w in caught]
        except ValueError as error:
            texts = [str(error)]
            if "jax_numpy_rank_promotion" not in texts[0]:
                raise
    operands = [re.findall(r"\((\d[\d, ]*)\)", text) for text in texts if "rank_promotion" in text]
    return [tuple(tuple(map(int, re.findall(r"\d+", shape))) for shape in shapes) for shapes in operands if shapes]


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All of them, those in the bodies of loops, branches and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if inner := getattr(parameter, "jaxpr", parameter if hasattr(parameter, "eqns") else None):
                yield from _equations(inner)
