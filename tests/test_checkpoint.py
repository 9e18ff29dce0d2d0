"""`fb.train(..., checkpoint=...)`: bit by bit the run in one piece; and what is said of bad files."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import funcbilevel as fb

N, STEPS = 8, 12
FEATURES = lambda theta, x: x


def inner_objective(w: Any, v: Any, batch: Any) -> Any:
    return jnp.mean((v - w["w"] * batch[1]) ** 2)


def outer_objective(w: Any, v: Any, batch: Any) -> Any:
    return jnp.mean((v - 2 * batch[1]) ** 2) + 0.1 * w["b"] ** 2


PROBLEM = fb.FunctionalProblem(inner_objective, outer_objective)
MODEL = fb.from_function(lambda key, x: 0.1 * jax.random.normal(key, (3, 1)), lambda theta, x: x @ theta)
ESTIMATORS = {
    "funcid-linear": fb.funcid(fb.linear_adjoint(FEATURES)),
    "funcid-learned": fb.funcid(fb.learned_adjoint(optax.adam(1e-2), 2)),
    "funcid-pointwise": fb.funcid(fb.pointwise_adjoint()),
    "funcid-kernel": fb.funcid(fb.kernel_adjoint(fb.gaussian_kernel(1.0), 0.1)),
    "aid-cg": fb.aid(fb.cg(2, damping=0.1)),
    "itd": fb.itd(2),
    "alternating": fb.alternating(),
    "penalty-value": fb.value_penalty(optax.sgd(0.1), 2, 10.0),
    "penalty-gradient": fb.gradient_penalty(optax.sgd(1e-3), 2, 10.0),
    "darts": fb.darts(0.1),
    "prox-aid": fb.prox_aid(fb.cg(2, damping=0.1), lambda theta, omega, step_size: theta),
    "pzobo": fb.pzobo(2, 2, 0.1),
    "evolution-strategy": fb.evolution_strategy(2, 2, 0.1),
}


def make(estimator: fb.Estimator, rate: float = 0.05, inner_steps: int = 2) -> fb.BilevelSolver:
    return fb.bilevel(
        PROBLEM,
        MODEL,
        estimator,
        inner_optimizer=optax.adam(1e-2, eps_root=1e-12),
        outer_optimizer=optax.adam(rate),
        inner_steps=inner_steps,
    )


SOLVER = make(ESTIMATORS["funcid-learned"])


def sample(key: jax.Array, step: jax.Array) -> Any:
    x = jax.random.normal(key, (N, 3))
    return ((x, jnp.sin(x[:, :1])),) * 2


def stream() -> Iterator[Any]:
    rng = np.random.default_rng(0)
    while True:
        x = rng.normal(size=(N, 3)).astype(np.float32)
        yield ((x, np.sin(x[:, :1])),) * 2


class Seekable:
    """Batches with a position, as grain's iterators have one."""

    def __init__(self, state: Callable[[int], Any] = lambda i: {"next": i}) -> None:
        self.i, self.pulls, self._state = 0, 0, state

    def __iter__(self) -> "Seekable":
        return self

    def __next__(self) -> Any:
        x = np.random.default_rng(self.i).normal(size=(N, 3)).astype(np.float32)
        self.i += 1
        self.pulls += 1
        return ((x, np.sin(x[:, :1])),) * 2

    def get_state(self) -> Any:
        return self._state(self.i)

    def set_state(self, state: Any) -> None:
        self.i = next(i for i in range(1000) if repr(self._state(i)) == repr(state))


def bits(tree: Any) -> Any:
    """For comparison by ==; NaN is NaN."""

    def one(x: Any) -> Any:
        x = jax.random.key_data(x) if jnp.issubdtype(getattr(x, "dtype", float), jax.dtypes.prng_key) else x
        return (str(np.asarray(x).dtype), np.shape(x), np.asarray(x).tobytes())

    return jax.tree.map(one, tree)


def start(solver: fb.BilevelSolver = SOLVER, seed: int = 0, w: float = 0.5) -> fb.BilevelState:
    return solver.init(jax.random.key(seed), {"w": w, "b": 1.0}, next(stream())[0])


class Killed(Exception):
    """Stands for what ends a process."""


