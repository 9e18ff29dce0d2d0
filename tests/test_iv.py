"""Instrumental regression on dSprites: the methods' formulas, one pass over the treatment network, and the commands."""

import re
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import funcbilevel as fb
from funcbilevel import cli
from funcbilevel.tasks._experiment import select, store
from funcbilevel.tasks._experiment.grid import Unit
from funcbilevel.tasks._experiment.methods import choices
from funcbilevel.tasks._experiment.store import Store
from funcbilevel.tasks.data import dsprites
from funcbilevel.tasks.iv import CompareIV, RunIV, methods, report, train
from funcbilevel.tasks.iv import problem as iv
from funcbilevel.tasks.iv.methods import METHODS, Setting

WIDTHS = (16, 12, 10, 6)
SETTING = Setting(n=60, widths=WIDTHS, inner_steps=5)


@pytest.fixture(scope="module")
def data():
    B, _ = dsprites.outcome_matrix()
    return iv.arrays(SETTING.n, 0, dsprites.render_hearts(), B, num_validation=20)


def start(solver, data, seed=0):
    return jax.jit(solver.bilevel.init)(jax.random.key(seed), None, data.inner)


# The objectives.


def test_second_stage_is_ridge_regression(x64):
    rng = np.random.default_rng(0)
    h, y = rng.normal(size=(50, 4)), rng.normal(size=50) + 3.0
    H = np.hstack([h, np.ones((50, 1))])
    u = np.linalg.lstsq(np.vstack([H / np.sqrt(50), np.sqrt(0.1) * np.eye(5)]), np.append(y / np.sqrt(50), np.zeros(5)))
    np.testing.assert_allclose(iv.second_stage(jnp.asarray(h), jnp.asarray(y)), u[0], rtol=1e-10)
    # The objective is that ridge regression's minimum: no other u gives less.
    value = iv.outer_objective(None, jnp.asarray(h), iv.Batch(None, y=jnp.asarray(y)))
    for other in (u[0], u[0] + 1e-3, 0 * u[0]):
        assert value <= np.mean((y - H @ other) ** 2) + 0.1 * np.sum(other**2) + 1e-12
    np.testing.assert_allclose(value, np.mean((y - H @ u[0]) ** 2) + 0.1 * np.sum(u[0] ** 2), rtol=1e-10)


def test_networks_have_spectral_norm_one_and_converge_to_it():
    net, x = iv.TreatmentNet(WIDTHS), jnp.ones((4, 4096))
    variables = net.init(jax.random.key(0), x, train=False)
    for _ in range(30):
        _, state = net.apply(variables, x, train=True, mutable=["batch_stats"])
        variables = variables | state
    kernels = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    singular = [np.linalg.svd(kernel, compute_uv=False)[0] for path, kernel in kernels if kernel.ndim == 2]
    sigmas = {
        jax.tree_util.keystr(path): float(value)
        for path, value in jax.tree_util.tree_flatten_with_path(variables["batch_stats"])[0]
        if "sigma" in jax.tree_util.keystr(path)
    }
    np.testing.assert_allclose(sorted(sigmas.values()), sorted(singular), rtol=0.02)


def test_networks_start_as_the_published_ones_do():
    params = iv.InstrumentNet().init(jax.random.key(0), jnp.ones((4, 3)), train=False)["params"]
    kernel, bias = (np.asarray(params["Dense_0"][name]) for name in ("kernel", "bias"))
    assert 0.9 < np.max(np.abs(bias)) * np.sqrt(3) <= 1.0
    assert abs(np.mean(bias)) < 0.1
    # The matrix is uniform, too: of a uniform variable the largest value is sqrt(3) standard deviations.
    assert np.max(np.abs(kernel)) / np.std(kernel) == pytest.approx(np.sqrt(3), rel=0.05)


def test_every_method_starts_from_the_same_networks(data):
    kinds = ("funcid-linear", "funcid-learned", "aid-cg", "penalty-value")  # by what their estimators carry
    states = [
        start(methods.solver(name, SETTING, method.hyper), data) for name, method in METHODS.items() if name in kinds
    ]
    first = states[0]
    for state in states[1:]:
        for name in ("outer_params", "inner_params", "model_state", "outer_model_state"):
            jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(first, name))
    other = start(methods.solver("dfiv", SETTING, {}), data, seed=1)
    assert not np.array_equal(jax.tree.leaves(other.outer_params)[0], jax.tree.leaves(first.outer_params)[0])


# FuncID and DFIV.


