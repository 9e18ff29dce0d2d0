"""Inner problems with kinks and constraints: `fb.prox_aid` against finite differences of the problem solved anew."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import projections

import funcbilevel as fb

RNG = np.random.default_rng(0)
N, P = 20, 6
X, X_VAL = RNG.normal(size=(N, P)), RNG.normal(size=(N, P))
TRUTH = np.array([1.5, -1.0, 0.8, 0.0, 0.0, 0.0])
Y, Y_VAL = X @ TRUTH + 0.7 * RNG.normal(size=N), X_VAL @ TRUTH
WEIGHTS = 0.3 * RNG.normal(size=3)
EQUATIONS = RNG.normal(size=(2, P))
STEP_SIZE = 0.3

pytestmark = pytest.mark.usefixtures("x64")


class Row(NamedTuple):
    """min over w of the weighted squared error, weights given by omega[:3], and g: omega[3:] is in its prox."""

    prox: Callable[..., Any]
    omega: list[float]
    size: int  # coordinates that can move


PROBLEMS = {
    "lasso": Row(lambda w, omega, s: fb.prox_l1(w, s * jnp.exp(omega[3])), [-1.0], 4),
    "elastic net": Row(lambda w, omega, s: fb.prox_l1(w, s * 0.3) / (1.0 + s * jnp.exp(omega[3])), [-1.0], 4),
    "non-negative": Row(lambda w, omega, s: projections.projection_non_negative(w), [], 4),
    "box": Row(lambda w, omega, s: projections.projection_box(w, omega[3], omega[4]), [-0.2, 1.0], 4),
    "simplex": Row(lambda w, omega, s: projections.projection_simplex(w, omega[3]), [1.0], 3),
    "l1 ball": Row(lambda w, omega, s: projections.projection_l1_ball(w, omega[3]), [2.0], 3),
    "l2 ball": Row(lambda w, omega, s: projections.projection_l2_ball(w, omega[3]), [1.0], 6),
    "inside the ball": Row(lambda w, omega, s: projections.projection_l2_ball(w, omega[3]), [50.0], 6),
    "affine": Row(lambda w, omega, s: fb.projection_affine(w, EQUATIONS, omega[3:]), [0.5, 1.0], 6),
    "group lasso": Row(
        lambda w, omega, s: fb.prox_group_lasso(w.reshape(3, 2), s * jnp.exp(omega[3])).reshape(-1), [-0.5], 4
    ),
}


def inner(omega: Any, w: Any, batch: Any = None) -> jax.Array:
    weights = jnp.exp(jnp.sin(jnp.arange(N)[:, None] * jnp.arange(1.0, 4.0)[None, :]) @ omega[:3])
    return jnp.mean(weights * (X @ w - Y) ** 2) / 2


def outer(omega: Any, w: Any, batch: Any = None) -> jax.Array:
    return jnp.mean((X_VAL @ w - Y_VAL) ** 2) + jnp.sum(jnp.sin(w)) + jnp.sum(omega**2)


def solved(prox: Callable[..., Any], omega: Any) -> jax.Array:
    """The inner solution to rounding error."""
    step = lambda _, w: prox(w - STEP_SIZE * jax.grad(inner, argnums=1)(omega, w), omega, STEP_SIZE)
    return jax.lax.fori_loop(0, 1500, step, jnp.ones(P) / P)


def differences(f: Callable[..., Any], omega: jax.Array, step: float) -> jax.Array:
    moved = step * jnp.eye(omega.size)
    return jax.lax.map(lambda e: (f(omega + e) - f(omega - e)) / (2 * step), moved)


@pytest.mark.parametrize("name", PROBLEMS)
def test_derivatives(name: str) -> None:
    row = PROBLEMS[name]
    omega = jnp.asarray([*WEIGHTS, *row.omega])
    problem = fb.ParametricProblem(inner, outer)
    estimator = fb.prox_aid(fb.cg(20), row.prox, STEP_SIZE)
    layer = fb.argmin(problem, None, estimator)

    @jax.jit
    def everything(omega: Any) -> Any:
        w = solved(row.prox, omega)
        hyper = fb.hypergradient(problem, None, estimator, omega, w, None, None)
        other = fb.hypergradient(problem, None, fb.prox_aid(fb.gmres(20), row.prox, 0.1), omega, w, None, None)
        F = lambda omega, w=w: outer(omega, layer(omega, w, None))
        layers = {
            "reverse": jax.grad(F)(omega),
            "forward": jax.jacfwd(F)(omega),
            "vmap": jax.vmap(jax.grad(F))(jnp.stack([omega, omega]))[1],
            "another step size": other.gradient,
        }
        gradient_anew = lambda omega: jax.grad(F)(omega, solved(row.prox, omega))
        curvatures = jax.hessian(F)(omega), jax.jacrev(jax.grad(F))(omega), differences(gradient_anew, omega, 1e-4)
        value_anew = lambda omega: outer(omega, solved(row.prox, omega))
        return hyper, layers, differences(value_anew, omega, 1e-5), curvatures

    hyper, layers, expected, (curvature, in_reverse, expected_curvature) = everything(omega)
    implicit = np.max(np.abs(expected - 2 * omega))
    assert implicit > 0.01
    np.testing.assert_allclose(hyper.gradient, expected, atol=1e-6 * max(1.0, implicit))
    for what, got in layers.items():
        np.testing.assert_allclose(got, hyper.gradient, atol=1e-8, err_msg=what)
    np.testing.assert_allclose(curvature, expected_curvature, atol=1e-5 * max(1.0, np.max(np.abs(curvature))))
    np.testing.assert_allclose(in_reverse, curvature, atol=1e-7)
    metrics = hyper.metrics
    assert metrics["active_set_size"] == row.size, metrics["active_set_size"]
    assert metrics["strict_complementarity"]
    assert metrics["linear_converged"]
    assert metrics["inner_gradient_relative"] < 1e-9


def test_closed_forms() -> None:
    """The lasso's and non-negative least squares' hypergradient as formulas on the active set; `aid` misses both."""
    problem = fb.ParametricProblem(lambda omega, w, _: jnp.mean((X @ w - omega[0] * Y) ** 2) / 2, outer)
    cases = {
        "lasso": (lambda w, omega, s: fb.prox_l1(w, s * omega[1]), jnp.array([1.0, 0.3])),
        "non-negative": (lambda w, omega, s: projections.projection_non_negative(w), jnp.array([1.0, 0.0])),
    }
    for prox, omega in cases.values():
        step = lambda _, w: prox(w - 0.3 * X.T @ (X @ w - omega[0] * Y) / N, omega, 0.3)
        w = jax.lax.fori_loop(0, 1500, step, jnp.ones(P))
        S, signs = np.asarray(w != 0), np.sign(w)
        assert 0 < S.sum() < P
        d = np.asarray(jax.grad(outer, argnums=1)(omega, w))[S]
        u = np.linalg.solve(X[:, S].T @ X[:, S] / N, d)
        expected = np.array([u @ X[:, S].T @ Y / N, -u @ signs[S] if omega[1] else 0.0]) + 2 * omega
        got = fb.hypergradient(problem, None, fb.prox_aid(fb.cg(20), prox), omega, w, None, None)
        np.testing.assert_allclose(got.gradient, expected, atol=1e-10)
        with pytest.warns(UserWarning, match="fb.prox_aid is right there"):
            wrong = fb.hypergradient(problem, None, fb.aid(fb.cg(20)), omega, w, None, None)
        assert np.max(np.abs(wrong.gradient - expected)) > 0.01


def test_without_a_prox_it_is_aid() -> None:
    problem = fb.ParametricProblem(
        lambda omega, w, _: jnp.mean((X @ w - Y) ** 2) + jnp.sum(jnp.exp(omega) * w**2),
        lambda omega, w, _: outer(omega, w),
    )
    omega = jnp.linspace(-2.0, 0.0, P)
    w = jnp.linalg.solve(X.T @ X / N + jnp.diag(jnp.exp(omega)), X.T @ Y / N)
    got = fb.hypergradient(problem, None, fb.prox_aid(fb.cg(20), lambda w, omega, s: w), omega, w, None, None)
    expected = fb.hypergradient(problem, None, fb.aid(fb.cg(20)), omega, w, None, None)
    np.testing.assert_allclose(got.gradient, expected.gradient, rtol=1e-9)
    assert got.metrics["active_set_size"] == P


def test_strict_complementarity() -> None:
    """Fails where a multiplier is zero, or as small as the inner solution's error."""
    y = jnp.array([3.0, 1.0, 0.2])
    problem = fb.ParametricProblem(lambda omega, w, _: jnp.sum((w - y) ** 2) / 2, lambda omega, w, _: jnp.sum(w**2))
    estimator = fb.prox_aid(fb.cg(5), lambda w, omega, s: fb.prox_l1(w, s * omega))

    @jax.jit
    def holds(penalty: Any, error: Any) -> Any:
        w = fb.prox_l1(y, penalty) + error
        metrics = fb.hypergradient(problem, None, estimator, penalty, w, None, None).metrics
        return metrics["strict_complementarity"], metrics["active_set_size"]

    assert [bool(holds(p, 0.0)[0]) for p in (0.9, 1.0, 1.1)] == [True, False, True]
    assert [int(holds(p, 0.0)[1]) for p in (0.9, 1.1)] == [2, 1]
    assert not holds(0.99, 0.05)[0]

    def on_the_ball(radius: float) -> bool:
        ball = fb.prox_aid(fb.cg(5), lambda w, omega, s: projections.projection_l2_ball(w, omega))
        w = projections.projection_l2_ball(y, radius)
        return bool(fb.hypergradient(problem, None, ball, radius, w, None, None).metrics["strict_complementarity"])

    size = float(jnp.linalg.norm(y))
    assert [on_the_ball(r) for r in (0.9 * size, size, 1.1 * size)] == [True, False, True]


