"""What is made of the records: fronts of accuracy against fairness, and a row for each method or setting."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.methods import in_order
from funcbilevel.tasks._experiment.statistics import Interval, hypervolume, mean_interval, pareto_front
from funcbilevel.tasks._experiment.store import Record, values
from funcbilevel.tasks.fairness.methods import LAGRANGIAN, ROWS, SINGLE, label_of
from funcbilevel.tasks.fairness.outside import OUTSIDE

PARITY = ("dp_gap",)
ALL_ROWS = ROWS | OUTSIDE
"""What a row of a table may be, in their order."""


def points(
    cells: Sequence[Mapping[str, float]], prefix: str = "", gaps: Sequence[str] = PARITY
) -> np.ndarray[Any, Any]:
    """(accuracy, 1 - the largest of these gaps) of each, [n, 2]; (0, 0) for a run that broke."""
    pairs = [(cell[f"{prefix}accuracy"], 1.0 - max(cell[f"{prefix}{gap}"] for gap in gaps)) for cell in cells]
    array = np.array(pairs, float).reshape(-1, 2)
    return np.where(np.isfinite(array).all(axis=1, keepdims=True), array, 0.0)


def selected_hypervolume(
    cells: Sequence[Mapping[str, float]], reference: tuple[float, float] = (0.0, 0.0), gaps: Sequence[str] = PARITY
) -> float:
    """The test points' hypervolume of those settings that are on the validation part's Pareto front."""
    chosen = pareto_front(points(cells, "validation_", gaps))
    return hypervolume(points(cells, gaps=gaps)[chosen], reference)


def label(record: Record) -> str:
    """Method and update of a record."""
    return label_of(record["method"], record["settings"])


def gaps_of(losses: Sequence[Sequence[Any]]) -> tuple[str, ...]:
    """The metrics that go with several losses; fronts are of accuracy and one less the largest of them."""
    odds = ("equalized-odds", "equal-opportunity")
    return tuple(dict.fromkeys("eo_gap" if name in odds else "dp_gap" for name, _ in losses)) or PARITY


def _gap(cell: Mapping[str, float], gaps: Sequence[str], prefix: str = "") -> float:
    return max(cell[f"{prefix}{gap}"] for gap in gaps)


def reference(runs: Sequence[Record], gaps: Sequence[str] = PARITY, prefix: str = "") -> tuple[float, float]:
    """The point that bounds the front from below: the majority's label, and accuracy alone's gap (else a gap of 1)."""
    alone = [1 - _gap(values(record), gaps, prefix) for record in runs if record["method"] == SINGLE]
    majority = float(np.mean([values(record)["majority"] for record in runs]))
    return majority, float(np.mean(alone)) if alone else 0.0


def _trial(record: Record) -> str:
    return store.settings_key(record["settings"])


class Row(NamedTuple):
    """One method at one of its settings; means over the seeds.

    Attributes:
        label: method and update.
        eta: of the setting shown, or its tolerance: each, or the one that validation chose.
        trials: how many settings the method had.
        accuracy, dp_gap, dp_gap_soft, eo_gap: on the test part.
        largest_gap: the largest `dp_gap_soft` over the seeds, which the article reports.
        hypervolume: (accuracy, 1 - dp_gap) of the front that validation chose, seed -> value; empty without a front.
        difference: mean difference of the hypervolume to that of the method compared with (the Lagrangian) on the same
            seeds, and its 95% interval.
        above: the same two above the point of `reference`.
        intervals: name of a metric of `INTERVALS` -> its mean and interval over the seeds, on the test part; empty for
            records from before calibration was measured.
    """

    label: str
    eta: float
    trials: int
    seeds: int
    accuracy: float
    dp_gap: float
    dp_gap_soft: float
    eo_gap: float
    largest_gap: float
    hypervolume: dict[int, float]
    difference: Interval | None
    above: dict[int, float]
    above_difference: Interval | None
    intervals: dict[str, Interval]


def summarise(
    runs: Sequence[Record], front: bool, gaps: Sequence[str] = PARITY, against: str = LAGRANGIAN
) -> list[Row]:
    """One row per method, with its front, or one per setting; differences are to the method `against`."""
    labels = in_order(ALL_ROWS, map(label, runs))
    point = reference(runs, gaps)
    # Of several losses the majority's label, fair by all of them, would have the largest sum.
    several = any(record["settings"].get("losses") for record in runs)
    validation = reference(runs, gaps, "validation_") if several else None
    of = {name: [record for record in runs if label(record) == name] for name in labels}
    volumes = {name: (_volumes(of[name], (0.0, 0.0), gaps), _volumes(of[name], point, gaps)) for name in labels}
    rows: list[Row] = []
    for name in labels:
        trials = dict.fromkeys(_trial(record) for record in of[name])
        shown = [max(trials, key=lambda trial: _score(of[name], trial, gaps, validation))] if front else list(trials)
        plain, above = volumes[name]
        for trial in shown:
            records = [record for record in of[name] if _trial(record) == trial]
            means = {
                metric: float(np.mean([values(record)[metric] for record in records]))
                for metric in ("accuracy", "dp_gap", "dp_gap_soft", "eo_gap")
            }
            rows.append(
                Row(
                    name,
                    weight_of(records[0]),
                    len(trials),
                    len(records),
                    **means,
                    largest_gap=max(values(record)["dp_gap_soft"] for record in records),
                    hypervolume=plain if front else {},
                    difference=_difference(volumes, name, 0, against) if front else None,
                    above=above if front else {},
                    above_difference=_difference(volumes, name, 1, against) if front else None,
                    intervals=_intervals(records),
                )
            )
    return rows


def _volumes(runs: Sequence[Record], point: tuple[float, float], gaps: Sequence[str]) -> dict[int, float]:
    """Seed -> hypervolume of the front that the validation part chose among the seed's runs."""
    by_seed: dict[int, list[dict[str, float]]] = {}
    for record in runs:
        by_seed.setdefault(record["seed"], []).append(values(record))
    return {seed: selected_hypervolume(cells, point, gaps) for seed, cells in sorted(by_seed.items())}


def _score(runs: Sequence[Record], trial: str, gaps: Sequence[str], point: tuple[float, float] | None) -> float:
    """Validation accuracy less validation gap, the mean over the seeds; above a reference point, their area."""
    cells = [values(record) for record in runs if _trial(record) == trial]
    means = np.mean(points(cells, "validation_", gaps), axis=0)
    return float(np.sum(means)) if point is None else hypervolume(means[None], point)


INTERVALS = ("accuracy", "dp_gap", "eo_gap", "calibration_error")


def _intervals(records: Sequence[Record]) -> dict[str, Interval]:
    cells = [values(record) for record in records]
    if not all("calibration_error" in cell for cell in cells):
        return {}
    return {name: mean_interval([cell[name] for cell in cells]) for name in INTERVALS}


def weight_of(record: Record) -> float:
    """The setting's weight of the unfairness, or tolerance of the gap; NaN if it has neither."""
    settings = record["settings"]
    return float(settings.get("tolerance", settings.get("eta", np.nan)))


def _difference(
    volumes: Mapping[str, tuple[dict[int, float], ...]], name: str, which: int, against: str
) -> Interval | None:
    if name == against or against not in volumes:
        return None
    mine, other = volumes[name][which], volumes[against][which]
    common = sorted(mine.keys() & other.keys())
    return mean_interval([mine[seed] - other[seed] for seed in common]) if common else None
