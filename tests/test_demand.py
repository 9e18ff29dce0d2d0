"""The demand design: the law of its data, the published grid, and the command from end to end."""

import json

import numpy as np
import pytest

from funcbilevel.tasks import _records, demand


@pytest.fixture(scope="module")
def sample():
    return demand.simulate(200_000, np.random.default_rng(0), rho=0.5)


def disturbances(sample, noise=1.0):
    (c, t, s), p = sample.z.T, sample.x[:, 0]
    v = p - 25 - (c + 3) * demand.psi(t)
    return v, (sample.y - (100 + (10 + p) * s * demand.psi(t) - 2 * p)) / noise


def test_psi_by_hand():
    np.testing.assert_allclose(demand.psi(np.array([5.0, 0.0, 10.0])), [-1.0, -23 / 12, 1 / 12], rtol=1e-12)


def test_covariates(sample):
    np.testing.assert_array_equal(sample.x[:, 1:], sample.z[:, 1:])
    c, t, s = sample.z.T
    assert set(s) == set(range(1, 8))
    np.testing.assert_allclose(np.bincount(s.astype(int))[1:] / len(s), 1 / 7, atol=0.005)
    assert t.min() >= 0
    assert t.max() <= 10
    np.testing.assert_allclose([t.mean(), t.var()], [5, 100 / 12], rtol=0.01)
    np.testing.assert_allclose([c.mean(), c.var()], [0, 1], atol=0.02)
    np.testing.assert_allclose(np.corrcoef(sample.z.T), np.eye(3), atol=0.01)


