"""Selecting features by gates: counts and derivatives by hand, proximal maps, no leak, data, choice, and commands."""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from sklearn.datasets import load_breast_cancer

import funcbilevel as fb
from funcbilevel import cli
from funcbilevel.tasks._experiment import grid, store
from funcbilevel.tasks._experiment.blocks import Block
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.store import Result, Store
from funcbilevel.tasks.data import adult as adult_data
from funcbilevel.tasks.data.dataset import split
from funcbilevel.tasks.gates import methods, report, train
from funcbilevel.tasks.gates import problem as gates
from funcbilevel.tasks.gates.methods import Hyper, Setting
from funcbilevel.tasks.gates.problem import Batch, Rows, Table

SMALL = Setting(width=4, batch_size=20, num_steps=60, inner_steps=2, solver_steps=3)
FEATURE_OF = (0, 1, 1, 2)


def batch(n=30, seed=0):
    rng = np.random.default_rng(seed)
    x, noise = rng.normal(size=(n, 4)), rng.normal(size=3)
    return Batch(*map(jnp.asarray, (x, (x[:, 0] > 0).astype(float), noise)))


def network(width=4, seed=0):
    return jax.tree.map(lambda w: jnp.asarray(w, float), gates.initial_network(4, width, seed))


# Gates.


def test_expected_count_is_that_of_open_gates(x64):
    mu = jnp.array([-1.0, -0.2, 0.0, 0.5, 2.0])
    noise = np.random.default_rng(0).normal(size=(200_000, 5))
    open_share = np.mean(np.asarray(gates.gates(mu[None], noise)) > 0, axis=0)
    assert float(gates.expected_open(mu)) == pytest.approx(stats.norm.cdf(np.asarray(mu) / 0.5).sum(), rel=1e-12)
    assert float(gates.expected_open(mu)) == pytest.approx(open_share.sum(), abs=0.01)


def test_derivative_of_the_count(x64):
    mu = jnp.array([-0.7, 0.0, 0.3])
    gradient = jax.grad(gates.expected_open)(mu)
    np.testing.assert_allclose(gradient, stats.norm.pdf(mu / 0.5) / 0.5, rtol=1e-10)
    for i, direction in enumerate(np.eye(3)):
        step = 1e-5 * direction
        difference = (gates.expected_open(mu + step) - gates.expected_open(mu - step)) / 2e-5
        assert float(gradient[i]) == pytest.approx(float(difference), rel=1e-7)


def test_gates_without_noise_are_clipped_means():
    np.testing.assert_allclose(gates.gates(jnp.array([-0.3, 0.4, 1.7])), [0.0, 0.4, 1.0])


def test_objectives_by_hand(x64):
    problem, omega, mu, rows = gates.problem(0.3, FEATURE_OF, 0.1), network(), jnp.array([0.2, 0.9, -0.4]), batch()
    w = {name: np.asarray(weights) for name, weights in omega.items()}
    z = np.clip(np.asarray(mu) + 0.5 * np.asarray(rows.noise), 0, 1)[[0, 1, 1, 2]]
    hidden = np.maximum((np.asarray(rows.x) * z) @ w["w1"] + w["b1"], 0)
    p = 1 / (1 + np.exp(-(hidden @ w["w2"] + w["b2"])))
    y = np.asarray(rows.y)
    loss = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    weights = sum(float(np.sum(weights**2)) for weights in w.values())
    assert float(problem.outer_objective(omega, mu, rows)) == pytest.approx(loss + 0.05 * weights, rel=1e-10)
    count = stats.norm.cdf(np.asarray(mu) / 0.5).sum()
    assert float(problem.inner_objective(omega, mu, rows)) == pytest.approx(loss + 0.3 * count, rel=1e-10)


