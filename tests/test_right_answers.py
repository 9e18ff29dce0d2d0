"""Situations in which users of this and other libraries got a wrong answer, or none: each with the right value."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest
from jax.experimental.ode import odeint

import funcbilevel as fb

KEY = jax.random.key(0)


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    """Both precisions, and the tolerance for each."""
    with jax.enable_x64(request.param == "float64"):
        yield 1e-4 if request.param == "float32" else 1e-10


# Objectives without a forward derivative.


@jax.custom_vjp
def square(r):
    return r**2


square.defvjp(lambda r: (r**2, r), lambda r, g: (2 * r * g,))


@jax.custom_vjp
def nested(r):
    """Its rules call other functions that have no forward derivative, as those of `odeint` do."""
    return square(r)


nested.defvjp(
    lambda r: (square(r), r), lambda r, g: (2 * g * r * square(jnp.sqrt(square(r) + 1.0)) / (square(r) + 1.0),)
)


def flow(r):
    """r^2, as twice the area under the solution of an ordinary differential equation."""
    t = jnp.array([0.0, 1.0])
    return odeint(lambda y, t, r: 2.0 * r**2 * t, jnp.zeros_like(r), t, r, rtol=1e-10, atol=1e-10)[-1]


REVERSE_ONLY: dict[str, Callable[[Any], Any]] = {
    "custom_vjp": square,
    "custom_vjp that calls another": nested,
    "odeint": flow,
    "in a scan": lambda r: jax.lax.scan(lambda c, _: (c + nested(r) / 2.0, None), jnp.zeros_like(r), None, length=2)[0],
    "in a branch": lambda r: jax.lax.cond(jnp.sum(r) > -1e3, nested, jnp.abs, r),
    "in a jitted function": jax.jit(nested),
    "rematerialised": jax.checkpoint(nested),
    "vmapped": jax.vmap(nested),
}
PARAMETRIC = {
    "cg": fb.aid(fb.cg(5)),
    "gmres": fb.aid(fb.gmres(5)),
    "lineax": fb.aid(lineax.LU()),
    "gradient-penalty": fb.gradient_penalty(optax.sgd(0.1), 3, 2.0),
    "value-penalty": fb.value_penalty(optax.sgd(0.1), 3, 2.0),
    "itd": fb.itd(3),
}


def curved(f: Callable[[Any], Any]) -> fb.ParametricProblem:
    """Inner minimum at theta = omega, with a curvature that is not one, and f wherever a square is."""
    return fb.ParametricProblem(
        lambda w, t, b: jnp.sum(f(t - w) * jnp.exp(0.3 * w)) + 0.5 * jnp.sum(f(t - w)) ** 2,
        lambda w, t, b: jnp.sum(f(t - 1.0) * w),
    )


def answer(problem: Any, estimator: fb.Estimator, w: Any, t: Any, **kwargs: Any) -> Any:
    return jax.jit(lambda w, t: fb.hypergradient(problem, None, estimator, w, t, 0, 0, **kwargs).gradient)(w, t)


@pytest.mark.parametrize("name", REVERSE_ONLY)
def test_reverse_only_objectives(x64, name):
    w = jnp.array([0.5, -0.2])
    expected = jax.grad(lambda w: jnp.sum((w - 1.0) ** 2 * w))(w)
    np.testing.assert_allclose(answer(curved(REVERSE_ONLY[name]), PARAMETRIC["cg"], w, w), expected, rtol=1e-8)


@pytest.mark.parametrize("method", PARAMETRIC)
def test_reverse_only_objectives_in_every_estimator(x64, method):
    w, t = jnp.array([0.5, -0.2]), jnp.array([0.4, 0.1])
    kwargs = {"inner_optimizer": optax.sgd(0.1)} if method == "itd" else {}
    got, expected = (answer(curved(f), PARAMETRIC[method], w, t, **kwargs) for f in (nested, jnp.square))
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_reverse_only_example(precision):
    problem = fb.ParametricProblem(lambda w, t, b: square(t - w), lambda w, t, b: (t - 1.0) ** 2)
    h = fb.hypergradient(problem, None, fb.aid(fb.cg(3)), 0.5, 0.5, 0, 0)
    np.testing.assert_allclose(h.gradient, -1.0, rtol=precision)


def functional(f: Callable[[Any], Any]) -> tuple[fb.FunctionalProblem, fb.Model]:
    """f in both objectives and in the model."""
    problem = fb.FunctionalProblem(
        lambda w, v, batch: jnp.mean(f(v - w * batch[1]) * batch[2]), lambda w, v, batch: jnp.mean(f(v - 1.0) * (1 + w))
    )
    return problem, fb.from_function(lambda key, x: jnp.ones(2), lambda theta, x: f(x[:, 0]) * theta[0] + theta[1])


@pytest.mark.parametrize("method", ["linear", "learned", "pointwise", "aid", "projected"])
def test_reverse_only_functional_problems(x64, method):
    x = jnp.linspace(-1.0, 2.0, 5)[:, None]
    batch = (x, jnp.sin(3.0 * x[:, 0]), jnp.linspace(0.5, 2.0, 5))

    def gradient(f: Callable[[Any], Any]) -> Any:
        problem, model = functional(f)
        features = lambda theta, x: jnp.concatenate([f(x), jnp.ones_like(x)], axis=1)
        theta: Any = jnp.array([0.3, 0.7])
        estimator = {
            "linear": lambda: fb.funcid(fb.linear_adjoint(features)),
            "learned": lambda: fb.funcid(fb.learned_adjoint(optax.sgd(0.1), 3)),
            "pointwise": lambda: fb.funcid(fb.pointwise_adjoint()),
            "aid": lambda: fb.aid(fb.cg(5)),
            "projected": fb.alternating,
        }[method]()
        if method == "projected":
            column = fb.from_function(lambda key, x: jnp.ones(1), lambda theta, x: f(x) * theta[None])
            model, theta = fb.variable_projection(column, 1), jnp.array([1.3])
            problem = fb.FunctionalProblem(
                lambda w, v, b: jnp.mean(f(v[:, 0] - w * b[1]) * b[2]),
                lambda w, v, b: jnp.mean(f(v[:, 0] - 1.0) * (1 + w)),
            )
        call = lambda w: fb.hypergradient(problem, model, estimator, w, theta, batch, batch, key=KEY).gradient
        return jax.jit(call)(0.5)

    np.testing.assert_allclose(gradient(nested), gradient(jnp.square), rtol=1e-9)


def test_forward_mode_of_a_reverse_only_objective_is_refused():
    with pytest.raises(ValueError, match=r'itd: mode is "forward".*custom_vjp.*mode="reverse"'):
        answer(curved(nested), fb.itd(2, mode="forward"), jnp.ones(2), jnp.ones(2), inner_optimizer=optax.sgd(0.1))


def test_second_derivatives_through_a_reverse_only_objective(x64):
    """Of F(w) = sum (w - 1)^2 w, whose hypergradient is itself differentiated in reverse."""
    total = lambda w: jnp.sum(answer(curved(nested), PARAMETRIC["cg"], w, w))
    plain = lambda w: jnp.sum(answer(curved(jnp.square), PARAMETRIC["cg"], w, w))
    w = jnp.array([0.5, -0.2])
    np.testing.assert_allclose(jax.grad(total)(w), jax.grad(plain)(w), rtol=1e-9)


def test_loops_of_unknown_length_under_itd():
    problem = fb.ParametricProblem(lambda w, t, b: jnp.sum((t - w) ** 2), lambda w, t, b: jnp.sum((t - 1.0) ** 2))
    call = lambda mode: answer(problem, fb.itd(3, mode=mode), jnp.zeros(2), jnp.ones(2), inner_optimizer=optax.lbfgs())
    with pytest.raises(ValueError, match=r'itd: mode is "reverse".*optax.lbfgs.*use mode="forward"'):
        call("reverse")
    np.testing.assert_allclose(call("forward"), -2.0, rtol=1e-3)  # theta_3 = omega, so F = |omega - 1|^2


# Classification through FuncID: blocks of curvature that are singular, with the gradient in their range.


def cross_entropy(q: Any, v: Any) -> Any:
    return -jnp.mean(jnp.sum(q * jax.nn.log_softmax(v, axis=-1), axis=-1))


def classification(k: int, n: int = 4) -> dict[str, Any]:
    """h*(x_i) = log q_i(w) up to a constant, so that F(w) is the cross-entropy of q(w) to other probabilities."""
    rng = np.random.default_rng(k)
    A, outer = jnp.asarray(rng.normal(size=(n, k, 3))), jax.nn.softmax(jnp.asarray(rng.normal(size=(n, k))), axis=-1)
    logits = lambda w: jnp.tanh(A @ w)
    w = jnp.asarray(0.5 * rng.normal(size=3))
    x = jnp.eye(n)
    return {
        "problem": fb.FunctionalProblem(
            lambda w, v, b: cross_entropy(jax.nn.softmax(logits(w), axis=-1), v),
            lambda w, v, b: cross_entropy(outer, v),
        ),
        "model": fb.from_function(lambda key, x: jnp.zeros((n, k)), lambda theta, x: x @ theta),
        "outer_params": w,
        "inner_params": logits(w) + 0.7,  # the constant that the loss does not see
        "inner_batch": (x,),
        "outer_batch": (x,),
        "F": lambda w: cross_entropy(outer, logits(w)),
    }


ADJOINTS = {
    "pointwise": fb.funcid(fb.pointwise_adjoint()),
    "linear": fb.funcid(fb.linear_adjoint(lambda theta, x: x)),
    "learned": fb.funcid(fb.learned_adjoint(optax.adam(optax.cosine_decay_schedule(0.3, 1500)), 1500)),
    "aid": fb.aid(fb.cg(50)),
}


@pytest.mark.parametrize("method", ADJOINTS)
@pytest.mark.parametrize("k", [2, 3, 7])
def test_classification(precision, method, k):
    case = classification(k)
    F = case.pop("F")
    h = jax.jit(lambda w: fb.hypergradient(**{**case, "outer_params": w}, estimator=ADJOINTS[method], key=KEY))(
        case["outer_params"]
    )
    expected = jax.grad(F)(case["outer_params"])
    error = jnp.linalg.norm(h.gradient - expected) / jnp.linalg.norm(expected)
    assert float(error) <= (1e-2 if method == "learned" else 10 * precision)
    assert bool(h.metrics["adjoint_finite"])
    assert bool(h.metrics.get("linear_converged", True))
    assert int(h.metrics.get("adjoint_inconsistent", 0)) == 0


def test_classification_example(precision):
    q = lambda w: jnp.stack([jax.nn.sigmoid(w), jax.nn.sigmoid(-w)])
    problem = fb.FunctionalProblem(
        lambda w, v, b: cross_entropy(q(w)[None], v), lambda w, v, b: cross_entropy(jnp.array([[0.0, 1.0]]), v)
    )
    v = jnp.tile(jnp.log(q(-1.0)), (4, 1))
    model = fb.from_function(lambda key, x: v, lambda theta, x: theta)
    batch = (jnp.ones((4, 1)),)
    h = fb.hypergradient(problem, model, fb.funcid(fb.pointwise_adjoint()), -1.0, v, batch, batch)
    np.testing.assert_allclose(h.gradient, 0.2689414213699951, rtol=precision)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_saturated_predictions_are_not_nan(k):
    """Where a probability is one in float32, curvature and gradient are zero, and so is the adjoint."""
    problem = fb.FunctionalProblem(
        lambda w, v, b: jnp.mean(jnp.sum(jax.nn.softplus(w * v) - b[1] * v, axis=1)),
        lambda w, v, b: jnp.mean(jnp.sum(jax.nn.softplus(v) - b[1] * v, axis=1)),
    )
    model = fb.from_function(lambda key, x: jnp.zeros((4, k)), lambda theta, x: theta)
    v = jnp.concatenate([jnp.full((2, k), 200.0), jnp.full((2, k), 0.3)])
    batch = (jnp.zeros((4, 1)), jnp.ones((4, k)))
    h = jax.jit(lambda v: fb.hypergradient(problem, model, ADJOINTS["pointwise"], 1.0, v, batch, batch))(v)
    assert np.isfinite(h.gradient)
    assert bool(h.metrics["adjoint_finite"])
    assert int(h.metrics["adjoint_inconsistent"]) == 0


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_inconsistent_blocks_are_counted(x64, k):
    """The inner objective does not see the last output of the first two samples, and the outer one does."""
    seen = jnp.ones((5, k)).at[:2, -1].set(0.0)
    problem = fb.FunctionalProblem(
        lambda w, v, b: jnp.mean(jnp.sum(seen * (v - w) ** 2, axis=1)), lambda w, v, b: jnp.mean(jnp.sum(v, axis=1))
    )
    model = fb.from_function(lambda key, x: jnp.zeros((5, k)), lambda theta, x: theta)
    batch = (jnp.zeros((5, 1)),)
    h = jax.jit(lambda v: fb.hypergradient(problem, model, ADJOINTS["pointwise"], 1.0, v, batch, batch))(
        jnp.ones((5, k))
    )
    assert int(h.metrics["adjoint_inconsistent"]) == 2
    assert not bool(h.metrics["linear_converged"])
    assert bool(h.metrics["adjoint_finite"])
    np.testing.assert_allclose(h.gradient, np.sum(seen) / 5, rtol=1e-12)  # of the outputs that are seen


@pytest.mark.parametrize("k", [2, 3])
def test_second_derivatives_through_singular_blocks(x64, k):
    case = classification(k)
    F, w = case.pop("F"), case.pop("outer_params")
    inner = lambda w: jnp.tanh(jnp.asarray(np.random.default_rng(k).normal(size=(4, k, 3))) @ w) + 0.7

    def gradient(w: Any) -> Any:
        h = fb.hypergradient(**{**case, "inner_params": inner(w)}, outer_params=w, estimator=ADJOINTS["pointwise"])
        return h.gradient

    np.testing.assert_allclose(jax.jit(jax.jacobian(gradient))(w), jax.hessian(F)(w), atol=1e-9)


# Inner points that are not stationary.


def least_squares(X: Any, y: Any) -> tuple[Any, Any]:
    return lambda t: 0.5 * jnp.mean((X @ t - y) ** 2), lambda t: jnp.mean((X @ t - 2.0 * y) ** 2)


def projected_gradient(loss: Any, project: Any, rate: float) -> Any:
    step = lambda t, _: (project(t - rate * jax.grad(loss)(t)), None)
    return jax.lax.scan(step, jnp.zeros(10), None, length=3000)[0]


def not_stationary(kind: str) -> tuple[fb.ParametricProblem, Any, Any]:
    rng = np.random.default_rng(0)
    X, y = jnp.asarray(rng.normal(size=(30, 10))), jnp.asarray(rng.normal(size=30))
    loss, outer = least_squares(X, y)
    rate = 1.0 / jnp.linalg.eigvalsh(X.T @ X / 30)[-1]
    if kind == "lasso":
        inner = lambda w, t, b: loss(t) + jnp.exp(w) * jnp.sum(jnp.abs(t))
        w = jnp.log(0.1 * jnp.max(jnp.abs(X.T @ y / 30)))
        shrink = lambda t: jnp.sign(t) * jnp.maximum(jnp.abs(t) - rate * jnp.exp(w), 0.0)
        theta = projected_gradient(loss, shrink, rate)
    elif kind == "non-negative least squares":
        inner = lambda w, t, b: 0.5 * jnp.mean((X @ t - w * y) ** 2)
        w, theta = jnp.array(1.0), projected_gradient(loss, lambda t: jnp.maximum(t, 0.0), rate)
    else:  # iMAML: a proximal term, and one step of gradient descent from the initialisation
        inner = lambda w, t, b: loss(t) + 0.5 * jnp.sum((t - w) ** 2)
        w = jnp.zeros(10)
        theta = w - 0.01 * jax.grad(loss)(w)
    return fb.ParametricProblem(inner, lambda w, t, b: outer(t)), w, theta


@pytest.mark.parametrize("estimator", ["cg", "gmres", "value-penalty"])
@pytest.mark.parametrize("kind", ["lasso", "non-negative least squares", "unconverged iMAML"])
def test_inner_points_that_are_not_stationary_are_reported(x64, kind, estimator):
    problem, w, theta = not_stationary(kind)
    with pytest.warns(UserWarning, match=r"not a stationary point.*inner_gradient_relative.*fb\.itd"):
        h = fb.hypergradient(problem, None, PARAMETRIC[estimator], w, theta, 0, 0)
    gradient = jax.grad(problem.inner_objective, argnums=1)(w, theta, 0)
    np.testing.assert_allclose(h.metrics["inner_gradient_norm"], jnp.linalg.norm(gradient), rtol=1e-10)
    assert float(h.metrics["inner_gradient_relative"]) > 0.01


EXACT = fb.linear_adjoint(lambda t, x: x)


@pytest.mark.parametrize("adjoint", [EXACT, fb.learned_adjoint(optax.sgd(0.1), 2)])
def test_functional_inner_points_that_are_not_stationary_are_reported(x64, adjoint):
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.normal(size=(20, 3))), jnp.asarray(rng.normal(size=20))
    problem = fb.FunctionalProblem(
        lambda w, v, b: jnp.mean((v - w * b[1]) ** 2), lambda w, v, b: jnp.mean((v - b[1]) ** 2)
    )
    model = fb.from_function(lambda key, x: jnp.zeros(3), lambda theta, x: x @ theta)
    solution = jnp.linalg.solve(x.T @ x, x.T @ y)  # noise stays: d_v L_in is not zero here, and d_theta L_in is

    def call(theta: Any) -> Any:
        return fb.hypergradient(problem, model, fb.funcid(adjoint), 1.0, theta, (x, y), (x, y), key=KEY)

    assert float(call(solution).metrics["inner_gradient_relative"]) < 1e-12
    with pytest.warns(UserWarning, match="not a stationary point"):
        h = call(0.9 * solution)
    gradient = jax.grad(lambda theta: jnp.mean((x @ theta - y) ** 2))(0.9 * solution)
    np.testing.assert_allclose(h.metrics["inner_gradient_norm"], jnp.linalg.norm(gradient), rtol=1e-10)
    # A tenth of the solution is missing; the exact adjoint lies along it, the fitted one nearly so.
    np.testing.assert_allclose(h.metrics["inner_gradient_relative"], 0.1, rtol=1e-10 if adjoint is EXACT else 0.1)


def test_a_solution_at_zero_is_stationary():
    """Where gradient and Hessian product vanish alike, their ratio is no NaN that would hold the step back."""
    problem = fb.ParametricProblem(lambda w, t, b: 0.5 * jnp.sum(t**2) - t @ w, lambda w, t, b: jnp.sum((t - 1.0) ** 2))
    h = fb.hypergradient(problem, None, fb.aid(fb.cg(2)), jnp.zeros(2), jnp.zeros(2), 0, 0)
    assert float(h.metrics["inner_gradient_relative"]) == 0.0
    assert bool(h.metrics["adjoint_finite"])
    np.testing.assert_allclose(h.gradient, -2.0 * np.ones(2), rtol=1e-6)


# Conjugate gradients where the Hessian is not positive definite.

SINGULAR = {"cg": fb.cg(20), "normal_cg": fb.normal_cg(20), "neumann": fb.neumann(2000, 0.3), "lineax": lineax.LU()}


@pytest.mark.parametrize("solver", [*SINGULAR, "gmres", "gradient_descent"])
def test_leaves_that_the_inner_objective_ignores_have_no_part_in_the_system(precision, solver):
    problem = fb.ParametricProblem(
        lambda w, t, b: jnp.sum((t["seen"] - w) ** 2 * jnp.array([1.0, 3.0])),
        lambda w, t, b: jnp.sum((t["seen"] - 1.0) ** 2) + jnp.sum(t["ignored"][0] * 5.0),
    )
    theta = {"seen": jnp.array([0.5, 0.5]), "ignored": [jnp.ones(3)]}
    estimator = fb.aid(SINGULAR.get(solver, fb.gmres(5) if solver == "gmres" else fb.gradient_descent(2000, 0.3)))
    with pytest.warns(UserWarning, match="inner objective does not depend on ignored/0 of inner_params"):
        h = fb.hypergradient(problem, None, estimator, 0.5, theta, 0, 0)
    np.testing.assert_allclose(h.gradient, -2.0, rtol=10 * precision)
    np.testing.assert_array_equal(h.state["ignored"][0], 0.0)
    assert bool(h.metrics["linear_converged"])


BREAKDOWNS = {
    "zero curvature": (np.diag([2.0, 0.0]), [1.0, 5.0]),
    "zero to rounding": (np.outer([1.0, 3.0, 2.0], [1.0, 3.0, 2.0]) / 7.0, [1.0, 0.3, -2.0]),
    "negative curvature": (np.diag([2.0, -3.0]), [1.0, 5.0]),
    "indefinite": (np.diag([2.0, -3.0, 1.0, 0.5]), [1.0, 0.1, 3.0, 1.0]),
    "all zero but a little": (np.diag([1e-3, 0.0, 0.0]), [1e-6, 1.0, 1.0]),
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", BREAKDOWNS)
def test_cg_stops_at_a_breakdown_with_its_best_iterate(precision, name, warm):
    A, b = (jnp.asarray(x, jnp.result_type(float)) for x in BREAKDOWNS[name])
    problem = fb.ParametricProblem(lambda w, t, _: 0.5 * (t - w) @ A @ (t - w), lambda w, t, _: b @ t)
    point = jnp.ones_like(b)
    state = 0.01 * b if warm else jnp.zeros_like(b)
    h = jax.jit(lambda: fb.hypergradient(problem, None, fb.aid(fb.cg(50)), point, point, 0, 0, state=state))()
    start = jnp.linalg.norm(b - A @ state) / jnp.linalg.norm(b)
    assert float(h.metrics["linear_residual"]) <= float(start) * (1.0 + 1e-6)
    assert not bool(h.metrics["linear_converged"])
    assert float(jnp.max(jnp.abs(h.state))) < 1e4  # no division by rounding errors
    assert bool(h.metrics["adjoint_finite"])


# Half precision, mixed precision, and numbers near the ends of a dtype.

SOLVERS = {
    "cg": fb.cg(20),
    "normal_cg": fb.normal_cg(40),
    "gmres": fb.gmres(10),
    "neumann": fb.neumann(500, 0.5),
    "gradient_descent": fb.gradient_descent(500, 0.5),
    "lineax-cg": lineax.CG(1e-3, 1e-6),
    "lineax-gmres": lineax.GMRES(1e-6, 1e-6),
    "lineax-lu": lineax.LU(),
}
H = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 0.75]])


def quadratic(scale: float, inner_dtypes: list[Any], outer_dtype: Any) -> Any:
    """F(w) = <c, w>, whatever H is: the hypergradient is c."""
    c = scale * np.array([1.0, -0.7, 0.4])

    def inner(w: Any, t: Any, _: Any) -> Any:
        r = [ti - wi for ti, wi in zip(t, w)]
        return sum(0.5 * H[i, j] * r[i] * r[j] for i in range(3) for j in range(3))

    problem = fb.ParametricProblem(inner, lambda w, t, _: sum(ci * ti for ci, ti in zip(c, t)))
    return problem, [jnp.ones((), outer_dtype)] * 3, [jnp.ones((), dtype) for dtype in inner_dtypes], c


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("float16", 1e-4), ("float16", 1e3), ("bfloat16", 1e-30), ("float32", 1e-30), ("float32", 1e34), ("float32", 1.0)],
)
def test_numbers_near_the_ends_of_a_dtype(dtype, scale, solver):
    problem, w, t, c = quadratic(scale, [dtype] * 3, dtype)
    h = jax.jit(lambda: fb.hypergradient(problem, None, fb.aid(SOLVERS[solver]), w, t, 0, 0))()
    tolerance = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 1e-3 if solver == "lineax-cg" else 1e-5}[dtype]
    got = np.array([np.asarray(g, np.float64) for g in h.gradient])
    assert np.linalg.norm(got - c) <= tolerance * np.linalg.norm(c)
    assert [g.dtype for g in h.gradient] == [jnp.dtype(dtype)] * 3
    assert bool(h.metrics["linear_converged"])


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "dtypes", [["float32", "float64", "float32"], ["bfloat16", "float32", "float64"], ["float16", "float32", "float16"]]
)
def test_leaves_of_different_precision(x64, dtypes, solver, warm):
    problem, w, t, c = quadratic(1.0, dtypes, "float64")
    estimator = fb.aid(SOLVERS[solver], warm_start=warm)
    h = jax.jit(lambda: fb.hypergradient(problem, None, estimator, w, t, 0, 0))()
    if warm:
        h = jax.jit(lambda state: fb.hypergradient(problem, None, estimator, w, t, 0, 0, state=state))(h.state)
    tolerance = max(1e-3 if solver == "lineax-cg" else 0.0, *(float(jnp.finfo(dtype).eps) for dtype in dtypes))
    assert np.linalg.norm(np.array(h.gradient) - c) <= 4 * tolerance * np.linalg.norm(c)
    assert bool(h.metrics["linear_converged"]) or solver == "lineax-cg"


def test_an_underflowed_system_is_not_called_solved():
    """A curvature that float16 rounds to zero leaves the residual as large as it was."""
    problem = fb.ParametricProblem(
        lambda w, t, _: jnp.sum((1e-4 * (t - w)) ** 2), lambda w, t, _: jnp.sum(jnp.float16(1e-3) * t)
    )
    one = jnp.ones(3, jnp.float16)
    h = jax.jit(lambda: fb.hypergradient(problem, None, fb.aid(fb.cg(10)), one, one, 0, 0))()
    assert not bool(h.metrics["linear_converged"])


@pytest.mark.parametrize("method", ["linear", "pointwise", "projected"])
def test_half_precision_reaches_no_factorisation(method):
    """The model, its features and the batch are in float16; LAPACK has no such routines."""
    x = jnp.linspace(-1.0, 1.0, 8, dtype=jnp.float16)[:, None]
    batch = (x, x * x)
    problem = fb.FunctionalProblem(
        lambda w, v, b: jnp.mean((v - w * b[1]) ** 2), lambda w, v, b: jnp.mean((v - b[1]) ** 2)
    )
    features = lambda theta, x: jnp.concatenate([x, x * x, jnp.ones_like(x)], axis=1)
    model = fb.from_function(lambda key, x: jnp.zeros((3, 1), x.dtype), lambda theta, x: features(theta, x) @ theta)
    theta, estimator = jnp.array([[0.0], [0.5], [0.0]], jnp.float16), fb.funcid(fb.linear_adjoint(features))
    if method == "pointwise":
        estimator = fb.funcid(fb.pointwise_adjoint())
    if method == "projected":
        columns = fb.from_function(
            lambda key, x: jnp.ones(1, x.dtype), lambda theta, x: features(theta, x) * theta[None]
        )
        model, theta = fb.variable_projection(columns, 1), jnp.ones(1, jnp.float16)
        estimator = fb.alternating()
    h = jax.jit(lambda w: fb.hypergradient(problem, model, estimator, w, theta, batch, batch))(jnp.float16(0.5))
    expected = -np.mean(np.asarray(x, np.float64) ** 4)  # h* = w x^2, so F = (w - 1)^2 mean x^4
    assert h.gradient.dtype == jnp.float16
    np.testing.assert_allclose(np.float64(h.gradient), expected, rtol=1e-2)


# Line searches at the outer level.


@pytest.mark.parametrize("estimator", [fb.funcid(fb.pointwise_adjoint()), fb.aid(fb.cg(5)), fb.itd(4)])
@pytest.mark.parametrize(
    "optimizer",
    [optax.lbfgs(), optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15))],
)
def test_line_searches_at_the_outer_level(x64, optimizer, estimator):
    """Rosenbrock's function of omega through h*_omega(x) = omega, with gradients from the estimator."""
    problem = fb.FunctionalProblem(
        lambda w, v, b: jnp.mean((v - w[None]) ** 2),
        lambda w, v, b: jnp.mean((1.0 - v[:, 0]) ** 2 + 3.0 * (v[:, 1] - v[:, 0] ** 2) ** 2),
    )
    model = fb.from_function(lambda key, x: jnp.zeros(2), lambda theta, x: jnp.ones_like(x) * theta[None])
    solver = fb.bilevel(
        problem, model, estimator, inner_optimizer=optax.sgd(1.0), outer_optimizer=optimizer, inner_steps=4
    )
    batch = (jnp.ones((3, 1)),)
    state = solver.init(KEY, jnp.array([-1.0, 1.0]), batch)
    state, metrics = jax.jit(lambda s: jax.lax.scan(lambda s, _: solver.step(s, batch, batch), s, None, length=25))(
        state
    )
    values = np.asarray(metrics["outer_objective"])
    assert values[-1] < 1e-2 * values[0]
    assert np.all(np.diff(values) <= 1e-12)  # a line search never goes up


