"""Finished runs on disk: one JSON line each, added whole or not at all, and found again by its key.

`<name>.jsonl` holds one `Record` per finished run. What is too long for a record, curves for example, stands beside it
in `<name>-<kind>.jsonl`, one line per run under the same key (task, method, seed, settings). It is written first, so
that the record says that the run is complete; a line without its record is left out, and removed by the next writer.

Several processes may write to one directory: each addition takes a lock and looks first whether the run is there.
"""

import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NotRequired, TypedDict

import numpy as np

from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.machine import commit, machine, versions

try:
    import fcntl
except ImportError:  # Windows: then one process at a time
    fcntl = None


class Record(TypedDict):
    """One finished run.

    Attributes:
        task, method: names, the same everywhere.
        seed: the seed of its random numbers.
        settings: what it takes to run it again.
        metrics: final scalars; None for one that is not finite.
        seconds: wall-clock time, compilation included.
        versions: of Python and of the packages that decide the numbers.
        machine: kind of machine and of device, without names or paths.
        commit: hash of the code; records from before it was kept have none.
    """

    task: str
    method: str
    seed: int
    settings: dict[str, Any]
    metrics: dict[str, float | None]
    seconds: float
    versions: dict[str, str]
    machine: dict[str, str | int]
    commit: NotRequired[str]


class Run(NamedTuple):
    """One run to be made.

    Attributes:
        method: its name.
        seed: of its random numbers.
        settings: what a record says of it; tells it from other runs.
        how: whatever the task needs to make it, its settings as Python objects for example.
    """

    method: str
    seed: int
    settings: Mapping[str, Any]
    how: Any = None


class Result(NamedTuple):
    """What a finished run gives.

    Attributes:
        metrics: final scalars of any kind.
        beside: kind -> what stands beside the record, as in `{"curves": {"step": [10, 20], "test_mse": [3.1, 2.2]}}`.
        seconds: of this run; None for an equal share of the time of the runs that were made together.
    """

    metrics: Mapping[str, Any]
    beside: Mapping[str, Mapping[str, Any]] = {}
    seconds: float | None = None


class Store(NamedTuple):
    """The finished runs of one kind in a directory.

    Attributes:
        directory: where the files are.
        task: whose runs they are.
        name: of the kind: "runs", "selection" for example.
    """

    directory: Path
    task: str
    name: str = "runs"

    @property
    def path(self) -> Path:
        """The file of the records."""
        return self.directory / f"{self.name}.jsonl"

    def beside(self, kind: str) -> Path:
        """The file of what stands beside them."""
        return self.directory / f"{self.name}-{kind}.jsonl"


class Key(NamedTuple):
    """What tells a run from others; settings as text, the same before they went to a file and after."""

    task: str
    method: str
    seed: int
    settings: str


class StoreWarning(UserWarning):
    """A line of a file of records was left out: it is empty or cut off."""


# Records and keys.


def plain(value: Any) -> Any:
    """The value as it comes back from JSON: lists for tuples, numbers for NumPy's."""
    return json.loads(json.dumps(value, default=_scalar))


def _scalar(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"settings must be of numbers, texts, lists and dictionaries, got {type(value).__name__}.")


def finite(value: Any) -> Any:
    """The value with None, as in records, for numbers that are not finite; `nan` takes a list of them back."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def settings_key(settings: Mapping[str, Any]) -> str:
    """Settings as text: the order of the names, tuple or list, and 1 or 1.0 make no difference."""

    def canonical(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: canonical(item) for name, item in value.items()}
        if isinstance(value, list):
            return [canonical(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return json.dumps(canonical(plain(settings)), sort_keys=True)


def key_of(line: Mapping[str, Any], task: str = "") -> Key:
    """The key of a record, or of the line beside it; `task` is that of lines which do not say it."""
    return Key(line.get("task", task), line["method"], line["seed"], settings_key(line["settings"]))


def run_key(task: str, run: Run) -> Key:
    """The key that the run's record will have."""
    return Key(task, run.method, run.seed, settings_key(run.settings))


