"""Returns to schooling: `funcbilevel run schooling`, and `compare schooling` with neural networks at both levels.

The problem is in `problem`; the comparison's data are in `splits`, its problem in `_instrumental.problem`.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from funcbilevel.tasks._experiment.command import Task
from funcbilevel.tasks._experiment.grid import Track, Unit, complete
from funcbilevel.tasks._experiment.methods import choices
from funcbilevel.tasks._experiment.options import Options, Sweep
from funcbilevel.tasks._experiment.store import Result, Run, Store
from funcbilevel.tasks._instrumental.methods import LEAST_SQUARES, METHODS, TWO_STAGE, Setting
from funcbilevel.tasks._instrumental.problem import Array
from funcbilevel.tasks._instrumental.train import Design, compare
from funcbilevel.tasks.schooling import report, slopes, splits, train
from funcbilevel.tasks.schooling.problem import REGRESSORS, load, reference


@dataclass(frozen=True)
class RunSchooling(Options):
    """Returns to schooling (Card 1995): 2SLS as a bilevel problem, by every method, and a neural wage curve."""

    task = "schooling"
    beside = ("neural",)
    counts = ("num_outer_steps", "num_neural_steps")
    not_negative = ("num_resamples", "smoothness")
    num_outer_steps: int = 300
    """Outer steps of each linear fit."""
    neural: bool = True
    """Fit the neural wage-education curve and draw it."""
    num_neural_steps: int = 500
    """Outer steps of the neural fit."""
    num_resamples: int = 20
    """Bootstrap resamples in the figure, one neural curve each."""
    smoothness: float = 0.1
    """Penalty on the mean squared second difference of the neural curve; a large one makes it a line."""

    def work(self, directory: Path, track: Track) -> None:
        """Adds what is missing to runs.jsonl."""
        frame = load()
        runs = train.linear_runs(len(frame), self.num_outer_steps, self.seed)
        if self.neural:
            steps, resamples, smoothness = self.num_neural_steps, self.num_resamples, self.smoothness
            runs.append(train.neural_run(len(frame), steps, resamples, smoothness, self.seed))
        complete(Store(directory, self.task), runs, partial(train.train, frame, track))


@dataclass(frozen=True)
class CompareSchooling(Sweep):
    """Returns to schooling with neural networks at both levels: every method over seeds, beside 2SLS and OLS."""

    task = "schooling-neural"
    table = METHODS
    setting: ClassVar[Setting] = splits.SETTING
    """What all methods have in common."""
    seeds: int = 10
    """Number of seeds, from --seed on; each has its own split of the men and its own initial networks."""
    methods: tuple[str, ...] = choices(METHODS)
    """Methods to compare; two-stage and ordinary least squares are there in any case."""

    def work(self, directory: Path, track: Track) -> None:
        """Adds what is missing to selection.jsonl and runs.jsonl."""
        design = Design(self.task, self.settings(), self.setting, splits.arrays, measure)
        compare(directory, design, self.all_methods, self.all_seeds, track)
        linear = [Run(name, 0, {}) for name in (TWO_STAGE, LEAST_SQUARES)]  # of all men, so of no split
        complete(Store(directory, self.task), linear, by_linearmodels)


def measure(predictions: Array) -> Result:
    """The mean slope."""
    return Result({"mean_slope": splits.mean_slope(predictions)})


def by_linearmodels(unit: Unit) -> list[Result]:
    """The slope of a linear model, and its interval by two-stage least squares."""
    expected, educ = reference(load()), REGRESSORS.index("educ")
    low, high = expected.educ_interval
    of = {
        TWO_STAGE: {"mean_slope": expected.iv2sls[educ], "low": low, "high": high},
        LEAST_SQUARES: {"mean_slope": expected.ols[educ]},
    }
    return [Result(of[run.method]) for run in unit.runs]


TASKS = (
    Task("schooling", report.report, run=RunSchooling),
    Task("schooling", slopes.report, compare=CompareSchooling, records="schooling-neural"),
)