# Data.


def test_sparse_inputs():
    from jax.experimental import sparse

    dense = np.random.default_rng(0).binomial(1, 0.3, size=(7, 4)) * 1.0
    y = jnp.arange(7.0)
    problem = fb.FunctionalProblem(
        lambda w, v, b: jnp.mean((v - w * b[1]) ** 2), lambda w, v, b: jnp.mean((v - b[1]) ** 2)
    )
    model = fb.from_function(lambda key, x: jnp.zeros(4), lambda theta, x: x @ theta)

    def run(x: Any, estimator: fb.Estimator) -> Any:
        solver = fb.bilevel(
            problem, model, estimator, inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1), inner_steps=3
        )
        state = solver.init(KEY, 0.5, (x, y))
        return fb.train(solver, state, [((x, y), (x, y))] * 3, 3, chunk=2)[0]

    for estimator in (fb.funcid(fb.learned_adjoint(optax.sgd(0.1), 2)), fb.aid(fb.cg(4))):
        got, expected = run(sparse.BCOO.fromdense(dense), estimator), run(jnp.asarray(dense, jnp.float32), estimator)
        np.testing.assert_allclose(got.outer_params, expected.outer_params, rtol=1e-5)


def test_arrays_given_twice_are_copied():
    """A donating step must not meet one buffer twice: as outer_params, inner_params and in an optimizer's state."""
    problem = fb.ParametricProblem(lambda w, t, b: jnp.sum((t - w) ** 2), lambda w, t, b: jnp.sum(t**2))
    shared = jnp.ones(3)
    slow = optax.GradientTransformation(lambda params: params, lambda g, state, params=None: (g, state))  # a reference
    solver = fb.bilevel(problem, None, fb.aid(fb.cg(2)), inner_optimizer=slow, outer_optimizer=slow)
    state = solver.init(KEY, shared, 0, shared)
    step = jax.jit(solver.step, donate_argnums=0)
    state, _ = step(state, 0, 0)
    np.testing.assert_array_equal(shared, 1.0)  # still there


