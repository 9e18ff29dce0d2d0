"""Instrumental regression on dSprites: `funcbilevel run iv` and `compare iv`. The problem is in `problem`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from funcbilevel.tasks._experiment import methods as _methods
from funcbilevel.tasks._experiment.command import Task
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.grid import Track, complete
from funcbilevel.tasks._experiment.options import Options, Sweep
from funcbilevel.tasks._experiment.select import check_budgets, choose, trial_runs
from funcbilevel.tasks._experiment.store import Run, Store
from funcbilevel.tasks.data import dsprites
from funcbilevel.tasks.iv import report, train
from funcbilevel.tasks.iv.methods import METHODS, Hyper, Setting
from funcbilevel.tasks.iv.problem import Norm
from funcbilevel.tasks.iv.train import RULE, How, run_of


@dataclass(frozen=True)
class _Shared(Options):
    task = "iv"
    table = METHODS
    beside = ("download",)
    counts = ("num_outer_steps", "widths")
    n: int | None = None
    """Sample size, even; half of it is the inner level's. By default 5,000."""
    num_outer_steps: int = 100
    """Outer steps of each run."""
    batch_size: int | None = None
    """Samples per level and step, drawn with replacement; by default all."""
    widths: tuple[int, int, int, int] | None = None
    """Widths of the treatment network's layers. By default 1024 512 128 32."""
    norm: Norm = "layer"
    """Layer or batch normalisation in both networks."""
    images: Path | None = None
    """Official dSprites file; by default $FUNCBILEVEL_DSPRITES, or else hearts drawn here."""
    download: bool = False
    """Use the official dSprites file, fetched from its public home (26 MB) unless it is in the cache already."""
    matrix: Path | None = None
    """Outcome matrix as .npy; by default $FUNCBILEVEL_DSPRITES_MATRIX, or else one drawn from U(0, 1)."""

    def default(self) -> Setting:
        """The setting where no option says otherwise."""
        return Setting()

    @property
    def setting(self) -> Setting:
        """What all methods have in common."""
        setting = self.default()._replace(norm=self.norm)
        return setting._replace(n=self.n or setting.n, widths=self.widths or setting.widths)

    def check(self) -> None:
        """Raises a UserError that names an option out of range."""
        super().check()
        self.check_sample_size("n")
        if self.batch_size is not None and self.batch_size < 2:
            raise UserError(f"--batch-size must be at least 2, got {self.batch_size}.")
        for name in ("images", "matrix"):
            if (path := getattr(self, name)) is not None and not path.is_file():
                raise UserError(f"--{name}: there is no file {path}.")

    def settings(self) -> dict[str, Any]:
        """The options that decide the numbers; of files the name only."""
        images = dsprites.URL if self.download else self.images or os.environ.get(dsprites.IMAGES_VARIABLE)
        matrix = self.matrix or os.environ.get(dsprites.MATRIX_VARIABLE)
        return super().settings() | {
            "n": self.setting.n,
            "widths": self.setting.widths,
            "images": Path(images).name if images else "rendered",
            "matrix": Path(matrix).name if matrix else "drawn",
        }

    def status(self, metrics: Mapping[str, Any]) -> str:
        """Both objectives and the test MSE."""
        outer, inner, error = (metrics[name][-1] for name in ("outer_objective", "inner_objective", "test_mse"))
        return f"outer {outer:.2f}, inner {inner:.3f}, test MSE {error:.2f}"

    def load(self) -> train.Load:
        """Loads the data's source when it is first needed."""
        return cache(
            lambda: (
                dsprites.hearts(dsprites.download() if self.download else self.images),
                dsprites.outcome_matrix(self.matrix)[0],
            )
        )


@dataclass(frozen=True)
class RunIV(_Shared):
    """Instrumental regression on dSprites (Xu et al. 2021) by one method, with live progress and a figure."""

    beside = (*_Shared.beside, "quick")
    method: str = "funcid-linear"
    """Method to train."""
    quick: bool = False
    """Small run: n = 1,000 and widths 256 128 64 32, unless --n or --widths say otherwise."""

    def default(self) -> Setting:
        """The setting where no option says otherwise."""
        return Setting(n=1000, widths=(256, 128, 64, 32)) if self.quick else Setting()

    def check(self) -> None:
        """Raises a UserError that names an option out of range."""
        super().check()
        _methods.resolve("--method", METHODS, self.method)

    def work(self, directory: Path, track: Track) -> None:
        """Makes the run, unless it is there."""
        how = How(self.setting, METHODS[self.method].hyper, self.num_outer_steps, self.batch_size, chunk=5, shown=True)
        runs = [run_of(self.method, self.seed, how)]
        complete(Store(directory, self.task), runs, partial(train.train, self.load(), track))


@dataclass(frozen=True)
class CompareIV(_Shared, Sweep):
    """Instrumental regression on dSprites by every method over many seeds. Run it again to go on where it stopped."""

    beside = (*_Shared.beside, *Sweep.beside, "references", "costs", "select", "selection_n")
    seeds: int = 20
    """Number of seeds, from --seed on."""
    methods: tuple[str, ...] = _methods.choices(METHODS)
    """Methods to run; the figure and the table show all that the output directory holds."""
    references: bool = True
    """Run kernel IV, two-stage least squares on the raw instruments and regression on the pixels, too."""
    select: bool = False
    """Choose hyper-parameters anew first, of three trials per method, by the validation loss on four other seeds; else
    those chosen before are used."""
    selection_n: int = 2000
    """Sample size of that selection, even."""
    costs: bool = True
    """Measure time and memory of one outer step of each method."""

    def check(self) -> None:
        """Raises a UserError that names an option out of range."""
        super().check()
        self.check_sample_size("selection_n")

    def work(self, directory: Path, track: Track) -> None:
        """Adds what is missing to selection.jsonl, runs.jsonl and costs.jsonl."""
        load, setting = self.load(), self.setting
        make = partial(train.train, load, track)
        chosen: dict[str, Hyper] = {name: METHODS[name].hyper for name in self.all_methods}
        if self.select:
            chosen = self._select(Store(directory, self.task, "selection"), make)
        runs: list[Run] = []
        for seed in self.all_seeds:
            runs += [
                run_of(name, seed, How(setting, hyper, self.num_outer_steps, self.batch_size))
                for name, hyper in chosen.items()
            ]
            runs += train.references(setting.n, seed) if self.references else []
        complete(Store(directory, self.task), runs, make)
        if self.costs:
            measure = partial(train.measure_costs, load, setting, self.seed)
            complete(Store(directory, self.task, "costs"), train.cost_runs(setting, chosen), measure, lambda run: None)

    def _select(self, where: Store, make: Any) -> dict[str, Hyper]:
        """The trial of each method with the least mean validation loss over the selection's seeds."""
        setting = self.setting._replace(n=self.selection_n)
        trials = {
            name: [
                run_of(name, 0, How(setting, hyper, self.num_outer_steps, self.batch_size))
                for hyper in METHODS[name].trials
            ]
            for name in self.all_methods
        }
        check_budgets({name: len(of_method) for name, of_method in trials.items()})
        complete(where, trial_runs(trials, RULE), make)
        return {name: run.how.hyper for name, run in choose(where, trials, RULE).items()}


TASK = Task("iv", report.report, run=RunIV, compare=CompareIV)