def killed_at(step: int) -> Callable[..., None]:
    def callback(state: Any, metrics: Any) -> None:
        if state.step >= step:
            raise Killed

    return callback


def train(
    directory: Path | None = None, data: Any = sample, num_outer_steps: int = STEPS, solver: Any = SOLVER, **kwargs: Any
) -> Any:
    kwargs = {"state": None, "chunk": 4, "every": 4, "keep": 3} | kwargs
    state = kwargs.pop("state")
    every, keep = kwargs.pop("every"), kwargs.pop("keep")
    checkpoint = None if directory is None else fb.Checkpoint(directory, every=every, keep=keep)
    state = start(solver) if state is None else state
    return fb.train(solver, state, data, num_outer_steps, progress=False, checkpoint=checkpoint, **kwargs)


def steps_in(directory: Path) -> list[int]:
    return sorted(int(p.parent.name.removeprefix("step_")) for p in directory.glob("step_*/commit.json"))


# The run in one piece.


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_run_in_pieces_is_the_run_in_one(name: str, tmp_path: Path) -> None:
    """Killed after a chunk that was not saved yet; keys, warm starts, moments and metrics are all there."""
    solver = make(ESTIMATORS[name])
    whole = train(solver=solver)
    with pytest.raises(Killed):
        train(tmp_path, solver=solver, callback=killed_at(8))
    assert steps_in(tmp_path) == [4]
    assert bits(train(tmp_path, solver=solver)) == bits(whole)


def test_a_stochastic_method_in_pieces(tmp_path: Path) -> None:
    """With a memory of all terms of a finite sum."""
    problem = fb.ParametricProblem(
        lambda w, u, b: jnp.mean((b[0] @ u - w * b[1]) ** 2), lambda w, u, b: jnp.mean((b[0] @ u - b[1]) ** 2) + w**2
    )
    solver = fb.saba(problem, inner_optimizer=0.1, linear_optimizer=0.1, outer_optimizer=0.1)
    source = fb.finite_sum((next(stream())[0][0], jnp.ones((N, 1))), 2)
    state = solver.init(jax.random.key(0), jnp.zeros(()), source, jnp.zeros((3, 1)), source)
    data = jax.tree_util.Partial(lambda source, key, step: (source, source), source)
    whole = train(data=data, solver=solver, state=state)
    with pytest.raises(Killed):
        train(tmp_path, data, solver=solver, state=state, callback=killed_at(8))
    assert bits(train(tmp_path, data, solver=solver, state=state)) == bits(whole)


def sources() -> dict[str, Any]:
    x, _ = next(stream())[0]
    data = (jnp.tile(x, (4, 1)), jnp.sin(jnp.tile(x, (4, 1))[:, :1]))
    draws = fb.Sampler(jax.tree_util.Partial(lambda key: sample(key, 0)[0]))
    blocks = fb.finite_sum(data, N, key=jax.random.key(5))
    return {
        "sampler": lambda: sample,
        "bound sampler": lambda: jax.tree_util.Partial(lambda a, key, step: ((a[0][:N], a[1][:N]),) * 2, data),
        "fb.Sampler": lambda: lambda key, step: (draws, sample(key, step)[1]),
        "finite sum": lambda: jax.tree_util.Partial(lambda blocks, key, step: (blocks, blocks), blocks),
        "generator": stream,
        "seekable": Seekable,
        "repeat": lambda: itertools.repeat(next(stream())),
        "list": lambda: list(itertools.islice(stream(), STEPS)),
    }