# A fresh minibatch for each inner step.


def streaming(inner_steps: int, estimator: fb.Estimator, **kwargs: Any) -> fb.BilevelSolver:
    problem = fb.ParametricProblem(
        lambda w, t, x: jnp.mean((t - w * x) ** 2), lambda w, t, x: jnp.mean((t - x) ** 2) + 0.1 * w**2
    )
    return fb.bilevel(
        problem,
        None,
        estimator,
        inner_optimizer=optax.sgd(0.2),
        outer_optimizer=optax.sgd(0.1),
        inner_steps=inner_steps,
        **kwargs,
    )


def by_hand(w: Any, t: Any, batches: Any) -> Any:
    for x in batches:
        t = t - 0.2 * jax.grad(lambda t, x=x: jnp.mean((t - w * x) ** 2))(t)
    return t


@pytest.mark.parametrize("extra", [0, 1])
def test_minibatches_for_each_inner_step(x64, extra):
    """The i-th inner step sees the i-th batch, and the hypergradient the last, on which dt/dw = mean x."""
    solver = streaming(3, fb.aid(fb.cg(2)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3 + extra, 5)))
    state = solver.init(KEY, 0.7, fb.Minibatches(x), jnp.array(0.3))
    after, metrics = jax.jit(solver.step)(state, fb.Minibatches(x), jnp.ones(5))
    t = by_hand(0.7, 0.3, x[:3])
    np.testing.assert_allclose(after.inner_params, t, rtol=1e-12)
    gradient = 2.0 * (t - 1.0) * jnp.mean(x[-1]) + 0.2 * 0.7
    np.testing.assert_allclose(after.outer_params, 0.7 - 0.1 * gradient, rtol=1e-12)
    np.testing.assert_allclose(metrics["inner_gradient_norm"], jnp.abs(2.0 * jnp.mean(t - 0.7 * x[-1])), rtol=1e-12)


