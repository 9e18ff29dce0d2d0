"""A small experiment for the tests of the engine: `python stub.py DIRECTORY [--options]`; it computes nothing."""

import sys
import time
from dataclasses import dataclass
from functools import partial

import numpy as np

from funcbilevel.tasks._experiment import command, store, table
from funcbilevel.tasks._experiment.grid import by_setting, complete
from funcbilevel.tasks._experiment.methods import Method
from funcbilevel.tasks._experiment.methods import table as methods_table
from funcbilevel.tasks._experiment.options import Sweep
from funcbilevel.tasks._experiment.report import Report
from funcbilevel.tasks._experiment.store import Result, Run, Store

METHODS = methods_table(
    Method("aid-cg", "one", colour="C3"),
    Method("itd", "another", colour="C4", aliases=("unrolled",)),
    Method("lagrangian", "the control", colour="C0", always=True),
)


@dataclass(frozen=True)
class Stub(Sweep):
    """Draws numbers."""

    task = "stub"
    table = METHODS
    beside = (*Sweep.beside, "pause")
    methods: tuple[str, ...] = ("aid-cg", "itd")
    """Methods."""
    seeds: int = 3
    """Seeds."""
    rate: float = 0.5
    """A rate."""
    pause: float = 0.0
    """Seconds that a run takes."""

    def work(self, directory, track):
        runs = [
            Run(method, seed, {"rate": self.rate, "width": width})
            for method in ("lagrangian", *self.all_methods)
            for width in (4, 8)
            for seed in self.all_seeds
        ]
        complete(Store(directory, "stub"), runs, partial(train, self.pause, track), by_setting)


def train(pause, track, unit):
    callback = track(unit.cells[0].method, 2)
    results = []
    for run in unit.runs:
        time.sleep(pause)
        draw = np.random.default_rng([run.seed, run.settings["width"], len(run.method)]).normal(size=3)
        results.append(Result({"loss": draw[0], "validation_loss": draw[1]}, {"curves": {"loss": draw.tolist()}}))
    for _ in range(2):
        callback(None, {"outer_objective": np.ones(1)})
    return results


def report(directory):
    runs = store.records(Store(directory, "stub"))
    rows = [(run["method"], str(run["seed"]), f"{store.values(run)['loss']:.3f}") for run in runs]
    header = ("method", "seed", "loss")
    text = table.markdown(header, sorted(rows))
    return Report(table.terminal(header, rows), {"table.md": text}, {"stub.png": lambda path: path.write_bytes(b"x")})


TASK = command.Task("stub", report, run=Stub)


def main(args):
    """As `funcbilevel run stub`."""
    import tyro

    with command.user_errors():
        command.execute(TASK, tyro.cli(Stub, args=args), ["run", "stub", *args])


if __name__ == "__main__":
    main(sys.argv[1:])
