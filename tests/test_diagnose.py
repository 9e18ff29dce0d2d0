"""`diagnose`: its numbers against dense ones, and its advice where something is the matter."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Case, build

import funcbilevel as fb


def solver_at(
    case: Case, estimator: fb.Estimator, inner_params: Any = None
) -> tuple[fb.BilevelSolver, fb.BilevelState]:
    solver = fb.bilevel(
        case.problem, case.model, estimator, inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1)
    )
    theta = case.inner_params if inner_params is None else inner_params
    return solver, jax.jit(solver.init)(jax.random.key(0), case.outer_params, case.inner_batch, theta)


def advice(diagnosis: fb.Diagnosis) -> str:
    return " ".join(row.advice for row in diagnosis.rows)


def test_numbers_at_a_solution(x64):
    case = build("least-squares")
    solver, state = solver_at(case, fb.funcid(fb.linear_adjoint(case.features)))
    diagnosis = fb.diagnose(solver, state, case.inner_batch, case.outer_batch)
    values = diagnosis.values
    eigenvalues = np.linalg.eigvalsh(case.system.H)
    np.testing.assert_allclose(values["parameter_curvature_min"], eigenvalues[0], rtol=1e-9)
    np.testing.assert_allclose(values["parameter_curvature_max"], eigenvalues[-1], rtol=1e-9)
    weights = 2 * np.exp(case.outer_params["log_weight"])  # of squared errors
    np.testing.assert_allclose(values["prediction_curvature_min"], weights.min(), rtol=1e-9)
    np.testing.assert_allclose(values["prediction_curvature_max"], weights.max(), rtol=1e-9)
    assert values["inner_gradient_relative"] < 1e-10
    assert values["outer_uncovered"] < 1e-10  # as many samples as a linear model needs
    assert 0.1 < values["effective_samples"] <= 1.0
    assert values["inner_error_relative"] < 1e-10
    assert values["adjoint_error_relative"] < 1e-10
    assert repr(diagnosis) == str(diagnosis)
    assert [line.split()[0] for line in str(diagnosis).splitlines() if not line.startswith(" ")] == list(values)
    assert "The inner level is at its solution." in advice(diagnosis)
    assert "starved" not in advice(diagnosis)


def test_which_level_is_starved(x64):
    case = build("least-squares")
    off = jax.tree.map(lambda x: x + 1.0, case.inner_params)
    solver, state = solver_at(case, fb.aid(fb.cg(50)), off)
    inner = fb.diagnose(solver, state, case.inner_batch, case.outer_batch)
    assert inner.values["inner_gradient_relative"] > 1e-2
    assert "raise inner_steps, or use correction=1.0. It is the starved one." in advice(inner)
    solver, state = solver_at(case, fb.aid(fb.cg(1)))
    adjoint = fb.diagnose(solver, state, case.inner_batch, case.outer_batch)
    assert "give it more steps, or less damping. It is the starved one." in advice(adjoint)


def test_a_network_that_interpolates(x64):
    """More parameters than samples: the Hessian is singular, and FuncID is what is left."""
    case = build("network")
    solver, state = solver_at(case, fb.funcid(fb.pointwise_adjoint()))
    text = advice(fb.diagnose(solver, state, case.inner_batch, case.outer_batch))
    assert "H is singular to rounding" in text
    assert "L_in is strongly convex in the prediction" in text


def test_no_overlap_a_head_and_an_indefinite_hessian(x64):
    x_P, x_Q = jnp.eye(6)[:3], jnp.eye(6)[2:]
    problem = fb.FunctionalProblem(
        lambda omega, v, batch: jnp.mean((v - omega) ** 2), lambda omega, v, batch: jnp.mean((v - 1.0) ** 2)
    )
    model = fb.from_function(lambda key, x: jnp.zeros(6), lambda theta, x: x @ theta)
    solver = fb.bilevel(
        problem, model, fb.alternating(), inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1)
    )
    state = solver.init(jax.random.key(0), jnp.ones(()), (x_P,))
    with pytest.warns(UserWarning, match="alternating"):
        state, _ = solver.step(state, (x_P,), (x_Q,))
    values = fb.diagnose(solver, state, fb.Minibatches((x_P[None],)), (x_Q,)).values
    np.testing.assert_allclose(values["outer_uncovered"], np.sqrt(3 / 4), rtol=0.1)  # of 4 inputs one is inner, too
    np.testing.assert_allclose(values["effective_samples"], 1 / 3, rtol=1e-6)
    assert "inner_error_relative" not in values

    features = fb.from_function(lambda key, x: jnp.eye(6), lambda theta, x: jnp.tanh(x @ theta))
    head = fb.variable_projection(features, 1, ridge=1e-3)
    solver = fb.bilevel(
        problem,
        head,
        fb.funcid(fb.linear_adjoint(lambda theta, x: jnp.tanh(x @ theta), 1e-3)),
        inner_optimizer=optax.sgd(0.1),
        outer_optimizer=optax.sgd(0.1),
    )
    values = fb.diagnose(solver, solver.init(jax.random.key(0), jnp.ones(()), (x_P,)), (x_P,), (x_Q,)).values
    assert 0.5 < values["outer_uncovered"] < 1.0

    saddle = fb.ParametricProblem(
        lambda omega, theta, batch: theta[0] ** 2 - theta[1] ** 2 + omega * theta[0],
        lambda omega, theta, batch: theta[0],
    )
    solver = fb.bilevel(saddle, None, fb.aid(fb.cg(3)), inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1))
    diagnosis = fb.diagnose(solver, solver.init(jax.random.key(0), 1.0, None, jnp.ones(2)), None, None)
    np.testing.assert_allclose(diagnosis.values["parameter_curvature_min"], -2.0)
    assert "H is indefinite here" in advice(diagnosis)


def test_bad_input():
    with pytest.raises(ValueError, match="solver must be one of"):
        fb.diagnose(fb.BilevelSolver(lambda *_: None, lambda *_: None, lambda *_: None), None, None, None)