def test_no_leak_between_the_levels(x64):
    """The count never reaches the leader's explicit part, and the leader's weight decay never the follower."""
    omega, mu, inner, outer = network(), jnp.array([0.2, 0.6, 0.4]), batch(), batch(seed=1)

    @jax.jit
    def leaders(penalty):
        problem = gates.problem(penalty, FEATURE_OF)
        return fb.hypergradient(problem, None, fb.alternating(), omega, mu, inner, outer).gradient

    @jax.jit
    def followers(decay):
        return jax.grad(gates.problem(0.1, FEATURE_OF, decay).inner_objective, 1)(omega, mu, inner)

    jax.tree.map(np.testing.assert_array_equal, leaders(0.0), leaders(10.0))
    np.testing.assert_array_equal(followers(0.0), followers(9.0))

    @jax.jit
    def step():
        problem, sgd = gates.problem(0.1, FEATURE_OF), optax.sgd(0.1)
        solver = fb.bilevel(problem, None, fb.alternating(), inner_optimizer=sgd, outer_optimizer=sgd)
        state, _ = solver.step(solver.init(jax.random.key(0), omega, None, mu), inner, outer)
        moved = mu - 0.1 * jax.grad(problem.inner_objective, 1)(omega, mu, inner)
        gradient = jax.grad(problem.outer_objective)(omega, moved, outer)
        return (state.outer_params, state.inner_params), (
            jax.tree.map(lambda w, g: w - 0.1 * g, omega, gradient),
            moved,
        )

    # Each player moves its own parameters only, by its own gradient; the leader sees the follower's step.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), *step())


def test_implicit_part_is_that_of_the_dense_hessian(x64):
    problem, omega, mu, rows = gates.problem(0.1, FEATURE_OF), network(), jnp.array([0.4, 0.6, 0.3]), batch(200)
    rows = rows._replace(noise=jnp.array([0.1, -0.2, 0.3]))  # no gate is clipped

    @jax.jit
    def both():
        got = fb.hypergradient(problem, None, fb.aid(fb.cg(20, damping=5.0)), omega, mu, rows, rows).implicit
        inner = jax.grad(problem.inner_objective, 1)
        hessian = jax.jacobian(inner, 1)(omega, mu, rows) + 5.0 * jnp.eye(3)
        u = jnp.linalg.solve(hessian, jax.grad(problem.outer_objective, 1)(omega, mu, rows))
        return got, jax.grad(lambda omega: -jnp.vdot(inner(omega, mu, rows), u))(omega)

    got, expected = both()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-10), got, expected)
    assert max(float(jnp.max(jnp.abs(g))) for g in got.values()) > 1e-5


# Controls.


def test_proximal_maps_minimise_what_they_should(x64):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(4, 2)))

    def lasso(v):
        return 0.5 * jnp.sum((v - w) ** 2) + 0.6 * jnp.sum(jnp.abs(v))

    def group(v):
        rows = [v[:1], v[1:3], v[3:]]
        return 0.5 * jnp.sum((v - w) ** 2) + 1.0 * sum(jnp.sqrt(jnp.sum(r**2)) for r in rows)

    for objective, proximal in ((lasso, methods.soften(w, 0.6)), (group, methods.soften_groups(w, 1.0, FEATURE_OF))):
        assert np.any(proximal == 0)
        assert np.any(proximal != 0)
        for _ in range(200):
            assert objective(proximal) <= objective(proximal + 0.05 * rng.normal(size=w.shape))
    np.testing.assert_array_equal(methods.soften_groups(jnp.zeros((4, 2)), 1.0, FEATURE_OF), 0)


