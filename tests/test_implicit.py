"""Implicit layers x linear solvers x problems, against closed forms in float64: one row of PROBLEMS per problem."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import funcbilevel as fb


class Problem(NamedTuple):
    """A solution as a closed form of omega, which is a vector, and the condition that it satisfies.

    The closed form holds near omega, where the active set does not change; the layers call it as their solver.
    """

    decorator: Callable[..., Any]
    condition: Callable[..., Any]
    omega: jax.Array
    solution: Callable[[jax.Array], Any]
    symmetric: bool = False


def newton(equation: Callable[[Any, Any], Any], start: jax.Array) -> Callable[[Any], Any]:
    """omega -> the root, by Newton's method; its last steps are differentiated through."""

    def solution(omega: jax.Array) -> jax.Array:
        def step(x: jax.Array) -> jax.Array:
            return x - jnp.linalg.solve(jax.jacfwd(equation)(x, omega), equation(x, omega))

        x = jax.lax.stop_gradient(jax.lax.fori_loop(0, 20, lambda _, x: step(x), start))
        return step(step(x))

    return solution


def data(seed: int, n: int, p: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, p))), jnp.asarray(rng.normal(size=n))


def proximal_gradient(gradient: Callable[..., Any], prox: Callable[..., Any], step_size: float) -> Callable[..., Any]:
    return lambda x, omega: prox(x - step_size * gradient(x, omega), omega)


def converged(fixed_point: Callable[..., Any], start: jax.Array, omega: jax.Array) -> np.ndarray:
    return np.asarray(jax.jit(lambda: jax.lax.fori_loop(0, 3000, lambda _, x: fixed_point(x, omega), start))())


def on(free: np.ndarray, values: jax.Array, others: Any) -> jax.Array:
    """`values` at the coordinates `free`, and `others` elsewhere."""
    return jnp.zeros(free.shape).at[np.flatnonzero(free)].set(values) + jnp.where(free, 0.0, others)


def nonsymmetric_root() -> Problem:
    A, b = data(0, 4, 4)

    def equation(x: jax.Array, omega: jax.Array) -> jax.Array:
        return omega[0] * jnp.tanh(x) + (A + 4 * jnp.eye(4)) @ x - omega[1:] * b

    return Problem(fb.custom_root, equation, jnp.array([0.7, 1.0, -0.5, 2.0, 0.3]), newton(equation, jnp.zeros(4)))


def fixed_point() -> Problem:
    A, b = data(1, 4, 4)

    def image(x: jax.Array, omega: jax.Array) -> jax.Array:
        return jnp.tanh(0.3 * A @ x + omega[0] * b) * omega[1]

    solution = newton(lambda x, omega: image(x, omega) - x, jnp.zeros(4))
    return Problem(fb.custom_fixed_point, image, jnp.array([0.5, 0.8]), solution)


def ridge() -> Problem:
    X, y = data(2, 8, 4)

    def loss(w: jax.Array, omega: jax.Array) -> jax.Array:
        return jnp.mean((X @ w - y) ** 2) + jnp.sum(jnp.exp(omega) * w**2)

    def solution(omega: jax.Array) -> jax.Array:
        return jnp.linalg.solve(X.T @ X / 8 + jnp.diag(jnp.exp(omega)), X.T @ y / 8)

    return Problem(fb.custom_root, jax.grad(loss), jnp.array([-1.0, 0.0, -2.0, 0.5]), solution, symmetric=True)


def lasso() -> Problem:
    X, y = data(3, 12, 6)
    prox = lambda w, omega: fb.prox_l1(w, 0.2 * jnp.exp(omega[0]))
    image = proximal_gradient(lambda w, omega: X.T @ (X @ w - y) / 12, prox, 0.2)
    omega = jnp.log(jnp.array([0.15]))
    w = converged(image, jnp.zeros(6), omega)
    S, signs = w != 0, jnp.sign(w[w != 0])
    assert 0 < S.sum() < 6

    def solution(omega: jax.Array) -> jax.Array:
        X_S = X[:, S]
        return on(S, jnp.linalg.solve(X_S.T @ X_S, X_S.T @ y - 12 * jnp.exp(omega[0]) * signs), 0.0)

    return Problem(fb.custom_fixed_point, image, omega, solution)


