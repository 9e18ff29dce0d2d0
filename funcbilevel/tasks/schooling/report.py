"""What is shown of the records of `run schooling`: coefficients by method, and the neural wage-education curve."""

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from funcbilevel.tasks._experiment import store, table
from funcbilevel.tasks._experiment.figures import drawn
from funcbilevel.tasks._experiment.methods import in_order
from funcbilevel.tasks._experiment.report import Report
from funcbilevel.tasks._experiment.store import Store
from funcbilevel.tasks.schooling.methods import ALTERNATING, LESSONS, METHODS, OLS, POINTWISE, TWO_STAGE
from funcbilevel.tasks.schooling.problem import ORIGIN, REGRESSORS

Linear = Mapping[str, Mapping[str, float]]
"""Method -> metrics of the linear fits, in the order of tables."""


def report(directory: Path) -> Report:
    """The table and, if there is a neural fit, its figure, of a directory's records."""
    where = Store(directory, "schooling")
    records, beside = store.records(where), store.beside(where, "curves")
    by_method = {of["method"]: store.values(of) for of in records if of["settings"]["outcome"] == "linear"}
    linear = {name: by_method[name] for name in in_order(METHODS, by_method)}
    curves = [line for of in records if (line := beside.get(store.key_of(of)))]
    drawable = curves and {OLS, TWO_STAGE} <= linear.keys() and "educ_low" in linear[TWO_STAGE]
    figures = {"wage_curve.png": partial(draw, linear, curves[-1], records[0]["settings"]["n"])} if drawable else {}
    return Report(_shown(linear), {"table.md": table.markdown(HEADER, map(_cells, linear, linear.values()))}, figures)


HEADER = ("method", "educ", "rel diff", *(name for name in REGRESSORS if name not in ("educ", "const")), "const")


def _cells(name: str, metrics: Mapping[str, float]) -> tuple[str, ...]:
    def cell(column: str) -> str:
        if column == "rel diff":
            return "" if name == TWO_STAGE else f"{metrics['max_relative_difference']:.1e}"
        return f"{metrics[column]:.{5 if column == 'expersq' else 4}f}"

    return name, *map(cell, HEADER[1:])


def _shown(linear: Linear) -> table.page:
    names = list(linear)
    shown = table.terminal(
        HEADER,
        map(_cells, linear, linear.values()),
        "Log wage on education, education instrumented by nearc4; Card (1995)",
        sections=[names.index(name) for name in (TWO_STAGE, "itd") if name in names],
        dim=[names.index(name) for name in LESSONS if name in names],
    )
    return table.page(shown, "\n".join(_notes(linear)))


def _notes(linear: Linear) -> Sequence[str]:
    notes = ["rel diff: largest relative difference to iv2sls over the seven coefficients."]
    if "educ_low" in (of := linear.get(TWO_STAGE, {})):
        notes.append(
            f"{TWO_STAGE}: by linearmodels; 95% interval of educ [{of['educ_low']:.3f}, {of['educ_high']:.3f}], "
            f"first-stage F {of['first_stage_f']:.1f}."
        )
    if ALTERNATING in linear:
        notes.append(
            f"{ALTERNATING}: a lesson. The outer objective reaches outer_params only through the prediction h, so the "
            "explicit part of the hypergradient, all that this method takes, is zero: the coefficients stay at their "
            "start."
        )
    if {POINTWISE, OLS} <= linear.keys():
        to_ols = max(abs(linear[POINTWISE][name] / linear[OLS][name] - 1) for name in REGRESSORS)
        notes.append(
            f"{POINTWISE}: a lesson. It answers another question: with h and the adjoint free at each person, h "
            f"interpolates f(x), the confounding comes back, and the answer is OLS (to {to_ols:.0e})."
        )
    return notes


def draw(linear: Linear, neural: Mapping[str, Any], n: int, path: Path) -> None:
    """The wage-education curve by OLS, by 2SLS with its 95% interval, and by the neural fit, as a PNG."""
    shown = np.array(neural["years"]) >= 8  # 98% of the sample
    years, curve = np.array(neural["years"])[shown], np.array(neural["curve"], float)[shown]
    resamples, two_stage = np.array(neural["resamples"], float), linear[TWO_STAGE]
    low, high = (two_stage[name] * (years - ORIGIN) for name in ("educ_low", "educ_high"))
    with drawn(path, dpi=200, figsize=(6.4, 5.4)) as figure:
        axes, counts = figure.subplots(2, height_ratios=(5, 1), sharex=True)
        axes.fill_between(years, low, high, color="C0", alpha=0.13, lw=0, label="2SLS, 95% interval")
        for i, resample in enumerate(resamples):
            label = "" if i else f"Neural FuncID, {len(resamples)} bootstrap resamples"
            axes.plot(years, resample[shown], color="C3", alpha=0.35, lw=0.7, label=label)
        axes.plot(years, linear[OLS]["educ"] * (years - ORIGIN), color="0.3", lw=1.8, ls="--", label="OLS")
        axes.plot(years, two_stage["educ"] * (years - ORIGIN), color="C0", lw=2, label="2SLS")
        axes.plot(years, curve, color="C3", lw=2.2, label="Neural FuncID")
        axes.set_ylabel(f"Log wage relative to {ORIGIN} years of education")
        axes.legend(frameon=False, loc="upper left", reverse=True)
        counts.bar(years, np.array(neural["men"])[shown], width=0.8, color="0.8")
        counts.set_xlabel("Education (years)")
        counts.set_ylabel("Men")
        figure.align_ylabels()
        caption = (
            f"Card (1995), n = {n}. 2SLS: nearc4 is the instrument, and identifies one mean slope "
            f"(first-stage F = {two_stage['first_stage_f']:.1f}). Neural: a network in education, linear in the other "
            "covariates; nearc4 and its products with these are the instruments, and a penalty on second differences, "
            "set by hand, keeps it smooth. Its mean slope is identified, its bend only weakly."
        )
        figure.supxlabel(textwrap.fill(caption, 116), fontsize=7.5, color="0.35", x=0.02, ha="left")