def test_random_sets_have_the_sizes_of_the_method_that_they_follow(tmp_path):
    """Fold by fold, whatever else is drawn; where a record holds no sizes of the folds, the mean of them."""
    where, trials = Store(tmp_path, "gates"), methods.trials("breast-cancer", "itd")

    def sizes(run):
        return [3 + run.seed, 5, trials.index(run.how)]

    followed = train.runs("breast-cancer", ["itd"], SMALL, [0, 1])
    metrics = [{"num_features": np.mean(sizes(run))} for run in followed]
    beside = [{"features": {"features": {}, "sizes": sizes(run)}} for run in followed]
    store.add(where, list(zip(followed, map(Result, metrics, beside), strict=True)))
    folds = {seed: [toy()._replace(features=tuple("abcdefghijklmnopqrst"))] * 3 for seed in (0, 1)}
    (unit,) = grid.units(train.random_runs("breast-cancer", "itd", SMALL, [0, 1]))
    masks = train.random_masks(where, unit, folds)
    assert masks.shape == (6, 12, 20)
    counts = masks.sum(axis=-1).reshape(2, 3, 12).transpose(0, 2, 1).reshape(24, 3)
    assert counts.tolist() == [sizes(run) for run in unit.runs]
    fives = masks.reshape(2, 3, 12, 20)[:, 1].reshape(24, 20)
    assert len(np.unique(fives, axis=0)) > 20
    alone = train.random_masks(where, grid.Unit(unit.cells[4:6], (1,)), {1: folds[1]})
    np.testing.assert_array_equal(alone, masks[3:, 4:6])
    where.beside("features").unlink()
    means = train.random_masks(where, grid.Unit(unit.cells[4:6], (1,)), {1: folds[1]}).sum(axis=-1)
    np.testing.assert_array_equal(means, [[round(13 / 3), round(14 / 3)]] * 3)


# Selection.


def toy(n=400, seed=0):
    """Features 0 (one column) and 1 (two columns) decide, feature 2 is noise."""
    x = np.random.default_rng(seed).normal(size=(3 * n, 4)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] - x[:, 2] > 0).astype(np.float32)
    parts = [Rows(x[i * n : (i + 1) * n], y[i * n : (i + 1) * n]) for i in range(3)]
    return Table("toy", ("a", "b", "noise"), FEATURE_OF, *parts)


@pytest.mark.parametrize("method", ["alternating", "group-lasso"])
def test_selects_what_matters(method):
    setting = replace(SMALL, num_steps=300, inner_steps=1)
    weak, strong = (0.02, 5.0) if method != "group-lasso" else (0.25, 50.0)
    rate = 0.1 if method == "group-lasso" else 0.02
    hypers = [Hyper(penalty, rate, 0.02) for penalty in (0.0, weak, strong)]
    masks = train.sweep(method, setting, [toy()], hypers, [0])
    assert masks.shape == (1, 3, 3)
    assert masks[0, 0, :2].all()
    assert masks[0, 1].tolist() == [True, True, False]
    assert not masks[0, 2].any()


def test_refit_sees_the_selected_features_only():
    masks = np.array([[[True, True, True], [True, True, False], [False, False, True]]])
    setting, tables = replace(SMALL, num_steps=200), [toy()]
    validation, test = train.measure(setting, tables, masks, [0])
    assert test[0, :2].min() > 0.9
    assert abs(test[0, 2] - 0.5) < 0.1
    hyper = Hyper(*(np.full((1, 3), v, np.float32) for v in (0.0, 0.01, 0.0)), mask=masks.astype(np.float32))
    networks = train.sweep("single-objective", setting, tables, hyper, [0])
    np.testing.assert_array_equal(networks["w1"][0, 1, 3], 0)
    np.testing.assert_array_equal(networks["w1"][0, 2, :3], 0)
    one = jax.tree.map(lambda w: w[0, 1], networks)
    assert float(gates.accuracy(one, tables[0].validation)) == pytest.approx(validation[0, 1])


def test_unknown_method():
    with pytest.raises(ValueError, match=r"method must be one of single-objective, aid-cg,.*got 'ridge'"):
        train.program("ridge", SMALL, FEATURE_OF)


def test_choice_by_hand():
    full = np.array([0.95, 0.95, 0.95])
    validation = np.array([[0.95, 0.946, 0.946, 0.93], [0.9, 0.9, 0.9, 0.9], [0.95, 0.95, 0.951, 0.8]])
    counts = np.array([[9, 5, 4, 1], [9, 5, 4, 1], [9, 4, 4, 1]])
    assert report.needed(validation, counts, full, 0.005).tolist() == [2, -1, 2]
    assert report.needed(validation, counts, full, 0.02).tolist() == [3, -1, 2]