def non_negative() -> Problem:
    X, y = data(4, 12, 6)
    gradient = lambda w, omega: X.T @ (X @ w - y * omega[0] - omega[1]) / 12
    image = proximal_gradient(gradient, lambda w, _: optax.projections.projection_non_negative(w), 0.2)
    omega = jnp.array([1.0, 0.3])
    S = converged(image, jnp.ones(6), omega) > 0
    assert 0 < S.sum() < 6

    def solution(omega: jax.Array) -> jax.Array:
        X_S = X[:, S]
        return on(S, jnp.linalg.solve(X_S.T @ X_S, X_S.T @ (y * omega[0] + omega[1])), 0.0)

    return Problem(fb.custom_fixed_point, image, omega, solution)


def portfolio() -> Problem:
    """min x' V x / 2 - omega' x over the simplex."""
    X, _ = data(5, 12, 5)
    V = X.T @ X / 12
    image = proximal_gradient(lambda x, omega: V @ x - omega, lambda x, _: optax.projections.projection_simplex(x), 0.2)
    omega = jnp.array([0.3, -0.2, 0.1, 0.4, -0.9])
    S = converged(image, jnp.ones(5) / 5, omega) > 0
    k = S.sum()
    assert 1 < k < 5

    def solution(omega: jax.Array) -> jax.Array:
        top = jnp.concatenate([V[S][:, S], jnp.ones((k, 1))], axis=1)
        system = jnp.concatenate([top, jnp.concatenate([jnp.ones((1, k)), jnp.zeros((1, 1))], axis=1)])
        return on(S, jnp.linalg.solve(system, jnp.append(omega[S], 1.0))[:-1], 0.0)

    return Problem(fb.custom_fixed_point, image, omega, solution)


def box_logistic() -> Problem:
    """A logistic regression with weights between -omega[1] and omega[1]."""
    X, y = data(6, 12, 4)
    sign = jnp.sign(y)

    def loss(w: jax.Array, omega: jax.Array) -> jax.Array:
        return jnp.mean(jnp.log1p(jnp.exp(-sign * (X @ w)))) + jnp.exp(omega[0]) * jnp.sum(w**2)

    prox = lambda w, omega: optax.projections.projection_box(w, -omega[1], omega[1])
    image = proximal_gradient(jax.grad(loss), prox, 0.5)
    omega = jnp.array([-4.0, 0.5])
    w = converged(image, jnp.zeros(4), omega)
    free = np.abs(w) < 0.5
    assert 0 < free.sum() < 4

    def whole(some: jax.Array, omega: jax.Array) -> jax.Array:
        return on(free, some, jnp.sign(w) * omega[1])

    reduced = newton(lambda some, omega: jax.grad(loss)(whole(some, omega), omega)[free], jnp.zeros(free.sum()))
    return Problem(fb.custom_fixed_point, image, omega, lambda omega: whole(reduced(omega), omega))


