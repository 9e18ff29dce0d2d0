"""`funcbilevel run iv` and `funcbilevel compare iv`: instrumental regression on dSprites, one method or all of them."""

import itertools
import json
import os
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import funcbilevel as fb
from funcbilevel.tasks import _records, dsprites, iv
from funcbilevel.tasks._experiment.figures import STYLE, draw_boxes
from funcbilevel.tasks._experiment.statistics import bootstrap_interval, paired_p_value

if TYPE_CHECKING:
    from rich.console import RenderableType

QUICK: Any = {"n": 1000, "widths": (256, 128, 64, 32)}
COLOURS = {
    "funcid-linear": "C3",
    "funcid-learned": "C1",
    "dfiv": "C0",
    "aid-cg": "C2",
    "itd": "C4",
    "penalty-value": "C5",
    "penalty-gradient": "C6",
    "kernel-iv": "0.4",
    "two-stage": "0.6",
    "least-squares": "0.75",
}


@dataclass(frozen=True)
class _Shared(_records.Options):
    beside = ("download",)
    n: int = 5000
    """Sample size, even; half of it is the inner level's."""
    num_outer_steps: int = 100
    """Outer steps of each run."""
    batch_size: int | None = None
    """Samples per level and step, drawn with replacement; by default all."""
    widths: tuple[int, int, int, int] = iv.Setting().widths
    """Of the treatment network's layers."""
    norm: iv.Norm = "layer"
    """Layer or batch normalisation in both networks."""
    images: Path | None = None
    """The official dSprites file; by default $FUNCBILEVEL_DSPRITES, or else hearts drawn here."""
    download: bool = False
    """Use the official dSprites file, fetched from its public home (26 MB) unless it is in the cache already."""
    matrix: Path | None = None
    """The outcome matrix as .npy; by default $FUNCBILEVEL_DSPRITES_MATRIX, or else one drawn from U(0, 1)."""

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""
        if min(self.widths) < 1:
            raise ValueError(f"--widths must be at least 1, got {self.widths}.")
        if self.n < 20 or self.n % 2:
            raise ValueError(f"--n must be even and at least 20, got {self.n}.")
        if self.num_outer_steps < 1:
            raise ValueError(f"--num-outer-steps must be at least 1, got {self.num_outer_steps}.")
        if self.batch_size is not None and self.batch_size < 2:
            raise ValueError(f"--batch-size must be at least 2, got {self.batch_size}.")
        for name in ("images", "matrix"):
            if (path := getattr(self, name)) is not None and not path.is_file():
                raise ValueError(f"--{name}: there is no file {path}.")

    def settings(self) -> dict[str, Any]:
        """The options that decide the numbers; of files the name only."""
        images = dsprites.URL if self.download else self.images or os.environ.get(dsprites.IMAGES_VARIABLE)
        matrix = self.matrix or os.environ.get(dsprites.MATRIX_VARIABLE)
        names = {
            "images": Path(images).name if images else "rendered",
            "matrix": Path(matrix).name if matrix else "drawn",
        }
        return super().settings() | names

    def status(self, metrics: Mapping[str, Any]) -> str:
        """Both objectives and the test MSE."""
        outer, inner, error = (metrics[name][-1] for name in ("outer_objective", "inner_objective", "test_mse"))
        return f"outer {outer:.2f}, inner {inner:.3f}, test MSE {error:.2f}"

    def source(self) -> dsprites.Hearts:
        """The pictures that the options ask for."""
        return dsprites.hearts(dsprites.download() if self.download else self.images)


# One run.


