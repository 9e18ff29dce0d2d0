"""Selecting features by gates: counts and derivatives by hand, proximal maps, no leak, data, choice, and commands."""

import itertools
import json
import os
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
from funcbilevel.tasks import _records, fairness_data, gates, gates_commands
from funcbilevel.tasks.gates import Batch, Hyper, Rows, Setting, Table

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

    for objective, proximal in ((lasso, gates.soften(w, 0.6)), (group, gates.soften_groups(w, 1.0, FEATURE_OF))):
        assert np.any(proximal == 0)
        assert np.any(proximal != 0)
        for _ in range(200):
            assert objective(proximal) <= objective(proximal + 0.05 * rng.normal(size=w.shape))
    np.testing.assert_array_equal(gates.soften_groups(jnp.zeros((4, 2)), 1.0, FEATURE_OF), 0)


def test_random_masks_have_the_same_sizes():
    masks = np.random.default_rng(7).uniform(size=(3, 5, 12)) < 0.4
    drawn = gates.random_masks(masks)
    np.testing.assert_array_equal(drawn.sum(axis=-1), masks.sum(axis=-1))
    assert not np.array_equal(drawn, masks)


# Selection.


def toy(n=400, seed=0):
    """Features 0 (one column) and 1 (two columns) decide, feature 2 is noise."""
    x = np.random.default_rng(seed).normal(size=(3 * n, 4)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] - x[:, 2] > 0).astype(np.float32)
    parts = [Rows(x[i * n : (i + 1) * n], y[i * n : (i + 1) * n]) for i in range(3)]
    return Table("toy", ("a", "b", "noise"), FEATURE_OF, *parts)


@pytest.mark.parametrize("method", ["alternating", "group-lasso"])
def test_selects_what_matters(method):
    setting = SMALL._replace(num_steps=300, inner_steps=1)
    weak, strong = (0.02, 5.0) if method != "group-lasso" else (0.25, 50.0)
    rate = 0.1 if method == "group-lasso" else 0.02
    hypers = [Hyper(penalty, rate, 0.02) for penalty in (0.0, weak, strong)]
    masks = gates.train(method, setting, [toy()], hypers, [0])
    assert masks.shape == (1, 3, 3)
    assert masks[0, 0, :2].all()
    assert masks[0, 1].tolist() == [True, True, False]
    assert not masks[0, 2].any()


def test_refit_sees_the_selected_features_only():
    masks = np.array([[[True, True, True], [True, True, False], [False, False, True]]])
    setting, tables = SMALL._replace(num_steps=200), [toy()]
    validation, test = gates.measure(setting, tables, masks, [0])
    assert test[0, :2].min() > 0.9
    assert abs(test[0, 2] - 0.5) < 0.1
    hyper = Hyper(*(np.full((1, 3), v, np.float32) for v in (0.0, 0.01, 0.0)), mask=masks.astype(np.float32))
    networks = gates.train("refit", setting, tables, hyper, [0])
    np.testing.assert_array_equal(networks["w1"][0, 1, 3], 0)
    np.testing.assert_array_equal(networks["w1"][0, 2, :3], 0)
    one = jax.tree.map(lambda w: w[0, 1], networks)
    assert float(gates.accuracy(one, tables[0].validation)) == pytest.approx(validation[0, 1])


def test_unknown_method():
    with pytest.raises(ValueError, match=r"method must be one of alternating,.*got 'ridge'"):
        gates.program("ridge", SMALL, FEATURE_OF)


def test_choice_by_hand():
    full = np.array([0.95, 0.95, 0.95])
    validation = np.array([[0.95, 0.946, 0.946, 0.93], [0.9, 0.9, 0.9, 0.9], [0.95, 0.95, 0.951, 0.8]])
    counts = np.array([[9, 5, 4, 1], [9, 5, 4, 1], [9, 4, 4, 1]])
    assert gates.needed(validation, counts, full, 0.005).tolist() == [2, -1, 2]
    assert gates.needed(validation, counts, full, 0.02).tolist() == [3, -1, 2]


