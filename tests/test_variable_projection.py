"""A linear head that is solved for: V, the reduced objective and its hypergradients against dense solves by hand."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from problems import derivatives, design, finite_differences, newton

import funcbilevel as fb
from funcbilevel._predictor import training_value_and_grad

RIDGE = 0.3
K = 2  # outputs


def relative_error(got: Any, expected: Any) -> float:
    chex.assert_trees_all_equal_shapes(got, expected)
    (a, _), (b, _) = (jax.flatten_util.ravel_pytree(tree) for tree in (got, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# One problem, with everything about it written densely. The weights make C differ from sample to sample and from
# output to output; the features have three parameters, at which the reduced problem has a nondegenerate minimum.


def phi(theta: Any, x: jax.Array) -> jax.Array:
    """[n, 4]: features that are not linear in theta."""
    return jnp.concatenate([jnp.tanh(x * theta["scale"][None]), jnp.ones_like(x[:, :1])], axis=1)


def doubled(theta: Any, x: jax.Array) -> jax.Array:
    """[n, 8] of rank 4."""
    return jnp.concatenate([phi(theta, x), 2.0 * phi(theta, x)], axis=1)


def init(key: jax.Array, x: jax.Array) -> Any:
    return {"scale": 1.0 + 0.3 * jax.random.normal(key, (x.shape[1],), x.dtype)}


FEATURES = fb.from_function(init, phi)
MODEL = fb.variable_projection(FEATURES, K, RIDGE)
TRUTH = {"scale": np.array([0.7, -1.1, 1.6])}


def target(omega: Any, batch: Any) -> jax.Array:
    _, y, _ = batch
    return y + omega["shift"][None] * jnp.sin(y * omega["rate"])


traces: Counter[str] = Counter()


def inner_objective(omega: Any, v: jax.Array, batch: Any) -> jax.Array:
    traces["inner"] += 1
    return jnp.mean(batch[2] * (v - target(omega, batch)) ** 2)


def outer_objective(omega: Any, v: jax.Array, batch: Any) -> jax.Array:
    return jnp.mean(jnp.log(jnp.cosh(v - batch[1]))) + 0.1 * jnp.sum(omega["shift"] ** 2)


PROBLEM = fb.FunctionalProblem(inner_objective, outer_objective)


class Data(NamedTuple):
    omega: Any
    theta: Any
    inner: Any
    outer: Any


@functools.cache
def data(weights: str = "per-entry") -> Data:
    """P != Q. The inner labels are nearly in the model's class, so that its reduced Hessian is positive definite."""
    rng = np.random.default_rng(0)
    x_P, x_Q = rng.normal(size=(14, 3)), rng.normal(size=(9, 3)) + 0.3
    y_P = np.asarray(phi(TRUTH, jnp.asarray(x_P))) @ rng.normal(size=(4, K)) + 0.02 * rng.normal(size=(14, K))
    w = rng.uniform(0.3, 3.0, (14, K)) if weights == "per-entry" else np.full((14, K), 2.0)
    y_Q = rng.normal(size=(9, K))
    omega = {"shift": np.array([0.05, -0.03]), "rate": np.array(1.3)}
    theta = {"scale": TRUTH["scale"] + 0.1}
    return jax.tree.map(jnp.asarray, Data(omega, theta, (x_P, y_P, w), (x_Q, y_Q, np.ones((9, K)))))


def dense_head(features: Callable[..., jax.Array], ridge: float, omega: Any, theta: Any, batch: Any) -> jax.Array:
    """V, one `jnp.linalg.solve` for each output: the normal equations of the mean over n * K weighted squares."""
    x, _, w = batch
    Phi, t = features(theta, x), target(omega, batch)

    def column(w: jax.Array, t: jax.Array) -> jax.Array:
        A = 2.0 / (K * len(w)) * (Phi.T * w[None]) @ Phi + ridge * jnp.eye(Phi.shape[1])
        return jnp.linalg.solve(A, 2.0 / (K * len(w)) * Phi.T @ (w * t))

    return jnp.stack([column(w[:, j], t[:, j]) for j in range(K)], axis=1)


def reduced_inner(omega: Any, theta: Any, batch: Any) -> jax.Array:
    """min over V of L_in + ridge/2 |V|^2."""
    V = dense_head(phi, RIDGE, omega, theta, batch)
    return inner_objective(omega, phi(theta, batch[0]) @ V, batch) + 0.5 * RIDGE * jnp.sum(V**2)