def quadratic_program() -> Problem:
    """min x' V x / 2 - omega' x with sum(x) = omega[0] and G x <= 1, of which some inequalities are active."""
    X, _ = data(7, 12, 4)
    V = X.T @ X / 12
    G, h = np.asarray(data(8, 3, 4)[0]), np.full(3, 100.0)
    omega = jnp.array([1.0, 0.5, -0.3, 0.8])

    def solved(omega: Any, active: np.ndarray) -> tuple[Any, Any]:
        E = jnp.concatenate([jnp.ones((1, 4)), G[active]])
        system = jnp.block([[V, E.T], [E, jnp.zeros((len(E), len(E)))]])
        return jnp.split(jnp.linalg.solve(system, jnp.concatenate([omega, omega[:1], h[active]])), [4])

    h = G @ solved(omega, np.zeros(3, bool))[0] + np.array([-0.3, 2.0, 3.0])  # cuts the free solution off

    def is_optimal(active: np.ndarray) -> bool:
        x, multipliers = solved(omega, active)
        return bool(np.all(multipliers[1:] > 0.01) and np.all((G @ x - h)[~active] < -0.01))

    (active,) = (a for a in np.array(list(itertools.product([False, True], repeat=3))) if is_optimal(a))
    assert 0 < active.sum() < 3

    def solution(omega: jax.Array) -> Any:
        x, multipliers = solved(omega, active)
        return {"x": x}, multipliers[:1], on(active, multipliers[1:], 0.0)

    conditions = fb.kkt_conditions(
        lambda x, omega: x["x"] @ V @ x["x"] / 2 - omega @ x["x"],
        equality=lambda x, omega: jnp.sum(x["x"], keepdims=True) - omega[:1],
        inequality=lambda x, omega: G @ x["x"] - h,
    )
    return Problem(fb.custom_root, conditions, omega, solution)


PROBLEMS = [
    *(nonsymmetric_root, fixed_point, ridge, lasso, non_negative, portfolio, box_logistic, quadratic_program),
]
SOLVERS = {
    "default": None,
    "normal_cg": fb.normal_cg(100),
    "lineax": lineax.AutoLinearSolver(well_posed=True),
    "cg": fb.cg(20),
}


def assert_close(got: Any, expected: Any, tolerance: float, what: str) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        error = np.max(np.abs(x - y)) / max(1.0, np.max(np.abs(y)))
        assert error <= tolerance, f"{what}: error {error:.1e}"


def flat(tree: Any) -> jax.Array:
    return ravel_pytree(tree)[0]


def loss(solution: Any) -> jax.Array:
    return jnp.sum(jnp.sin(flat(solution) * (1.0 + jnp.arange(flat(solution).size))))


def layer_of(
    build: Callable[[], Problem], linear_solver: Any
) -> tuple[Callable[..., Any], Callable[..., Any], Problem]:
    """The layer as functions of omega, given in an argument and in closures."""
    problem = build()
    kwargs = {} if linear_solver is None else {"linear_solver": linear_solver}
    decorator, condition, _, solution, _ = problem

    def by_argument(omega: jax.Array) -> jax.Array:
        return flat(decorator(condition, **kwargs)(lambda _, omega: solution(omega))(None, omega))

    def by_closure(omega: jax.Array) -> jax.Array:
        return flat(decorator(lambda x: condition(x, omega), **kwargs)(lambda _: solution(omega))(None))

    return by_argument, by_closure, problem


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("build", PROBLEMS, ids=lambda build: build.__name__)
def test_derivatives(build: Callable[[], Problem]) -> None:
    f, by_closure, (decorator, condition, omega, solution, _) = layer_of(build, SOLVERS["lineax"])

    @jax.jit
    def everything(omega: jax.Array) -> tuple[Any, ...]:
        x = solution(omega)
        at = flat(condition(x, omega)) - (flat(x) if decorator is fb.custom_fixed_point else 0.0)
        got = jax.jacrev(f)(omega), jax.hessian(lambda omega: loss(by_closure(omega)))(omega)
        expected = (
            jax.jacfwd(lambda omega: flat(solution(omega)))(omega),
            jax.hessian(lambda o: loss(solution(o)))(omega),
        )
        return at, got, expected

    at, got, expected = everything(omega)
    assert np.max(np.abs(at)) < 1e-10
    assert np.max(np.abs(expected[0])) > 0.01
    assert_close(got[0], expected[0], 1e-9, "first")
    assert_close(got[1], expected[1], 1e-8, "second")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("build", PROBLEMS, ids=lambda build: build.__name__)