def record(
    task: str, method: str, seed: int, settings: Mapping[str, Any], metrics: Mapping[str, Any], seconds: float
) -> Record:
    """A `Record` of this process on this machine; metrics are scalars of any kind."""
    values = {name: float(value) for name, value in metrics.items()}
    result = Record(
        task=task,
        method=method,
        seed=int(seed),
        settings=plain(settings),
        metrics={name: value if math.isfinite(value) else None for name, value in values.items()},
        seconds=round(seconds, 3),
        versions=versions(),
        machine=machine(),
    )
    return {**result, "commit": commit()} if commit() else result


def values(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a record, NaN for one that is not finite."""
    return {name: math.nan if value is None else value for name, value in record["metrics"].items()}


# Reading.

_KINDS = {
    "task": str,
    "method": str,
    "seed": int,
    "settings": dict,
    "metrics": dict,
    "seconds": (int, float),
    "versions": dict,
    "machine": dict,
    "commit": str,
}
_NEEDED = [name for name in _KINDS if name != "commit"]


def _check_record(line: dict[str, Any]) -> str | None:
    if set(line) - {"commit"} != set(_NEEDED):
        return f"a record has the keys {', '.join(_NEEDED)} and perhaps commit, got {', '.join(line) or 'none'}"
    return _check_kinds(line, list(line))


def _check_beside(line: dict[str, Any]) -> str | None:
    names = ["method", "seed", "settings"]
    if lacking := [name for name in names if name not in line]:
        return f"a line beside a record has the keys {', '.join(names)}, here {', '.join(lacking)} is missing"
    return _check_kinds(line, names)


def _check_kinds(line: dict[str, Any], names: Iterable[str]) -> str | None:
    for name in names:
        if not isinstance(line[name], _KINDS[name]) or isinstance(line[name], bool):
            return f"{name} is {json.dumps(line[name])[:40]}, of another kind than in a record"
    bad = [name for name, value in line.get("metrics", {}).items() if not isinstance(value, (int, float, type(None)))]
    return f"the metric {bad[0]} is no number" if bad else None


class _Content(NamedTuple):
    """What a file holds: its lines as objects and as bytes, and what was left out."""

    lines: list[dict[str, Any]]
    raw: list[bytes]
    dropped: list[str]


def _load(path: Path, check: Callable[[dict[str, Any]], str | None]) -> _Content:
    """The lines of a file; empty ones, runs of NULs and a last line that is cut off are left out."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return _Content([], [], [])
    content = _Content([], [], [])
    pieces = data.split(b"\n")
    texts = [piece.strip(b"\0 \t\r") for piece in pieces]
    last = max((i for i, text in enumerate(texts) if text), default=-1)
    for i, (piece, text) in enumerate(zip(pieces, texts, strict=True)):
        where = f"line {i + 1}"
        if not text:
            if piece or i < len(pieces) - 1:
                content.dropped.append(f"{where} holds {'NULs' if piece.strip() else 'nothing'}")
            continue
        try:
            line = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            if i == last and text.startswith(b"{"):
                content.dropped.append(f"{where} is cut off")
                continue
            raise UserError(f"{path}, {where} is damaged: it is no JSON; {_ADVICE}.") from None
        wrong = check(line) if isinstance(line, dict) else "a record is a JSON object"
        if wrong:
            raise UserError(f"{path}, {where}: {wrong}; {_ADVICE}.")
        content.lines.append(line)
        content.raw.append(text)
    return content


_ADVICE = "remove that line, or move the file away or pass another directory (nothing was changed)"


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _warn(path: Path, dropped: Sequence[str]) -> None:
    if dropped:
        more = f" and {len(dropped) - 3} lines more" if len(dropped) > 3 else ""
        text = f"{path}: {', '.join(dropped[:3])}{more}; left out, and what is missing runs again."
        warnings.warn(text, StoreWarning, stacklevel=4)


def read(path: Path) -> list[Record]:
    """The records of a file, none if it is not there.

    Raises:
        UserError: a line is no record; the message names the file and the line.

    Warns:
        StoreWarning: a line was left out: empty, of NULs, or the last one and cut off.
    """
    content: Any = _load(path, _check_record)
    _warn(path, content.dropped)
    return content.lines


def records(store: Store) -> list[Record]:
    """The finished runs, each once; those of another task in the file are an error."""
    by_key = {key_of(line): line for line in reversed(read(store.path))}
    if others := {key.task for key in by_key} - {store.task}:
        raise UserError(f"{store.path} holds runs of {', '.join(sorted(others))}, not of {store.task}; {_ADVICE}.")
    return [*reversed(by_key.values())]


def beside(store: Store, kind: str) -> dict[Key, dict[str, Any]]:
    """What stands beside the finished runs, by their keys."""
    content, known = _load(path := store.beside(kind), _check_beside), {key_of(line) for line in records(store)}
    _warn(path, content.dropped)
    lines: dict[Key, dict[str, Any]] = {}
    for line in content.lines:
        if (key := key_of(line, store.task)) in known:
            lines.setdefault(key, line)
    return lines


def missing(store: Store, runs: Iterable[Run]) -> list[Run]:
    """Those of the runs that are not finished, each once."""
    done = {key_of(line) for line in records(store)}
    return [run for key, run in {run_key(store.task, run): run for run in runs}.items() if key not in done]


# Writing.

_WRITING = threading.RLock()


@contextmanager
def between_writes(timeout: float = 5.0) -> Generator[None]:
    """Waits until no addition is under way in this process; for who ends it."""
    taken = _WRITING.acquire(timeout=timeout)
    try:
        yield
    finally:
        if taken:
            _WRITING.release()


@contextmanager
def locked(directory: Path) -> Generator[None]:
    """One process and one thread at a time in this directory."""
    with _WRITING, (directory / ".lock").open("ab") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)  # gone with the file, or with the process
        yield