def test_itd_goes_back_through_each_step_s_own_minibatch(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)))
    F = lambda w: jnp.mean((by_hand(w, 0.3, x) - 1.0) ** 2) + 0.1 * w**2
    for mode in ("reverse", "forward"):
        solver = streaming(3, fb.itd(3, mode=mode))
        state = solver.init(KEY, 0.7, fb.Minibatches(x), jnp.array(0.3))
        after, _ = jax.jit(solver.step)(state, fb.Minibatches(x), jnp.ones(5))
        np.testing.assert_allclose(after.outer_params, 0.7 - 0.1 * jax.grad(F)(0.7), rtol=1e-12)


def test_run_and_train_take_minibatches_and_samplers(x64):
    solver = streaming(3, fb.aid(fb.cg(2)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 5)))  # [outer steps, inner steps, n]
    state = solver.init(KEY, 0.7, fb.Minibatches(x[0]), jnp.array(0.3))
    expected = state
    for batches in x:
        expected, _ = solver.step(expected, fb.Minibatches(batches), jnp.ones(5))
    by_run, _ = jax.jit(solver.run)(state, fb.Minibatches(x), jnp.ones((4, 5)))
    by_train, _ = fb.train(solver, state, [(fb.Minibatches(b), jnp.ones(5)) for b in x], 4, chunk=3)
    for got in (by_run, by_train):
        np.testing.assert_allclose(got.outer_params, expected.outer_params, rtol=1e-12)

    source = fb.Sampler(jax.tree_util.Partial(lambda x, key: jax.random.choice(key, x, (5,)), x.ravel()))
    by_run, _ = jax.jit(solver.run)(state, source, jnp.ones((4, 5)))
    by_train, _ = fb.train(solver, state, lambda key, step: (source, jnp.ones(5)), 4, chunk=3)
    np.testing.assert_allclose(by_train.outer_params, by_run.outer_params, rtol=1e-12)


