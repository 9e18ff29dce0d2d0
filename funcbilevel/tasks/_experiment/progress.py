"""Progress on stderr, and an end by Ctrl-C that loses nothing."""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.grid import Track

Status = Callable[[Mapping[str, Any]], str]


@contextmanager
def progress(status: Status, shown: bool = True) -> Generator[Track]:
    """One bar per solve on a terminal, else one plain line per finished solve.

    Args:
        status: what to say of the metrics that a callback gets.
        shown: whether to show anything.
    """
    from rich.console import Console  # noqa: PLC0415

    console = Console(stderr=True, highlight=False)
    if not shown:
        yield lambda label, total: lambda state, metrics: None
    elif console.is_terminal:
        with _foreign_output_kept() as stream:
            yield from _bars(Console(file=stream, highlight=False, force_terminal=True), status)
    else:
        yield _lines(console, status)


def _lines(console: Any, status: Status) -> Track:
    """One line when a solve is finished."""

    def track(label: str, total: int) -> Callable[[Any, Mapping[str, Any]], None]:
        start, first, done = time.perf_counter(), 0.0, 0

        def callback(state: Any, metrics: Mapping[str, Any]) -> None:
            nonlocal done, first
            del state
            first = first or time.perf_counter() - start
            done += len(metrics["outer_objective"])
            if done >= total:
                seconds = (
                    f"{time.perf_counter() - start:.1f} s ({first:.1f} s until the first steps were compiled and done)"
                )
                console.print(f"{label:<17} {total} outer steps, {status(metrics)}, {seconds}", soft_wrap=True)

        return callback

    return track


def _bars(console: Any, status: Status) -> Generator[Track]:
    """A bar; until the first steps are done it says what is compiled, and for how long."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    class Status(TextColumn):
        def render(self, task: Any) -> Text:
            waiting = f"compiling {task.description.strip()}, {task.elapsed or 0:.0f} s"
            return Text(waiting if task.completed == 0 else task.fields["status"])

    bars = Progress(
        TextColumn("{task.description:<17}", markup=False),
        BarColumn(20),
        MofNCompleteColumn(),
        Status(""),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )

    def track(label: str, total: int) -> Callable[[Any, Mapping[str, Any]], None]:
        bar = bars.add_task(label, total=total, status="")

        def callback(state: Any, metrics: Mapping[str, Any]) -> None:
            del state
            bars.update(bar, advance=len(metrics["outer_objective"]), status=status(metrics))

        return callback

    with bars:
        yield track


@contextmanager
def _foreign_output_kept() -> Generator[Any]:
    """Yields a stream to the terminal, and keeps what others write to file descriptor 2 until the end.

    XLA writes there past Python, in the middle of a live table. Its alarm on slow compilation, which the bars tell
    better, is left out.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as kept, os.fdopen(terminal, "w", encoding="utf-8", closefd=True) as stream:
        os.dup2(kept.fileno(), 2)
        try:
            yield stream
        finally:
            sys.stderr.flush()
            stream.flush()
            os.dup2(terminal, 2)
            kept.seek(0)
            os.write(2, without_alarms(kept.read()))


def without_alarms(output: bytes) -> bytes:
    """What was written to stderr less XLA's alarms on slow operations."""
    lines = output.splitlines(keepends=True)
    kept: list[bytes] = []
    alarm = False
    for line in lines:
        if b"slow_operation_alarm" in line:
            alarm = True
        elif not (
            alarm
            and (
                not line.strip()
                or line.startswith((b"*", b"Constant folding", b"This isn't", b"The op"))
                or b"Very slow compile" in line
                or b"XLA_FLAGS" in line
            )
        ):
            alarm = False
            kept.append(line)
    return b"".join(kept)


# Ctrl-C.


@contextmanager
def interruptible(message: Callable[[], str]) -> Generator[None]:
    """Ctrl-C, at any time, prints one line and ends the process with exit code 130.

    Python's own handler waits until the compiler comes back, and then takes the interpreter apart while XLA's threads
    still compute. Here a thread that the signal wakes waits for the end of an addition to the store, restores the
    terminal and ends the process at once.

    Args:
        message: what to print: what is recorded and how to go on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    previous = signal.signal(signal.SIGINT, lambda number, frame: None)
    wakeup = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    terminal = os.dup(2)

    def watch() -> None:
        while signals := os.read(readable, 64):
            if signal.SIGINT in signals:
                with store.between_writes():
                    _end(terminal, message)

    threading.Thread(target=watch, name="interrupt", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, previous)
        os.close(writable)  # ends the thread


def _end(terminal: int, message: Callable[[], str]) -> None:
    """Prints to the terminal as it was before progress was shown, and ends the process without its clean-up."""
    with suppress(Exception):
        show_cursor = b"\r\x1b[J\x1b[?25h" if os.isatty(terminal) else b""
        os.write(terminal, show_cursor + f"funcbilevel: {message()}\n".encode())
    os._exit(130)
