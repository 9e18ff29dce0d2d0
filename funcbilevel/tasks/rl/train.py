"""Training of several seeds together, with a checkpoint to go on from; the runs of the commands and their results."""

import json
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.grid import Track, Unit
from funcbilevel.tasks._experiment.store import Result, Run
from funcbilevel.tasks.rl.environments import ENVIRONMENTS, Environment
from funcbilevel.tasks.rl.methods import CURVES, Setting, settings_of
from funcbilevel.tasks.rl.programs import State, episodes, programs, spread_over

Array: TypeAlias = np.ndarray[Any, Any]
Row: TypeAlias = dict[str, Array]
"""The metrics of one evaluation interval, name -> [seeds]."""
Callback: TypeAlias = Callable[[int, Row], Any]


class Trained(NamedTuple):
    """Seeds that are trained.

    Attributes:
        state: with a leading axis of seeds.
        step: of the environment, at the end of each evaluation interval, [points].
        curves: name -> [seeds, points]: `evaluation_return` at that step, and of the solver's metrics the mean over the
            interval (of flags, whether all are true).
        seconds: it took, with what was made before the checkpoint.
    """

    state: State
    step: Array
    curves: dict[str, Array]
    seconds: float


def keys(seeds: Sequence[int]) -> Any:
    """The random keys of the seeds, [seeds]."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))


def train_seeds(
    environment: Environment,
    method: str,
    setting: Setting,
    seeds: Sequence[int],
    *,
    callback: Callback | None = None,
    checkpoint: Path | None = None,
    checkpoint_interval: float = 60.0,
) -> Trained:
    """Trains all seeds together, spread over the devices; the host comes in between evaluation intervals.

    Args:
        environment: where they act.
        method: a name of `METHODS`.
        setting: shared by all.
        seeds: of the random numbers, one run each.
        callback: called after each interval with the number of its steps and the metrics, name -> [seeds]; and once
            at the beginning, if the checkpoint holds steps made before.
        checkpoint: a file from which to go on, if it exists, and to which the state is saved.
        checkpoint_interval: seconds between saves.

    Raises:
        ValueError: there is no such method, or the steps after the random ones are not whole evaluation intervals.
    """
    if (after := setting.steps - setting.random_steps) <= 0 or after % setting.evaluation_interval:
        raise ValueError(
            f"train_seeds: steps must be random_steps={setting.random_steps} and a multiple of "
            f"evaluation_interval={setting.evaluation_interval}, got {setting.steps}."
        )
    start, compiled = time.monotonic(), programs(environment, method, setting, spread_over(len(seeds)))
    rows: list[Row] = []
    step, state, saved = setting.random_steps, None, start
    if checkpoint is not None and checkpoint.exists():
        like = jax.eval_shape(lambda keys: compiled.chunk(compiled.init(keys), np.int32(0)), keys(seeds))
        before = load(checkpoint, *like)
        if before is not None:
            state, step, rows, start = before.state, before.step, before.rows, start - before.seconds
            if callback is not None:
                callback(step - setting.random_steps, rows[-1])
    if state is None:
        state = compiled.explore(compiled.init(keys(seeds)))
    while step < setting.steps:
        state, metrics = compiled.chunk(state, np.int32(step))
        step += setting.evaluation_interval
        rows.append(jax.tree.map(np.asarray, metrics))
        if callback is not None:
            callback(setting.evaluation_interval, rows[-1])
        if checkpoint is not None and step < setting.steps and time.monotonic() - saved >= checkpoint_interval:
            save(checkpoint, Checkpoint(state, step, rows, time.monotonic() - start))
            saved = time.monotonic()
    steps = setting.random_steps + setting.evaluation_interval * np.arange(1, len(rows) + 1)
    curves = {name: np.stack([row[name] for row in rows], axis=1) for name in rows[-1]}
    return Trained(state, steps, curves, time.monotonic() - start)


# Checkpoints.


class Checkpoint(NamedTuple):
    """Training after `step` steps: its state, the rows so far, and the seconds that they took."""

    state: State
    step: int
    rows: list[Row]
    seconds: float


def save(path: Path, checkpoint: Checkpoint) -> None:
    """All of it in one file, which is complete or the one before."""
    arrays = {f"leaf{i}": np.asarray(_data(x)) for i, x in enumerate(jax.tree.leaves(checkpoint.state))}
    curves = {f"curve/{name}": np.stack([row[name] for row in checkpoint.rows]) for name in checkpoint.rows[-1]}
    everything: Any = arrays | curves | {"step": checkpoint.step, "seconds": checkpoint.seconds}
    store.replace(path, lambda file: np.savez(file, **everything))


def load(path: Path, state: Any, metrics: Any) -> Checkpoint | None:
    """The checkpoint, if it is whole and of these shapes; else None and a warning."""
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            like = jax.tree.leaves(state)
            names = [*(f"leaf{i}" for i in range(len(like))), *(f"curve/{name}" for name in metrics)]
            if {*file.files} != {*names, "step", "seconds"}:
                raise ValueError("other contents")
            leaves = list(_leaves(file, like))
            curves = {name: file[f"curve/{name}"] for name in metrics}
            rows = [{name: values[i] for name, values in curves.items()} for i in range(len(curves[min(curves)]))]
            saved = jax.tree.unflatten(jax.tree.structure(state), leaves)
            return Checkpoint(saved, int(file["step"]), rows, float(file["seconds"]))
    except (EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        text = f"{path} is damaged or of another version ({error}); these runs start anew."
        warnings.warn(text, store.StoreWarning, stacklevel=3)
        return None


def _leaves(file: Any, like: Sequence[Any]) -> Iterator[Any]:
    """The arrays of a checkpoint, keys as keys.

    Raises:
        ValueError: they are not of these shapes.
    """
    for i, shape in enumerate(like):
        data, expected = file[f"leaf{i}"], jax.eval_shape(_data, shape)
        if (data.shape, data.dtype) != (expected.shape, expected.dtype):
            raise ValueError("other shapes")
        yield jax.random.wrap_key_data(jnp.asarray(data)) if data.dtype != shape.dtype else jnp.asarray(data)


def _data(x: Any) -> Any:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


# The runs of the commands.

CHECKPOINT_INTERVAL = 60.0
"""Seconds between two."""


class How(NamedTuple):
    """How a run is made: its setting, and its label on the progress bar."""

    setting: Setting
    label: str


def run(method: str, setting: Setting, seed: int, label: str) -> Run:
    """One run; all seeds of a setting are trained together."""
    return Run(method, seed, settings_of(method, setting), How(setting, label))


def checkpoint_of(directory: Path, unit: Unit) -> Path:
    """The file for the state of a unit's runs, and of no others."""
    (cell,) = unit.cells
    identity = zlib.crc32(json.dumps([store.settings_key(cell.settings), unit.seeds]).encode())
    return directory / f"{cell.method}-{identity:08x}.checkpoint.npz"


