"""Checks of a problem's set-up on actual batches: at trace time, with what was got, what was expected and the mend."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from funcbilevel._arguments import check_callable, check_shapes
from funcbilevel._broadcast import broadcasts_samples
from funcbilevel._described import show
from funcbilevel._estimator import Estimator
from funcbilevel._fit import FitState
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
from funcbilevel._typing import Batch, InnerParams, Inputs, Key, ModelState, Objective, OuterParams, Prediction, PyTree

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
            "fb.aid(...), fb.itd(...) or another function that returns one."
        )
    for part in ("init", "estimate"):
        check_callable(function, f"estimator.{part}", getattr(estimator, part))
    if isinstance(problem, ParametricProblem):
        if model is not None:
            raise ValueError(
                f"{function}: model must be None with a ParametricProblem, got {type(model).__name__}; its objectives "
                "take inner_params themselves. For a model's prediction use an fb.FunctionalProblem."
            )
        if estimator.functional:
            raise TypeError(
                f"{function}: fb.{estimator!r} needs an fb.FunctionalProblem, got a ParametricProblem; write the "
                "objectives on the prediction, or use fb.aid, fb.itd or fb.alternating."
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
    _check_functions_of_model(function, argument, model)


def _check_functions_of_model(function: str, argument: str, model: Model) -> None:
    check_callable(function, f"{argument}.init", model.init, "key, inputs")
    check_callable(function, f"{argument}.apply", model.apply, "params, model_state, inputs", ("train", "key"))


def check_outer_model(function: str, outer_model: Any, problem: Problem) -> None:
    """That the outer level can be seen through a model."""
    if not isinstance(outer_model, Model):
        raise TypeError(
            f"{function}: outer_model must be an fb.Model or None, got {type(outer_model).__name__}; wrap it with "
            "fb.from_linen, fb.from_nnx or fb.from_function."
        )
    _check_functions_of_model(function, "outer_model", outer_model)
    if outer_model.head is not None:
        raise ValueError(f"{function}: outer_model must give its whole output itself, got one of variable_projection.")
    if problem.axis_name is not None:
        raise ValueError(
            f"{function}: outer_model is given, but problem.axis_name is {problem.axis_name!r}: its outputs belong to "
            "one device's samples, and cannot be averaged. Shard the batches under jit instead of pmap."
        )


def check_outer_inputs(function: str, outer_inputs: Any) -> Callable[[Batch], Inputs]:
    """What the outer model is called on as a function of the inner batch: all of it if nothing else is said."""
    if outer_inputs is None:
        return lambda batch: batch
    check_callable(function, "outer_inputs", outer_inputs, "inner_batch")
    return outer_inputs


# The problem on actual batches. All of it under `jax.eval_shape` or `jax.make_jaxpr`: nothing is computed.


def check_inner(
    function: str,
    problem: Problem,
    model: Model | None,
    outer_params: OuterParams,
    inner_params: InnerParams,
    model_state: ModelState,
    inner_batch: Batch,
    told: set[str],
) -> bool:
    """The inner objective is a float scalar that depends on what the inner level optimises.

    Returns whether it depends on outer_params. Warnings in `told` are not given again.
    """
    lower = (inner_params, model_state)
    name, (sees_omega, sees_u) = _dependences(function, problem, model, outer_params, lower, inner_batch, "inner", told)
    if not sees_u:
        raise ValueError(
            f"{function}: inner_objective does not depend on {name} (its derivative is identically zero), so "
            f"there is nothing to fit; use the second argument, without jax.lax.stop_gradient."
        )
    return sees_omega


def check_objectives(
    function: str,
    problem: Problem,
    model: Model | None,
    estimator: Estimator,
    outer_params: OuterParams,
    inner_params: InnerParams,
    model_state: ModelState,
    inner_batch: Batch,
    outer_batch: Batch,
    told: set[str],
    *,
    reached: bool = False,
) -> None:
    """Both objectives are float scalars, and depend on what they have to.

    Arguments:
        told: what has been warned of already, and is not again.
        reached: whether outer_params reach the inner level otherwise than through its objective.
    """
    lower = (inner_params, model_state)
    check_axis(function, problem)
    inner_sees = check_inner(function, problem, model, outer_params, *lower, inner_batch, told)
    if estimator.by_values:
        return
    name, (outer_sees, sees_u) = _dependences(function, problem, model, outer_params, lower, outer_batch, "outer", told)
    if not (sees_u or outer_sees):
        raise ValueError(
            f"{function}: outer_objective depends on neither {name} nor outer_params, so its hypergradient is "
            "identically zero; use the first or the second argument."
        )
    head_sees = inner_sees and model is not None and model.head is not None
    if not estimator.implicit:
        if not (outer_sees or head_sees):
            _warn(
                told,
                f"{function}: outer_objective does not depend on outer_params, and {estimator!r} takes no derivative "
                "but that one: the hypergradient is zero and nothing will move; use fb.funcid, fb.aid or fb.itd.",
            )
    elif not (inner_sees or reached or estimator.reaches):
        consequence = "" if outer_sees else "; nor does outer_objective: the hypergradient is zero, nothing will move"
        _warn(
            told,
            f"{function}: inner_objective does not depend on outer_params, so the implicit part of the hypergradient, "
            f"which {estimator!r} estimates, is zero for ever{consequence}. Use its first argument, without "
            "jax.lax.stop_gradient, or fb.alternating().",
        )


def check_axis(function: str, problem: Problem) -> None:
    """That the problem's mapped axis is there."""
    if problem.axis_name is None:
        return
    try:
        jax.eval_shape(lambda: jax.lax.axis_index(problem.axis_name))
    except NameError as error:
        raise ValueError(
            f"{function}: problem.axis_name is {problem.axis_name!r}, but there is no mapped axis of that name here; "
            f"call it under jax.pmap(..., axis_name={problem.axis_name!r}), or leave axis_name out, as under jit."
        ) from error