def reduced_outer(omega: Any, theta: Any, inner: Any, outer: Any) -> jax.Array:
    return outer_objective(omega, phi(theta, outer[0]) @ dense_head(phi, RIDGE, omega, theta, inner), outer)


# The head.


def fitted(model: fb.Model, omega: Any, theta: Any, inner: Any, inputs: Any) -> Any:
    """V and the prediction on the inputs."""

    @jax.jit
    def compiled(omega: Any, theta: Any, inner: Any, inputs: Any) -> Any:
        h = fb.predictor(PROBLEM, model, omega, theta, inner)
        return h.head, h(inputs)

    return compiled(omega, theta, inner, inputs)


@pytest.mark.parametrize("ridge", [0.0, RIDGE])
@pytest.mark.parametrize("weights", ["equal", "per-entry"])
def test_the_head_is_the_dense_solution(x64, weights, ridge):
    d = data(weights)
    V, v = fitted(fb.variable_projection(FEATURES, K, ridge), d.omega, d.theta, d.inner, d.outer[0])
    expected = dense_head(phi, ridge, d.omega, d.theta, d.inner)
    assert relative_error(V, expected) < 1e-10
    assert relative_error(v, phi(d.theta, d.outer[0]) @ expected) < 1e-10


def test_one_step_is_exact_if_all_weights_are_alike_and_not_otherwise(x64):
    for weights, exact in (("equal", True), ("per-entry", False)):
        d = data(weights)
        model = fb.variable_projection(FEATURES, K, RIDGE, num_steps=1)
        V, _ = fitted(model, d.omega, d.theta, d.inner, d.outer[0])
        error = relative_error(V, dense_head(phi, RIDGE, d.omega, d.theta, d.inner))
        assert (error < 1e-10) == exact, error
        assert exact or error > 1e-4


def test_features_of_deficient_rank_without_ridge(x64):
    """The solution of least norm, in which both copies of a feature share its weight as 1 to 2."""
    d = data()
    model = fb.variable_projection(fb.from_function(init, doubled), K)
    V, v = fitted(model, d.omega, d.theta, d.inner, d.outer[0])
    once = dense_head(phi, 0.0, d.omega, d.theta, d.inner)
    assert relative_error(V, jnp.concatenate([once, 2.0 * once]) / 5.0) < 1e-10
    assert relative_error(v, phi(d.theta, d.outer[0]) @ once) < 1e-10


def test_the_predictor_of_a_model_without_head_is_its_apply(x64):
    d = data()
    h = fb.predictor(PROBLEM, FEATURES, None, d.theta, None)
    assert h.head is None
    chex.assert_trees_all_equal(h(d.outer[0]), phi(d.theta, d.outer[0]))


# The reduced inner objective.


@pytest.mark.parametrize("weights", ["equal", "per-entry"])
def test_the_inner_gradient_is_that_of_the_reduced_objective(x64, weights):
    d = data(weights)
    (value, (_, state)), grad = jax.jit(
        lambda theta: training_value_and_grad(PROBLEM, MODEL, d.omega, d.inner)(theta, (), None)
    )(d.theta)
    expected, expected_grad = jax.jit(jax.value_and_grad(reduced_inner, argnums=1))(d.omega, d.theta, d.inner)
    assert state == ()
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert relative_error(grad, expected_grad) < 1e-10
    difference = finite_differences(lambda _, theta: reduced_inner(d.omega, theta, d.inner), d.theta).gradient
    assert relative_error(grad, difference) < 1e-7


def test_parametrize_gives_the_reduced_problem(x64):
    """Values and both derivatives, of objectives with aux as well."""
    d = data()
    with_aux = fb.FunctionalProblem(
        lambda *args: (inner_objective(*args), {"largest": jnp.max(args[1])}),
        lambda *args: (outer_objective(*args), {}),
        has_aux=True,
    )
    plain, aux = (fb.parametrize(p, MODEL, inner_batch=d.inner) for p in (PROBLEM, with_aux))

    def outer(omega: Any, theta: Any, batch: Any) -> jax.Array:
        return reduced_outer(omega, theta, d.inner, batch)

    for got, expected, batch in (
        (plain.inner_objective, reduced_inner, d.inner),
        (plain.outer_objective, outer, d.outer),
        (lambda *args: aux.inner_objective(*args)[0], reduced_inner, d.inner),
        (lambda *args: aux.outer_objective(*args)[0], outer, d.outer),
    ):
        a, b = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(d.omega, d.theta, batch) for f in (got, expected))
        assert relative_error(a, b) < 1e-10
    v = phi(d.theta, d.inner[0]) @ dense_head(phi, RIDGE, d.omega, d.theta, d.inner)
    _, reported = jax.jit(aux.inner_objective)(d.omega, d.theta, d.inner)
    np.testing.assert_allclose(reported["largest"], jnp.max(v), rtol=1e-10)


