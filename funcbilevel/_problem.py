"""The two kinds of bilevel problem and the derivatives that every estimator is made of.

In the formulas u stands for what the objectives see of the lower level: the prediction v in a functional
problem, inner_params theta in a parametric one. The same four functions serve both.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_callable
from funcbilevel._described import fields_that_differ
from funcbilevel._model import Model
from funcbilevel._tracing import reverse_only
from funcbilevel._tree import moments, scalar_metrics, tree_vdot
from funcbilevel._typing import (
    Batch,
    InnerParams,
    Inputs,
    Key,
    LinearMap,
    Metrics,
    ModelState,
    Objective,
    OuterParams,
    Prediction,
    PyTree,
)


@dataclass(frozen=True)
class FunctionalProblem:
    r"""A bilevel problem over functions (Petrulionyte, Mairal, Arbel, NeurIPS 2024, eq. FBO).

    .. math::
        \min_\omega L_{out}(\omega, h^*_\omega) \quad\text{with}\quad
        h^*_\omega = \arg\min_h L_{in}(\omega, h)

    Both objectives see the function h only through its values on a batch, and are means over that batch.

    Arguments:
        inner_objective: `(outer_params, prediction, inner_batch) -> scalar`, strongly convex in the prediction.
        outer_objective: `(outer_params, prediction, outer_batch) -> scalar`.
        inputs: `batch -> what the model is called on`; by default the batch's first element. The leaves of the
            prediction must have the leading axis of the inputs.
        has_aux: whether both objectives return `(scalar, aux)`. The leaves of aux reach the metrics as
            `inner/<path>` and `outer/<path>` (a leaf with several elements by its mean).
        axis_name: name of a mapped axis over which the batches are spread, under `jax.pmap` (or `jax.shard_map` with
            `check_vma=False`): the objectives are means over one device's part, and all derivatives and metrics are
            averaged over the axis, so that every device takes the same step, that of the whole batch. Give all
            devices the same state. Not needed with `jit`, which shards batches by itself.

    Objectives may close over arrays and tracers, take any pytrees, and be built inside a jitted function.

    Raises:
        TypeError: an objective or `inputs` is not callable.

    Example:
        >>> import jax.numpy as jnp, funcbilevel as fb
        >>> problem = fb.FunctionalProblem(
        ...     inner_objective=lambda w, v, batch: jnp.mean((v - w * batch[1]) ** 2),
        ...     outer_objective=lambda w, v, batch: jnp.mean((v - batch[1]) ** 2),
        ... )

    References:
        Petrulionyte, Mairal, Arbel, *Functional Bilevel Optimization for Machine Learning*, NeurIPS 2024,
        https://arxiv.org/abs/2403.20233
    """

    inner_objective: Objective
    outer_objective: Objective
    inputs: Callable[[Batch], Inputs] = operator.itemgetter(0)
    has_aux: bool = False
    axis_name: str | None = None

    def __repr__(self) -> str:
        return fields_that_differ(self)

    def __post_init__(self) -> None:
        for name in ("inner_objective", "outer_objective"):
            check_callable("FunctionalProblem", name, getattr(self, name), "outer_params, prediction, batch")
        check_callable("FunctionalProblem", "inputs", self.inputs, "batch")


@dataclass(frozen=True)
class ParametricProblem:
    r"""A bilevel problem over parameters.

    .. math::
        \min_\omega L_{out}(\omega, \theta^*_\omega) \quad\text{with}\quad
        \theta^*_\omega = \arg\min_\theta L_{in}(\omega, \theta)

    Arguments:
        inner_objective: `(outer_params, inner_params, inner_batch) -> scalar`.
        outer_objective: `(outer_params, inner_params, outer_batch) -> scalar`.
        has_aux: whether both objectives return `(scalar, aux)`; see `FunctionalProblem`.
        axis_name: see `FunctionalProblem`.

    Raises:
        TypeError: an objective is not callable.

    Example: the penalty of a ridge regression.
        >>> import jax.numpy as jnp, funcbilevel as fb
        >>> def inner(log_penalty, w, batch):
        ...     x, y = batch
        ...     return jnp.mean((x @ w - y) ** 2) + jnp.exp(log_penalty) * jnp.sum(w**2)
        >>> def outer(log_penalty, w, batch):
        ...     x, y = batch
        ...     return jnp.mean((x @ w - y) ** 2)
        >>> problem = fb.ParametricProblem(inner, outer)
    """

    inner_objective: Objective
    outer_objective: Objective
    has_aux: bool = False
    axis_name: str | None = None

    def __repr__(self) -> str:
        return fields_that_differ(self)

    def __post_init__(self) -> None:
        for name in ("inner_objective", "outer_objective"):
            check_callable("ParametricProblem", name, getattr(self, name), "outer_params, inner_params, batch")


Problem: TypeAlias = FunctionalProblem | ParametricProblem


def parametrize(
    problem: FunctionalProblem, model: Model, model_state: ModelState = (), inner_batch: Batch = None
) -> ParametricProblem:
    """The parametric problem theta -> L(omega, h_theta(x), batch) of a functional one.

    Arguments:
        problem: the functional problem.
        model: the prediction model, used in evaluation mode.
        model_state: its non-trainable state (batch statistics and the like), held fixed.
        inner_batch: for a model with a linear head (`variable_projection`), the batch on which the outer objective's
            head is solved for. The inner objective then holds the head's ridge term as well.

    Returns:
        A `ParametricProblem`, for estimators and solvers that differentiate through parameters.

    Raises:
        TypeError: `problem` is not a `FunctionalProblem` or `model` not a `Model`.
        ValueError: a model with a head, and no `inner_batch`.

    Example:
        >>> parametric = fb.parametrize(problem, model)  # doctest: +SKIP
    """
    if not isinstance(problem, FunctionalProblem):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"parametrize: problem must be a FunctionalProblem, got {type(problem).__name__}.")
    if not isinstance(model, Model):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"parametrize: model must be an fb.Model, got {type(model).__name__}; "
            "make one with fb.from_function, fb.from_linen or fb.from_nnx."
        )

    if model.head is not None and inner_batch is None:
        raise ValueError(
            "parametrize: inner_batch is None, but the model has a linear head, whose solution enters the outer "
            "objective; pass the inner batch."
        )

    def inner_objective(outer_params: OuterParams, inner_params: InnerParams, batch: Batch) -> Any:
        features, _ = model.apply(inner_params, model_state, problem.inputs(batch))
        if model.head is None:
            return problem.inner_objective(outer_params, features, batch)
        V = solve_head(problem, model, outer_params, features, batch)
        value = _at_optimal_head(problem, model.head.ridge)(outer_params, features, V, batch)
        return (value, problem.inner_objective(outer_params, features @ V, batch)[1]) if problem.has_aux else value

    def outer_objective(outer_params: OuterParams, inner_params: InnerParams, batch: Batch) -> Any:
        h = predictor(problem, model, outer_params, inner_params, inner_batch, model_state)
        return problem.outer_objective(outer_params, h(problem.inputs(batch)), batch)

    return ParametricProblem(inner_objective, outer_objective, problem.has_aux, problem.axis_name)


def as_parametric(
    problem: Problem, model: Model | None, model_state: ModelState, inner_batch: Batch
) -> ParametricProblem:
    """`problem` as the parametric estimators see it, with the model's state held fixed."""
    if isinstance(problem, ParametricProblem):
        return problem
    assert model is not None
    return parametrize(problem, model, model_state, inner_batch)


