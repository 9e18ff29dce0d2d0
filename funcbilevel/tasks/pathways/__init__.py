"""Attributions inside known pathways: `funcbilevel run pathways`. The problem is in `problem`."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from funcbilevel.tasks._experiment.command import Task
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.grid import Track, complete
from funcbilevel.tasks._experiment.options import Sweep, flag
from funcbilevel.tasks._experiment.store import Store
from funcbilevel.tasks.pathways import report, train
from funcbilevel.tasks.pathways.methods import METHODS, Setting
from funcbilevel.tasks.pathways.problem import Design, check


@dataclass(frozen=True)
class RunPathways(Sweep):
    """A leader classifies drawn expression data, a follower keeps the attributions inside known pathways."""

    task = "pathways"
    table = METHODS
    counts = ("num_steps", "width")
    methods: tuple[str, ...] = ("aid-cg", "alternating")
    """Methods to compare with the one objective of both players, and with cross entropy alone."""
    num_steps: int = 400
    """The leader's steps."""
    width: int = 8
    """Of the network's two hidden layers."""
    num_pathways: int = 8
    """Known pathways."""
    size: int = 6
    """Genes in a pathway."""
    overlap: int = 2
    """Genes that a pathway shares with the next; 0: disjoint."""
    num_driving: int = 3
    """Pathways that the label depends on."""
    num_background: int = 26
    """Genes in no pathway."""
    num_technical: int = 8
    """Of these, genes that the batch shifts."""
    confounding: float = 0.5
    """Correlation of batch and label."""

    @property
    def design(self) -> Design:
        """What is drawn."""
        own = asdict(self)
        return Design(**{name: own[name] for name in Design._fields if name in own})

    def check(self) -> None:
        """Raises a UserError that names an option out of range."""
        super().check()
        try:
            check(self.design)
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            raise UserError(f"{flag(name)} {rest}") from error

    def work(self, directory: Path, track: Track) -> None:
        """Adds what is missing to runs.jsonl."""
        always = [name for name, method in METHODS.items() if method.always]
        setting = Setting(self.width, num_steps=self.num_steps)
        runs = train.runs([*always, *self.all_methods], self.design, setting, self.all_seeds)
        make = partial(train.train, self.design, setting, track)
        complete(Store(directory, self.task), runs, make, train.one_program)


TASK = Task("pathways", report.report, run=RunPathways)