def test_a_sampler_draws_anew_for_each_step(x64):
    """Each draw of one number is seen by one inner step: after 3 steps at rate 1/2 theta is the third."""
    problem = fb.ParametricProblem(lambda w, t, x: jnp.sum((t - x) ** 2) + 0.0 * w, lambda w, t, x: jnp.sum(t) * w)
    seen = []
    source = fb.Sampler(jax.tree_util.Partial(lambda key: jax.random.normal(key, (1,))))
    solver = fb.bilevel(
        problem, None, fb.alternating(), inner_optimizer=optax.sgd(0.5), outer_optimizer=optax.sgd(0.1), inner_steps=3
    )
    state = solver.init(KEY, 1.0, source, jnp.zeros(1))
    for _ in range(3):
        state, _ = solver.step(state, source, 0)
        seen.append(float(state.inner_params[0]))
    assert len(set(seen)) == 3


@pytest.mark.parametrize("size", [2, 5])
def test_minibatches_of_another_number_than_the_inner_steps_are_refused(size):
    solver = streaming(3, fb.aid(fb.cg(2)))
    with pytest.raises(ValueError, match=rf"fb.Minibatches of {size} batches, expected inner_steps=3 .* or 4"):
        jax.eval_shape(lambda: solver.init(KEY, 0.7, fb.Minibatches(jnp.ones((size, 5))), jnp.array(0.3)))