def _warn(told: set[str], message: str) -> None:
    if message not in told:
        told.add(message)
        warnings.warn(message, stacklevel=4)


def _dependences(
    function: str,
    problem: Problem,
    model: Model | None,
    outer_params: OuterParams,
    lower: tuple[InnerParams, ModelState],
    batch: Batch,
    level: str,
    told: set[str],
) -> tuple[str, list[bool]]:
    """What an objective sees of the lower level by name, and whether it depends on outer_params and on that."""
    name, u = _lower(function, problem, model, *lower, batch, f"{level}_batch")
    evaluate = inner_value if level == "inner" else outer_value
    try:
        depends, jaxpr = dependence(lambda omega, u: evaluate(problem, omega, u, batch)[0], outer_params, u)
    except Exception as error:
        _explain(function, problem, outer_params, u, batch, level, error)
        raise
    if isinstance(problem, FunctionalProblem):
        objective = _objective(problem, level)
        if message := broadcasts_samples(lambda u, batch: objective(outer_params, u, batch), u, batch, jaxpr):
            _warn(told, f"{function}: {level}_objective {message}")
    return name, [any(jax.tree.leaves(leaves)) for leaves in depends]


def _objective(problem: Problem, level: str) -> Objective:
    return problem.inner_objective if level == "inner" else problem.outer_objective


def _explain(
    function: str, problem: Problem, outer_params: OuterParams, u: PyTree, batch: Batch, level: str, error: Exception
) -> None:
    """Raises a better error than that of an objective that failed or gave no scalar, if it finds the cause."""
    objective = _objective(problem, level)

    def shape(order: tuple[int, ...]) -> tuple[int, ...] | None:
        """Of the value, when the arguments are given in another order; None if the objective fails or gives none."""

        def value(omega: OuterParams, u: PyTree) -> Any:
            arguments = (omega, u, batch)
            output = objective(*(arguments[i] for i in order))
            if problem.has_aux:
                output = output[0] if isinstance(output, tuple) else None
            return jnp.asarray(output)

        try:
            got = jax.eval_shape(value, outer_params, u)
        except Exception:
            return None
        return got.shape if jnp.issubdtype(got.dtype, jnp.floating) else None

    right = (0, 1, 2)
    names = ("outer_params", "inner_params" if isinstance(problem, ParametricProblem) else "prediction", "batch")
    given = shape(right)
    if given == ():
        return
    for order in itertools.permutations(right):
        if shape(order) == ():
            as_written = ", ".join(names[i] for i in order)
            what = "fails" if given is None else f"returns shape {given}, not a scalar,"
            raise ValueError(
                f"{function}: {level}_objective {what} when called as ({', '.join(names)}), but returns a scalar when "
                f"called as ({as_written}): its arguments seem to be swapped; put them in the first order. If they are "
                f"not, reduce the value, for example with jnp.mean. ({_first_line(error)})"
            ) from error
    if given is None:
        _check_lengths(function, batch, level, error)


