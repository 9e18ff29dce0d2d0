"""Checks of a problem's set-up on actual batches: at trace time, with what was got, what was expected and the mend."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbilevel._estimator import Estimator
from funcbilevel._model import Model
from funcbilevel._problem import (
    FunctionalProblem,
    ParametricProblem,
    Problem,
    inner_value,
    outer_value,
)
from funcbilevel._tracing import dependence
from funcbilevel._tree import at_path, path_name
from funcbilevel._typing import Batch, InnerParams, Inputs, ModelState, OuterParams, Prediction, PyTree

# The parts of a solver.


def check_setup(function: str, problem: Any, model: Any, estimator: Any) -> None:
    """That problem, model and estimator go together."""
    if not isinstance(problem, (FunctionalProblem, ParametricProblem)):
        raise TypeError(
            f"{function}: problem must be an fb.FunctionalProblem or fb.ParametricProblem, "
            f"got {type(problem).__name__}."
        )
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"{function}: estimator must be an fb.Estimator, got {estimator!r}; make one with fb.funcid(...), "
            "fb.aid(...), fb.itd(...) or fb.alternating()."
        )
    if isinstance(problem, ParametricProblem):
        if model is not None:
            raise ValueError(
                f"{function}: model must be None with a ParametricProblem, got {type(model).__name__}; its objectives "
                "take inner_params themselves. For a model's prediction use an fb.FunctionalProblem."
            )
        if estimator.functional:
            raise TypeError(
                f"{function}: fb.funcid needs an fb.FunctionalProblem, got a ParametricProblem; write the objectives "
                "on the prediction, or use fb.aid, fb.itd or fb.alternating."
            )
    elif model is None:
        raise ValueError(
            f"{function}: model must be an fb.Model with a FunctionalProblem, got None; make one with "
            "fb.from_function, fb.from_linen or fb.from_nnx."
        )
    else:
        check_is_model(function, "model", model)


def check_is_model(function: str, argument: str, model: Any) -> None:
    """That it is a `Model`, and not the module or function that one is made of."""
    if not isinstance(model, Model):
        raise TypeError(
            f"{function}: {argument} must be an fb.Model, got {type(model).__name__}; wrap it with fb.from_linen, "
            "fb.from_nnx or fb.from_function."
        )


def check_outer_model(function: str, outer_model: Any, problem: Problem) -> None:
    """That the outer level can be seen through a model."""
    if not isinstance(outer_model, Model):
        raise TypeError(
            f"{function}: outer_model must be an fb.Model or None, got {type(outer_model).__name__}; wrap it with "
            "fb.from_linen, fb.from_nnx or fb.from_function."
        )
    if outer_model.head is not None:
        raise ValueError(f"{function}: outer_model must give its whole output itself, got one of variable_projection.")
    if problem.axis_name is not None:
        raise ValueError(
            f"{function}: outer_model is given, but problem.axis_name is {problem.axis_name!r}: its outputs belong to "
            "one device's samples, and cannot be averaged. Shard the batches under jit instead of pmap."
        )


# The problem on actual batches. All of it under `jax.eval_shape`: nothing is computed.


def check_inner(
    function: str,
    problem: Problem,
    model: Model | None,
    outer_params: OuterParams,
    inner_params: InnerParams,
    model_state: ModelState,
    inner_batch: Batch,
) -> None:
    """The inner objective is a float scalar that depends on what the inner level optimises."""
    name, u = _lower(function, problem, model, inner_params, model_state, inner_batch, "inner_batch")
    _, depends = dependence(lambda omega, u: inner_value(problem, omega, u, inner_batch)[0], outer_params, u)
    if not any(jax.tree.leaves(depends)):
        raise ValueError(
            f"{function}: inner_objective does not depend on {name} (its derivative is identically zero), so "
            f"there is nothing to fit; use the second argument, without jax.lax.stop_gradient."
        )


def check_outer(
    function: str,
    problem: Problem,
    model: Model | None,
    outer_params: OuterParams,
    inner_params: InnerParams,
    model_state: ModelState,
    outer_batch: Batch,
) -> None:
    """The outer objective is a float scalar that depends on outer_params or on the inner level."""
    name, u = _lower(function, problem, model, inner_params, model_state, outer_batch, "outer_batch")
    depends = dependence(lambda omega, u: outer_value(problem, omega, u, outer_batch)[0], outer_params, u)
    if not any(jax.tree.leaves(depends)):
        raise ValueError(
            f"{function}: outer_objective depends on neither {name} nor outer_params, so its hypergradient is "
            "identically zero; use the first or the second argument."
        )


def _lower(
    function: str,
    problem: Problem,
    model: Model | None,
    inner_params: InnerParams,
    model_state: ModelState,
    batch: Batch,
    batch_name: str,
) -> tuple[str, PyTree]:
    """The name and the shapes of what the objectives see of the lower level."""
    if isinstance(problem, ParametricProblem):
        return "inner_params", inner_params
    assert model is not None
    inputs = problem_inputs(function, problem, batch, batch_name)
    shapes = jax.eval_shape(lambda *args: model.apply(*args)[0], inner_params, model_state, inputs)
    if model.head is not None:
        check_features(function, shapes, inputs)
        shapes = jax.ShapeDtypeStruct((shapes.shape[0], model.head.num_outputs), shapes.dtype)
    check_prediction(function, "prediction", shapes, inputs, batch_name)
    return "the prediction", shapes


def problem_inputs(function: str, problem: FunctionalProblem, batch: Batch, batch_name: str) -> Inputs:
    """`problem.inputs(batch)`, with a message for batches that it does not fit."""
    try:
        inputs = problem.inputs(batch)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise type(error)(
            f"{function}: problem.inputs failed on {batch_name} of tree structure {jax.tree.structure(batch)} "
            f"({error}); pass FunctionalProblem(..., inputs=lambda batch: <what the model is called on>)."
        ) from error
    if not jax.tree.leaves(inputs):
        raise ValueError(f"{function}: the inputs of {batch_name} are an empty pytree; the model needs an array.")
    return inputs


def check_prediction(function: str, name: str, shapes: Prediction, inputs: Inputs, batch_name: str) -> None:
    """Floating leaves whose leading axis is that of the inputs."""
    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    if not leaves:
        raise ValueError(f"{function}: the {name} is an empty pytree; the model must return at least one array.")
    sizes = num_rows(inputs)
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{function}: {name}{at_path(path)} must be floating-point, got dtype {leaf.dtype}; the objectives are "
                "differentiated by it. Return values before rounding, argmax or a comparison."
            )
        if not leaf.shape or leaf.shape[0] not in sizes:
            raise ValueError(
                f"{function}: {name}{at_path(path)} has shape {leaf.shape}, expected the leading axis of the inputs of "
                f"{batch_name} ({' or '.join(map(str, sorted(sizes)))}); the model must return one row per sample."
            )


def num_rows(inputs: Inputs) -> set[int]:
    """The leading axes of the inputs' arrays; of a sparse one its own, and not those of the buffers it is made of."""
    arrays = jax.tree.leaves(inputs, is_leaf=lambda x: hasattr(x, "todense"))
    return {x.shape[0] for x in arrays if np.ndim(x) > 0}