@dataclass(frozen=True)
class RunIV(_Shared):
    """Instrumental regression on dSprites (Xu et al. 2021) by one method, with live progress and a figure."""

    task = "iv"
    method: str = "funcid-linear"
    """One of funcid-linear, funcid-learned, dfiv, aid-cg, itd, penalty-value, penalty-gradient."""
    quick: bool = False
    """n = 1,000 and a smaller treatment network."""

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""
        super().check()
        if self.method not in iv.METHODS:
            raise ValueError(f"--method must be one of {', '.join(iv.METHODS)}, got {self.method!r}.")

    def run(self, directory: Path, track: _records.Track) -> "RenderableType":
        """Writes metrics.jsonl, its curves and iv.png into `directory`; returns a table."""
        source, (B, origin) = self.source(), dsprites.outcome_matrix(self.matrix)
        setting = iv.Setting(n=self.n, widths=self.widths, norm=self.norm)
        setting = setting._replace(**QUICK) if self.quick else setting
        data = iv.arrays(setting.n, self.seed, source, B)
        hyper = iv.METHODS[self.method].chosen
        solver = iv.solver(self.method, setting, hyper)
        callback = track(self.method, self.num_outer_steps)
        start = time.perf_counter()
        outcome = iv.run(
            solver, data, self.seed, self.num_outer_steps, chunk=5, batch_size=self.batch_size, callback=callback
        )
        settings = iv.settings_of(setting, hyper, self.num_outer_steps, self.batch_size)
        iv.write(directory, "metrics", self.method, self.seed, settings, outcome, time.perf_counter() - start)
        draw_run(self.method, data, outcome, directory / "iv.png")
        return _run_report(self.method, setting, source.name, origin, data, outcome)


def _run_report(
    method: str, setting: iv.Setting, images: str, matrix: str, data: iv.Arrays, outcome: iv.Outcome
) -> "RenderableType":
    from rich.table import Table  # noqa: PLC0415

    evaluation, last = outcome.evaluation, outcome.metrics
    table = Table.grid(padding=(0, 2))
    variance = float(jnp.var(data.test_y))
    table.add_row("images", images)
    table.add_row("outcome matrix", matrix)
    table.add_row("samples", f"{setting.n // 2} inner, {setting.n // 2} outer")
    table.add_row("method", method)
    table.add_row("test MSE", f"{float(evaluation.test_mse):.3f}  (predicting the mean: {variance:.1f})")
    table.add_row("validation loss", f"{float(evaluation.validation_loss):.2f}")
    table.add_row("outer objective", f"{last['outer_objective']:.3f}")
    table.add_row("inner objective", f"{last['inner_objective']:.4f}")
    table.add_row("seconds per outer step", f"{outcome.seconds_per_step:.3f}")
    return table


