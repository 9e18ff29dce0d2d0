"""Runs over settings and seeds: what is missing is made, group by group, and recorded as soon as it is there."""

import json
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.claims import claims
from funcbilevel.tasks._experiment.store import Result, Run, Store

Callback: TypeAlias = Callable[[Any, Mapping[str, Any]], None]
Track: TypeAlias = Callable[[str, int], Callback]
"""`(label, number of steps) -> callback (state, metrics)` for `fb.train`: shows one solve's progress."""


class Unit(NamedTuple):
    """Runs to be made together: every cell with every seed.

    Attributes:
        cells: one run for each method and setting, those of the first seed.
        seeds: the seeds.
    """

    cells: tuple[Run, ...]
    seeds: tuple[int, ...]

    @property
    def runs(self) -> list[Run]:
        """All runs, seed by seed: [seeds, cells] in one row."""
        return [cell._replace(seed=seed) for seed in self.seeds for cell in self.cells]


Train: TypeAlias = Callable[[Unit], Iterable[Result]]
"""Makes the runs of a unit; results in the order of `unit.runs`."""


def alone(run: Run) -> Hashable:
    """Each run by itself; a value of `complete`'s `together`."""
    return run.method, run.seed, store.settings_key(run.settings)


def by_method(run: Run) -> Hashable:
    """All settings and seeds of a method together; a value of `complete`'s `together`."""
    return run.method


def by_setting(run: Run) -> Hashable:
    """All seeds of a method and a setting together; a value of `complete`'s `together`."""
    return run.method, store.settings_key(run.settings)


def units(runs: Iterable[Run]) -> list[Unit]:
    """The fewest whole rectangles of cells and seeds: cells that lack the same seeds are one unit."""
    seeds: dict[tuple[str, str], list[int]] = {}
    cells: dict[tuple[str, str], Run] = {}
    for run in runs:
        cell = run.method, store.settings_key(run.settings)
        seeds.setdefault(cell, []).append(run.seed)
        cells.setdefault(cell, run)
    by_seeds: dict[tuple[int, ...], list[Run]] = {}
    for cell, of_cell in seeds.items():
        by_seeds.setdefault(tuple(sorted(set(of_cell))), []).append(cells[cell]._replace(seed=min(of_cell)))
    return [Unit(tuple(of_unit), of_seeds) for of_seeds, of_unit in by_seeds.items()]


def complete(
    where: Store,
    runs: Iterable[Run],
    train: Train,
    together: Callable[[Run], Hashable] = alone,
    recorded: Callable[[Unit], None] = lambda unit: None,
) -> list[store.Record]:
    """Makes the runs that the store lacks, and records each group as soon as it is finished.

    Another process may work on the same store: what it is at is left to it, and waited for at the end.

    Args:
        where: the store.
        runs: all runs that there are to be.
        train: makes a unit's runs.
        together: runs with the same value are made in one call of `train` (more calls if they lack different seeds).
        recorded: called with each unit once its runs are on disk, to remove its checkpoint for example.

    Returns:
        The records of these runs, in their order.
    """
    runs = list(runs)
    groups: dict[Hashable, list[Run]] = {}
    for run in runs:
        groups.setdefault(together(run), []).append(run)
    with claims(where.directory) as claim:
        for wait in (False, True):
            for group, of_group in list(groups.items()):
                with claim(_name(where, of_group), wait) as mine:
                    if mine:
                        for unit in units(store.missing(where, of_group)):
                            _make(where, unit, train)
                            recorded(unit)
                        del groups[group]
    by_key = {store.key_of(record): record for record in store.records(where)}
    return [by_key[store.run_key(where.task, run)] for run in runs]


def _name(where: Store, runs: Sequence[Run]) -> str:
    """A name of a group that is the same in every process: the keys of its cells."""
    return json.dumps([where.name, *sorted({f"{run.method} {store.settings_key(run.settings)}" for run in runs})])


def _make(where: Store, unit: Unit, train: Train) -> None:
    start = time.perf_counter()
    results, runs = list(train(unit)), unit.runs
    if len(results) != len(runs):
        raise RuntimeError(f"train gave {len(results)} results for {len(runs)} runs.")
    share = (time.perf_counter() - start) / len(runs)
    store.add(where, list(zip(runs, results, strict=True)), share)
