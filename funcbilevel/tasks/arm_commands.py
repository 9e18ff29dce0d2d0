"""`funcbilevel run arm` and `funcbilevel compare arm`: leader and follower on a two-link arm, against one reward."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funcbilevel.tasks import _records, arm
from funcbilevel.tasks._experiment.figures import STYLE
from funcbilevel.tasks._experiment.statistics import mean_interval
from funcbilevel.tasks.arm import Hyper, Setting

if TYPE_CHECKING:
    from rich.console import RenderableType

COLOURS = {"lagrangian": "C0", "leader-only": "0.5", "alternating": "C1", "aid-cg": "C3", "itd": "C4"}
TITLES = {"lagrangian": "weighted reward", "leader-only": "weighted reward, one network"}
"""Other names in figures."""
CONTROL = "lagrangian"
WEIGHTS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
MIDDLE = 0.3
"""The weight of the controllers that are trained again for other conditions."""
EQUAL = 0.09
"""Tracking at which the table compares: 3 cm, in (10 cm)^2."""
# (leader's rate, follower's rate): the same number of trials for every method.
_ONE = ((1e-2, 1e-2), (3e-2, 3e-2))
_TWO = ((1e-2, 1e-2), (1e-3, 3e-2))
TRIALS = {"lagrangian": _ONE, "leader-only": _ONE, "alternating": _TWO, "aid-cg": _TWO, "itd": _TWO}


class Change(NamedTuple):
    """What becomes different after training: its name, the payload, and the weight."""

    name: str
    payload: float
    weight: float


CHANGES = (Change("payload", 1.0, MIDDLE), Change("weight", 0.0, 10 * MIDDLE))
RETRAINING = (25, 100, 400)
"""Steps after a change."""
RATES = (3e-3, 1e-2)
"""Of Adam in these, one of which validation chooses."""


@dataclass(frozen=True)
class _Shared(_records.Options):
    resumable = True
    beside = ("seed", "seeds", "methods")
    methods: tuple[str, ...] = (CONTROL, "aid-cg")
    """Among lagrangian (the weighted reward), leader-only (the same, one network), alternating, aid-cg, itd."""
    seeds: int = 1
    """Number of seeds, from --seed on; they are trained together."""
    updates: int = 400
    """Steps of Adam, the follower's and the leader's counted alike."""
    inner_steps: int = 3
    """The follower's steps per step of the leader."""
    width: int = 16
    """Of the hidden layer of each of the two networks."""

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""
        self.check_counts("seeds", "updates", "inner_steps", "width")
        if not self.methods or not set(self.methods) <= arm.METHODS.keys():
            got = ", ".join(self.methods) or "none"
            raise ValueError(f"--methods must be among {', '.join(arm.METHODS)}, got {got}.")

    @property
    def setting(self) -> Setting:
        """What decides the compiled programs."""
        return Setting(width=self.width, inner_steps=self.inner_steps)

    def complete(self, directory: Path, track: _records.Track) -> dict[str, arm.Sweep]:
        """Trains what runs.jsonl does not hold yet, and returns it by method."""
        trained: dict[str, arm.Sweep] = {}
        path = directory / "runs.jsonl"
        done = {_records.identity(record) for record in _records.read_existing(path)}
        for method in self.methods:
            hypers = [Hyper(weight, *rates) for weight in WEIGHTS for rates in TRIALS[method]]
            keys = [_records.settings_key(settings_of(self.setting, hyper, self.updates)) for hyper in hypers]
            every = range(self.seed, self.seed + self.seeds)
            seeds = [seed for seed in every if any((method, seed, key) not in done for key in keys)]
            if seeds:
                callback = track(method, arm.num_steps(method, self.setting, self.updates))
                outcome = arm.sweep(method, self.setting, hypers, seeds, self.updates, callback=callback)
                _write(path, method, self.setting, outcome, self.updates)
                _write_paths(directory / "paths.jsonl", method, outcome)
                trained[method] = outcome
        return trained

    def report(self, directory: Path) -> "RenderableType":
        """The figure and the table of everything in the directory."""
        runs = list(_records.read_existing(directory / "runs.jsonl"))
        rows = summarise(runs)
        changed = summarise_changes(list(_records.read_existing(directory / "changes.jsonl")))
        (directory / "table.md").write_text(markdown(rows, changed), encoding="utf-8")
        lines = (directory / "paths.jsonl").read_text(encoding="utf-8").splitlines()
        draw(runs, rows, changed, list(map(json.loads, lines)), directory / "arm.png")
        return _table(rows, changed)


