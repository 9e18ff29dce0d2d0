"""What is shown of the records: one run beside accuracy alone, or methods by their fronts."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from funcbilevel.tasks._experiment import store, table
from funcbilevel.tasks._experiment.figures import drawn
from funcbilevel.tasks._experiment.methods import colour
from funcbilevel.tasks._experiment.options import read_config
from funcbilevel.tasks._experiment.report import Report
from funcbilevel.tasks._experiment.statistics import Interval, mean_interval, pareto_front
from funcbilevel.tasks._experiment.store import Record, Store, values
from funcbilevel.tasks.fairness import outside_report
from funcbilevel.tasks.fairness.losses import Loss
from funcbilevel.tasks.fairness.methods import LAGRANGIAN, ROWS, SINGLE
from funcbilevel.tasks.fairness.networks import ATTENTION, follower_of
from funcbilevel.tasks.fairness.outside import OUTSIDE
from funcbilevel.tasks.fairness.problem import Setting
from funcbilevel.tasks.fairness.summary import Row, gaps_of, label, points, reference, summarise


def report(directory: Path) -> Report:
    """The tables and the figure of a directory's records."""
    where = Store(directory, "fairness")
    runs = sorted(store.records(where), key=_content)
    if "protocol" not in read_config(directory) and len(runs) <= 2:
        return _of_one_run(runs, store.beside(where, "curves"))
    if any(record["method"] in OUTSIDE for record in runs):
        return outside_report.report(runs)
    return _comparison(runs, sorted(store.records(Store(directory, "fairness", "costs")), key=_content))


def _content(record: Record) -> Any:
    """What records are sorted by: not their places in the file."""
    settings = record["settings"]
    return (
        record["method"],
        settings.get("update", ""),
        settings.get("eta", 0.0),
        store.settings_key(settings),
        record["seed"],
    )


def _loss(loss: Sequence[Any], attributes: Sequence[str]) -> str:
    name, attribute = loss
    return name if attribute is None else f"{name} by {attributes[attribute]}"


# One run.


def _of_one_run(runs: Sequence[Record], curves: Mapping[store.Key, Mapping[str, Any]]) -> Report:
    alone = next((record for record in runs if record["method"] == SINGLE), None)
    record = next((record for record in runs if record["method"] != SINGLE), alone)
    if record is None:
        return Report("No run is finished yet.")
    others = [alone] if alone not in (None, record) else []
    of_both = [curves.get(store.key_of(one), {}) for one in (record, *others)]
    figures = {"fairness.png": partial(draw_run, record["method"], of_both)} if of_both[0] else {}
    return Report(_run_shown(record, others), {}, figures)


def setting_of(record: Record) -> Setting:
    """The record's setting as it was."""
    of: dict[str, Any] = {name: value for name, value in record["settings"].items() if name in Setting._fields}
    of |= {name: tuple(of[name]) for name in ("accuracy_widths", "fairness_widths")}
    of["losses"] = tuple(Loss(*loss) for loss in of.get("losses", ()))
    return Setting(**of)


METRICS = (
    ("accuracy", "accuracy"),
    ("parity gap", "dp_gap"),
    ("of mean probabilities", "dp_gap_soft"),
    ("odds gap", "eo_gap"),
    ("of mean probabilities", "eo_gap_soft"),
    ("accuracy of the worst group", "worst_group_accuracy"),
    ("calibration error", "calibration_error"),
)


def _run_shown(record: Record, others: Sequence[Record]) -> table.page:
    settings, setting, metrics = record["settings"], setting_of(record), values(record)
    sizes = {part: metrics.get(f"num_{part}") for part in ("train", "validation", "test")}
    followers = "" if setting.followers == "one" else f", followers {setting.followers}"
    facts = {
        "data": f"{settings['dataset']}, by {' and '.join(settings['attributes'])}",
        "rows": "{:.0f} training, {:.0f} validation, {:.0f} test".format(*sizes.values())
        if all(sizes.values())
        else "",
        "layers": " ".join(_layer(*layer, setting.num_followers) for layer in setting.row) + "  (*follower)",
        "method": record["method"] + followers,
        "unfairness": " + ".join(_loss(loss, settings["attributes"]) for loss in setting.terms),
        "majority's label": f"accuracy {metrics['majority']:.3f}",
        "seconds per epoch": f"{seconds:.2f}" if np.isfinite(seconds := metrics["sweep_epoch_seconds"]) else "",
    }
    columns = [values(one) for one in (record, *others)]
    names = ["test part", record["method"] if others or record["method"] != SINGLE else "accuracy alone"]
    names += ["accuracy alone"] * len(others)
    there = [(name, metric) for name, metric in METRICS if all(metric in of for of in columns)]
    rows = [(name, *(f"{of[metric]:.3f}" for of in columns)) for name, metric in there]
    return table.page(table.facts(facts), table.terminal(names, rows, left=("test part",)))


def _layer(name: str, width: int, num_followers: int) -> str:
    """Its width, with a star for each follower up to its own, and "a" for attention."""
    stars = 1 + follower_of(name, num_followers) if "fairness_" in name else 0
    return f"{width}{'a' if name.endswith(ATTENTION) else ''}{'*' * stars}"


