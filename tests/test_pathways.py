"""Attributions inside known pathways: the generator's truth, attributions by hand, no leak, measures, and commands."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import roc_auc_score

import funcbilevel as fb
from funcbilevel import cli
from funcbilevel.tasks._experiment import statistics, store
from funcbilevel.tasks._experiment.blocks import Block
from funcbilevel.tasks.pathways import problem as pathways
from funcbilevel.tasks.pathways import report, train
from funcbilevel.tasks.pathways.methods import Hyper, Setting
from funcbilevel.tasks.pathways.problem import Design, Rows

SMALL = Design(4, 3, 1, 2, 4, 2, num_train=80, num_validation=60, num_test=100)
KNOWN = jnp.array([1.0, 1.0, 1.0, 0.0, 0.0])


def network(num_genes=5, seed=0):
    return jax.tree.map(lambda w: jnp.asarray(w, float), pathways.initial_network(num_genes, 3, seed))


def rows(n=20, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 5))
    return Rows(jnp.asarray(x), jnp.asarray((x[:, 0] + x[:, 3] > 0).astype(float)))


# The generator.


def test_membership_of_overlapping_and_disjoint_pathways():
    overlapping = pathways.membership(SMALL)
    assert overlapping.shape == (4, 2 * 4 + 1 + 4)
    assert [np.flatnonzero(genes).tolist() for genes in overlapping] == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8]]
    disjoint = pathways.membership(SMALL._replace(overlap=0))
    assert disjoint.shape == (4, 12 + 4)
    assert disjoint.sum(axis=0).tolist() == [1] * 12 + [0] * 4


def test_expression_has_the_correlations_of_the_design():
    design = Design(4, 3, 0, 2, 4, 2, rho=0.6, confounding=0.5, num_train=40_000)
    data = pathways.generate(design, 0)
    correlation = np.corrcoef(data.train.x.T)
    member = data.pathways.astype(float)
    together = (member.T @ member > 0) & ~np.eye(16, dtype=bool)
    np.testing.assert_allclose(correlation[together], 0.6, atol=0.02)
    np.testing.assert_allclose(data.train.x[:, :12].var(axis=0), 1, atol=0.05)
    np.testing.assert_allclose(correlation[:3, 3:12], 0, atol=0.02)
    shared = pathways.generate(design._replace(overlap=1), 0)
    both = np.flatnonzero(shared.pathways.sum(axis=0) == 2)[0]
    # cov(gene of both, gene of one) = rho / sqrt(2)
    assert np.corrcoef(shared.train.x[:, [both - 1, both]].T)[0, 1] == pytest.approx(0.6 / np.sqrt(2), abs=0.02)


def test_the_label_follows_the_driving_pathways_and_the_batch_only():
    design = Design(num_train=20_000, num_test=20_000)
    data = pathways.generate(design, 1)
    assert data.driving.sum() == design.num_driving
    assert data.true.sum() < data.known.sum() == data.train.x.shape[1] - design.num_background

    def dependence(part):
        return np.abs(np.corrcoef(np.column_stack([part.x, part.y]).T)[-1, :-1])

    train, corrected = dependence(data.train), dependence(data.corrected)
    technical = (train > 0.1) & ~data.known
    assert technical.sum() == design.num_technical
    assert train[technical].min() > 0.2
    assert corrected[technical].max() < 0.05
    neither = ~data.true & ~technical
    assert train[neither].max() < 0.05
    alone = data.pathways[data.driving].sum(axis=0) == 1
    assert np.median(corrected[alone & (data.pathways.sum(axis=0) == 1)]) > 0.1


def test_seeds_differ_and_repeat():
    first, again, other = (pathways.generate(SMALL, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.train.x, other.train.x)
    assert [len(part.y) for part in (first.train, first.validation, first.test, first.corrected)] == [80, 60, 100, 100]


# Attributions and measures.


def test_attributions_by_hand(x64):
    params, batch = network(), rows()
    x = np.asarray(batch.x)
    w1, w2, w3 = (np.asarray(params[name]["w"]) for name in ("input", "hidden", "output"))
    h = np.tanh(x @ w1)
    g = np.tanh(h @ w2)
    gradient = (((1 - g**2) * w3[:, 0]) @ w2.T * (1 - h**2)) @ w1.T
    got = pathways.attributions(params, batch.x)
    np.testing.assert_allclose(got, x * gradient, rtol=1e-9)
    one = jax.grad(lambda x: pathways.logits(params, x[None])[0])(batch.x[3])
    np.testing.assert_allclose(got[3], batch.x[3] * one, rtol=1e-9)
    mass = np.abs(x * gradient).sum(axis=0)
    assert float(pathways.share_inside(params, batch.x, KNOWN)) == pytest.approx(mass[:3].sum() / mass.sum(), rel=1e-9)
    # A smaller output has the same share.
    small = params | {"output": jax.tree.map(lambda w: 0.01 * w, params["output"])}
    assert float(pathways.share_inside(small, batch.x, KNOWN)) == pytest.approx(mass[:3].sum() / mass.sum(), rel=1e-8)


def test_auroc_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    score, positive = np.round(rng.normal(size=50), 1), rng.uniform(size=50) < 0.4
    got = pathways.auroc(jnp.asarray(score), jnp.asarray(positive, jnp.float32))
    assert float(got) == pytest.approx(roc_auc_score(positive, score), abs=1e-6)


# The players.


def test_objectives_and_no_leak_between_the_levels(x64):
    params, batch = network(), rows()
    leader, follower, merge = fb.partition(params, pathways.is_followers)
    assert follower["input"]["w"].shape == (5, 3)
    assert leader["input"]["w"] is None
    p = 1 / (1 + np.exp(-np.asarray(pathways.logits(params, batch.x))))
    y = np.asarray(batch.y)
    loss = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    outside = 1 - float(pathways.share_inside(params, batch.x, KNOWN))
    problem = pathways.problem(merge, KNOWN, 2.0)
    assert float(problem.outer_objective(leader, follower, batch)) == pytest.approx(loss, rel=1e-9)
    assert float(problem.inner_objective(leader, follower, batch)) == pytest.approx(loss + 2 * outside, rel=1e-9)

    def stepped(eta, estimator):
        sgd = optax.sgd(0.1)
        game = pathways.problem(merge, KNOWN, eta)
        solver = fb.bilevel(game, None, estimator, inner_optimizer=sgd, outer_optimizer=sgd)
        return solver.step(solver.init(jax.random.key(0), leader, None, follower), batch, batch)[0]

    # In alternating the leader moves by its cross entropy alone, at the follower's new layer.
    @jax.jit
    def both():
        state = stepped(5.0, fb.alternating())
        gradient = jax.grad(pathways.problem(merge, KNOWN, 0.0).outer_objective)(leader, state.inner_params, batch)
        return state.outer_params, jax.tree.map(lambda w, g: w - 0.1 * g, leader, gradient)

    got, expected = both()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), got, expected)
    implicit = jax.jit(lambda: stepped(5.0, fb.aid(fb.normal_cg(3, damping=1.0))).outer_params)()
    assert not np.allclose(implicit["hidden"]["w"], got["hidden"]["w"])


def test_the_weight_moves_attributions_inside():
    data = [pathways.generate(SMALL, seed) for seed in (0, 1)]
    setting = Setting(width=4, batch_size=20, num_steps=150)
    hypers = [Hyper(0.0, 0.03), Hyper(20.0, 0.03), Hyper(0.0, 0.03, 1.0)]
    metrics = train.sweep("alternating", setting, data, hypers, (0, 1))
    assert all(values.shape == (2, 3) for values in metrics.values())
    share = metrics["known_share"]
    assert (share[:, 1] > share[:, 0] + 0.1).all()
    assert (share[:, 1] > 0.9).all()
    np.testing.assert_allclose(share[:, 2], 1, atol=1e-6)
    assert metrics["accuracy"][:, 0].mean() > 0.65


def test_unknown_method():
    with pytest.raises(ValueError, match=r"method must be one of single-objective,.*got 'mask'"):
        train.program("mask", Setting(), 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_driving": 4}, "num_driving must be from 1 to 3, got 4"),
        ({"overlap": 2}, "overlap must be from 0 to 1, got 2"),
        ({"rho": 1.5}, "rho must be from 0 to 1, got 1.5"),
        ({"num_technical": 9}, "num_technical must be from 0 to 4, got 9"),
    ],
)
def test_bad_design(change, message):
    with pytest.raises(ValueError, match=message):
        pathways.generate(SMALL._replace(**change), 0)


def test_front_is_chosen_on_validation():
    names = ("accuracy", "known_share", "validation_accuracy", "validation_known_share")
    arrays = ([[0.8, 0.7, 0.99]], [[0.5, 1.0, 1.0]], [[0.8, 0.7, 0.6]], [[0.5, 1.0, 0.4]])
    metrics = {name: np.array(a) for name, a in zip(names, arrays, strict=True)}
    outcome = Block("aid-cg", [{}] * 3, [0], metrics)
    assert report.front(outcome).tolist() == [True, True, False]  # the best on test is not chosen
    volume = report.volumes(outcome)
    assert volume == pytest.approx(0.3 * 0.5 + 0.2 * 0.5)
    assert volume == pytest.approx(statistics.hypervolume(np.array([[0.8, 0.5], [0.7, 1.0]]), (0.5, 0.0)))


# Commands.


def test_run(tmp_path, capsys):
    directory = tmp_path / "run"
    few = ["--seeds", "2", "--num-steps", "5", "--width", "3", "--overlap", "0", "--methods", "alternating"]
    cli.main(["run", "pathways", "--output-dir", str(directory), *few])
    output = capsys.readouterr()
    table = output.out.split(str(directory))[1]
    assert max(map(len, table.splitlines())) <= 80
    for word in ("known-genes", "single-objective", "lagrangian", "AUROC"):
        assert word in table
    assert "lagrangian        5 outer steps, outer objective" in output.err
    names = ["config.json", "pathways.png", "runs.jsonl", "table.md"]
    assert sorted(path.name for path in directory.glob("[!.]*")) == names
    records = store.read(directory / "runs.jsonl")
    assert sum(r["method"] == "lagrangian" for r in records) == 24
    shares = [r["metrics"]["known_share"] for r in records if r["method"] == "known-genes"]
    assert shares == pytest.approx([1.0] * 4, abs=1e-6)
    assert len({store.key_of(r) for r in records}) == len(records) == 2 * (2 + 2 + 12 + 12)
    assert len((directory / "table.md").read_text().splitlines()) == 2 + 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "mask"], "--methods must be among aid-cg, alternating, itd, got mask"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--num-driving", "8"], "--num-driving must be from 1 to 7, got 8"),
        (["--overlap", "-1"], "--overlap must be from 0 to 3, got -1"),
        (["--confounding", "2"], "--confounding must be from 0 to 1, got 2.0"),
    ],
)
def test_bad_options(tmp_path, args, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["run", "pathways", *args, "--output-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