@pytest.mark.parametrize("rho", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("noise", [1.0, 158.0])
def test_disturbances(rho, noise):
    sample = demand.simulate(200_000, np.random.default_rng(1), rho, noise)
    v, e = disturbances(sample, noise)
    np.testing.assert_allclose(np.cov(v, e), [[1, rho], [rho, 1]], atol=0.02)
    np.testing.assert_allclose(np.corrcoef([v, e, *sample.z.T])[:2, 2:], 0, atol=0.02)  # exogenous instruments


def test_scale_is_that_of_the_published_code(sample):
    """Whose constants for standardising are 17.779 and 3.7 for the price and 158 for sales."""
    p = sample.x[:, 0]
    np.testing.assert_allclose([p.mean(), p.std(), sample.y.std()], [17.779, 3.7, 158], rtol=0.01)


def test_published_grid():
    grid = demand.published_grid()
    assert grid.shape == (2800, 3)
    assert len(np.unique(grid, axis=0)) == 2800
    for column, expected in zip(
        grid.T, [np.linspace(10, 25, 20), np.linspace(0, 10, 20), np.arange(1, 8)], strict=True
    ):
        np.testing.assert_allclose(np.unique(column), expected)
    np.testing.assert_array_equal(grid[[0, -1]], [[10, 0, 1], [25, 10, 7]])
    truth = demand.structural(*grid.T)
    np.testing.assert_allclose(truth[0], 80 - 20 * 23 / 12)
    np.testing.assert_allclose(truth[-1], 50 + 35 * 7 / 12)
    np.testing.assert_allclose(demand.structural(*demand.shown_line().T), 60 - 6 * demand.shown_line()[:, 0])


def test_arrays_are_standardised_and_reproducible():
    data = demand.arrays(3, 1000, 0.5, 1.0)
    z, x, y = (np.concatenate(pair) for pair in zip(data.inner, data.outer, strict=True))
    for a in (z, x, y):
        np.testing.assert_allclose(a.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(a.std(axis=0), 1, rtol=1e-5)
    assert len(data.inner.y) == len(data.outer.y) == 500
    again, other = demand.arrays(3, 1000, 0.5, 1.0), demand.arrays(4, 1000, 0.5, 1.0)
    np.testing.assert_array_equal(data.inner.y, again.inner.y)
    assert not np.isin(data.inner.y, other.inner.y).any()
    assert not np.isin(data.validation.z[:, 0], z[:, 0]).any()


def test_two_stage_against_its_textbook_form():
    """The two regressions one after the other; and no error where the truth is linear."""
    data = demand.arrays(0, 1000, 0.9, 1.0)
    z, x, y = (np.concatenate(pair, dtype=float) for pair in zip(data.inner, data.outer, strict=True))
    z, x = (np.hstack([a, np.ones((1000, 1))]) for a in (z, x))
    fitted = z @ np.linalg.lstsq(z, x)[0]
    coefficients = np.linalg.lstsq(fitted, y)[0]
    test_x = np.hstack([data.test_x, np.ones((2800, 1))])
    np.testing.assert_allclose(demand.two_stage(data, data.test_x), test_x @ coefficients, rtol=1e-4, atol=1e-4)

    line = np.array([1.0, -2.0, 0.5])
    linear = data._replace(
        inner=data.inner._replace(y=data.inner.x @ line), outer=data.outer._replace(y=data.outer.x @ line)
    )
    np.testing.assert_allclose(demand.two_stage(linear, data.test_x), data.test_x @ line, atol=1e-4)


TINY = demand.Setting(n=200, num_outer_steps=3, outer_widths=(8, 4), inner_widths=(8, 8), inner_steps=2)


def test_dfiv_is_funcid_linear_with_the_same_ridge():
    dfiv, _ = demand.fit("dfiv", TINY, {}, (0, 1))
    funcid, _ = demand.fit("funcid-linear", TINY, {"ridge_ratio": 1.0}, (0, 1))
    np.testing.assert_allclose(funcid.test_mse, dfiv.test_mse, rtol=1e-2)
    assert dfiv.shown.shape == (2, 61)


def test_seeds_together_equal_a_seed_alone():
    together, _ = demand.fit("single-objective", TINY, {}, (0, 1))
    alone, _ = demand.fit("single-objective", TINY, {}, (1,))
    np.testing.assert_allclose(together.test_mse[1], alone.test_mse[0], rtol=1e-3)
    assert together.test_mse[0] != together.test_mse[1]


def test_regression_learns_the_truth():
    setting = demand.Setting(n=1000, num_outer_steps=100, outer_widths=(32, 32))
    evaluation, last = demand.fit("single-objective", setting, {"outer_learning_rate": 1e-2}, (0,))
    assert evaluation.validation_loss[0] < 0.02 * 158**2
    assert evaluation.test_mse[0] < 0.15 * demand.structural(*demand.published_grid().T).var()
    assert last["outer_finite"].all()


def test_summary_counts_broken_runs_as_infinite():
    def result(*values):
        return demand.Result(np.array(values), np.zeros((len(values), 61)), 1.0)

    values = np.arange(1.0, 11.0)
    rows = demand.summarise(
        {"funcid-linear": result(*values), "aid-cg": result(*values[:-1], np.nan), "dfiv": result(*(values + 5))}
    )
    assert rows["funcid-linear"].median == 5.5
    assert rows["funcid-linear"].p_value is None
    assert rows["aid-cg"].median == 5.5
    assert rows["aid-cg"].p_value == 1.0  # one difference only
    assert rows["dfiv"].p_value == pytest.approx(2 / 2**10)
    low, high = rows["dfiv"].interval
    assert low < rows["dfiv"].median < high


@pytest.mark.parametrize("tune", [False, True])
def test_run(tmp_path, tune):
    method = "single-objective" if tune else "aid-cg"
    options = demand.Demand(
        output_dir=tmp_path / "run", seeds=2, seed=5, n=200, num_outer_steps=2, methods=(method,), tune=tune
    )
    options.check()
    calls = []

    def track(label, total):
        return lambda state, metrics: calls.append((label, len(metrics["outer_objective"])))

    directory = _records.run_directory(options)
    table = options.run(directory, track)
    assert table is not None
    names = {path.name for path in directory.iterdir()}
    assert names == {"config.json", "demand.png", "runs.jsonl"} | ({"trials.jsonl"} if tune else set())
    assert json.loads((directory / "config.json").read_text())["noise"] == 1.0
    records = list(_records.read(directory / "runs.jsonl"))
    assert [(r["method"], r["seed"]) for r in records] == [(m, s) for m in (method, "iv2sls") for s in (5, 6)]
    for record in records:
        assert record["task"] == "demand"
        assert record["settings"]["n"] == 200
        assert record["metrics"]["test_mse"] > 0
    assert calls[-1] == (method, 2)
    if tune:
        trials = list(_records.read(directory / "trials.jsonl"))
        assert [r["seed"] for r in trials] == [*demand.SELECTION_SEEDS] * len(demand.METHODS[method].trials)
        losses = np.reshape([r["metrics"]["validation_loss"] for r in trials], (-1, 2)).mean(axis=1)
        best = demand.METHODS[method].trials[int(losses.argmin())]
        assert records[0]["settings"]["outer_learning_rate"] == best["outer_learning_rate"]


def test_every_method_has_as_many_trials():
    assert {len(method.trials) for method in demand.METHODS.values()} == {4}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"n": 101}, "--n must be even and at least 20, got 101"),
        ({"rho": 1.5}, "--rho must be between -1 and 1, got 1.5"),
        ({"noise": -1.0}, "--noise must be at least 0, got -1.0"),
        ({"num_outer_steps": 0}, "--num-outer-steps must be at least 1, got 0"),
        ({"methods": ("dfiv", "itd")}, "--methods must be among funcid-linear, .*, each once, got dfiv, itd"),
        ({"methods": ("dfiv", "dfiv")}, "each once, got dfiv, dfiv"),
        ({"methods": ()}, "got none"),
    ],
)
def test_bad_options(bad, message):
    with pytest.raises(ValueError, match=message):
        demand.Demand(**bad).check()