# A fresh start of the inner level at each outer step.


@pytest.mark.parametrize("method", ["itd", "aid"])
def test_inner_init_is_where_each_outer_step_starts(x64, method):
    """Under ITD through all steps omega reaches the solution by the start as well."""
    estimator = fb.itd(2) if method == "itd" else fb.aid(fb.cg(2))
    solver = streaming(2, estimator, inner_init=lambda w, key, x: jnp.sin(w) * jnp.mean(x))
    x = jnp.asarray(np.random.default_rng(0).normal(size=5))
    state = solver.init(KEY, 0.7, x)
    np.testing.assert_allclose(state.inner_params, jnp.sin(0.7) * jnp.mean(x), rtol=1e-12)
    for _ in range(2):
        w = state.outer_params
        state, _ = jax.jit(solver.step)(state, x, jnp.ones(5))
        solution = lambda w: by_hand(w, jnp.sin(w) * jnp.mean(x), [x, x])
        np.testing.assert_allclose(state.inner_params, solution(w), rtol=1e-12)
        if method == "itd":
            F = lambda w: jnp.mean((solution(w) - 1.0) ** 2) + 0.1 * w**2
            np.testing.assert_allclose(state.outer_params, w - 0.1 * jax.grad(F)(w), rtol=1e-12)


