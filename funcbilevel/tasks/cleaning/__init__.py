"""Data hyper-cleaning: `funcbilevel run cleaning` and `funcbilevel compare cleaning`. The problem is in `problem`."""

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

from funcbilevel.tasks._experiment.command import Task
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.grid import Track, by_setting, complete
from funcbilevel.tasks._experiment.methods import choices
from funcbilevel.tasks._experiment.options import Sweep
from funcbilevel.tasks._experiment.store import Store
from funcbilevel.tasks.cleaning import report, train
from funcbilevel.tasks.cleaning.methods import METHODS, Setting
from funcbilevel.tasks.cleaning.problem import SIZES, pictures


@dataclass(frozen=True)
class RunCleaning(Sweep):
    """Weights for training samples with wrong labels, learned from a few clean ones."""

    task = "cleaning"
    table = METHODS
    beside = (*Sweep.beside, "data")
    counts = ("num_steps",)
    dataset: Literal["digits", "mnist"] = "digits"
    """scikit-learn's digits, or MNIST."""
    data: Path | None = None
    """MNIST only: the mnist.npz of Keras; by default $FUNCBILEVEL_MNIST."""
    network: Literal["linear", "mlp"] = "linear"
    """Linear, or one hidden layer of 300."""
    corruption: float = 0.5
    """Share of the training labels that are wrong."""
    methods: tuple[str, ...] = ("aid-cg",)
    """Methods to compare with the network trained on clean validation samples alone and on all samples."""
    seeds: int = 1
    """Number of seeds, from --seed on."""
    num_steps: int = 400
    """Outer steps of ten inner steps each; single-loop methods make ten times as many of one."""

    def check(self) -> None:
        """Raises a UserError that names an option out of range."""
        super().check()
        if not 0 < self.corruption < 1:
            raise UserError(f"--corruption must be between 0 and 1, got {self.corruption}.")

    def work(self, directory: Path, track: Track) -> None:
        """Adds what is missing to runs.jsonl and to the files beside it."""
        always = [name for name, method in METHODS.items() if method.always]
        setting = Setting(self.network, num_steps=self.num_steps)
        runs = train.runs([*always, *self.all_methods], self.dataset, self.corruption, setting, self.all_seeds)
        load = cache(partial(pictures, self.dataset, self.data))
        make = partial(train.train, load, SIZES[self.dataset], self.corruption, setting, track)
        complete(Store(directory, self.task), runs, make, by_setting)


@dataclass(frozen=True)
class CompareCleaning(RunCleaning):
    """All families side by side, over five seeds."""

    methods: tuple[str, ...] = choices(METHODS)
    """Methods to compare with the network trained on clean validation samples alone and on all samples."""
    seeds: int = 5
    """Number of seeds, from --seed on."""


TASK = Task("cleaning", report.report, run=RunCleaning, compare=CompareCleaning)
