"""Models and objectives that go through their samples part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from jax.experimental import sparse

import funcbilevel as fb


class Net(linen.Module):
    """Deep enough for its activations to count."""

    width: int = 16
    depth: int = 2
    statistics: bool = False
    rate: float = 0.0

    @linen.compact
    def __call__(self, x, train=False):
        for _ in range(self.depth):
            x = jnp.tanh(linen.Dense(self.width, param_dtype=x.dtype)(x))
            if self.statistics:
                x = linen.BatchNorm(use_running_average=not train)(x)
            x = linen.Dropout(self.rate, deterministic=not train)(x)
        return linen.Dense(1, param_dtype=x.dtype)(x)


PROBLEM = fb.FunctionalProblem(
    lambda w, v, batch: jnp.mean((v - batch[0] @ w) ** 2) + 1e-3 * jnp.sum(w**2),
    lambda w, v, batch: jnp.mean((v - batch[1]) ** 2),
)
ESTIMATORS = {
    "funcid-linear": fb.funcid(fb.linear_adjoint(lambda theta, x: x, ridge=1e-3)),
    "funcid-learned": fb.funcid(fb.learned_adjoint(optax.adam(1e-2), 3)),
    "aid": fb.aid(fb.cg(4, damping=1.0)),
    "itd": fb.itd(2),
    "value-penalty": fb.value_penalty(optax.sgd(0.1), 2, 10.0),
}


def batch(n, seed=0):
    x = jax.random.normal(jax.random.key(seed), (n, 3))
    return x, jnp.sin(x[:, :1])


def step_of(model, estimator, inner_steps=2, n=20):
    sgd = optax.sgd(0.1)
    solver = fb.bilevel(PROBLEM, model, estimator, inner_optimizer=sgd, outer_optimizer=sgd, inner_steps=inner_steps)
    state = solver.init(jax.random.key(0), jnp.ones((3, 1)), batch(n))
    return jax.jit(solver.step)(state, batch(n), batch(n, 1))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_step_is_that_of_the_whole_batch(x64, name):
    model = fb.from_linen(Net())
    whole, _ = step_of(model, ESTIMATORS[name])
    parts, _ = step_of(fb.microbatched(model, 6), ESTIMATORS[name])  # 6 + 6 + 6 + 2
    for x, y in zip(*map(jax.tree.leaves, ((parts.outer_params, parts.inner_params),
                                           (whole.outer_params, whole.inner_params))), strict=True):  # fmt: skip
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 5, 7, 10, 20, 30])
def test_predictions_come_in_order(size):
    model = fb.from_linen(Net())
    x = batch(20)[0]
    params, state = model.init(jax.random.key(0), x)
    got, after = fb.microbatched(model, size).apply(params, state, x)
    np.testing.assert_allclose(got, model.apply(params, state, x)[0], rtol=1e-5, atol=1e-6)
    assert after == state


def test_batch_statistics_are_those_of_the_parts_in_turn():
    model = fb.from_linen(Net(statistics=True))
    x = batch(10)[0]
    params, state = model.init(jax.random.key(0), x)
    got, after = fb.microbatched(model, 4).apply(params, state, x, train=True)
    expected, predictions = state, {}
    for part in ([0, 2, 4, 6], [1, 3, 5, 7], [8, 9]):
        v, expected = model.apply(params, expected, x[jnp.array(part)], train=True)
        predictions |= dict(zip(part, v, strict=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after, expected)
    np.testing.assert_allclose(got, jnp.stack([predictions[i] for i in range(10)]), rtol=1e-4, atol=1e-5)
    still, unmoved = fb.microbatched(model, 4).apply(params, state, x)
    jax.tree.map(np.testing.assert_array_equal, unmoved, state)
    np.testing.assert_allclose(still, model.apply(params, state, x)[0], rtol=1e-5)


def test_dropout_draws_anew_for_each_part():
    model = fb.microbatched(fb.from_linen(Net(rate=0.5)), 2)
    x = jnp.ones((6, 3))
    params, state = model.init(jax.random.key(0), x)
    v, _ = model.apply(params, state, x, train=True, key=jax.random.key(1))
    assert len(np.unique(np.asarray(v).round(5))) == 6
    assert np.array_equal(v, model.apply(params, state, x, train=True, key=jax.random.key(1))[0])


def bytes_of(model, estimator, n=2048):
    """Temporary memory of an outer step."""
    sgd = optax.sgd(0.1)
    solver = fb.bilevel(PROBLEM, model, estimator, inner_optimizer=sgd, outer_optimizer=sgd, inner_steps=2)
    shapes = jax.eval_shape(lambda: (batch(n), batch(n)))
    state = jax.eval_shape(lambda inner: solver.init(jax.random.key(0), jnp.ones((3, 1)), inner), shapes[0])
    return jax.jit(solver.step).lower(state, *shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("name", "share"), [("funcid-learned", 0.25), ("aid", 0.4)])
def test_the_memory_is_that_of_a_part(name, share):
    model = fb.from_linen(Net(width=64, depth=4))
    whole, parts = (bytes_of(m, ESTIMATORS[name]) for m in (model, fb.microbatched(model, 128)))
    assert parts < share * whole, (parts, whole)


def test_a_batch_that_is_divided_over_devices_stays_there():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    model = fb.microbatched(fb.from_linen(Net()), 16)
    x = jax.device_put(batch(64)[0], over)
    params, state = model.init(jax.random.key(0), x)
    loss = jax.jit(jax.grad(lambda params, x: jnp.sum(model.apply(params, state, x)[0] ** 2)))
    text = loss.lower(params, x).compile().as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text


@pytest.mark.filterwarnings("ignore:hypergradient. the inner solution is not a stationary point")
def test_objectives_in_parts(x64):
    def objective(w, theta, b):
        residual = b["x"] @ theta - w * b["y"]
        return jnp.mean(residual**2) + 0.1 * jnp.sum(theta**2), {"error": jnp.mean(jnp.abs(residual))}

    b = {"x": jax.random.normal(jax.random.key(0), (11, 3)), "y": jax.random.normal(jax.random.key(1), (11,))}
    theta, aid = jnp.arange(3.0), fb.aid(fb.cg(3))
    for size in (1, 4, 11, 100):
        in_parts = fb.microbatched_objective(objective, size)
        (value, aux), (expected, expected_aux) = in_parts(2.0, theta, b), objective(2.0, theta, b)
        np.testing.assert_allclose((value, aux["error"]), (expected, expected_aux["error"]), rtol=1e-12)
        answers = [
            fb.hypergradient(fb.ParametricProblem(f, f, has_aux=True), None, aid, 2.0, theta, b, b).gradient
            for f in (objective, in_parts)
        ]
        np.testing.assert_allclose(*answers, rtol=1e-10)


def test_an_objective_in_parts_keeps_no_activations():
    def objective(w, theta, x):
        for kernel in theta:
            x = jnp.tanh(x @ kernel)
        return jnp.mean((x - w) ** 2)

    theta, x = [jnp.zeros((64, 64))] * 6, jnp.zeros((2048, 64))

    def temporary(f):
        program = jax.jit(jax.grad(f, argnums=1)).lower(1.0, theta, x).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(fb.microbatched_objective(objective, 128)) < 0.25 * temporary(objective)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fb.microbatched(len, 3), TypeError, "microbatched: model must be an fb.Model"),
        (lambda: fb.microbatched(fb.from_linen(Net()), 0), ValueError, "microbatched: size must be at least 1, got 0"),
        (lambda: fb.microbatched_objective(3, 3), TypeError, "microbatched_objective: objective must be callable"),
        (
            lambda: fb.microbatched_objective(lambda w, t, b: 0.0, 2)(0.0, 0.0, (jnp.ones(3), 1.0)),
            TypeError,
            r"must have samples in front, got the scalar 1.0 at batch\['1'\]",
        ),
        (
            lambda: fb.microbatched(fb.from_linen(Net()), 2).apply({}, {}, (sparse.BCOO.fromdense(jnp.ones((3, 3))),)),
            TypeError,
            r"must be dense, .* got BCOO at inputs\['0'\]",
        ),
        (
            lambda: fb.microbatched_objective(lambda w, t, b: 0.0, 2)(0.0, 0.0, (jnp.ones(3), jnp.ones(4))),
            ValueError,
            r"one number of samples in front, got \[3, 4\]",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