def draw_run(method: str, data: iv.Arrays, outcome: iv.Outcome, path: Path) -> None:
    """Objectives and test error by step, predicted against true structural values, and some pictures, as a PNG."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    curves, steps = outcome.curves, outcome.curves["step"]
    true, predicted = np.asarray(data.test_y), np.asarray(outcome.evaluation.predictions)
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        panels: Any = figure.subplot_mosaic(
            [["objectives", "mse", "scatter"], ["pictures", "pictures", "pictures"]], height_ratios=(3, 1)
        )
        axes = panels["objectives"]
        axes.plot(steps, curves["outer_objective"], color="C3", label="outer")
        axes.set(xlabel="Outer step", ylabel="Outer objective")
        axes.yaxis.label.set_color("C3")
        twin = axes.twinx()
        twin.plot(steps, curves["inner_objective"], color="C0", label="inner")
        twin.set_ylabel("Inner objective", color="C0")
        twin.spines["right"].set_visible(True)
        axes.set_title("Objectives")

        axes = panels["mse"]
        axes.semilogy(steps, curves["test_mse"], color="C3", marker=".")
        axes.set(xlabel="Outer step", ylabel="Test MSE", title=f"Test MSE, at the end {curves['test_mse'][-1]:.2f}")

        axes = panels["scatter"]
        low, high = float(np.min(true)), float(np.max(true))
        axes.plot([low, high], [low, high], color="0.6", lw=1)
        axes.scatter(true, predicted, s=6, color="C3", alpha=0.6, lw=0)
        axes.set(xlabel="True structural value", ylabel="Predicted", title=f"588 test pictures, {method}")

        shown = np.asarray(data.inner.x[:10]).reshape(10, 64, 64)
        strip = np.concatenate(np.pad(shown, ((0, 0), (0, 0), (0, 3)), constant_values=1.0), axis=1)
        panels["pictures"].imshow(strip, cmap="gray", vmin=-0.2, vmax=1.0)
        panels["pictures"].set_axis_off()
        panels["pictures"].set_title("Treatments: ten noisy pictures of the inner sample")
        figure.savefig(path, dpi=150)


# All of them.


@dataclass(frozen=True)
class CompareIV(_Shared):
    """Instrumental regression on dSprites by every method over many seeds. Run it again to go on where it stopped."""

    task = "iv"
    resumable = True
    beside = (*_Shared.beside, "seed", "seeds", "methods", "references", "costs", "select", "selection_n")
    seeds: int = 20
    """Number of seeds, from --seed on."""
    methods: tuple[str, ...] = tuple(iv.METHODS)
    """Methods to run; the figure and the table show all that the output directory holds."""
    references: bool = True
    """Kernel IV, two-stage least squares on the raw instruments and regression on the pixels, too."""
    select: bool = False
    """First choose hyper-parameters anew, by the validation loss on four other seeds; else those chosen before."""
    selection_n: int = 2000
    """Sample size of that selection."""
    costs: bool = True
    """Measure time and memory of one outer step of each method."""

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""
        super().check()
        self.check_counts("seeds")
        if unknown := [method for method in self.methods if method not in iv.METHODS]:
            raise ValueError(f"--methods must be among {', '.join(iv.METHODS)}, got {', '.join(unknown)}.")

    def run(self, directory: Path, track: _records.Track) -> "RenderableType":
        """Adds what is missing to runs.jsonl and its curves, draws iv.png, and returns the table (also table.md)."""
        source, (B, _) = self.source(), dsprites.outcome_matrix(self.matrix)
        setting = iv.Setting(n=self.n, widths=self.widths, norm=self.norm)
        chosen = {method: iv.METHODS[method].chosen for method in self.methods}
        if self.select:
            chosen = self._select(directory, track, source, B, setting._replace(n=self.selection_n))
        done = {_records.identity(record) for record in _records.read_existing(directory / "runs.jsonl")}
        for seed in range(self.seed, self.seed + self.seeds):
            data = None
            for method in self.methods:
                settings = iv.settings_of(setting, chosen[method], self.num_outer_steps, self.batch_size)
                if (method, seed, _records.settings_key(settings)) in done:
                    continue
                data = data or iv.arrays(self.n, seed, source, B)
                self._one(directory, "runs", method, setting, chosen[method], seed, data, track)
            if self.references:
                _run_references(directory, done, self.n, seed, source, B)
        if self.costs and not (directory / "costs.jsonl").exists():
            _measure(directory / "costs.jsonl", setting, chosen, iv.arrays(self.n, self.seed, source, B))
        runs, costs = (list(_records.read_existing(directory / f"{name}.jsonl")) for name in ("runs", "costs"))
        rows = summarise(runs, costs)
        (directory / "table.md").write_text(markdown(rows), encoding="utf-8")
        draw_comparison(directory, rows, directory / "iv.png", f"n = {self.n}, {self.num_outer_steps} outer steps")
        return _comparison_table(rows)

    def _one(
        self,
        directory: Path,
        name: str,
        method: str,
        setting: iv.Setting,
        hyper: iv.Hyper,
        seed: int,
        data: iv.Arrays,
        track: _records.Track,
    ) -> None:
        start = time.perf_counter()
        callback = track(f"{method} {seed}", self.num_outer_steps)
        solver, steps = iv.solver(method, setting, hyper), self.num_outer_steps
        outcome = iv.run(solver, data, seed, steps, batch_size=self.batch_size, callback=callback)
        settings = iv.settings_of(setting, hyper, steps, self.batch_size)
        iv.write(directory, name, method, seed, settings, outcome, time.perf_counter() - start)

    def _select(
        self, directory: Path, track: _records.Track, source: dsprites.Hearts, B: Any, setting: iv.Setting
    ) -> dict[str, iv.Hyper]:
        """The trial of each method with the least mean validation loss over the selection's seeds."""
        done = {_records.identity(record) for record in _records.read_existing(directory / "selection.jsonl")}
        trials: dict[str, dict[str, iv.Hyper]] = {}
        for method in self.methods:
            settings = [
                iv.settings_of(setting, hyper, self.num_outer_steps, self.batch_size)
                for hyper in iv.METHODS[method].trials
            ]
            trials[method] = dict(zip(map(_records.settings_key, settings), iv.METHODS[method].trials, strict=True))
            for (key, hyper), seed in itertools.product(trials[method].items(), SELECTION_SEEDS):
                if (method, seed, key) not in done:
                    data = iv.arrays(setting.n, seed, source, B)
                    self._one(directory, "selection", method, setting, hyper, seed, data, track)
        records = list(_records.read_existing(directory / "selection.jsonl"))
        return {method: choose(records, method, of_method) for method, of_method in trials.items()}