# Hypergradients.


def assert_parts(h: fb.Hypergradient, expected: Any, tolerance: float) -> None:
    for name in ("explicit", "implicit", "gradient"):
        error = relative_error(getattr(h, name), getattr(expected, name))
        assert error < tolerance, f"{name}: {error:.1e}"


def joint_objective(omega: Any, params: Any, batch: Any) -> jax.Array:
    """Of theta and V together: its minimum is that of the reduced objective."""
    theta, V = params
    return inner_objective(omega, phi(theta, batch[0]) @ V, batch) + 0.5 * RIDGE * jnp.sum(V**2)


@pytest.mark.parametrize("weights", ["equal", "per-entry"])
def test_aid_is_implicit_differentiation_of_the_whole_network(x64, weights):
    """By the implicit function theorem for theta and V together, with the dense Hessian of both."""
    d = data(weights)
    head = dense_head(phi, RIDGE, d.omega, d.theta, d.inner)
    solution = newton(lambda omega, params: joint_objective(omega, params, d.inner), (d.theta, head))
    theta, V = jax.jit(solution)(d.omega)
    flat, unravel = jax.flatten_util.ravel_pytree((theta, V))
    H = jax.jit(jax.hessian(lambda flat: joint_objective(d.omega, unravel(flat), d.inner)))(flat)
    assert np.linalg.eigvalsh(H)[0] > 1e-3

    def value(explicit: Any, implicit: Any) -> jax.Array:
        theta, V = solution(implicit)
        return outer_objective(explicit, phi(theta, d.outer[0]) @ V, d.outer)

    outer_value, expected = derivatives(value, d.omega)
    assert relative_error(expected.gradient, finite_differences(value, d.omega).gradient) < 1e-6
    # The library's explicit part holds V's answer to omega at fixed theta.
    explicit = jax.jit(jax.grad(reduced_outer))(d.omega, theta, d.inner, d.outer)
    expected = expected._replace(explicit=explicit, implicit=jax.tree.map(jnp.subtract, expected.gradient, explicit))
    h = jax.jit(
        lambda omega, theta: fb.hypergradient(PROBLEM, MODEL, fb.aid(fb.cg(20)), omega, theta, d.inner, d.outer)
    )(d.omega, theta)
    np.testing.assert_allclose(h.outer_value, outer_value, rtol=1e-12)
    assert_parts(h, expected, 1e-8)
    assert bool(h.metrics["linear_converged"])


@functools.cache
def unrolled_derivatives(rate: float, num_steps: int) -> Any:
    d = data()

    def value(explicit: Any, implicit: Any) -> jax.Array:
        def step(carry: Any, _: None) -> Any:
            theta, speed = carry
            gradient = jax.grad(reduced_inner, argnums=1)(implicit, theta, d.inner)
            speed = jax.tree.map(lambda s, g: 0.5 * s + g, speed, gradient)
            return (jax.tree.map(lambda x, s: x - rate * s, theta, speed), speed), None

        start = d.theta, jax.tree.map(jnp.zeros_like, d.theta)
        (theta, _), _ = jax.lax.scan(step, start, length=num_steps)
        return reduced_outer(explicit, theta, d.inner, d.outer)

    return *derivatives(value, d.omega), finite_differences(value, d.omega)


