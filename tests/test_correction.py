"""Newton-corrected FuncID and AID: an error of second order, which the difference from the published ones shows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import PROBLEMS, Case, Row, build, interpolating
from test_hypergradient import minus, norm

import funcbilevel as fb

ERRORS = (1e-1, 1e-2, 1e-3)


def softmax_table() -> Case:
    """Cross-entropy with soft labels from omega and nothing else: every block of C is singular. One row per sample."""
    rng = np.random.default_rng(12)
    n, k = 4, 3
    y = jnp.asarray(rng.dirichlet(np.ones(k), n))
    omega = jnp.asarray(rng.normal(size=(n, k)))
    model = fb.from_function(lambda key, x: jnp.zeros((n, k)), lambda table, x: table + 0.0 * x)
    problem = fb.FunctionalProblem(
        lambda omega, v, batch: jnp.mean(optax.softmax_cross_entropy(v, jax.nn.softmax(omega))),
        lambda omega, v, batch: jnp.mean(optax.softmax_cross_entropy(2.0 * v, batch[1])),
    )
    batch = (jnp.zeros((n, k)), y)
    return interpolating(problem, model, omega, lambda omega, x: omega, lambda t: t, (batch, batch))


@functools.cache
def case_of(name: str) -> Case:
    return softmax_table() if name == "softmax-table" else build(name)


def linear(case: Case, beta: float) -> fb.Estimator:
    return fb.funcid(fb.linear_adjoint(case.features), beta)


def pointwise(case: Case, beta: float) -> fb.Estimator:
    return fb.funcid(fb.pointwise_adjoint(), correction=beta)


def learned(case: Case, beta: float) -> fb.Estimator:
    rate = 1.0 / float(np.linalg.eigvalsh(case.system.H)[-1])
    return fb.funcid(fb.learned_adjoint(optax.sgd(rate, momentum=0.6, nesterov=True), 800), beta)


def kernel(case: Case, beta: float) -> fb.Estimator:
    return fb.funcid(fb.kernel_adjoint(fb.gaussian_kernel(2.0), 0.0), beta)


def aid(case: Case, beta: float) -> fb.Estimator:
    return fb.aid(fb.cg(60), correction=beta)


def rows(problem: Row) -> list[Callable[[Case, float], fb.Estimator]]:
    found: list[Any] = [] if problem.singular else [aid]
    found += [linear] if problem.functional else []
    return found + ([pointwise] if problem.interpolates else [])


TABLE = [(method, name) for name, problem in PROBLEMS.items() for method in rows(problem)]
TABLE += [(learned, name) for name in ("cosh", "shifted", "softmax")]
TABLE += [(kernel, "cosh"), (kernel, "pytree")]
TABLE += [(pointwise, "softmax-table"), (aid, "softmax-table")]
QUADRATIC = ("least-squares", "instrument", "ridge")  # in what the inner level optimises: one Newton step is exact


def gradients(case: Case, estimators: list[fb.Estimator], errors: tuple[float, ...], **kwargs: Any) -> list[list[Any]]:
    """Hypergradients [estimator][error], at inner_params that are off the solution by each error."""
    rng = np.random.default_rng(5)
    away = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=np.shape(x))), case.inner_params)

    @jax.jit
    def at(errors: jax.Array) -> list[Any]:
        def one(e: jax.Array, estimator: fb.Estimator) -> Any:
            theta = jax.tree.map(lambda x, a: x + e * a, case.inner_params, away)
            arguments = (case.outer_params, theta, case.inner_batch, case.outer_batch)
            return fb.hypergradient(
                case.problem, case.model, estimator, *arguments, key=jax.random.key(3), **kwargs
            ).gradient

        return [jax.vmap(functools.partial(one, estimator=estimator))(errors) for estimator in estimators]

    stacked = at(jnp.asarray(errors))
    return [[jax.tree.map(lambda x, i=i: x[i], g) for i in range(len(errors))] for g in stacked]


FAST = {
    *(("pointwise", "cosh"), ("linear", "pytree"), ("learned", "shifted"), ("linear", "softmax")),
    *(("kernel", "cosh"), ("aid", "logistic-ridge"), ("pointwise", "softmax-table"), ("linear", "least-squares")),
}
MARKED = [
    pytest.param(method, name, marks=() if (method.__name__, name) in FAST else pytest.mark.slow)
    for method, name in TABLE
]


@pytest.mark.parametrize(("method", "name"), MARKED)
def test_second_order_and_its_own_error_estimate(x64, method, name):
    case = case_of(name)
    published, corrected = gradients(case, [method(case, 0.0), method(case, 1.0)], ERRORS)
    exact, size = case.exact.gradient, norm(case.exact.gradient)
    before = np.array([norm(minus(g, exact)) for g in published])
    after = np.array([norm(minus(g, exact)) for g in corrected])
    difference = np.array([norm(minus(g, h)) for g, h in zip(published, corrected, strict=True)])
    print(name, method.__name__, before / size, after / size, difference / before)
    assert 0.9 < np.log10(before[1] / before[2]) < 1.1  # of first order, and not small already
    if name in QUADRATIC:
        assert np.all(after <= 1e-9 * size)
    else:
        # Of second order at least, down to the accuracy of the solves.
        assert after[2] <= max(10 ** (-1.8) * after[1], 1e-7 * size)
        assert after[1] <= max(10 ** (-1.8) * after[0], 1e-7 * size) or after[0] > 0.3 * size
        assert after[2] < 0.02 * before[2]
    np.testing.assert_allclose(difference[2] / before[2], 1.0, atol=0.02)
    np.testing.assert_allclose(difference[1] / before[1], 1.0, atol=0.1)


def test_between_and_beyond(x64):
    """v_beta is where beta says: half a step leaves half of the error."""
    case = build("least-squares")
    estimators = [linear(case, beta) for beta in (0.0, 0.5, 2.0)] + [aid(case, 0.5)]
    errors = [norm(minus(g[0], case.exact.gradient)) for g in gradients(case, estimators, (1e-4,))]
    np.testing.assert_allclose(np.array(errors[1:]) / errors[0], [0.5, 1.0, 0.5], rtol=1e-2)


def test_an_unfinished_newton_network_does_not_lead_uphill(x64):
    """One step of its fit from random parameters: a poor direction, of which the best multiple is taken."""
    case = build("cosh")
    adjoint = fb.learned_adjoint(optax.sgd(1e-12), 1)
    v = lambda theta: case.problem.inner_objective(
        case.outer_params, case.model.apply(theta, (), case.inner_batch[0])[0], case.inner_batch
    )
    theta = jax.tree.map(lambda x: x + 0.1, case.inner_params)
    x = case.inner_batch[0]
    prediction = case.model.apply(theta, (), x)[0]
    objective = lambda v: case.problem.inner_objective(case.outer_params, v, case.inner_batch)
    g, C = jax.linearize(jax.grad(objective), prediction)
    inner = fb.FitState(theta, (), ())
    state = adjoint.init(jax.random.key(0), case.problem, case.model, inner, case.inner_batch)
    system = fb.AdjointSystem(C, g, prediction, x, x, lambda tree: tree)
    N, N_Q, _, _ = adjoint.newton(system, case.model, inner, state, None)
    np.testing.assert_array_equal(N, N_Q)
    decrease = 0.5 * jnp.sum(N * C(N)) - jnp.sum(N * g)
    assert decrease < 0
    np.testing.assert_allclose(decrease, -0.5 * jnp.sum(N * g), rtol=1e-9)
    assert v(theta) > 0


@pytest.mark.parametrize("estimator", [fb.funcid(fb.pointwise_adjoint(), 1.0), fb.aid(fb.cg(5), correction=1.0)])
def test_who_is_at_fault(estimator):
    """NaN that the Newton step brings in is the adjoint's, and none of the outer level's."""
    problem = fb.FunctionalProblem(
        lambda omega, v, batch: jnp.mean((v - omega) ** 2 * jnp.where(v == 0, jnp.nan, 1.0)),
        lambda omega, v, batch: jnp.mean((v - batch[1]) ** 2),
    )
    model = fb.from_function(lambda key, x: jnp.zeros(2), lambda params, x: params + 0.0 * x)
    batch = (jnp.zeros(2), jnp.ones(2))
    h = fb.hypergradient(problem, model, estimator, 1.0, jnp.array([0.0, 1.0]), batch, batch)
    assert not bool(h.metrics["adjoint_finite"])


def test_in_the_loop():
    """The states of the adjoint and of the Newton step are carried; metrics say how well the step was found."""
    problem = fb.FunctionalProblem(
        lambda omega, v, batch: jnp.mean(jnp.cosh(v - omega)), lambda omega, v, batch: jnp.mean((v - batch[1]) ** 2)
    )
    model = fb.from_function(lambda key, x: 0.1 * jax.random.normal(key, (3,)), lambda params, x: x @ params)
    batch = (jnp.eye(3), jnp.arange(3.0))
    for estimator, metric in (
        (fb.funcid(fb.learned_adjoint(optax.sgd(0.1), 40), correction=1.0), "newton_objective"),
        (fb.funcid(fb.linear_adjoint(lambda theta, x: x), correction=1.0), "newton_residual"),
        (fb.funcid(fb.pointwise_adjoint(), correction=1.0), "newton_residual"),
        (fb.aid(fb.cg(5), correction=1.0), "newton_residual"),
    ):
        solver = fb.bilevel(
            problem,
            model,
            estimator,
            inner_optimizer=optax.sgd(0.05),  # far too slow for the outer level
            outer_optimizer=optax.sgd(0.5),
        )
        state = solver.init(jax.random.key(0), jnp.zeros(3), batch)
        batches = jax.tree.map(lambda x: jnp.stack([x] * 60), batch)
        state, metrics = jax.jit(solver.run)(state, batches, batches)
        assert metric in metrics
        assert bool(jnp.all(metrics["adjoint_finite"] & metrics["outer_finite"]))
        np.testing.assert_allclose(state.outer_params, batch[1], atol=0.1)


def test_bad_input():
    for beta in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="correction must be a finite number >= 0"):
            fb.funcid(fb.pointwise_adjoint(), correction=beta)
        with pytest.raises(ValueError, match="correction must be a finite number >= 0"):
            fb.aid(fb.cg(3), correction=beta)
    with pytest.raises(TypeError, match="correction must be a number"):
        fb.funcid(fb.pointwise_adjoint(), correction="1")
    with pytest.raises(ValueError, match="has no Newton step"):
        fb.funcid(fb.Adjoint(lambda *_: (), lambda *_: None), correction=1.0)
    features = fb.from_function(lambda key, x: jnp.eye(3), lambda params, x: x @ params)
    model = fb.variable_projection(features, 1)
    problem = fb.FunctionalProblem(
        lambda omega, v, batch: jnp.mean((v - omega) ** 2), lambda omega, v, batch: jnp.mean(v**2)
    )
    batch = (jnp.eye(3),)
    with pytest.raises(ValueError, match="variable_projection"):
        fb.hypergradient(problem, model, fb.funcid(fb.pointwise_adjoint(), 1.0), 1.0, jnp.eye(3), batch, batch)
    assert repr(fb.funcid(fb.pointwise_adjoint(), correction=1.0)) == "funcid(pointwise_adjoint(), correction=1.0)"
    assert repr(fb.aid(fb.cg(3), correction=0.0)) == "aid(cg(3))"
