"""One batch spread over eight devices under `jax.pmap` (axis_name) gives the step of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcbilevel as fb

DEVICES, SAMPLES = 8, 64


def features(params, x):
    return jnp.tanh(x @ params["hidden"])


MODEL = fb.from_function(
    lambda key, x: {"hidden": jax.random.normal(key, (3, 8)), "head": jnp.ones((8, 1))},
    lambda params, x: features(params, x) @ params["head"],
)

# The means over devices are in the Hessian's products and in the features' moments, whichever solver sees them.
ESTIMATORS = {
    "funcid-learned": fb.funcid(fb.learned_adjoint(optax.adam(1e-2), 5)),
    "funcid-linear": fb.funcid(fb.linear_adjoint(features)),
    "funcid-pointwise": fb.funcid(fb.pointwise_adjoint()),
    "funcid-linear-corrected": fb.funcid(fb.linear_adjoint(features), correction=1.0),
    "funcid-learned-corrected": fb.funcid(fb.learned_adjoint(optax.adam(1e-2), 5), correction=1.0),
    "aid-cg": fb.aid(fb.cg(5, damping=3.0)),
    "aid-gmres": fb.aid(fb.gmres(5, damping=1.0)),
    "aid-neumann": fb.aid(fb.neumann(5, 0.1)),
    "itd": fb.itd(3),
    "itd-forward": fb.itd(2, mode="forward"),
    "alternating": fb.alternating(),
    "penalty-value": fb.value_penalty(optax.sgd(0.1), 5, 10.0),
    "penalty-gradient": fb.gradient_penalty(optax.sgd(1e-3), 5, 10.0),
}

# With a head that is solved for on the samples of all devices; weights make the solve take several steps.
PROJECTED = fb.variable_projection(
    fb.from_function(lambda key, x: {"hidden": jax.random.normal(key, (3, 4))}, features), 1, ridge=0.1
)
OF_PROJECTED = {name: ESTIMATORS[name] for name in ("aid-cg", "itd", "alternating")}
OF_PROJECTED["funcid-linear-ridge"] = fb.funcid(fb.linear_adjoint(features, ridge=0.1))
ROWS = {name: (estimator, MODEL) for name, estimator in ESTIMATORS.items()}
ROWS |= {f"{name}-projected": (estimator, PROJECTED) for name, estimator in OF_PROJECTED.items()}


def problem(axis_name):
    def inner(outer_params, v, batch):
        _, y, weight = batch
        return jnp.mean(weight * (v - outer_params["slope"] * y) ** 2), {"largest": jnp.mean(v)}

    def outer(outer_params, v, batch):
        return jnp.mean((v - 2 * batch[1]) ** 2) + 0.1 * outer_params["slope"] ** 2, {}

    return fb.FunctionalProblem(inner, outer, has_aux=True, axis_name=axis_name)


def make(estimator, axis_name, model=MODEL):
    return fb.bilevel(
        problem(axis_name),
        model,
        estimator,
        inner_optimizer=optax.adam(1e-2, eps_root=1e-12),
        outer_optimizer=optax.sgd(0.1),
        inner_steps=3,
    )


def on_all_devices(state):
    """A copy each, placed as a step's result is: the second step needs no other program."""
    return jax.pmap(lambda _: state, axis_name="devices")(jnp.zeros(DEVICES))


@pytest.mark.parametrize(("estimator", "model"), ROWS.values(), ids=ROWS)
def test_pmap_over_a_spread_batch_equals_the_whole_batch(estimator, model):
    x, weight = (
        jax.random.normal(jax.random.key(0), (SAMPLES, 3)),
        0.5 + jax.random.uniform(jax.random.key(1), (SAMPLES, 1)),
    )
    whole = (x, jnp.sin(jnp.sum(x, axis=1, keepdims=True)), weight)
    spread = jax.tree.map(lambda a: a.reshape(DEVICES, SAMPLES // DEVICES, -1), whole)

    one, many = make(estimator, None, model), make(estimator, "devices", model)
    start = one.init(jax.random.key(2), {"slope": 0.5}, whole)
    replicated = on_all_devices(start)
    step_one, step_many = jax.jit(one.step), jax.pmap(many.step, axis_name="devices")
    for _ in range(2):
        start, metrics_one = step_one(start, whole, whole)
        replicated, metrics_many = step_many(replicated, spread, spread)

    assert not np.isclose(start.outer_params["slope"], 0.5, atol=1e-3)
    np.testing.assert_allclose(replicated.outer_params["slope"], start.outer_params["slope"], atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, np.broadcast_to(b, a.shape), atol=1e-5),
        replicated.inner_params,
        start.inner_params,
    )
    for key in ("outer_objective", "inner_objective", "hypergradient_norm", "inner/largest", "inner_finite"):
        np.testing.assert_allclose(metrics_many[key][0], metrics_one[key], rtol=1e-4, atol=1e-5)


def test_a_fault_on_one_device_holds_all_devices_back():
    x = jax.random.normal(jax.random.key(0), (DEVICES, 4, 3))
    batch = (x, jnp.ones((DEVICES, 4, 1)), jnp.ones((DEVICES, 4, 1)))
    broken = (x, batch[1].at[3].set(jnp.nan), batch[2])
    solver = make(fb.alternating(), "devices")
    start = solver.init(jax.random.key(2), {"slope": 0.5}, jax.tree.map(lambda a: a[0], batch))
    state, metrics = jax.pmap(solver.step, axis_name="devices")(on_all_devices(start), batch, broken)
    assert not metrics["outer_finite"].any()
    assert metrics["inner_finite"].all()
    np.testing.assert_array_equal(state.outer_params["slope"], np.full(DEVICES, 0.5, np.float32))