@pytest.fixture
def fitted(x64, data):
    """The networks after a few outer steps, in float64: (features of h, h, f at the inner pictures, state, data)."""
    data = jax.tree.map(lambda a: a.astype(jnp.float64), data)
    solver = methods.solver("dfiv", SETTING, {"outer_learning_rate": 1e-2})
    state = start(solver, data)
    step = jax.jit(solver.bilevel.step)
    for _ in range(5):
        state, _ = step(state, data.inner, data.outer)
    f, _ = solver.f.apply(state.outer_params, state.outer_model_state, data.inner.x)
    return fb.from_linen(iv.InstrumentNet()), solver.h, f, state, data


def hypergradient(fitted, estimator, **kwargs):
    _, h, f, state, data = fitted
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not a stationary point")  # the networks are those after a few steps
        return fb.hypergradient(
            iv.problem,
            h,
            estimator,
            f,
            state.inner_params,
            data.inner,
            data.outer,
            model_state=state.model_state,
            key=jax.random.key(0),
            **kwargs,
        ).gradient


def test_funcid_linear_is_dfiv_when_features_and_ridge_are_shared(fitted):
    dfiv = hypergradient(fitted, fb.alternating())
    assert dfiv.dtype == jnp.float64
    funcid = hypergradient(fitted, fb.funcid(fb.linear_adjoint(fitted[0], ridge=2 * iv.INNER_RIDGE)))
    assert np.linalg.norm(funcid - dfiv) <= 1e-8 * np.linalg.norm(dfiv)
    other = hypergradient(fitted, fb.funcid(fb.linear_adjoint(fitted[0], ridge=20 * iv.INNER_RIDGE)))
    assert np.linalg.norm(other - dfiv) > 1e-3 * np.linalg.norm(dfiv)