# NaN that no flag saw, and the level that is to blame.


def masked(kind: str) -> Callable[..., Any]:
    """Finite values with a NaN derivative by the prediction."""

    def outer(w: Any, v: Any, b: Any) -> Any:
        r = v - jax.lax.stop_gradient(v)
        trap = (
            jnp.where(False, jnp.linalg.norm(r), 0.0)
            if kind == "norm"
            else jnp.sum(jnp.where(r == 0.0, 0.0, jnp.sqrt(r)))
        )
        return jnp.mean((v - 1.0) ** 2) + trap + w**2

    return outer


EVERY_ADJOINT = {
    "linear": fb.funcid(fb.linear_adjoint(lambda theta, x: x)),
    "learned": fb.funcid(fb.learned_adjoint(optax.sgd(0.1), 2)),
    "pointwise": fb.funcid(fb.pointwise_adjoint()),
    "cg": fb.aid(fb.cg(3)),
    "normal_cg": fb.aid(fb.normal_cg(3)),
    "gmres": fb.aid(fb.gmres(3)),
    "neumann": fb.aid(fb.neumann(3, 0.1)),
    "lineax": fb.aid(lineax.CG(1e-5, 1e-5)),
    "identity": fb.aid(fb.identity()),
}


def regression(outer: Callable[..., Any]) -> dict[str, Any]:
    x = jnp.linspace(-1.0, 1.0, 6)[:, None]
    return {
        "problem": fb.FunctionalProblem(lambda w, v, b: jnp.mean((v - w * b[0][:, 0]) ** 2), outer),
        "model": fb.from_function(lambda key, x: jnp.zeros(1), lambda theta, x: x @ theta),
        "inner_batch": (x,),
        "outer_batch": (x,),
    }


