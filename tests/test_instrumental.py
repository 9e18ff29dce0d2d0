"""Instrumental regression with covariates: the methods against one another and against what they should find."""

import jax.numpy as jnp
import numpy as np
import pytest

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._instrumental import formulas, report, train
from funcbilevel.tasks._instrumental.methods import METHODS, Setting, trials
from funcbilevel.tasks._instrumental.problem import Batch, products, standardised
from funcbilevel.tasks.demand import problem as demand

TINY = Setting(
    num_outer_steps=3, treatment_widths=(4, 3), covariate_widths=(4, 3), instrument_widths=(8, 8), inner_steps=2
)


@pytest.fixture(scope="module")
def samples():
    return [demand.arrays(seed, 200, 0.5, 1.0) for seed in (0, 1)]


def test_dfiv_is_funcid_linear_with_the_same_ridge(samples):
    dfiv, _ = train.fit("dfiv", TINY, {}, samples, (0, 1))
    funcid, _ = train.fit("funcid-linear", TINY, {"ridge_ratio": 1.0}, samples, (0, 1))
    np.testing.assert_allclose(funcid.predictions, dfiv.predictions, rtol=1e-2, atol=0.5)
    assert dfiv.predictions.shape == (2, 2861)
    assert np.ptp(dfiv.predictions) > 50


def test_seeds_together_equal_a_seed_alone(samples):
    together, _ = train.fit("single-objective", TINY, {}, samples, (0, 1))
    alone, _ = train.fit("single-objective", TINY, {}, samples[1:], (1,))
    np.testing.assert_allclose(together.predictions[1], alone.predictions[0], rtol=1e-2, atol=0.5)
    assert abs(together.validation_loss[0] / together.validation_loss[1] - 1) > 1e-3


def confounded(n, rng):
    """y = 2 p - 3 v with p = z + v: the effect of p is 2, and regression finds 0.5; one covariate that does nothing."""
    z, v, c = rng.normal(size=(3, n, 1))
    p = z + v
    return Batch(np.hstack([z, c]), p, c, (2 * p - 3 * v)[:, 0])


@pytest.mark.parametrize("method", ["funcid-linear", "dfiv", "funcid-learned", "aid-cg", "single-objective"])
def test_slope_of_a_confounded_line(method):
    rng = np.random.default_rng(0)
    line = np.linspace(-2.0, 2.0, 9)[:, None]
    data = standardised(confounded(4000, rng), confounded(500, rng), Batch(None, line, np.zeros_like(line), None))
    setting = Setting(num_outer_steps=50, treatment_widths=(8, 4), covariate_widths=(4, 2), instrument_widths=(16, 8))
    evaluation, last = train.fit(method, setting, trials(method, setting)[2], [data], (0,))
    slope = np.polyfit(line[:, 0], evaluation.predictions[0], 1)[0]
    assert slope == pytest.approx(0.5 if method == "single-objective" else 2.0, abs=0.4)
    assert last["outer_finite"].all()
    if method != "single-objective":
        # y - E[y | z] = 2 v - 3 v, of variance 1.
        assert evaluation.validation_loss[0] == pytest.approx(1.0, rel=0.3)


def test_second_stage_is_ridge_regression():
    a, y = np.random.default_rng(0).normal(size=(2, 30, 4))
    u = formulas.ridge_regression(jnp.asarray(a), jnp.asarray(y[:, 0]), 0.1)
    np.testing.assert_allclose(u, np.linalg.solve(a.T @ a + 3 * np.eye(4), a.T @ y[:, 0]), rtol=1e-4)
    value = formulas.ridge_objective(jnp.asarray(a), jnp.asarray(y[:, 0]), 0.1)
    np.testing.assert_allclose(value, np.mean((y[:, 0] - a @ u) ** 2) + 0.1 * np.sum(np.square(u)), rtol=1e-5)
    np.testing.assert_array_equal(products(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 5.0]])), [[3.0, 5.0, 6.0, 10.0]])


def test_every_method_has_as_many_trials():
    of_each = [trials(name, Setting(inner_ridge=1e-4)) for name, method in METHODS.items() if not method.always]
    assert {len({tuple(sorted(hyper.items())) for hyper in hypers}) for hypers in of_each} == {6}
    assert [hyper["inner_ridge"] for hyper in trials("dfiv", Setting())] == [1e-3] * 3 + [1e-2] * 3


# What is shown.


def records(method, values, **settings):
    return [store.record("demand", method, seed, settings, {"test_mse": x}, 1.0) for seed, x in enumerate(values)]


def test_summary_counts_broken_runs_as_infinite():
    values = np.arange(1.0, 11.0)
    of = {"funcid-linear": values, "dfiv": values + 5, "aid-cg": [*values[:-1], np.nan]}
    rows = report.summarise([r for name, sample in of.items() for r in records(name, sample)], METHODS, "test_mse")
    assert [row.name for row in rows] == list(of)
    first, dfiv, aid = rows
    assert (first.median, aid.median, first.p_value) == (5.5, 5.5, None)
    assert dfiv.interval[0] < dfiv.median < dfiv.interval[1]
    assert aid.p_value == 1.0  # one difference only
    assert dfiv.p_value == pytest.approx(2 / 2**10)
    (broken,) = report.summarise(records("dfiv", [1.0, np.nan, np.nan]), METHODS, "test_mse")
    assert broken.median == np.inf
    assert report.median_seed(first)["seed"] == 4
    assert np.isnan(report.median_of(first, "validation_loss"))


def test_tests_are_paired_by_seed():
    """Whatever the order of the file, and on the seeds that both have."""
    rng = np.random.default_rng(0)
    sample = rng.lognormal(size=20)
    of_other = records("dfiv", sample * 1.01)[::-1][:12]
    _, row = report.summarise([*of_other, *records("funcid-linear", sample)], METHODS, "test_mse")
    assert (row.method, len(row.values)) == ("dfiv", 12)
    assert row.p_value == pytest.approx(2 / 2**12)


def test_every_record_is_shown():
    """A method that the table does not know, and one in two settings."""
    found = [*records("magic", [1.0]), *records("dfiv", [2.0], rate=0.1, n=4), *records("dfiv", [3.0], rate=0.2, n=4)]
    rows = report.summarise(found, METHODS, "test_mse")
    assert [row.name for row in rows] == ["dfiv (rate 0.1)", "dfiv (rate 0.2)", "magic"]
    assert report.colours(rows, METHODS) == {"dfiv (rate 0.1)": "C0", "dfiv (rate 0.2)": "C0", "magic": "0.55"}
    with pytest.raises(UserError, match="no finished run"):
        report.summarise([], METHODS, "test_mse")