def draw_run(method: str, curves: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Test accuracy, gaps and both objectives by epoch, the second curves being those of accuracy alone, as a PNG."""
    own, *others = curves
    epochs = own["epoch"]
    marker = "." if len(epochs) < 40 else None
    with drawn(path, figsize=(10, 3.2)) as figure:
        accuracy, gaps, objectives = figure.subplots(1, 3)
        accuracy.plot(epochs, own["accuracy"], color="C3", marker=marker, label=method)
        accuracy.set_title("Test accuracy")
        names = {"dp_gap": "parity, decisions", "dp_gap_soft": "parity, probabilities", "eo_gap": "odds, decisions"}
        for (name, text), shade in zip(names.items(), ("C0", "C9", "C4"), strict=True):
            gaps.plot(epochs, own[name], color=shade, marker=marker, label=text)
        for other in others:
            if other:
                accuracy.plot(other["epoch"], other["accuracy"], color="0.6", ls="--", label="accuracy alone")
                gaps.plot(other["epoch"], other["dp_gap"], color="0.6", ls="--", label="parity, accuracy alone")
        gaps.set_title("Differences between groups")
        gaps.set_ylim(bottom=0)
        objectives.plot(epochs, own["outer_objective"], color="C3", marker=marker, label="leader")
        objectives.plot(epochs, own["inner_objective"], color="C0", marker=marker, label="follower")
        objectives.set_title("Training objectives")
        for axes in (accuracy, gaps, objectives):
            axes.set_xlabel("Epoch")
            axes.legend(frameon=False, fontsize=7.5)


# Methods by their fronts.


def _comparison(runs: Sequence[Record], costs: Sequence[Record]) -> Report:
    settings: Mapping[str, Any] = runs[0]["settings"] if runs else {}
    losses = settings.get("losses", [])
    # The published loss is for reproducing numbers: each setting is shown by itself.
    front, gaps = settings.get("loss") != "published-parity", gaps_of(losses)
    rows = summarise(runs, front, gaps) if runs else []
    if not rows:
        return Report("No run is finished yet.")
    title = f"{settings['dataset']}, {settings['num_epochs']} epochs"
    if losses:
        title += ", " + " and ".join(_loss(loss, settings["attributes"]) for loss in losses)
    return Report(
        _comparison_shown(rows, costs, several=bool(losses)),
        {"table.md": table.markdown(_header(rows), map(_cells, rows)) + (SEVERAL if losses else "")},
        {"fairness.png": partial(draw, runs, rows, title, gaps)},
    )


def _cells(row: Row) -> tuple[str, ...]:
    def volume(values: dict[int, float], difference: Interval | None, scale: float) -> tuple[str, str]:
        mean = f"{scale * np.mean(list(values.values())):.{4 if scale == 1 else 2}f}"
        if difference is None:
            return mean, ""
        digits = 4 if scale == 1 else 2
        d, low, high = (scale * value for value in difference)
        return mean, f"{d:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"

    cells = (
        row.label,
        str(row.seeds),
        f"{row.eta:g}",
        f"{row.accuracy:.3f}",
        f"{row.dp_gap:.3f}",
        f"{row.dp_gap_soft:.3f}",
        f"{row.eo_gap:.3f}",
    )
    if not row.hypervolume:
        return (*cells, f"{row.largest_gap:.3f}")
    return (
        *cells,
        str(row.trials),
        *volume(row.hypervolume, row.difference, 1),
        *volume(row.above, row.above_difference, 1e3),
    )


def _header(rows: Sequence[Row]) -> tuple[str, ...]:
    """The columns' names."""
    shared = ("method", "seeds", "eta", "accuracy", "gap", "soft gap", "odds gap")
    if not rows or not rows[0].hypervolume:
        return (*shared, "largest soft gap")
    return (
        *shared,
        "trials",
        "hypervolume",
        "less Lagrangian's [95% CI]",
        "above ref. x1000",
        "less Lagrangian's [95% CI]",
    )


SEVERAL = """
Fronts are of accuracy and one less the larger of the gaps that the losses are about. The plain hypervolume also counts
the majority's label, which is fair by any measure and which some weights of the unfairness lead to; judge by the area
above the reference point.
"""


def _comparison_shown(rows: Sequence[Row], costs: Sequence[Record], several: bool) -> table.page:
    front = bool(rows and rows[0].hypervolume)
    names = ["method", *([] if several else ["eta"]), "accuracy", "gap"]
    names += ["odds", "area"] if several else ["volume"] if front else ["soft gap", "largest"]
    names += ["less Lagrangian's"] if front else []

    def shown(row: Row) -> tuple[str, ...]:
        cells = _cells(row)
        if several:
            return cells[0], cells[3], cells[4], cells[6], *cells[-2:]
        if not front:
            return cells[0], *cells[2:6], cells[7]
        less = "" if row.difference is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row.difference)
        return cells[0], *cells[2:5], f"{np.mean(list(row.hypervolume.values())):.3f}", less

    shown_rows = table.terminal(names, map(shown, rows))
    note = "Means over the seeds on the test part. gap: demographic parity of decisions; "
    note += "odds: equalized odds; " if several else ""
    note += "" if front else "soft gap: of probabilities, and its largest value over the seeds. table.md has more."
    if several:
        note += (
            "area, times 1000: the hypervolume of (accuracy, 1 - the larger of the gaps that the losses are about) of "
            "the settings on the validation part's front, above the majority's label and accuracy alone's gap; its "
            "difference to the Lagrangian's has a 95% bootstrap interval over seeds. The setting shown has the largest "
            "such area on the validation part. table.md has more."
        )
    elif front:
        note += (
            "the setting shown is the one with the largest validation accuracy less gap; the hypervolume of (accuracy, "
            "1 - gap), volume, is that of the settings on the validation part's front; its difference to the "
            "Lagrangian's has a 95% bootstrap interval over seeds. table.md has more."
        )
    lines = [
        f"{label(cost)}: {cost['metrics']['ratio']:.2f} times the Lagrangian's epoch{_arithmetic(cost, control)}"
        for control in costs
        if control["method"] == LAGRANGIAN
        for cost in costs
        if cost["method"] != LAGRANGIAN
    ]
    return table.page(shown_rows, note, *lines)


