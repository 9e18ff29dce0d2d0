"""`fb.argmin`: the inner solution as a layer, against Newton's method that is differentiated through, in float64."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import identity_features, linear_model, newton

import funcbilevel as fb

RNG = np.random.default_rng(0)
X, X_Q = RNG.normal(size=(8, 3)), RNG.normal(size=(5, 3))
WEIGHTS, Y_Q = RNG.uniform(0.5, 2.0, 8), RNG.normal(size=5)
OMEGA = RNG.normal(size=3)

pytestmark = pytest.mark.usefixtures("x64")


def inner(omega: Any, v: Any, batch: Any) -> jax.Array:
    """A regression whose target is not in the linear class."""
    x, weights = batch
    return jnp.mean(weights * jnp.cosh(v - jnp.sin(x @ omega) * omega[0]))


def of_theta(omega: Any, theta: Any, batch: Any) -> jax.Array:
    return inner(omega, batch[0] @ theta, batch)


def loss(h: Callable[[Any], Any], omega: Any) -> jax.Array:
    """Several uses of the function on several inputs, and omega itself."""
    return jnp.sum(jnp.sin(h(X_Q)) * Y_Q) + jnp.mean(h(X) ** 2) * jnp.mean(h(X_Q[:2])) * omega[1]


def exact(omega: Any, weights: Any = WEIGHTS) -> Any:
    objective = lambda omega, theta: of_theta(omega, theta, (X, weights))
    solution = newton(objective, jnp.zeros(3), 12)
    # `newton` is right to first order: one more step for the second derivative.
    theta = solution(omega)
    gradient, hessian = jax.grad(objective, argnums=1), jax.hessian(objective, argnums=1)
    return theta - jnp.linalg.solve(hessian(omega, theta), gradient(omega, theta))


FUNCTIONAL = fb.FunctionalProblem(inner, inner)
MODEL = linear_model(np.zeros(()))
LINEAR = fb.funcid(fb.linear_adjoint(identity_features))
KERNEL = fb.funcid(fb.kernel_adjoint(fb.linear_kernel(), ridge=0.0))  # the same class of functions as LINEAR
LEARNED = fb.funcid(fb.learned_adjoint(optax.sgd(0.1, momentum=0.9, nesterov=True), 1000))
AID = fb.aid(fb.cg(10))


@functools.cache
def expected() -> tuple[Any, Any, Any]:
    F = lambda omega, weights: loss(lambda x: x @ exact(omega, weights), omega)
    gradient = jax.grad(F, argnums=(0, 1))
    return jax.jit(lambda omega: (exact(omega), gradient(omega, WEIGHTS), jax.hessian(F)(omega, WEIGHTS)))(OMEGA)


@pytest.mark.parametrize("estimator", [LINEAR, KERNEL, AID, LEARNED], ids=lambda e: repr(e)[:20])
def test_functional(estimator: fb.Estimator) -> None:
    theta, (gradient, by_weights), hessian = expected()
    layer = fb.argmin(FUNCTIONAL, MODEL, estimator)

    def F(omega: Any, weights: Any = WEIGHTS) -> jax.Array:
        return loss(layer(omega, theta, (X, weights)), omega)

    def in_closure(omega: Any) -> jax.Array:
        problem = fb.FunctionalProblem(lambda _, v, batch: inner(omega, v, batch), inner)
        return loss(fb.argmin(problem, MODEL, estimator)(0.0, theta, (X, WEIGHTS)), omega)

    def on_inputs(omega: Any, x: Any) -> jax.Array:
        return jnp.sum(layer(omega, theta, (X, WEIGHTS))(x) ** 2)

    tolerance = 1e-4 if estimator is LEARNED else 1e-9
    first = jax.jit(
        lambda omega: (F(omega), jax.grad(F, argnums=(0, 1))(omega, WEIGHTS), jax.grad(on_inputs, 1)(omega, X_Q))
    )
    value, got, by_inputs = first(OMEGA)
    np.testing.assert_allclose(value, loss(lambda x: x @ theta, OMEGA), rtol=1e-12)
    np.testing.assert_allclose(got[0], gradient, atol=tolerance)
    np.testing.assert_allclose(got[1], by_weights, atol=tolerance)
    np.testing.assert_allclose(by_inputs, 2 * np.outer(X_Q @ theta, theta), rtol=1e-9)
    np.testing.assert_allclose(jax.grad(jax.jit(in_closure))(OMEGA), gradient, atol=tolerance)
    if estimator is LEARNED:
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(F, (OMEGA,), (OMEGA,))
        with pytest.raises(TypeError, match="learned adjoint has no second derivative"):
            jax.eval_shape(jax.jacrev(jax.grad(F)), OMEGA)
        return

    if estimator is AID:
        several = jax.jit(
            lambda: (jax.jacrev(jax.grad(in_closure))(OMEGA), jax.vmap(jax.grad(F))(jnp.stack([OMEGA] * 2)))
        )
        curvature, mapped = several()
        np.testing.assert_allclose(curvature, hessian, atol=1e-8)
        np.testing.assert_allclose(mapped, np.stack([gradient, gradient]), atol=1e-9)
        return
    by_omega_and_inputs = lambda omega: jax.grad(on_inputs, 1)(omega, X_Q)
    several = jax.jit(
        lambda omega: (jax.jacfwd(F)(omega), jax.hessian(F)(omega), jax.jacfwd(by_omega_and_inputs)(omega))
    )
    forward, curvature, mixed = several(OMEGA)
    np.testing.assert_allclose(forward, gradient, atol=1e-9)
    np.testing.assert_allclose(curvature, hessian, atol=1e-8)
    exactly = lambda omega: jax.grad(lambda x: jnp.sum((x @ exact(omega)) ** 2))(X_Q)
    np.testing.assert_allclose(mixed, jax.jit(jax.jacfwd(exactly))(OMEGA), atol=1e-8)


def test_derivative_by_the_inputs_of_the_inner_batch() -> None:
    theta, *_ = expected()

    def F(x: Any, estimator: fb.Estimator) -> jax.Array:
        return jnp.sum(fb.argmin(FUNCTIONAL, MODEL, estimator)(OMEGA, theta, (x, WEIGHTS))(X_Q) ** 2)

    with pytest.raises(TypeError, match="inputs of inner_batch are differentiated"):
        jax.grad(F)(X, LINEAR)

    def exact(x: Any) -> jax.Array:
        objective = lambda _, theta: of_theta(OMEGA, theta, (x, WEIGHTS))
        gradient = jax.grad(objective, argnums=1)(0, theta)
        return jnp.sum((X_Q @ (theta - jnp.linalg.solve(jax.hessian(objective, argnums=1)(0, theta), gradient))) ** 2)

    got, want = jax.jit(lambda x: (jax.grad(F)(x, AID), jax.jacfwd(exact)(x)))(X)
    np.testing.assert_allclose(got, want, atol=1e-9)


def test_pointwise() -> None:
    """One free value per sample: h*_omega(x_i) is the target."""
    table = fb.from_function(lambda key, x: jnp.zeros(8), lambda theta, x: theta[: x.shape[0]])
    layer = fb.argmin(FUNCTIONAL, table, fb.funcid(fb.pointwise_adjoint()))
    target = lambda omega: jnp.sin(X @ omega) * omega[0]
    F = lambda omega: jnp.sum(jnp.exp(layer(omega, target(OMEGA), (X, WEIGHTS))(X)))
    G = lambda omega: jnp.sum(jnp.exp(target(omega)))
    derivatives = lambda f: jax.jit(lambda omega: (jax.grad(f)(omega), jax.jacfwd(f)(omega), jax.hessian(f)(omega)))
    for got, want in zip(derivatives(F)(OMEGA), derivatives(G)(OMEGA)):
        np.testing.assert_allclose(got, want, atol=1e-9)
    elsewhere = jax.grad(lambda omega: jnp.sum(layer(omega, target(OMEGA), (X, WEIGHTS))(X + 1.0)))
    assert np.all(np.isnan(elsewhere(OMEGA)))


@pytest.mark.parametrize("estimator", [AID, LINEAR], ids=["aid", "funcid"])
def test_a_head_that_is_solved_for(estimator: fb.Estimator) -> None:
    """h*_omega is then the regression on the features."""
    features = fb.from_function(lambda key, x: jnp.eye(3), lambda theta, x: x @ theta)
    model = fb.variable_projection(features, num_outputs=1)
    squares = lambda omega, v, batch: jnp.mean(batch[1] * (v[:, 0] - jnp.sin(batch[0] @ omega)) ** 2)
    problem = fb.FunctionalProblem(squares, squares)
    layer = fb.argmin(problem, model, estimator)
    solution = lambda omega: jnp.linalg.solve((X.T * WEIGHTS) @ X, (X.T * WEIGHTS) @ jnp.sin(X @ omega))
    F = lambda omega: jnp.sum(jnp.sin(layer(omega, jnp.eye(3), (X, WEIGHTS))(X_Q)))
    G = lambda omega: jnp.sum(jnp.sin(X_Q @ solution(omega)))
    got, want = jax.jit(lambda omega: (jax.grad(F)(omega), jax.grad(G)(omega)))(OMEGA)
    np.testing.assert_allclose(got, want, atol=1e-9)


def test_parametric_with_a_leaf_that_the_objective_does_not_see() -> None:
    problem = fb.ParametricProblem(
        lambda omega, theta, x: jnp.sum(jnp.cosh(theta["w"] - omega * x)), lambda omega, theta, x: jnp.sum(theta["w"])
    )
    theta = {"w": 3.0 * jnp.arange(4.0), "idle": jnp.ones(2)}
    with pytest.warns(UserWarning, match="does not depend on idle"):
        got = jax.jacobian(lambda omega: fb.argmin(problem, None, AID)(omega, theta, jnp.arange(4.0)))(3.0)
    np.testing.assert_allclose(got["w"], np.arange(4.0), atol=1e-12)
    np.testing.assert_allclose(got["idle"], np.zeros(2))


def maml() -> tuple[fb.ParametricProblem, Any, Any, Any]:
    """Sinusoids of which each has ten samples to adapt to; the outer parameters are where the networks start."""
    rng = np.random.default_rng(1)
    tasks, samples, width = 3, 10, 8
    amplitude, phase = rng.uniform(0.5, 2.0, (tasks, 1)), rng.uniform(0.0, 3.0, (tasks, 1))
    x = rng.uniform(-3.0, 3.0, (2, tasks, samples))
    batches = tuple((x, amplitude * np.sin(x + phase)) for x in x)

    def network(theta: Any, x: Any) -> Any:
        return jnp.tanh(x[:, None] * theta["w"][None, :] + theta["b"][None, :]) @ theta["v"]

    def error(theta: Any, batch: Any) -> Any:
        return jnp.mean(jax.vmap(lambda theta, x, y: jnp.mean((network(theta, x) - y) ** 2))(theta, *batch))

    def adapted(omega: Any, theta: Any, batch: Any) -> Any:
        near = jax.tree.map(lambda w, t: jnp.sum((t - w[None]) ** 2) / tasks, omega, theta)
        return error(theta, batch) + sum(jax.tree.leaves(near))

    problem = fb.ParametricProblem(adapted, lambda omega, theta, batch: error(theta, batch))
    omega = {name: rng.normal(size=width) for name in ("w", "b", "v")}
    return problem, omega, jax.tree.map(lambda w: np.stack([w] * tasks), omega), batches


def test_imaml_by_argmin_and_by_bilevel() -> None:
    """The same outer steps to 1e-6, at the same adapted networks; and they learn."""
    problem, omega, theta, (support, query) = maml()
    estimator, optimizer, steps = fb.aid(fb.cg(100), warm_start=False), optax.sgd(0.05), 12
    solver = fb.bilevel(
        problem, None, estimator, inner_optimizer=optax.sgd(0.3), outer_optimizer=optimizer, inner_steps=100
    )
    start = solver.init(jax.random.key(0), omega, None, theta)
    repeated = jax.tree.map(lambda x: np.stack([x] * steps), (support, query))
    end, metrics = jax.jit(solver.run)(start, *repeated)
    layer = fb.argmin(problem, None, estimator)

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        omega, theta, state = carry
        adapt = lambda _, theta: jax.tree.map(
            lambda t, g: t - 0.3 * g, theta, jax.grad(problem.inner_objective, argnums=1)(omega, theta, support)
        )
        theta = jax.lax.fori_loop(0, 100, adapt, theta)
        F = lambda omega: problem.outer_objective(omega, layer(omega, theta, support), query)
        value, gradient = jax.value_and_grad(F)(omega)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(omega, updates), theta, state), value

    carry = (start.outer_params, start.inner_params, start.outer_opt_state)
    (by_argmin, *_), values = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))(carry)
    for name in omega:
        assert np.max(np.abs(by_argmin[name] - omega[name])) > 1e-3
        np.testing.assert_allclose(by_argmin[name], end.outer_params[name], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(values, metrics["outer_objective"], rtol=1e-6)
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize(
    ("problem", "model", "estimator", "error", "message"),
    [
        (FUNCTIONAL, MODEL, fb.alternating(), TypeError, "does not say what the derivative"),
        (FUNCTIONAL, MODEL, fb.cg(3), TypeError, "estimator must be an fb.Estimator"),
        (FUNCTIONAL, None, AID, ValueError, "model must be an fb.Model"),
        (dataclasses.replace(FUNCTIONAL, axis_name="i"), MODEL, AID, ValueError, "axis_name is 'i'"),
    ],
)
def test_refused(problem: Any, model: Any, estimator: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fb.argmin(problem, model, estimator)