@pytest.mark.parametrize("name", sources())
def test_so_it_is_with_all_kinds_of_data(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = sources()[name]
    whole = train(data=data())
    with pytest.raises(Killed):
        train(tmp_path, data(), callback=killed_at(12))
    assert capsys.readouterr().err == ""
    assert bits(train(tmp_path, data())) == bits(whole)
    told = capsys.readouterr().err
    assert f"train: goes on from step 8 of 12 in {tmp_path}" in told
    assert ("data was read on to its pair 8" in told) == (name in ("generator", "repeat", "list"))


STATES: dict[str, Callable[[int], Any]] = {
    "bytes": lambda i: b"at %d" % i,
    "nested": lambda i: {"epoch": (i // 3, [i % 3]), 7: np.arange(i % 3), "rng": 2**100 + i, "more": {"none": None}},
    "number": int,
}


@pytest.mark.parametrize("name", STATES)
def test_an_iterator_is_set_and_not_read_on(name: str, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, Seekable(STATES[name]), callback=killed_at(12))
    data = Seekable(STATES[name])
    assert bits(train(tmp_path, data)) == bits(train(data=Seekable()))
    assert data.pulls == 4


def test_grain_goes_on_where_it_was(tmp_path: Path) -> None:
    grain = pytest.importorskip("grain", reason="grain is no dependency")

    def data() -> Any:
        return iter(
            grain.MapDataset.source(list(itertools.islice(stream(), 5))).shuffle(seed=1).repeat().to_iter_dataset()
        )

    with pytest.raises(Killed):
        train(tmp_path, data(), callback=killed_at(12))
    assert bits(train(tmp_path, data())) == bits(train(data=data()))


@pytest.mark.parametrize("data", [lambda: sample, stream], ids=["sampler", "iterator"])
def test_seeds_under_vmap(data: Any, tmp_path: Path) -> None:
    many = SOLVER._replace(step=jax.vmap(SOLVER.step))
    states = jax.vmap(lambda key: SOLVER.init(key, {"w": 0.5, "b": 1.0}, next(stream())[0]))(
        jax.random.split(jax.random.key(0), 2)
    )
    pairs = lambda: (
        jax.vmap(sample) if data() is sample else (jax.tree.map(lambda x: np.stack([x, 2 * x]), p) for p in stream())
    )
    whole = train(data=pairs(), solver=many, state=states)
    with pytest.raises(Killed):
        train(tmp_path, pairs(), solver=many, state=states, callback=killed_at_any(8))
    assert bits(train(tmp_path, pairs(), solver=many, state=states)) == bits(whole)


def killed_at_any(step: int) -> Callable[..., None]:
    return lambda state, metrics: killed_at(step)(state._replace(step=state.step[0]), metrics)


@pytest.mark.parametrize(("chunk", "every"), [(5, 3), (3, 5), (100, 4), (1, 1)])
def test_chunks_and_checkpoints_need_not_agree(chunk: int, every: int, tmp_path: Path) -> None:
    """A chunk ends where a checkpoint is due, by the same program."""
    whole = train(chunk=chunk)
    with pytest.raises(Killed):
        train(tmp_path, chunk=chunk, every=every, callback=killed_at(9))
    assert steps_in(tmp_path)[-1] >= 9 - every - min(chunk, every)
    assert bits(train(tmp_path, chunk=chunk, every=every)) == bits(whole)


def test_keys_of_other_kinds_and_half_precision(tmp_path: Path) -> None:
    """bfloat16 in the state and in the metrics; keys of another generator; empty arrays."""

    def step(state: Any, inner: Any, outer: Any) -> Any:
        after, metrics = SOLVER.step(state, inner, outer)
        own = {
            "half": after.outer_params["w"].astype(jnp.bfloat16),
            "empty": jnp.zeros((0, 2)),
            "flag": jnp.array(True),
        }
        return after._replace(model_state=own), metrics | {"half": own["half"]}

    solver = SOLVER._replace(step=step)
    given = SOLVER.init(jax.random.key(0, impl="rbg"), {"w": 0.5, "b": 1.0}, next(stream())[0])
    own = {"half": jnp.zeros((), jnp.bfloat16), "empty": jnp.zeros((0, 2)), "flag": jnp.array(False)}
    given = given._replace(model_state=own)
    whole = train(solver=solver, state=given)
    with pytest.raises(Killed):
        train(tmp_path, solver=solver, state=given, callback=killed_at(8))
    assert bits(train(tmp_path, solver=solver, state=given)) == bits(whole)


def test_old_keys(tmp_path: Path) -> None:
    given = SOLVER.init(jax.random.PRNGKey(0), {"w": 0.5, "b": 1.0}, next(stream())[0])
    with pytest.raises(Killed):
        train(tmp_path, state=given, callback=killed_at(8))
    assert bits(train(tmp_path, state=given)) == bits(train(state=given))


def on_devices(count: int) -> Callable[[Any], Any]:
    mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count], axis_types=(AxisType.Auto,))

    def put(x: Any) -> Any:
        divided = np.ndim(x) and np.shape(x)[0] % count == 0 and jnp.issubdtype(x.dtype, jnp.floating)
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec("data") if divided else PartitionSpec()))

    return lambda tree: jax.tree.map(put, tree)