SELECTION_SEEDS = (1000, 1001, 1002, 1003)


def choose(records: list[_records.Record], method: str, trials: dict[str, iv.Hyper]) -> iv.Hyper:
    """Of `trials`, by the key of their settings, the one with the least mean validation loss over its records.

    A run that broke counts as infinite.
    """

    def loss(key: str) -> float:
        of_trial = [
            record["metrics"]["validation_loss"]
            for record in records
            if record["method"] == method and _records.settings_key(record["settings"]) == key
        ]
        return float(np.mean([np.inf if value is None else value for value in of_trial])) if of_trial else np.inf

    return trials[min(trials, key=loss)]


REFERENCES: dict[str, Callable[[dsprites.Data, dsprites.Clean], float]] = {
    "kernel-iv": dsprites.kernel_iv,
    "two-stage": dsprites.two_stage_floor,
    "least-squares": dsprites.least_squares_floor,
}


def _run_references(directory: Path, done: set[Any], n: int, seed: int, source: dsprites.Hearts, B: Any) -> None:
    missing = [name for name in REFERENCES if (name, seed, _records.settings_key({"n": n})) not in done]
    if not missing:
        return
    data, test = dsprites.generate(n, seed, source, B), dsprites.test_set(source, B)
    for name in missing:
        start = time.perf_counter()
        metrics = {"test_mse": REFERENCES[name](data, test)}
        result = _records.record("iv", name, seed, {"n": n}, metrics, time.perf_counter() - start)
        _records.append(directory / "runs.jsonl", result)


def _measure(path: Path, setting: iv.Setting, chosen: dict[str, iv.Hyper], data: iv.Arrays) -> None:
    """One outer step of each method beside one bare forward and backward pass of the treatment network."""
    calls: dict[str, Any] = {}
    for method, hyper in chosen.items():
        solver = iv.solver(method, setting, hyper).bilevel
        state = jax.jit(solver.init)(jax.random.key(0), None, data.inner)
        calls[method] = (solver, (state, data.inner, data.outer))
    f = iv.solver("dfiv", setting, {}).f
    omega, omega_state = f.init(jax.random.key(0), data.inner.x)

    def bare(omega: Any, x: jax.Array) -> Any:
        return jax.grad(lambda omega: jnp.sum(f.apply(omega, omega_state, x, train=True)[0] ** 2))(omega)

    table = fb.measure_costs({"bare": (bare, (omega, data.inner.x))} | calls)
    for cost in table.rows:
        metrics = {"seconds": cost.seconds, "ratio": cost.seconds / table.rows[0].seconds}
        metrics |= {"temp_bytes": cost.temp_bytes, "compile_seconds": cost.compile_seconds}
        settings = setting._asdict() | dict(chosen.get(cost.name, {}))
        _records.append(path, _records.record("iv", cost.name, 0, settings, metrics, cost.seconds))


# What is shown of it.


class Row(NamedTuple):
    """One method over its seeds.

    Attributes:
        method: its name.
        test_mse: seed -> test MSE; infinite where the run broke.
        median, quartiles, interval: of the test MSE; the 95% bootstrap interval is the median's.
        p_value: of the paired two-sided Wilcoxon test against the first row's method, on their common seeds.
        ratio, temp_bytes: of one outer step, over the bare passes; None if not measured.
    """

    method: str
    test_mse: dict[int, float]
    median: float
    quartiles: tuple[float, float]
    interval: tuple[float, float]
    p_value: float | None
    ratio: float | None
    temp_bytes: float | None


