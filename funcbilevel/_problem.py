"""The two kinds of bilevel problem and the derivatives that every estimator is made of.

In the formulas u stands for what the objectives see of the lower level: the prediction v in a functional
problem, inner_params theta in a parametric one. The same four functions serve both.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_callable
from funcbilevel._described import fields_that_differ
from funcbilevel._tracing import reverse_only
from funcbilevel._tree import scalar_metrics
from funcbilevel._typing import (
    Batch,
    Inputs,
    LinearMap,
    Metrics,
    Objective,
    OuterParams,
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


def stationarity(norm: jax.Array, size: jax.Array, scale: jax.Array) -> Metrics:
    """How far the inner point is from stationary: |d_theta L_in|, and `size` / (`size` + `scale`), between 0 and 1.

    `size` is that of the gradient, or of the part of it that matters, and `scale` that of the terms that cancel in it
    where it vanishes. An estimator takes both from what it has at hand: they must not cost a pass through a network.
    """
    terms = size + scale
    return {"inner_gradient_norm": norm, "inner_gradient_relative": size / jnp.where(terms > 0, terms, 1.0)}


def mean_over_devices(problem: Problem, tree: PyTree) -> PyTree:
    """The mean over the problem's mapped axis, if it has one."""
    return tree if problem.axis_name is None else jax.lax.pmean(tree, problem.axis_name)


def reduce_over_devices(problem: Problem, metrics: Metrics) -> Metrics:
    """Metrics over all devices of the problem's mapped axis: means, and whether a flag is true on every one."""

    def reduce(x: jax.Array) -> jax.Array:
        if x.dtype != jnp.bool_:
            return mean_over_devices(problem, x)
        return mean_over_devices(problem, x.astype(jnp.float32)) == 1.0

    return metrics if problem.axis_name is None else jax.tree.map(reduce, metrics)


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