@dataclass(frozen=True)
class Predictor:
    """The function x -> h_theta(x), in evaluation mode.

    Attributes:
        head: V, [p, num_outputs], of a model from `variable_projection`; None for others.
    """

    apply: Callable[[Inputs], Prediction] = field(repr=False)
    head: jax.Array | None = None

    def __repr__(self) -> str:
        return fields_that_differ(self)

    def __call__(self, inputs: Inputs) -> Prediction:
        """The prediction on `inputs`, leaves [n, ...]."""
        return self.apply(inputs) if self.head is None else self.apply(inputs) @ self.head


def predictor(
    problem: FunctionalProblem,
    model: Model,
    outer_params: OuterParams,
    inner_params: InnerParams,
    inner_batch: Batch,
    model_state: ModelState = (),
) -> Predictor:
    """The fitted function h: inputs -> prediction, in evaluation mode.

    For a model of `variable_projection` this solves for the head V on the inner batch, once; for others it is
    `model.apply` at these parameters, and `outer_params` and `inner_batch` play no part.

    Arguments:
        problem, model: as given to `bilevel`.
        outer_params: omega (with an `outer_model`: its output on `inner_batch`).
        inner_params, model_state: as they stand in `BilevelState`.
        inner_batch: the batch on which the head is solved for.

    Example: the head that a regression on one feature solves for.
        >>> import jax.numpy as jnp, funcbilevel as fb
        >>> features = fb.from_function(lambda key, x: jnp.ones((1, 1)), lambda theta, x: x @ theta)
        >>> model = fb.variable_projection(features, num_outputs=1)
        >>> problem = fb.FunctionalProblem(
        ...     lambda w, v, batch: jnp.mean((v - w * batch[0]) ** 2), lambda w, v, batch: jnp.mean(v**2)
        ... )
        >>> batch = (jnp.array([[1.0], [2.0]]),)
        >>> h = fb.predictor(problem, model, 3.0, jnp.ones((1, 1)), batch)
        >>> [round(float(x), 4) for x in (h.head[0, 0], h(jnp.array([[5.0]]))[0, 0])]
        [3.0, 15.0]
    """

    def apply(inputs: Inputs) -> Prediction:
        return model.apply(inner_params, model_state, inputs)[0]

    if model.head is None:
        return Predictor(apply)
    return Predictor(apply, solve_head(problem, model, outer_params, apply(problem.inputs(inner_batch)), inner_batch))


