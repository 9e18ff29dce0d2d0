"""Which features does a network need? `funcbilevel run gates`. The problem is in `problem`."""

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

from funcbilevel.tasks._experiment.command import Task
from funcbilevel.tasks._experiment.grid import Track, by_method, complete
from funcbilevel.tasks._experiment.options import Sweep
from funcbilevel.tasks._experiment.store import Store
from funcbilevel.tasks.gates import report, train
from funcbilevel.tasks.gates.methods import ALL, METHODS, Setting
from funcbilevel.tasks.gates.problem import load


@dataclass(frozen=True)
class RunGates(Sweep):
    """A follower's gates keep few features while the leader predicts, against lasso and random sets of features."""

    task = "gates"
    table = METHODS
    beside = (*Sweep.beside, "data")
    counts = ("num_steps", "width")
    dataset: Literal["breast-cancer", "adult"] = "breast-cancer"
    """Breast cancer of scikit-learn, or UCI Adult."""
    data: Path | None = None
    """Adult only: directory of its files; by default $FUNCBILEVEL_ADULT_DIR, or else they are downloaded."""
    methods: tuple[str, ...] = ("aid-cg", "alternating", "group-lasso", "lasso")
    """Methods to compare with all features, and with random sets as large as those of the first method."""
    num_steps: int = 1200
    """Leader's steps in the selection."""
    width: int = 32
    """Width of the network's hidden layer."""

    def work(self, directory: Path, track: Track) -> None:
        """Adds what is missing to runs.jsonl and runs-features.jsonl."""
        where, setting = Store(directory, self.task), Setting(self.width, num_steps=self.num_steps)
        make = partial(train.train, where, cache(partial(load, self.dataset, self.data)), setting, track)
        methods = [ALL, *self.all_methods]
        complete(where, train.runs(self.dataset, methods, setting, self.all_seeds), make, by_method)
        random = train.random_runs(self.dataset, self.all_methods[0], setting, self.all_seeds)
        complete(where, random, make, by_method)


TASK = Task("gates", report.report, run=RunGates)
