"""The benchmark scripts: they measure what they say, go on where they stopped, and report what was measured."""

import warnings
from pathlib import Path

import cost
import cost_models
import cost_report
import devices
import jax
import jax.numpy as jnp
import numpy as np
import peers
import peers_jax
import peers_problems as problems
import pytest
import simulated
import simulated_problem
from flax import linen
from jax.flatten_util import ravel_pytree

import funcbilevel as fb
from funcbilevel.tasks._experiment import store

TINY = cost.Cell(depth=1, width=8, batch=16, steps=2)


@pytest.fixture
def tiny(monkeypatch):
    """Sweeps of a network that compiles at once."""
    monkeypatch.setattr(cost, "BASE", {"mlp": TINY})
    monkeypatch.setattr(cost, "SWEEPS", {"steps": [{"steps": 2}, {"steps": 3}], "base": [{}]})


# Sweeps.


def test_a_sweep_varies_one_factor_and_no_cell_comes_twice():
    cells = cost.cells(["mlp"])
    assert len(set(cells)) == len(cells) == 1 + 5 + 3 + 2 + 2 + 2 + 2 + 1  # depth 8 is the option's too
    base = cost.BASE["mlp"]
    changed = [sum(a != b for a, b in zip(cell, base, strict=True)) for cell in cells]
    assert sorted(changed) == [0, *[1] * (len(cells) - 2), 2]  # the last corner of the targets has two


def test_memory_and_times_go_on_where_they_stopped(tiny, tmp_path):
    path = tmp_path / "new" / "sweeps.jsonl"
    args = ["--output", str(path), "--models", "mlp", "--what", "gradient", "--methods", "itd", "--repeats", "1"]

    def run(*more):
        cost.main([*args, *more])
        return list(store.read(path))

    memory = run("--sweeps", "steps", "--memory-only")
    assert [(r["method"], r["settings"]["steps"]) for r in memory] == [("itd", 2), ("itd", 3)]
    assert all(r["metrics"]["temp_bytes"] > 0 and "seconds" not in r["metrics"] for r in memory)
    timed = run("--sweeps", "base")
    assert len(timed) == 3
    assert timed[2]["settings"] == memory[0]["settings"]
    assert timed[2]["metrics"]["seconds"] > 0
    assert timed[2]["metrics"]["floor_seconds"] > 0
    assert timed[2]["metrics"]["temp_bytes"] == memory[0]["metrics"]["temp_bytes"]
    assert run("--sweeps", "base") == run("--sweeps", "steps", "--memory-only") == timed

    kept = cost_report.last_records(timed)
    assert [(r["settings"]["steps"], "seconds" in r["metrics"]) for r in kept] == [(2, True), (3, False)]


def test_forward_mode_is_timed_with_few_outer_parameters_only():
    assert cost.can_time(cost.Cell(), "itd-forward")
    assert not cost.can_time(cost.Cell(outputs=10), "itd-forward")
    assert cost.can_time(cost.Cell(outputs=10), "itd")
    assert not cost.can_time(cost.Cell(), "itd", timed=False)


@pytest.mark.parametrize("kind", ["cnn", "transformer"])
def test_the_other_models_and_their_features(kind):
    cell = cost.Cell(kind, depth=1, width=32, batch=4, steps=2, outputs=3, outer=20)
    for what, method in (("gradient", "funcid-linear"), ("step", "floor")):
        function, arguments = cost.call(cell, what, method)
        result = jax.eval_shape(function, *jax.eval_shape(arguments))
        assert (result.gradient if what == "gradient" else result[0]).shape == (20, 3)
    net = cost_models.network(kind, cell.depth, cell.width, cell.outputs)
    x = net.inputs(jax.random.key(0), 4)
    params, state = net.model.init(jax.random.key(1), x)
    phi, _ = net.features.apply(params, state, x)
    head = params["head"]
    np.testing.assert_allclose(
        phi @ head["kernel"] + head["bias"][None], net.model.apply(params, state, x)[0], rtol=1e-4
    )


