"""What every task and benchmark shares: its options, its run directory, and records of results in one schema."""

import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypedDict

import jax

import funcbilevel as fb

if TYPE_CHECKING:
    from rich.table import Table

Track: TypeAlias = Callable[[str, int], Callable[[Any, Mapping[str, Any]], None]]
"""`(label, number of outer steps) -> callback` for `fb.train`: shows one solve's progress."""


class Record(TypedDict):
    """One finished run, as it stands on one line of a JSON Lines file.

    Attributes:
        task, method: names, the same everywhere.
        seed: the seed of its random numbers.
        settings: what it takes to run it again.
        metrics: final scalars; None for one that is not finite.
        seconds: wall-clock time, compilation included.
        versions: of Python and of the packages that decide the numbers.
        machine: kind of machine and of device, without names or paths.
    """

    task: str
    method: str
    seed: int
    settings: dict[str, Any]
    metrics: dict[str, float | None]
    seconds: float
    versions: dict[str, str]
    machine: dict[str, str | int]


def record(
    task: str, method: str, seed: int, settings: Mapping[str, Any], metrics: Mapping[str, Any], seconds: float
) -> Record:
    """A `Record` of this process on this machine; metrics are scalars of any kind."""
    values = {name: float(value) for name, value in metrics.items()}
    return Record(
        task=task,
        method=method,
        seed=seed,
        settings=dict(settings),
        metrics={name: value if math.isfinite(value) else None for name, value in values.items()},
        seconds=round(seconds, 3),
        versions=versions(),
        machine=machine(),
    )


def append(path: Path, result: Record) -> None:
    """Adds one line to a JSON Lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result, allow_nan=False) + "\n")


def read(path: Path) -> Iterator[Record]:
    """The records of a JSON Lines file.

    Raises:
        ValueError: a line is not a record; the message names the file, the line and the keys.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        result: Record = json.loads(line)
        if set(result) != set(Record.__annotations__):
            raise ValueError(
                f"{path}, line {number}: a record has the keys {', '.join(Record.__annotations__)}, "
                f"got {', '.join(result)}."
            )
        yield result


def read_existing(path: Path) -> Iterator[Record]:
    """The records of a JSON Lines file, none if it is not there."""
    return read(path) if path.exists() else iter(())


def settings_key(settings: Mapping[str, Any]) -> str:
    """Settings as a text, the same before they went to a file and after."""
    return json.dumps(settings, sort_keys=True)


def identity(record: Mapping[str, Any]) -> tuple[str, int, str]:
    """What tells a record, or the line of its curves, from others: method, seed and settings."""
    return record["method"], record["seed"], settings_key(record["settings"])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def terminal_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, left: Sequence[str] = ("method",)
) -> "Table":
    """The same for a terminal, numbers flush right: all columns but those named in `left`."""
    from rich import box  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title=title, title_justify="left", padding=(0, 1, 0, 0))
    for name in header:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


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


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    packages = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"python": platform.python_version(), "funcbilevel": fb.__version__} | packages


@cache
def machine() -> dict[str, str | int]:
    """The kind of machine: system, processor, and the device that JAX computes on."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count() or 0,
        "device": jax.devices()[0].device_kind,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
