"""How a run of `fb.train` ends: at the callback's wish, by an exception or Ctrl-C; and what it leaves in memory."""

import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
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

BATCH = (jnp.ones((4, 1)), jnp.ones((4, 1)))
PAIR = (BATCH, BATCH)
RATE = optax.linear_schedule(0.1, 0.0, 20)
PROBLEM = fb.FunctionalProblem(
    lambda w, v, b: jnp.mean((v - w * b[1]) ** 2), lambda w, v, b: jnp.mean((v - 2 * b[1]) ** 2)
)
MODEL = fb.from_function(lambda key, x: jnp.zeros((1, 1)), lambda theta, x: x @ theta)
SOLVER = fb.bilevel(
    PROBLEM,
    MODEL,
    fb.funcid(fb.pointwise_adjoint()),
    inner_optimizer=optax.inject_hyperparams(optax.sgd)(0.1),
    outer_optimizer=optax.inject_hyperparams(optax.sgd)(RATE),
)
START = SOLVER.init(jax.random.key(0), 0.5, BATCH)


def sample(key: Any, step: Any) -> Any:
    return PAIR


def train(num_outer_steps: int = 9, data: Any = sample, **kwargs: Any) -> Any:
    return fb.train(SOLVER, START, data, num_outer_steps, chunk=3, progress=False, **kwargs)


def until(step: int, act: Callable[[], Any]) -> Callable[..., Any]:
    return lambda state, metrics: act() if state.step >= step else None


def throw(error: BaseException) -> Any:
    raise error


def assert_is_a_run_of(num_outer_steps: int, state: Any, metrics: Any) -> None:
    expected, history = train(num_outer_steps)
    assert state.step == num_outer_steps
    chex.assert_trees_all_equal(state.outer_params, expected.outer_params)
    chex.assert_trees_all_equal(metrics, history)


# A wish to end.


ENDS: dict[str, Callable[[], Any]] = {
    "True": lambda: True,
    "NumPy's": lambda: np.float32(1) < 2,
    "JAX's": lambda: jnp.float32(1) < 2,
    "StopTraining": lambda: throw(fb.StopTraining()),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_callback_ends_the_run(name: str) -> None:
    assert_is_a_run_of(6, *train(callback=until(4, ENDS[name])))


@pytest.mark.parametrize("answer", [None, False, 0, 1, "stop", np.bool_(False), np.ones(2), jnp.array(False)])
def test_other_answers_do_not(answer: Any) -> None:
    assert train(callback=lambda state, metrics: answer)[0].step == 9


def test_several_bools_are_no_answer() -> None:
    with pytest.raises(ValueError, match=r"train: callback must return True .* got bools of shape \(2,\).*np.all"):
        train(callback=lambda state, metrics: np.array([True, False]))


def test_learning_rates_can_be_logged() -> None:
    rates: list[tuple[float, float]] = []

    def log(state: fb.BilevelState, metrics: Any) -> None:
        states = (state.inner_opt_state, state.outer_opt_state)
        rates.append(tuple(float(s.hyperparams["learning_rate"]) for s in states))

    train(callback=log)
    np.testing.assert_allclose(rates, [(0.1, RATE(i)) for i in (2, 5, 8)], rtol=1e-6)


# Exceptions.


class Sealed(Exception):
    __slots__ = ()

    def __setattr__(self, *_: Any) -> None:
        raise AttributeError("sealed")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def raising_data(error: BaseException) -> Iterator[Any]:
    yield from itertools.repeat(PAIR, 7)  # in the middle of the third chunk
    raise error


RAISED: dict[str, tuple[type[BaseException], Callable[[], Any]]] = {
    "callback": (ZeroDivisionError, lambda: train(callback=until(4, lambda: 1 / 0))),
    "callback exits": (SystemExit, lambda: train(callback=until(4, sys.exit))),
    "Ctrl-C in the callback": (KeyboardInterrupt, lambda: train(callback=until(4, interrupt))),
    "data": (RuntimeError, lambda: train(data=raising_data(RuntimeError("disk")))),
    "Ctrl-C in data": (KeyboardInterrupt, lambda: train(data=raising_data(KeyboardInterrupt()))),
    "a bad batch": (TypeError, lambda: train(data=itertools.chain([PAIR] * 7, [None]))),
}


@pytest.mark.parametrize("name", RAISED)
def test_an_exception_carries_what_was_done(name: str) -> None:
    kind, run = RAISED[name]
    with pytest.raises(kind) as caught:
        run()
    assert_is_a_run_of(6, caught.value.state, caught.value.metrics)
    assert "error.state and error.metrics hold what was done, 6 outer steps" in caught.value.__notes__[0]
    resumed, _ = fb.train(SOLVER, caught.value.state, sample, 3, progress=False)
    assert resumed.step == 9


def test_an_exception_before_the_first_chunk_carries_the_start() -> None:
    with pytest.raises(RuntimeError) as caught:
        train(data=(throw(RuntimeError()) for _ in range(3)))
    assert caught.value.state.step == 0
    assert caught.value.metrics == {}
    assert not hasattr(caught.value, "__notes__")


def test_an_exception_that_takes_no_attributes_is_raised_as_it_is() -> None:
    with pytest.raises(Sealed):
        train(callback=until(4, lambda: throw(Sealed())))


def test_ctrl_c_within_a_chunk_waits_for_its_end() -> None:
    """Here the signal comes from the compiled program itself."""

    def sample_and_interrupt(key: Any, step: Any) -> Any:
        jax.debug.callback(lambda i: interrupt() if i == 4 else None, step)
        return PAIR

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(data=sample_and_interrupt)
    assert_is_a_run_of(6, caught.value.state, caught.value.metrics)
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_error_inside_the_program_keeps_the_metrics() -> None:
    def fail(step: Any) -> Any:
        if step == 4:
            raise OSError("no such row")
        return np.float32(1)

    def read(key: Any, step: Any) -> Any:
        one = jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), step)
        return jax.tree.map(lambda x: x * one, PAIR)

    with pytest.raises(Exception, match="no such row") as caught:
        train(data=read)
    assert caught.value.state is None
    assert {len(values) for values in caught.value.metrics.values()} == {3}
    assert any("error.state is None" in note for note in caught.value.__notes__)


