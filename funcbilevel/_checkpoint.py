"""Checkpoints of `train`: orbax writes the arrays; what belongs to them is checked, committed and pruned here.

<directory>/run.json              which run it is
<directory>/lock                  held by the process that writes
<directory>/metrics/<step>.npz    metrics of the steps since the checkpoint before
<directory>/step_<step>/state/    the state, by orbax
<directory>/step_<step>/commit.json   position and checksums; written last: without it there is no checkpoint
"""

import base64
import contextlib
import dataclasses
import io
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbilevel._arguments import check_number
from funcbilevel._data import Position
from funcbilevel._history import HostMetrics
from funcbilevel._hosts import Processes
from funcbilevel._identity import Identity, differences
from funcbilevel._state import is_key, leaf_name, stored_dtype, with_kind_of
from funcbilevel._typing import PyTree

_FORMAT = 2
_IN_USE: set[Path] = set()


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read, or that is of another run; the message names its path."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where, and how often, `train` saves a run; the same call, made again, goes on from what is there.

    Attributes:
        directory: of this run alone. It is made if it is not there.
        every: outer steps from one checkpoint to the next, >= 1. A chunk that would go beyond one is made shorter.
        keep: how many checkpoints stay, >= 1. Metrics stay all.

    A checkpoint holds the state, the metrics and the position in the data. It is written while the next steps run, and
    counts only once it is whole: a process that is killed loses no more than the steps since the last one, and those
    made while that one was being written.

    Raises:
        TypeError, ValueError: `every` or `keep` is not an int >= 1; `directory` is not a path.

    Example:
        >>> import tempfile
        >>> problem = fb.ParametricProblem(lambda w, u, _: (u - w) ** 2, lambda w, u, _: (u - 1.0) ** 2)
        >>> sgd = optax.sgd(0.1)
        >>> solver = fb.bilevel(problem, None, fb.aid(fb.cg(1)), inner_optimizer=sgd, outer_optimizer=sgd)
        >>> start = solver.init(jax.random.key(0), 0.0, None, 0.0)
        >>> checkpoint = fb.Checkpoint(tempfile.mkdtemp(), every=20)
        >>> half, _ = fb.train(solver, start, lambda key, step: ((), ()), 50, checkpoint=checkpoint)
        >>> state, metrics = fb.train(solver, start, lambda key, step: ((), ()), 100, checkpoint=checkpoint)
        >>> int(half.step), int(state.step), metrics["outer_objective"].shape
        (50, 100, (100,))
    """

    directory: str | os.PathLike[str]
    every: int = 1000
    keep: int = 3

    def __post_init__(self) -> None:
        check_number("Checkpoint", "every", self.every)
        check_number("Checkpoint", "keep", self.keep)
        if not isinstance(self.directory, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Checkpoint: directory must be a path, got {type(self.directory).__name__}.")


class Store:
    """The checkpoints of one run, while it goes on."""

    def __init__(self, checkpoint: Checkpoint, run: Identity, processes: Processes) -> None:
        self.directory = Path(checkpoint.directory).expanduser().resolve()
        self.every = checkpoint.every
        self._keep = checkpoint.keep
        self._processes, self._first = processes, processes.first
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saver: Any = None
        if jax.process_count() > 1 and not processes.several:
            raise ValueError(
                f"train: checkpoint needs a state on a mesh of all {jax.process_count()} processes, got one on devices "
                "of this process alone, which orbax does not write; make the run with fb.data_parallel, or start this "
                "process without jax.distributed."
            )
        self._lock: int | None = None
        try:
            processes.together(lambda: self._recognise(run) if self._first else None)
            processes.together(lambda: None if self._first else self._recognise(run))  # what the first one has made
        except BaseException:
            self._release()
            raise
        self._saved = max(self._shared_steps(), default=0)

    # The directory.

    def _open(self) -> int | None:
        """Makes the directory, and locks it: the lock ends with the process, however that ends."""
        if self.directory in _IN_USE:  # by this process, for which its own locks are none
            raise self._busy()
        try:
            (self.directory / "metrics").mkdir(parents=True, exist_ok=True)
            lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT)
            _write(self.directory / "lock.probe", b"x")
            (self.directory / "lock.probe").unlink()
        except OSError as error:
            raise CheckpointError(
                f"train: checkpoints cannot be written to {self.directory}: {error}; choose another directory."
            ) from error
        try:
            import fcntl  # noqa: PLC0415 (not there on Windows)

            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which workers that are forked do not inherit
        except (BlockingIOError, PermissionError) as error:
            os.close(lock)
            raise self._busy() from error
        except (ImportError, OSError):  # a file system without locks
            pass
        _IN_USE.add(self.directory)
        return lock

    def _busy(self) -> CheckpointError:
        return CheckpointError(
            f"train: another run is writing its checkpoints to {self.directory}; wait for it, or choose another "
            "directory."
        )

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            _IN_USE.discard(self.directory)

    def _recognise(self, run: Identity) -> None:
        """That the directory is new, or holds this run; what a killed process left half-written is removed."""
        if self._first:
            self._lock = self._open()
        path = self.directory / "run.json"
        if not self._first and not path.exists():
            raise CheckpointError(
                f"train: {path} is not there for process {jax.process_index()}, though the first process has written "
                "it; choose a directory that all processes share."
            )
        if not path.exists():
            foreign = sorted(p.name for p in self.directory.iterdir() if p.name not in ("metrics", "lock"))
            if any(name.startswith("step_") or name.isdigit() for name in foreign):
                raise CheckpointError(
                    f"train: {self.directory} holds {', '.join(foreign[:3])} but no run.json: checkpoints that "
                    "fb.train did not write; choose another directory."
                )
            self._guard(path, lambda: _write_json(path, {"format": _FORMAT, "run": run}))
            return
        there = _read_json(path, "choose another directory, or remove this one to start anew")
        if there.get("format") != _FORMAT:
            raise CheckpointError(
                f"train: {path} has format {there.get('format')!r}, expected {_FORMAT}: it is of another version of "
                "funcbilevel; go on with that one, or choose another directory."
            )
        if found := differences(there["run"], run):
            more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
            raise CheckpointError(
                f"train: the checkpoints in {self.directory} are of another run: {'; '.join(found[:5])}{more}. To go "
                "on with that run, call fb.train as it was called; for a new one choose another directory."
            )
        if self._first:
            for folder in self.directory.glob("step_*"):
                if not (folder / "commit.json").exists():
                    shutil.rmtree(folder, ignore_errors=True)
            for rest in (*self.directory.glob("*.tmp"), *self.directory.glob("metrics/*.tmp")):
                rest.unlink(missing_ok=True)

    def _folder(self, step: int) -> Path:
        return self.directory / f"step_{step}"

    def _steps(self) -> list[int]:
        """Steps of the whole checkpoints, in order."""
        commits = self.directory.glob("step_*/commit.json")
        return sorted(int(number) for c in commits if (number := c.parent.name.removeprefix("step_")).isdigit())

    def _shared_steps(self) -> list[int]:
        """The same, as the first process sees them."""
        return self._processes.of_first(self._steps())

    # Reading.

    def drop_last(self, count: int) -> None:
        """Removes so many of the last checkpoints, of which the first of all is the run's start; the oldest stays."""
        self._processes.together(self.wait)
        steps = self._shared_steps()
        newest_left = max(len(steps) - count, 0 if steps and steps[0] <= self.every else 1)
        for step in steps[newest_left:] if self._first else ():
            self._remove(step)
        self._saved = max(steps[:newest_left], default=0)

    def _remove(self, step: int) -> None:
        (self._folder(step) / "commit.json").unlink()  # first: half a checkpoint is none
        shutil.rmtree(self._folder(step), ignore_errors=True)

    def restore(self, like: PyTree, num_outer_steps: int) -> tuple[PyTree, HostMetrics, Position] | None:
        """The last checkpoint, on the devices of `like`; None: there is none yet."""
        if not (steps := self._shared_steps()):
            return None
        step = steps[-1]
        if step > num_outer_steps:
            raise CheckpointError(
                f"train: the run in {self.directory} has made {step} outer steps, more than num_outer_steps="
                f"{num_outer_steps}; ask for as many at least, or choose another directory."
            )
        return self._processes.together(lambda: self._read(steps, like))

    def _read(self, steps: list[int], like: PyTree) -> tuple[PyTree, HostMetrics, Position]:
        """The last of the checkpoints."""
        step = steps[-1]
        folder, earlier = self._folder(step), f"step {steps[-2]}" if len(steps) > 1 else "the start"
        mend = f"to go on from {earlier}, remove {folder}"
        commit = _read_json(folder / "commit.json", mend)
        for name, (size, checksum) in commit["files"].items() if self._first else ():
            _check_file(folder / name, size, checksum, mend)
        arrays = _arrays(like)
        target = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in arrays.items() if a.size
        }
        try:
            read: dict[str, jax.Array] = self._orbax().restore(folder / "state", target) if target else {}
        except Exception as error:
            raise CheckpointError(f"train: {folder / 'state'} cannot be read: {error}; {mend}.") from error
        # What was bound to no device stays so.
        read = {name: x if arrays[name].committed else jnp.array(np.asarray(x)) for name, x in read.items()}
        paths, structure = jax.tree_util.tree_flatten_with_path(like)
        leaves = [with_kind_of(leaf, read.get(name := leaf_name(path), arrays[name])) for path, leaf in paths]
        position = Position(**commit["position"] | {"iterator": _decoded(self._own(commit["iterators"], folder))})
        return jax.tree.unflatten(structure, leaves), self._metrics(step, mend), position

    def _own(self, iterators: list[Any], folder: Path) -> Any:
        """Where this process was in its data: one for all, or one for each."""
        indices = self._processes.indices
        if len(iterators) not in (1, len(indices)):
            raise CheckpointError(
                f"train: {folder} holds the places of {len(iterators)} processes in their data, got {len(indices)} "
                f"processes; go on with {len(iterators)}, or with data that has no get_state."
            )
        return iterators[0] if len(iterators) == 1 else iterators[indices.index(jax.process_index())]

    def _metrics(self, done: int, mend: str) -> HostMetrics:
        """Metrics of all steps up to the checkpoint; those of later ones are removed."""
        pieces: list[HostMetrics] = []
        reached = 0
        for path in sorted((self.directory / "metrics").glob("*.npz")):
            if int(path.stem) > done:
                if self._first:
                    path.unlink(missing_ok=True)
                continue
            try:
                start, piece = _read_metrics(path)
            except Exception as error:  # zip, NumPy and JSON each have their own
                raise CheckpointError(
                    f"train: {path} is damaged: {error}; the metrics of these steps are lost. Choose another "
                    "directory to start anew."
                ) from error
            if start == reached:
                pieces.append(piece)
                reached = int(path.stem)
        if reached != done:
            raise CheckpointError(
                f"train: {self.directory / 'metrics'} lacks the metrics of outer steps {reached} to {done}; put the "
                f"missing file back, or {mend}."
            )
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in (pieces[0] if pieces else ())}

    # Writing.

    def steps_left(self, done: int) -> int:
        """Steps to the next checkpoint."""
        return self.every - done % self.every

    def save(self, state: PyTree, metrics: HostMetrics, position: Position) -> None:
        """Starts to write a checkpoint. `metrics` are those of the whole run, as views."""
        self._processes.together(self.wait)
        step, since = position.done, self._saved
        if step == since:
            return
        folder = self._folder(step)
        iterators = self._processes.gather(self._encode(position.iterator))
        if all(one == iterators[0] for one in iterators):
            iterators = iterators[:1]
        commit = {"position": position._replace(iterator=None)._asdict(), "iterators": iterators}
        # A copy, since the next chunk takes the state's buffers; on other devices than CPUs orbax copies to the host.
        arrays = {name: jnp.copy(a) if _on_cpu(a) else a for name, a in _arrays(state).items() if a.size}
        piece = {name: np.array(values[since:step]) for name, values in metrics.items()}
        self._processes.together(lambda: self._make(folder))
        if arrays:
            self._guard(folder, lambda: self._orbax().save(folder / "state", arrays))
        self._saved = step
        self._thread = threading.Thread(target=self._finish, args=(step, since, piece, commit), daemon=True)
        self._thread.start()

    def _make(self, folder: Path) -> None:
        """Where that cannot be done, all find out; in orbax the others would wait for the first one."""
        if self._first:
            self._guard(folder, lambda: folder.mkdir(exist_ok=True))

    def _finish(self, step: int, since: int, piece: HostMetrics, commit: dict[str, Any]) -> None:
        try:
            self._orbax().wait_until_finished()
            if not self._first:
                return
            folder = self._folder(step)
            _write(self.directory / "metrics" / f"{step:012d}.npz", _metrics_bytes(since, piece))
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            sums = {str(p.relative_to(folder)): [p.stat().st_size, _checksum(p)] for p in files}
            _write_json(folder / "commit.json", commit | {"files": sums})
            for old in self._steps()[: -self._keep]:
                self._remove(old)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Until what is being written is whole; raises what went wrong there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            self._guard(self._folder(self._saved), lambda: _raise(error))

    def close(self, wait: bool = True) -> None:
        """Waits, unless told not to, and lets the directory go."""
        try:
            if wait:
                self.wait()
        finally:
            if wait and self._saver is not None:
                with contextlib.suppress(Exception):  # what it failed to write has been told
                    self._saver.close()
            self._release()

    def _guard(self, path: Path, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:
            stay = ", ".join(str(self._folder(step)) for step in self._steps()[-self._keep :])
            raise CheckpointError(
                f"train: {path} could not be written: {error}. "
                + (f"Earlier checkpoints stay: {stay}. " if stay else "")
                + "Make room there, or write access, and make the same call again."
            ) from error

    def _encode(self, iterator: Any) -> Any:
        try:
            return json.loads(json.dumps(_encoded(iterator)))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"train: get_state() of data gave what a checkpoint in {self.directory} cannot hold ({error}); it must "
                "be made of dicts, lists, numbers, strings, bytes and NumPy arrays."
            ) from error

    def _orbax(self) -> Any:
        if self._saver is None:
            import orbax.checkpoint as ocp  # noqa: PLC0415 (half a second, which only those pay who save)

            indices = self._processes.indices
            among = ocp.options.MultiprocessingOptions(primary_host=indices[0], active_processes=set(indices))
            self._saver = ocp.StandardCheckpointer(multiprocessing_options=among)
        return self._saver


