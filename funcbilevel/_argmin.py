"""The inner solution as a function of omega, with its derivative: a layer inside any larger loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from funcbilevel._arguments import as_float_tree
from funcbilevel._check import check_prediction, check_setup, problem_inputs, warn_of_ignored
from funcbilevel._estimator import Adjoint, AdjointSystem, Estimator, Layer
from funcbilevel._fit import FitState
from funcbilevel._implicit import directional, explicit, not_differentiated, root, with_tangent
from funcbilevel._linear_solvers import LinearSolver
from funcbilevel._model import Model
from funcbilevel._predictor import Predictor, as_parametric, predictor
from funcbilevel._problem import Problem, inner_derivatives, inner_value
from funcbilevel._tracing import dependence
from funcbilevel._typing import Batch, InnerParams, Inputs, ModelState, OuterParams, Prediction, PyTree


def argmin(problem: Problem, model: Model | None, estimator: Estimator) -> Callable[..., Any]:
    r"""The inner solution, found by whoever, as a differentiable function of outer_params.

    Its value is the one that it is given; its derivative that of the minimiser of the inner objective, by `estimator`:

    - `aid` and `prox_aid`, for theta: :math:`\partial\theta^*_\omega = -(\partial^2_\theta L_{in} + \delta I)^{-1}
      \partial_\omega\partial_\theta L_{in}`;
    - `funcid`, for the function h: where a cotangent d arrives at :math:`h^*_\omega(x)`, the adjoint a is fitted to
      (C, d), and omega gets :math:`\partial_\omega\langle \partial_v L_{in}(\omega, v_P), a(x_P)\rangle`. Its transpose
      is the forward derivative, :math:`-\,C^{-1}\partial_\omega\partial_v L_{in}` in the adjoint's class of functions.

    Forward and reverse mode, of any order, under `jit` and `vmap`; by omega, and by whatever else the inner objective
    sees, in arguments or in closures: the inner batch too (but with `funcid` not by the inputs in it, which raises an
    error). A loss may use the result as often as it likes, the function on as many inputs: cotangents add up.

    A learned adjoint (any whose `linear` is false) is fitted in the backward pass, to the cotangent that arrives: it
    has no forward mode, which JAX refuses with an error that speaks of `custom_vjp`, and no second derivative, which
    raises one. Its network starts from the same draw every time. With a pointwise adjoint the function may be called on
    the inputs of inner_batch alone; on others of the same shape the derivative is NaN.

    Arguments:
        problem: `FunctionalProblem` or `ParametricProblem`, of which only the inner objective plays a part; without
            `axis_name`.
        model: the prediction model; None with a `ParametricProblem`.
        estimator: `aid(...)`, `prox_aid(...)` or `funcid(...)`.

    Returns:
        A function `(outer_params, inner_params, inner_batch, model_state=())`. With a `ParametricProblem` it gives
        inner_params; with a `FunctionalProblem` a `Predictor`, in evaluation mode, to be called on any inputs.

    Raises:
        TypeError, ValueError: the three do not go together, or the estimator has no layer (`itd`, `alternating`, ...).

    Example: the derivative of a ridge regression's weights, and of a validation loss.
        >>> import jax, jax.numpy as jnp, funcbilevel as fb
        >>> x, y = jnp.eye(3), jnp.arange(3.0)
        >>> def inner(penalty, w, batch):
        ...     return jnp.sum((batch[0] @ w - batch[1]) ** 2) + penalty * jnp.sum(w**2)
        >>> ridge = fb.argmin(fb.ParametricProblem(inner, inner), None, fb.aid(fb.cg(3)))
        >>> w = y / (1 + 0.5)
        >>> jax.jacobian(lambda penalty: ridge(penalty, w, (x, y)))(0.5).round(4).tolist()
        [0.0, -0.4444, -0.8889]

    References:
        Petrulionyte, Mairal, Arbel, NeurIPS 2024, https://arxiv.org/abs/2403.20233, proposition 3.2;
        Rajeswaran, Finn, Kakade, Levine, NeurIPS 2019, https://arxiv.org/abs/1909.04630 (implicit MAML).
    """
    check_setup("argmin", problem, model, estimator)
    layer = estimator.layer
    if layer is None:
        raise TypeError(
            f"argmin: {estimator!r} does not say what the derivative of the inner solution is; use fb.aid(...), "
            "fb.prox_aid(...) or fb.funcid(...)."
        )
    if problem.axis_name is not None:
        raise ValueError(
            f"argmin: problem.axis_name is {problem.axis_name!r}, but a layer cannot tell whose cotangents arrive; "
            "leave axis_name out and shard the batches under jit."
        )

    def solution(
        outer_params: OuterParams, inner_params: InnerParams, inner_batch: Batch, model_state: ModelState = ()
    ) -> Any:
        inner_params = as_float_tree("argmin", "inner_params", inner_params)
        lower = jax.lax.stop_gradient((inner_params, model_state))
        return layer(problem, model, outer_params, *lower, inner_batch)

    return solution


def parametric_layer(solve: Callable[..., InnerParams]) -> Layer:
    """The layer of an estimator that moves theta; solve(problem, outer_params, theta, batch) gives it the derivative.

    `problem` is parametric there, and theta holds only the leaves that its inner objective sees.
    """

    def layer(
        problem: Problem,
        model: Model | None,
        outer_params: OuterParams,
        inner_params: InnerParams,
        model_state: ModelState,
        inner_batch: Batch,
        /,
    ) -> Any:
        parametric = as_parametric(problem, model, model_state, inner_batch)
        theta = solve(parametric, outer_params, inner_params, inner_batch)
        if model is None:
            return theta
        return predictor(problem, model, outer_params, theta, inner_batch, model_state)

    return layer


def root_layer(solver: LinearSolver) -> Layer:
    """theta as a stationary point of the inner objective."""

    def solve(problem: Problem, outer_params: OuterParams, theta: InnerParams, batch: Batch) -> InnerParams:
        (seen,), _ = dependence(lambda theta: inner_value(problem, outer_params, theta, batch)[0], theta)
        warn_of_ignored("argmin", seen)

        def part(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda x, s: x if s else None, tree, seen)

        def whole(part: PyTree) -> PyTree:
            leaves = iter(jax.tree.leaves(part))
            return jax.tree.map(lambda x, s: next(leaves) if s else x, theta, seen)

        def gradient(some: PyTree) -> PyTree:
            value = lambda theta: inner_value(problem, outer_params, theta, batch)[0]  # noqa: E731
            return part(jax.grad(value)(whole(some)))

        return whole(root("argmin", gradient, part(theta), solver))

    return parametric_layer(solve)


def function_layer(adjoint: Adjoint) -> Layer:
    """The function h*_omega, by FuncID's adjoint."""

    def layer(
        problem: Any,
        model: Any,
        outer_params: OuterParams,
        inner_params: InnerParams,
        model_state: ModelState,
        inner_batch: Batch,
        /,
    ) -> Predictor:
        h = predictor(problem, model, *jax.lax.stop_gradient((outer_params, inner_params, inner_batch)), model_state)
        x_P = problem_inputs("argmin", problem, inner_batch, "inner_batch")
        v_P = h(jax.lax.stop_gradient(x_P))
        check_prediction("argmin", "prediction", v_P, x_P, "inner_batch")

        def inner_gradient(v: Prediction) -> Prediction:
            return inner_derivatives(problem, outer_params, v, inner_batch)[0]

        G, seen = explicit(inner_gradient, v_P)  # d_v L_in(omega, v) is G(seen, v)
        state = adjoint.init(jax.random.key(0), problem, model, FitState(inner_params, (), model_state), inner_batch)
        still = not_differentiated(_OF_INPUTS, x_P)
        operands = _Operands(seen, still, v_P, inner_params, model_state, state)

        def fitted(operands: _Operands, v_P: Prediction, x: Inputs, d: Prediction) -> Prediction:
            """a(x_P)."""
            _, C = jax.linearize(lambda v: G(operands.seen, v), v_P)
            system = AdjointSystem(C, d, v_P, operands.x_P, x, lambda tree: tree)
            inner = FitState(operands.theta, (), operands.model_state)
            a_P, _, metrics = adjoint.fit(system, model, inner, operands.state, jax.random.key(0))
            right = metrics.get("adjoint_inputs_match", True)
            return jax.tree.map(lambda a: jnp.where(right, a, jnp.nan), a_P)

        def push(v: Prediction, at: tuple[_Operands, Inputs], tangents: tuple[_Operands, Inputs]) -> Prediction:
            (operands, x), (dots, _) = at, tangents
            zero = jax.tree.map(jnp.zeros_like, v)
            if all(isinstance(t, SymbolicZero) for t in dots.seen):
                return zero
            v_P = with_tangent(operands.v_P, (operands, operands.x_P), push)
            rhs = directional(lambda seen: G(seen, v_P), operands.seen, dots.seen)
            # d -> a(x_P) is linear, and its transpose the forward derivative.
            _, transpose = jax.vjp(lambda d: fitted(operands, v_P, x, d), zero)
            return transpose(rhs)[0]

        @jax.custom_vjp
        def in_reverse(v: Prediction, operands: _Operands, x: Inputs) -> Prediction:
            del operands, x
            return v

        def forwards(v: Prediction, operands: _Operands, x: Inputs) -> tuple[Prediction, Any]:
            return v, (operands, x)

        def backwards(at: tuple[_Operands, Inputs], d: Prediction) -> tuple[Any, ...]:
            (operands, x), d = not_differentiated(_TWICE, (at, d))
            _, pull = jax.vjp(lambda seen: G(seen, operands.v_P), operands.seen)
            (of_seen,) = pull(fitted(operands, operands.v_P, x, d))
            return None, _Operands(of_seen, *[None] * 5), None

        in_reverse.defvjp(forwards, backwards)

        def h_star(x: Inputs) -> Prediction:
            v = h(x)
            fixed = jax.lax.stop_gradient(v)
            moving = with_tangent(fixed, (operands, x), push) if adjoint.linear else in_reverse(fixed, operands, x)
            # h moves with x, and with omega.
            return jax.tree.map(lambda v, moving, fixed: v + (moving - fixed), v, moving, fixed)

        return Predictor(h_star)

    return layer


class _Operands(NamedTuple):
    """What the function's derivative is made of: all that JAX has to know of."""

    seen: list[Any]
    x_P: Inputs
    v_P: Prediction
    theta: InnerParams
    model_state: ModelState
    state: PyTree


_OF_INPUTS = (
    "argmin: the inputs of inner_batch are differentiated, but in function space the inner solution has no derivative "
    "by them; stop it with jax.lax.stop_gradient, or use fb.aid."
)
_TWICE = (
    "argmin: a learned adjoint has no second derivative, since it is fitted to the cotangent of the first; use "
    "fb.linear_adjoint, fb.pointwise_adjoint or fb.aid."
)
