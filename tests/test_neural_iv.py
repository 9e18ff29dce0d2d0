"""Instrumental regression as an estimator and as a command: what it finds, conventions, weak instruments."""

import pickle
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from linearmodels.iv import IV2SLS
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks

from funcbilevel import cli
from funcbilevel.iv import NeuralIV, WeakInstrumentWarning, first_stage, weakness
from funcbilevel.tasks.schooling.problem import COVARIATES, load

pytestmark = pytest.mark.filterwarnings("ignore::funcbilevel.iv.WeakInstrumentWarning")
TINY = {
    **{"treatment_widths": (4,), "covariate_widths": (3,), "instrument_widths": (6,)},
    **{"num_steps": 4, "inner_steps": 2, "num_members": 2, "ridge": 0.01},
}


def structural(x, w):
    return 2 * np.tanh(x) + 0.5 * np.cos(2 * x) + w


def confounded(n, seed):
    """(X, Z, Y, W): x = z + w / 2 + v, and v is in y as well."""
    rng = np.random.default_rng(seed)
    z, v, w = rng.normal(size=(3, n))
    x = z + 0.5 * w + v
    return x[:, None], z[:, None], structural(x, w) + 1.6 * v + 0.3 * rng.normal(size=n), w[:, None]


@pytest.fixture(scope="module")
def fitted():
    sample = confounded(1000, 0)
    return NeuralIV(num_members=3, num_steps=60, random_state=0).fit(*sample), sample


def test_finds_a_nonlinear_function_that_regression_misses(fitted):
    model, (X, _, Y, W) = fitted
    x, _, _, w = confounded(2000, 1)
    truth = structural(x[:, 0], w[:, 0])
    regression = HistGradientBoostingRegressor(random_state=0).fit(np.hstack([X, W]), Y).predict(np.hstack([x, w]))
    error = np.mean((model.predict(x, w) - truth) ** 2)
    assert error < 0.25 * np.mean((regression - truth) ** 2)
    assert error < 0.06 * np.var(truth)
    low, high = model.predict_interval(x, w)[1:]
    assert np.mean((low <= truth) & (truth <= high)) > 0.3
    assert model.steps_ == 60
    assert 0 < model.score(*confounded(2000, 1)) < 1


def test_derivatives_and_partial_dependence_are_those_of_the_prediction(fitted):
    model, (X, _, _, W) = fitted
    slope = model.average_derivatives(X, W)
    difference = np.mean(model.predict(X + 0.01, W) - model.predict(X - 0.01, W)) / 0.02
    np.testing.assert_allclose(slope.estimate, [difference], rtol=1e-2)
    assert slope.low[0] < slope.estimate[0] < slope.high[0]
    band = model.partial_dependence(X, [-1.0, 0.5], W)
    np.testing.assert_allclose(band.estimate[1], model.predict(np.full_like(X, 0.5), W).mean(), rtol=1e-4)
    wide, narrow = (model.predict_interval(X, W, level) for level in (0.99, 0.5))
    np.testing.assert_allclose((wide.high - wide.low) / (narrow.high - narrow.low), 2.5758 / 0.6745, rtol=1e-3)
    np.testing.assert_allclose(wide.estimate, model.predict(X, W))


# Conventions.


def test_several_treatments_units_and_pandas():
    rng = np.random.default_rng(0)
    Z = pd.DataFrame(rng.normal(size=(100, 3)), columns=["z1", "z2", "z3"])
    X = pd.DataFrame({"a": Z.z1 + Z.z3 + rng.normal(size=100), "b": 2 * Z.z2 + rng.normal(size=100)})
    Y = pd.Series(X.a - X.b + rng.normal(size=100), name="y")
    with pytest.warns(WeakInstrumentWarning, match="first stage of a is .*too short"):
        model = NeuralIV(**TINY, random_state=0).fit(X, Z, Y)
    assert model.feature_names_in_.tolist() == ["a", "b"]
    assert model.average_derivatives(X).estimate.shape == (2,)
    other = clone(model).fit(1000 * X + 5, Z / 7, 10 * Y - 3)
    np.testing.assert_allclose(other.predict(1000 * X + 5), 10 * model.predict(X) - 3, rtol=1e-2, atol=1e-2)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    assert again.score(X, Z, Y) == model.score(X, Z, Y)