def _check_lengths(function: str, batch: Batch, level: str, error: Exception) -> None:
    """Raises if leaves of a batch on which something failed differ in their leading axis."""
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    sizes = {f"{level}_batch{at_path(path)}": np.shape(x)[0] for path, x in leaves if np.ndim(x) > 0}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{size} of {name}" for name, size in sizes.items())
        raise ValueError(
            f"{function}: {level}_objective fails on a batch whose leaves have different lengths: {listed}; give every "
            f"leaf one row per sample. ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


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
        _check_not_empty(function, batch, batch_name)
        return "inner_params", inner_params
    assert model is not None
    inputs = problem_inputs(function, problem, batch, batch_name)
    try:
        output = jax.eval_shape(model.apply, inner_params, model_state, inputs)
    except Exception:
        check_parameters(function, problem, model, inner_params, model_state, batch, strict=True)
        raise
    if not (isinstance(output, tuple) and len(output) == 2):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"{function}: model.apply must return (prediction, model_state), got {show(output)}; for functions without "
            "a state use fb.from_function."
        )
    shapes = output[0]
    if model.head is not None:
        check_features(function, shapes, inputs)
        shapes = jax.ShapeDtypeStruct((shapes.shape[0], model.head.num_outputs), shapes.dtype)
    check_prediction(function, "prediction", shapes, inputs, batch_name)
    return "the prediction", shapes


def initial(function: str, model: Model, key: Key, inputs: Inputs) -> tuple[InnerParams, ModelState]:
    """The model's initial parameters and state."""
    output: Any = model.init(key, inputs)
    if not (isinstance(output, tuple) and len(output) == 2):  # pyright: ignore[reportUnknownArgumentType]
        raise TypeError(
            f"{function}: model.init must return (params, model_state), got {show(output)}; for functions without a "
            "state use fb.from_function."
        )
    return output


def check_parameters(
    function: str,
    problem: Problem,
    model: Model | None,
    inner_params: InnerParams,
    model_state: ModelState,
    batch: Batch,
    *,
    strict: bool = False,
) -> None:
    """That parameters (and the state, if something failed: `strict`) are those of the model.

    An axis as long as the batch may belong to another batch: a kernel method has one parameter per sample.
    """
    if isinstance(problem, ParametricProblem) or model is None:
        return
    inputs = problem_inputs(function, problem, batch, "inner_batch")
    try:
        params, state = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs))
    except Exception:
        return
    if not jax.tree.leaves(params):  # an `init` that is not meant to be used
        return
    mend = "pass what model.init or an earlier state gave."
    check_shapes(function, "inner_params", inner_params, params, mend, set() if strict else num_rows(inputs))
    if strict:
        check_shapes(function, "model_state", model_state, state, mend)


def check_uses_parameters(
    function: str, problem: Problem, model: Model | None, params: InnerParams, model_state: ModelState, batch: Batch
) -> None:
    """That the prediction depends on the parameters; not asked of features under a head, which may be fixed."""
    if isinstance(problem, ParametricProblem) or model is None or model.head is not None:
        return
    inputs = problem.inputs(batch)

    def total(params: InnerParams) -> jax.Array:
        return sum((jnp.sum(v) for v in jax.tree.leaves(model.apply(params, model_state, inputs)[0])), jnp.zeros(()))

    if not any(jax.tree.leaves(dependence(total, params)[0])):
        raise ValueError(
            f"{function}: the model's prediction does not depend on its parameters (the derivative is identically "
            "zero), so there is nothing to fit; use the first argument of apply, without jax.lax.stop_gradient."
        )


def check_estimator_state(
    function: str,
    argument: str,
    estimator: Estimator,
    problem: Problem,
    model: Model | None,
    inner: FitState,
    inner_batch: Batch,
    state: PyTree,
    known: dict[str, PyTree],
) -> None:
    """That a warm start is one of this estimator; `known` spares the tracing of its `init` after the first time."""
    key = shapes_key(inner, inner_batch)
    if key not in known:
        known[key] = jax.eval_shape(lambda: estimator.init(jax.random.key(0), problem, model, inner, inner_batch))
    mend = f"pass what this estimator, {estimator!r}, gave on the same problem, or start afresh."
    check_shapes(function, argument, state, known[key], mend)