@pytest.mark.parametrize("estimator", ["prox_aid", "itd"])
def test_the_loop_learns_a_penalty(estimator: str) -> None:
    """With `proximal` as inner optimizer, which gets omega; ITD goes through its steps."""
    prox = lambda w, omega, s: fb.prox_l1(w, s * jnp.exp(omega))
    loss = lambda w: jnp.mean((X_VAL @ w - Y_VAL) ** 2)
    problem = fb.ParametricProblem(lambda _, w, batch: jnp.mean((X @ w - Y) ** 2) / 2, lambda _, w, batch: loss(w))
    solver = fb.bilevel(
        problem,
        None,
        fb.itd(100) if estimator == "itd" else fb.prox_aid(fb.cg(20), prox, STEP_SIZE),
        inner_optimizer=fb.proximal(optax.sgd(STEP_SIZE), prox, STEP_SIZE),
        outer_optimizer=optax.sgd(2.0),
        inner_steps=100,
    )
    state = solver.init(jax.random.key(0), jnp.log(0.5), None, jnp.zeros(P))
    state, metrics = jax.jit(solver.run)(state, {"step": jnp.arange(40)}, {"step": jnp.arange(40)})
    solutions = [loss(w) for w in lasso_path(jnp.exp(state.outer_params) * jnp.array([0.9, 1.0, 1.1]))]
    assert solutions[1] < min(solutions[0], solutions[2])
    assert metrics["hypergradient_norm"][-1] < 0.01 * metrics["hypergradient_norm"][0]


