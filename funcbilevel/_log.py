"""Metrics of a run in files that grow while it goes on: callbacks of `train`."""

import json
import math
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from funcbilevel._arguments import check_number
from funcbilevel._history import HostMetrics
from funcbilevel._hosts import Processes, devices_of
from funcbilevel._typing import PyTree

Log: TypeAlias = Callable[[PyTree, HostMetrics], None]


def log_jsonl(path: str | os.PathLike[str], every: int = 1) -> Log:
    """A callback of `train` that writes metrics to a file of JSON lines.

    One object a line, and one line a step: `{"step": 12, "outer_objective": 0.5, ...}`, with all metrics under their
    names, numbers or booleans; lists of them, one for each seed, under vmap; NaN and infinities as the strings "NaN",
    "Infinity" and "-Infinity", which `float` reads and JSON lacks numbers for. The lines of a chunk are written at once
    and flushed, so that one can read while the run goes on; what follows the last newline is still being written.

    A file that is there is gone on with. Where the run goes back, to a checkpoint after a kill or by a `Rollback`, the
    lines of steps that are made anew are removed first: the file has each step once, in order.

    Arguments:
        path: of the file. Its directory is made if it is not there.
        every: only steps that are a multiple of it.

    Returns:
        The callback `(state, metrics) -> None`. Of the processes of a run the first one writes.

    Raises:
        TypeError, ValueError: `every` is not an int >= 1. When it is called: the file holds something else.
        OSError: when it is called, the file cannot be written.

    Example:
        >>> import tempfile
        >>> problem = fb.ParametricProblem(lambda w, u, _: (u - w) ** 2, lambda w, u, _: (u - 1.0) ** 2)
        >>> sgd = optax.sgd(0.1)
        >>> solver = fb.bilevel(problem, None, fb.aid(fb.cg(1)), inner_optimizer=sgd, outer_optimizer=sgd)
        >>> start = solver.init(jax.random.key(0), 0.0, None, 0.0)
        >>> path = tempfile.mkdtemp() + "/metrics.jsonl"
        >>> _ = fb.train(solver, start, lambda key, step: ((), ()), 30, callback=fb.log_jsonl(path, every=10))
        >>> import json
        >>> with open(path) as file:
        ...     [json.loads(line)["step"] for line in file]
        [0, 10, 20]
    """
    check_number("log_jsonl", "every", every)
    path = Path(path)
    reached: list[int] = []  # the step after the last chunk; empty: not begun

    def callback(state: PyTree, metrics: HostMetrics) -> None:
        first, steps = _steps(state, metrics, every)
        if not Processes(devices_of(state)).first:
            return
        if reached != [first]:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut(path, first)
        columns = [_column(values[[step - first for step in steps]]) for values in metrics.values()]
        names = ["step", *metrics]
        lines = [json.dumps(dict(zip(names, row))) + "\n" for row in zip(steps, *columns)]
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(lines))
        reached[:] = [first + _length(metrics)]

    return callback


def log_tensorboard(directory: str | os.PathLike[str], every: int = 1) -> Log:
    """A callback of `train` that writes metrics for TensorBoard; needs tensorboardX: `pip install funcbilevel[log]`.

    Each metric is a scalar under its name; under vmap `<name>/<seed>`. What a chunk brings is flushed. Where the run
    goes back, TensorBoard is told to forget the steps that are made anew.

    Arguments:
        directory: for the event files; `tensorboard --logdir` of it, or of its parent, shows them.
        every: only steps that are a multiple of it.

    Returns:
        The callback `(state, metrics) -> None`. Of the processes of a run the first one writes.

    Raises:
        ImportError: tensorboardX is not installed.
        TypeError, ValueError: `every` is not an int >= 1.

    Example:
        >>> log = fb.log_tensorboard("runs/first", every=10)  # doctest: +SKIP
        >>> state, metrics = fb.train(solver, start, data, 1000, callback=log)  # doctest: +SKIP
    """
    check_number("log_tensorboard", "every", every)
    try:
        # Its SummaryWriter hands events to a thread, for which its flush does not wait.
        from tensorboardX.event_file_writer import EventsWriter  # noqa: PLC0415
        from tensorboardX.proto import event_pb2, summary_pb2  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "log_tensorboard: needs tensorboardX; install it with pip install tensorboardX, or log by fb.log_jsonl."
        ) from error
    proto: Any = event_pb2
    scalar: Any = summary_pb2.Summary.Value  # pyright: ignore
    prefix = Path(directory) / "events"
    reached: list[int] = []  # as in log_jsonl
    writers: list[Any] = []

    def write(step: int, **what: Any) -> None:
        writers[-1].write_event(proto.Event(wall_time=time.time(), step=step, **what))

    def callback(state: PyTree, metrics: HostMetrics) -> None:
        first, steps = _steps(state, metrics, every)
        if not Processes(devices_of(state)).first:
            return
        if not writers:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            writers.append(EventsWriter(str(prefix), f".{os.getpid()}.{time.time_ns()}"))
            weakref.finalize(callback, writers[-1].close)
        if reached != [first]:
            write(first, session_log=proto.SessionLog(status=proto.SessionLog.START))  # forget this step and later ones
        for step in steps:
            values = [(tag, x[step - first]) for name, x in metrics.items() for tag, x in _curves(name, x)]
            write(step, summary=summary_pb2.Summary(value=[scalar(tag=tag, simple_value=x) for tag, x in values]))  # pyright: ignore
        writers[-1].flush()
        reached[:] = [first + _length(metrics)]

    return callback


def _curves(name: str, values: np.ndarray[Any, Any]) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """A metric's values over the steps, for each seed."""
    rows = values.reshape(len(values), -1)
    return [(name if values.ndim == 1 else f"{name}/{seed}", rows[:, seed]) for seed in range(rows.shape[1])]


def _length(metrics: HostMetrics) -> int:
    return len(next(iter(metrics.values())))


def _steps(state: PyTree, metrics: HostMetrics, every: int) -> tuple[int, list[int]]:
    """The first step of a chunk, and those of it that are logged."""
    end = int(np.max(state.step))
    first = end - _length(metrics)
    return first, list(range(-(-first // every) * every, end, every))


def _column(values: np.ndarray[Any, Any]) -> list[Any]:
    """What JSON can hold of a metric's values: one item a step."""
    if values.dtype == np.bool_ or np.issubdtype(values.dtype, np.integer):
        return values.tolist()
    exact = values.astype(np.float64)
    return exact.tolist() if np.isfinite(exact).all() else _named(exact.tolist())


def _named(value: Any) -> Any:
    if isinstance(value, list):
        return [_named(x) for x in value]  # pyright: ignore[reportUnknownVariableType]
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _cut(path: Path, first: int) -> None:
    """Removes the lines of step `first` and after, and a last line that a killed process left unfinished."""
    if not path.exists():
        return
    keep = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n") or _step_of(line, path) >= first:
                break
            keep += len(line)
    if keep < path.stat().st_size:
        os.truncate(path, keep)


def _step_of(line: bytes, path: Path) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"log_jsonl: {path} has a line that is not of such a log: {line[:60].decode(errors='replace')!r}; choose "
            "another path."
        ) from error