def test_every_solver(build: Callable[[], Problem], name: str) -> None:
    """Forward = reverse, arguments = closures, vmap = loop, to second order (along a direction)."""
    f, by_closure, (_, _, omega, solution, symmetric) = layer_of(build, SOLVERS[name])
    if name == "cg" and not symmetric:
        pytest.skip("for symmetric systems")
    F, G = lambda omega: loss(f(omega)), lambda omega: loss(by_closure(omega))
    exact = jax.grad(lambda omega: loss(solution(omega)))
    t = jnp.cos(jnp.arange(omega.size, dtype=omega.dtype))
    omegas = omega[None] * jnp.array([[1.0], [1.001]])
    # The default solver goes through all; of the others each runs what does not follow from it.
    whole = name == "default"

    @jax.jit
    def everything(omega: jax.Array) -> tuple[Any, ...]:
        gradient, hessian_t = jax.jvp(jax.grad(F), (omega,), (t,))
        first, second = [gradient], [hessian_t]
        forward = [jax.jvp(F, (omega,), (t,))[1]]
        if whole:
            again, pullback = jax.vjp(jax.grad(F), omega)
            in_closure, closure_t = jax.jvp(jax.grad(G), (omega,), (t,))
            first, second = [*first, again, in_closure], [*second, pullback(t)[0], closure_t]
            forward.append(jax.jvp(G, (omega,), (t,))[1])
        mapped = [jax.vmap(jax.grad(F))(omegas)]
        want, want_t = jax.jvp(exact, (omega,), (t,))
        return first, second, mapped, forward, (want, want_t, jax.lax.map(exact, omegas), want @ t)

    *results, expected = everything(omega)
    for got, want, tolerance in zip(results, expected, (1e-8, 1e-7, 1e-8, 1e-8), strict=True):
        for i, each in enumerate(got):
            assert_close(each, want, tolerance, str(i))


# Solvers of every kind.

A = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [-1.0, 0.0, 2.0]])


def equation(x: Any, omega: Any) -> Any:
    return A @ x + x**3 / 10 - omega * jnp.arange(1.0, 4.0)


def steps(x: jax.Array, omega: jax.Array) -> jax.Array:
    return x - jnp.linalg.solve(jax.jacfwd(equation)(x, omega), equation(x, omega))


def plain_python(init: Any, omega: Any) -> Any:
    x = np.zeros(3)
    while np.max(np.abs(residual := A @ x + x**3 / 10 - np.asarray(omega) * np.arange(1.0, 4.0))) > 1e-13:
        x = x - np.linalg.solve(A + np.diag(3 * x**2 / 10), residual)
    return x


def callback(init: Any, omega: Any) -> Any:
    shape = jax.ShapeDtypeStruct((3,), jnp.float64)
    return jax.pure_callback(lambda omega: plain_python(None, omega), shape, omega, vmap_method="sequential")


def while_loop(init: jax.Array, omega: jax.Array) -> jax.Array:
    return jax.lax.while_loop(lambda x: jnp.any(jnp.abs(equation(x, omega)) > 1e-13), lambda x: steps(x, omega), init)


def optax_loop(init: jax.Array, omega: jax.Array) -> jax.Array:
    optimizer = optax.sgd(0.05)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        x, state = carry
        gradient = jax.grad(lambda x: jnp.sum(equation(x, omega) ** 2))(x)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(x, updates), state), None

    return jax.lax.scan(step, (init, optimizer.init(init)), length=500)[0][0]