def lasso_path(penalties: jax.Array) -> jax.Array:
    step = lambda penalty, w: fb.prox_l1(w - STEP_SIZE * X.T @ (X @ w - Y) / N, STEP_SIZE * penalty)
    return jax.vmap(lambda penalty: jax.lax.fori_loop(0, 1500, lambda _, w: step(penalty, w), jnp.zeros(P)))(penalties)


def test_outer_level_with_a_projection() -> None:
    """By `proximal` without omega, and by a chain of optax's own that ends in a projection."""
    optimizer = fb.proximal(optax.sgd(0.1), lambda omega, _, s: projections.projection_simplex(omega), 0.1)
    problem = fb.ParametricProblem(
        lambda omega, w, _: jnp.sum((w - omega) ** 2),
        lambda omega, w, _: jnp.sum((w - jnp.array([2.0, 0.5, -1.0])) ** 2),
    )
    for outer_optimizer in (optimizer, optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative())):
        solver = fb.bilevel(
            problem, None, fb.aid(fb.cg(3)), inner_optimizer=optax.sgd(0.5), outer_optimizer=outer_optimizer
        )
        state = solver.init(jax.random.key(0), jnp.ones(3) / 3, None, jnp.zeros(3))
        state, _ = jax.jit(solver.run)(state, {"i": jnp.arange(60)}, {"i": jnp.arange(60)})
        expected = [1.0, 0.0, 0.0] if outer_optimizer is optimizer else [2.0, 0.5, 0.0]
        np.testing.assert_allclose(state.outer_params, expected, atol=1e-4)


def test_proximal_operators() -> None:
    """They minimise what they should, leaf by leaf, and their derivatives at the kinks are finite."""
    tree = {"a": jnp.asarray(RNG.normal(size=(2, 3))), "b": jnp.asarray(RNG.normal(size=4))}
    scale = {"a": 0.3, "b": 0.8}
    norms = {
        fb.prox_l1: lambda t: jnp.sum(jnp.abs(t)),
        fb.prox_group_lasso: lambda t: jnp.sum(jnp.linalg.norm(t, axis=-1)),
    }
    for prox, norm in norms.items():
        x = prox(tree, scale)
        objective = lambda x: sum(jnp.sum((x[k] - tree[k]) ** 2) / 2 + scale[k] * norm(x[k]) for k in tree)
        for key in jax.random.split(jax.random.key(0), 20):
            near = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(key, x.shape), x)
            assert objective(x) < objective(near)
        at_zero = jax.jacobian(lambda t: prox(t, 0.5))(jnp.zeros((2, 2)))
        np.testing.assert_array_equal(at_zero, np.zeros((2, 2, 2, 2)))
    w = fb.projection_affine(tree["b"], EQUATIONS[:, :4], jnp.ones(2))
    np.testing.assert_allclose(EQUATIONS[:, :4] @ w, np.ones(2))
    np.testing.assert_allclose(np.linalg.lstsq(EQUATIONS[:, :4].T, tree["b"] - w)[1], np.zeros(1), atol=1e-20)


PROX = lambda w, omega, s: w


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fb.prox_aid("cg", PROX), TypeError, "prox_aid: linear_solver must be one of"),
        (lambda: fb.prox_aid(fb.cg(3), lambda w: w), TypeError, "prox_aid: prox must take 3 arguments"),
        (lambda: fb.prox_aid(fb.cg(3), PROX, 0.0), ValueError, "step_size must be a finite number > 0"),
        (lambda: fb.proximal(optax.sgd, PROX, 0.1), TypeError, "proximal: optimizer must be"),
        (lambda: fb.proximal(optax.sgd(0.1), 3, 0.1), TypeError, "proximal: prox must be callable"),
        (lambda: fb.proximal(optax.sgd(0.1), PROX, 0.1).update(1.0, ()), ValueError, "needs the parameters"),
    ],
)
def test_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
