"""Names of `_experiment` for the tasks that are not moved yet, and the options that they had. To be deleted."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.machine import machine, versions
from funcbilevel.tasks._experiment.store import Record, record, settings_key
from funcbilevel.tasks._experiment.table import markdown as markdown_table
from funcbilevel.tasks._experiment.table import terminal as terminal_table

__all__ = ["machine", "markdown_table", "record", "settings_key", "terminal_table", "versions"]

Track: TypeAlias = Callable[[str, int], Callable[[Any, Mapping[str, Any]], None]]


def append(path: Path, result: Record) -> None:
    """Adds one line to a JSON Lines file."""
    store.append(path, [result])


def read(path: Path) -> Iterator[Record]:
    """The records of a JSON Lines file."""
    return iter(store.read(path))


def read_existing(path: Path) -> Iterator[Record]:
    """The records of a JSON Lines file, none if it is not there."""
    return iter(store.read(path))


def identity(record: Mapping[str, Any]) -> tuple[str, int, str]:
    """What tells a record, or the line of its curves, from others: method, seed and settings."""
    return record["method"], record["seed"], settings_key(record["settings"])


@dataclass(frozen=True)
class Options:
    """The options that every task has; a task adds its own and `run`."""

    task: ClassVar[str]
    resumable: ClassVar[bool] = False
    """Whether a run may go on in the directory of an earlier one with the same settings."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Options that are no settings: they say where data are, or how many runs there are to be, and a longer run may
    go on from a shorter."""
    seed: int = 0
    """Seed of all random numbers."""
    output_dir: Path | None = None
    """Where the results go, a new or an empty directory. By default runs/<task>-<time>."""
    progress: bool = True
    """Progress bars; where the output is not a terminal, one plain line per finished solve."""

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""

    def run(self, directory: Path, track: Track) -> Any:
        """Writes the results into `directory`; returns what a terminal shows of them."""
        raise NotImplementedError

    def status(self, metrics: Mapping[str, Any]) -> str:
        """What the progress bar says of the metrics that a callback gets."""
        return f"outer objective {metrics['outer_objective'][-1]:.6f}"

    def settings(self) -> dict[str, Any]:
        """The options that decide the numbers."""
        others = ("output_dir", "progress", *self.beside)
        return {name: value for name, value in asdict(self).items() if name not in others}

    def check_counts(self, *names: str) -> None:
        """Raises a ValueError if one of these options is given and below 1."""
        for name in names:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")


def run_directory(options: Options) -> Path:
    """Makes the directory of a new run and writes its config.json.

    Raises:
        FileExistsError: the directory holds something already, and not an earlier part of the same, resumable run.
    """
    directory = options.output_dir or Path("runs") / f"{options.task}-{datetime.now():%Y%m%d-%H%M%S}"
    directory.mkdir(parents=True, exist_ok=True)
    config = json.dumps({"task": options.task} | options.settings(), indent=2) + "\n"
    path = directory / "config.json"
    if any(directory.iterdir()):
        if not options.resumable or not path.exists():
            raise FileExistsError(f"{directory} is not empty; pass another --output-dir.")
        if path.read_text(encoding="utf-8") != config:
            raise FileExistsError(
                f"{directory} holds a run with other settings (its config.json); pass the same ones to go on with it, "
                "or another --output-dir."
            )
    path.write_text(config, encoding="utf-8")
    return directory
