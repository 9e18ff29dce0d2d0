"""The inner solution as a function of omega, with its derivative: a layer inside any larger loss."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from funcbilevel._arguments import as_float_tree
from funcbilevel._check import check_prediction, check_setup, leaves_seen, problem_inputs
from funcbilevel._estimator import Adjoint, AdjointSystem, Estimator, Layer
from funcbilevel._fit import FitState
from funcbilevel._implicit import directional, explicit, not_differentiated, root, with_tangent
from funcbilevel._linear_solvers import LinearSolver
from funcbilevel._model import Model
from funcbilevel._predictor import Predictor, as_parametric, predictor
from funcbilevel._problem import Problem, inner_derivatives, inner_value
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

    A learned adjoint (any without `coefficients`) is fitted in the backward pass, to the cotangent that arrives: it
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

    Example: the derivative of a ridge regression's weights.
        >>> import jax, jax.numpy as jnp, funcbilevel as fb
        >>> x, y = jnp.eye(3), jnp.arange(3.0)
        >>> def inner(penalty, w, batch):
        ...     return jnp.sum((batch[0] @ w - batch[1]) ** 2) + penalty * jnp.sum(w**2)
        >>> ridge = fb.argmin(fb.ParametricProblem(inner, inner), None, fb.aid(fb.cg(3)))
        >>> w = y / (1 + 0.5)
        >>> bool(jnp.allclose(jax.jacobian(lambda penalty: ridge(penalty, w, (x, y)))(0.5), -w / (1 + 0.5)))
        True

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
    """The layer of an estimator that moves theta: solve(parametric problem, outer_params, theta, batch) does."""

    def layer(
        problem: Any,
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
        seen = leaves_seen("argmin", problem, outer_params, theta, batch)

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
        still = not_differentiated(_OF_INPUTS, x_P)
        inner = FitState(inner_params, (), model_state)
        if adjoint.coefficients is None:
            state = adjoint.init(jax.random.key(0), problem, model, inner, inner_batch)
            moving = _in_reverse(adjoint, model, G, _Operands(seen, still, v_P, inner, state))
        else:
            moving = _in_class(adjoint, G, _Operands(seen, still, v_P, inner, ()))
        return Predictor(lambda x: moving(h(x), x))

    return layer


class _Operands(NamedTuple):
    """What the function's derivative is made of: all that JAX has to know of."""

    seen: list[Any]
    x_P: Inputs
    v_P: Prediction
    inner: FitState
    state: PyTree


# (v, x) -> v = h(x), which moves with omega as well as with x.
_Moving: TypeAlias = Callable[[Prediction, Inputs], Prediction]


def _system(G: Callable[..., Prediction], operands: _Operands, v_P: Prediction, x: Inputs, d: Prediction) -> Any:
    _, C = jax.linearize(lambda v: G(operands.seen, v), v_P)
    return AdjointSystem(C, d, v_P, operands.x_P, x, lambda tree: tree)


def _in_class(adjoint: Adjoint, G: Callable[..., Prediction], operands: _Operands) -> _Moving:
    """h + the class's function of coefficients W, which are zero and have the derivative -C^-1 d_omega G in the class.

    (C, d) -> W takes this forward derivative as it takes the adjoint, with d_omega G on x_P in place of d on x_Q.
    """
    assert adjoint.coefficients is not None
    assert adjoint.evaluate is not None
    coefficients, evaluate = adjoint.coefficients, adjoint.evaluate

    def moved(v: Prediction, W: PyTree, operands: _Operands, x: Inputs) -> Prediction:
        values = evaluate(W, operands.inner, operands.x_P, x)
        return jax.tree.map(lambda v, a: v + a.astype(v.dtype), v, values)

    def push(W: PyTree, operands: _Operands, tangents: _Operands) -> PyTree:
        if all(isinstance(t, SymbolicZero) for t in tangents.seen):
            return jax.tree.map(jnp.zeros_like, W)
        v_P = moved(operands.v_P, W, operands, operands.x_P)
        rhs = directional(lambda seen: G(seen, v_P), operands.seen, tangents.seen)

        def solve(d: Prediction) -> PyTree:
            return coefficients(_system(G, operands, v_P, operands.x_P, d), operands.inner)

        # Linear in d, if not in the eyes of JAX.
        return jax.jvp(solve, (jax.tree.map(jnp.zeros_like, rhs),), (rhs,))[1]

    like = jax.eval_shape(
        lambda: coefficients(_system(G, operands, operands.v_P, operands.x_P, operands.v_P), operands.inner)
    )
    W = with_tangent(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), operands, push)
    return lambda v, x: moved(v, W, operands, x)


def _in_reverse(adjoint: Adjoint, model: Any, G: Callable[..., Prediction], operands: _Operands) -> _Moving:
    """The adjoint is fitted to the cotangent that arrives."""

    @jax.custom_vjp
    def at(v: Prediction, operands: _Operands, x: Inputs) -> Prediction:
        del operands, x
        return v

    def forwards(v: Prediction, operands: _Operands, x: Inputs) -> tuple[Prediction, Any]:
        return v, (operands, x)

    def backwards(residuals: tuple[_Operands, Inputs], d: Prediction) -> tuple[Any, ...]:
        (operands, x), d = not_differentiated(_TWICE, (residuals, d))
        system = _system(G, operands, operands.v_P, x, d)
        a_P, _, _ = adjoint.fit(system, model, operands.inner, operands.state, jax.random.key(0))
        _, pull = jax.vjp(lambda seen: G(seen, operands.v_P), operands.seen)
        return d, _Operands(pull(a_P)[0], None, None, None, None), None  # pyright: ignore[reportArgumentType]

    at.defvjp(forwards, backwards)
    return lambda v, x: at(v, operands, x)


_OF_INPUTS = (
    "argmin: the inputs of inner_batch are differentiated, but in function space the inner solution has no derivative "
    "by them; stop it with jax.lax.stop_gradient, or use fb.aid."
)
_TWICE = (
    "argmin: a learned adjoint has no second derivative, since it is fitted to the cotangent of the first; use "
    "fb.linear_adjoint, fb.pointwise_adjoint or fb.aid."
)