def solve_head(
    problem: FunctionalProblem, model: Model, outer_params: OuterParams, phi: jax.Array, inner_batch: Batch
) -> jax.Array:
    """V = argmin L_in(omega, phi V) + ridge/2 |V|^2, [p, k], for an L_in that is quadratic in the prediction."""
    assert model.head is not None
    zero = phi @ jnp.zeros((phi.shape[1], model.head.num_outputs), phi.dtype)  # sharded as the samples are
    g, C = inner_derivatives(problem, outer_params, zero, inner_batch)  # d_v L_in(omega, v) = g + C v
    mean = partial(mean_over_devices, problem)
    # The outer mean is for the derivative: the solve's transpose takes cotangents that are alike on all devices.
    return mean(model.head.fit(C, -mean(moments(phi, g)), phi, zero, mean)).astype(phi.dtype)


def _at_optimal_head(problem: FunctionalProblem, ridge: float) -> Callable[..., jax.Array]:
    """(omega, phi, V, batch) -> L_in(omega, phi V) + ridge/2 |V|^2 at the V that minimises it.

    Its derivative in V is zero there, so that the first derivative is the partial one, with V held fixed; further
    derivatives see V move. Plain differentiation would say the same, and solve for V's derivative in vain.
    """

    def value(outer_params: OuterParams, phi: jax.Array, V: jax.Array, batch: Batch) -> jax.Array:
        return inner_value(problem, outer_params, phi @ V, batch)[0] + ridge_term(ridge, V)

    def partial_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        omega, phi, V, batch = primals
        d_omega, d_phi, _, d_batch = tangents
        return jax.jvp(
            lambda omega, phi, batch: value(omega, phi, V, batch), (omega, phi, batch), (d_omega, d_phi, d_batch)
        )

    at_optimum = jax.custom_jvp(value)
    at_optimum.defjvp(partial_jvp)
    return at_optimum


def ridge_term(ridge: float, V: jax.Array | None) -> jax.Array:
    """ridge/2 |V|^2, the head's part of the inner objective."""
    return 0.5 * ridge * tree_vdot(V, V)