@pytest.mark.parametrize("kind", ["norm", "root"])
@pytest.mark.parametrize("method", EVERY_ADJOINT)
def test_a_nan_derivative_of_a_finite_outer_objective_is_the_outer_level_s(method, kind):
    case = regression(masked(kind))
    solver = fb.bilevel(
        case["problem"],
        case["model"],
        EVERY_ADJOINT[method],
        inner_optimizer=optax.sgd(0.5),
        outer_optimizer=optax.sgd(0.1),
        inner_steps=2,
    )
    state = solver.init(KEY, 0.5, case["inner_batch"])
    state = state._replace(
        estimator_state=jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, state.estimator_state)
    )
    after, metrics = jax.jit(solver.step)(state, case["inner_batch"], case["outer_batch"])
    flags = {level: bool(metrics[f"{level}_finite"]) for level in ("inner", "adjoint", "outer")}
    assert flags == {"inner": True, "adjoint": True, "outer": False}
    np.testing.assert_array_equal(after.outer_params, 0.5)


@pytest.mark.parametrize("method", EVERY_ADJOINT)
def test_nan_inner_params_are_flagged_and_give_no_number(method):
    case = regression(lambda w, v, b: jnp.mean((v - 1.0) ** 2))
    theta = jnp.full(1, jnp.nan)
    h = jax.jit(
        lambda w: fb.hypergradient(**case, estimator=EVERY_ADJOINT[method], outer_params=w, inner_params=theta, key=KEY)
    )(0.5)
    assert np.isnan(h.gradient)
    assert not bool(h.metrics["inner_finite"])
    assert not bool(h.metrics["outer_finite"])


def flags_after_a_step(omega: float, problem: fb.ParametricProblem, estimator: fb.Estimator, rate: float = 0.1) -> Any:
    solver = fb.bilevel(
        problem, None, estimator, inner_optimizer=optax.sgd(rate), outer_optimizer=optax.sgd(0.1), inner_steps=4
    )
    state = solver.init(KEY, 0.5, 0, jnp.array([0.3]))._replace(outer_params=jnp.array(omega))
    after, metrics = jax.jit(solver.step)(state, 0, 0)
    return after, {level: bool(metrics[f"{level}_finite"]) for level in ("inner", "adjoint", "outer")}


PLAIN = fb.ParametricProblem(lambda w, t, b: jnp.sum((t - w) ** 2), lambda w, t, b: jnp.sum((t - 1.0) ** 2))


@pytest.mark.parametrize("estimator", [fb.aid(fb.cg(2)), fb.itd(2), fb.value_penalty(optax.sgd(0.1), 2, 2.0)])
def test_nan_outer_params_are_the_outer_level_s(estimator):
    after, flags = flags_after_a_step(np.nan, PLAIN, estimator)
    assert flags["inner"]
    assert not flags["outer"]
    np.testing.assert_allclose(after.inner_params, 0.3)  # held back all the same


def test_an_infinite_outer_objective_is_not_the_adjoint_s():
    infinite = PLAIN.__class__(PLAIN.inner_objective, lambda w, t, b: jnp.sum((t - 1.0) ** 2) * w * jnp.inf)
    for estimator in (
        fb.value_penalty(optax.sgd(0.1), 2, 2.0),
        fb.aid(fb.cg(2)),
        fb.gradient_penalty(optax.sgd(0.1), 2, 2.0),
    ):
        _, flags = flags_after_a_step(0.5, infinite, estimator)
        assert flags == {"inner": True, "adjoint": True, "outer": False}


@pytest.mark.parametrize("rate", [1e2, 1e3, 1e5])
def test_an_inner_fit_that_explodes_is_held_back(rate):
    """Four steps of (1 - 2 rate): finite, and useless for ever if kept."""
    after, flags = flags_after_a_step(0.5, PLAIN, fb.aid(fb.cg(2)), rate)
    assert not flags["inner"]
    np.testing.assert_allclose(after.inner_params, 0.3)
    np.testing.assert_allclose(after.outer_params, 0.5)


@pytest.mark.parametrize("target", [0.0, 1e-9, 1e6])
def test_a_fit_that_makes_a_large_but_right_step_is_not_held_back(target):
    problem = fb.ParametricProblem(lambda w, t, b: jnp.sum((t - target) ** 2) * w, lambda w, t, b: jnp.sum(t**2) * 1e-9)
    after, flags = flags_after_a_step(1.0, problem, fb.aid(fb.cg(2)), 0.5)
    assert all(flags.values())
    np.testing.assert_allclose(after.inner_params, target, rtol=1e-6)
