"""Data hyper-cleaning: the corruption, both levels by hand, the AUC, and the commands on few steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from funcbilevel import cli
from funcbilevel.tasks._experiment import store
from funcbilevel.tasks.cleaning import problem as cleaning
from funcbilevel.tasks.cleaning.problem import Samples


def test_half_of_the_training_labels_are_wrong_and_no_others():
    x, y = cleaning.pictures("digits")
    data = cleaning.corrupt(x, y, (1000, 250), seed=3)
    true = {row.tobytes(): label for row, label in zip(x, y, strict=True)}
    given = {
        name: np.array([true[row.tobytes()] for row in part.x])
        for name, part in data._asdict().items()
        if name != "wrong"
    }
    np.testing.assert_array_equal(data.train.y != given["train"], data.wrong)
    assert data.wrong.sum() == 500
    np.testing.assert_array_equal(data.validation.y, given["validation"])
    np.testing.assert_array_equal(data.test.y, given["test"])
    assert [len(part.y) for part in (data.train, data.validation, data.test)] == [1000, 250, 547]
    again = cleaning.corrupt(x, y, (1000, 250), seed=3)
    jax.tree.map(np.testing.assert_array_equal, data, again)


def test_auc_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    omega, wrong = np.round(rng.normal(size=60), 1), rng.uniform(size=60) < 0.4
    got = cleaning.auc(jnp.asarray(omega, jnp.float32), jnp.asarray(wrong))
    assert float(got) == pytest.approx(roc_auc_score(~wrong, omega), abs=1e-6)


@pytest.mark.parametrize("network", ["linear", "mlp"])
def test_objectives_by_hand(x64, network):
    rng = np.random.default_rng(1)
    x, y = rng.uniform(size=(6, 4)), np.array([0, 3, 9, 3, 1, 2])
    theta, _ = cleaning.model(network).init(jax.random.key(0), jnp.asarray(x))
    theta = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), theta)
    omega, number = rng.normal(size=20), np.array([5, 0, 19, 7, 7, 2])
    h = np.maximum(x @ np.asarray(theta["w1"]) + np.asarray(theta["b1"]), 0) if network == "mlp" else x
    v = h @ np.asarray(theta["w"]) + np.asarray(theta["b"])
    loss = np.log(np.exp(v).sum(axis=1)) - v[np.arange(6), y]
    weight = 1 / (1 + np.exp(-omega[number]))
    size = sum(float(jnp.sum(leaf**2)) for leaf in theta.values())
    batch = Samples(jnp.asarray(x), jnp.asarray(y), jnp.asarray(number))
    inner = cleaning.PARAMETRIC.inner_objective(jnp.asarray(omega), theta, batch)
    assert float(inner) == pytest.approx(np.mean(weight * loss) + cleaning.DECAY * size, rel=1e-9)
    outer = cleaning.FUNCTIONAL.outer_objective(jnp.asarray(omega), jnp.asarray(v), batch)
    assert float(outer) == pytest.approx(np.mean(loss), rel=1e-9)
    np.testing.assert_allclose(cleaning.features(theta, batch.x), np.column_stack([h, np.ones(6)]), rtol=1e-9)


def test_mnist_from_a_file(tmp_path, monkeypatch):
    arrays = {"x_train": np.full((3, 28, 28), 255), "y_train": np.arange(3), "x_test": np.zeros((2, 28, 28))}
    np.savez(tmp_path / "mnist.npz", **arrays, y_test=np.ones(2))
    monkeypatch.setenv("FUNCBILEVEL_MNIST", str(tmp_path / "mnist.npz"))
    x, y = cleaning.pictures("mnist")
    assert x.shape == (5, 784)
    assert (x.max(), y.tolist()) == (1.0, [0, 1, 2, 1, 1])
    monkeypatch.setenv("FUNCBILEVEL_MNIST", str(tmp_path / "none.npz"))
    with pytest.raises(ValueError, match="no file"):
        cleaning.pictures("mnist")


def test_run(tmp_path, capsys):
    directory = tmp_path / "run"
    few = ["--seeds", "2", "--num-steps", "40", "--methods", "soba"]
    cli.main(["run", "cleaning", "--output-dir", str(directory), *few])
    shown = capsys.readouterr().out
    for word in ("validation-only", "all-samples", "soba", "AUC"):
        assert word in shown
    names = ["cleaning.png", "config.json", "runs-curves.jsonl", "runs-worst.jsonl", "runs.jsonl", "table.md"]
    assert sorted(path.name for path in directory.glob("[!.]*")) == names
    records = store.read(directory / "runs.jsonl")
    assert len(records) == 3 * 2
    values = {(r["method"], r["seed"]): r["metrics"] for r in records}
    assert min(values["soba", seed]["auc"] for seed in (0, 1)) > 0.85
    assert min(m["accuracy"] for m in values.values()) > 0.6
    kept = store.beside(store.Store(directory, "cleaning"), "worst")
    (worst,) = kept.values()
    assert len(worst["picture"]) == 30
    assert np.mean(worst["wrong"]) > 0.85
    assert worst["weight"] == sorted(worst["weight"])


def test_bad_options(tmp_path):
    for args, message in (
        (["--methods", "magic"], "--methods must be among funcid-linear"),
        (["--corruption", "1"], "--corruption must be between 0 and 1, got 1.0"),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.main(["run", "cleaning", *args, "--output-dir", str(tmp_path / "run")])
