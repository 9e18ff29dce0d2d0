"""What `fb.train` takes as data: batches on devices, keys in batches, and data that are not the solver's."""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import funcbilevel as fb
from funcbilevel import _data as fb_data

N, STEPS = 8, 7
MODEL = fb.from_function(lambda key, x: jnp.zeros(3), lambda theta, x: x @ theta)


def make(inner: Any = None, outer: Any = None, inputs: Any = lambda batch: batch[0]) -> fb.BilevelSolver:
    """The exact hypergradient, without a linear solve."""
    problem = fb.FunctionalProblem(
        inner or (lambda w, v, b: jnp.mean((v - w * b[1]) ** 2)),
        outer or (lambda w, v, b: jnp.mean((v - 2 * b[1]) ** 2)),
        inputs,
    )
    return fb.bilevel(
        problem,
        MODEL,
        fb.funcid(fb.pointwise_adjoint()),
        inner_optimizer=optax.sgd(0.1),
        outer_optimizer=optax.sgd(0.1),
    )


SOLVER = make()


def pairs(seed: int = 0) -> Iterator[Any]:
    rng = np.random.default_rng(seed)
    while True:
        x, y = rng.normal(size=(N, 3)).astype(np.float32), rng.normal(size=N).astype(np.float32)
        yield (x, y), (x, y)


BATCH, _ = next(pairs())
START = SOLVER.init(jax.random.key(0), 0.5, BATCH)


def train(data: Any, num_outer_steps: int = STEPS, solver: Any = SOLVER, state: Any = START, **kwargs: Any) -> Any:
    return fb.train(solver, state, data, num_outer_steps, progress=False, **kwargs)


# Batches on devices.


def stack(given: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: fb_data.stack_leaf(leaves), *given)


def mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def put(*spec: Any, kind: AxisType = AxisType.Auto) -> Callable[[Any], Any]:
    return lambda x: jax.device_put(x, NamedSharding(mesh(kind), PartitionSpec(*spec)))


# How the leaves x [N, 3] and y [N] of a batch are placed; mixed: some leaves, or some steps, stay NumPy arrays.
PLACES: dict[str, Callable[[Any, Any], Any]] = {
    "on a device": lambda x, y: (jnp.asarray(x), jnp.asarray(y)),
    "sharded": lambda x, y: (put("data")(x), put("data")(y)),
    "sharded in an explicit mesh": lambda x, y: (
        put("data", kind=AxisType.Explicit)(x),
        put("data", kind=AxisType.Explicit)(y),
    ),
    "over two axes of the mesh": lambda x, y: (put(("data", "model"))(x), put(("data", "model"))(y)),
    "mixed leaves": lambda x, y: (put("data")(x), y),
}


@pytest.mark.parametrize("place", PLACES)
def test_device_arrays_are_stacked_where_they_are(place: str) -> None:
    given = [(PLACES[place](*inner), outer) for inner, outer in itertools.islice(pairs(), 2 * fb_data._AT_ONCE + 1)]
    with jax.transfer_guard_device_to_host("disallow"):
        (x, y), (numpy_x, _) = stack(given)
    assert type(numpy_x) is np.ndarray
    for stacked, leaf in zip((x, y), given[0][0]):
        assert type(stacked) is (np.ndarray if isinstance(leaf, np.ndarray) else type(leaf))
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            expected = NamedSharding(leaf.sharding.mesh, PartitionSpec(None, *leaf.sharding.spec))
            assert stacked.sharding.is_equivalent_to(expected, stacked.ndim)
    np.testing.assert_array_equal(x, np.stack([inner[0] for inner, _ in itertools.islice(pairs(), len(given))]))


def test_steps_on_the_host_join_those_on_devices() -> None:
    (x, y), _ = BATCH, None
    (stacked_x, _), _ = stack([((x, y), BATCH), ((put("data")(x), y), BATCH), ((jnp.asarray(x), y), BATCH)])
    assert stacked_x.sharding.is_equivalent_to(put(None, "data")(np.stack([x] * 4)[:3]).sharding, 3)
    np.testing.assert_array_equal(stacked_x, np.stack([x] * 3))


