"""The runs of the commands: where their data come from, what tells them from others, how they are made."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import funcbilevel as fb
from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.grid import Track, Unit
from funcbilevel.tasks._experiment.store import Result, Run
from funcbilevel.tasks.data import adult, health, nba, synthetic
from funcbilevel.tasks.data.dataset import Dataset
from funcbilevel.tasks.fairness.methods import LAGRANGIAN
from funcbilevel.tasks.fairness.problem import Hyper, Setting
from funcbilevel.tasks.fairness.train import program, sweep

Data: TypeAlias = Literal["synthetic", "adult", "health", "nba"]


class Source(NamedTuple):
    """Where the data come from.

    Attributes:
        dataset: which.
        path: of Adult and NBA the directory, of Heritage Health the file.
        attributes, label: of Adult.
        num_classes: of synthetic data.
        division: seed of the division of Adult and Heritage Health, one for all seeds of a comparison.
        redivide: the division of Adult and Heritage Health is another for each seed, counted from `division` on.
        attribute: whether the protected attributes are among the features.
    """

    dataset: Data = "synthetic"
    path: Path | None = None
    attributes: tuple[str, ...] = ("sex",)
    label: Literal["income", "education"] = "income"
    num_classes: int = 2
    division: int = 0
    redivide: bool = False
    attribute: Literal["used", "removed"] = "used"

    @property
    def by_seed(self) -> bool:
        """Whether a run's seed decides its data: synthetic ones, and the division of the NBA graph, which is small."""
        return self.dataset in ("synthetic", "nba") or self.redivide

    @property
    def classes(self) -> int:
        """The number of labels."""
        return adult.CLASSES[self.label] if self.dataset == "adult" else self.num_classes

    def settings(self) -> dict[str, Any]:
        """What a record says of the data."""
        name = "adult-education" if self.dataset == "adult" and self.label == "education" else self.dataset
        attributes = {"adult": self.attributes, "health": ("age",), "nba": ("country",), "synthetic": ("group",)}
        return {
            "dataset": name,
            "attributes": attributes[self.dataset],
            "division": self.division,
            "redivide": self.redivide,
            "attribute": self.attribute,
        }

    def load(self, seed: int) -> Dataset:
        """The data of a run with this seed."""
        used, division = self.attribute == "used", self.division + (seed if self.redivide else 0)
        if self.dataset == "adult":
            return adult.load(self.path, self.attributes, seed=division, label=self.label, use_attributes=used)
        if self.dataset == "health":
            return health.load(self.path, seed=division, use_attributes=used)
        if self.dataset == "nba":
            return nba.load(self.path, seed=seed, use_attributes=used)
        return synthetic.load(seed=seed, num_classes=self.num_classes, use_attributes=used)


LATER = {
    **{"losses": (), "followers": "one", "attention": None, "num_classes": 2, "label": "income"},
    **{"division": 0, "redivide": False, "attribute": "used"},
}
"""Settings that came later, with their defaults: left out where they have them, so that older runs are still known."""


def without_later(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings less those of `LATER` that are at their defaults."""
    return {name: value for name, value in settings.items() if name not in LATER or value != LATER[name]}


class Plan(NamedTuple):
    """How a run is made.

    Attributes:
        method: its name.
        label: for the progress bar.
        setting, hyper: what it is trained with.
    """

    method: str
    label: str
    setting: Setting
    hyper: Hyper


def settings_of(source: Source, setting: Setting, hyper: Hyper, num_epochs: int) -> dict[str, Any]:
    """What a record says of a run."""
    whole = source.settings() | {"num_epochs": num_epochs} | setting._asdict() | hyper._asdict()
    return store.plain(without_later(whole))


def runs(source: Source, plans: Iterable[Plan], num_epochs: int, seeds: Sequence[int]) -> list[Run]:
    """Every plan from every seed."""
    return [
        Run(plan.method, seed, settings_of(source, plan.setting, plan.hyper, num_epochs), plan)
        for plan in plans
        for seed in seeds
    ]


def one_program(source: Source, run: Run) -> Any:
    """Runs of one program on the same data are made together."""
    return run.method, run.how.setting, run.seed if source.by_seed else None


def train(source: Source, num_epochs: int, chunk: int, track: Track, unit: Unit) -> list[Result]:
    """Makes the runs of a unit; seconds are a run's share."""
    plan: Plan = unit.cells[0].how
    dataset = source.load(unit.seeds[0])
    callback = track(plan.label.removeprefix("alternating, ")[:17], num_epochs)
    cells = [(run.how.hyper, run.seed) for run in unit.runs]
    outcome = sweep(plan.method, plan.setting, dataset, cells, num_epochs, chunk=chunk, callback=callback)
    shared = {
        "sweep_cells": len(cells),
        "sweep_seconds": outcome.seconds,
        "sweep_epoch_seconds": outcome.epoch_seconds,
        "majority": majority_accuracy(dataset),
        **{f"num_{part}": np.sum(getattr(dataset, part).weight) for part in ("train", "validation", "test")},
    }
    return [
        Result(
            {name: float(f"{value:.6g}") for name, value in cell.metrics.items()} | shared,
            {"curves": {name: [float(f"{value:.5g}") for value in values] for name, values in cell.curves.items()}},
            outcome.seconds / len(cells),
        )
        for cell in outcome.cells
    ]


def majority_accuracy(dataset: Dataset) -> float:
    """Test accuracy of giving everybody the more frequent label."""
    labels = dataset.test.y[dataset.test.weight > 0].astype(int)
    return float(np.max(np.bincount(labels)) / len(labels))


# Costs: one epoch of one cell of alternating, either update, beside one of the Lagrangian on the same network.

COSTS = ((LAGRANGIAN, "simultaneous"), ("alternating", "simultaneous"), ("alternating", "sequential"))


def cost_runs(source: Source, setting: Setting, seed: int) -> list[Run]:
    """What is measured."""
    plain = setting._replace(inner_steps=1, inner_batch_size=None)
    plans = [Plan(method, method, plain._replace(update=update), Hyper()) for method, update in COSTS]
    return runs(source, plans, 1, [seed])


def measure_costs(source: Source, unit: Unit) -> list[Result]:
    """Seconds and arithmetic of an epoch, the ratio to the first run's."""
    dataset = source.load(unit.seeds[0])
    train = jax.tree.map(jnp.asarray, dataset.train)
    keys = jnp.stack([jax.random.key(unit.seeds[0])])
    hyper = jax.tree.map(lambda value: jnp.array([value]), Hyper())
    calls: dict[str, Any] = {}
    for run in unit.runs:
        compiled = program(run.method, run.how.setting, dataset.num_groups)
        states = compiled.init(keys, hyper, train)
        calls[f"{run.method} {run.how.setting.update}"] = (compiled.epochs, (states, hyper, keys, train, 0, 1))
    rows = fb.measure_costs(calls).rows
    return [
        Result(
            {
                "seconds": row.seconds,
                "ratio": row.seconds / rows[0].seconds,
                "seconds_low": row.seconds_low,
                "seconds_high": row.seconds_high,
                "flops": row.flops or np.nan,
                "temp_bytes": row.temp_bytes,
            },
            seconds=row.seconds,
        )
        for row in rows
    ]