@dataclass(frozen=True)
class RunArm(_Shared):
    """A two-link arm: a leader tracks, a follower saves energy, beside one weighted reward for both. Resumable."""

    task = "arm"

    def run(self, directory: Path, track: _records.Track) -> "RenderableType":
        """Writes runs.jsonl, paths.jsonl, table.md and arm.png into `directory`; returns the table."""
        self.complete(directory, track)
        return self.report(directory)


@dataclass(frozen=True)
class CompareArm(_Shared):
    """Every method over weights, rates and seeds, and trained again after changes. Goes on where it stopped."""

    task = "arm"
    methods: tuple[str, ...] = tuple(arm.METHODS)
    """Among lagrangian (the weighted reward), leader-only (the same, one network), alternating, aid-cg, itd; figure
    and table show all that the directory holds."""
    seeds: int = 5
    """Number of seeds, from --seed on; they are trained together."""
    updates: int = 1200
    """Steps of Adam, the follower's and the leader's counted alike."""

    def run(self, directory: Path, track: _records.Track) -> "RenderableType":
        """Adds what is missing to runs.jsonl and changes.jsonl, draws arm.png, returns the table (also table.md)."""
        trained = self.complete(directory, track)
        for method in ("lagrangian", "aid-cg"):
            if method in self.methods:
                self._change(directory, track, method, trained.get(method))
        return self.report(directory)

    def _change(self, directory: Path, track: _records.Track, method: str, trained: arm.Sweep | None) -> None:
        """Trains the method's controllers again after each change: the follower alone, or both players."""
        path, every = directory / "changes.jsonl", range(self.seed, self.seed + self.seeds)
        done = {record["seed"] for record in _records.read_existing(path) if record["method"] == method}
        seeds = [seed for seed in every if seed not in done]
        if not seeds:
            return
        runs = [record for record in _records.read(directory / "runs.jsonl") if record["method"] == method]
        first = Hyper(MIDDLE, *best_rates([record for record in runs if record["settings"]["weight"] == MIDDLE]))
        of = [(hyper, seed) for hyper, seed, _ in trained.cells] if trained else []
        if trained is None or any((first, seed) not in of for seed in seeds):  # of an earlier process: once more
            callback = track(method, arm.num_steps(method, self.setting, self.updates))
            trained = arm.sweep(method, self.setting, [first], seeds, self.updates, callback=callback)
            of = [(first, seed) for seed in seeds]
        players = jax.tree.map(lambda x: x[np.array([of.index((first, seed)) for seed in seeds])], trained.players)
        ways = 1 + 2 * len(RATES)
        start = jax.tree.map(lambda x: jnp.concatenate([x] * ways), players)
        for change in CHANGES:
            after = Hyper(change.weight, 0.0, 0.0, change.payload)
            both = [after._replace(leader_rate=rate, follower_rate=rate) for rate in RATES]
            hypers = [after, *(hyper._replace(leader_rate=0.0) for hyper in both), *both]
            for updates in RETRAINING:
                outcome = arm.sweep(CONTROL, self.setting, hypers, seeds, updates, start=start)
                _write(path, method, self.setting, outcome, updates, {"change": change.name})


# Records.