@pytest.mark.parametrize("name", ["funcid-linear", "aid-cg"])
def test_a_checkpoint_of_eight_devices_goes_on_on_fewer(name: str, tmp_path: Path) -> None:
    """Batches and parameters divided over eight, then over four, two and one."""
    solver = make(ESTIMATORS[name])
    whole = train(solver=solver, data=stream())
    eight = on_devices(8)
    wide = lambda put: (put(pair) for pair in stream())
    with pytest.raises(Killed):
        train(tmp_path / "8", wide(eight), solver=solver, state=eight(start(solver)), callback=killed_at(8))
    for count in (8, 4, 1):
        shutil.copytree(tmp_path / "8", tmp_path / "copy")
        put = on_devices(count)
        state, metrics = train(tmp_path / "copy", wide(put), solver=solver, state=put(start(solver)))
        assert len(state.inner_params.sharding.device_set) == count
        for a, b in zip(jax.tree.leaves(state.outer_params), jax.tree.leaves(whole[0].outer_params)):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        np.testing.assert_allclose(metrics["outer_objective"], whole[1]["outer_objective"], rtol=1e-5)
        shutil.rmtree(tmp_path / "copy")


def test_more_steps_go_on_from_the_end(tmp_path: Path) -> None:
    whole = train()
    train(tmp_path, num_outer_steps=8)
    assert bits(train(tmp_path)) == bits(whole)
    pulled = Seekable()
    assert bits(train(tmp_path)) == bits(whole)
    assert pulled.pulls == 0


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    train(tmp_path, every=2, keep=2)
    assert steps_in(tmp_path) == [10, 12]
    assert len(list(tmp_path.glob("metrics/*.npz"))) == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock", "metrics", "run.json", "step_10", "step_12"]


def test_where_the_callback_ends_the_run_it_has_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = train(tmp_path, callback=lambda state, metrics: bool(state.step >= 8))
    assert bits(train(tmp_path)) == bits(ended)
    assert "train: the run had ended, at step 8" in capsys.readouterr().err


def test_data_that_end_early_end_the_run(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.warns(UserWarning, match="data ended after 6 of 12"):
            state, _ = train(tmp_path, itertools.islice(stream(), 6))
        assert state.step == 6


def test_prefetching_changes_nothing(tmp_path: Path) -> None:
    whole = train(data=stream())
    assert bits(train(data=stream(), prefetch=True)) == bits(whole)
    for data in (stream, Seekable):
        with pytest.raises(Killed):
            train(tmp_path / data.__name__, data(), prefetch=True, callback=killed_at(8))
        assert bits(train(tmp_path / data.__name__, data(), prefetch=True)) == bits(train(data=data()))


# Signals.


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, None), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("place", ["callback", "data", "program"])
def test_signals_finish_the_chunk_and_save(
    signum: int, code: int | None, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def send(step: Any) -> None:
        if step == 5:
            os.kill(os.getpid(), signum)

    def pairs() -> Iterator[Any]:
        for i, pair in enumerate(stream()):
            send(i if place == "data" else -1)
            yield pair

    def sampler(key: Any, step: Any) -> Any:
        jax.debug.callback(send, step if place == "program" else -1)
        return sample(key, step)

    data = pairs if place == "data" else (lambda: sampler)
    callback = lambda state, _: os.kill(os.getpid(), signum) if place == "callback" and state.step == 8 else None
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt if code is None else SystemExit) as caught:
        train(tmp_path, data(), every=100, callback=callback)
    assert code is None or caught.value.code == code
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    done = 4 if place == "data" else 8
    name = signal.Signals(signum).name
    assert f"train: stopped by {name} after {done} of 12 outer steps, which are saved in {tmp_path}" in (
        capsys.readouterr().err
    )
    assert steps_in(tmp_path) == [done]
    assert caught.value.state.step == done
    quiet = stream if place == "data" else lambda: sample
    assert bits(train(tmp_path, quiet(), every=100)) == bits(train(data=quiet()))