def _arithmetic(cost: Record, first: Record) -> str:
    flops, of_first = (record["metrics"].get("flops") for record in (cost, first))
    return f", {flops / of_first:.2f} times its arithmetic" if flops and of_first else ""


def draw(runs: Sequence[Record], rows: Sequence[Row], title: str, gaps: Sequence[str], path: Path) -> None:
    """Test accuracy against gap of every setting (mean over seeds; seeds faint), hypervolumes by method, as a PNG."""
    names = list(dict.fromkeys(row.label for row in rows))
    front = any(row.hypervolume for row in rows)
    with drawn(path, figsize=(9.6, 4.6) if front else (6.5, 4.6)) as figure:
        panels: Any = figure.subplots(1, 2 if front else 1, width_ratios=(1.5, 1) if front else None)
        plane = panels[0] if front else panels
        lows: list[float] = []
        for name in names:
            of_name = [record for record in runs if label(record) == name]
            pairs = points([values(record) for record in of_name], gaps=gaps)
            trials = [store.settings_key(record["settings"]) for record in of_name]
            means = np.array([pairs[[t == trial for t in trials]].mean(axis=0) for trial in dict.fromkeys(trials)])
            best = pareto_front(means)
            line = means[best][np.argsort(means[best][:, 1])]
            lows.append(float(np.min(line[:, 0])))
            own = colour(ROWS, name)
            plane.scatter(1 - pairs[:, 1], pairs[:, 0], s=5, color=own, alpha=0.25, lw=0)
            plane.scatter(1 - means[:, 1], means[:, 0], s=16, color=own, lw=0, alpha=0.7)
            # A staircase: between two settings nothing is attainable but the accuracy of the one with the smaller gap.
            style: Any = {"color": own, "drawstyle": "steps-post", "marker": "o", "ms": 4.5, "lw": 1.3}
            plane.plot(1 - line[::-1, 1], line[::-1, 0], label=name, **style)
        names_of = {"dp_gap": "demographic parity", "eo_gap": "equalized odds"}
        gap = " or ".join(names_of[name] for name in gaps)
        gap = f"{gap.capitalize()} gap" if len(gaps) == 1 else f"Gap in {gap}, the larger,"
        plane.set(xlabel=f"{gap} of decisions (test)", ylabel="Accuracy (test)", title=title)
        plane.set_xlim(left=-0.003)
        bottom, majority = min(lows) - 0.012, reference(runs, gaps)[0]  # settings far below the fronts are left out
        plane.set_ylim(bottom=bottom)
        if majority > bottom:
            plane.axhline(majority, color="0.7", lw=0.8, ls=":")
            place: Any = {"xy": (1.0, majority), "xycoords": ("axes fraction", "data")}
            plane.annotate("majority's label", **place, va="top", ha="right", color="0.4", fontsize=8)
        figure.legend(
            *plane.get_legend_handles_labels(), loc="outside lower center", ncols=4 if front else 3, frameon=False
        )
        if front:
            _draw_volumes(panels[1], rows)


def _draw_volumes(axes: Any, rows: Sequence[Row]) -> None:
    """Hypervolume above the reference point by method, with its interval over seeds."""
    for i, row in enumerate(reversed(rows)):
        mean, low, high = mean_interval(list(row.above.values()))
        axes.plot([1e3 * low, 1e3 * high], [i, i], color=colour(ROWS, row.label), lw=2)
        values = 1e3 * np.array(list(row.above.values()))
        axes.scatter(values, np.full(len(values), i), s=8, color=colour(ROWS, row.label), alpha=0.4, lw=0)
        axes.plot(1e3 * mean, i, "o", color=colour(ROWS, row.label), ms=5)
    axes.set_yticks(range(len(rows)), [row.label for row in reversed(rows)])
    axes.set(xlabel="Area above the reference, x1000", title="Seeds, their mean and 95% interval")