def shapes_key(inner: FitState, inner_batch: Batch) -> str:
    """On what the shape of an estimator's state depends."""
    return str(jax.tree.map(np.shape, (inner.params, inner.model_state, inner_batch)))


def _check_not_empty(function: str, batch: PyTree, name: str) -> None:
    leaves = jax.tree.leaves(batch)
    if leaves and all(np.size(x) == 0 for x in leaves):
        raise ValueError(
            f"{function}: {name} is empty, it holds {show(jax.eval_shape(lambda: batch))}; a mean over no samples is "
            "NaN. Pass at least one sample."
        )


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
    if num_rows(inputs) == {0}:
        _check_not_empty(function, inputs, batch_name)
        raise ValueError(f"{function}: {batch_name} is empty, its inputs have no rows; pass at least one sample.")
    return inputs


def check_prediction(function: str, name: str, shapes: Prediction, inputs: Inputs, batch_name: str) -> None:
    """Floating leaves whose leading axis is that of the inputs."""
    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    if not leaves:
        raise ValueError(f"{function}: the {name} is an empty pytree; the model must return at least one array.")
    sizes = num_rows(inputs)
    for path, leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"{function}: {name}{at_path(path)} must be floating-point, got dtype {leaf.dtype}; let the model "
                "return its real and its imaginary part as two leaves and combine them in the objectives, by "
                "jax.lax.complex(re, im): their gradients are exact."
            )
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


def is_sparse(x: Any) -> bool:
    """Whether it is an array of `jax.experimental.sparse`."""
    return hasattr(x, "todense")


def num_rows(inputs: Inputs) -> set[int]:
    """The leading axes of the inputs' arrays; of a sparse one its own, and not those of the buffers it is made of."""
    arrays = jax.tree.leaves(inputs, is_leaf=is_sparse)
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


def leaves_seen(
    function: str, problem: Problem, outer_params: OuterParams, inner_params: InnerParams, inner_batch: Batch
) -> PyTree:
    """For each leaf of inner_params whether the inner objective sees it; warns of those that it does not."""
    (seen,), _ = dependence(lambda theta: inner_value(problem, outer_params, theta, inner_batch)[0], inner_params)
    leaves = jax.tree_util.tree_flatten_with_path(seen)[0]
    if ignored := [path_name(path) or "inner_params" for path, is_seen in leaves if not is_seen]:
        warnings.warn(
            f"{function}: the inner objective does not depend on {', '.join(ignored)} of inner_params, so that "
            "its minimiser is not unique; they have no part in the linear system. Leave them out of inner_params, or "
            "add a term to the objective that sees them, for example a penalty.",
            stacklevel=2,
        )
    return seen


def warn_of_assumptions(function: str, metrics: dict[str, Any]) -> None:
    """Says so where metrics, if they are numbers already, show that an assumption of the estimator plainly fails."""
    if any(isinstance(x, Tracer) for x in metrics.values()):
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


def warn_of_run(function: str, metrics: dict[str, Any]) -> None:
    """The same for a whole run, of which metrics have a leading axis.

    Of its last tenth, and of thirty steps at least: at first no inner level has converged. Less strict, because small
    batches leave a noise in the gradient.
    """
    relative = metrics.get("inner_gradient_relative")
    if relative is not None and len(relative) >= 30:
        late = float(np.median(relative[-(len(relative) // 10) :]))
        if late > 0.05:
            warnings.warn(
                f"{function}: the inner solution is not a stationary point of the inner objective: in the last tenth "
                f"of the run its gradient is {late:.2g} times the size of its terms (inner_gradient_relative), and the "
                f"estimator takes it for zero. (With small batches it is never zero.) {NOT_STATIONARY}",
                stacklevel=3,
            )
    if not np.all(metrics.get("adjoint_inputs_match", True)):
        warnings.warn(f"{function}: {INPUTS_DIFFER}", stacklevel=3)


NOT_STATIONARY = (
    "Take more inner steps or a larger inner learning rate, or differentiate through the steps that were made with "
    "fb.itd; a solution with active constraints or at a kink (non-negative least squares, lasso) never becomes "
    "stationary: fb.prox_aid is right there, or fb.itd through the steps of fb.proximal."
)
INPUTS_DIFFER = (
    "the two batches hold different inputs (adjoint_inputs_match is false), and fb.pointwise_adjoint gives the value "
    "fitted at one input to another; pass the same inputs in the same order, or use fb.linear_adjoint or "
    "fb.learned_adjoint."
)
