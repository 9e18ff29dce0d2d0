"""The options that every command has, checked before anything is made; a task adds its own and `work`."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from funcbilevel.tasks._experiment import methods as _methods
from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.errors import UserError, sentence
from funcbilevel.tasks._experiment.grid import Track
from funcbilevel.tasks._experiment.methods import Methods

LARGEST = 2**31 - 1
RUNS = Path("runs")


@dataclass(frozen=True)
class Options:
    """What every command takes.

    A run goes on in the directory of an earlier one with the same settings: what is recorded there is not made again.
    """

    task: ClassVar[str]
    """As in records."""
    table: ClassVar[Methods] = {}
    """The task's methods."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Options that are no settings: they say where data are, or how many runs there are to be. A run with others may
    go on in the same directory."""
    counts: ClassVar[tuple[str, ...]] = ()
    """Options that must be at least 1; those of base classes are checked, too."""
    not_negative: ClassVar[tuple[str, ...]] = ()
    """Options that must be at least 0, likewise."""
    spread: ClassVar[bool] = False
    """Whether runs are spread over devices: a CPU's cores then count as devices."""
    seed: int = 0
    """Seed of all random numbers."""
    output_dir: Path | None = None
    """Results: their directory, new, empty, or of an earlier run with the same settings, which then goes on. By
    default runs/<task>-<time>."""
    resume: bool = False
    """Go on with the newest directory runs/<task>-<time> that has the same settings, instead of a new one."""
    device: str | None = None
    """Device to compute on: cpu, gpu or tpu. By default the fastest that JAX finds."""
    progress: bool = True
    """Progress bars; where the output is not a terminal, one plain line per finished solve."""

    def check(self) -> None:
        """Raises a UserError that names an option out of range; a task's own `check` calls this one first."""
        check_values(self)

    def work(self, directory: Path, track: Track) -> None:
        """Makes the runs that the directory lacks."""
        raise NotImplementedError

    def status(self, metrics: Mapping[str, Any]) -> str:
        """What the progress bar says of the metrics that a callback gets."""
        return f"outer objective {metrics['outer_objective'][-1]:.6f}"

    def settings(self) -> dict[str, Any]:
        """The options that decide the numbers, as config.json has them."""
        others = ("output_dir", "progress", "device", "resume", *self.beside)
        return {name: value for name, value in asdict(self).items() if name not in others}

    def check_sample_size(self, name: str) -> None:
        """Raises a UserError unless the option, if it is given, has two halves of at least ten."""
        if (n := getattr(self, name)) is not None and (n < 20 or n % 2):
            raise UserError(f"{flag(name)} must be even and at least 20, got {n}.")


@dataclass(frozen=True)
class Seeded(Options):
    """What a command with several seeds takes besides."""

    beside = ("seed", "seeds")
    counts = ("seeds",)
    seeds: int = 5
    """Number of seeds, from --seed on."""

    def check(self) -> None:
        """Raises a UserError that names an option out of range."""
        super().check()
        if self.seed + self.seeds - 1 > LARGEST:
            raise UserError(f"--seed plus --seeds must be at most {LARGEST}, got {self.seed} and {self.seeds}.")

    @property
    def all_seeds(self) -> range:
        """The seeds."""
        return range(self.seed, self.seed + self.seeds)


@dataclass(frozen=True)
class Sweep(Seeded):
    """What a command with several methods and seeds takes besides; `methods` is given its default by the task."""

    beside = (*Seeded.beside, "methods")
    methods: tuple[str, ...] = ()
    """Methods to run; table and figure show all that the output directory holds."""

    def check(self) -> None:
        """Raises a UserError that names an option out of range."""
        super().check()
        _methods.resolve_all("--methods", self.table, self.methods)

    @property
    def all_methods(self) -> tuple[str, ...]:
        """The names of the methods."""
        return _methods.resolve_all("--methods", self.table, self.methods)


def flag(name: str) -> str:
    """The option as it is given on the command line."""
    return f"--{name.replace('_', '-')}"


