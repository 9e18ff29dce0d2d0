"""Instrumental regression with covariates: the methods against one another and against what they should find."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funcbilevel.tasks import covariate_iv, demand, iv, schooling, schooling_iv
from funcbilevel.tasks.covariate_iv import Batch, Setting

TINY = Setting(
    num_outer_steps=3, treatment_widths=(4, 3), covariate_widths=(4, 3), instrument_widths=(8, 8), inner_steps=2
)


@pytest.fixture(scope="module")
def samples():
    return [demand.arrays(seed, 200, 0.5, 1.0) for seed in (0, 1)]


def test_dfiv_is_funcid_linear_with_the_same_ridge(samples):
    dfiv, _ = covariate_iv.fit("dfiv", TINY, {}, samples, (0, 1))
    funcid, _ = covariate_iv.fit("funcid-linear", TINY, {"ridge_ratio": 1.0}, samples, (0, 1))
    np.testing.assert_allclose(funcid.predictions, dfiv.predictions, rtol=1e-2, atol=0.5)
    assert dfiv.predictions.shape == (2, 2861)
    assert np.ptp(dfiv.predictions) > 50


def test_seeds_together_equal_a_seed_alone(samples):
    together, _ = covariate_iv.fit("single-objective", TINY, {}, samples, (0, 1))
    alone, _ = covariate_iv.fit("single-objective", TINY, {}, samples[1:], (1,))
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
    data = covariate_iv.standardised(
        confounded(4000, rng), confounded(500, rng), Batch(None, line, np.zeros_like(line), None)
    )
    setting = Setting(num_outer_steps=50, treatment_widths=(8, 4), covariate_widths=(4, 2), instrument_widths=(16, 8))
    evaluation, last = covariate_iv.fit(method, setting, covariate_iv.trials(method, setting)[2], [data], (0,))
    slope = np.polyfit(line[:, 0], evaluation.predictions[0], 1)[0]
    assert slope == pytest.approx(0.5 if method == "single-objective" else 2.0, abs=0.4)
    assert last["outer_finite"].all()
    if method != "single-objective":
        # y - E[y | z] = 2 v - 3 v, of variance 1.
        assert evaluation.validation_loss[0] == pytest.approx(1.0, rel=0.3)


def test_second_stage_is_ridge_regression():
    a, y = np.random.default_rng(0).normal(size=(2, 30, 4))
    u = iv.ridge_regression(jnp.asarray(a), jnp.asarray(y[:, 0]), 0.1)
    np.testing.assert_allclose(u, np.linalg.solve(a.T @ a + 3 * np.eye(4), a.T @ y[:, 0]), rtol=1e-4)
    value = iv.ridge_objective(jnp.asarray(a), jnp.asarray(y[:, 0]), 0.1)
    np.testing.assert_allclose(value, np.mean((y[:, 0] - a @ u) ** 2) + 0.1 * np.sum(np.square(u)), rtol=1e-5)
    np.testing.assert_array_equal(
        covariate_iv.products(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 5.0]])), [[3.0, 5.0, 6.0, 10.0]]
    )


def test_every_method_has_as_many_trials():
    of_each = [covariate_iv.trials(method, Setting(inner_ridge=1e-4)) for method in covariate_iv.METHODS]
    assert {len({tuple(sorted(hyper.items())) for hyper in hypers}) for hypers in of_each} == {6}
    assert [hyper["inner_ridge"] for hyper in covariate_iv.trials("dfiv", Setting())] == [1e-3] * 3 + [1e-2] * 3


def test_summary_counts_broken_runs_as_infinite():
    def result(*values):
        return covariate_iv.Result(np.array(values), np.zeros((len(values), 3)), np.array(values))

    values = np.arange(1.0, 11.0)
    results = {"funcid-linear": result(*values), "aid-cg": result(*values[:-1], np.nan), "dfiv": result(*(values + 5))}
    rows = covariate_iv.summarise(results)
    assert rows["funcid-linear"].median == 5.5
    assert rows["aid-cg"].median == 5.5
    low, high = rows["dfiv"].interval
    assert low < rows["dfiv"].median < high
    first = results["funcid-linear"]
    assert covariate_iv.p_value(first, first) is None
    assert covariate_iv.p_value(results["aid-cg"], first) == 1.0  # one difference only
    assert covariate_iv.p_value(results["dfiv"], first) == pytest.approx(2 / 2**10)
    assert covariate_iv.summarise({"dfiv": result(1.0, np.nan, np.nan)})["dfiv"].median == np.inf


def test_schooling_splits():
    men = schooling_iv.sample()
    data = schooling_iv.arrays(0)
    assert [len(batch.y) for batch in (data.inner, data.outer, data.validation)] == [1204, 1204, 602]
    y = np.concatenate([data.inner.y, data.outer.y, data.validation.y]) * data.y_std + data.y_mean
    np.testing.assert_allclose(np.sort(y), np.sort(men.y), rtol=1e-4)
    np.testing.assert_array_equal(men.z[:, 1:], men.c)
    assert not np.array_equal(data.inner.y, schooling_iv.arrays(1).inner.y)
    frame, points = schooling.load(), schooling_iv.points()
    assert schooling_iv.mean_slope(0.1 * points.p[:, 0] + points.c @ np.arange(5)) == pytest.approx(0.1)
    np.testing.assert_array_equal(points.p[:3010, 0] - 0.5, frame["educ"])


def test_schooling_command(tmp_path, monkeypatch):
    monkeypatch.setattr(schooling_iv.CompareSchooling, "setting", TINY._replace(linear_part=True))
    every = covariate_iv.trials
    monkeypatch.setattr(covariate_iv, "trials", lambda method, setting: every(method, setting)[:1])
    options = schooling_iv.CompareSchooling(seeds=2, methods=("dfiv",))
    assert options.run(tmp_path, lambda label, total: lambda state, metrics: None) is not None
    assert {path.name for path in tmp_path.iterdir()} == {"trials.jsonl", "runs.jsonl", "slopes.png"}
    jax.clear_caches()