@pytest.mark.parametrize("place", ["sharded", "sharded in an explicit mesh"])
def test_sharded_batches_train_as_others_and_compile_once(place: str, caplog: pytest.LogCaptureFixture) -> None:
    solver = make()
    expected, history = train(pairs(), chunk=3)
    placed = ((PLACES[place](*inner), PLACES[place](*outer)) for inner, outer in pairs())
    with jax.log_compiles():
        state, metrics = train(placed, solver=solver, chunk=3)
    messages = [record.getMessage() for record in caplog.records]
    assert sum(message.startswith("Compiling") and "_stacked_chunk" in message for message in messages) == 1
    np.testing.assert_allclose(state.outer_params, expected.outer_params, rtol=1e-5)
    np.testing.assert_allclose(metrics["outer_objective"], history["outer_objective"], rtol=1e-5)


def test_batches_may_hold_keys_and_sparse_matrices() -> None:
    def inner(w: Any, v: Any, batch: Any) -> Any:
        noise = jax.random.normal(batch["key"], v.shape)
        return jnp.mean((v - w * (batch["x"] @ jnp.ones(3)) + noise) ** 2)

    def batches(sparse: bool) -> Iterator[Any]:
        rng = np.random.default_rng(0)
        for i in itertools.count():
            x = np.eye(N, 3, dtype=np.float32) * rng.normal()
            batch = {"x": BCOO.fromdense(x, nse=3) if sparse else x, "key": jax.random.key(i)}
            yield batch, batch

    solver = make(inner, lambda w, v, b: jnp.mean((v - 1) ** 2), lambda b: b["x"].todense())
    dense = make(inner, lambda w, v, b: jnp.mean((v - 1) ** 2), lambda b: b["x"])
    ends = []
    for which, sparse in ((solver, True), (dense, False)):
        state = which.init(jax.random.key(0), 0.5, next(batches(sparse))[0])
        ends.append(train(batches(sparse), solver=which, state=state, chunk=3)[0])
    np.testing.assert_allclose(ends[0].outer_params, ends[1].outer_params, rtol=1e-6)
    np.testing.assert_allclose(ends[0].inner_params, ends[1].inner_params, rtol=1e-6)


# Data that are not the solver's. A function that makes the data: what is wrong with it, and what the message says.

PAIR = (BATCH, BATCH)
LIKE_INIT = r"inner batches like the one that init was given: expected \(\[0\] float\[n, 3\]; \[1\] float\[n\]\)"
REPEAT = r"itertools.repeat\(\(inner_batch, outer_batch\)\)"