def add(store: Store, results: Sequence[tuple[Run, Result]], seconds: float = 0.0) -> None:
    """Adds finished runs, and what stands beside them, unless they are there.

    Args:
        store: where to.
        results: the runs and what they gave.
        seconds: time of a run whose result does not say its own.
    """
    with locked(store.directory):
        done = {key_of(line) for line in _mended(store.path, _check_record)}
        new = {key: pair for pair in results if (key := run_key(store.task, pair[0])) not in done}
        for kind in dict.fromkeys(kind for _, result in new.values() for kind in result.beside):
            path = store.beside(kind)
            _mended(path, _check_beside, lambda line: key_of(line, store.task) in done)
            heads = [
                ({"task": store.task, "method": run.method, "seed": run.seed, "settings": run.settings}, result)
                for run, result in new.values()
            ]
            append(path, [head | finite(dict(result.beside[kind])) for head, result in heads if kind in result.beside])
        append(
            store.path,
            [
                record(store.task, *run[:3], result.metrics, seconds if result.seconds is None else result.seconds)
                for run, result in new.values()
            ],
        )


def _mended(
    path: Path,
    check: Callable[[dict[str, Any]], str | None],
    belongs: Callable[[dict[str, Any]], bool] = lambda line: True,
) -> list[dict[str, Any]]:
    """The lines that belong there; if there are others, or lines cut off, the file is written anew without them."""
    content = _load(path, check)
    _warn(path, content.dropped)
    kept = [(line, raw) for line, raw in zip(content.lines, content.raw, strict=True) if belongs(line)]
    whole = not content.lines or not content.raw or path.read_bytes().endswith(b"\n")
    if content.dropped or len(kept) < len(content.lines) or not whole:
        replace(path, b"".join(raw + b"\n" for _, raw in kept))
    return [line for line, _ in kept]


def append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Adds lines to a file; if that fails, the file stays as it was."""
    data = "".join(json.dumps(line, allow_nan=False, default=_scalar) + "\n" for line in lines).encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    size = os.fstat(file).st_size
    try:
        for start in range(0, len(data), 1 << 20):
            rest = memoryview(data)[start : start + (1 << 20)]
            while rest:
                rest = rest[os.write(file, rest) :]
        os.fsync(file)
    except BaseException as error:
        os.ftruncate(file, size)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
    finally:
        os.close(file)


def replace(path: Path, data: bytes | Callable[[BinaryIO], Any]) -> None:
    """Writes a file, from bytes or by a function, that is there whole or, if that fails, as it was."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            data(file) if callable(data) else file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        partial.unlink(missing_ok=True)
