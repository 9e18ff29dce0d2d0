"""`check_hypergradient`: what it says of right and wrong estimators, and of a reference that has not converged."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Case, build

import funcbilevel as fb


def check(case: Case, estimators: dict[str, fb.Estimator], inner_steps: int = 400, **kwargs: Any) -> Any:
    rate = 1.0 / float(np.linalg.eigvalsh(case.system.H)[-1])
    arguments = {"inner_optimizer": optax.sgd(rate, momentum=0.5)} | kwargs
    theta = arguments.pop("inner_params", case.inner_params)
    return fb.check_hypergradient(
        case.problem,
        case.model,
        estimators,
        case.outer_params,
        theta,
        arguments.pop("inner_batch", case.inner_batch),
        case.outer_batch,
        inner_steps=inner_steps,
        **arguments,
    )


@functools.cache
def least_squares() -> Any:
    """Of 12 outer parameters; started off the solution."""
    case = build("least-squares")
    estimators = {
        "linear": fb.funcid(fb.linear_adjoint(case.features)),
        "aid": fb.aid(fb.cg(50)),
        "itd": fb.itd(400),
        "damped": fb.aid(fb.cg(50, damping=0.3)),
    }
    theta = jax.tree.map(lambda x: x + 0.1, case.inner_params)
    return check(case, estimators, inner_params=theta)


def test_right_and_wrong_estimators(x64):
    result = least_squares()
    exact = jax.flatten_util.ravel_pytree(build("least-squares").exact.gradient)[0]
    np.testing.assert_allclose(result.reference, exact, rtol=1e-8, atol=1e-10)
    assert result.converged
    assert result.step_error + result.solve_error < 1e-5
    assert result.directions is None
    rows = {row.name: row for row in result.rows}
    assert all(rows[name].relative_error < 1e-8 for name in ("linear", "aid", "itd"))
    assert all(rows[name].cosine == pytest.approx(1.0) for name in ("linear", "aid", "itd"))
    assert rows["damped"].relative_error > 1e-2
    assert rows["damped"].norm_ratio < 0.99
    assert rows["damped"].cosine < 1.0
    # At the point as it was given the inner level is not solved, which only itd mends.
    assert rows["linear"].error_as_given > 1e-2
    assert rows["itd"].error_as_given < 1e-8
    for row in result.rows:
        assert row.explicit_share + row.implicit_share == pytest.approx(1.0)
        assert row.seconds > 0
        assert row.temp_bytes > 0


def test_the_table(x64):
    text = str(least_squares())
    assert repr(least_squares()) == text
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["linear", "aid", "itd", "damped"]
    assert "along all coordinates" in text
    assert "NOT CONVERGED" not in text


def test_a_reference_that_has_not_converged(x64):
    case = build("least-squares")
    theta = jax.tree.map(lambda x: x + 1.0, case.inner_params)
    result = check(case, {"aid": fb.aid(fb.cg(50))}, inner_steps=2, inner_params=theta)
    assert not result.converged
    assert result.solve_error > result.step_error
    assert "THE REFERENCE HAS NOT CONVERGED" in str(result)
    assert "more inner_steps" in str(result)


def test_a_given_reference_and_one_step(x64):
    case = build("least-squares")
    estimators = {"aid": fb.aid(fb.cg(50)), "alternating": fb.alternating()}
    result = check(case, estimators, inner_steps=1, reference=case.exact.gradient)
    assert result.converged
    assert "as given" in str(result)
    assert result.rows[0].relative_error < 1e-8
    assert result.rows[1].relative_error > 0.1
    assert result.rows[1].explicit_share == 1.0
    with pytest.raises(ValueError, match="reference"):
        check(case, estimators, reference={"mix": jnp.zeros((2, 2))})
    with pytest.raises(ValueError, match="estimators"):
        check(case, {})


def test_random_directions_minibatches_and_a_head():
    """Many outer parameters, float32, a batch for each inner step, a model whose head is solved for."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((30, 3), (30, 1)))
    problem = fb.FunctionalProblem(
        lambda omega, v, batch: jnp.mean(jnp.exp(omega["log_weight"])[:, None] * (v - batch[1]) ** 2),
        lambda omega, v, batch: jnp.mean((v - batch[1]) ** 2),
    )
    phi = lambda theta, x: jnp.tanh(x @ theta)
    features = fb.from_function(lambda key, x: jax.random.normal(key, (3, 4)), phi)
    theta = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    model = fb.variable_projection(features, 1, ridge=1e-2)
    omega = {"log_weight": jnp.asarray(rng.normal(size=30), jnp.float32)}
    estimators = {"funcid": fb.funcid(fb.linear_adjoint(phi, 1e-2)), "ridge": fb.funcid(fb.linear_adjoint(phi, 1.0))}
    batches = fb.Minibatches((jnp.stack([x] * 3), jnp.stack([y] * 3)))
    result = fb.check_hypergradient(
        problem,
        model,
        estimators,
        omega,
        theta,
        batches,
        (x, y),
        inner_optimizer=optax.set_to_zero(),  # the features stand still, and the head is always solved for
        inner_steps=2,
        num_directions=8,
    )
    assert result.directions.shape == (8, 30)
    assert result.converged
    right, wrong = result.rows
    assert right.relative_error < 5e-3
    assert wrong.relative_error > 0.1
    assert "8 random directions" in str(result)
