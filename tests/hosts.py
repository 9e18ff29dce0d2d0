"""What each process of `test_hosts.py` runs: `python hosts.py PROCESS NUMBER PORT DIRECTORY TASK...`."""

import contextlib
import functools
import io
import itertools
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PROCESS, NUMBER, PORT = map(int, sys.argv[1:4]) if __name__ == "__main__" else (0, 1, 0)
if NUMBER > 1:
    jax.distributed.initialize(f"127.0.0.1:{PORT}", NUMBER, PROCESS, heartbeat_timeout_seconds=10)

from test_data_parallel import make  # noqa: E402 (which asks for devices)
from test_sharding import ON_MESH, ROWS, batch, finite_sums  # noqa: E402
from test_stochastic import METHODS, OMEGA, THETA, build  # noqa: E402

import funcbilevel as fb  # noqa: E402

DEVICES = 4


def mesh(*shape: int, names: tuple[str, ...] = ("data",)) -> jax.sharding.Mesh:
    shape = shape or (DEVICES,)
    auto = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, names, devices=jax.devices()[:DEVICES], axis_types=auto)


def whole(i: int) -> Any:
    return jax.tree.map(lambda x: x.astype(np.float64), batch(i))


def own(i: int) -> Any:
    """This process's shard of a batch."""
    return jax.tree.map(lambda x: np.split(x, NUMBER)[PROCESS], whole(i))


@functools.cache
def solver_of(row: str, kind: str) -> fb.BilevelSolver:
    estimator, model = ROWS[row]
    return ON_MESH[kind](make(estimator, None, model), mesh())


def start(solver: fb.BilevelSolver, seed: int = 2) -> fb.BilevelState:
    return solver.init(jax.random.key(seed), {"slope": 0.5}, own(0))


def keep(directory: Path, name: str, state: fb.BilevelState, metrics: Any) -> None:
    arrays: Any = fb.state_to_arrays((state, metrics))
    if PROCESS == 0:
        np.savez(directory / f"{name}.npz", **arrays)


def rows(directory: Path, *kinds: str) -> None:
    """Two steps of every row of `test_sharding.py`."""
    for kind, row in itertools.product(kinds or ON_MESH, ROWS):
        solver = solver_of(row, kind)
        state, _ = solver.step(start(solver), own(0), own(5))
        state, metrics = solver.step(state, own(1), own(6))
        keep(directory, f"{kind} {row}", state, metrics)


def stochastic(directory: Path) -> None:
    """Two steps of every stochastic method, each process with its share of the samples of each block."""
    share = lambda x: np.split(x.reshape(-1, 8, *x.shape[1:]), NUMBER, axis=1)[PROCESS]
    inner, outer = (fb.FiniteSum(jax.tree.map(share, t), jax.random.key(i), False) for i, t in enumerate(finite_sums()))
    for name in METHODS:
        solver = fb.data_parallel(build(name), mesh())
        state = solver.init(jax.random.key(1), OMEGA, inner, THETA, outer)
        state, _ = solver.step(state, inner, outer)
        keep(directory, f"stochastic {name}", *solver.step(state, inner, outer))


# Training.

SOLVER = "aid-cg"


def pairs(first: int = 0) -> Iterator[Any]:
    return ((own(i), own(-i % 7)) for i in itertools.count(first))


def train(data: Any, steps: int = 7, kind: str = "data_parallel", **options: Any) -> Any:
    solver = solver_of(SOLVER, kind)
    options = {"chunk": 3, "progress": False} | options
    return fb.train(solver, start(solver), data, steps, **options)


def training(directory: Path, *kinds: str) -> None:
    """Each process with its own shard of an iterator's batches."""
    for kind in kinds or ON_MESH:
        keep(directory, f"iterator {kind}", *train(pairs(), kind=kind, prefetch=True))


def sample(key: Any, step: Any) -> Any:
    x = jax.random.normal(key, (64, 3))
    b = (x, jnp.sin(jnp.sum(x, axis=1, keepdims=True)), jnp.full((64, 1), 1.5))
    return b, b


def sampling(directory: Path) -> None:
    keep(directory, "sampler", *train(sample))
    blocks = fb.finite_sum(whole(3), 16)
    keep(directory, "bound", *train(jax.tree_util.Partial(lambda blocks, key, step: (blocks, blocks), blocks)))