# The derivatives. `u` is the prediction (functional problem) or inner_params (parametric problem).


def inner_value(problem: Problem, outer_params: OuterParams, u: PyTree, batch: Batch) -> tuple[jax.Array, Metrics]:
    """L_in(omega, u) and its aux as flat metrics."""
    return _evaluate(problem, "inner", outer_params, u, batch)


def outer_value(problem: Problem, outer_params: OuterParams, u: PyTree, batch: Batch) -> tuple[jax.Array, Metrics]:
    """L_out(omega, u) and its aux as flat metrics."""
    return _evaluate(problem, "outer", outer_params, u, batch)


def outer_derivatives(
    problem: Problem, outer_params: OuterParams, u: PyTree, batch: Batch
) -> tuple[jax.Array, Metrics, OuterParams, PyTree]:
    """L_out, its aux, g_exp = d_omega L_out and d = d_u L_out at (omega, u)."""
    (value, aux), (g_exp, d) = jax.value_and_grad(
        lambda omega, u: outer_value(problem, omega, u, batch), argnums=(0, 1), has_aux=True
    )(outer_params, u)
    # A prediction belongs to one device's samples, parameters to all devices.
    d = mean_over_devices(problem, d) if isinstance(problem, ParametricProblem) else d
    return value, aux, g_exp, d


def inner_derivatives(problem: Problem, outer_params: OuterParams, u: PyTree, batch: Batch) -> tuple[PyTree, LinearMap]:
    """d_u L_in(omega, u), and C = d^2_u L_in(omega, u) as a linear map t -> C[t], linearised once.

    In a functional problem this acts on predictions: no product with a parameter-space Hessian is formed. The map is
    the forward derivative of the gradient; or its reverse derivative (C is symmetric), at twice the time, where the
    objective calls a `jax.custom_vjp` function, which has no forward derivative.
    """

    def value(u: PyTree) -> jax.Array:
        return inner_value(problem, outer_params, u, batch)[0]

    if reverse_only(value, u):
        gradient, pull = jax.vjp(jax.grad(value), u)
        curvature: LinearMap = lambda t: pull(t)[0]  # noqa: E731
    else:
        gradient, curvature = jax.linearize(jax.grad(value), u)
    if isinstance(problem, FunctionalProblem):
        return gradient, curvature
    return mean_over_devices(problem, gradient), lambda t: mean_over_devices(problem, curvature(t))


def inner_cross_derivative(
    problem: Problem, outer_params: OuterParams, u: PyTree, batch: Batch, direction: PyTree
) -> OuterParams:
    """d_omega <d_u L_in(omega, u), direction>: one forward derivative in u, one reverse in omega; or two reverse."""

    def value(omega: OuterParams, u: PyTree) -> jax.Array:
        return inner_value(problem, omega, u, batch)[0]

    if reverse_only(value, outer_params, u):
        _, pull = jax.vjp(lambda omega: jax.grad(value, argnums=1)(omega, u), outer_params)
        return pull(direction)[0]
    return jax.grad(lambda omega: jax.jvp(lambda u: value(omega, u), (u,), (direction,))[1])(outer_params)


def stationarity(norm: jax.Array, product_norm: jax.Array) -> Metrics:
    """How far the inner point is from stationary, from |g|, g = d_theta L_in, and |H theta|, H its Hessian.

    `inner_gradient_norm` is |g|. `inner_gradient_relative` is |g| / (|g| + |H theta|), between 0 and 1: of a quadratic
    objective g = H theta - b, the gradient over the size of its terms.
    """
    terms = norm + product_norm
    return {"inner_gradient_norm": norm, "inner_gradient_relative": norm / jnp.where(terms > 0, terms, 1.0)}


def mean_over_devices(problem: Problem, tree: PyTree) -> PyTree:
    """The mean over the problem's mapped axis, if it has one."""
    return tree if problem.axis_name is None else jax.lax.pmean(tree, problem.axis_name)


