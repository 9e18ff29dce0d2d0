"""`fb.train`: the same run whatever the chunks, from a sampler or an iterator, and what the host sees of it."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcbilevel as fb
from funcbilevel import _train as fb_train

N, STEPS = 8, 20
traces: Counter[str] = Counter()


def inner_objective(omega: Any, v: Any, batch: Any) -> Any:
    traces["inner"] += 1
    aux = {"step": batch["step"], "draw": batch["draw"], "mean": jnp.mean(batch["x"])}
    return jnp.mean((v - omega["w"] * batch["y"]) ** 2), aux


def outer_objective(omega: Any, v: Any, batch: Any) -> Any:
    return jnp.mean((v - 2 * batch["y"]) ** 2) + 0.1 * omega["b"] ** 2, {}


PROBLEM = fb.FunctionalProblem(inner_objective, outer_objective, inputs=lambda batch: batch["x"], has_aux=True)
MODEL = fb.from_function(lambda key, x: jax.random.normal(key, (3,)), lambda theta, x: jnp.dot(x, theta))
SOLVER = fb.bilevel(
    PROBLEM,
    MODEL,
    fb.funcid(fb.pointwise_adjoint()),
    inner_optimizer=optax.sgd(0.1, momentum=0.5),
    outer_optimizer=optax.adam(0.05),
    inner_steps=2,
)


def sample(key: jax.Array, step: jax.Array) -> tuple[Any, Any]:
    x_key, draw_key = jax.random.split(key)
    x = jax.random.normal(x_key, (N, 3))
    batch = {"x": x, "y": jnp.sin(x[:, 0]), "step": step, "draw": jax.random.uniform(draw_key)}
    return batch, batch


def stream(seed: int = 0) -> Iterator[tuple[Any, Any]]:
    """NumPy batches without end."""
    rng = np.random.default_rng(seed)
    for step in itertools.count():
        x = rng.normal(size=(N, 3)).astype(np.float32)
        batch = {"x": x, "y": np.sin(x[:, 0]), "step": np.int32(step), "draw": np.float32(rng.uniform())}
        yield batch, batch


def start(seed: int = 0) -> fb.BilevelState:
    batch, _ = next(stream())
    return SOLVER.init(jax.random.key(seed), {"w": 0.5, "b": 1.0}, batch)


def train(data: Any, num_outer_steps: int = STEPS, state: Any = None, **kwargs: Any) -> Any:
    return fb.train(SOLVER, start() if state is None else state, data, num_outer_steps, progress=False, **kwargs)


# A function that makes the data: an iterator is used up by a run.
DATA: dict[str, Callable[[], Any]] = {"sampler": lambda: sample, "iterator": stream}
every_kind = pytest.mark.parametrize("kind", DATA)


@every_kind
def test_the_chunks_change_nothing(kind: str) -> None:
    state, history = train(DATA[kind](), chunk=10 * STEPS)
    assert state.step == STEPS
    assert all(values.shape == (STEPS,) for values in history.values())
    for chunk in (1, 7):
        other, other_history = train(DATA[kind](), chunk=chunk)
        chex.assert_trees_all_equal_shapes_and_dtypes(other, state)
        chex.assert_trees_all_close(other.outer_params, state.outer_params, rtol=1e-6)
        chex.assert_trees_all_close(other.inner_params, state.inner_params, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(other_history, history, rtol=1e-5, atol=1e-6)
    assert np.all(jax.random.key_data(other.key) == jax.random.key_data(state.key))


@every_kind
def test_two_halves_are_the_whole(kind: str) -> None:
    whole, history = train(DATA[kind](), chunk=5)
    data = DATA[kind]()
    half, first = train(data, STEPS // 2, chunk=5)
    both, second = train(data, STEPS // 2, half, chunk=5)
    chex.assert_trees_all_equal(both.outer_params, whole.outer_params)
    chex.assert_trees_all_equal(both.inner_params, whole.inner_params)
    joined = {name: np.concatenate([first[name], second[name]]) for name in first}
    chex.assert_trees_all_equal(joined, history)


def test_an_iterator_is_stepping_by_hand() -> None:
    state, history = train(stream(), chunk=6)
    by_hand, step = start(), jax.jit(SOLVER.step)
    for i, batches in enumerate(itertools.islice(stream(), STEPS)):
        by_hand, metrics = step(by_hand, *batches)
        assert set(metrics) == set(history)
        for name, value in metrics.items():
            np.testing.assert_allclose(history[name][i], value, rtol=1e-4, atol=1e-6, err_msg=name)
    chex.assert_trees_all_close(state.outer_params, by_hand.outer_params, rtol=1e-5)


def test_a_sampler_gets_a_key_of_its_own_and_the_step() -> None:
    state, history = train(sample, chunk=6)
    np.testing.assert_array_equal(history["inner/step"], np.arange(STEPS))
    _, more = train(sample, 5, state)
    np.testing.assert_array_equal(more["inner/step"], np.arange(STEPS, STEPS + 5))
    _, other_seed = train(sample, state=start(seed=1), chunk=6)
    draws = np.concatenate([history["inner/draw"], more["inner/draw"], other_seed["inner/draw"]])
    assert len(np.unique(draws)) == len(draws)


@every_kind
def test_a_partial_last_chunk_and_a_second_call_need_no_other_program(kind: str) -> None:
    """Nor does a chunk of the same length in a longer run. Traces are counted from an empty cache."""
    fb_train._compiled.cache_clear()

    def traced(num_outer_steps: int) -> int:
        before = traces["inner"]
        state, _ = train(DATA[kind](), num_outer_steps, chunk=6, state=given)
        assert state.step == num_outer_steps
        return traces["inner"] - before

    given = start()
    assert traced(6 + 6 + 5) > 0
    assert traced(6 + 6 + 5) == 0
    assert traced(6) == 0


def test_arrays_bound_by_partial_are_arguments_of_the_program() -> None:
    """New arrays of the same shapes: the run follows them, and nothing is traced again."""

    def pick(data: Any, offset: jax.Array, key: jax.Array, step: jax.Array) -> Any:
        batch = {"x": data, "y": jnp.sin(data[:, 0]) + offset, "step": step, "draw": jnp.float32(0)}
        return batch, batch

    def run(data: Any, offset: float) -> tuple[Any, int]:
        before = traces["inner"]
        state, history = train(jax.tree_util.Partial(pick, data, jnp.float32(offset)), 3, state=given)
        np.testing.assert_allclose(history["inner/mean"], np.mean(data), rtol=1e-5)
        return state, traces["inner"] - before

    given, (first, second) = start(), np.random.default_rng(0).normal(size=(2, N, 3)).astype(np.float32)
    states = {}
    assert run(first, 0.0)[1] > 0
    for name, data, offset in (("first", first, 0.0), ("second", second, 0.0), ("offset", first, 0.5)):
        states[name], retraced = run(data, offset)
        assert retraced == 0
    closed_over, _ = train(lambda key, step: pick(second, jnp.float32(0.0), key, step), 3, state=given)
    chex.assert_trees_all_close(states["second"].inner_params, closed_over.inner_params, rtol=1e-5)
    for other in ("second", "offset"):
        assert np.max(np.abs(states[other].inner_params - states["first"].inner_params)) > 1e-3


@dataclasses.dataclass
class Batches:
    """A sampler that cannot be hashed, and whose == is that of its arrays: ambiguous."""

    x: Any

    def __call__(self, key: jax.Array, step: jax.Array) -> Any:
        batch = {"x": self.x, "y": jnp.sin(self.x[:, 0]), "step": step, "draw": jnp.float32(0)}
        return batch, batch


def test_samplers_are_told_apart_by_identity() -> None:
    rng = np.random.default_rng(0)
    for x in rng.normal(size=(2, N, 3)).astype(np.float32):
        _, history = train(Batches(x), 2)
        np.testing.assert_allclose(history["inner/mean"], np.mean(x), rtol=1e-5)


@every_kind
def test_the_callback_gets_each_chunk_on_the_host(kind: str) -> None:
    seen: list[tuple[int, dict[str, np.ndarray]]] = []

    def callback(state: fb.BilevelState, metrics: dict[str, np.ndarray]) -> None:
        assert isinstance(state, fb.BilevelState)
        assert all(type(values) is np.ndarray for values in metrics.values())
        seen.append((int(state.step), metrics))

    _, history = train(DATA[kind](), chunk=8, callback=callback)
    assert [step for step, _ in seen] == [8, 16, 20]
    assert [len(metrics["outer_objective"]) for _, metrics in seen] == [8, 8, 4]
    for name, values in history.items():
        np.testing.assert_array_equal(np.concatenate([metrics[name] for _, metrics in seen]), values)


@every_kind
def test_the_state_passed_in_stays_usable(kind: str) -> None:
    given = start()
    first, _ = train(DATA[kind](), state=given)
    assert not any(x.is_deleted() for x in jax.tree.leaves(given))
    second, _ = train(DATA[kind](), state=given)
    chex.assert_trees_all_equal(first.outer_params, second.outer_params)
    assert given.step == 0
    assert all(a != b for a, b in zip(*map(jax.tree.leaves, (given.outer_params, first.outer_params)), strict=True))


# The iterator.


class Counted:
    """An iterator that knows how often it was asked."""

    def __init__(self, limit: int | None = None) -> None:
        self.pulls = 0
        self._batches = itertools.islice(stream(), limit)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.pulls += 1
        return next(self._batches)


@pytest.mark.parametrize("chunk", [1, 6, 50])
def test_the_iterator_is_pulled_once_a_step(chunk: int) -> None:
    data = Counted()
    train(data, 13, chunk=chunk)
    assert data.pulls == 13
    _, history = train(data, 2, chunk=chunk)  # goes on where the first run stopped
    np.testing.assert_array_equal(history["inner/step"], [13, 14])


@pytest.mark.parametrize("available", [0, 6, 10])
def test_an_iterator_that_ends_early_warns_and_returns(available: int) -> None:
    expected = {}
    if available:
        whole, expected = train(stream(), available, chunk=6)
    with pytest.warns(UserWarning, match=f"train: data ended after {available} of 20 steps"):
        state, history = train(Counted(available), chunk=6)
    assert state.step == available
    chex.assert_trees_all_close(history, expected, rtol=1e-6)
    if available:
        chex.assert_trees_all_close(state.outer_params, whole.outer_params, rtol=1e-6)


def test_a_bad_batch_later_on_keeps_what_was_done() -> None:
    def data() -> Iterator[Any]:
        yield from itertools.islice(stream(), 8)
        batch, _ = next(stream())
        yield jax.tree.map(lambda x: x[:2] if np.ndim(x) else x, (batch, batch))
        yield from stream()

    done: list[int] = []
    with pytest.raises(ValueError, match=r"the same structure and shapes.*\(2, 3\).*drop or pad"):
        train(data(), chunk=4, callback=lambda state, metrics: done.append(int(state.step)))
    assert done == [4, 8]


def test_batches_may_be_lists_jax_arrays_and_numbers() -> None:
    x = jnp.ones((N, 3))
    batch = {"x": x, "y": x[:, 0], "step": 1, "draw": 0.5}
    state, history = train([[batch, batch]] * 3, 3)
    assert state.step == 3
    np.testing.assert_array_equal(history["inner/draw"], [0.5] * 3)


# Progress.


def test_progress_is_shown_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    _, history = fb.train(SOLVER, start(), sample, STEPS, chunk=6, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{STEPS}/{STEPS}" in err
    for name in ("outer", "inner"):
        assert f"{name} {history[f'{name}_objective'][-1]:.4g}" in " ".join(err.split())


@pytest.mark.parametrize("terminal", [True, False])
def test_by_default_progress_is_for_terminals(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    fb.train(SOLVER, start(), sample, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert bool(err) == terminal


def test_a_parametric_problem_trains() -> None:
    """The penalty that a ridge regression needs, by data that is only a pure function."""
    problem = fb.ParametricProblem(
        lambda omega, theta, batch: jnp.mean((theta - batch) ** 2) + jnp.exp(omega) * jnp.mean(theta**2),
        lambda omega, theta, batch: jnp.mean((theta - 0.5 * batch) ** 2) + 0.0 * omega,
    )
    solver = fb.bilevel(
        problem,
        None,
        fb.aid(fb.cg(3)),
        inner_optimizer=optax.sgd(0.5),
        outer_optimizer=optax.adam(0.1),
        inner_steps=20,
    )
    target = jnp.array([1.0, -2.0])
    state = solver.init(jax.random.key(0), -2.0, None, jnp.zeros(2))
    state, history = fb.train(solver, state, lambda key, step: (target, target), 200, progress=False)
    # theta = target / (1 + exp(omega)), so omega = 0 halves it.
    np.testing.assert_allclose(state.outer_params, 0.0, atol=1e-2)
    assert history["outer_objective"][-1] < 1e-4 < history["outer_objective"][0]
