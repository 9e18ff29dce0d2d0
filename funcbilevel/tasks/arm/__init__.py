"""Leader and follower on a two-link arm: `funcbilevel run arm`, `compare arm`. The problem is in `problem`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from funcbilevel.tasks._experiment.command import Task
from funcbilevel.tasks._experiment.grid import Track, by_method, complete
from funcbilevel.tasks._experiment.options import Sweep
from funcbilevel.tasks._experiment.store import Store
from funcbilevel.tasks.arm import report, train
from funcbilevel.tasks.arm.methods import CONTROL, METHODS, Setting


@dataclass(frozen=True)
class RunArm(Sweep):
    """A two-link arm: the leader tracks, the follower saves energy, against one weighted reward for both."""

    task = "arm"
    table = METHODS
    counts = ("updates", "inner_steps", "width")
    methods: tuple[str, ...] = (CONTROL, "aid-cg")
    """Methods to run; table and figure show all that the output directory holds."""
    seeds: int = 1
    """Number of seeds, from --seed on; they are trained together."""
    updates: int = 400
    """Steps of Adam, those of follower and leader counted alike."""
    inner_steps: int = 3
    """Follower's steps per step of the leader."""
    width: int = 16
    """Width of the hidden layer of each of the two networks."""

    @property
    def setting(self) -> Setting:
        """What decides the compiled programs."""
        return Setting(width=self.width, inner_steps=self.inner_steps)

    def work(self, directory: Path, track: Track) -> None:
        """Adds what is missing to runs.jsonl, and to runs-paths.jsonl for the first seed."""
        runs = train.runs(self.all_methods, self.setting, self.updates, self.all_seeds)
        make = partial(train.train, self.setting, self.updates, self.seed, track)
        complete(Store(directory, self.task), runs, make, by_method)


@dataclass(frozen=True)
class CompareArm(RunArm):
    """Every method over weights, rates and seeds; two of them are trained again after changes."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to run; table and figure show all that the output directory holds."""
    seeds: int = 5
    """Number of seeds, from --seed on; they are trained together."""
    updates: int = 1200
    """Steps of Adam, those of follower and leader counted alike."""

    def work(self, directory: Path, track: Track) -> None:
        """Adds what is missing to runs.jsonl and changes.jsonl."""
        super().work(directory, track)
        changed = [method for method in train.CHANGED if method in self.all_methods]
        runs = train.change_runs(changed, self.setting, self.all_seeds)
        make = train.retrain(self.setting, self.updates, track)
        complete(Store(directory, self.task, "changes"), runs, make, train.one_change)


TASK = Task("arm", report.report, run=RunArm, compare=CompareArm)