def check_features(function: str, phi: Any, inputs: Inputs) -> None:
    """One row of floating-point features per sample."""
    sizes = num_rows(inputs)
    if not hasattr(phi, "shape") or phi.ndim != 2 or phi.shape[0] not in sizes:
        got = f"shape {phi.shape}" if hasattr(phi, "shape") else type(phi).__name__
        raise ValueError(
            f"{function}: features must return an array of shape [n, p] with n = "
            f"{' or '.join(map(str, sorted(sizes)))} rows, got {got}; flatten each sample's features to one row."
        )
    if not jnp.issubdtype(phi.dtype, jnp.floating):
        raise TypeError(
            f"{function}: features must be floating-point, got dtype {phi.dtype}; convert them, for example with "
            "phi.astype(jnp.float32)."
        )


def warn_of_ignored(function: str, seen: PyTree) -> None:
    """Names the leaves of inner_params that the inner objective does not see; `seen` is the tree of `dependence`."""
    leaves = jax.tree_util.tree_flatten_with_path(seen)[0]
    if ignored := [path_name(path) or "inner_params" for path, is_seen in leaves if not is_seen]:
        warnings.warn(
            f"{function}: the inner objective does not depend on {', '.join(ignored)} of inner_params, so that "
            "its minimiser is not unique; they have no part in the linear system. Leave them out of inner_params, or "
            "add a term to the objective that sees them, for example a penalty.",
            stacklevel=2,
        )


def warn_of_assumptions(function: str, metrics: dict[str, Any]) -> None:
    """Says so where metrics, if they are numbers already, show that an assumption of the estimator plainly fails."""
    if any(isinstance(x, jax.core.Tracer) for x in metrics.values()):
        return
    relative = metrics.get("inner_gradient_relative")
    if relative is not None and relative > 1e-3:
        warnings.warn(
            f"{function}: the inner solution is not a stationary point of the inner objective: its gradient is "
            f"{float(relative):.2g} times the size of its terms (inner_gradient_relative), and the estimator takes it "
            f"for zero. {NOT_STATIONARY}",
            stacklevel=3,
        )
    if not metrics.get("adjoint_inputs_match", True):
        warnings.warn(f"{function}: {INPUTS_DIFFER}", stacklevel=3)


NOT_STATIONARY = (
    "Take more inner steps or a larger inner learning rate, or differentiate through the steps that were made with "
    "fb.itd; a solution with active constraints or at a kink (non-negative least squares, lasso) never becomes "
    "stationary: fb.itd through projected or proximal steps is right there."
)
INPUTS_DIFFER = (
    "the two batches hold different inputs (adjoint_inputs_match is false), and fb.pointwise_adjoint gives the value "
    "fitted at one input to another; pass the same inputs in the same order, or use fb.linear_adjoint or "
    "fb.learned_adjoint."
)