def summarise(runs: list[_records.Record], costs: list[_records.Record]) -> list[Row]:
    """One row per method, the FuncID variant with the smaller median first."""
    by_method: dict[str, dict[int, float]] = {}
    for record in runs:
        value = record["metrics"]["test_mse"]
        by_method.setdefault(record["method"], {})[record["seed"]] = np.inf if value is None else value
    measured = {record["method"]: record["metrics"] for record in costs}
    order = [name for name in COLOURS if name in by_method]
    medians = {name: float(np.median(list(by_method[name].values()))) for name in order}
    best = min((name for name in order if name.startswith("funcid")), key=lambda name: medians[name], default=order[0])
    rows: list[Row] = []
    for name in [best, *(other for other in order if other != best)]:
        values = by_method[name]
        common = sorted(values.keys() & by_method[best].keys())
        differences = np.array([values[seed] - by_method[best][seed] for seed in common])
        sample = np.array(list(values.values()))
        low, high = np.quantile(sample, (0.25, 0.75))
        cost = measured.get(name, {})
        rows.append(
            Row(
                name,
                values,
                medians[name],
                (float(low), float(high)),
                bootstrap_interval(sample),
                paired_p_value(differences) if name != best else None,
                cost.get("ratio"),
                cost.get("temp_bytes"),
            )
        )
    return rows


HEADER = ("method", "seeds", "median", "quartiles", "95% CI", "p", "time", "MiB")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.method,
        str(len(row.test_mse)),
        f"{row.median:.2f}",
        "{:.2f}-{:.2f}".format(*row.quartiles),
        "{:.2f}-{:.2f}".format(*row.interval),
        "" if row.p_value is None else f"{row.p_value:.1g}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.temp_bytes is None else f"{row.temp_bytes / 2**20:.0f}",
    )


def markdown(rows: list[Row]) -> str:
    """The table in Markdown."""
    return _records.markdown_table(HEADER, map(_cells, rows))


def _comparison_table(rows: list[Row]) -> "RenderableType":
    from rich.console import Group  # noqa: PLC0415

    title = "Test MSE on dSprites: medians over seeds, their bootstrap intervals, cost"
    table = _records.terminal_table(HEADER, map(_cells, rows), title)
    note = (
        f"p: paired Wilcoxon test against {rows[0].method}. time: one outer step over one bare forward and backward "
        "pass of the treatment network on the inner pictures, measured side by side. MiB: XLA's temporary buffers."
    )
    return Group(table, "", textwrap.fill(note, 78))


def draw_comparison(directory: Path, rows: list[Row], path: Path, title: str) -> None:
    """Test MSE of all methods as boxes with their seeds, and both objectives' curves with quartile bands."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    shown = [row for name in COLOURS for row in rows if row.method == name]
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        boxes, outer, inner = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
        draw_boxes(boxes, {row.method: np.array(list(row.test_mse.values())) for row in shown}, COLOURS)
        boxes.set_yscale("log")
        seeds = max(len(row.test_mse) for row in shown)
        boxes.set(ylabel="Test MSE", title=f"Test MSE over {seeds} seeds ({title})")

        curves = _read_curves(directory / "runs-curves.jsonl")
        for axes, name in ((outer, "outer_objective"), (inner, "inner_objective")):
            for row in shown:
                if row.method not in curves:
                    continue
                steps, values = curves[row.method]["step"][0], np.array(curves[row.method][name])
                low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
                axes.plot(steps, middle, color=COLOURS[row.method], label=row.method)
                axes.fill_between(steps, low, high, color=COLOURS[row.method], alpha=0.15, lw=0)
            axes.set(xlabel="Outer step", title=name.replace("_", " ").capitalize())
        inner.set_yscale("log")
        outer.legend(frameon=False, fontsize=7.5)
        figure.savefig(path, dpi=150)


def _read_curves(path: Path) -> dict[str, dict[str, list[list[float]]]]:
    """method -> quantity -> one curve per seed."""
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        run = json.loads(line)
        of_method = curves.setdefault(run["method"], {})
        for name in ("step", "outer_objective", "inner_objective"):
            of_method.setdefault(name, []).append(run[name])
    return curves