def settings_of(setting: Setting, hyper: Hyper, updates: int) -> dict[str, Any]:
    """What a record says of a run."""
    return {"updates": updates} | setting._asdict() | hyper._asdict()


def _write(
    path: Path, method: str, setting: Setting, outcome: arm.Sweep, updates: int, more: Mapping[str, Any] | None = None
) -> None:
    """One record per run; seconds are its share of the sweep's."""
    share = outcome.seconds / len(outcome.cells)
    for hyper, seed, values in outcome.cells:
        metrics = {name: float(f"{value:.6g}") for name, value in values.items()}
        metrics |= {"sweep_cells": len(outcome.cells), "sweep_seconds": outcome.seconds}
        settings = settings_of(setting, hyper, updates) | dict(more or {})
        _records.append(path, _records.record("arm", method, seed, settings, metrics, share))


def _write_paths(path: Path, method: str, outcome: arm.Sweep) -> None:
    """The angles on the first test episodes of each run of the first seed, for the drawing."""
    episodes = jax.tree.map(lambda x: x[:SHOWN], arm.held_out(arm.TEST))

    def of_cell(players: tuple[Any, Any]) -> jax.Array:
        return jax.vmap(lambda episode: arm.rollout(arm.Arm(), players[0], players[1], episode).angles)(episodes)

    angles = jax.device_get(jax.jit(jax.vmap(of_cell))(outcome.players))
    with path.open("a", encoding="utf-8") as file:
        for (hyper, seed, _), values in zip(outcome.cells, angles, strict=True):
            if seed == outcome.cells[0][1] and np.isfinite(values).all():
                line = {"method": method, "seed": seed} | hyper._asdict() | {"angles": values.round(3).tolist()}
                file.write(json.dumps(line) + "\n")


SHOWN = 4
"""Episodes of which paths are kept."""


# What is shown of them.


def _values(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: np.nan if value is None else value for name, value in record["metrics"].items()}


def validation_cost(record: Mapping[str, Any]) -> float:
    """Tracking + w (energy + intrusion) on the validation episodes; inf for a run that broke."""
    of, weight = _values(record), record["settings"]["weight"]
    cost = of["validation_tracking"] + weight * (of["validation_energy"] + of["validation_intrusion"])
    return float(np.nan_to_num(cost, nan=np.inf))


def _test_cost(record: Mapping[str, Any]) -> float:
    of = _values(record)
    return of["tracking"] + record["settings"]["weight"] * (of["energy"] + of["intrusion"])


def best_rates(records: Sequence[_records.Record]) -> tuple[float, float]:
    """(leader's, follower's): those with the least validation cost, mean over the seeds."""
    by_rates: dict[tuple[float, float], list[float]] = {}
    for record in records:
        rates = record["settings"]["leader_rate"], record["settings"]["follower_rate"]
        by_rates.setdefault(rates, []).append(validation_cost(record))
    return min(by_rates, key=lambda rates: np.mean(by_rates[rates]))


class Row(NamedTuple):
    """One method.

    Attributes:
        method: its name.
        trials: settings per seed.
        broken: how many of its runs ended with NaN.
        fronts: seed -> the runs on the validation front.
        ratio: energy over the control's at equal tracking, seed -> geometric mean over the range that both reach.
        seconds: of training all seeds, compilation included.
    """

    method: str
    trials: int
    broken: int
    fronts: dict[int, list[Mapping[str, float]]]
    ratio: dict[int, float]
    seconds: float


