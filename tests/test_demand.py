"""The demand design: the law of its data, the published grid, and the command from end to end."""

import json

import numpy as np
import pytest

from funcbilevel import cli
from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._instrumental import train
from funcbilevel.tasks._instrumental.methods import Setting, trials
from funcbilevel.tasks.demand import measure
from funcbilevel.tasks.demand import problem as demand


@pytest.fixture(scope="module")
def sample():
    return demand.simulate(200_000, np.random.default_rng(0), rho=0.5, noise=1.0)


def disturbances(sample, noise=1.0):
    (c, t, s), p = sample.z.T, sample.p[:, 0]
    v = p - 25 - (c + 3) * demand.psi(t)
    return v, (sample.y - (100 + (10 + p) * s * demand.psi(t) - 2 * p)) / noise


def test_psi_by_hand():
    np.testing.assert_allclose(demand.psi(np.array([5.0, 0.0, 10.0])), [-1.0, -23 / 12, 1 / 12], rtol=1e-12)


def test_covariates(sample):
    np.testing.assert_array_equal(sample.c, sample.z[:, 1:])
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
    p = sample.p[:, 0]
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
    for inner, outer in zip(data.inner, data.outer, strict=True):
        a = np.concatenate([inner, outer])
        np.testing.assert_allclose(a.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(a.std(axis=0), 1, rtol=1e-5)
    assert len(data.inner.y) == len(data.outer.y) == 500
    again, other = demand.arrays(3, 1000, 0.5, 1.0), demand.arrays(4, 1000, 0.5, 1.0)
    np.testing.assert_array_equal(data.inner.y, again.inner.y)
    assert not np.isin(data.inner.y, other.inner.y).any()
    assert not np.isin(data.validation.z[:, 0], np.concatenate([data.inner.z, data.outer.z])[:, 0]).any()


def test_points_are_the_grid_and_the_line():
    grid, points = demand.published_grid(), demand.points()
    np.testing.assert_array_equal(np.hstack([points.p, points.c]), np.concatenate([grid, demand.shown_line()]))
    truth = demand.structural(points.p[:, 0], *points.c.T)
    assert demand.test_mse(truth) == 0
    assert demand.test_mse(truth + 2.0) == pytest.approx(4)


def test_two_stage_against_its_textbook_form():
    """The two regressions one after the other; and no error where the truth is linear."""
    data = demand.arrays(0, 1000, 0.9, 1.0)
    z, p, c, y = (np.concatenate(pair).astype(float) for pair in zip(data.inner, data.outer, strict=True))
    one = np.ones((1000, 1))
    z, x = np.hstack([z, one]), np.hstack([p, c, one])
    fitted = z @ np.linalg.lstsq(z, x)[0]
    at = np.hstack([data.points.p, data.points.c, np.ones((len(data.points.p), 1))])
    expected = at @ np.linalg.lstsq(fitted, y)[0] * data.y_std + data.y_mean
    np.testing.assert_allclose(demand.two_stage(data), expected, rtol=1e-4, atol=1e-2)

    line = np.array([1.0, -2.0, 0.5])
    linear = data._replace(
        **{
            level: (batch := getattr(data, level))._replace(y=np.hstack([batch.p, batch.c]) @ line)
            for level in ("inner", "outer")
        },
        y_mean=0.0,
        y_std=1.0,
    )
    np.testing.assert_allclose(demand.two_stage(linear), at[:, :3] @ line, atol=1e-4)


# The command.


@pytest.fixture
def fits(monkeypatch):
    """What would be trained; the loss is least for the fifth trial, the error is the seed."""
    made = []

    def fit(method, setting, hyper, data, seeds, callback):
        made.append((method, dict(hyper), [*seeds]))
        assert [len(of.inner.y) for of in data] == [100] * len(seeds)
        callback(None, {"outer_objective": np.ones(setting.num_outer_steps)})
        at = demand.points()
        truth = demand.structural(at.p[:, 0], *at.c.T)
        loss = 0.0 if hyper == trials(method, setting)[4] else 1.0
        names = ("outer_objective", "inner_objective", "hypergradient_norm")
        evaluation = train.Evaluation(np.stack([truth + seed for seed in seeds]), np.full(len(seeds), loss))
        return evaluation, {name: np.ones(len(seeds)) for name in names}

    monkeypatch.setattr(train, "fit", fit)
    return made


def test_compare(tmp_path, capsys, fits):
    """The trial with the least validation loss is the one that is used, and what is there is not made again."""
    args = ["compare", "demand", "--seeds", "2", "--seed", "5", "--n", "200", "--output-dir", str(tmp_path)]
    cli.main([*args, "--methods", "aid-cg"])
    names = ["demand.png", "runs-curves.jsonl", "runs.jsonl", "selection.json", "selection.jsonl", "table.md"]
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["config.json", *names]
    assert json.loads((tmp_path / "config.json").read_text())["noise"] == 158.0
    output = capsys.readouterr()
    assert "aid-cg 6          200 outer steps" in output.err
    assert "n = 200, rho = 0.5" in output.out

    tried = trials("aid-cg", Setting())
    assert fits == [("aid-cg", hyper, [*train.RULE.seeds]) for hyper in tried] + [("aid-cg", tried[4], [5, 6])]
    before = store.read(tmp_path / "runs.jsonl")
    assert [(r["method"], r["seed"]) for r in before] == [(m, s) for m in ("aid-cg", "iv2sls") for s in (5, 6)]
    assert {name: before[0]["settings"][name] for name in tried[4]} == tried[4]
    assert [r["metrics"]["test_mse"] for r in before[:2]] == pytest.approx([25.0, 36.0])
    curve = json.loads((tmp_path / "runs-curves.jsonl").read_text().splitlines()[0])
    np.testing.assert_allclose(curve["sales"], demand.structural(*demand.shown_line().T) + 5, rtol=1e-4, atol=1e-3)

    # `covariate_iv` deleted what was finished before.
    fits.clear()
    cli.main([*args, "--methods", "dfiv"])
    assert {method for method, *_ in fits} == {"dfiv"}
    after = store.read(tmp_path / "runs.jsonl")
    assert after[: len(before)] == before
    assert [r["method"] for r in after[len(before) :]] == ["dfiv"] * 2
    assert [line.split(" | ")[0] for line in (tmp_path / "table.md").read_text().splitlines()[2:]] == [
        "| dfiv",
        "| aid-cg",
        "| iv2sls",
    ]


def test_broken_predictions_are_recorded():
    """As null, which is JSON, and not as NaN, which is not."""
    result = measure(np.full(len(demand.points().p), np.nan))
    assert np.isnan(result.metrics["test_mse"])
    assert set(store.finite(dict(result.beside["curves"]))["sales"]) == {None}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--n", "101"], "--n must be even and at least 20, got 101"),
        (["--rho", "1.5"], "--rho must be from -1 to 1, got 1.5"),
        (["--noise", "-1"], "--noise must be at least 0, got -1.0"),
        (["--methods", "dfiv", "itd"], "--methods must be among funcid-linear, .*, got itd"),
        (["--methods", "iv2sls"], "--methods must be among funcid-linear, .*, got iv2sls"),
    ],
)
def test_bad_options(tmp_path, args, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["compare", "demand", *args, "--output-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