def _raise(error: BaseException) -> None:
    raise error


# States as flat dicts of arrays on devices.


def _arrays(state: PyTree) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {leaf_name(path): jax.random.key_data(leaf) if is_key(leaf) else leaf for path, leaf in leaves}


def _on_cpu(array: jax.Array) -> bool:
    return next(iter(array.sharding.device_set)).platform == "cpu"


# Files. Each is written beside its place and renamed, so that it is there as a whole or not at all.


def _write(path: Path, data: bytes) -> None:
    new = path.with_name(path.name + ".tmp")
    with open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _write_json(path: Path, body: dict[str, Any]) -> None:
    text = json.dumps(body, sort_keys=True)
    _write(path, json.dumps({"checksum": zlib.crc32(text.encode()), "body": body}, indent=1).encode())


def _read_json(path: Path, mend: str) -> dict[str, Any]:
    try:
        whole = json.loads(path.read_bytes())
        body: dict[str, Any] = whole["body"]
        intact = zlib.crc32(json.dumps(body, sort_keys=True).encode()) == whole["checksum"]
    except OSError as error:
        raise CheckpointError(f"train: {path} cannot be read: {error}; {mend}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"train: {path} is not a file of fb.train, or is damaged; {mend}.") from error
    if not intact:
        raise CheckpointError(f"train: {path} is damaged (its checksum differs); {mend}.")
    return body


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _check_file(path: Path, size: int, checksum: int, mend: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"train: {path} is missing; {mend}.")
    if path.stat().st_size != size:
        raise CheckpointError(f"train: {path} has {path.stat().st_size} bytes, expected {size}; {mend}.")
    if _checksum(path) != checksum:
        raise CheckpointError(f"train: {path} is damaged (its checksum differs); {mend}.")


def _metrics_bytes(start: int, metrics: HostMetrics) -> bytes:
    """An npz file; dtypes are kept apart, since NumPy would forget those that are not its own."""
    header = json.dumps({"start": start, "metrics": [[name, str(x.dtype)] for name, x in metrics.items()]})
    buffer = io.BytesIO()
    arrays = {f"a{i}": x.view(stored_dtype(x.dtype)) for i, x in enumerate(metrics.values())}
    np.savez(buffer, header=np.array(header), **arrays)  # pyright: ignore
    return buffer.getvalue()


def _read_metrics(path: Path) -> tuple[int, HostMetrics]:
    with np.load(io.BytesIO(path.read_bytes())) as file:
        header = json.loads(str(file["header"]))
        names = enumerate(header["metrics"])
        return header["start"], {name: file[f"a{i}"].view(jnp.dtype(dtype)) for i, (name, dtype) in names}


# States of iterators as JSON.


def _encoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode()}
    if isinstance(value, tuple):
        return {"__tuple__": [_encoded(x) for x in value]}
    if isinstance(value, np.ndarray):
        data = base64.b64encode(value.tobytes()).decode()
        return {"__array__": data, "dtype": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list):
        return [_encoded(x) for x in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            return {"__items__": [[_encoded(key), _encoded(x)] for key, x in value.items()]}
        return {key: _encoded(x) for key, x in value.items()}
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(x) for x in value]
    if not isinstance(value, dict):
        return value
    if "__bytes__" in value:
        return base64.b64decode(value["__bytes__"])
    if "__tuple__" in value:
        return tuple(_decoded(x) for x in value["__tuple__"])
    if "__items__" in value:
        return {_decoded(key): _decoded(x) for key, x in value["__items__"]}
    if "__array__" in value:
        flat = np.frombuffer(base64.b64decode(value["__array__"]), value["dtype"])
        return flat.reshape(value["shape"]).copy()
    return {key: _decoded(x) for key, x in value.items()}