@pytest.mark.parametrize("mode", ["reverse", "forward", "remat"])
def test_itd_is_the_derivative_of_steps_on_the_reduced_problem(x64, mode):
    d, rate, num_steps = data(), 0.3, 4
    itd = fb.itd(num_steps, "forward") if mode == "forward" else fb.itd(num_steps, remat=mode == "remat")
    optimizer = optax.sgd(rate, momentum=0.5)
    h = jax.jit(
        lambda *args: fb.hypergradient(PROBLEM, MODEL, itd, *args, d.inner, d.outer, inner_optimizer=optimizer)
    )(d.omega, d.theta)
    value, expected, difference = unrolled_derivatives(rate, num_steps)
    np.testing.assert_allclose(h.outer_value, value, rtol=1e-12)
    assert_parts(h, expected, 1e-8)
    assert_parts(h, difference, 1e-6)


@pytest.mark.parametrize("name", ["aid-cg", "alternating"])
def test_objectives_that_close_over_tracers(x64, name):
    """Over vmapped weights: the same as weights in the batch, one after the other."""
    d = data()

    def estimate(problem: fb.FunctionalProblem, inner: Any) -> Any:
        optimizer = optax.sgd(0.3)
        h = fb.hypergradient(
            problem, MODEL, ESTIMATORS[name], d.omega, d.theta, inner, d.outer, inner_optimizer=optimizer
        )
        return h.gradient

    def closed(w: jax.Array) -> Any:
        return estimate(
            fb.FunctionalProblem(lambda omega, v, b: inner_objective(omega, v, (*b[:2], w)), outer_objective), d.inner
        )

    weights = jnp.stack([d.inner[2], 2.0 - 0.5 * d.inner[2]])
    rows = jax.jit(jax.vmap(closed))(weights)
    expected = jax.jit(jax.vmap(lambda w: estimate(PROBLEM, (*d.inner[:2], w))))(weights)
    assert relative_error(rows, expected) < 1e-10
    assert relative_error(rows, jax.tree.map(lambda x: x[::-1], rows)) > 1e-2


# DFIV: an instrumental regression whose second stage is a ridge regression in closed form.


class Regression(NamedTuple):
    problem: fb.FunctionalProblem
    omega: Any
    theta: jax.Array
    inner: Any
    outer: Any


def hidden(theta: jax.Array, z: jax.Array) -> jax.Array:
    return jnp.tanh(z @ theta)


@functools.cache
def regression(weighted: bool) -> Regression:
    """Instruments z, treatments x, outcomes y; omega makes the treatment features f(x), [n, 3]."""
    rng = np.random.default_rng(1)
    n_P, n_Q, p = 20, 16, 5
    omega = {"in": rng.normal(size=(2, 4)), "out": rng.normal(size=(4, 3))}
    w = rng.uniform(0.5, 2.0, (n_P, 1)) if weighted else np.ones((n_P, 1))
    inner, outer = (design(rng, n_P, 4), rng.normal(size=(n_P, 2)), w), (design(rng, n_Q, 4), rng.normal(size=n_Q))

    def outer_objective(omega: Any, v: jax.Array, batch: Any) -> jax.Array:
        _, y = batch
        u = jnp.linalg.solve(v.T @ v / len(y) + 0.1 * jnp.eye(3), v.T @ y / len(y))
        return jnp.mean((y - v @ u) ** 2) + 0.1 * jnp.sum(u**2)

    problem = fb.FunctionalProblem(
        lambda omega, v, batch: jnp.mean(batch[2] * (v - treatment(omega, batch[1])) ** 2), outer_objective
    )
    return Regression(problem, *jax.tree.map(jnp.asarray, (omega, 0.7 * rng.normal(size=(4, p)), inner, outer)))


def treatment(omega: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ omega["in"]) @ omega["out"]


def dfiv(r: Regression, ridge: float) -> Any:
    """Its gradient with the first stage solved densely."""
    z, x, w = r.inner
    Phi_P, Phi_Q = hidden(r.theta, z), hidden(r.theta, r.outer[0])
    A = (Phi_P * w).T @ Phi_P * (2.0 / (3 * len(z))) + ridge * jnp.eye(Phi_P.shape[1])

    def objective(omega: Any) -> jax.Array:
        V = jnp.linalg.solve(A, (Phi_P * w).T @ treatment(omega, x) * (2.0 / (3 * len(z))))
        return r.problem.outer_objective(omega, Phi_Q @ V, r.outer)

    return jax.jit(jax.grad(objective))(r.omega)


def estimate(r: Regression, model: fb.Model, estimator: fb.Estimator) -> fb.Hypergradient:
    @jax.jit
    def compiled(omega: Any, theta: Any) -> fb.Hypergradient:
        return fb.hypergradient(r.problem, model, estimator, omega, theta, r.inner, r.outer, key=jax.random.key(0))

    return compiled(r.omega, r.theta)