def test_a_signal_after_the_last_chunk_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from funcbilevel import _checkpoint

    waits = _checkpoint.Store.wait

    def wait(store: Any) -> None:
        if store._saved == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)
            monkeypatch.setattr(_checkpoint.Store, "wait", waits)
        waits(store)

    monkeypatch.setattr(_checkpoint.Store, "wait", wait)
    with pytest.raises(SystemExit, match="143"):
        train(tmp_path)
    assert bits(train(tmp_path)) == bits(train())


def test_other_threads_leave_signals_alone(tmp_path: Path) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(train(tmp_path)))
    thread.start()
    thread.join()
    assert bits(results[0]) == bits(train())


RUN = """
    import sys, os
    sys.path.insert(0, {tests!r})
    from test_checkpoint import *
    def slowly():
        for i, pair in enumerate(stream()):
            time.sleep(0.002)
            yield pair
    def callback(state, metrics):
        print(int(state.step), flush=True)
    state, metrics = train(Path(sys.argv[1]), slowly(), num_outer_steps=int(sys.argv[2]), chunk=10, every=20,
                           callback=callback)
    np.savez(sys.argv[3], **fb.state_to_arrays(state), **{{"metric " + n: x for n, x in metrics.items()}})
"""


def process(*arguments: Any, code: str = RUN) -> subprocess.Popen[str]:
    code = textwrap.dedent(code.format(tests=os.path.dirname(__file__)))
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_exit_codes(tmp_path: Path) -> None:
    """Of processes that are told to end; each says how to go on."""
    runs = {s: process(tmp_path / s.name, 10**6, tmp_path / "no.npz") for s in (signal.SIGTERM, signal.SIGINT)}
    for signum, run in runs.items():
        assert run.stdout is not None
        with run:
            assert int(run.stdout.readline()) == 10
            with pytest.raises(fb.CheckpointError, match="another run is writing its checkpoints to"):
                train(tmp_path / signum.name)
            run.send_signal(signum)
            _, err = run.communicate()
        assert run.returncode in (128 + signum, -signum if signum == signal.SIGINT else 143)  # a shell shows 130
        assert f"train: stopped by {signum.name} after" in err
        assert len(steps_in(tmp_path / signum.name)) >= 1


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    """By hand with FUNCBILEVEL_KILLS=22: as many kills of one run, each at a random moment after its first chunk."""
    kills = int(os.environ.get("FUNCBILEVEL_KILLS", "2"))
    steps = 100 * (kills + 2)
    rng = np.random.default_rng(kills)
    reached: list[int] = []
    while len(reached) < kills:
        run = process(tmp_path / "killed", steps, tmp_path / "killed.npz")
        assert run.stdout is not None
        with run:
            lines = iter(run.stdout.readline, "")
            first = int(next(lines))
            lost = reached[-1] - (first - 10) if reached else 0
            assert lost <= 2 * 20, "more than an interval, and one while which the last checkpoint was being written"
            time.sleep(rng.uniform(0, 0.4))
            run.send_signal(signal.SIGKILL)
            reached.append(([first] + [int(line) for line in lines if line.endswith("\n")])[-1])
        assert run.returncode == -signal.SIGKILL
        assert reached[-1] < steps, "the run was over before it was killed"
    for name in ("killed", "whole"):
        run = process(tmp_path / name, steps, tmp_path / f"{name}.npz")
        _, err = run.communicate()
        assert run.returncode == 0, err
    killed, whole = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("killed", "whole"))
    assert bits(killed) == bits(whole)
    assert len(killed["metric outer_objective"]) == steps