def summarise(runs: Sequence[_records.Record]) -> list[Row]:
    """One row per method, in the order of `arm.METHODS`."""
    by_method: dict[str, dict[int, list[dict[str, float]]]] = {}
    for record in runs:
        by_method.setdefault(record["method"], {}).setdefault(record["seed"], []).append(_values(record))
    fronts = {m: {s: arm.selected(cells) for s, cells in seeds.items()} for m, seeds in by_method.items()}
    control = fronts.get(CONTROL, {})
    rows: list[Row] = []
    for method in arm.METHODS:
        if method in by_method:
            cells = [cell for group in by_method[method].values() for cell in group]
            ratio = {
                seed: arm.energy_ratio(arm.points(front), arm.points(control[seed]))
                for seed, front in fronts[method].items()
                if seed in control
            }
            rows.append(
                Row(
                    method,
                    max(map(len, by_method[method].values())),
                    int(np.sum(~np.isfinite(arm.points(cells)).all(axis=1))),
                    fronts[method],
                    ratio,
                    sum({cell["sweep_seconds"] for cell in cells}),
                )
            )
    return rows


class Changed(NamedTuple):
    """Controllers of a method, some steps after a change; costs on the test episodes, one per seed.

    Attributes:
        method, change, updates: of which controllers, what changed, how many steps ago.
        untrained: with the controllers as they were.
        follower, both: with the follower alone trained again, or both players.
    """

    method: str
    change: str
    updates: int
    untrained: list[float]
    follower: list[float]
    both: list[float]


def summarise_changes(records: Sequence[_records.Record]) -> list[Changed]:
    """By change, method and number of steps; of the rates those that are best on the validation episodes."""
    groups: dict[tuple[str, str, int], list[_records.Record]] = {}
    for record in records:
        key = record["settings"]["change"], record["method"], record["settings"]["updates"]
        groups.setdefault(key, []).append(record)

    def chosen(group: Sequence[_records.Record], leader: bool, follower: bool) -> list[float]:
        def moved(record: _records.Record) -> tuple[bool, bool]:
            return record["settings"]["leader_rate"] > 0, record["settings"]["follower_rate"] > 0

        of = [record for record in group if moved(record) == (leader, follower)]
        rate = best_rates(of)[1]
        return [_test_cost(record) for record in of if record["settings"]["follower_rate"] == rate]

    return [
        Changed(
            method,
            change,
            updates,
            chosen(group, False, False),
            chosen(group, False, True),
            chosen(group, True, True),
        )
        for (change, method, updates), group in groups.items()
    ]


HEADER = (
    "method",
    "seeds",
    "trials",
    "broken",
    "energy / control's [95% CI]",
    "energy at 3 cm",
    "inside at 3 cm",
    "alone at 3 cm",
    "seconds",
)
CHANGES_HEADER = ("change", "method", "steps", "untrained", "follower", "both", "follower / both [95% CI]")


def _mean_at(row: Row, name: str) -> float:
    """The mean over the seeds of a metric at equal tracking."""
    return float(np.mean([arm.at_tracking(front, name, EQUAL) for front in row.fronts.values()]))


def _ratio(row: Row) -> str:
    values = [value for value in row.ratio.values() if np.isfinite(value)]
    if row.method == CONTROL or not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    lost = f", {len(values)} seeds" if len(values) < len(row.ratio) else ""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*mean_interval(values)) + lost


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.method,
        str(len(row.fronts)),
        str(row.trials),
        str(row.broken),
        _ratio(row),
        f"{arm.TORQUE**2 * _mean_at(row, 'energy'):.2f}",
        f"{100 * _mean_at(row, 'inside'):.1f}%",
        f"{10 * _mean_at(row, 'alone') ** 0.5:.1f} cm",
        f"{row.seconds:.0f}",
    )


def _change_cells(row: Changed) -> tuple[str, ...]:
    ratio = mean_interval(list(np.array(row.follower) / np.array(row.both)))
    return (
        row.change,
        row.method,
        str(row.updates),
        *(f"{np.mean(values):.3f}" for values in (row.untrained, row.follower, row.both)),
        "{:.2f} [{:.2f}, {:.2f}]".format(*ratio),
    )