def forget(directory: Path, unit: Unit) -> None:
    """Removes the checkpoint of runs that are recorded, and what an interrupted save may have left."""
    path = checkpoint_of(directory, unit)
    for file in (path, *directory.glob(f".{path.name}.*.part")):
        file.unlink(missing_ok=True)


def train(task: str, directory: Path, track: Track, unit: Unit) -> list[Result]:
    """Trains the seeds of a unit of one setting, from its checkpoint if there is one."""
    (cell,), seeds = unit.cells, unit.seeds
    setting, label = cell.how
    environment, bar = ENVIRONMENTS[task](), track(label, setting.steps - setting.random_steps)
    clock = time.perf_counter()

    def callback(steps: int, metrics: Row) -> None:
        nonlocal clock
        rate, clock = steps * len(seeds) / (time.perf_counter() - clock), time.perf_counter()
        means = {name: np.full(steps, np.mean(values)) for name, values in metrics.items()}
        bar(None, means | {"steps_per_second": np.full(steps, rate)})

    trained = train_seeds(
        environment,
        cell.method,
        setting,
        seeds,
        callback=callback,
        checkpoint=checkpoint_of(directory, unit),
        checkpoint_interval=CHECKPOINT_INTERVAL,
    )
    return results(environment, setting, seeds, trained)


def results(environment: Environment, setting: Setting, seeds: Sequence[int], trained: Trained) -> list[Result]:
    """What is recorded of each seed: metrics, and beside them the curves and an episode of the last policy."""
    returns, curves = trained.curves["evaluation_return"], trained.curves
    policies = trained.state.learner.inner_params
    states, lengths = map(np.asarray, episodes(environment, setting.alpha)(policies, keys(seeds)))
    shared = {"seeds_together": len(seeds), "devices": spread_over(len(seeds))}
    flags = [name for name, values in curves.items() if values.dtype == bool]
    made: list[Result] = []
    for i in range(len(seeds)):
        metrics = {name: values[i, -1] for name, values in curves.items()} | shared
        metrics |= {name: np.all(curves[name][i]) for name in flags}
        metrics |= {"return_auc": np.mean(returns[i]), "final_return": final(returns[i])}
        beside = {name: [_short(x) for x in curves[name][i]] for name in CURVES}
        frames = states[i, : min(lengths[i], 300) : 4]
        kinds = {
            "curves": {"step": trained.step.tolist()} | beside,
            "episodes": {"states": [[_short(x) for x in frame] for frame in frames]},
        }
        made.append(Result(metrics, kinds, trained.seconds / len(seeds)))
    return made


def final(returns: Array) -> Any:
    """The mean of the last tenth of the evaluations, [..., points] -> [...]."""
    return np.mean(returns[..., -max(1, returns.shape[-1] // 10) :], axis=-1)


def _short(x: Any) -> float | None:
    return float(f"{x:.4g}") if np.isfinite(x) else None