SOAK = """
    import sys
    sys.path.insert(0, {tests!r})
    from test_checkpoint import *
    import logging, psutil
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    steps = int(sys.argv[2])
    used = []
    log = fb.log_jsonl(Path(sys.argv[1]) / "metrics.jsonl", every=100)
    def callback(state, metrics):
        log(state, metrics)
        if state.step == 2000:
            jax.config.update("jax_log_compiles", True)
        if state.step % 1000 == 0:
            used.append(psutil.Process().memory_info().rss)
    directory = Path(sys.argv[1]) / "c"
    _, metrics = train(directory, num_outer_steps=steps, chunk=100, every=500, callback=callback)
    print("memory", used[len(used) // 5], max(used), sum(x.nbytes for x in metrics.values()))
"""


@pytest.mark.slow
def test_soak(tmp_path: Path) -> None:
    """Memory stays flat, but for the metrics, and nothing is compiled again. FUNCBILEVEL_SOAK: how many steps."""
    pytest.importorskip("psutil")
    run = process(tmp_path, os.environ.get("FUNCBILEVEL_SOAK", "10000"), code=SOAK)
    out, err = run.communicate()
    assert run.returncode == 0, err
    assert "Compiling" not in out + err
    first, last, metrics = map(int, out.split("memory")[1].split())
    assert last - metrics <= 1.02 * first, (first, last, metrics)


# Files that are not as they should be.


def damage(pattern: str, change: Callable[[bytes], bytes] | None) -> Callable[[Path], Path]:
    """Changes, or removes, the largest file that matches."""

    def act(directory: Path) -> Path:
        path = max((p for p in directory.glob(pattern) if p.is_file()), key=lambda p: p.stat().st_size)
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()))
        return path

    return act


def flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


def edit(**changes: Any) -> Callable[[bytes], bytes]:
    """A JSON file with other values, under its old checksum."""

    def change(data: bytes) -> bytes:
        whole = json.loads(data)
        whole["body"] |= changes
        return json.dumps(whole).encode()

    return change