def markdown(rows: Sequence[Row], changed: Sequence[Changed]) -> str:
    """The tables in Markdown."""
    table = _records.markdown_table(HEADER, map(_cells, rows))
    return table + ("\n" + _records.markdown_table(CHANGES_HEADER, map(_change_cells, changed)) if changed else "")


def _table(rows: Sequence[Row], changed: Sequence[Changed]) -> "RenderableType":
    from rich.console import Group  # noqa: PLC0415

    note = (
        "Test episodes, on fronts that validation chose. energy: at equal tracking over that of lagrangian (the "
        "weighted reward), mean over the range that both reach, with its 95% bootstrap interval over seeds; at an "
        "error of 3 cm the mean squared torque in (N m)^2, the time outside the zone, and the error with the follower "
        "switched off. table.md has more."
    )
    parts: list[Any] = [
        _records.terminal_table(
            ("method", "energy ratio", "at 3 cm", "inside", "alone"),
            [(line[0], *line[4:8]) for line in map(_cells, rows)],
        ),
        "",
        textwrap.fill(note, 78),
    ]
    if changed:
        lines = list(map(_change_cells, changed))
        header = ("change", "method", "steps", "before", "follower", "both", "ratio")
        parts += ["", _records.terminal_table(header, lines, left=("change", "method")), ""]
        after = "Weighted cost after training again for so many steps: the follower alone, or both players."
        parts.append(textwrap.fill(after, 78))
    return Group(*parts)