def test_learned_adjoint_approaches_it_as_its_steps_grow(fitted):
    dfiv = hypergradient(fitted, fb.alternating())
    head = fb.from_linen(
        linen.Dense(WIDTHS[-1], use_bias=False, kernel_init=linen.initializers.zeros, param_dtype=jnp.float64)
    )
    optimizer = optax.chain(optax.add_decayed_weights(2 * iv.INNER_RIDGE), optax.sgd(0.03, momentum=0.9))
    errors = [
        np.linalg.norm(
            hypergradient(fitted, fb.funcid(fb.learned_adjoint(optimizer, steps, head, features=fitted[0]))) - dfiv
        )
        / np.linalg.norm(dfiv)
        for steps in (5, 50, 500)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 1e-3


def test_dfiv_is_the_derivative_of_the_two_ridge_regressions(fitted):
    """By hand, without the library: first stage, second stage, jax.grad."""
    features, _, f, state, data = fitted

    def two_stages(f):
        phi_P, phi_Q = (
            features.apply(state.inner_params, state.model_state, z)[0] for z in (data.inner.z, data.outer.z)
        )
        n, p = phi_P.shape
        V = jnp.linalg.solve(phi_P.T @ phi_P / n + 0.1 * jnp.eye(p), phi_P.T @ f / n)
        H = jnp.hstack([phi_Q @ V, jnp.ones((n, 1))])
        y = data.outer.y
        u = jnp.linalg.solve(H.T @ H / n + 0.1 * jnp.eye(H.shape[1]), H.T @ y / n)
        return jnp.mean((y - H @ u) ** 2) + 0.1 * jnp.sum(u**2)

    expected = jax.grad(two_stages)(f)
    got = hypergradient(fitted, fb.alternating())
    assert np.linalg.norm(got - expected) <= 1e-9 * np.linalg.norm(expected)


# Speed.


@pytest.mark.parametrize("name", choices(METHODS))
def test_one_pass_over_the_treatment_network(data, name):
    """One product of the pictures with the first layer's matrix, and one for its gradient, whatever the inner steps.

    The second product of the first one's shape is the derivative by the first layer's output, on the way back.
    """
    solver = methods.solver(name, SETTING, METHODS[name].hyper)
    program = jax.jit(solver.bilevel.step).lower(start(solver, data), data.inner, data.outer).compile().as_text()
    n, width = SETTING.n // 2, WIDTHS[0]
    of_outputs = re.findall(rf"= f32\[{n},{width}\]\S* dot\(", program)
    of_weights = re.findall(rf"= f32\[(?:4096,{width}|{width},4096)\]\S* dot\(", program)
    assert (len(of_outputs), len(of_weights)) == (2, 1)


# Training.


@pytest.mark.parametrize(("norm", "batch_size"), [("layer", 8), ("batch", None)])
def test_run_learns_and_reports(data, norm, batch_size):
    solver = methods.solver("funcid-linear", SETTING._replace(norm=norm), {"ridge": 0.2})
    seen = []
    outcome = train.fit(
        solver, data, 0, 6, chunk=2, batch_size=batch_size, callback=lambda state, metrics: seen.append(metrics)
    )
    assert outcome.curves["step"] == [2, 4, 6]
    assert all(len(values) == 3 and np.all(np.isfinite(values)) for values in outcome.curves.values())
    assert outcome.curves["test_mse"][-1] == pytest.approx(float(outcome.evaluation.test_mse), rel=1e-5)
    assert [len(metrics["test_mse"]) for metrics in seen] == [2, 2, 2]
    assert outcome.evaluation.predictions.shape == (588,)
    again = train.fit(solver, data, 0, 6, chunk=2, batch_size=batch_size)
    assert again.curves == outcome.curves


def test_evaluation_is_what_it_says(data):
    solver = methods.solver("dfiv", SETTING, {})
    state = start(solver, data)
    evaluation = train.evaluate(solver, state, data)
    f = solver.f.apply(state.outer_params, state.outer_model_state, data.inner.x)[0]
    phi = [
        np.asarray(fb.from_linen(iv.InstrumentNet()).apply(state.inner_params, state.model_state, z)[0], np.float64)
        for z in (data.inner.z, data.outer.z, data.validation.z)
    ]
    n = len(phi[0])
    V = np.linalg.solve(phi[0].T @ phi[0] / n + 0.1 * np.eye(33), phi[0].T @ np.asarray(f, np.float64) / n)
    H, H_valid = (np.hstack([p @ V, np.ones((len(p), 1))]) for p in phi[1:])
    u = np.linalg.solve(H.T @ H / n + 0.1 * np.eye(7), H.T @ np.asarray(data.outer.y, np.float64) / n)
    np.testing.assert_allclose(
        evaluation.validation_loss, np.mean((np.asarray(data.validation.y) - H_valid @ u) ** 2), rtol=1e-3
    )
    f_test = np.asarray(solver.f.apply(state.outer_params, state.outer_model_state, data.test_x)[0])
    predictions = np.hstack([f_test, np.ones((588, 1))]) @ u
    np.testing.assert_allclose(evaluation.predictions, predictions, atol=2e-2)
    np.testing.assert_allclose(evaluation.test_mse, np.mean((predictions - data.test_y) ** 2), rtol=1e-2)


# The methods' table and the committed selection.

RESULTS = Path(__file__).parents[1] / "benchmarks/results/iv"


def test_every_method_has_as_many_trials():
    select.check_budgets({name: len(METHODS[name].trials) for name in choices(METHODS)})


@pytest.mark.parametrize(
    ("name", "n"), [("funcid-linear", 5000), ("funcid-learned", 2000), ("aid-cg", 2000), ("itd", 2000)]
)
def test_chosen_by_the_committed_selection(name, n):
    """By the one rule; for aid-cg also among the two trials more that were made."""
    of_method = [
        record
        for record in store.records(Store(RESULTS, "iv", "selection"))
        if (record["method"], record["settings"]["n"]) == (name, n)
    ]
    losses = select.by_settings(of_method, lambda record: store.values(record)["validation_loss"])
    keys = [store.settings_key(train.run_of(name, 0, how).settings) for how in hows(name, n)]
    assert len(losses) == len(keys) + 2 * (name == "aid-cg")
    assert select.best(losses) == select.best({key: losses[key] for key in keys}) == keys[METHODS[name].chosen]


def hows(name, n):
    return [train.How(Setting(n=n), hyper, 100) for hyper in METHODS[name].trials]


# The commands.

SMALL = ("--n", "60", "--widths", "16", "12", "10", "6", "--num-outer-steps", "4")


def test_run_command(tmp_path, capsys):
    cli.main(["run", "iv", *SMALL, "--output-dir", str(tmp_path)])
    names = ["config.json", "iv.png", "runs-curves.jsonl", "runs-predictions.jsonl", "runs.jsonl"]
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == names
    (record,) = store.read(tmp_path / "runs.jsonl")
    assert (record["task"], record["method"], record["settings"]["n"]) == ("iv", "funcid-linear", 60)
    output = capsys.readouterr()
    assert "funcid-linear     4 outer steps, outer " in output.err
    for word in (f"{record['metrics']['test_mse']:.3f}", "rendered hearts", "drawn from U(0,1)", "30 inner, 30 outer"):
        assert word in output.out
    picture = (tmp_path / "iv.png").read_bytes()
    assert len(picture) > 10_000
    (tmp_path / "iv.png").unlink()
    cli.main(["report", str(tmp_path)])
    assert (tmp_path / "iv.png").read_bytes() == picture


@pytest.mark.parametrize(
    ("options", "n", "widths"),
    [
        (RunIV(), 5000, (1024, 512, 128, 32)),
        (RunIV(quick=True), 1000, (256, 128, 64, 32)),
        (RunIV(quick=True, n=5000), 5000, (256, 128, 64, 32)),
        (RunIV(quick=True, widths=WIDTHS), 1000, WIDTHS),
        (CompareIV(), 5000, (1024, 512, 128, 32)),
    ],
)
def test_config_has_what_really_runs(options, n, widths):
    assert (options.setting.n, options.setting.widths) == (n, widths)
    settings = options.settings()
    assert (settings["n"], settings["widths"]) == (n, widths)
    assert "quick" not in settings


def test_settings_of_the_committed_records():
    """What is there counts as finished: every run of the command, which the README names."""
    names = ("funcid-linear", "funcid-learned", "dfiv", "aid-cg", "itd")
    runs = [
        train.run_of(name, seed, train.How(Setting(), METHODS[name].hyper, 100)) for name in names for seed in range(20)
    ]
    runs += [run for seed in range(20) for run in train.references(5000, seed)]
    where = Store(RESULTS, "iv")
    assert len(runs) == len(store.records(where)) == 160
    assert not store.missing(where, runs)
    assert len(store.beside(where, "curves")) == 100
    costs = train.cost_runs(Setting(), {name: METHODS[name].hyper for name in names})
    assert len(costs) == 6
    assert not store.missing(where._replace(name="costs"), costs)


@pytest.mark.slow
def test_quick_run_learns(tmp_path):
    """`funcbilevel run iv --quick`: better than the mean by far, and its outcome matrix is drawn if none is given."""
    cli.main(["run", "iv", "--quick", "--output-dir", str(tmp_path)])
    (record,) = store.read(tmp_path / "runs.jsonl")
    variance = np.var(dsprites.test_set(dsprites.render_hearts(), dsprites.outcome_matrix()[0]).y)
    assert record["metrics"]["test_mse"] < 0.6 * variance
    assert record["metrics"]["outer_finite"] == record["metrics"]["inner_finite"] == 1.0


def compare(directory, *args):
    cli.main(["compare", "iv", *SMALL, "--output-dir", str(directory), *args])


def test_compare(tmp_path, capsys):
    compare(tmp_path, "--seeds", "1", "--methods", "dfiv")
    records = store.read(tmp_path / "runs.jsonl")
    assert [r["method"] for r in records] == ["dfiv", "kernel-iv", "two-stage", "least-squares"]
    assert [r["settings"] for r in records[1:]] == [{"n": 60}] * 3
    bare, dfiv = store.read(tmp_path / "costs.jsonl")
    assert (bare["method"], bare["metrics"]["ratio"], dfiv["method"]) == ("bare", 1.0, "dfiv")
    assert dfiv["metrics"]["ratio"] == pytest.approx(dfiv["metrics"]["seconds"] / bare["metrics"]["seconds"])
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + 4
    assert (tmp_path / "iv.png").stat().st_size > 10_000
    assert "dfiv 0            4 outer steps" in capsys.readouterr().err


def test_costs_of_a_method_that_comes_later(monkeypatch):
    """They are measured beside a bare pass of their own; what is recorded of the first one stays."""
    asked = []

    def measure_costs(calls):
        asked.append([*calls])
        rows = [
            types.SimpleNamespace(name=name, seconds=s, temp_bytes=0, compile_seconds=0)
            for name, s in (("bare", 2.0), ("itd", 3.0))
        ]
        return types.SimpleNamespace(rows=rows)

    tiny = iv.Arrays(
        iv.Batch(np.ones((4, 3)), np.ones((4, 4096))), iv.Batch(np.ones((4, 3)), y=np.ones(4)), None, None, None
    )
    monkeypatch.setattr(train, "_arrays", lambda *args: tiny)
    monkeypatch.setattr(train.fb, "measure_costs", measure_costs)
    _, run = train.cost_runs(SETTING, {"itd": METHODS["itd"].hyper})
    (result,) = train.measure_costs(None, SETTING, 0, Unit((run,), (0,)))
    assert asked == [["bare", "itd"]]
    assert result.metrics["ratio"] == 1.5
    assert result.seconds == 3.0


@pytest.fixture
def loss_is_hyper(monkeypatch):
    """Runs without training, whose validation loss is how far the outer learning rate is from 1e-3."""

    def fit(solver, data, seed, num_outer_steps, *, chunk, batch_size, callback):
        loss = abs(solver - 1e-3) + (np.nan if solver == 2e-3 and seed == 1001 else 0)
        metrics = {"outer_objective": 1.0, "inner_objective": 1.0}
        curves = {name: [1.0] for name in ("step", *metrics)}
        return train.Outcome(train.Evaluation(solver, loss, None), curves, 0.0, metrics)

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(train, "solver", lambda method, setting, hyper: hyper.get("outer_learning_rate", 1.0))
    monkeypatch.setattr(train, "_arrays", lambda *args: None)


def test_compare_selects_by_validation_loss(tmp_path, loss_is_hyper):
    few = ("--seeds", "2", "--selection-n", "40", "--no-costs", "--no-references")
    compare(tmp_path, *few, "--select", "--methods", "dfiv", "itd")
    tried = store.read(tmp_path / "selection.jsonl")
    assert len(tried) == 2 * 3 * 4
    assert {r["settings"]["n"] for r in tried} == {40}
    runs = store.read(tmp_path / "runs.jsonl")
    assert [(r["method"], r["seed"]) for r in runs] == [(m, s) for s in (0, 1) for m in ("dfiv", "itd")]
    assert [r["settings"]["outer_learning_rate"] for r in runs if r["method"] == "dfiv"] == [1e-3] * 2
    assert [r["settings"]["num_steps"] for r in runs if r["method"] == "itd"] == [2] * 2  # the first of equals
    # The same method in another setting is another row.
    compare(tmp_path, *few, "--methods", "dfiv")
    rows = [line.split(" | ")[0] for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    assert rows == ["| dfiv (outer_learning_rate 0.001)", "| dfiv (outer_learning_rate 0.003)", "| itd"]


def test_summary_compares_with_the_better_funcid():
    rng = np.random.default_rng(0)
    values = {"funcid-linear": rng.lognormal(0.1, 0.2, 20), "aid-cg": rng.lognormal(1, 0.2, 20)}
    values["funcid-learned"] = values["funcid-linear"] - 0.01
    values["dfiv"] = values["funcid-learned"] + 1e-3 * rng.normal(size=20)
    runs = [
        store.record("iv", method, seed, {"n": 5000}, {"test_mse": x}, 1.0)
        for method, sample in values.items()
        for seed, x in enumerate(sample)
    ]
    rows = {row.method: row for row in report.best_first(report.summarise(runs, METHODS, "test_mse"))}
    assert list(rows) == ["funcid-learned", "funcid-linear", "dfiv", "aid-cg"]
    assert rows["funcid-learned"].p_value is None
    assert rows["aid-cg"].p_value < 1e-4
    assert rows["dfiv"].p_value > 0.05
    for method, row in rows.items():
        assert row.median == pytest.approx(np.median(values[method]))
        low, high = row.interval
        assert row.quartiles[0] < low < row.median < high < row.quartiles[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("run", "iv", "--n", "61"), "--n must be even and at least 20, got 61"),
        (("run", "iv", "--widths", "16", "0", "10", "6"), "--widths must be at least 1, got 16, 0, 10, 6"),
        (("run", "iv", "--method", "magic"), "--method must be among funcid-linear, .*, got magic"),
        (("run", "iv", "--method", "kernel-iv"), "--method must be among funcid-linear, .*, got kernel-iv"),
        (("run", "iv", "--num-outer-steps", "0"), "--num-outer-steps must be at least 1, got 0"),
        (("run", "iv", "--batch-size", "1"), "--batch-size must be at least 2, got 1"),
        (("run", "iv", "--images", "nowhere.npz"), "--images: there is no nowhere.npz"),
        (("run", "iv", "--matrix", "nowhere.npy"), "--matrix: there is no nowhere.npy"),
        (("compare", "iv", "--seeds", "0"), "--seeds must be at least 1, got 0"),
        (("compare", "iv", "--selection-n", "7"), "--selection-n must be even and at least 20, got 7"),
        (("compare", "iv", "--methods", "magic"), "--methods must be among funcid-linear, .*, got magic"),
    ],
)
def test_bad_options(tmp_path, args, message):
    with pytest.raises(SystemExit, match=message):
        cli.main([*args, "--output-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_unknown_method():
    with pytest.raises(ValueError, match=r"method must be one of funcid-linear, .*, got 'kernel-iv'"):
        methods.solver("kernel-iv", SETTING, {})
