"""Records of a grid as arrays over seeds and settings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.methods import Methods, in_order
from funcbilevel.tasks._experiment.store import Record


class Block(NamedTuple):
    """One method in every setting from every seed.

    Attributes:
        method: its name.
        settings: one for each cell.
        seeds: in ascending order.
        metrics: name -> [seeds, cells].
    """

    method: str
    settings: list[Mapping[str, Any]]
    seeds: list[int]
    metrics: Mapping[str, np.ndarray[Any, Any]]


def blocks(records: Sequence[Record], methods: Methods, order: Callable[[Mapping[str, Any]], Any]) -> list[Block]:
    """A block for each method, in the table's order, its cells sorted by `order(settings)`.

    Of an unfinished grid the cells that lack a seed are left out; if all do, the seeds that a cell lacks.
    """
    names = in_order(methods, (record["method"] for record in records))
    return [_block(name, [record for record in records if record["method"] == name], order) for name in names]


def _block(method: str, records: Sequence[Record], order: Callable[[Mapping[str, Any]], Any]) -> Block:
    cells: dict[str, dict[int, Record]] = {}
    for record in sorted(records, key=lambda record: order(record["settings"])):
        cells.setdefault(store.settings_key(record["settings"]), {})[record["seed"]] = record
    every = {record["seed"] for record in records}
    kept = [cell for cell in cells.values() if cell.keys() == every]
    if not kept:
        every = set.intersection(*(set(cell) for cell in cells.values())) or {min(every)}
        kept = [cell for cell in cells.values() if cell.keys() >= every]
    seeds = sorted(every)
    rows = [[store.values(cell[seed]) for cell in kept] for seed in seeds]
    names = [name for name in rows[0][0] if all(name in values for row in rows for values in row)]
    metrics = {name: np.array([[values[name] for values in row] for row in rows]) for name in names}
    return Block(method, [cell[seeds[0]]["settings"] for cell in kept], seeds, metrics)