def check_values(options: Options) -> None:
    """What holds for every option of every task.

    Raises:
        UserError: a number is not finite, too large or too small, a seed is negative, there is no such file, a text
            stands twice in a list, or a list is empty whose default is not.
    """
    for field in fields(options):
        name, value = field.name, getattr(options, field.name)
        several = isinstance(value, tuple)
        for item in value if several else (value,):
            if isinstance(item, float) and not math.isfinite(item):
                raise UserError(f"{flag(name)} must be a finite number, got {item}.")
            if isinstance(item, int) and abs(item) > LARGEST:
                raise UserError(f"{flag(name)} must be at most {LARGEST}, got {item}.")
        if several:
            texts = [item for item in value if isinstance(item, str)]
            if len(set(texts)) < len(texts):
                raise UserError(f"{flag(name)} must name each once, got {', '.join(texts)}.")
            if not value and field.default:
                raise UserError(f"{flag(name)} must name at least one, got none.")
        if isinstance(value, Path) and name != "output_dir" and not value.exists():
            raise UserError(f"{flag(name)}: there is no {value}.")
    for low, kind in enumerate(("not_negative", "counts")):
        for name in {name for base in type(options).__mro__ for name in vars(base).get(kind, ())}:
            value = getattr(options, name)
            items = value if isinstance(value, tuple) else (value,)
            if any(item is not None and item < low for item in items):
                raise UserError(f"{flag(name)} must be at least {low}, got {', '.join(map(str, items))}.")
    if options.seed < 0:
        raise UserError(f"--seed must be from 0 to {LARGEST}, got {options.seed}.")


# The directory of a run.


def open_directory(options: Options) -> Path:
    """Makes the directory, or finds that of an earlier run with the same settings, and writes config.json.

    Raises:
        UserError: there is something else in it, it cannot be made or written to, or there is none to resume.
    """
    name = f"{options.task}-{datetime.now():%Y%m%d-%H%M%S}"
    config = store.plain({"task": options.task} | options.settings())
    directory = options.output_dir or (_newest(options.task, config) if options.resume else RUNS / name)
    if options.resume and not (directory / "config.json").is_file():
        raise UserError(f"--resume: {directory} holds no run to go on with; leave --resume out to start one there.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _check_directory(directory, config)
        store.replace(directory / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"--output-dir {directory} cannot be used: {sentence(error)}") from error
    return directory


def _newest(task: str, config: Mapping[str, Any]) -> Path:
    """The newest directory in runs/ of a run with this configuration.

    Raises:
        UserError: there is none.
    """
    for directory in sorted(RUNS.glob(f"{task}-*"), reverse=True):
        if (directory / "config.json").is_file() and read_config(directory) == config:
            return directory
    raise UserError(
        f"--resume: no directory {RUNS}/{task}-* holds a run with these settings; leave --resume out to start one, or "
        "name the directory by --output-dir."
    )


def read_config(directory: Path) -> dict[str, Any]:
    """What config.json says, nothing if it is not there.

    Raises:
        UserError: it is damaged.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: it is no JSON object; move it away, or pass another --output-dir.")
    return config


def _check_directory(directory: Path, config: Mapping[str, Any]) -> None:
    """Raises a UserError unless a run with this configuration may write there."""
    there = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    if not there:
        return
    if "config.json" not in there:
        raise UserError(
            f"{directory} is not empty, and {there[0]} is not of a run (there is no config.json); pass another "
            "--output-dir."
        )
    old = read_config(directory)
    if not any(path.stat().st_size for path in directory.glob("*.jsonl")):
        return  # a run that ended before its first record
    names = [name for name in old.keys() | config.keys() if old.get(name) != config.get(name)]
    if names and set(names) - _no_more_settings(old):
        raise UserError(
            f"{directory} holds a run with other settings (its config.json: {', '.join(sorted(names))}); pass the same "
            "ones to go on with it, or another --output-dir."
        )


def _no_more_settings(old: Mapping[str, Any]) -> set[str]:
    """Options of an older config.json that decide how many runs there are, and no longer count as settings."""
    return {"seed", "seeds", "methods"} & old.keys()