def optimistix_newton(init: jax.Array, omega: jax.Array) -> jax.Array:
    optimistix = pytest.importorskip("optimistix")
    solver = optimistix.Newton(rtol=1e-12, atol=1e-12)
    return optimistix.root_find(equation, solver, init, omega).value


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "solver", [plain_python, callback, while_loop, optax_loop, optimistix_newton], ids=lambda f: f.__name__
)
def test_any_solver(solver: Callable[..., Any]) -> None:
    x = plain_python(None, 1.5)
    expected = np.linalg.solve(A + np.diag(3 * x**2 / 10), np.arange(1.0, 4.0))
    layer = fb.custom_root(equation)(solver)
    if solver is not optimistix_newton:
        assert layer.__name__ == solver.__name__

    def by_argument(omega: Any) -> Any:
        return layer(jnp.zeros(3), omega)

    def by_closure(omega: Any) -> Any:
        return fb.custom_root(lambda x: equation(x, omega))(lambda init: solver(init, omega))(jnp.zeros(3))

    for f in (by_argument,) if solver is plain_python else (by_argument, jax.jit(by_closure)):
        assert_close(jax.jacfwd(f)(1.5), expected, 1e-8, "forward")
        assert_close(jax.jacrev(f)(1.5), expected, 1e-8, "reverse")
    assert_close(by_argument(1.5), x, 1e-8, "value")


# Arguments and results of every kind.


class Result(NamedTuple):
    solution: Any
    steps: Any
    name: str


@pytest.mark.usefixtures("x64")
def test_pytrees_integers_none_static_arguments_and_aux() -> None:
    def optimality(x: Any, weights: Any, count: Any, name: str, nothing: None, f: Any, *, shift: Any = 0.0) -> Any:
        assert nothing is None
        assert name == "square"
        return {"a": count * x["a"] - f(weights["u"]) - shift, "b": (x["b"][0] - x["a"][:2] * weights["v"],), "n": 0}

    @fb.custom_root(optimality, has_aux=True)
    def solver(
        init: Any, weights: Any, count: Any, name: str, nothing: None, f: Any, *, shift: Any = 0.0, max_steps: int = 3
    ) -> Result:
        assert max_steps == 7
        a = (f(weights["u"]) + shift) / count
        return Result({"a": a, "b": (a[:2] * weights["v"],), "n": jnp.asarray(4)}, jnp.asarray(max_steps), name)

    def total(weights: Any, shift: Any, count: Any) -> Any:
        result = solver(None, weights, count, "square", None, jnp.square, shift=shift, max_steps=7)
        assert isinstance(result, Result)
        assert result.name == "square"
        return jnp.sum(result.solution["a"]) + jnp.sum(result.solution["b"][0] ** 2), (result.steps, result.solution)

    weights = {"u": jnp.array([1.0, 2.0, 3.0]), "v": jnp.asarray(0.5), "step": jnp.asarray(1)}
    count, shift = jnp.asarray(2), jnp.asarray(0.3)

    def exact(weights: Any, shift: Any) -> Any:
        a = (weights["u"] ** 2 + shift) / 2
        return jnp.sum(a) + jnp.sum((a[:2] * weights["v"]) ** 2)

    keywords = {"argnums": (0, 1), "allow_int": True}
    expected = jax.grad(exact, **keywords)(weights, shift)
    for f in (jax.grad(total, has_aux=True, **keywords), jax.jit(jax.grad(total, has_aux=True, **keywords))):
        got, (num, solution) = f(weights, shift, count)
        assert num == 7
        assert solution["n"] == 4
        assert_close((got[0]["u"], got[0]["v"], got[1]), (expected[0]["u"], expected[0]["v"], expected[1]), 1e-12, "")


def test_what_layers_close_over_may_be_differentiated_after_they_are_compiled() -> None:
    """Integers, too, are arguments of the compiled program by then."""

    @jax.jit
    def f(omega: Any, count: Any) -> Any:
        layer = fb.custom_root(lambda x: count * x - omega)(lambda init: omega / count)
        return layer(omega)

    assert jax.grad(f)(3.0, 4) == 0.25
    assert jax.jvp(lambda omega: f(omega, 4), (3.0,), (1.0,))[1] == 0.25


