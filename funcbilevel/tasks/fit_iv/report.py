"""What is shown of the records: average derivatives beside linear models, the first stage, and the curves."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from funcbilevel.tasks._experiment import store, table
from funcbilevel.tasks._experiment.figures import drawn
from funcbilevel.tasks._experiment.report import Report
from funcbilevel.tasks._experiment.store import Store

METHODS = NEURAL, TWO_STAGE, LEAST_SQUARES = "neural-iv", "iv2sls", "ols"
Metrics = Mapping[str, Mapping[str, float]]
"""Method -> its metrics."""


def slopes(by_treatment: Mapping[str, tuple[float, float, float]]) -> dict[str, float]:
    """Metrics of a slope and its interval for each treatment; `slope_of` reads them."""
    parts = ("slope", "low", "high")
    return {f"{x}: {part}": value for x, of in by_treatment.items() for part, value in zip(parts, of, strict=True)}


def slope_of(metrics: Mapping[str, float], treatment: str) -> tuple[float, float, float]:
    """(slope, low, high)."""
    slope, low, high = (metrics[f"{treatment}: {part}"] for part in ("slope", "low", "high"))
    return slope, low, high


def report(directory: Path) -> Report:
    """The table and the figure of a directory's records."""
    where = Store(directory, "fit-iv")
    records = {record["method"]: record for record in store.records(where)}
    if records.keys() < {*METHODS}:
        return Report("Not all models are fitted yet; run the same command again to go on.")
    settings, metrics = records[NEURAL]["settings"], {name: store.values(of) for name, of in records.items()}
    rows = [_cells(name, metrics) for name in settings["treatment"]]
    notes = _notes(settings, metrics)
    title = f"{settings['outcome']} on {', '.join(settings['treatment'])}, n = {settings['n']}"
    lines = store.beside(where, "curves")[store.key_of(records[NEURAL])]
    return Report(
        table.page(table.terminal(HEADER, rows, title, left=("treatment",)), *notes),
        {"table.md": table.markdown(HEADER, rows) + "".join(f"\n{note}\n" for note in notes)},
        {"iv.png": partial(draw, settings, metrics, lines)},
    )


HEADER = ("treatment", "NeuralIV [95%]", "2SLS [95%]", "OLS [95%]", "F", "partial R2")


def _cells(treatment: str, metrics: Metrics) -> tuple[str, ...]:
    of = metrics[NEURAL]
    return (
        treatment,
        *("{:.3g} [{:.3g}, {:.3g}]".format(*slope_of(metrics[name], treatment)) for name in METHODS),
        f"{of[f'{treatment}: first-stage F']:.1f}",
        f"{of[f'{treatment}: partial R2']:.3g}",
    )


def _notes(settings: Mapping[str, Any], metrics: Metrics) -> list[str]:
    from funcbilevel.iv import weakness  # noqa: PLC0415

    of = metrics[NEURAL]
    warned = [weakness(name, of[f"{name}: first-stage F"]) for name in settings["treatment"]]
    return [
        *(f"Warning. {text}" for text in warned if text),
        "Slopes: derivatives of the structural function averaged over rows, by an ensemble of networks on bootstrap "
        f"samples ({settings['num_members']} of them); of the linear models coefficients, with robust intervals. F and "
        "partial R2: of the instruments beside the covariates in the linear first stage.",
    ]


def draw(settings: Mapping[str, Any], metrics: Metrics, lines: Mapping[str, Any], path: Path) -> None:
    """The curve of each treatment with its band, and the lines of the linear models through the means, as a PNG."""
    names: Sequence[str] = settings["treatment"]
    with drawn(path, figsize=(5.2 * len(names), 4.4)) as figure:
        panels: Any = figure.subplots(1, len(names), squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            curve = {key: np.array(values, float) for key, values in lines["curves"][name].items()}
            x, centre = curve["value"], float(curve["mean"])
            axes.fill_between(x, curve["low"], curve["high"], color="C3", alpha=0.15, lw=0, label="NeuralIV, 95% band")
            axes.plot(x, curve["estimate"], color="C3", lw=2, label="NeuralIV")
            slope, low, high = slope_of(metrics[TWO_STAGE], name)
            edges = [lines["mean_outcome"] + bound * (x - centre) for bound in (low, high)]
            axes.fill_between(x, *edges, color="C0", alpha=0.1, lw=0, label="2SLS, 95% interval")
            axes.plot(x, lines["mean_outcome"] + slope * (x - centre), color="C0", lw=1.4, label="2SLS")
            slope = slope_of(metrics[LEAST_SQUARES], name)[0]
            axes.plot(x, lines["mean_outcome"] + slope * (x - centre), color="0.3", lw=1.4, ls="--", label="OLS")
            f = metrics[NEURAL][f"{name}: first-stage F"]
            axes.set(xlabel=name, ylabel=f"{settings['outcome']} if {name} were set", title=f"First-stage F = {f:.1f}")
        panels[0].legend(frameon=False, fontsize=8)
