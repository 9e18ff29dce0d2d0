"""DARTS, PZOBO and evolution strategies: derivatives by differences, against what they approximate."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import build

import funcbilevel as fb

XI = 0.05


def estimate(name: str, estimator: fb.Estimator, key: int = 0) -> fb.Hypergradient:
    case = build(name)
    theta = jax.tree.map(lambda x: x + 0.1, case.inner_params)

    @jax.jit
    def compiled(omega: Any) -> fb.Hypergradient:
        return fb.hypergradient(
            *(case.problem, case.model, estimator, omega, theta, case.inner_batch, case.outer_batch),
            inner_optimizer=optax.sgd(XI),
            key=jax.random.key(key),
        )

    return compiled(case.outer_params)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def assert_close(got: Any, expected: Any, tolerance: float) -> None:
    got, expected = flat(got), flat(expected)
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["logistic-ridge", "softmax"])
def test_darts_is_the_derivative_of_one_inner_step(x64, name):
    """Of the step that it makes itself, beginning where the inner solution is."""
    expected = estimate(name, fb.itd(1))
    h = estimate(name, fb.darts(XI, radius=1e-4))
    assert_close(h.implicit, expected.implicit, 1e-6)
    assert_close(h.gradient, expected.gradient, 1e-6)
    np.testing.assert_allclose(h.outer_value, expected.outer_value, rtol=1e-12)
    rough = estimate(name, fb.darts(XI, radius=2e-4))  # and the error falls as the square of the radius
    errors = [np.linalg.norm(flat(x.implicit) - flat(expected.implicit)) for x in (rough, h)]
    assert 3.0 < errors[0] / errors[1] < 5.0


def test_pzobo_is_in_expectation_the_derivative_through_the_inner_steps(x64):
    expected = estimate("ridge", fb.itd(3))
    h = estimate("ridge", fb.pzobo(num_steps=3, num_directions=20_000, radius=1e-4))
    assert_close(h.implicit, expected.implicit, 0.05)
    np.testing.assert_allclose(flat(h.explicit), flat(expected.explicit), atol=1e-12)


def test_evolution_strategy_is_in_expectation_the_smoothed_gradient(x64):
    expected = estimate("logistic-ridge", fb.itd(3))
    h = estimate("logistic-ridge", fb.evolution_strategy(num_steps=3, num_directions=20_000, radius=1e-3))
    assert_close(h.gradient, expected.gradient, 0.1)
    assert_close(jax.tree.map(jnp.add, h.explicit, h.implicit), h.gradient, 1e-12)


def test_no_second_derivative_is_taken():
    def refuse(*_: Any) -> Any:
        raise AssertionError("a second derivative was taken")

    gradient = jax.custom_vjp(lambda r: 2.0 * r)
    gradient.defvjp(lambda r: (2.0 * r, r), refuse)
    square = jax.custom_vjp(lambda r: r**2)
    square.defvjp(lambda r: (r**2, r), lambda r, t: (t * gradient(r),))
    problem = fb.ParametricProblem(
        lambda w, u, x: jnp.mean(square(u - w * x)), lambda w, u, x: jnp.mean(square(u - 2.0 * x)) + square(w)
    )
    x = jnp.ones(3)
    for estimator in (fb.darts(0.1), fb.pzobo(2, 2), fb.evolution_strategy(2, 2, 0.1)):
        solver = fb.bilevel(
            problem, None, estimator, inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1), inner_steps=2
        )
        state = solver.init(jax.random.key(0), 1.0, x, 0.0)
        state, metrics = solver.step(state, x, x)
        assert np.isfinite(metrics["hypergradient_norm"])
        assert float(state.outer_params) != 1.0


def test_evolution_strategy_descends_where_all_derivatives_are_zero():
    """A count of misses in the outer objective: piecewise constant, so that no other estimator would move."""
    steps = jnp.linspace(0.0, 4.0, 41)
    problem = fb.ParametricProblem(
        lambda w, u, x: jnp.mean((u - w * x) ** 2), lambda w, u, x: jnp.mean((jnp.abs(u - 2.0) > steps).astype(u.dtype))
    )
    solver = fb.bilevel(
        *(problem, None, fb.evolution_strategy(5, 20, 0.3)),
        inner_optimizer=optax.sgd(0.4),
        outer_optimizer=optax.sgd(0.3),
        inner_steps=5,
    )
    x = jnp.ones(3)
    state = solver.init(jax.random.key(0), 0.0, x, 0.0)
    state, metrics = jax.jit(solver.run)(state, *[jnp.ones((60, 3))] * 2)
    assert abs(float(state.outer_params) - 2.0) < 0.3
    assert metrics["outer_objective"][0] > 5 * metrics["outer_objective"][-1]


def test_directions_need_a_key():
    problem = fb.ParametricProblem(lambda w, u, x: jnp.mean((u - w * x) ** 2), lambda w, u, x: jnp.mean(u**2) + w)
    x = jnp.ones(3)
    for estimator in (fb.pzobo(1, 1), fb.evolution_strategy(1, 1, 0.1)):
        with pytest.raises(ValueError, match="key is None, but directions are drawn by it"):
            fb.hypergradient(problem, None, estimator, 1.0, 0.0, x, x, inner_optimizer=optax.sgd(0.1))