def test_no_derivative_by_the_start_and_none_through_the_solver() -> None:
    layer = fb.custom_root(lambda x, omega: x - omega)(lambda init, omega: 0.0 * init + 2.0 * omega)
    assert jax.grad(layer)(1.0, 3.0) == 0.0
    assert jax.grad(layer, argnums=1)(1.0, 3.0) == 1.0  # of the condition, whatever the solver does
    assert layer(1.0, 3.0) == 6.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cg_takes_a_definite_matrix_of_either_sign(sign: float) -> None:
    layer = fb.custom_root(lambda x, omega: sign * (jnp.array([1.0, 3.0]) * x - omega), linear_solver=fb.cg(2))(
        lambda init, omega: omega / jnp.array([1.0, 3.0])
    )
    np.testing.assert_allclose(jax.jacobian(layer, argnums=1)(None, jnp.ones(2)), np.diag([1.0, 1 / 3]), rtol=1e-6)


@pytest.mark.parametrize("solver", [fb.cg(5), fb.gmres(5), fb.normal_cg(5), fb.neumann(5, 0.1)], ids=repr)
def test_nan_is_not_a_zero_derivative(solver: fb.LinearSolver) -> None:
    layer = fb.custom_root(lambda x, omega: jnp.nan * x - omega, linear_solver=solver)(lambda init, omega: omega)
    assert jnp.all(jnp.isnan(jax.jacobian(layer, argnums=1)(None, jnp.ones(2))))


def test_sizes_and_dtypes_of_every_kind() -> None:
    scale = {"a": jnp.full((2,), 1e-25, jnp.float32), "b": jnp.full((3,), 2.0, jnp.bfloat16)}
    layer = fb.custom_root(lambda x, omega: jax.tree.map(lambda x, s: s * x - s * omega.astype(x.dtype), x, scale))(
        lambda init, omega: jax.tree.map(lambda s: jnp.full_like(s, 1.0) * omega.astype(s.dtype), scale)
    )
    for jacobian, dtype_of in ((jax.jacfwd, lambda s: s.dtype), (jax.jacrev, lambda s: jnp.dtype(jnp.float32))):
        got = jacobian(layer, argnums=1)(None, jnp.float32(1.0))  # JAX's dtype: the result's, and the argument's
        assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(dtype_of, scale)
        np.testing.assert_allclose(got["b"].astype(jnp.float32), np.ones(3), rtol=1e-2)


@pytest.mark.usefixtures("x64")
def test_conditions_without_a_forward_derivative() -> None:
    @jax.custom_vjp
    def square(x: Any) -> Any:
        return x**2

    square.defvjp(lambda x: (square(x), x), lambda x, c: (2 * x * c,))
    layer = fb.custom_root(lambda x, omega: square(x) - omega)(lambda init, omega: jnp.sqrt(omega))
    np.testing.assert_allclose(jax.grad(layer, argnums=1)(None, 4.0), 0.25)


# What is refused.


def simple(optimality: Any = lambda x, omega: x - omega, solver: Any = lambda init, omega: omega, **kwargs: Any) -> Any:
    return fb.custom_root(optimality, **kwargs)(solver)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fb.custom_root(3.0), TypeError, "custom_root: optimality must be callable"),
        (lambda: fb.custom_fixed_point(None), TypeError, "custom_fixed_point: fixed_point must be callable"),
        (lambda: simple(linear_solver="cg"), TypeError, "custom_root: linear_solver must be one of fb.cg"),
        (lambda: simple(solver=1), TypeError, "the decorated solver must be callable"),
        (lambda: simple(lambda x, omega: x[:1])(None, jnp.ones(2)), ValueError, "one equation for each unknown"),
        (lambda: simple(lambda x, omega: (x,))(None, jnp.ones(2)), ValueError, "of the same structure"),
        (lambda: simple()(None, jnp.arange(2)), ValueError, "must hold an array of floats"),
        (lambda: simple(has_aux=True)(None, jnp.ones(2)), TypeError, r"must return a tuple \(solution"),
        (
            lambda: jax.grad(lambda w: simple(solver=lambda init, omega, tol: omega)(None, 1.0, tol=w))(1.0),
            TypeError,
            "tol is traced",
        ),
        (lambda: fb.kkt_conditions(lambda x: x, inequality=1.0), TypeError, "inequality must be callable"),
    ],
)
def test_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
