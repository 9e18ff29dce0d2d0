"""Instrumental regression on dSprites: the methods' formulas, one pass over the treatment network, and the commands."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import funcbilevel as fb
from funcbilevel import cli
from funcbilevel.tasks import _records, dsprites, iv, iv_commands

WIDTHS = (16, 12, 10, 6)
SETTING = iv.Setting(n=60, widths=WIDTHS, inner_steps=5)


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
        start(iv.solver(name, SETTING, method.chosen), data) for name, method in iv.METHODS.items() if name in kinds
    ]
    first = states[0]
    for state in states[1:]:
        for name in ("outer_params", "inner_params", "model_state", "outer_model_state"):
            jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(first, name))
    other = start(iv.solver("dfiv", SETTING, {}), data, seed=1)
    assert not np.array_equal(jax.tree.leaves(other.outer_params)[0], jax.tree.leaves(first.outer_params)[0])


# FuncID and DFIV.


@pytest.fixture
def fitted(x64, data):
    """The networks after a few outer steps, in float64: (features of h, h, f at the inner pictures, state, data)."""
    data = jax.tree.map(lambda a: a.astype(jnp.float64), data)
    solver = iv.solver("dfiv", SETTING, {"outer_learning_rate": 1e-2})
    state = start(solver, data)
    step = jax.jit(solver.bilevel.step)
    for _ in range(5):
        state, _ = step(state, data.inner, data.outer)
    f, _ = solver.f.apply(state.outer_params, state.outer_model_state, data.inner.x)
    return fb.from_linen(iv.InstrumentNet()), solver.h, f, state, data


def hypergradient(fitted, estimator, **kwargs):
    _, h, f, state, data = fitted
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


@pytest.mark.parametrize("name", iv.METHODS)
def test_one_pass_over_the_treatment_network(data, name):
    """One product of the pictures with the first layer's matrix, and one for its gradient, whatever the inner steps.

    The second product of the first one's shape is the derivative by the first layer's output, on the way back.
    """
    solver = iv.solver(name, SETTING, iv.METHODS[name].chosen)
    program = jax.jit(solver.bilevel.step).lower(start(solver, data), data.inner, data.outer).compile().as_text()
    n, width = SETTING.n // 2, WIDTHS[0]
    of_outputs = re.findall(rf"= f32\[{n},{width}\]\S* dot\(", program)
    of_weights = re.findall(rf"= f32\[(?:4096,{width}|{width},4096)\]\S* dot\(", program)
    assert (len(of_outputs), len(of_weights)) == (2, 1)


# Training.


@pytest.mark.parametrize(("norm", "batch_size"), [("layer", 8), ("batch", None)])
def test_run_learns_and_reports(data, norm, batch_size):
    solver = iv.solver("funcid-linear", SETTING._replace(norm=norm), {"ridge": 0.2})
    seen = []
    outcome = iv.run(
        solver, data, 0, 6, chunk=2, batch_size=batch_size, callback=lambda state, metrics: seen.append(metrics)
    )
    assert outcome.curves["step"] == [2, 4, 6]
    assert all(len(values) == 3 and np.all(np.isfinite(values)) for values in outcome.curves.values())
    assert outcome.curves["test_mse"][-1] == pytest.approx(float(outcome.evaluation.test_mse), rel=1e-5)
    assert [len(metrics["test_mse"]) for metrics in seen] == [2, 2, 2]
    assert outcome.evaluation.predictions.shape == (588,)
    again = iv.run(solver, data, 0, 6, chunk=2, batch_size=batch_size)
    assert again.curves == outcome.curves


def test_evaluation_is_what_it_says(data):
    solver = iv.solver("dfiv", SETTING, {})
    state = start(solver, data)
    evaluation = iv.evaluate(solver, state, data)
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


# The commands.

SMALL = ("--n", "60", "--widths", "16", "12", "10", "6", "--num-outer-steps", "4")


def test_run_command(tmp_path, capsys):
    cli.main(["run", "iv", *SMALL, "--output-dir", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "iv.png",
        "metrics.jsonl",
        "metrics-curves.jsonl",
    }
    (record,) = _records.read(tmp_path / "metrics.jsonl")
    assert (record["task"], record["method"], record["settings"]["n"]) == ("iv", "funcid-linear", 60)
    assert f"{record['metrics']['test_mse']:.3f}" in capsys.readouterr().out


@pytest.mark.slow
def test_quick_run_learns(tmp_path):
    """`funcbilevel run iv --quick`: better than the mean by far, and its outcome matrix is drawn if none is given."""
    cli.main(["run", "iv", "--quick", "--output-dir", str(tmp_path)])
    (record,) = _records.read(tmp_path / "metrics.jsonl")
    variance = np.var(dsprites.test_set(dsprites.render_hearts(), dsprites.outcome_matrix()[0]).y)
    assert record["metrics"]["test_mse"] < 0.6 * variance
    assert record["metrics"]["outer_finite"] == record["metrics"]["inner_finite"] == 1.0


def compare(directory, *args):
    cli.main(["compare", "iv", *SMALL, "--no-references", "--output-dir", str(directory), *args])


def test_compare_goes_on_where_it_stopped(tmp_path, capsys):
    methods = ("--methods", "funcid-linear", "dfiv")
    compare(tmp_path, "--seeds", "1", "--no-costs", *methods)
    first = (tmp_path / "runs.jsonl").read_text()
    compare(tmp_path, "--seeds", "2", *methods)
    both = (tmp_path / "runs.jsonl").read_text()
    assert both.startswith(first)  # nothing was run again
    records = list(_records.read(tmp_path / "runs.jsonl"))
    assert [(r["method"], r["seed"]) for r in records] == [
        (method, seed) for seed in (0, 1) for method in ("funcid-linear", "dfiv")
    ]
    costs = {r["method"]: r["metrics"] for r in _records.read(tmp_path / "costs.jsonl")}
    assert costs.keys() == {"bare", "funcid-linear", "dfiv"}
    assert costs["bare"]["ratio"] == 1.0
    assert len((tmp_path / "table.md").read_text().splitlines()) == 4
    assert (tmp_path / "iv.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="other settings"):
        compare(tmp_path, "--num-outer-steps", "5", *methods)


def test_compare_selects_by_validation_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(iv_commands, "SELECTION_SEEDS", (1000, 1001))
    monkeypatch.setitem(iv.METHODS, "dfiv", iv.METHODS["dfiv"]._replace(trials=iv.METHODS["dfiv"].trials[:2]))
    compare(tmp_path, "--seeds", "1", "--select", "--selection-n", "60", "--methods", "dfiv", "--no-costs")
    records = list(_records.read(tmp_path / "selection.jsonl"))
    assert len(records) == 2 * len(iv.METHODS["dfiv"].trials)
    rates = [trial["outer_learning_rate"] for trial in iv.METHODS["dfiv"].trials]
    losses = [
        np.mean([r["metrics"]["validation_loss"] for r in records if r["settings"]["outer_learning_rate"] == rate])
        for rate in rates
    ]
    (run,) = _records.read(tmp_path / "runs.jsonl")
    assert run["settings"]["outer_learning_rate"] == rates[int(np.argmin(losses))]


def test_choose_counts_a_broken_run_as_infinite():
    trials = {json.dumps({"a": a}): {"a": a} for a in (1, 2)}

    def record(a, loss):
        return _records.record("iv", "dfiv", 0, {"a": a}, {"validation_loss": loss}, 1.0)

    records = [record(1, 1.0), record(1, float("nan")), record(2, 5.0), record(2, 6.0)]
    assert iv_commands.choose(records, "dfiv", trials) == {"a": 2}
    assert iv_commands.choose(records[:1] + records[2:], "dfiv", trials) == {"a": 1}


def test_summary_statistics():
    rng = np.random.default_rng(0)
    values = {"funcid-linear": rng.lognormal(0, 0.2, 20), "aid-cg": rng.lognormal(1, 0.2, 20)}
    values["dfiv"] = values["funcid-linear"] + 1e-3 * rng.normal(size=20)
    runs = [
        _records.record("iv", method, seed, {"n": 5000}, {"test_mse": x}, 1.0)
        for method, sample in values.items()
        for seed, x in enumerate(sample)
    ]
    costs = [_records.record("iv", "aid-cg", 0, {}, {"ratio": 2.0, "temp_bytes": 2**20}, 1.0)]
    rows = {row.method: row for row in iv_commands.summarise(runs, costs)}
    assert next(iter(rows)) == "funcid-linear"
    assert rows["funcid-linear"].p_value is None
    assert rows["aid-cg"].p_value < 1e-4
    assert rows["dfiv"].p_value > 0.05
    for method, row in rows.items():
        assert row.median == pytest.approx(np.median(values[method]))
        low, high = row.interval
        assert row.quartiles[0] < low < row.median < high < row.quartiles[1]
    assert (rows["aid-cg"].ratio, rows["dfiv"].ratio) == (2.0, None)
    assert "| aid-cg | 20 |" in iv_commands.markdown(list(rows.values()))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("run", "iv", "--n", "61"), "--n must be even"),
        (("run", "iv", "--method", "magic"), "--method must be one of funcid-linear"),
        (("run", "iv", "--num-outer-steps", "0"), "--num-outer-steps must be at least 1"),
        (("run", "iv", "--batch-size", "1"), "--batch-size must be at least 2"),
        (("run", "iv", "--images", "nowhere.npz"), "--images: there is no file"),
        (("compare", "iv", "--seeds", "0"), "--seeds must be at least 1"),
        (("compare", "iv", "--methods", "magic"), "--methods must be among"),
    ],
)
def test_bad_options(args, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(args)
