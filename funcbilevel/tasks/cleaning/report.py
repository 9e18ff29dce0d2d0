"""What is shown of the records: one row per method, curves, and the digits with the least weights."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from funcbilevel.tasks._experiment import store, table
from funcbilevel.tasks._experiment.figures import drawn
from funcbilevel.tasks._experiment.methods import colour, in_order
from funcbilevel.tasks._experiment.report import Report
from funcbilevel.tasks._experiment.statistics import Interval, mean_interval
from funcbilevel.tasks._experiment.store import Key, Record, Store
from funcbilevel.tasks.cleaning.methods import METHODS

Beside = Mapping[Key, Mapping[str, Any]]
HEADER = ("method", "seeds", "AUC of the weights", "test accuracy", "validation accuracy", "seconds")


class Row(NamedTuple):
    """A method's means over the seeds, with 95% intervals; no `auc` for a baseline."""

    method: str
    seeds: int
    auc: Interval | None
    accuracy: Interval
    validation: Interval
    seconds: float


def report(directory: Path) -> Report:
    """Table and figure of a directory's records, one table row per method and network."""
    where = Store(directory, "cleaning")
    records = store.records(where)
    groups = networks(records)
    curves, worst = store.beside(where, "curves"), store.beside(where, "worst")
    texts = "\n".join(
        f"## {title}\n\n" + table.markdown(HEADER, map(_cells, summarise(of))) for title, of in groups.items()
    )
    figures = {
        f"cleaning{f'-{name}' if i else ''}.png": partial(draw, title, of, curves, worst)
        for i, ((title, of), name) in enumerate(zip(groups.items(), map(_network, groups.values()), strict=True))
    }
    return Report(_shown(groups), {"table.md": texts}, figures)


def networks(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each data set and network, under a title."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        of = record["settings"]
        title = f"{of['dataset']}, {of['network']}, {of['corruption']:.0%} of the labels wrong"
        groups.setdefault(title, []).append(record)
    return groups


def _network(records: Sequence[Record]) -> str:
    return records[0]["settings"]["network"]


def summarise(records: Sequence[Record]) -> list[Row]:
    """One row per method."""
    rows: list[Row] = []
    for name in in_order(METHODS, (record["method"] for record in records)):
        of = [record for record in records if record["method"] == name]
        values = [store.values(record) for record in of]

        def interval(metric: str, values: Sequence[Mapping[str, float]] = values) -> Interval:
            return mean_interval([v[metric] for v in values])

        area = interval("auc") if all("auc" in v for v in values) else None
        seconds = float(np.mean([record["seconds"] for record in of]))
        rows.append(Row(name, len(of), area, interval("accuracy"), interval("validation_accuracy"), seconds))
    return rows


def _cells(row: Row) -> tuple[str, ...]:
    shown = ("" if i is None else "{:.3f} [{:.3f}, {:.3f}]".format(*i) for i in (row.auc, row.accuracy, row.validation))
    return row.method, str(row.seeds), *shown, f"{row.seconds:.1f}"


def _shown(groups: Mapping[str, Sequence[Record]]) -> table.page:
    def cells(row: Row) -> tuple[str, ...]:
        means = ("" if i is None else f"{i[0]:.3f}" for i in (row.auc, row.accuracy, row.validation))
        return row.method, str(row.seeds), *means, f"{row.seconds:.1f}"

    header = ("method", "seeds", "AUC", "test", "valid.", "seconds")
    tables = [table.terminal(header, map(cells, summarise(of)), title) for title, of in groups.items()]
    note = (
        "Means over the seeds. AUC: the probability that a sample with the right label weighs more than one with a "
        "wrong label; test, valid.: accuracy of the network that the weights have led to. Hyper-parameters are the "
        "same for all. table.md has intervals."
    )
    return table.page(*tables, note)


def draw(title: str, records: Sequence[Record], curves: Beside, worst: Beside, path: Path) -> None:
    """AUC and test accuracy along the runs, and the digits that the best separating method weighs least, as a PNG."""
    rows = summarise(records)
    with drawn(path, figsize=(10.5, 6.2)) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))
        panels = above.subplots(1, 2)
        for row in rows:
            of = [curves[key] for r in records if r["method"] == row.method and (key := store.key_of(r)) in curves]
            own = colour(METHODS, row.method)
            if not of:
                panels[1].axhline(row.accuracy[0], color=own, ls="--", lw=1.2, label=row.method)
                continue
            share = np.array(of[0]["step"]) / of[0]["step"][-1]
            for axes, name in zip(panels, ("auc", "accuracy"), strict=True):
                axes.plot(share, np.mean([line[name] for line in of], axis=0), color=own, lw=1.4, label=row.method)
        panels[0].axhline(0.95, color="0.7", ls=":", lw=1)
        panels[0].set(title="AUC of the weights: right against wrong labels (dotted: 0.95)")
        panels[1].set(title="Test accuracy")
        for axes in panels:
            axes.set(xlabel="share of the inner steps made")
        handles, labels = panels[1].get_legend_handles_labels()
        above.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
        above.suptitle(title[0].upper() + title[1:], fontsize=10)
        _draw_worst(below, rows, records, worst)


def _draw_worst(figure: Any, rows: Sequence[Row], records: Sequence[Record], worst: Beside) -> None:
    """Each with the label that it had; red where that is wrong."""
    areas = {row.method: row.auc[0] for row in rows if row.auc is not None}
    kept = {record["method"]: worst[key] for record in records if (key := store.key_of(record)) in worst}
    if not (areas.keys() & kept):
        return
    method = max(areas.keys() & kept, key=lambda name: areas[name])
    of = kept[method]
    side = round(len(of["picture"][0]) ** 0.5)
    wrong = sum(of["wrong"])
    figure.suptitle(
        f"The {len(of['picture'])} digits with the least weights by {method}, and their labels in training: "
        f"{wrong} are wrong (red)",
        fontsize=9,
    )
    grid = figure.subplots(2, -(-len(of["picture"]) // 2))
    for axes in grid.flat:
        axes.axis("off")
    for axes, picture, label, bad in zip(grid.flat, of["picture"], of["label"], of["wrong"], strict=False):
        axes.imshow(np.reshape(picture, (side, side)), cmap="gray_r")
        axes.set_title(label, fontsize=11, color="C3" if bad else "black", pad=2)
