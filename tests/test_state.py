"""States as arrays: through every file format, a run goes on bit by bit as if nothing had happened."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import funcbilevel as fb

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
BATCH = (X, X[:, 0])
PROBLEM = fb.FunctionalProblem(
    lambda w, v, b: jnp.mean((v - w["w"] * b[1]) ** 2), lambda w, v, b: jnp.mean((v - 2 * b[1]) ** 2)
)
MODEL = fb.from_function(lambda key, x: jax.random.normal(key, (3,)), lambda theta, x: x @ theta)
SOLVER = fb.bilevel(
    PROBLEM,
    MODEL,
    fb.funcid(fb.learned_adjoint(optax.adam(0.1), 2)),
    inner_optimizer=optax.adam(0.1),
    outer_optimizer=optax.inject_hyperparams(optax.adam)(optax.cosine_decay_schedule(0.1, 50)),
)


def sample(key: jax.Array, step: jax.Array) -> Any:
    x = jax.random.normal(key, X.shape)
    return ((x, x[:, 0]),) * 2


def start(seed: int = 0) -> fb.BilevelState:
    return SOLVER.init(jax.random.key(seed), {"w": 0.5}, BATCH)


def seeds(seed: int = 0) -> fb.BilevelState:
    return jax.vmap(lambda key: SOLVER.init(key, {"w": 0.5}, BATCH))(jax.random.split(jax.random.key(seed), 2))


RUNS: dict[str, tuple[fb.BilevelSolver, Callable[..., fb.BilevelState], Any]] = {
    "alone": (SOLVER, start, sample),
    "seeds": (SOLVER._replace(step=jax.vmap(SOLVER.step)), seeds, jax.vmap(sample)),
}


def npz(arrays: Any, directory: Path) -> Any:
    np.savez(directory / "state.npz", **arrays)
    return np.load(directory / "state.npz")


def orbax(arrays: Any, directory: Path) -> Any:
    checkpoint = pytest.importorskip("orbax.checkpoint", reason="orbax is not a dependency of flax everywhere")
    checkpointer = checkpoint.StandardCheckpointer()
    checkpointer.save(directory / "state", arrays)
    checkpointer.wait_until_finished()
    return checkpointer.restore(directory / "state")


STORES: dict[str, Callable[[Any, Path], Any]] = {
    "npz": npz,
    "orbax": orbax,
    "flax": lambda arrays, _: serialization.from_bytes(arrays, serialization.to_bytes(arrays)),
    "msgpack": lambda arrays, _: serialization.msgpack_restore(serialization.to_bytes(arrays)),
    "pickle": lambda arrays, _: pickle.loads(pickle.dumps(arrays)),
}


def bits(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)


@pytest.fixture(scope="module")
def halves() -> dict[str, tuple[Any, Any, Any]]:
    """name -> the state in the middle, at the end, and the metrics of the second half."""

    def run(name: str) -> tuple[Any, Any, Any]:
        solver, init, data = RUNS[name]
        middle, _ = fb.train(solver, init(), data, 5, progress=False)
        return middle, *fb.train(solver, middle, data, 5, progress=False)

    return {name: run(name) for name in RUNS}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # orbax's own
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_a_file(name: str, store: str, halves: Any, tmp_path: Path) -> None:
    (solver, init, data), (middle, end, history) = RUNS[name], halves[name]
    restored = fb.state_from_arrays(STORES[store](fb.state_to_arrays(middle), tmp_path), init(seed=9))
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, middle)
    chex.assert_trees_all_equal(bits(restored), bits(middle))
    resumed, metrics = fb.train(solver, restored, data, 5, progress=False)
    chex.assert_trees_all_equal(bits(resumed), bits(end))
    chex.assert_trees_all_equal(metrics, history)


def test_a_state_itself_goes_through_pickle() -> None:
    state = start()._replace(key=None)
    assert jax.tree.structure(pickle.loads(pickle.dumps(state))) == jax.tree.structure(state)
    assert serialization.from_bytes(state, serialization.to_bytes(state)).batch_form == state.batch_form


# Trees of all kinds of leaves, and the paths that they get.
TREES: dict[str, tuple[Any, set[str]]] = {
    "half precision": (
        {"w": jnp.linspace(0, 1, 7, dtype=jnp.bfloat16).reshape(7, 1), "s": jnp.bfloat16(3), "h": jnp.float16(2)},
        {"w", "s", "h"},
    ),
    "small": ({"w": jnp.linspace(0, 1, 7, dtype=jnp.float8_e4m3fn), "i": jnp.arange(3, dtype=jnp.int4)}, {"w", "i"}),
    "keys": (
        [jax.random.key(3, impl="rbg"), jax.random.split(jax.random.key(4), (2, 3)), jax.random.PRNGKey(5)],
        {"0", "1", "2"},
    ),
    "NumPy and Python": ({"x": np.arange(3), "n": 3, "r": 0.5, "b": True}, {"x", "n", "r", "b"}),
    "slashes": ({"a/b": jnp.zeros(1), "a": {"b": jnp.ones(1), "~1": jnp.ones(2)}}, {"a~1b", "a/b", "a/~01"}),
    "one leaf": (jnp.arange(2), {""}),
    "empty": ({"a": (), "b": None, "c": jnp.zeros((0, 3))}, {"c"}),
}


@pytest.mark.parametrize("name", TREES)
def test_every_kind_of_leaf_survives_an_npz_file(name: str) -> None:
    tree, paths = TREES[name]
    arrays = fb.state_to_arrays(tree)
    assert set(arrays) == paths
    assert all(type(x) is np.ndarray for x in arrays.values())
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    back = fb.state_from_arrays(np.load(file), tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for got, leaf in zip(*map(jax.tree.leaves, (back, tree)), strict=True):
        assert getattr(got, "dtype", type(got)) == getattr(leaf, "dtype", type(leaf))
    for path, array in fb.state_to_arrays(back).items():
        np.testing.assert_array_equal(array, arrays[path])


def test_shapes_are_enough_to_restore_by() -> None:
    state = start()
    restored = fb.state_from_arrays(fb.state_to_arrays(state), jax.eval_shape(start))
    chex.assert_trees_all_equal(bits(restored), bits(state))


def test_arrays_are_copies() -> None:
    tree = {"x": np.zeros(2)}
    arrays = fb.state_to_arrays(tree)
    restored = fb.state_from_arrays(arrays, tree)
    arrays["x"][0] = 1.0
    assert tree["x"][0] == restored["x"][0] == 0.0


def test_a_state_over_devices_goes_back_to_them() -> None:
    sharding = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec("data"))
    tree = jax.device_put({"x": jnp.arange(8.0), "key": jax.random.split(jax.random.key(0), 8)}, sharding)
    restored = fb.state_from_arrays(fb.state_to_arrays(tree), tree)
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in restored.values())
    chex.assert_trees_all_equal(bits(restored), bits(tree))


LIKE = {"w": jnp.zeros(2), "h": jnp.zeros(2, jnp.bfloat16), "key": jax.random.key(0)}
ARRAYS = fb.state_to_arrays(LIKE)
MISFITS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "missing": ({"w": None}, ValueError, ("got w missing and none too many", "another solver")),
    "extra": ({"v": np.zeros(1)}, ValueError, ("got none missing and v too many",)),
    "shape": ({"w": np.zeros(3, np.float32)}, ValueError, ("arrays['w'] must have shape (2,), got (3,)",)),
    "dtype": ({"w": np.zeros(2)}, TypeError, ("arrays['w'] must have dtype float32, got float64",)),
    "bits": ({"h": np.zeros(2, np.float32)}, TypeError, ("dtype uint16 (the bits of bfloat16), got float32",)),
    "kind of key": ({"key": np.zeros(4, np.uint32)}, ValueError, ("arrays['key'] must have shape (2,)", "kind of key")),
}


@pytest.mark.parametrize("name", MISFITS)
def test_arrays_that_do_not_fit_are_refused(name: str) -> None:
    change, error, expected = MISFITS[name]
    arrays = {path: array for path, array in (ARRAYS | change).items() if array is not None}
    with pytest.raises(error) as caught:
        fb.state_from_arrays(arrays, LIKE)
    for text in ("state_from_arrays: arrays", *expected):
        assert text in str(caught.value)


@pytest.mark.parametrize("leaf", ["a word", print, object()])
def test_what_is_no_array_is_refused(leaf: Any) -> None:
    with pytest.raises(TypeError, match=r"state_to_arrays: state must hold arrays, numbers and keys, got .* at 'a/0'"):
        fb.state_to_arrays({"a": [leaf]})