def block(method, counts, validation, test, seeds=(0, 1)):
    names = ("num_features", "validation_accuracy", "accuracy")
    metrics = dict(zip(names, map(np.array, (counts, validation, test)), strict=True))
    return Block(method, [{"penalty": c} for c in range(len(counts[0]))], list(seeds), metrics)


def hand_made():
    return [
        block("single-objective", [[4], [4]], [[0.9], [0.9]], [[0.92], [0.9]]),
        block("aid-cg", [[1, 2], [1, 2]], [[0.88, 0.899], [0.897, 0.9]], [[0.8, 0.91], [0.85, 0.9]]),
        block("lasso", [[1, 3], [1, 2]], [[0.8, 0.899], [0.8, 0.8]], [[0.8, 0.92], [0.8, 0.8]]),
    ]


def test_rows_of_the_table_by_hand():
    everything, aid, lasso = report.summarise(hand_made(), 0.005)
    assert everything.features == (4.0, 4.0, 4.0)
    assert aid.cells.tolist() == [1, 0]
    assert lasso.cells.tolist() == [1, -1]  # on the second seed none is good enough: all four
    assert aid.features[0] == 1.5
    assert lasso.features[0] == 3.5
    assert aid.fewer[0] == pytest.approx(1 - 1.5 / 3.5)
    assert aid.accuracy[0] == pytest.approx((0.91 + 0.85) / 2)
    assert lasso.lost[0] == pytest.approx(0.0)
    assert aid.lost[0] == pytest.approx(100 * (0.01 + 0.05) / 2)
    assert lasso.fewer is None


def test_methods_of_other_seeds_are_compared_on_those_that_they_share():
    everything, aid, lasso = hand_made()
    of_one = [report.on_seeds(lasso, [0]), block("ghost", [[2], [2]], [[0.9], [0.8]], [[0.9], [0.9]], (1, 7))]
    rows = report.summarise([everything, aid, of_one[0], report.on_seeds(of_one[1], [1])], 0.005)
    assert rows[1].fewer[0] == pytest.approx(1 - 2 / 3)
    assert rows[3].method == "ghost"
    assert rows[3].fewer is None
    assert rows[3].features[0] == 2


def record(method, seed, accuracy, **more):
    settings = {"dataset": "toy", "leader_rate": 0.01} | more
    metrics = {"num_features": 3.0, "accuracy": accuracy, "validation_accuracy": accuracy}
    return store.record("gates", method, seed, settings, metrics, 1.0)


def test_report_shows_unknown_methods_and_names_what_random_sets_follow(tmp_path):
    """And of records without their features it draws what there is."""
    of_methods = [("single-objective", {}), ("ghost", {"penalty": 1}), ("random-mask", {"sizes_of": "lasso"})]
    store.append(tmp_path / "runs.jsonl", [record(name, s, 0.9, **more) for name, more in of_methods for s in (1, 0)])
    made = report.report(tmp_path)
    lines = [line.split(" | ") for line in made.texts["table.md"].splitlines()[2:]]
    assert [line[1] for line in lines] == 2 * ["single-objective", "ghost", "random-mask lasso"]
    made.figures["gates.png"](tmp_path / "gates.png")
    assert (tmp_path / "gates.png").stat().st_size > 10_000


def test_report_needs_all_features_to_compare_with(tmp_path):
    store.append(tmp_path / "runs.jsonl", [record("lasso", 0, 0.9)])
    with pytest.raises(UserError, match="holds no runs of single-objective yet; run the same command again"):
        report.report(tmp_path)