def training_value_and_grad(
    problem: Problem, model: Model | None, outer_params: OuterParams, batch: Batch
) -> Callable[[InnerParams, ModelState, Key | None], tuple[tuple[jax.Array, tuple[Metrics, ModelState]], InnerParams]]:
    """theta -> L_in and d_theta L_in with the model in train mode, and the model state that this pass leaves behind.

    Of a model with a linear head, at the head's optimum V: its derivative in V is zero there, so that d_theta is the
    partial derivative with V held fixed (the variable projection of Golub and Pereyra), whatever moves V.
    """

    def objective(
        inner_params: InnerParams, model_state: ModelState, key: Key | None
    ) -> tuple[jax.Array, tuple[Metrics, ModelState]]:
        if isinstance(problem, FunctionalProblem):
            assert model is not None
            u, model_state = model.apply(inner_params, model_state, problem.inputs(batch), train=True, key=key)
        else:
            u = inner_params
        value, aux = inner_value(problem, outer_params, u, batch)
        return value, (aux, model_state)

    def value_and_grad(
        inner_params: InnerParams, model_state: ModelState, key: Key | None
    ) -> tuple[tuple[jax.Array, tuple[Metrics, ModelState]], InnerParams]:
        value_and_aux, grad = jax.value_and_grad(objective, has_aux=True)(inner_params, model_state, key)
        return value_and_aux, mean_over_devices(problem, grad)

    def projected_value_and_grad(
        inner_params: InnerParams, model_state: ModelState, key: Key | None
    ) -> tuple[tuple[jax.Array, tuple[Metrics, ModelState]], InnerParams]:
        assert isinstance(problem, FunctionalProblem)
        assert model is not None
        assert model.head is not None
        inputs, apply = problem.inputs(batch), model.apply
        phi, pull, model_state = jax.vjp(
            lambda theta: apply(theta, model_state, inputs, train=True, key=key), inner_params, has_aux=True
        )
        V = solve_head(problem, model, outer_params, phi, batch)
        (value, aux), grad_v = jax.value_and_grad(lambda v: inner_value(problem, outer_params, v, batch), has_aux=True)(
            phi @ V
        )
        (grad,) = pull(grad_v @ V.T)
        value = value + ridge_term(model.head.ridge, V)
        return (value, (aux, model_state)), mean_over_devices(problem, grad)

    return value_and_grad if model is None or model.head is None else projected_value_and_grad


def _evaluate(
    problem: Problem, level: str, outer_params: OuterParams, u: PyTree, batch: Batch
) -> tuple[jax.Array, Metrics]:
    name = f"{level}_objective"
    objective: Objective = getattr(problem, name)
    output = objective(outer_params, u, batch)
    aux = None
    if problem.has_aux:
        if not (isinstance(output, tuple) and len(output) == 2):  # pyright: ignore[reportUnknownArgumentType]
            raise TypeError(
                f"{name} must return (scalar, aux) because has_aux=True, got {_describe(output)}; "
                "return a pair, or set has_aux=False."
            )
        output, aux = output  # pyright: ignore[reportUnknownVariableType]
    if jax.tree.structure(output) != jax.tree.structure(0):
        hint = " For (scalar, aux) set has_aux=True." if isinstance(output, tuple) else " Return the value itself."
        raise TypeError(f"{name} must return a scalar, got {_describe(output)}.{hint}")
    try:
        value = jnp.asarray(output)
    except TypeError as error:
        raise TypeError(f"{name} must return a scalar, got {_describe(output)}.") from error
    if value.ndim != 0:
        raise ValueError(
            f"{name} must return a scalar, got shape {value.shape}; reduce it over the batch, for example with "
            "jnp.mean."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{name} must return a floating-point scalar, got dtype {value.dtype}; it is differentiated, so compute it "
            "from floating-point values without counting or comparing; of complex ones take a real function, such as "
            "jnp.abs(z) ** 2."
        )
    return value, scalar_metrics(level, aux)


def _describe(output: Any) -> str:
    if isinstance(output, jax.Array):
        return f"an array of shape {output.shape}"
    return f"{type(output).__name__} with tree structure {jax.tree.structure(output)}"
