"""Checks of what estimators, adjoints and linear solvers return, which a user may have put together by hand."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbilevel._arguments import check_shapes
from funcbilevel._described import show
from funcbilevel._estimator import Hypergradient, InnerSolution
from funcbilevel._tree import at_path
from funcbilevel._typing import OuterParams, Prediction, PyTree


def check_estimate(function: str, returned: Any, outer_params: OuterParams) -> tuple[InnerSolution, Hypergradient]:
    """What an `Estimator.estimate` owes: an inner solution, and a hypergradient like outer_params."""
    name = "estimator.estimate"
    kinds = (InnerSolution, Hypergradient)
    if not (isinstance(returned, tuple) and tuple(map(type, returned)) == kinds):  # pyright: ignore[reportUnknownArgumentType]
        raise TypeError(
            f"{function}: {name} must return (fb.InnerSolution, fb.Hypergradient), got {show(returned)}; give what "
            "`solve` returned, and the hypergradient."
        )
    hyper: Hypergradient = returned[1]
    for part in ("gradient", "explicit", "implicit"):
        got = getattr(hyper, part)
        check_shapes(function, f"{name}'s {part}", got, outer_params, "it must be a pytree like outer_params.")
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(outer_params), strict=True):
            if jnp.result_type(x) != jnp.result_type(y):
                raise TypeError(
                    f"{function}: {name}'s {part}{at_path(path)} has dtype {jnp.result_type(x)}, but outer_params has "
                    f"{jnp.result_type(y)}; cast it."
                )
    if np.shape(hyper.outer_value) != ():
        raise ValueError(
            f"{function}: {name}'s outer_value must be a scalar, got shape {np.shape(hyper.outer_value)}; give the "
            "value of the outer objective."
        )
    _check_metrics(function, name, hyper.metrics)
    if "adjoint_finite" not in hyper.metrics:
        raise ValueError(
            f"{function}: {name}'s metrics must hold 'adjoint_finite', got {sorted(hyper.metrics)}; add "
            "jnp.array(True), or whether what the estimator computed by itself is finite."
        )
    return returned


def check_fitted(
    name: str, returned: Any, names: Sequence[str], like: Sequence[Prediction], state: PyTree
) -> tuple[Any, ...]:
    """`returned` by an `Adjoint`: predictions (called `names`, like `like`), its state and metrics."""
    if not (isinstance(returned, tuple) and len(returned) == len(names) + 2):  # pyright: ignore[reportUnknownArgumentType]
        raise TypeError(f"funcid: {name} must return ({', '.join(names)}, state, metrics), got {show(returned)}.")
    for what, got, expected in zip(names, returned, like):
        mend = "give the adjoint's values on these samples, a pytree like the prediction."
        check_shapes("funcid", f"{what} of {name}", got, expected, mend)
    check_next_state("funcid", name, returned[-2], state)
    _check_metrics("funcid", name, returned[-1])
    return returned


def check_next_state(function: str, name: str, got: PyTree, state: PyTree) -> None:
    """A state that can stand in the place of the last."""
    check_shapes(function, f"{name}'s state", got, jax.eval_shape(lambda: state), "give back one like that of `init`.")


def _check_metrics(function: str, name: str, metrics: Any) -> None:
    if not isinstance(metrics, dict) or any(np.shape(x) != () for x in metrics.values()):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        raise TypeError(f"{function}: {name}'s metrics must be a dict of scalars, got {show(metrics)}.")