# Memory and time.


MEMORY = """
    import itertools, os, resource, sys, tracemalloc
    import numpy as np
    sys.path.insert(0, {tests!r})
    from test_train_stops import BATCH, PAIR, SOLVER, START, fb, jax, sample
    import psutil

    data = {{"sampler": sample, "iterator": itertools.repeat(jax.tree.map(np.asarray, PAIR))}}[{kind!r}]
    used = []
    process = psutil.Process()

    def look(state, metrics):
        if state.step % 500 == 0:
            used.append(process.memory_info().rss)

    fb.train(SOLVER, START, data, 3000, chunk=1, progress=False, callback=look)
    print((used[-1] - used[1]) / 2000)
"""


@pytest.mark.parametrize("kind", ["sampler", "iterator"])
def test_memory_does_not_grow_with_the_chunks(kind: str) -> None:
    """From step 1,000 to 3,000; it was 20 kB per chunk."""
    pytest.importorskip("psutil")
    code = textwrap.dedent(MEMORY.format(tests=os.path.dirname(__file__), kind=kind))
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2000, done.stdout


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 7, 1000])
def test_metrics_of_all_chunks_are_there_and_own_their_memory(chunk: int) -> None:
    seen: list[Any] = []
    _, metrics = fb.train(
        SOLVER, START, sample, 7, chunk=chunk, progress=False, callback=lambda _, m: seen.append(m["outer_objective"])
    )
    np.testing.assert_array_equal(metrics["outer_objective"], np.concatenate(seen))
    assert all(values.base is None and len(values) == 7 for values in metrics.values())
    metrics["outer_objective"][:] = 0.0
    assert np.all(np.concatenate(seen) > 0.0)
    assert re.fullmatch(r"float\d+", seen[0].dtype.name)


def test_a_chunk_of_several_rows_is_a_run_in_small_chunks() -> None:
    """Beyond 100 steps a chunk's metrics are written row by row; here the last row is not full, nor is the chunk."""
    long, metrics = fb.train(SOLVER, START, sample, 250, chunk=230, progress=False)
    short, expected = fb.train(SOLVER, START, sample, 250, chunk=50, progress=False)
    chex.assert_trees_all_close(long.outer_params, short.outer_params, rtol=1e-6)
    chex.assert_trees_all_close(metrics, expected, rtol=1e-4, atol=1e-6)


COST = """
    import itertools, sys, time
    import numpy as np
    sys.path.insert(0, {tests!r})
    from test_train_stops import SOLVER, START, fb, jax

    x, y, steps = np.ones((8, 1), np.float32), np.ones((8, 1), np.float32), 10_000

    def pairs():
        while True:
            yield (x.copy(), y.copy()), (x.copy(), y.copy())

    def seconds(run):
        clock = time.perf_counter()
        run()
        return (time.perf_counter() - clock) / steps

    def train(data):
        return lambda: fb.train(SOLVER, START, data, steps, chunk=100, progress=False)

    sampler = jax.tree_util.Partial(lambda pair, key, step: pair, jax.device_put(next(pairs())))
    runs = [lambda: train(pairs())(), train(sampler), lambda: [*itertools.islice(pairs(), steps)] and None]
    iterator, without, alone = (min(times) for times in zip(*([seconds(run) for run in runs] for _ in range(8))))
    print(iterator - without - alone)
"""


@pytest.mark.slow
def test_an_iterator_costs_little() -> None:
    """At most 10 microseconds a step beside what the iterator itself takes, at a chunk of 100; it was 24."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # not by the tests' slow programs
    costs: list[float] = []
    while len(costs) < 3 and (not costs or min(costs) > 10e-6):
        code = textwrap.dedent(COST.format(tests=os.path.dirname(__file__)))
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        costs.append(float(done.stdout))
    assert min(costs) < 10e-6, costs


@pytest.mark.slow
def test_long_chunks_cost_no_more_per_step() -> None:
    """The program alone, the best of runs in turns. Metrics written into one long array make it 2.5 times."""
    sampler = jax.tree_util.Partial(sample)
    programs = {chunk: fb_train._compiled(fb_train._sampled_chunk, SOLVER, chunk) for chunk in (100, 1000, 10_000)}

    def seconds(chunk: int) -> float:
        best = np.inf
        for _ in range(max(1, 10_000 // chunk)):
            state = jax.block_until_ready(jax.tree.map(jnp.copy, START))
            clock = time.perf_counter()
            jax.block_until_ready(programs[chunk](state, chunk, sampler))
            best = min(best, time.perf_counter() - clock)
        return best / chunk

    for chunk in programs:
        seconds(chunk)  # compiles
    per_step = {chunk: min(times) for chunk, *times in zip(programs, *(map(seconds, programs) for _ in range(8)))}
    assert max(per_step.values()) < 1.3 * per_step[100], per_step
