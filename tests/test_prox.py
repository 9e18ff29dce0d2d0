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


PROBLEMS = {
    "lasso": Row(lambda w, omega, s: fb.prox_l1(w, s * jnp.exp(omega[3])), [-1.0]),
    "elastic net": Row(lambda w, omega, s: fb.prox_l1(w, s * 0.3) / (1.0 + s * jnp.exp(omega[3])), [-1.0]),
    "non-negative": Row(lambda w, omega, s: projections.projection_non_negative(w), []),
    "box": Row(lambda w, omega, s: projections.projection_box(w, omega[3], omega[4]), [-0.2, 1.0]),
    "simplex": Row(lambda w, omega, s: projections.projection_simplex(w, omega[3]), [1.0]),
    "l1 ball": Row(lambda w, omega, s: projections.projection_l1_ball(w, omega[3]), [2.0]),
    "l2 ball": Row(lambda w, omega, s: projections.projection_l2_ball(w, omega[3]), [1.0]),
    "inside the ball": Row(lambda w, omega, s: projections.projection_l2_ball(w, omega[3]), [50.0]),
    "affine": Row(lambda w, omega, s: fb.projection_affine(w, EQUATIONS, omega[3:5]), [0.5, 1.0]),
    "group lasso": Row(
        lambda w, omega, s: fb.prox_group_lasso(w.reshape(3, 2), s * jnp.exp(omega[3])).reshape(-1), [-0.5]
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


def prox_of(which: Any) -> Callable[..., Any]:
    """The prox of one row, by its number, so that all rows share one program."""
    branches = [row.prox for row in PROBLEMS.values()]
    return lambda w, omega, s: jax.lax.switch(which, branches, w, omega, s)


PROBLEM = fb.ParametricProblem(inner, outer)


@jax.jit
def derivatives(which: Any, omega: jax.Array) -> Any:
    """The hypergradient, by the loop's estimator and by the layer; F's derivatives to second order."""
    prox = prox_of(which)
    w = solved(prox, omega)
    hyper = fb.hypergradient(PROBLEM, None, fb.prox_aid(fb.cg(20), prox, STEP_SIZE), omega, w, None, None)
    layer = fb.argmin(PROBLEM, None, fb.prox_aid(fb.cg(20), prox, 0.1))
    F = lambda omega: outer(omega, layer(omega, w, None))
    return w, hyper, jax.grad(F)(omega), jax.jacfwd(F)(omega), jax.hessian(F)(omega)


@jax.jit
def differences(which: Any, omega: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and second central differences of omega -> L_out(omega, theta*(omega)), solved anew each time."""
    unit, size = np.eye(omega.size), omega.size
    small, large = 1e-5, 1e-3
    steps = [sign * small * e for e in unit for sign in (1, -1)]
    steps += [large * (a * e + b * f) for e in unit for f in unit for a in (1, -1) for b in (1, -1)]
    values = jax.lax.map(lambda step: outer(omega + step, solved(prox_of(which), omega + step)), jnp.stack(steps))
    first, second = values[: 2 * size].reshape(size, 2), values[2 * size :].reshape(size, size, 4)
    signs = jnp.array([1.0, -1.0, -1.0, 1.0])
    return (first[:, 0] - first[:, 1]) / (2 * small), second @ signs / (4 * large**2)


@pytest.mark.parametrize("name", PROBLEMS)
def test_derivatives(name: str) -> None:
    row, which = PROBLEMS[name], list(PROBLEMS).index(name)
    omega = jnp.asarray([*WEIGHTS, *row.omega, *[0.0] * (2 - len(row.omega))])
    w, hyper, in_reverse, forward, curvature = derivatives(which, omega)
    expected, expected_curvature = differences(which, omega)
    implicit = np.max(np.abs(expected - 2 * omega))
    assert implicit > 0.01
    np.testing.assert_allclose(hyper.gradient, expected, atol=1e-6 * max(1.0, implicit))
    np.testing.assert_allclose(in_reverse, hyper.gradient, atol=1e-8)
    np.testing.assert_allclose(forward, hyper.gradient, atol=1e-8)
    np.testing.assert_allclose(curvature, expected_curvature, atol=1e-5 * max(1.0, np.max(np.abs(curvature))))
    metrics = hyper.metrics
    at_bound = (w == 0) | ((w == omega[3]) | (w == omega[4]) if name == "box" else False)
    assert metrics["active_set_size"] == np.sum(~at_bound)
    assert (0 < np.sum(at_bound) < P) == (name not in ("l2 ball", "inside the ball", "affine"))
    assert metrics["strict_complementarity"]
    assert metrics["linear_converged"]
    assert metrics["inner_gradient_relative"] < 1e-9


def test_several_at_once() -> None:
    """`vmap` = loop."""
    prox = PROBLEMS["lasso"].prox
    omegas = jnp.asarray([[*WEIGHTS, -1.0], [*WEIGHTS, -0.9]])
    layer = fb.argmin(PROBLEM, None, fb.prox_aid(fb.cg(20), prox, STEP_SIZE))
    gradient = jax.grad(lambda omega, w: outer(omega, layer(omega, w, None)))
    both = jax.jit(
        lambda omegas, w: (jax.vmap(gradient)(omegas, w), jax.lax.map(lambda at: gradient(*at), (omegas, w)))
    )
    mapped, loop = both(omegas, jax.vmap(lambda omega: solved(prox, omega))(omegas))
    np.testing.assert_allclose(mapped, loop, atol=1e-10)


def test_closed_forms() -> None:
    """The lasso's and non-negative least squares' hypergradient as formulas on the active set; `aid` misses both."""
    problem = fb.ParametricProblem(lambda omega, w, _: jnp.mean((X @ w - omega[0] * Y) ** 2) / 2, outer)
    cases = {
        "lasso": (lambda w, omega, s: fb.prox_l1(w, s * omega[1]), jnp.array([1.0, 0.3])),
        "non-negative": (lambda w, omega, s: projections.projection_non_negative(w), jnp.array([1.0, 0.0])),
    }
    for prox, omega in cases.values():
        step = lambda _, w: prox(w - 0.3 * X.T @ (X @ w - omega[0] * Y) / N, omega, 0.3)
        w = jax.jit(lambda step=step: jax.lax.fori_loop(0, 1500, step, jnp.ones(P)))()
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