def steps_of(*items: Any) -> Iterator[Any]:
    return itertools.chain(items, itertools.repeat(items[-1]))


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "one pair": (lambda: PAIR, ValueError, (LIKE_INIT, "got .*float.n, 3.*itself one pair, .*read as two", REPEAT)),
    "one pair in a list": (lambda: list(PAIR), ValueError, (LIKE_INIT, "itself one pair", REPEAT)),
    "inner batches only": (lambda: (inner for inner, _ in pairs()), ValueError, (LIKE_INIT, REPEAT)),
    "a function that gives the inner batch": (lambda: lambda key, step: BATCH, ValueError, (LIKE_INIT, REPEAT)),
    "swapped parts": (
        lambda: itertools.repeat((BATCH[::-1], BATCH)),
        ValueError,
        (LIKE_INIT, r"got \(\[0\] float\[n\]"),
    ),
    "a column for a vector": (
        lambda: itertools.repeat(((BATCH[0], BATCH[1][:, None]), BATCH)),
        ValueError,
        (LIKE_INIT, r"\[1\] float\[n, 1\]"),
    ),
    "integers for floats": (
        lambda: itertools.repeat(((BATCH[0], np.ones(N, int)), BATCH)),
        ValueError,
        (LIKE_INIT, r"\[1\] int\[n\]"),
    ),
    "a dict": (lambda: {"inner": BATCH, "outer": BATCH}, TypeError, ("train: data must", "got dict", REPEAT)),
    "dicts": (lambda: [{"inner": BATCH, "outer": BATCH}], TypeError, ("must give pairs", "got dict", REPEAT)),
    "an array": (lambda: np.ones((STEPS, 2)), TypeError, ("must give pairs", "got ndarray", REPEAT)),
    "a word in a batch": (
        lambda: itertools.repeat(((BATCH[0], "y"), BATCH)),
        TypeError,
        ("must hold arrays and numbers, got str",),
    ),
    "another length in the chunk": (
        lambda: steps_of(PAIR, (BATCH, (BATCH[0][:2], BATCH[1][:2]))),
        ValueError,
        (
            r"same structure and shapes.* step 1 .*outer_batch\['0'\] has shape \(2, 3\), expected \(8, 3\)",
            "drop or pad",
        ),
    ),
    "another length in the next chunk": (
        lambda: steps_of(*[PAIR] * 3, ((BATCH[0][:2], BATCH[1][:2]), BATCH)),
        ValueError,
        (r"step 3 .*inner_batch\['0'\] has shape \(2, 3\), expected \(8, 3\)",),
    ),
    "another dtype in the next chunk": (
        lambda: steps_of(*[PAIR] * 3, (BATCH, (BATCH[0], np.ones(N, int)))),
        TypeError,
        (r"step 3 .*outer_batch\['1'\] has dtype int32, expected float32",),
    ),
    "another structure in the next chunk": (
        lambda: steps_of(*[PAIR] * 3, (BATCH, (*BATCH, BATCH[1]))),
        ValueError,
        (r"step 3 .*outer_batch has tree structure",),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_data_that_are_not_the_solvers_are_refused(name: str) -> None:
    data, error, expected = WRONG[name]
    with pytest.raises(error) as caught:
        train(data(), chunk=3)
    for text in expected:
        assert re.search(text, str(caught.value)), (text, str(caught.value))


def test_what_is_the_solvers_passes() -> None:
    """Two steps in a tuple, another number of samples than at the start, other containers, Python numbers."""
    half = jax.tree.map(lambda x: x[: N // 2], PAIR)
    expected, _ = train(itertools.repeat(PAIR), 2)
    for data in ((PAIR, PAIR), [list(PAIR)] * 2, [jax.tree.map(list, PAIR, is_leaf=lambda x: x is BATCH)] * 2):
        state, _ = train(data, 2)
        np.testing.assert_array_equal(state.outer_params, expected.outer_params)
    assert train(itertools.repeat(half), 2)[0].step == 2


def test_several_inner_batches_a_step_are_like_one_of_them() -> None:
    solver = make()
    many = jax.tree.map(lambda x: np.stack([x] * 2), BATCH)
    fresh = fb.Sampler(jax.tree_util.Partial(lambda batch, key: batch, BATCH))
    expected, _ = train(itertools.repeat(PAIR), 2, solver)
    for source in (fb.Minibatches(many), fresh):
        state, _ = train(itertools.repeat((source, BATCH)), 2, solver)
        np.testing.assert_allclose(state.outer_params, expected.outer_params, rtol=1e-6)
    with pytest.raises(ValueError, match=LIKE_INIT + r", got \(\[0\] float\[n\]; \[1\] float\[n, 3\]\)"):
        train(itertools.repeat((fb.Minibatches(many[::-1]), BATCH)), 2, solver)
    seeds = solver._replace(step=jax.vmap(solver.step))
    states = jax.vmap(lambda key: SOLVER.init(key, 0.5, BATCH))(jax.random.split(jax.random.key(0), 3))
    batches = jax.tree.map(lambda x: np.stack([x] * 3), (fb.Minibatches(many), BATCH))
    assert train(itertools.repeat(batches), 2, seeds, states)[0].step.tolist() == [2] * 3


def test_a_state_without_a_record_is_not_compared() -> None:
    state, _ = train(itertools.repeat(((BATCH[0], BATCH[1], 1.0), BATCH)), state=START._replace(batch_form=()))
    assert state.step == STEPS


def test_a_solver_that_saw_no_batch_tells_one_pair_from_two_steps() -> None:
    problem = fb.ParametricProblem(
        lambda w, u, b: jnp.mean((b[0] * u - w * b[1]) ** 2), lambda w, u, b: jnp.mean((b[0] * u - 2 * b[1]) ** 2)
    )
    sgd = optax.sgd(0.1)
    solver = fb.bilevel(problem, None, fb.aid(fb.identity()), inner_optimizer=sgd, outer_optimizer=sgd)
    state = solver.init(jax.random.key(0), 0.5, None, 0.0)
    x, weight = np.ones((N, 3), np.float32), np.float32(2)
    for pair in (((x, x), (x, weight)), [(x, x), (weight, x)]):
        with pytest.raises(ValueError, match=f"train: data must be an iterable of pairs.*got one pair.*{REPEAT}"):
            train(pair, 2, solver, state)
    steps = (((x, x), (x, x)),) * 2
    assert train(steps, 2, solver, state)[0].step == 2
    with pytest.raises(ValueError, match=f"one pair from two steps.*both readings.*{REPEAT}.*iter"):
        train(steps[0], 2, solver, state)  # rows of x suit the objectives as x itself does
    assert train(iter(steps[0]), 2, solver, state)[0].step == 2


def test_data_that_end_after_two_steps_may_be_one_pair() -> None:
    with pytest.warns(
        UserWarning, match=r"data ended after 2 of 7 steps; if data is one pair .*itertools.repeat\(data"
    ):
        train((PAIR, PAIR))


def test_seeds_are_not_taken_for_samples() -> None:
    solver = SOLVER._replace(step=jax.vmap(SOLVER.step))
    states = jax.vmap(lambda key: SOLVER.init(key, 0.5, BATCH))(jax.random.split(jax.random.key(0), 2))
    seeds = jax.tree.map(lambda x: np.stack([x, x]), PAIR)
    assert train(itertools.repeat(seeds), solver=solver, state=states)[0].step.tolist() == [STEPS] * 2
    with pytest.raises(ValueError, match=LIKE_INIT):
        train(seeds, solver=solver, state=states)


# Samplers that draw when they are traced.

POOL = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
RNG = np.random.default_rng(0)


def by_numpy(key: Any, step: Any) -> Any:
    return ((POOL[np.random.randint(0, 20, N)], jnp.ones(N)),) * 2  # noqa: NPY002


def by_generator(key: Any, step: Any) -> Any:
    return ((jnp.asarray(POOL) + RNG.normal(), jnp.ones(N)),) * 2


def in_a_branch(key: Any, step: Any) -> Any:
    x = jax.lax.cond(step > 3, lambda: jnp.asarray(POOL[RNG.permutation(20)[:N]]), lambda: jnp.asarray(POOL[:N]))
    return ((x, jnp.ones(N)),) * 2


def by_python(key: Any, step: Any) -> Any:
    import random

    return ((POOL[:N] * random.random(), jnp.ones(N)),) * 2


def by_key(key: Any, step: Any) -> Any:
    """With all that looks new at each trace: arrays, functions, keys."""
    x = jnp.asarray(POOL.copy())[jax.random.randint(key, N, 0, 20)]
    again = jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    noise = jax.random.normal(jax.random.key(3), (N,)) * np.array([np.nan, 1.0] * 4)[1]
    y = jax.lax.cond(step > 3, lambda: jnp.asarray(np.ones(N, np.float32)), lambda: noise)
    return ((again, y),) * 2


FROZEN = {"numpy": by_numpy, "generator": by_generator, "branch": in_a_branch, "python": by_python}


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, lambda f: jax.tree_util.Partial(lambda _, *args: f(*args), 0.0)]
)
@pytest.mark.parametrize("name", FROZEN)
def test_a_draw_at_trace_time_is_reported(name: str, wrap: Callable[[Any], Any]) -> None:
    with pytest.warns(UserWarning, match="train: data must draw with jax.random and the key .*pass an iterator"):
        fb_data.warn_of_frozen_draws(fb_data.read_data(wrap(FROZEN[name]))[0], jax.random.key(0), jnp.int32(0))


def test_train_reports_a_draw_at_trace_time() -> None:
    with pytest.warns(UserWarning, match="train: data must draw with jax.random"):
        train(by_numpy, 2)


def test_a_sampler_that_draws_with_its_key_passes() -> None:
    train(by_key, 2)
    pool = jnp.asarray(POOL)
    train(jax.tree_util.Partial(lambda pool, key, step: by_key(key, step + pool.mean().astype(int)), pool), 2)