@pytest.mark.parametrize(
    "method",
    ["dfiv", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aid-cg", "funcid-learned"))],
)
def test_other_ways_to_train(method):
    X, Z, Y, W = confounded(60, 0)
    model = NeuralIV(**TINY, method=method, sample="split", bootstrap=False, random_state=0).fit(X, Z, Y, W)
    assert np.isfinite(model.predict_interval(X, W)).all()
    assert np.isfinite(model.validation_loss_).all()


def test_pipeline():
    X, Z, Y, W = confounded(60, 0)
    pipeline = make_pipeline(StandardScaler(), NeuralIV(**TINY, random_state=0))
    pipeline.fit(X, Z, neuraliv__Y=Y, neuraliv__W=W)
    alone = clone(pipeline[-1]).fit(StandardScaler().fit_transform(X), Z, Y, W)
    np.testing.assert_allclose(pipeline.predict(X, W=W), alone.predict(StandardScaler().fit_transform(X), W))


class Exogenous(NeuralIV):
    """With treatments that are their own instruments: a regression, which scikit-learn's checks can judge.

    It has n_features_in_ and feature_names_in_.
    """

    def fit(self, X, y):
        return super().fit(X, X, y)

    def score(self, X, y):
        return super().score(X, X, y)


CHECKS = {
    *("check_no_attributes_set_in_init", "check_parameters_default_constructible", "check_get_params_invariance"),
    *("check_set_params", "check_estimators_unfitted", "check_estimators_nan_inf", "check_requires_y_none"),
    *("check_fit1d", "check_estimator_sparse_array", "check_complex_data", "check_estimator_tags_renamed"),
    *("check_estimators_empty_data_messages", "check_n_features_in"),
}
SLOW_CHECKS = {
    *("check_dict_unchanged", "check_dont_overwrite_parameters", "check_estimators_overwrite_params"),
    *("check_estimators_pickle", "check_fit2d_1feature", "check_fit_idempotent", "check_readonly_memmap_input"),
    *("check_n_features_in_after_fitting", "check_dataframe_column_names_consistency", "check_regressors_int"),
}


@pytest.mark.parametrize("names", [CHECKS, pytest.param(SLOW_CHECKS, marks=pytest.mark.slow)], ids=["quick", "slow"])
def test_conventions_of_scikit_learn(names):
    one = {**TINY, "num_members": 1, "num_steps": 2, "treatment_widths": (2,), "instrument_widths": (2,)}
    done = set()
    for estimator, check in estimator_checks.estimator_checks_generator(Exogenous(**one)):
        if (name := check.func.__name__) in names:
            check(estimator)
            done.add(name)
    for name in names - done:  # those that scikit-learn runs on its own estimators alone
        if check := getattr(estimator_checks, name, None):  # its releases rename some and drop others
            check("Exogenous", Exogenous(**one))
            done.add(name)
    assert len(names - done) <= 1, f"scikit-learn has no {sorted(names - done)}: find what they are called now"


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"method": "itd"}, {}, "method must be one of funcid-linear, .*got 'itd'"),
        ({"sample": "swap"}, {}, "sample must be 'joint' or 'split', got 'swap'"),
        ({"num_members": 0}, {}, "num_members must be at least 1, got 0"),
        ({"validation_fraction": 1.0}, {}, "validation_fraction must be between 0 and 1, got 1.0"),
        ({}, {"Y": np.zeros((60, 2))}, r"Y must be one outcome for each row, \[n\], got shape \(60, 2\)"),
        ({}, {"Z": np.full((60, 1), np.nan)}, "Z contains NaN"),
        ({}, {"W": np.zeros((59, 1))}, "inconsistent numbers of samples"),
    ],
)
def test_bad_input(options, change, message):
    given = dict(zip("XZYW", confounded(60, 0), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        NeuralIV(**{**TINY, **options}).fit(**given)


def test_bad_input_to_a_fitted_model():
    X, Z, Y, W = confounded(60, 0)
    model = NeuralIV(**{**TINY, "num_members": 1}, random_state=0).fit(X, Z, Y, W)
    with pytest.raises(ValueError, match="W has 0 covariates, expected 1, as in fit"):
        model.predict(X)
    with pytest.raises(ValueError, match="Z has 2 instruments, expected 1, as in fit"):
        model.score(X, np.hstack([Z, Z]), Y, W)
    with pytest.raises(ValueError, match="an interval needs num_members of at least 2, got 1"):
        model.predict_interval(X, W)


def test_without_scikit_learn_the_extra_is_named():
    code = "import sys; sys.modules['sklearn'] = None; import funcbilevel.iv"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert re.search(r'funcbilevel.iv needs sklearn; install it with: .* -m pip install .*\[tasks\]"', done.stderr)


# The first stage.


def test_first_stage_is_that_of_linearmodels():
    frame = load()
    X, Z, W = (frame[names].to_numpy() for names in (["educ"], ["nearc4"], [*COVARIATES]))
    first = first_stage(X, Z, W)
    fitted = IV2SLS(frame["lwage"], frame[["const", *COVARIATES]], frame[["educ"]], frame[["nearc4"]]).fit()
    r2 = fitted.first_stage.diagnostics["partial.rsquared"]["educ"]
    np.testing.assert_allclose(first.partial_r2, [r2], rtol=1e-8)
    np.testing.assert_allclose(first.f_statistic, [r2 / (1 - r2) * (len(frame) - 7)], rtol=1e-8)
    assert "first stage of educ is 16.7, below 104.7" in weakness("educ", first.f_statistic[0])
    useless = first_stage(X, W[:, :1], W)  # a covariate once more
    assert useless.f_statistic[0] == 0
    assert "below 10: the instruments are weak" in weakness("educ", useless.f_statistic[0])
    assert weakness("educ", 200.0) is None


# The command.


@pytest.fixture
def card(tmp_path):
    frame = load().drop(columns="const").sample(400, random_state=0)
    frame.loc[frame.index[:5], "educ"] = np.nan
    frame.assign(region=np.where(frame.south > 0, "south", "north")).to_csv(tmp_path / "card.csv", index=False)
    return tmp_path / "card.csv"


COLUMNS = ["--outcome", "lwage", "--treatment", "educ", "--instruments", "nearc4"]


def test_fit_iv(card, tmp_path, capsys):
    directory = tmp_path / "fit"
    covariates = ["--covariates", "exper", "expersq", "black", "smsa", "region"]
    few = ["--num-steps", "3", "--num-members", "3", "--output-dir", str(directory)]
    cli.main(["fit", "iv", str(card), *COLUMNS, *covariates, *few])
    output = capsys.readouterr().out
    assert "Warning. The F statistic of the first stage of educ is" in output
    frame = pd.read_csv(card).dropna().assign(const=1.0)
    exogenous = frame[["const", *COVARIATES]]
    two_stage = IV2SLS(frame["lwage"], exogenous, frame[["educ"]], frame[["nearc4"]]).fit()
    text = (directory / "table.md").read_text()
    low, high = two_stage.conf_int().loc["educ"]
    assert f"| {two_stage.params['educ']:.3g} [{low:.3g}, {high:.3g}] |" in text
    assert (directory / "iv.png").stat().st_size > 10_000
    assert "n = 395" in output
    (directory / "table.md").unlink()
    cli.main(["report", str(directory)])
    assert (directory / "table.md").read_text() == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--treatment", "schooling"], "has no column schooling; its columns are lwage, educ"),
        (["--treatment", "region"], "the column region must hold numbers, got '(north|south)'"),
        (["--covariates", "educ"], "a column must have one role only, got educ in two"),
        (["--covariates", "south", "region"], "the linear model cannot be fitted: .*; leave out a column"),
        (["--num-members", "1"], "--num-members must be at least 2, got 1"),
    ],
)
def test_bad_options(card, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["fit", "iv", str(card), *COLUMNS, *change, "--output-dir", str(tmp_path / "fit")])