def test_shares_of_the_chosen_settings():
    of_methods = hand_made()
    rows = report.summarise(of_methods, 0.005)

    def line(method, seed, penalty, features):
        of = {"method": method, "seed": seed, "settings": {"penalty": penalty}, "features": features}
        return store.key_of(of, "gates"), of

    lines = dict(
        [
            line("aid-cg", 0, 0, {"d": 1.0}),
            line("aid-cg", 0, 1, {"b": 1.0, "a": 1.0}),
            line("aid-cg", 1, 0, {"a": 0.5}),
            line("lasso", 0, 1, {"c": 1.0}),
            *(line("single-objective", s, 0, dict.fromkeys("abcd", 1.0)) for s in (0, 1)),
        ]
    )
    shares = report.selected(lines, of_methods, rows)
    assert shares.features == ["a", "b", "c", "d"]
    assert {name: share.tolist() for name, share in shares.methods.items()} == {
        "aid-cg": [0.75, 0.5, 0, 0],
        "lasso": [0.5, 0.5, 1, 0.5],  # on the second seed it needs all
    }
    assert report.selected({}, of_methods, rows) is None


# Data.


def test_breast_cancer_parts():
    tables = [gates.breast_cancer(0, fold) for fold in range(gates.FOLDS)]
    data = load_breast_cancer()
    assert [len(part.y) for part in tables[0][3:]] == list(gates.SIZES["breast-cancer"])
    assert len(tables[0].features) == 30
    for a, b in itertools.combinations(tables, 2):
        np.testing.assert_array_equal(a.test.y, b.test.y)
    back = [t.validation.x for t in tables]
    assert len({x.tobytes() for x in back}) == gates.FOLDS
    # The three validation parts and the test part are all rows, each once.
    rows = np.concatenate(split(569, (0.25, 0.25, 0.25), 0))
    assert sorted(rows) == list(range(569))
    labels = np.concatenate([*(t.validation.y for t in tables), tables[0].test.y])
    np.testing.assert_array_equal(labels, data.target[rows])
    train = tables[0].train.x
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train.std(axis=0), 1, rtol=1e-4)
    assert not np.array_equal(gates.breast_cancer(1).test.y, tables[0].test.y)


def test_features_have_unit_variance_over_their_columns():
    x = np.random.default_rng(0).normal(size=(50, 4)) * np.array([3.0, 1.0, 5.0, 0.0])
    train = gates.standardised(x, x, FEATURE_OF)
    np.testing.assert_allclose(train.var(axis=0)[[0]], 1, rtol=1e-5)
    assert train.var(axis=0)[1:3].sum() == pytest.approx(1, rel=1e-5)
    assert train.var(axis=0)[1] / train.var(axis=0)[2] == pytest.approx(x.var(axis=0)[1] / x.var(axis=0)[2], rel=1e-4)
    np.testing.assert_array_equal(train[:, 3], 0)


@pytest.mark.skipif(adult_data.VARIABLE not in os.environ, reason="FUNCBILEVEL_ADULT_DIR is not set")
def test_columns_of_adult():
    table = gates.adult(seed=3)
    frame = adult_data.read(Path(os.environ[adult_data.VARIABLE]) / "adult.data")
    assert table.features == (*adult_data.NUMBERS, *adult_data.CATEGORIES)
    widths = np.bincount(table.feature_of)
    levels = [frame[name].nunique() - (name == "sex") for name in adult_data.CATEGORIES]
    assert widths.tolist() == [1] * 5 + levels
    assert widths.sum() == table.train.x.shape[1] == 102
    # The parts of a categorical column are one-hot: two values each, and exactly one of them is the higher.
    columns = np.flatnonzero(np.array(table.feature_of) == table.features.index("relationship"))
    part = table.train.x[:, columns]
    high = part > (part.max(axis=0) + part.min(axis=0)) / 2
    assert (high.sum(axis=1) == 1).all()
    shares = frame["relationship"].value_counts(normalize=True).sort_index().to_numpy()
    np.testing.assert_allclose(high.mean(axis=0), shares, atol=0.01)
    assert [len(rows.y) for rows in table[3:]] == list(gates.SIZES["adult"])


# Commands.

FEW = ["--seeds", "2", "--num-steps", "5", "--width", "3"]