def test_rows_of_the_table_by_hand():
    def selection(method, counts, validation, test):
        features = np.array(counts)[..., None] * np.array([0.5, 0.5, 0, 0])
        return gates_commands.Selection(
            method, [Hyper()] * len(counts[0]), features, *map(np.array, (validation, test)), 0
        )

    selections = [
        selection("single-objective", [[4], [4]], [[0.9], [0.9]], [[0.92], [0.9]]),
        selection("aid-cg", [[1, 2], [1, 2]], [[0.88, 0.899], [0.897, 0.9]], [[0.8, 0.91], [0.85, 0.9]]),
        selection("lasso", [[1, 3], [1, 2]], [[0.8, 0.899], [0.8, 0.8]], [[0.8, 0.92], [0.8, 0.8]]),
    ]
    everything, aid, lasso = gates_commands.summarise(selections, 0.005)
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


# Data.


def test_breast_cancer_parts():
    tables = [gates.breast_cancer(0, fold) for fold in range(gates.FOLDS)]
    data = load_breast_cancer()
    assert [len(part.y) for part in tables[0][3:]] == [284, 142, 143]
    assert len(tables[0].features) == 30
    for a, b in itertools.combinations(tables, 2):
        np.testing.assert_array_equal(a.test.y, b.test.y)
    back = [t.validation.x for t in tables]
    assert len({x.tobytes() for x in back}) == gates.FOLDS
    # The three validation parts and the test part are all rows, each once.
    rows = np.concatenate(fairness_data.split(569, (0.25, 0.25, 0.25), 0))
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


@pytest.mark.skipif(fairness_data.ADULT_VARIABLE not in os.environ, reason="FUNCBILEVEL_ADULT_DIR is not set")
def test_columns_of_adult():
    table = gates.adult(seed=3)
    frame = fairness_data.read_adult(Path(os.environ[fairness_data.ADULT_VARIABLE]) / "adult.data")
    assert table.features == (*fairness_data.ADULT_NUMBERS, *fairness_data.ADULT_CATEGORIES)
    widths = np.bincount(table.feature_of)
    levels = [frame[name].nunique() - (name == "sex") for name in fairness_data.ADULT_CATEGORIES]
    assert widths.tolist() == [1] * 5 + levels
    assert widths.sum() == table.train.x.shape[1] == 102
    # The parts of a categorical column are one-hot: two values each, and exactly one of them is the higher.
    columns = np.flatnonzero(np.array(table.feature_of) == table.features.index("relationship"))
    part = table.train.x[:, columns]
    high = part > (part.max(axis=0) + part.min(axis=0)) / 2
    assert (high.sum(axis=1) == 1).all()
    shares = frame["relationship"].value_counts(normalize=True).sort_index().to_numpy()
    np.testing.assert_allclose(high.mean(axis=0), shares, atol=0.01)
    assert [len(rows.y) for rows in table[3:]] == [24130, 6032, 15060]


# Commands.


def test_run(tmp_path, capsys):
    directory = tmp_path / "run"
    few = ["--seeds", "2", "--num-steps", "40", "--width", "4", "--methods", "lasso"]
    cli.main(["run", "gates", "--output-dir", str(directory), *few])
    output = capsys.readouterr()
    table = output.out.split(str(directory))[1]
    assert max(map(len, table.splitlines())) <= 80
    for word in ("at most 0.5 point", "lasso", "random-mask", "30 features", "284 rows to train"):
        assert word in table
    assert "lasso             40 outer steps, outer objective 0." in output.err
    names = ["config.json", "gates.png", "runs-features.jsonl", "runs.jsonl", "table.md"]
    assert sorted(path.name for path in directory.iterdir()) == names
    records = list(_records.read(directory / "runs.jsonl"))
    assert len(records) == 2 * (1 + 2 * 12)  # equal budgets of twelve settings
    lines = [json.loads(line) for line in (directory / "runs-features.jsonl").read_text().splitlines()]
    assert len(lines) == len(records)
    for record, line in zip(records, lines, strict=True):
        assert record["task"] == "gates"
        assert _records.identity(record) == _records.identity(line)
        assert record["metrics"]["num_features"] == pytest.approx(sum(line["features"].values()), abs=0.02)
    assert records[0]["metrics"]["num_features"] == 30
    lines = (directory / "table.md").read_text().splitlines()
    assert len(lines) == 2 + 2 * 3
    assert (directory / "gates.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "ridge"], "--methods must be among aid-cg, alternating, itd, group-lasso, lasso, got ridge"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--num-steps", "0"], "--num-steps must be at least 1, got 0"),
        (["--width", "-1"], "--width must be at least 1, got -1"),
        (["--data", "/nowhere"], "--data: there is no /nowhere"),
    ],
)
def test_bad_options(tmp_path, args, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["run", "gates", *args, "--output-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
