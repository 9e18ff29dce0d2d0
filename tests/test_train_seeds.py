"""`fb.train` with a solver vmapped over seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcbilevel as fb

SEEDS = 3
MODEL = fb.from_function(lambda key, x: jax.random.normal(key, (2, 1)), lambda params, x: x @ params)


def make(fault_at=None):
    def inner(w, v, batch):
        return jnp.mean((v - w * batch[1]) ** 2)

    def outer(w, v, batch):
        _, y, step = batch
        value = jnp.mean((v - 2 * y) ** 2)
        return value if fault_at is None else jnp.where(step == fault_at, jnp.nan, value)

    return fb.bilevel(
        fb.FunctionalProblem(inner, outer),
        MODEL,
        fb.funcid(fb.linear_adjoint(lambda params, x: x)),
        inner_optimizer=optax.sgd(0.1),
        outer_optimizer=optax.sgd(0.1),
    )


def sampler(key, step):
    x = jax.random.normal(key, (16, 2))
    batch = (x, jnp.sum(x, axis=1, keepdims=True), step)
    return batch, batch


def start(solver):
    batch, _ = sampler(jax.random.key(9), 0)
    return jax.vmap(lambda key: solver.init(key, 0.5, batch))(jax.random.split(jax.random.key(0), SEEDS))


def test_seeds_together_equal_seeds_alone():
    solver = make()
    states = start(solver)
    together, metrics = fb.train(solver._replace(step=jax.vmap(solver.step)), states, jax.vmap(sampler), 7, chunk=3)
    assert metrics["outer_objective"].shape == (7, SEEDS)
    for i in range(SEEDS):
        alone, own = fb.train(solver, jax.tree.map(lambda x: x[i], states), sampler, 7, chunk=7)
        np.testing.assert_allclose(together.outer_params[i], alone.outer_params, rtol=1e-5)
        np.testing.assert_allclose(metrics["outer_objective"][:, i], own["outer_objective"], rtol=1e-4)
    assert len(set(np.asarray(together.outer_params).tolist())) == SEEDS  # each seed has its own data


def test_the_message_names_the_step_and_the_seed():
    solver = make(fault_at=4)
    with pytest.raises(fb.NonFiniteError, match=r"outer level at outer step 4 of seed 0"):
        fb.train(solver._replace(step=jax.vmap(solver.step)), start(solver), jax.vmap(sampler), 7, chunk=3)
