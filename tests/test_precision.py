"""A model in bfloat16: what is rounded, what is not, and by how much hypergradients move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import funcbilevel as fb


class Net(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = jnp.tanh(linen.Dense(32)(x))
        x = linen.BatchNorm(use_running_average=not train)(x)
        return linen.Dense(1)(x)


def batches():
    x, z = jax.random.normal(jax.random.key(0), (2, 256, 3))
    y = jnp.sin(x[:, :1])
    return (x, y), (z, jnp.sin(z[:, :1]))


PROBLEM = fb.FunctionalProblem(
    lambda w, v, batch: 0.5 * jnp.mean((v - batch[0] @ w) ** 2), lambda w, v, batch: 0.5 * jnp.mean((v - batch[1]) ** 2)
)
OMEGA = jnp.array([[1.0], [-0.5], [0.2]])
MODEL = fb.from_linen(Net())


def features(params, x):
    x = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None]
    return jnp.hstack([jnp.tanh(x), jnp.ones_like(x[:, :1])])


ESTIMATORS = {
    "funcid-linear": fb.funcid(fb.linear_adjoint(features, ridge=1e-3)),
    "funcid-learned": fb.funcid(fb.learned_adjoint(optax.adam(1e-2), 50)),
    "aid-cg": fb.aid(fb.cg(10, damping=10.0)),  # with 0.1 the error is 1.1: an indefinite system
    "itd": fb.itd(5),
    "penalty-value": fb.value_penalty(optax.sgd(0.1), 5, 10.0),
}


@pytest.mark.filterwarnings("ignore:hypergradient. the inner solution is not a stationary point")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_hypergradients_move_by_rounding_only(name):
    inner, outer = batches()
    state = fb.bilevel(PROBLEM, MODEL, ESTIMATORS[name], inner_optimizer=optax.adam(1e-2, eps_root=1e-12),
                       outer_optimizer=optax.sgd(0.1), inner_steps=20)  # fmt: skip
    state = jax.jit(state.step)(state.init(jax.random.key(0), OMEGA, inner), inner, outer)[0]

    def gradient(model):
        return fb.hypergradient(
            PROBLEM, model, ESTIMATORS[name], OMEGA, state.inner_params, inner, outer, model_state=state.model_state,
            state=state.estimator_state, key=jax.random.key(1), inner_optimizer=optax.sgd(0.1),
        ).gradient  # fmt: skip

    exact, rounded = gradient(MODEL), gradient(fb.mixed_precision(MODEL))
    assert rounded.dtype == jnp.float32
    error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
    assert 1e-6 < error < 5e-2  # bfloat16 has a precision of 4e-3


def test_parameters_statistics_and_optimizer_keep_their_dtype():
    inner, outer = batches()
    solver = fb.bilevel(
        PROBLEM, fb.mixed_precision(MODEL), fb.funcid(fb.learned_adjoint(optax.adam(1e-2), 2)),
        inner_optimizer=optax.adam(1e-2), outer_optimizer=optax.sgd(0.1), inner_steps=200,
    )  # fmt: skip
    before = solver.init(jax.random.key(0), OMEGA, inner)
    after, metrics = jax.jit(solver.step)(before, inner, outer)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, before)
    assert not any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(after))
    assert metrics["inner_objective"] < 0.5 * 0.5 * jnp.mean((inner[0] @ OMEGA) ** 2)


def test_every_product_of_matrices_is_in_bfloat16():
    model = fb.mixed_precision(fb.from_linen(linen.Dense(4)))
    x = jnp.ones((8, 3))
    params, state = model.init(jax.random.key(0), x)
    loss = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(model.apply(p, state, x)[0] ** 2)))(params)
    products = [eqn for eqn in loss.jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert len(products) == 2
    assert all(v.aval.dtype == jnp.bfloat16 for eqn in products for v in eqn.invars)
    (prediction, _) = model.apply(params, state, x)
    assert prediction.dtype == jnp.float32
    np.testing.assert_allclose(
        prediction, fb.from_linen(linen.Dense(4)).apply(params, state, x)[0], rtol=2e-2, atol=2e-2
    )


def test_integers_pass_as_they_are():
    model = fb.from_function(lambda key, x: jnp.ones((5, 2)), lambda table, i: table[i])
    prediction, _ = fb.mixed_precision(model).apply(jnp.ones((5, 2)), (), jnp.array([0, 3]))
    np.testing.assert_array_equal(prediction, np.ones((2, 2)))