def draw(
    runs: Sequence[_records.Record],
    rows: Sequence[Row],
    changed: Sequence[Changed],
    paths: Sequence[Mapping[str, Any]],
    path: Path,
) -> None:
    """Energy against tracking error, ratios at equal error, the arm's paths, and what a change costs, as a PNG."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 8) if changed else (15, 4.2), layout="constrained")
        panels: Any = figure.subplots(2, 2).ravel() if changed else figure.subplots(1, 3)
        _draw_fronts(panels[0], rows)
        _draw_ratios(panels[1], [row for row in rows if row.method != CONTROL])
        _draw_paths(panels[2], runs, paths)
        if changed:
            _draw_changes(panels[3], [row for row in changed if row.change == CHANGES[0].name])
        figure.savefig(path, dpi=150)


def _name(method: str) -> str:
    return TITLES.get(method, method)


def _draw_fronts(axes: Any, rows: Sequence[Row]) -> None:
    for row in rows:
        for i, front in enumerate(row.fronts.values()):
            x, y = arm.points(front).T
            axes.plot(
                10 * np.sqrt(x),
                arm.TORQUE**2 * y,
                color=COLOURS[row.method],
                marker="o",
                ms=2.5,
                lw=0.9,
                alpha=0.7,
                ls=":" if row.method == "leader-only" else "-",
                label=None if i else _name(row.method),
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xticks([1, 2, 3, 5, 10])
    axes.set_yticks([1, 2, 5, 10, 20])
    axes.set(
        xlabel="Root mean square tracking error (cm)",
        ylabel="Mean squared torque ((N m)²)",
        title="Energy against tracking error: a line is a seed's front",
    )
    axes.legend(frameon=False, fontsize=8)


def _draw_ratios(axes: Any, rows: Sequence[Row]) -> None:
    shown = [row for row in reversed(rows) if np.isfinite(list(row.ratio.values())).any()]
    for i, row in enumerate(shown):
        values = np.array([value for value in row.ratio.values() if np.isfinite(value)])
        mean, low, high = mean_interval(list(values))
        axes.plot([low, high], [i, i], color=COLOURS[row.method], lw=2)
        axes.scatter(values, np.full(len(values), i), s=10, color=COLOURS[row.method], alpha=0.5, lw=0)
        axes.plot(mean, i, "o", color=COLOURS[row.method], ms=6)
    axes.axvline(1.0, color=COLOURS[CONTROL], lw=1, label=_name(CONTROL))
    axes.set_yticks(range(len(shown)), [_name(row.method).replace(", ", ",\n") for row in shown])
    axes.set_ylim(-0.6, len(shown) - 0.2)
    axes.set(
        xlabel="Energy over that of the weighted reward's front (less is better)",
        title="At equal tracking error: seeds, mean and 95% interval",
    )
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def _draw_paths(axes: Any, runs: Sequence[_records.Record], paths: Sequence[Mapping[str, Any]]) -> None:
    """The end point's paths of the runs nearest to the same validation error, and the arm at three times."""
    tracking = {
        (
            r["method"],
            r["seed"],
            r["settings"]["weight"],
            r["settings"]["leader_rate"],
            r["settings"]["follower_rate"],
        ): (_values(r)["validation_tracking"])
        for r in runs
    }

    def distance(line: Mapping[str, Any]) -> float:
        key = tuple(line[name] for name in ("method", "seed", "weight", "leader_rate", "follower_rate"))
        return abs(np.log(tracking[key] / EQUAL))

    references = np.asarray(arm.held_out(arm.TEST).position[:SHOWN])
    episode = int(np.argmax(np.sum(np.linalg.norm(np.diff(references, axis=1), axis=-1), axis=1)))  # the longest
    reference = references[episode]
    axes.axvspan(arm.ZONE, 1.0, color="C1", alpha=0.12, lw=0)
    axes.annotate("zone of people", (arm.ZONE + 0.01, 0.97), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    axes.plot(*reference.T, color="0.2", lw=3, alpha=0.3, label="reference")
    for method, width in (("lagrangian", 4.0), ("alternating", 2.2), ("aid-cg", 0.8)):  # they may coincide
        lines = [line for line in paths if line["method"] == method]
        if lines:
            angles = jnp.asarray(min(lines, key=distance)["angles"][episode])
            ends = np.asarray(jax.vmap(lambda q: arm.end_point(arm.Arm(), q))(angles))
            axes.plot(*ends.T, color=COLOURS[method], lw=width, label=_name(method))
            if method == "lagrangian":
                for q in angles[:: len(angles) // 2]:
                    elbow = 0.5 * np.array([np.cos(q[0]), np.sin(q[0])])
                    end = np.asarray(arm.end_point(arm.Arm(), q))
                    axes.plot(*np.array([(0.0, 0.0), elbow, end]).T, color="0.75", lw=2, marker="o", ms=3, zorder=0)
    axes.set_aspect("equal")
    axes.set(xlim=(-0.3, 1.35), ylim=(-0.65, 0.25))
    axes.set(xlabel="x (m)", ylabel="y (m)", title="A test reference, at a mean error of about 3 cm")
    axes.legend(frameon=False, fontsize=8, loc="center right")


def _draw_changes(axes: Any, changed: Sequence[Changed]) -> None:
    for method in dict.fromkeys(row.method for row in changed):
        of = sorted((row for row in changed if row.method == method), key=lambda row: row.updates)
        for kind, style in (("follower", "-"), ("both", "--")):
            values = [of[0].untrained, *(getattr(row, kind) for row in of)]
            means, lows, highs = np.array([mean_interval(sample) for sample in values]).T
            steps = range(len(values))
            label = f"{_name(method)}: " + ("its follower" if kind == "follower" else "both networks")
            axes.plot(steps, means, style, color=COLOURS[method], marker="o", ms=3, label=label)
            axes.fill_between(steps, lows, highs, color=COLOURS[method], alpha=0.15, lw=0)
    axes.set_xticks(range(1 + len(RETRAINING)), ["0", *map(str, RETRAINING)])
    axes.set_ylim(bottom=0)
    axes.set(
        xlabel="Steps of training after the change",
        ylabel="tracking + w (energy + intrusion)",
        title=f"A payload of {CHANGES[0].payload:g} kg is added, then players train again",
    )
    axes.legend(frameon=False, fontsize=8)