def sources(directory: Path) -> None:
    """Steps on whatever may stand for a batch."""
    solver = solver_of(SOLVER, "data_parallel")
    draws = fb.Sampler(jax.tree_util.Partial(lambda key: sample(key, 0)[0]))
    blocks = fb.FiniteSum(
        jax.tree.map(lambda x: np.split(x.reshape(4, 16, -1), NUMBER, 1)[PROCESS], whole(3)), jax.random.key(0), False
    )
    several = fb.Minibatches(jax.tree.map(lambda *xs: np.stack(xs), *(own(i) for i in range(3))))
    for name, source in {"draws": draws, "blocks": blocks, "several": several}.items():
        keep(directory, name, *solver.step(start(solver), source, own(1)))
    batches = jax.tree.map(lambda *xs: np.stack(xs), *(own(i) for i in range(3)))
    keep(directory, "run", *solver.run(start(solver), batches, batches))
    keep(directory, "run of draws", *solver.run(start(solver), draws, batches))


def seeds(directory: Path) -> None:
    """Each process has the half of the seeds, and all samples."""
    one = make(ROWS[SOLVER][0], None, ROWS[SOLVER][1])
    many = one._replace(
        init=jax.vmap(one.init, in_axes=(0, None, None, None, None)),
        step=jax.vmap(one.step),
    )
    solver = fb.data_parallel(many, mesh(2, 2, names=("seed", "data")), seeds="seed")
    mine = [i for i in range(4) if NUMBER == 1 or i // 2 == PROCESS]
    each = jax.tree.map(lambda *xs: np.stack(xs), *(whole(i) for i in mine))
    state = many.init(jax.random.split(jax.random.key(2), 4), {"slope": 0.5}, whole(0), None, None)
    keep(directory, "seeds", *fb.train(solver, state, itertools.repeat((each, each)), 4, chunk=2, progress=False))


def checkpoints(directory: Path) -> None:
    """Five steps and a checkpoint, for others to go on from."""
    for kind in ON_MESH:
        checkpoint = fb.Checkpoint(directory / f"checkpoint {kind}", every=2)
        keep(directory, f"checkpointed {kind}", *train(pairs(), 5, kind, checkpoint=checkpoint))


def resumed(directory: Path) -> None:
    for kind in ON_MESH:
        checkpoint = fb.Checkpoint(directory / f"checkpoint {kind}", every=2)
        keep(directory, f"resumed {kind}", *train(pairs(), 9, kind, checkpoint=checkpoint))


# What one process alone decides. Each case gives what this process has seen.


class Counting:
    """An iterator whose place differs from process to process."""

    def __init__(self) -> None:
        self.at = 100 * PROCESS

    def __iter__(self) -> "Counting":
        return self

    def __next__(self) -> Any:
        self.at += 1
        return own(self.at), own(self.at)

    def get_state(self) -> dict[str, int]:
        return {"at": self.at}

    def set_state(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def error_of(run: Callable[[], Any]) -> str:
    try:
        run()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def callback_ends(directory: Path) -> Any:
    state, _ = train(pairs(), 9, callback=lambda state, metrics: PROCESS == NUMBER - 1 and bool(state.step >= 6))
    return int(state.step)


def data_ends(directory: Path) -> Any:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        state, _ = train(itertools.islice(pairs(), 20 - 15 * PROCESS), 9)
    return [int(state.step), [str(w.message) for w in told]]


def data_fails(directory: Path) -> Any:
    def data() -> Iterator[Any]:
        yield from itertools.islice(pairs(), 20 - 16 * PROCESS)
        raise OSError("the disk is gone")

    return error_of(lambda: train(data(), 9))


def callback_fails(directory: Path) -> Any:
    return error_of(lambda: train(pairs(), 9, callback=lambda state, metrics: 1 / (1 - PROCESS)))


def shapes_differ(directory: Path) -> Any:
    short = jax.tree.map(lambda x: x[: 16 * (2 - PROCESS)], own(0))
    return error_of(lambda: train(itertools.repeat((short, short)), 9))


def uneven(directory: Path) -> Any:
    short = jax.tree.map(lambda x: x[:31], own(0))
    return error_of(lambda: train(itertools.repeat((short, short)), 9))


def starts_differ(directory: Path) -> Any:
    return error_of(lambda: start(solver_of(SOLVER, "data_parallel"), seed=PROCESS))


def nan_of_one(directory: Path) -> Any:
    def data() -> Iterator[Any]:
        for i, (inner, outer) in enumerate(pairs()):
            yield inner, (outer[0], outer[1] * (np.nan if PROCESS and i == 4 else 1.0), outer[2])

    return error_of(lambda: train(data(), 9))


def rolls_back(directory: Path) -> Any:
    def data() -> Iterator[Any]:
        for i, (inner, outer) in enumerate(pairs()):
            yield inner, (outer[0], outer[1] * (np.nan if PROCESS and i == 4 else 1.0), outer[2])

    one = make(ROWS[SOLVER][0], None, ROWS[SOLVER][1])
    smaller = fb.Rollback(2, solver=lambda scale: fb.data_parallel(one, mesh()))
    checkpoint = fb.Checkpoint(directory / "rollback", every=3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        state, metrics = train(data(), 9, on_nonfinite=smaller, checkpoint=checkpoint)
    return [int(state.step), metrics["step_scale"].tolist(), len(told)]


def terminated(directory: Path) -> Any:
    """SIGTERM to one of them; the same call goes on to what a run in one piece gives."""

    def terminate(state: Any, metrics: Any) -> None:
        if PROCESS == NUMBER - 1 and state.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    def run(callback: Any = None) -> Any:
        checkpoint = fb.Checkpoint(directory / "terminated", every=100)
        return train(Counting(), 9, callback=callback, checkpoint=checkpoint)

    with contextlib.redirect_stderr(io.StringIO()) as printed:
        ended = error_of(lambda: run(terminate))
        state, metrics = run()
    expected, whole_run = train(Counting(), 9)
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), metrics, whole_run)
    return [ended, printed.getvalue().splitlines(), all(same.values()), bool(jnp.all(state.step == expected.step))]


def logged(directory: Path) -> Any:
    """Who writes, and who shows what."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        train(pairs(), callback=fb.log_jsonl(directory / f"{PROCESS}.jsonl"), progress=True)
    return [(directory / f"{PROCESS}.jsonl").exists(), bool(printed.getvalue())]


def cannot_write(directory: Path) -> Any:
    """The place of the second checkpoint is taken."""

    def take(state: Any, metrics: Any) -> None:
        if PROCESS == 0 and state.step == 6:
            (directory / "taken" / "step_6").write_text("", encoding="utf-8")

    checkpoint = fb.Checkpoint(directory / "taken", every=3)
    return error_of(lambda: train(pairs(), 9, callback=take, checkpoint=checkpoint))


def cannot_commit(directory: Path) -> Any:
    """The first process alone fails, after all have written their parts."""

    def remove(state: Any, metrics: Any) -> None:
        there = directory / "uncommitted"
        if PROCESS == 0 and state.step == 6:
            while not (there / "step_3" / "commit.json").exists():
                time.sleep(0.01)
            shutil.rmtree(there / "metrics")

    checkpoint = fb.Checkpoint(directory / "uncommitted", every=3)
    return error_of(lambda: train(pairs(), 9, callback=remove, checkpoint=checkpoint))


def busy(directory: Path) -> Any:
    """The first process alone sees that the directory is locked."""
    checkpoint = fb.Checkpoint(directory / "busy")

    def again(state: Any, metrics: Any) -> None:
        train(pairs(), 9, checkpoint=checkpoint)

    return error_of(lambda: train(pairs(), 9, callback=again, checkpoint=checkpoint))


def of_its_own(directory: Path) -> Any:
    """A run of each process alone, of which the others have no part; it can have no checkpoint."""
    solver = make(ROWS[SOLVER][0], None, ROWS[SOLVER][1])
    state = solver.init(jax.random.key(PROCESS), {"slope": 0.5}, whole(0))
    log = fb.log_jsonl(directory / f"own {PROCESS}.jsonl")
    state, _ = fb.train(solver, state, sample, 4 + 2 * PROCESS, chunk=2, progress=False, callback=log)
    refused = error_of(lambda: fb.train(solver, state, sample, 4, checkpoint=fb.Checkpoint(directory / "own")))
    return [int(state.step), (directory / f"own {PROCESS}.jsonl").exists(), refused]


def killed(directory: Path, which: str = "1") -> None:
    """One of them is killed without a word."""

    def kill(state: Any, metrics: Any) -> None:
        if which == str(PROCESS) and state.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint = fb.Checkpoint(directory / "killed", every=3)
    keep(directory, "killed", *train(pairs(), 12, callback=kill, chunk=1, checkpoint=checkpoint))


CASES = (
    *(callback_ends, data_ends, data_fails, callback_fails, shapes_differ, uneven, starts_differ, nan_of_one),
    *(rolls_back, terminated, logged, cannot_write, cannot_commit, busy, of_its_own),
)


def cases(directory: Path, *names: str) -> None:
    for case in CASES:
        if not names or case.__name__ in names:
            seen = case(directory)
            (directory / f"{case.__name__}.{PROCESS}.json").write_text(json.dumps(seen))
            print(PROCESS, case.__name__, seen, file=sys.stderr, flush=True)


def run(task: str, directory: Path) -> None:
    """A task, by its name and arguments: `name:argument:argument`."""
    name, *arguments = task.split(":")
    globals()[name](directory, *arguments)


if __name__ == "__main__":
    for task in sys.argv[5].split(";"):
        run(task, Path(sys.argv[4]))
