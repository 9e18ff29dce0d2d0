"""Demand for air tickets: `funcbilevel compare demand`. The simulation is in `problem`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from funcbilevel.tasks._experiment.command import Task
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.grid import Track, Unit, complete
from funcbilevel.tasks._experiment.methods import choices
from funcbilevel.tasks._experiment.options import Sweep
from funcbilevel.tasks._experiment.store import Result, Run, Store
from funcbilevel.tasks._instrumental.methods import METHODS, TWO_STAGE, Setting
from funcbilevel.tasks._instrumental.train import Design, compare
from funcbilevel.tasks.demand import report
from funcbilevel.tasks.demand.problem import Array, Data, arrays, shown_line, test_mse, two_stage


@dataclass(frozen=True)
class CompareDemand(Sweep):
    """Demand for air tickets (Hartford et al. 2017), a simulation with known truth: every method over seeds."""

    task = "demand"
    table = METHODS
    not_negative = ("noise",)
    setting: ClassVar[Setting] = Setting()
    """What all methods have in common."""
    seeds: int = 10
    """Number of seeds, from --seed on; each has its own sample and its own initial networks."""
    methods: tuple[str, ...] = choices(METHODS)
    """Methods to compare; two-stage least squares is there in any case."""
    n: int = 5000
    """Sample size, even; half of it is the inner level's."""
    rho: float = 0.5
    """Correlation of the disturbances of price and sales: the confounding."""
    noise: float = 158.0
    """Standard deviation of the disturbance of sales: 158 as in Hartford et al., 1 as in Xu et al."""

    def check(self) -> None:
        """Raises a UserError that names an option out of range."""
        super().check()
        self.check_sample_size("n")
        if not -1 <= self.rho <= 1:
            raise UserError(f"--rho must be from -1 to 1, got {self.rho}.")

    def data(self, seed: int) -> Data:
        """A fresh sample."""
        return arrays(seed, self.n, self.rho, self.noise)

    def work(self, directory: Path, track: Track) -> None:
        """Adds what is missing to selection.jsonl and runs.jsonl."""
        settings: Mapping[str, Any] = self.settings()
        design = Design(self.task, settings, self.setting, self.data, measure)
        compare(directory, design, self.all_methods, self.all_seeds, track)
        linear = [Run(TWO_STAGE, seed, settings) for seed in self.all_seeds]
        complete(Store(directory, self.task), linear, self._linear)

    def _linear(self, unit: Unit) -> list[Result]:
        return [measure(two_stage(self.data(seed))) for seed in unit.seeds]


def measure(predictions: Array) -> Result:
    """The test MSE and, beside the record, the curve of the figure."""
    curve = shown_line()[:, 0], predictions[-len(shown_line()) :]
    rounded = {
        name: [float(f"{x:.6g}") for x in values] for name, values in zip(("price", "sales"), curve, strict=True)
    }
    return Result({"test_mse": test_mse(predictions)}, {"curves": rounded})


TASK = Task("demand", report.report, compare=CompareDemand)
