"""What a task is to the command line, and what every command does: check, open the directory, work, report."""

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from funcbilevel.tasks._experiment import page, store
from funcbilevel.tasks._experiment import report as _report
from funcbilevel.tasks._experiment.errors import UserError, sentence
from funcbilevel.tasks._experiment.machine import every_core_a_device
from funcbilevel.tasks._experiment.options import Options, open_directory
from funcbilevel.tasks._experiment.progress import interruptible, progress
from funcbilevel.tasks._experiment.report import Report

PAGE = "report.html"


class Task(NamedTuple):
    """A task as the command line sees it.

    Attributes:
        name: in `funcbilevel run <name>`.
        report: `(directory) -> Report`, from the records alone.
        run, compare, fit: the options of these commands; None for those that it has not.
        records: the task's name in records, if it is another.
    """

    name: str
    report: Callable[[Path], Report]
    run: type[Options] | None = None
    compare: type[Options] | None = None
    fit: type[Options] | None = None
    records: str = ""


class Stop(SystemExit):
    """Ends the process with exit code 2, the user's error; the message is printed already."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 2
        print(message, file=sys.stderr)


@contextmanager
def user_errors() -> Generator[None]:
    """What the user can mend becomes one sentence and exit code 2; so do warnings about files of records.

    Ctrl-C ends the process at once: as KeyboardInterrupt it is lost if Python raises it in a callback of JAX.
    """
    with warnings.catch_warnings(), interruptible(lambda: "interrupted."):
        show = warnings.showwarning

        def shown(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, store.StoreWarning):
                print(f"funcbilevel: {message}", file=sys.stderr)
            else:
                show(message, category, *place, **more)

        warnings.showwarning = shown
        try:
            yield
        except UserError as error:
            raise Stop(f"funcbilevel: {error}") from error
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # who reads the output has closed it
            raise SystemExit(1) from None
        except OSError as error:
            raise Stop(f"funcbilevel: {sentence(error)} What was recorded before stays valid.") from error


def execute(task: Task, options: Options, args: Sequence[str]) -> None:
    """Makes the runs that are missing in the output directory, writes the report, and prints it."""
    from rich.console import Console  # noqa: PLC0415

    options.check()
    check_surroundings(options.device, options.spread)
    directory = open_directory(options)
    console = Console(highlight=False)
    there = _count(directory)
    going_on = f", where {there} runs are recorded already" if there else ""
    console.print(f"{options.task}: results go to {directory}{going_on}", soft_wrap=True)
    sys.stdout.flush()
    with interruptible(lambda: _how_to_go_on(options, directory, args)):
        with progress(options.status, options.progress) as track:
            options.work(directory, track)
        made = task.report(directory)
        _report.write(made, directory)
    console.print(made.shown)
    for path in sorted(directory.iterdir()):
        if not path.name.startswith("."):
            console.print(str(path), soft_wrap=True)


def report(tasks: Sequence[Task], directories: Sequence[Path]) -> None:
    """Makes the report of each directory anew from its records, a page of all of it too, and prints it.

    Raises:
        UserError: none is given, or one holds no records, or those of a task that is not there.
    """
    from rich.console import Console  # noqa: PLC0415

    if not directories:
        raise UserError("report needs a directory that `run` or `compare` has written to, for example runs/mine.")
    check_surroundings()
    console, by_name = Console(highlight=False), {task.records or task.name: task for task in tasks}
    for directory in directories:
        name = _report.task_of(directory)
        if name not in by_name:
            raise UserError(f"{directory} holds records of {name}; reports are made of {', '.join(by_name)}.")
        made = by_name[name].report(directory)
        _report.write(made, directory)
        store.replace(directory / PAGE, page.page(made, directory).encode())
        console.print(made.shown)
        for file in sorted((*made.texts, *made.figures, PAGE)):
            console.print(str(directory / file), soft_wrap=True)


def check_surroundings(device: str | None = None, spread: bool = False) -> None:
    """Raises a UserError if JAX or matplotlib would stumble over a variable of the environment."""
    if spread:
        every_core_a_device()
    if device is not None:
        jax.config.update("jax_platforms", device)
    try:
        jax.devices()
    except RuntimeError as error:
        asked = f"--device {device}" if device else f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        reason = str(error).splitlines()[0].partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        raise UserError(
            f"JAX cannot compute with {asked}; pass --device cpu, or unset it. It says: {reason}."
        ) from error
    if backend := os.environ.get("MPLBACKEND"):
        try:
            import matplotlib  # noqa: F401, PLC0415  # pyright: ignore[reportUnusedImport]
        except ValueError as error:
            raise UserError(f"MPLBACKEND={backend} is no backend of matplotlib; unset it, or set it to agg.") from error


def _count(directory: Path) -> int:
    """How many runs are recorded, by the number of their lines."""
    path = directory / "runs.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _how_to_go_on(options: Options, directory: Path, args: Sequence[str]) -> str:
    more = [] if options.output_dir else ["--output-dir", str(directory)]
    command = shlex.join(["funcbilevel", *args, *more])
    return f"interrupted; {_count(directory)} runs are recorded in {directory}. To go on: {command}"