NEWEST = "step_12"
HALF = lambda data: data[: len(data) // 2]
GO_BACK = r"to go on from step 8, remove .*step_12"
DAMAGED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a flipped bit in the state": (damage(f"{NEWEST}/state/**/d/*", flip), rf"is damaged .* {GO_BACK}"),
    "a truncated state": (damage(f"{NEWEST}/state/**/d/*", HALF), rf"has \d+ bytes, expected \d+; {GO_BACK}"),
    "an empty file": (damage(f"{NEWEST}/state/_METADATA", lambda _: b""), rf"has 0 bytes, expected \d+; {GO_BACK}"),
    "a missing file": (damage(f"{NEWEST}/state/**/d/*", None), rf"is missing; {GO_BACK}"),
    "a truncated commit": (
        damage(f"{NEWEST}/commit.json", HALF),
        rf"is not a file of fb.train, or is damaged; {GO_BACK}",
    ),
    "another position": (
        damage(f"{NEWEST}/commit.json", edit(position={"done": 3})),
        rf"is damaged \(its checksum differs\); {GO_BACK}",
    ),
    "a commit that is none": (
        damage(f"{NEWEST}/commit.json", lambda _: b"[1]"),
        rf"is not a file of fb.train.*{GO_BACK}",
    ),
    "truncated metrics": (damage("metrics/*08.npz", HALF), "is damaged: .*the metrics of these steps are lost"),
    "flipped metrics": (damage("metrics/*08.npz", flip), "is damaged: .*the metrics of these steps are lost"),
    "missing metrics": (damage("metrics/*08.npz", None), "lacks the metrics of outer steps 4 to 12; put the missing"),
    "a truncated run.json": (damage("run.json", HALF), "is not a file of fb.train, or is damaged; choose another"),
    "a changed run.json": (damage("run.json", edit(format=1, run={})), "is damaged .*choose another directory"),
    "no run.json": (damage("run.json", None), "holds step_12, step_4, step_8 but no run.json: .*did not write"),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("intact")
    train(directory)
    return directory


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_told_and_nothing_is_touched(name: str, intact: Path, tmp_path: Path) -> None:
    act, message = DAMAGED[name]
    directory = tmp_path / "run"
    shutil.copytree(intact, directory)
    path = act(directory)
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    with pytest.raises(fb.CheckpointError, match=message) as caught:
        train(directory, num_outer_steps=16)
    assert str(path if path.exists() and path.name != "run.json" else directory) in str(caught.value)
    assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before
    if GO_BACK in message:  # as it says
        shutil.rmtree(directory / NEWEST)
        assert bits(train(directory)) == bits(train())


def test_an_older_format_is_told(intact: Path, tmp_path: Path) -> None:
    from funcbilevel import _checkpoint

    shutil.copytree(intact, tmp_path / "run")
    _checkpoint._write_json(tmp_path / "run" / "run.json", {"format": 0, "run": {}})
    with pytest.raises(
        fb.CheckpointError, match=r"run.json has format 0, expected 2: .*another version of funcbilevel"
    ):
        train(tmp_path / "run")


def other(**kwargs: Any) -> Callable[[Path], Any]:
    return lambda directory: train(directory, **kwargs)


def with_momentum() -> fb.BilevelSolver:
    return fb.bilevel(
        PROBLEM,
        MODEL,
        ESTIMATORS["funcid-learned"],
        inner_optimizer=optax.sgd(1e-2, momentum=0.9),
        outer_optimizer=optax.adam(0.05),
        inner_steps=2,
    )


def wider() -> Any:
    model = fb.from_function(
        lambda key, x: jnp.zeros((3, 2)), lambda theta, x: jnp.sum(x @ theta, axis=1, keepdims=True)
    )
    return fb.bilevel(
        PROBLEM,
        model,
        ESTIMATORS["funcid-learned"],
        inner_optimizer=optax.adam(1e-2, eps_root=1e-12),
        outer_optimizer=optax.adam(0.05),
        inner_steps=2,
    )


OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "estimator": (
        other(solver=make(ESTIMATORS["aid-cg"])),
        r"the solver was made with funcid\(learned_adjoint\(adam, 2\)\) and is now with aid\(cg\(2, damping=0.1\)\)\.",
    ),
    "optimizer": (other(solver=with_momentum()), r"made with inner_optimizer=adam and is now with inner_optimizer=sgd"),
    "inner steps": (
        other(solver=make(ESTIMATORS["funcid-learned"], inner_steps=3)),
        r"made with inner_steps=2 and is now with inner_steps=3",
    ),
    "learning rate": (
        other(solver=make(ESTIMATORS["funcid-learned"], rate=0.1)),
        r"solver\.init\.outer_optimizer\S*step_size was -0.05 and is now -0.1",
    ),
    "adjoint's rate": (
        other(solver=make(fb.funcid(fb.learned_adjoint(optax.adam(2e-2), 2)))),
        r"solver\.init\.estimator\S*step_size was -0.01 and is now -0.02",
    ),
    "parameters' shape": (other(solver=wider()), r"inner_params was float32\[3, 1\] and is now float32\[3, 2\]"),
    "seed": (lambda d: train(d, state=start(seed=1)), r"the run started from another inner_params; .*another key"),
    "start": (lambda d: train(d, state=start(w=0.6)), r"the run started from another outer_params/w"),
    "kind of data": (other(data=stream()), "data was a function and is now an iterator"),
    "fewer steps": (other(num_outer_steps=8), "has made 12 outer steps, more than num_outer_steps=8; ask for as many"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused(name: str, intact: Path) -> None:
    call, message = OTHERS[name]
    before = sorted(intact.rglob("*"))
    with pytest.raises(fb.CheckpointError, match=message) as caught:
        call(intact)
    assert str(intact) in str(caught.value)
    assert sorted(intact.rglob("*")) == before


def test_other_metrics_are_refused(intact: Path, tmp_path: Path) -> None:
    shutil.copytree(intact, tmp_path / "run")

    def step(*args: Any) -> Any:
        state, metrics = SOLVER.step(*args)
        return state, metrics | {"mine": jnp.float32(0)}

    with pytest.raises(ValueError, match=r"metrics were .* and are now .*mine"):
        train(tmp_path / "run", solver=SOLVER._replace(step=step), num_outer_steps=16)


def test_another_kind_of_iterator_is_refused(tmp_path: Path) -> None:
    train(tmp_path, Seekable(), num_outer_steps=8)
    with pytest.raises(ValueError, match=r"data must be an iterator with get_state and set_state.*got generator"):
        train(tmp_path, stream())


def test_an_iterator_that_is_shorter_than_it_was_is_refused(tmp_path: Path) -> None:
    train(tmp_path, stream(), num_outer_steps=8)
    with pytest.raises(ValueError, match=r"data must have the 8 pairs .* but ended after 5"):
        train(tmp_path, itertools.islice(stream(), 5))


def test_an_iterator_whose_state_no_file_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fb.CheckpointError, match=r"get_state\(\) of data gave what a checkpoint in .* cannot hold"):
        train(tmp_path, Seekable(lambda i: {"f": np.sin, "i": i}))


FOREIGN: dict[str, Callable[[Path], Path]] = {
    "a file": lambda d: ((d / "x").write_text("") and d) or d / "x",
    "below a file": lambda d: ((d / "x").write_text("") and d) or d / "x" / "y",
    "no place to write": lambda d: Path("/proc/funcbilevel"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_directory_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    directory = FOREIGN[name](tmp_path)
    with pytest.raises(
        fb.CheckpointError, match=rf"checkpoints cannot be written to {re.escape(str(directory))}: .*choose"
    ):
        train(directory)


def test_a_directory_without_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(fb.CheckpointError, match=r"cannot be written to .*[Pp]ermission"):
        train(tmp_path)


def test_checkpoints_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "1000").mkdir()
    with pytest.raises(
        fb.CheckpointError, match=r"holds 1000 but no run.json: checkpoints that fb.train did not write"
    ):
        train(tmp_path)


def test_two_runs_cannot_write_to_one_directory(tmp_path: Path) -> None:
    def another(state: Any, metrics: Any) -> None:
        train(tmp_path)

    with pytest.raises(fb.CheckpointError, match="another run is writing its checkpoints to"):
        train(tmp_path, callback=another)
    assert bits(train(tmp_path)) == bits(train())  # the lock went with the run


def test_what_a_killed_process_left_is_swept_up(intact: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(intact, directory)
    shutil.copytree(directory / NEWEST, directory / "step_14")
    (directory / "step_14" / "commit.json").unlink()
    (directory / "metrics" / "000000000014.npz").write_bytes(b"half")
    (directory / "metrics" / "000000000014.npz.tmp").write_bytes(b"half")
    assert bits(train(directory, num_outer_steps=16)) == bits(train(num_outer_steps=16))
    assert not (directory / "step_14").exists()


FULL = """
    import resource, sys
    sys.path.insert(0, {tests!r})
    from test_checkpoint import *
    directory = Path(sys.argv[1])
    def fill(state, metrics):
        if state.step == 8:
            while steps_in(directory) != [4]:
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    try:
        train(directory, callback=fill)
    except fb.CheckpointError as error:
        print(error, "|", error.state.step, len(error.metrics["outer_objective"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(steps_in(directory), bits(train(directory)) == bits(train()))
"""


@pytest.mark.parametrize("room", [0, 900])
def test_a_full_disk(room: int, tmp_path: Path) -> None:
    """The system refuses files beyond a size: at once for orbax, or once the arrays are written."""
    run = process(tmp_path, room, code=FULL)
    out, err = run.communicate()
    assert run.returncode == 0, err
    told, after = out.strip().rsplit("\n", 1)
    assert re.search(rf"train: {tmp_path}/step_8 could not be written: .*[Ff]ile too large", told, re.DOTALL), told
    assert f"Earlier checkpoints stay: {tmp_path}/step_4. Make room there" in told
    assert after == "[4] True"


# Arguments.


def test_checkpoints_by_their_arguments() -> None:
    with pytest.raises(ValueError, match="Checkpoint: every must be at least 1, got 0"):
        fb.Checkpoint("x", every=0)
    with pytest.raises(TypeError, match=r"Checkpoint: keep must be a Python int, got 1.5"):
        fb.Checkpoint("x", keep=1.5)  # pyright: ignore
    with pytest.raises(TypeError, match="Checkpoint: directory must be a path, got int"):
        fb.Checkpoint(3)  # pyright: ignore
    with pytest.raises(TypeError, match=r"train: checkpoint must be fb.Checkpoint\(directory\), got 'x'"):
        fb.train(SOLVER, start(), sample, 1, checkpoint="x")  # pyright: ignore
