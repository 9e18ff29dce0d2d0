"""What comparisons of instrumental regression have in common: one row for each method in each of its settings."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.methods import Methods, colour, in_order, label
from funcbilevel.tasks._experiment.statistics import bootstrap_interval, paired_p_value
from funcbilevel.tasks._experiment.store import Record


class Row(NamedTuple):
    """A method over the seeds; a run that broke counts as infinite.

    Attributes:
        name: the method's; where it was run in several settings, with what tells this one from the others.
        method: as in records.
        records: one per seed, in their order.
        values: seed -> value.
        median, quartiles: of the values.
        interval: 95% bootstrap interval of the median.
        p_value: of the paired two-sided Wilcoxon test against the first row, on their common seeds.
    """

    name: str
    method: str
    records: list[Record]
    values: dict[int, float]
    median: float
    quartiles: tuple[float, float]
    interval: tuple[float, float]
    p_value: float | None = None


_BROKEN = 1e30  # stands for infinity, with which quantiles and ranks cannot be computed


def summarise(records: Sequence[Record], methods: Methods, metric: str) -> list[Row]:
    """The rows, in the order of the table of methods, each compared with the first one.

    Raises:
        UserError: there are no records.
    """
    if not records:
        raise UserError("there is no finished run to report of; run the same command again to go on with it.")
    rows = [
        _row(name, of_setting, metric)
        for method in in_order(methods, (record["method"] for record in records))
        for name, of_setting in _by_setting(methods, method, records).items()
    ]
    return compared(rows)


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows with p-values against the first."""

    def p_value(row: Row) -> float | None:
        common = sorted(row.values.keys() & rows[0].values.keys())
        return paired_p_value(_ranked([row.values[s] for s in common]) - _ranked([rows[0].values[s] for s in common]))

    return [row._replace(p_value=p_value(row) if i else None) for i, row in enumerate(rows)]


def _by_setting(methods: Methods, method: str, records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of a method by the name of their row."""
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        if record["method"] == method:
            groups.setdefault(store.settings_key(record["settings"]), []).append(record)
    several = [group[0]["settings"] for _, group in sorted(groups.items())]

    def name(settings: Mapping[str, Any]) -> str:
        keys = sorted({key for other in several for key in other})
        differ = [key for key in keys if any(other.get(key) != settings.get(key) for other in several)]
        own = ", ".join(f"{key} {settings[key]}" for key in differ if key in settings)
        return f"{label(methods, method)} ({own})" if own else label(methods, method)

    return {name(group[0]["settings"]): group for _, group in sorted(groups.items())}


def _row(name: str, records: list[Record], metric: str) -> Row:
    values = {record["seed"]: _or_infinity(store.values(record).get(metric, np.nan)) for record in records}
    sample = _ranked(list(values.values()))
    low, median, high = np.quantile(sample, (0.25, 0.5, 0.75))
    figures = [float(np.inf if x > _BROKEN / 1e3 else x) for x in (median, low, high, *bootstrap_interval(sample))]
    return Row(
        name, records[0]["method"], records, values, figures[0], (figures[1], figures[2]), (figures[3], figures[4])
    )


def _or_infinity(value: float) -> float:
    return value if np.isfinite(value) else np.inf


def _ranked(values: Sequence[float]) -> np.ndarray[Any, Any]:
    """The values, with a very large number for infinity."""
    return np.where(np.isfinite(values), values, _BROKEN).astype(float)


def median_seed(row: Row) -> Record:
    """The record of the seed in the middle."""
    order = sorted(row.records, key=lambda record: row.values[record["seed"]])
    return order[(len(order) - 1) // 2]


def median_of(row: Row, metric: str) -> float:
    """The median of another metric, NaN if it is not recorded; a run that broke counts as infinite."""
    found = [_or_infinity(store.values(record)[metric]) for record in row.records if metric in record["metrics"]]
    if not found:
        return np.nan
    median = float(np.median(_ranked(found)))
    return np.inf if median > _BROKEN / 1e3 else median


def samples(rows: Sequence[Row]) -> dict[str, np.ndarray[Any, Any]]:
    """Row names -> values, for boxes."""
    return {row.name: np.array([*row.values.values()]) for row in rows}


def colours(rows: Sequence[Row], methods: Methods) -> dict[str, str]:
    """Row names -> colours."""
    return {row.name: colour(methods, row.method) for row in rows}
