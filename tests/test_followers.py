"""Several followers: the joint problem's iterates, the methods mixed, turns, and what stays where."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcbilevel as fb


def inner(omega: jax.Array, theta: jax.Array, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean((x @ theta - y) ** 2) + jnp.sum(jnp.exp(omega) * theta**2)


def outer(omega: jax.Array, theta: jax.Array, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean((x @ theta - y) ** 2) + 0.1 * jnp.sum(omega**2)


PROBLEM = fb.ParametricProblem(inner, outer)
NAMES = ("a", "b")
WEIGHTS = {"a": 1.0, "b": 0.5}


def data() -> Any:
    rng = np.random.default_rng(0)
    batch = lambda n: (jnp.asarray(rng.normal(size=(n, 2))), jnp.asarray(rng.normal(size=n)))
    return {k: batch(n) for k, n in zip(NAMES, (5, 7))}, {k: batch(4) for k in NAMES}


def make(estimator: fb.Estimator) -> Any:
    return functools.partial(fb.bilevel, PROBLEM, None, estimator, inner_optimizer=optax.sgd(0.1), inner_steps=3)


def run(solver: fb.BilevelSolver, steps: int, start: Any, *batches: Any) -> Any:
    @jax.jit
    def compiled(start: Any, batches: Any) -> Any:
        state = solver.init(jax.random.key(0), jnp.zeros(2), batches[0], start)
        return jax.lax.scan(lambda s, _: solver.step(s, *batches), state, None, length=steps)

    return compiled(start, batches)


def test_together_is_the_joint_problem(x64):
    """Followers that do not see one another, with one estimator: one follower with both parameters."""
    weighted = lambda f: lambda w, u, b: sum(WEIGHTS[k] * f(w, u[k], b[k]) for k in NAMES)
    joint = fb.bilevel(
        fb.ParametricProblem(lambda w, u, b: sum(inner(w, u[k], b[k]) for k in NAMES), weighted(outer)),
        None,
        fb.aid(fb.cg(20)),
        inner_optimizer=optax.sgd(0.1),
        outer_optimizer=optax.adam(0.1),
        inner_steps=3,
    )
    makers = dict.fromkeys(NAMES, make(fb.aid(fb.cg(20))))
    solver = fb.followers(makers, outer_optimizer=optax.adam(0.1), weights=WEIGHTS)
    start = {k: jnp.zeros(2) for k in NAMES}
    expected, told = run(joint, 10, start, *data())
    state, metrics = run(solver, 10, start, *data())
    np.testing.assert_allclose(state.outer_params, expected.outer_params, rtol=0, atol=1e-12)
    for k in NAMES:
        np.testing.assert_allclose(state.inner_params[k], expected.inner_params[k], rtol=0, atol=1e-12)
    for metric in ("outer_objective", "inner_objective", "hypergradient_norm"):
        np.testing.assert_allclose(metrics[metric], told[metric], rtol=1e-12)
    assert {f"{k}/linear_residual" for k in NAMES} <= set(metrics)
    assert np.all(np.abs(state.outer_params) > 0.1)


def test_methods_can_be_mixed_and_taken_in_turn(x64):
    """Round-robin: in each step the named follower's solver alone has moved, as it does by itself."""
    soba = functools.partial(fb.soba, PROBLEM, inner_optimizer=0.1, linear_optimizer=0.1)
    makers = {"a": soba, "b": make(fb.itd(2))}
    solver = fb.followers(makers, outer_optimizer=optax.sgd(0.2), order="round-robin")
    batches = data()
    start = {k: jnp.ones(2) for k in NAMES}

    @jax.jit
    def both(batches: Any) -> Any:
        state = solver.init(jax.random.key(0), jnp.zeros(2), batches[0], start)
        states, omega, thetas = [state], jnp.zeros(2), dict(start)
        by_hand = []
        own = {k: makers[k](outer_optimizer=optax.sgd(0.2)) for k in NAMES}
        alone = {k: own[k].init(jax.random.key(0), omega, batches[0][k], start[k]) for k in NAMES}
        for k in ("a", "b", "a"):
            state, metrics = solver.step(state, *batches)
            states.append((state, metrics))
            alone[k], _ = own[k].step(alone[k]._replace(outer_params=omega), batches[0][k], batches[1][k])
            omega, thetas = alone[k].outer_params, thetas | {k: alone[k].inner_params}
            by_hand.append((omega, thetas))
        return states[1:], by_hand

    got, expected = both(batches)
    for (state, _), (omega, thetas) in zip(got, expected, strict=True):
        np.testing.assert_allclose(state.outer_params, omega, rtol=0, atol=1e-12)
        for k in NAMES:
            np.testing.assert_allclose(state.inner_params[k], thetas[k], rtol=0, atol=1e-12)
    assert np.isnan(got[0][1]["b/outer_objective"])
    assert not np.isnan(got[1][1]["b/outer_objective"])


def test_one_that_breaks_stops_the_leader():
    makers = dict.fromkeys(NAMES, make(fb.aid(fb.cg(5))))
    solver = fb.followers(makers, outer_optimizer=optax.sgd(0.1))
    batches = jax.tree.map(lambda x: x.astype(jnp.float32), data())
    batches[0]["b"] = (batches[0]["b"][0].at[0, 0].set(jnp.nan), batches[0]["b"][1])
    state, metrics = run(solver, 2, {k: jnp.zeros(2) for k in NAMES}, *batches)
    assert not np.any(metrics["inner_finite"])
    assert np.all(metrics["a/inner_finite"])
    np.testing.assert_array_equal(state.outer_params, np.zeros(2))
    assert np.all(np.isfinite(state.inner_params["b"]))
    assert np.any(state.inner_params["a"] != 0)


def test_run_takes_batches_and_sources_for_all_steps():
    soba = functools.partial(fb.soba, PROBLEM, inner_optimizer=0.1, linear_optimizer=0.1)
    solver = fb.followers({"a": soba, "b": soba}, outer_optimizer=optax.sgd(0.1))
    rng = np.random.default_rng(0)
    samples = jnp.asarray(rng.normal(size=(8, 2)), jnp.float32), jnp.asarray(rng.normal(size=8), jnp.float32)
    source = fb.finite_sum(samples, 2)
    stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (6, *x.shape)), samples)
    state = solver.init(jax.random.key(0), jnp.zeros(2), {"a": source, "b": samples}, {k: jnp.zeros(2) for k in NAMES})
    state, metrics = solver.run(state, {"a": source, "b": stacked}, {"a": source, "b": source})
    assert int(state.step) == 6
    assert metrics["a/outer_objective"].shape == (6,)


def test_bad_input():
    maker = make(fb.aid(fb.cg(1)))
    with pytest.raises(TypeError, match="makers must be a dict"):
        fb.followers([maker], outer_optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match="order must be"):
        fb.followers({"a": maker}, outer_optimizer=optax.sgd(0.1), order="random")
    with pytest.raises(
        ValueError, match=r"weights must be a dict with one entry for each follower, \['a'\], got \['b'\]"
    ):
        fb.followers({"a": maker}, outer_optimizer=optax.sgd(0.1), weights={"b": 1.0})
    solver = fb.followers({"a": maker}, outer_optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match="init: inner_batch must be a dict with one entry for each follower"):
        solver.init(jax.random.key(0), jnp.zeros(2), (jnp.ones((2, 2)), jnp.ones(2)), {"a": jnp.zeros(2)})