HIDDEN = fb.from_function(lambda key, z: jax.random.normal(key, (z.shape[1], 5), z.dtype), hidden)


@pytest.mark.parametrize("ridge", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_alternating_is_funcid_with_the_linear_adjoint(x64, weighted, ridge):
    """DFIV is the projected model's explicit gradient; FuncID finds it as the implicit part of fixed predictions."""
    r, model = regression(weighted), fb.variable_projection(HIDDEN, 3, ridge)
    expected = dfiv(r, ridge)
    assert np.linalg.norm(expected["in"]) > 1e-3
    alternating = estimate(r, model, fb.alternating())
    assert relative_error(alternating.gradient, expected) < 1e-8
    for features in (HIDDEN, hidden, model):  # a projected model's own `apply` gives its features
        funcid = estimate(r, model, fb.funcid(fb.linear_adjoint(features, ridge)))
        assert relative_error(funcid.gradient, alternating.gradient) < 1e-8
        chex.assert_trees_all_equal(funcid.explicit, jax.tree.map(jnp.zeros_like, r.omega))
        np.testing.assert_allclose(funcid.outer_value, alternating.outer_value, rtol=1e-12)
    other = estimate(r, model, fb.funcid(fb.linear_adjoint(HIDDEN, ridge + 0.1)))
    assert relative_error(other.gradient, alternating.gradient) > 1e-3


def test_the_learned_linear_adjoint_approaches_dfiv(x64):
    """A linear layer without bias on the frozen features, with weight decay = ridge."""
    ridge = 0.02
    r, model = regression(True), fb.variable_projection(HIDDEN, 3, ridge)
    head = fb.from_function(lambda key, Phi: jnp.zeros((Phi.shape[1], 3), Phi.dtype), lambda W, Phi: Phi @ W)
    optimizer = optax.chain(optax.add_decayed_weights(ridge), optax.sgd(1.0))
    expected = estimate(r, model, fb.funcid(fb.linear_adjoint(HIDDEN, ridge))).gradient
    errors = {
        features: [
            relative_error(
                estimate(r, model, fb.funcid(fb.learned_adjoint(optimizer, K, model=head, features=features))).gradient,
                expected,
            )
            for K in (10, 100, 1000)
        ]
        for features in (HIDDEN, hidden)
    }
    assert all(later < earlier for earlier, later in itertools.pairwise(errors[HIDDEN])), errors
    assert errors[HIDDEN][-1] < 1e-3 < errors[HIDDEN][0]
    np.testing.assert_allclose(errors[HIDDEN], errors[hidden], rtol=1e-6, atol=1e-12)


# In the loop.

ESTIMATORS: dict[str, fb.Estimator] = {
    "funcid-linear": fb.funcid(fb.linear_adjoint(FEATURES, RIDGE)),
    "aid-cg": fb.aid(fb.cg(3, damping=0.1)),
    "itd": fb.itd(2),
    "alternating": fb.alternating(),
    "penalty-value": fb.value_penalty(optax.sgd(0.1), 3, 10.0),
    "penalty-gradient": fb.gradient_penalty(optax.sgd(0.1), 3, 10.0),
}


def solver_of(estimator: fb.Estimator, model: fb.Model = MODEL) -> fb.BilevelSolver:
    return fb.bilevel(
        PROBLEM,
        model,
        estimator,
        inner_optimizer=optax.sgd(0.1),
        outer_optimizer=optax.adam(0.01),
        inner_steps=2,
    )


def single(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_loop_in_either_precision_and_over_seeds(x64, name):
    """One trace; the outer objective is that of the predictor; vmapped seeds equal single runs; float32 agrees."""
    d, solver = data(), solver_of(ESTIMATORS[name])
    step = jax.jit(solver.step)

    def run(d: Data, seed: int) -> Any:
        state = solver.init(jax.random.key(seed), d.omega, d.inner)
        metrics: Any = {}
        for _ in range(3):
            before = state
            state, metrics = step(state, d.inner, d.outer)
        return before, state, metrics

    before, state, metrics = run(d, 0)
    _, v = fitted(MODEL, before.outer_params, state.inner_params, d.inner, d.outer[0])
    value = outer_objective(before.outer_params, v, d.outer)
    np.testing.assert_allclose(metrics["outer_objective"], value, rtol=1e-10)
    assert all(metrics[f"{level}_finite"] for level in ("inner", "adjoint", "outer"))
    assert relative_error(state.outer_params, d.omega) > 1e-3
    assert relative_error(state.inner_params, solver.init(jax.random.key(0), d.omega, d.inner).inner_params) > 1e-3

    traced = traces.copy()
    _, other, _ = run(d, 1)
    assert traces["inner"] - traced["inner"] <= 2  # of `init`, which looks at the objective: not of the step
    assert step._cache_size() == 1

    keys = jax.random.wrap_key_data(jnp.stack([jax.random.key_data(jax.random.key(seed)) for seed in (0, 1)]))
    together = jax.vmap(solver.init, (0, None, None))(keys, d.omega, d.inner)
    vmapped = jax.jit(jax.vmap(solver.step, (0, None, None)))
    for _ in range(3):
        together, _ = vmapped(together, d.inner, d.outer)
    for i, alone in enumerate((state, other)):
        for part in ("outer_params", "inner_params"):
            got = jax.tree.map(lambda x, i=i: x[i], getattr(together, part))
            assert relative_error(got, getattr(alone, part)) < 1e-8

    start = single(solver.init(jax.random.key(0), d.omega, d.inner).inner_params)
    with jax.enable_x64(False):
        narrow = single(d)
        given = solver.init(jax.random.key(0), narrow.omega, narrow.inner, start)
        for _ in range(3):
            given, metrics = step(given, narrow.inner, narrow.outer)
        dtypes = {x.dtype for x in jax.tree.leaves((given.outer_params, given.inner_params, metrics))}
        assert dtypes == {jnp.dtype("float32"), jnp.dtype("bool")}
    for part in ("outer_params", "inner_params"):
        assert relative_error(single(getattr(given, part)), single(getattr(state, part))) < 1e-3


class Network(linen.Module):
    """Features with statistics of both kinds."""

    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = linen.SpectralNorm(linen.Dense(6))(x, update_stats=train)
        return jnp.tanh(linen.BatchNorm(momentum=0.9, use_running_average=not train)(x))


@pytest.mark.parametrize("name", ["funcid-linear", "aid-cg", "itd", "alternating"])
def test_statistics_are_updated_once_per_inner_step_in_train_mode(name):
    """And the head of predictions is solved for on features in evaluation mode."""
    network = fb.from_linen(Network())
    model = fb.variable_projection(network, K, RIDGE)
    with jax.enable_x64(True):
        d = single(data())
    estimators = ESTIMATORS | {"funcid-linear": fb.funcid(fb.linear_adjoint(network, RIDGE))}
    solver = solver_of(estimators[name], model)
    start = solver.init(jax.random.key(0), d.omega, d.inner)
    state, metrics = jax.jit(solver.step)(start, d.inner, d.outer)

    params, stats, x = start.inner_params, start.model_state, d.inner[0]
    for _ in range(2):

        def value(params: Any, stats: Any = stats) -> Any:
            Phi, stats = network.apply(params, stats, x, train=True)
            V = jax.lax.stop_gradient(fb.predictor(PROBLEM, FIXED, d.omega, Phi, d.inner).head)
            return inner_objective(d.omega, Phi @ V, d.inner), stats

        grads, stats = jax.jit(jax.grad(value, has_aux=True))(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    chex.assert_trees_all_close(state.model_state, stats, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state.inner_params, params, rtol=1e-4, atol=1e-5)
    for before, after in zip(*map(jax.tree.leaves, (start.model_state, state.model_state)), strict=True):
        assert np.max(np.abs(after - before)) > 1e-4

    Phi_P, Phi_Q = (network.apply(state.inner_params, state.model_state, b[0])[0] for b in (d.inner, d.outer))
    V = fb.predictor(PROBLEM, FIXED, d.omega, Phi_P, d.inner).head
    np.testing.assert_allclose(metrics["outer_objective"], outer_objective(d.omega, Phi_Q @ V, d.outer), rtol=1e-4)


# Its "parameters" are the features themselves on the inner batch.
FIXED = fb.variable_projection(fb.from_function(lambda key, x: x, lambda Phi, x: Phi), K, RIDGE)
