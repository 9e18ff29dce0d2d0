"""One rule of selection for all tasks: by the mean over the seeds of a figure that validation gives.

A run that broke counts as infinitely bad, and the first of equals wins. Methods that are compared have as many trials,
tried on seeds that no result is reported of. What was chosen, from what and how is recorded in `selection.json`.
"""

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.store import Record, Run, Store

T = TypeVar("T", bound=Hashable)


class Rule(NamedTuple):
    """How hyper-parameters are chosen.

    Attributes:
        figure: name of the metric, one that no test data enter.
        seeds: on which the trials are made.
        largest: whether the largest mean is the best; by default the least.
    """

    figure: str
    seeds: tuple[int, ...]
    largest: bool = False


def best(scores: Mapping[T, Sequence[float]], largest: bool = False) -> T:
    """The name with the best mean; NaN counts as infinitely bad, and so does to have no score at all."""
    sign = -1.0 if largest else 1.0

    def mean(name: T) -> float:
        values = sign * np.asarray(scores[name], float)
        return float(np.mean(np.where(np.isnan(values), np.inf, values))) if len(values) else np.inf

    return min(scores, key=mean)


def trial_runs(trials: Mapping[str, Sequence[Run]], rule: Rule) -> list[Run]:
    """The runs of a selection: every trial of every method on every seed of the rule."""
    return [run._replace(seed=seed) for of_method in trials.values() for run in of_method for seed in rule.seeds]


def choose(where: Store, trials: Mapping[str, Sequence[Run]], rule: Rule) -> dict[str, Run]:
    """Of each method's trials the best by the records of `where`; all of it is added to selection.json."""
    records = store.records(where)
    chosen: dict[str, Run] = {}
    notes: dict[str, Any] = {}
    for method, runs in trials.items():
        scores = {i: _figures(records, where.task, run, rule) for i, run in enumerate(runs)}
        i = best(scores, rule.largest)
        chosen[method] = runs[i]
        notes[method] = {
            "chosen": store.plain(runs[i].settings),
            "trials": len(runs),
            "means": [
                float(np.mean(of_trial)) if np.isfinite(of_trial).all() else None for of_trial in scores.values()
            ],
        }
    _note(where, rule, notes)
    return chosen


def _figures(records: Sequence[Record], task: str, run: Run, rule: Rule) -> list[float]:
    keys = {store.run_key(task, run._replace(seed=seed)) for seed in rule.seeds}
    return [store.values(record)[rule.figure] for record in records if store.key_of(record) in keys]


def _note(where: Store, rule: Rule, notes: Mapping[str, Any]) -> None:
    path = where.directory / f"{where.name}.json"
    with store.locked(where.directory):
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        whole = rule._asdict() | {"methods": old.get("methods", {}) | dict(notes)}
        store.replace(path, (json.dumps(whole, indent=2, allow_nan=False) + "\n").encode())


def check_budgets(counts: Mapping[str, int]) -> None:
    """Raises a ValueError unless every method has the same number of trials."""
    if len(set(counts.values())) > 1:
        raise ValueError(f"methods that are compared must have as many trials, got {dict(counts)}.")


def by_settings(records: Sequence[Record], figure: Callable[[Record], float]) -> dict[str, list[float]]:
    """Settings as text -> the figure of each of their records: what `best` takes."""
    groups: dict[str, list[float]] = {}
    for record in records:
        groups.setdefault(store.settings_key(record["settings"]), []).append(figure(record))
    return groups