def test_run(tmp_path, capsys):
    directory = tmp_path / "run"
    cli.main(["run", "gates", "--output-dir", str(directory), *FEW, "--methods", "lasso"])
    output = capsys.readouterr()
    table = output.out.split(str(directory))[1]
    assert max(map(len, table.splitlines())) <= 80
    for word in ("at most 0.5 point", "lasso", "random-mask lasso", "30 features", "284 rows to train"):
        assert word in table
    assert "lasso             5 outer steps, outer objective 0." in output.err
    assert output.err.count("refit lasso       300 outer steps") == 1
    names = ["config.json", "gates.png", "runs-features.jsonl", "runs.jsonl", "table.md"]
    assert sorted(path.name for path in directory.glob("[!.]*")) == names
    records = store.read(directory / "runs.jsonl")
    assert len(records) == 2 * (1 + 2 * 12)  # equal budgets of twelve settings
    lines = store.beside(Store(directory, "gates"), "features")
    assert len(lines) == len(records)
    by_run = {}
    for record in records:
        line, settings = lines[store.key_of(record)], record["settings"]
        assert record["metrics"]["num_features"] == pytest.approx(sum(line["features"].values()), abs=0.02)
        assert record["metrics"]["num_features"] == pytest.approx(np.mean(line["sizes"]))
        by_run[record["method"], record["seed"], settings.get("penalty"), settings["leader_rate"]] = line["sizes"]
    assert records[0]["metrics"]["num_features"] == 30
    for (method, *run), sizes in by_run.items():
        assert method != "random-mask" or sizes == by_run["lasso", *run]
    assert len((directory / "table.md").read_text().splitlines()) == 2 + 2 * 3
    assert (directory / "gates.png").stat().st_size > 20_000


def contents(directory):
    """Key -> metrics and features of every run, each once."""
    where = Store(directory, "gates")
    files = [
        [json.loads(line) for line in path.read_text().splitlines()] for path in (where.path, where.beside("features"))
    ]
    by_key = [{store.key_of(line): line for line in of_file} for of_file in files]
    assert [len(of) for of in by_key] == [len(of) for of in files]
    assert by_key[0].keys() == by_key[1].keys()
    return {key: (line["metrics"], by_key[1][key]["features"]) for key, line in by_key[0].items()}


@pytest.mark.slow
def test_killed_three_times_and_started_again(tmp_path, monkeypatch):
    """A real task from end to end: the records are those of a run that nobody interrupted."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    args = ["run", "gates", *FEW, "--methods", "group-lasso", "lasso", "--output-dir"]
    cli.main([*args, str(tmp_path / "whole")])
    expected = contents(tmp_path / "whole")
    assert len(expected) == 2 * (1 + 3 * 12)
    path, moments = tmp_path / "killed/runs.jsonl", random.Random(0)

    def process():
        command = [sys.executable, "-c", "from funcbilevel.cli import main; main()", *args, str(tmp_path / "killed")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    killed = 0
    for num_records in (0, 1, 20):
        run = process()
        while run.poll() is None and (path.read_bytes().count(b"\n") if path.exists() else 0) < num_records:
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.3))
        run.kill()
        run.communicate()
        killed += run.returncode != 0
    assert killed >= 2
    assert 0 < path.read_bytes().count(b"\n") < len(expected)
    run = process()
    output, errors = run.communicate()
    assert run.returncode == 0, errors
    assert "runs are recorded already" in output
    assert contents(tmp_path / "killed") == expected
    assert (tmp_path / "killed/table.md").read_text() == (tmp_path / "whole/table.md").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "ridge"], "--methods must be among aid-cg, alternating, itd, group-lasso, lasso, got ridge"),
        (["--methods", "random-mask"], "--methods must be among aid-cg, .*, got random-mask"),
        (["--num-steps", "0"], "--num-steps must be at least 1, got 0"),
        (["--width", "-1"], "--width must be at least 1, got -1"),
        (["--data", "/nowhere"], "--data: there is no /nowhere"),
    ],
)
def test_bad_options(tmp_path, args, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["run", "gates", *args, "--output-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_without_the_files_of_adult(tmp_path):
    with pytest.raises(SystemExit, match=r"adult\.data") as stopped:
        cli.main(["run", "gates", "--dataset", "adult", "--data", str(tmp_path), "--output-dir", str(tmp_path / "run")])
    assert stopped.value.code == 2