@pytest.mark.parametrize("strides", [1, (1, 2), 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_a_convolution_by_patches_is_a_convolution(strides, padding):
    x = jax.random.normal(jax.random.key(0), (5, 8, 7, 2))
    real, patches = (
        linen.Conv(4, (2, 3), strides, padding=padding, conv_general_dilated=convolution)
        for convolution in (None, cost_models.patch_convolution)
    )
    params = real.init(jax.random.key(1), x)
    np.testing.assert_allclose(patches.apply(params, x), real.apply(params, x), atol=1e-5)


def test_more_outer_parameters_leave_the_network_alone():
    (few, _), (many, _) = (cost_models.batches(4, num_outer=n) for n in (10, 1000))
    np.testing.assert_array_equal(few[0], many[0])
    np.testing.assert_array_equal(few[1], many[1][:, :10])
    assert many[1].shape == (4, 1000)


def test_checks_that_fail_end_the_script(monkeypatch):
    checks = [cost.Check("a", 0.6, 0.6), cost.Check("b", 0.61, 0.6)]
    assert [c.met for c in checks] == [True, False]
    monkeypatch.setattr(cost, "quick", lambda _: checks[:1])
    cost.main(["--quick"])
    monkeypatch.setattr(cost, "quick", lambda _: checks)
    with pytest.raises(SystemExit, match="exceeds"):
        cost.main(["--quick"])


def test_large_cells_are_called_less_often():
    assert cost.repeats_of(cost.Cell(), 11) == cost.repeats_of(cost.Cell(depth=2), 11) == 11
    assert cost.repeats_of(cost.Cell(width=1024), 11) == 3


def test_seeds_record(tiny, monkeypatch):
    monkeypatch.setattr(cost, "SEEDS_CELL", TINY)
    linear, spread = cost.seeds_records(["funcid-linear", "aid-cg"], num_seeds=8, outer_steps=2, repeats=1)
    for metrics in (linear["metrics"], spread["metrics"]):
        assert metrics["speed_up"] == pytest.approx(metrics["sequential_seconds"] / metrics["vmap_seconds"])
    assert "spread_seconds" not in linear["metrics"]
    metrics = spread["metrics"]
    assert metrics["spread_speed_up"] == pytest.approx(metrics["sequential_seconds"] / metrics["spread_seconds"])
    assert metrics["devices"] == 8


def test_the_command_line_needs_an_output():
    with pytest.raises(SystemExit):
        cost.main(["--sweeps", "depth"])


# The report.


def synthetic(method, what, cell, seconds, temp_bytes):
    metrics = {"seconds": seconds, "floor_seconds": 0.5, "temp_bytes": temp_bytes, "compile_seconds": 1.0}
    return store.record("cost", method, 0, cost.settings_of(cell, what), metrics, seconds)


def synthetic_sweeps():
    """Times and memory by the cost table, exactly."""
    per_step = {"floor": 1e-2, "funcid-learned": 1e-2, "aid-cg": 3e-2, "itd": 2e-2}
    per_layer = {"floor": 1e6, "funcid-learned": 1e6, "aid-cg": 3e6, "itd": 20e6}
    for cell in dict.fromkeys([*cost.cells(["mlp"], ["steps", "depth"])]):
        for method, seconds in per_step.items():
            growth = cell.steps / 20 if method == "itd" else 1
            temp = per_layer[method] * cell.depth * growth
            yield synthetic(method, "gradient", cell, seconds * cell.steps * cell.depth, temp)
    yield synthetic("aid-cg", "gradient", cost.Cell(width=64), 100.0, 1.0)  # of another sweep


def test_slopes_are_exact_on_exact_data():
    x = np.array([1.0, 5.0, 10.0, 100.0])
    assert cost_report.power(x, 3 * x**1.5) == pytest.approx(1.5)
    assert cost_report.slope(x, 2 + 5 * x) == pytest.approx(5)
    assert cost_report.power(x[:1], x[:1]) is None
    records = list(synthetic_sweeps())
    steps = cost_report.curve(records, "aid-cg", "gradient", "steps", cost.Cell(), cost_report.seconds)
    np.testing.assert_array_equal(steps[0], [1, 5, 10, 20, 50, 100])
    assert cost_report.power(*steps) == pytest.approx(1)
    assert cost_report.slope(*steps) == pytest.approx(3e-2 * 4)
    depth = cost_report.curve(records, "itd", "gradient", "depth", cost.Cell(), cost_report.temp_bytes)
    assert cost_report.slope(*depth) == pytest.approx(20e6)


def test_claims_follow_the_figures():
    records = list(synthetic_sweeps())
    claims = cost_report.claims(records, cost.Cell())
    assert len(claims) == 6
    assert all(claim.holds for claim in claims)
    slow = [synthetic(r["method"], "gradient", cost_report.cell_of(r), 1.0, 1.0) for r in records]
    assert sum(bool(claim.holds) for claim in cost_report.claims(slow, cost.Cell())) < 6
    assert cost_report.claims(records[:1], cost.Cell()) == []


def test_options_are_set_beside_the_plain_network():
    plain = cost.BASE["mlp-bf16"]._replace(model="mlp")
    records = [synthetic("itd", "gradient", plain._replace(model=m), 0.25, 2.0**20) for m in ("mlp", "mlp-bf16")]
    records[1]["metrics"]["error"] = 0.0123
    _, table = cost_report.options_section(records).parts
    assert table.rows == [["itd", "250.0", "", "250.0", "1.0", "", "1.0", "1.2e-02"]]
    assert len(table.header) == len(table.rows[0])
    assert cost_report.options_section(records[:1]).parts == []


@pytest.mark.parametrize("kind", ["mlp-remat", "mlp-bf16"])
def test_options_leave_the_hypergradient_as_it_is(kind):
    error = cost.rounding_error(TINY._replace(model=kind), "funcid-linear")
    assert error < 1e-5 if kind == "mlp-remat" else 1e-6 < error < 0.05


def test_report_is_one_page_with_the_figures_in_it(tmp_path):
    path = tmp_path / "sweeps.jsonl"
    for record in synthetic_sweeps():
        store.append(path, [record])
    cost_report.main([str(path)])
    markdown, page = ((tmp_path / f"cost.{ending}").read_text(encoding="utf-8") for ending in ("md", "html"))
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    assert page.count("<svg") == 1
    assert not any(outside in page for outside in ("<img", "<script", "<link", "url(http", "@import"))
    for text in (markdown, page):
        assert "2400.0" in text  # AID, K = 20, depth 4, ms
        assert "agrees" in text
    assert "| aid-cg | 1.00 | 120 |" in markdown
    assert "0.333" in markdown  # bytes of FuncID over those of AID at depth 8
    assert "width 64" not in markdown.split("## All sweeps")[0]


def test_report_of_nothing_says_so(tmp_path):
    with pytest.raises(ValueError, match="no records"):
        cost_report.write([], tmp_path)


# The peers.

SMALL = {
    "small-ridge": lambda: problems.ridge(20),
    "small-logistic": lambda: problems.logistic(10, 100),
    "small-regression": lambda: problems.regression(2, width=8, n=32),
    "small-cleaning": lambda: problems.cleaning([]),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small problems; they are solved once for all tests."""
    monkeypatch.setattr(problems, "STATEMENTS", problems.STATEMENTS | SMALL)


def exact_hypergradient(name):
    """By the dense Hessian of the inner objective in float64."""
    case = problems.case(name, 1, np.float64)
    _, unravel = ravel_pytree(jax.tree.map(jnp.asarray, case.theta))
    flat, _ = ravel_pytree(case.theta)

    def inner(omega, vector):
        return case.inner(problems.JAX, omega, unravel(vector), case.inner_batch)

    def outer(omega, vector):
        return case.outer(problems.JAX, omega, unravel(vector), case.outer_batch)

    g_exp, rhs = jax.grad(outer, argnums=(0, 1))(jnp.asarray(case.omega), flat)
    u = jnp.linalg.solve(jax.hessian(inner, argnums=1)(jnp.asarray(case.omega), flat), rhs)
    return g_exp - jax.grad(lambda omega: jax.grad(inner, argnums=1)(omega, flat) @ u)(jnp.asarray(case.omega))


@pytest.mark.parametrize("name", ["small-ridge", "small-logistic", "small-regression"])
def test_our_hypergradients_are_those_of_the_dense_hessian(name):
    with jax.enable_x64(True):
        exact = np.asarray(exact_hypergradient(name)).reshape(-1)
    assert peers.relative_error(peers.reference(name, "aid-cg", 300), exact) < 1e-8
    for method in ("aid-neumann", "itd") if name == "small-ridge" else ():
        few, many = (peers.relative_error(peers.reference(name, method, steps), exact) for steps in (20, 1000))
        assert many < 1e-3 < few, method


def test_inner_solutions_are_stationary_and_the_step_size_is_the_curvature():
    for name in ("small-ridge", "small-logistic"):
        with jax.enable_x64(True):
            case = problems.case(name, 1, np.float64)
            (theta,) = case.theta
            objective = lambda w, case=case: case.inner(problems.JAX, case.omega, (w,), case.inner_batch)
            assert float(jnp.linalg.norm(jax.grad(objective)(theta))) < 1e-6
            largest = float(jnp.linalg.eigvalsh(jax.hessian(objective)(theta))[-1])
        assert case.step_size == pytest.approx(1 / largest, rel=1e-3)


def test_data_cleaning_is_half_corrupted():
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    statement = problems.cleaning([])
    clean = problems.cleaning([]).outer_batch[1]
    assert statement.omega.shape == (len(statement.inner_batch[0]),)
    np.testing.assert_array_equal(statement.inner_batch[1].sum(1), 1)
    np.testing.assert_array_equal(clean.sum(1), 1)


def wrong_peer(case):
    return lambda: 1.01 * jnp.asarray(peers_jax.OURS["aid-cg"](case)())


def raising_peer(case):
    raise RuntimeError("first line\nsecond line")


def test_a_peer_counts_if_it_is_right_and_raising_is_a_result(monkeypatch, tmp_path):
    fakes = {"jaxopt": peers_jax.OURS["aid-cg"], "optimistix": wrong_peer, "torchopt": raising_peer}
    monkeypatch.setattr(peers, "builders", lambda peer: {"aid-cg": fakes[peer]})
    monkeypatch.setattr(peers, "installed", lambda peer: "1.0")
    records = list(peers.measure("small-ridge", "aid-cg", tuple(fakes), steps=20, repeats=2))
    by_peer = {r["settings"]["peer"]: r for r in records}
    assert [by_peer[p]["metrics"]["agrees"] for p in (peers.OURS, *fakes)] == [1, 1, 0, 0]
    assert by_peer["optimistix"]["metrics"]["error"] == pytest.approx(0.01, rel=1e-3)
    assert by_peer["torchopt"]["settings"]["failure"] == "RuntimeError: first line"
    assert by_peer["jaxopt"]["metrics"]["ratio"] > 0
    assert peers.missing("small-ridge", "aid-cg", ("jaxopt", "torchopt", "boat-torch"), 20, "wall", records) == (
        "boat-torch",
    )


def peer_record(peer, problem, ratio, agrees=1.0, **more):
    metrics = {"seconds": ratio, "our_seconds": 1.0, "ratio": ratio, "error": 0.25, "our_error": 1e-7, "agrees": agrees}
    settings = peers.settings_of(problem, peer, 20, "wall") | more
    return store.record("peers", "aid-cg", 0, settings, {"agrees": 0.0} if more else metrics, ratio)


def test_report_of_the_peers():
    records = [peer_record(peers.OURS, p, 1.0) for p in ("ridge-100", "ridge-2000")]
    records += [peer_record("jaxopt", "ridge-100", 3.0), peer_record("jaxopt", "ridge-2000", 0.5)]
    records += [peer_record("optimistix", "ridge-100", 2.0), peer_record("optimistix", "ridge-2000", 0.1, agrees=0.0)]
    records += [peer_record("torchopt", "ridge-100", 0.0, failure="E: no")]
    text = peers.report(records)
    assert "| ridge-100 | 1e+03 | 3.00 | 2.00 | raises | 2.00 |" in text
    assert "| ridge-2000 | 1e+03 | 0.50 | error 2e-01 | - | 0.50 |" in text
    assert "median 1.25, least 0.50" in text
    assert "Slower than a peer on: ridge-2000 (0.50)." in text
    assert "torchopt, aid-cg, ridge-100: E: no" in text
    assert "relative error 2.5e-01" in text


@pytest.mark.parametrize("peer", peers.MODULES)
def test_peer_agrees(peer):
    """Or is known not to: two update their direction of conjugate gradients with the previous residual."""
    if peers.installed(peer) is None:
        pytest.skip(f"{peer} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tuple(peers.builders(peer)) == tuple(peers.OFFERS[peer])
        for method in peers.OFFERS[peer]:
            records = list(peers.measure("small-ridge", method, (peer,), steps=5, repeats=1))
            wrong = method == "aid-cg" and peer in ("betty-ml", "hypergrad")
            assert records[-1]["metrics"]["agrees"] == (not wrong), (method, records[-1])


def test_without_any_peer_nothing_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers, "installed", lambda peer: None)
    peers.main(["--output", str(tmp_path / "runs.jsonl")])
    assert "not installed, left out: jaxopt" in capsys.readouterr().err
    assert not (tmp_path / "runs.jsonl").exists()


# The quadratic problem of the field's benchmark.


def test_the_quadratic_problem_has_the_spectra_of_its_definition():
    data = simulated_problem.generate(20_000, 6, 4)
    for level in (simulated_problem.means(samples) for samples in data):
        np.testing.assert_allclose(np.linalg.eigvalsh(level.A), np.geomspace(0.1, 1, 6), rtol=0.1)
        np.testing.assert_allclose(np.linalg.eigvalsh(level.B), [0, *np.geomspace(0.1, 1, 3)], rtol=0.1, atol=1e-6)
        np.testing.assert_allclose(np.linalg.svd(level.C)[1], 0.1, atol=0.03)
    assert np.linalg.eigvalsh(simulated_problem.value_hessian(data))[0] > 0


def test_the_value_functions_gradient_is_that_of_the_library(x64):
    data = simulated_problem.generate(64, 5, 4)
    omega = jnp.asarray(np.random.default_rng(0).normal(size=4))
    G = simulated_problem.means(data.inner)
    theta = jnp.asarray(-np.linalg.solve(G.A, G.C.T @ np.asarray(omega) + G.l))
    exact = jax.jit(
        lambda: fb.hypergradient(simulated_problem.PROBLEM, None, fb.aid(fb.cg(20)), omega, theta, *data).gradient
    )()
    assert simulated_problem.gradient_squared(data, omega) == pytest.approx(float(exact @ exact), rel=1e-4)
    H = simulated_problem.value_hessian(data)
    step = 1e-3 * np.ones(4)
    less, more = (simulated_problem.gradient_squared(data, omega + sign * step) for sign in (-1, 1))
    assert more - less == pytest.approx(4 * float(exact @ H @ step), rel=1e-3)


def test_simulated_quick(capsys):
    simulated.main(["--quick", "--methods", "soba", "srba", "aid-cg(30)"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    drawn = {line[0]: line[5] for line in lines}
    # Two batches of 64 in each of 64 steps; the same and 4 passes over 2 x 192 samples; 11 + 1 batches.
    assert drawn == {"| `soba`": "8,192", "| `srba`": "9,728", "| `aid-cg(30)`": "49,152"}
    assert all(float(line[3]) < float(line[2]) for line in lines)


def test_what_ends_worse_than_it_began_is_said_and_fails(tmp_path):
    def made(method, last):
        settings = {"n": 10, "p": 2, "q": 2, "batch": 64, "steps": 4, "family": "estimator"}
        metrics = {"gradient_start": 1.0, "gradient_2": 0.5, "gradient_4": last, "samples_4": 8.0}
        return store.record(
            "simulated", method, 0, settings, metrics | {"seconds_per_step": 1e-5, "compile_seconds": 1}, 1
        )

    records = [made("soba", 0.1), made("saba", 3.0), made("srba", np.nan)]
    assert simulated.diverged(records) == ["saba", "srba"]
    assert [row.label for row in simulated.rows(records)] == ["soba", "saba", "srba"]
    store.append(tmp_path / "runs.jsonl", records)
    simulated.main(["--report", str(tmp_path)])
    assert "start: saba, srba" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "simulated.png").stat().st_size > 10_000


def test_growing_penalties_sum_their_increments():
    at = simulated.growing(1.0, 0.5, 2.0)
    assert [float(at(t)) for t in range(3)] == pytest.approx([1.0, 1.5, 1.5 + 0.5 / 4])


def test_what_is_sent_is_counted_with_loops_and_branches():
    text = """
    HloModule m
%body.1 (p: f32[4]) -> f32[4] {
  %r = f32[4]{0} all-reduce(%p), to_apply=%sum
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %g = (f32[2,3]{1,0}, bf16[5]{0}) all-gather(%p, %q), dimensions={0}
  %w = f32[4]{0} while(%p), condition=%cond, body=%body.1, backend_config={"known_trip_count":{"n":"7"}}
  %v = f32[4]{0} while(%p), condition=%cond, body=%body.1
}
"""
    assert list(devices.sent(text)) == [
        ("all-gather", 34, 1), ("all-reduce", 16, 7), ("all-reduce", 16, devices.ADJOINT_STEPS),
    ]  # fmt: skip


def test_the_table_of_devices_is_that_of_its_records():
    directory = Path(devices.__file__).parent / "results" / "devices"
    made = list(store.read(directory / "runs.jsonl"))
    assert devices.table_of(made) == (directory / "table.md").read_text()
    learned = next(r["metrics"] for r in made if r["method"] == "funcid-learned")
    assert round(learned["moved"] / 4 / learned["parameters"]) == 2 * (devices.INNER_STEPS + 2 * devices.ADJOINT_STEPS)
