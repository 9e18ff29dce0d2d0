"""`funcbilevel run cartpole`, `compare cartpole` and `run pendulum`: model-based reinforcement learning."""

import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from funcbilevel.tasks import _records, rl, rl_cartpole, rl_pendulum
from funcbilevel.tasks._experiment.figures import STYLE

if TYPE_CHECKING:
    from rich.console import RenderableType

ENVIRONMENTS = {"cartpole": rl_cartpole, "pendulum": rl_pendulum}
ALIASES = {"funcid": "funcid-pointwise", "omd": "omd-cg"}
COLOURS = {
    "funcid-pointwise": "C3",
    "funcid-learned": "C1",
    "omd-cg": "C0",
    "omd-identity": "C9",
    "mle": "C2",
    "vep": "C4",
    "model-free": "0.4",
}
CURVES = ("evaluation_return", "outer_objective", "inner_objective")
NAMES = ", ".join(rl.METHODS)


@dataclass(frozen=True)
class _Shared(_records.Options):
    resumable = True
    seeds: int = 10
    """Number of seeds, from --seed on; they are trained together."""
    steps: int = 50_000
    """Steps of the environment per seed."""
    inner_steps: int = 1
    """Of the Q-networks per step of the environment, on one batch."""
    inner_learning_rate: float | None = None
    """Of the Q-networks; by default the method's own."""
    outer_learning_rate: float | None = None
    """Of the world model; by default 1e-3."""
    warm_adam: bool | None = None
    """Whether Adam's moments on the Q-networks are kept from step to step; by default as the method's publication."""
    tau: float | None = None
    """Update rate of the target networks; by default the method's own."""
    value_bound: float | None = None
    """Clips the soft value in all targets; by default, as published, it is not clipped, and long runs may diverge."""
    evaluation_interval: int = 1000
    """Steps between evaluations, which are ten episodes each."""

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""
        first = rl.Setting().random_steps
        self.check_counts("seeds", "inner_steps")
        if self.steps <= first:
            raise ValueError(f"--steps must be more than the {first} random ones at the beginning, got {self.steps}.")
        if self.evaluation_interval < 1 or (self.steps - first) % self.evaluation_interval:
            raise ValueError(
                f"--evaluation-interval must divide the {self.steps - first} steps after the {first} random ones, got "
                f"{self.evaluation_interval}."
            )
        for name in ("inner_learning_rate", "outer_learning_rate", "value_bound"):
            if (rate := getattr(self, name)) is not None and rate <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {rate}.")
        if self.tau is not None and not 0 < self.tau <= 1:
            raise ValueError(f"--tau must be in (0, 1], got {self.tau}.")

    def status(self, metrics: Mapping[str, Any]) -> str:
        """The evaluation's return and the throughput."""
        return f"return {metrics['evaluation_return'][-1]:.0f}, {metrics['steps_per_second'][-1]:,.0f} steps/s"

    def setting(self, method: str, model_width: int) -> rl.Setting:
        """The method's own setting, with the options that were given."""
        setting = rl.Setting(
            model_width=model_width,
            steps=self.steps,
            inner_steps=self.inner_steps,
            evaluation_interval=self.evaluation_interval,
        )._replace(**rl.METHODS[method].chosen)
        names = ("inner_learning_rate", "outer_learning_rate", "warm_adam", "tau", "value_bound")
        given = {name: getattr(self, name) for name in names}
        return setting._replace(**{name: value for name, value in given.items() if value is not None})

    def complete(
        self,
        directory: Path,
        name: str,
        track: _records.Track,
        label: str,
        method: str,
        setting: rl.Setting,
        seeds: Sequence[int],
    ) -> "Trained | None":
        """Trains the seeds that `name`.jsonl does not hold yet, and adds their records and curves.

        Returns:
            What was trained, if there was anything to do.
        """
        settings = settings_of(method, setting)
        done = {_records.identity(record) for record in _records.read_existing(directory / f"{name}.jsonl")}
        key = _records.settings_key(settings)
        seeds = [seed for seed in seeds if (method, seed, key) not in done]
        if not seeds:
            return None
        every_core_a_device()
        environment, start = ENVIRONMENTS[self.task].environment(), time.perf_counter()
        identity = zlib.crc32(json.dumps([settings, seeds], sort_keys=True).encode())  # no other run's state
        checkpoint = directory / f"{method}-{identity:08x}.checkpoint.npz"
        bar = track(label, setting.steps - setting.random_steps)
        clock = time.perf_counter()

        def callback(steps: int, metrics: dict[str, np.ndarray[Any, Any]]) -> None:
            nonlocal clock
            rate, clock = steps * len(seeds) / (time.perf_counter() - clock), time.perf_counter()
            means = {name: np.full(steps, np.mean(values)) for name, values in metrics.items()}
            bar(None, means | {"steps_per_second": np.full(steps, rate)})

        state, curves = rl.train(environment, method, setting, seeds, callback=callback, checkpoint=checkpoint)
        add(directory, name, environment.name, method, seeds, settings, curves, time.perf_counter() - start)
        checkpoint.unlink(missing_ok=True)
        return Trained(seeds, state, curves)

    def report(self, directory: Path) -> "RenderableType":
        """The figure and the table of everything in the directory."""
        rows = summarise(list(read(directory)))
        (directory / "table.md").write_text(markdown(rows), encoding="utf-8")
        draw(rows, directory / f"{self.task}.png", self.task)
        return _table(rows, self.task)


def every_core_a_device() -> None:
    """Seeds are spread over devices: JAX on a CPU takes all of its cores for one, unless it is told otherwise."""
    if "JAX_NUM_CPU_DEVICES" not in os.environ and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with suppress(RuntimeError):  # JAX runs already
            jax.config.update("jax_num_cpu_devices", cores)


def _known(option: str, method: str) -> str:
    """The method's name; `funcid` and `omd` are short for the first of their kind."""
    method = ALIASES.get(method, method)
    if method not in rl.METHODS:
        raise ValueError(f"{option} must be among {NAMES}, got {method!r}.")
    return method


@dataclass(frozen=True)
class RunCartPole(_Shared):
    """CartPole by one method: evaluation returns over seeds, a figure and an animation. Resumable."""

    task = "cartpole"
    method: str = "funcid-pointwise"
    """One of funcid-pointwise (or funcid), funcid-learned, omd-cg (or omd), omd-identity, mle, vep, model-free."""
    model_width: int = 3
    """Of the hidden layers of the world model."""

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""
        super().check()
        _known("--method", self.method)
        self.check_counts("model_width")

    def run(self, directory: Path, track: _records.Track) -> "RenderableType":
        """Writes runs.jsonl, its curves, the figure and the animation into `directory`; returns a table."""
        method = _known("--method", self.method)
        setting, seeds = self.setting(method, self.model_width), range(self.seed, self.seed + self.seeds)
        trained = self.complete(directory, "runs", track, method, method, setting, seeds)
        if trained is not None:
            best = int(np.argmax(trained.curves.values["evaluation_return"][:, -1]))
            theta = jax.tree.map(lambda x: x[best], trained.state.learner.inner_params)
            animate(self.task, setting, theta, trained.seeds[best], directory / f"{self.task}.gif")
        return self.report(directory)


@dataclass(frozen=True)
class RunPendulum(RunCartPole):
    """Pendulum with three torques, by one method: the same agents. Resumable."""

    task = "pendulum"


@dataclass(frozen=True)
class CompareCartPole(_Shared):
    """CartPole by every method and model width over many seeds. Run it again to go on where it stopped."""

    task = "cartpole"
    methods: tuple[str, ...] = tuple(rl.METHODS)
    """Methods to run; figure and table show all that the output directory holds."""
    model_widths: tuple[int, ...] = (3, 32)
    """Of the hidden layers of the world model."""
    select: bool = False
    """Choose each method's rates among six trials, by the mean return of three other seeds; selection.jsonl."""
    selection_steps: int = 50_000
    """Steps of the environment of a trial."""

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""
        super().check()
        for method in self.methods:
            _known("--methods", method)
        if not self.model_widths or min(self.model_widths) < 1:
            raise ValueError(f"--model-widths must be at least 1, got {self.model_widths}.")
        after = self.selection_steps - rl.Setting().random_steps
        if self.select and (after < 1 or after % self.evaluation_interval):
            raise ValueError(
                f"--selection-steps less the {rl.Setting().random_steps} random ones must be a multiple of "
                f"--evaluation-interval={self.evaluation_interval}, got {self.selection_steps}."
            )

    def settings(self) -> dict[str, Any]:
        """None: each record has its own settings, and the directory may hold several lengths and widths."""
        return {}

    def run(self, directory: Path, track: _records.Track) -> "RenderableType":
        """Adds what is missing to runs.jsonl and its curves, draws the figure, returns the table (also table.md)."""
        seeds = range(self.seed, self.seed + self.seeds)
        for model_width in self.model_widths:
            for method in (_known("--methods", method) for method in self.methods):
                setting = self.setting(method, model_width)
                if self.select:
                    setting = setting._replace(**self._select(directory, track, method, setting))
                self.complete(directory, "runs", track, f"{method} {model_width}", method, setting, seeds)
        return self.report(directory)

    def _select(self, directory: Path, track: _records.Track, method: str, setting: rl.Setting) -> dict[str, Any]:
        """Of the method's trials the one with the largest mean return over training and over the selection's seeds."""
        trials = rl.METHODS[method].trials
        settings = [setting._replace(steps=self.selection_steps, **trial) for trial in trials]
        for i, candidate in enumerate(settings, start=1):
            label = f"{method} {setting.model_width}, {i}"
            self.complete(directory, "selection", track, label, method, candidate, SELECTION_SEEDS)
        records = list(_records.read_existing(directory / "selection.jsonl"))

        def score(candidate: rl.Setting) -> float:
            own = settings_of(method, candidate)
            means = [r["metrics"]["return_auc"] for r in records if r["method"] == method and r["settings"] == own]
            return float(np.mean([-np.inf if mean is None else mean for mean in means]))

        return trials[int(np.argmax([score(candidate) for candidate in settings]))]


SELECTION_SEEDS = (1000, 1001, 1002)


# Records.


class Trained(NamedTuple):
    """Seeds trained together, their state and curves."""

    seeds: Sequence[int]
    state: rl.State
    curves: rl.Curves


def settings_of(method: str, setting: rl.Setting) -> dict[str, Any]:
    """What a record says of a run: all but other methods' own settings, and a bound that is not there."""
    others = {"adjoint_learning_rate", "cg_steps", "damping"} - rl.METHODS[method].chosen.keys()
    return {name: value for name, value in setting._asdict().items() if name not in others and value is not None}


def _final(returns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The mean of the last tenth of the evaluations, [..., points] -> [...]."""
    return np.mean(returns[..., -max(1, returns.shape[-1] // 10) :], axis=-1)


def add(
    directory: Path,
    name: str,
    task: str,
    method: str,
    seeds: Sequence[int],
    settings: dict[str, Any],
    curves: rl.Curves,
    seconds: float,
) -> None:
    """One record per seed to `name`.jsonl, and one line of its curves; `seconds` is that of all together."""
    returns = curves.values["evaluation_return"]
    flags = [name for name, values in curves.values.items() if values.dtype == bool]
    for i, seed in enumerate(seeds):
        metrics = {name: values[i, -1] for name, values in curves.values.items()}
        metrics |= {name: np.all(curves.values[name][i]) for name in flags}
        metrics |= {"return_auc": np.mean(returns[i]), "final_return": _final(returns[i])}
        metrics |= {"seeds_together": len(seeds), "devices": rl.spread_over(len(seeds))}
        with (directory / f"{name}-curves.jsonl").open("a", encoding="utf-8") as file:
            values = {curve: [_short(x) for x in curves.values[curve][i]] for curve in CURVES}
            line = {"method": method, "seed": seed, "settings": settings, "step": curves.step.tolist()} | values
            file.write(json.dumps(line) + "\n")
        _records.append(directory / f"{name}.jsonl", _records.record(task, method, seed, settings, metrics, seconds))


def _short(x: Any) -> float | None:
    return float(f"{x:.4g}") if np.isfinite(x) else None


def read(directory: Path) -> Iterator[dict[str, Any]]:
    """The records of a directory's runs, each with its curves."""
    names = [directory / name for name in ("runs.jsonl", "runs-curves.jsonl")]
    if names[0].exists():
        lines = names[1].read_text(encoding="utf-8").splitlines()
        curves = {_records.identity(curve): curve for curve in map(json.loads, lines)}
        for record in _records.read(names[0]):
            yield {**record, "curves": curves[_records.identity(record)]}


# What is shown of them.


def interquartile_mean(x: np.ndarray[Any, Any], axis: int = 0) -> Any:
    """The mean of the middle half, as in rliable: a quarter of the values, rounded down, is left out on either side."""
    x, cut = np.sort(x, axis=axis), x.shape[axis] // 4
    return np.mean(np.take(x, np.arange(cut, x.shape[axis] - cut), axis=axis), axis=axis)


def bootstrap(x: np.ndarray[Any, Any], resamples: int = 2000) -> np.ndarray[Any, Any]:
    """The interquartile means of resampled seeds, [seeds, ...] -> [resamples, ...], with a fixed seed."""
    index = np.random.default_rng(0).integers(0, len(x), (resamples, len(x)))
    return interquartile_mean(x[index], axis=1)


def interval(x: np.ndarray[Any, Any]) -> Any:
    """The 95% percentile bootstrap interval of the interquartile mean over seeds, [seeds, ...] -> [2, ...]."""
    return np.quantile(bootstrap(x), (0.025, 0.975), axis=0)


class Row(NamedTuple):
    """One method in one setting over its seeds.

    Attributes:
        method, settings: as recorded.
        seeds: how many.
        auc, final: return_auc and final_return, [seeds].
        step: [points].
        curves: name -> [seeds, points], of `CURVES`.
    """

    method: str
    settings: dict[str, Any]
    seeds: int
    auc: np.ndarray[Any, Any]
    final: np.ndarray[Any, Any]
    step: np.ndarray[Any, Any]
    curves: dict[str, np.ndarray[Any, Any]]


def summarise(records: list[dict[str, Any]]) -> list[Row]:
    """One row per setting and method, by length, width and the order of `rl.METHODS`."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["method"], _records.identity(record)[2]), []).append(record)
    rows = [
        Row(
            method,
            group[0]["settings"],
            len(group),
            np.array([record["metrics"]["return_auc"] for record in group]),
            np.array([record["metrics"]["final_return"] for record in group]),
            np.array(group[0]["curves"]["step"]),
            {name: np.array([record["curves"][name] for record in group], float) for name in CURVES},
        )
        for (method, _), group in groups.items()
    ]
    order = list(rl.METHODS)
    return sorted(rows, key=lambda row: (*_panel(row), order.index(row.method)))


def _panel(row: Row) -> tuple[int, int]:
    return row.settings["steps"], row.settings["model_width"]


HEADER = ("method", "model", "lr", "seeds", "mean", "AUC", "95% CI", "final", "95% CI")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.method,
        f"{row.settings['model_width']}, {row.settings['steps'] / 1000:g}k",
        f"{row.settings['inner_learning_rate']:g}" + ("" if row.settings["warm_adam"] else "*"),
        str(row.seeds),
        f"{np.mean(row.auc):.0f}",
        f"{interquartile_mean(row.auc):.0f}",
        "{:.0f}..{:.0f}".format(*interval(row.auc)),
        f"{interquartile_mean(row.final):.0f}",
        "{:.0f}..{:.0f}".format(*interval(row.final)),
    )


def markdown(rows: list[Row]) -> str:
    """The table in Markdown."""
    return _records.markdown_table(HEADER, map(_cells, rows))


def _table(rows: list[Row], task: str) -> "RenderableType":
    from rich.console import Group  # noqa: PLC0415

    note = (
        f"Evaluation returns on {task}. mean and AUC: averaged over training, by mean\n"
        "and by interquartile mean over seeds; final: over the last tenth, by\n"
        "interquartile mean. model: hidden width and environment steps; lr: of Adam on\n"
        "the Q-networks, with * restarted at every step."
    )
    return Group(_records.terminal_table(HEADER, map(_cells, rows)), "", note)


def _methods(rows: list[Row]) -> set[str]:
    return {row.method for row in rows}


def _label(row: Row, same: list[Row]) -> str:
    """The method, and those of its settings in which its runs differ."""
    differing = [name for name in row.settings if len({str(other.settings[name]) for other in same}) > 1]
    return ", ".join([row.method, *(f"{name.replace('_', ' ')} {row.settings[name]}" for name in differing)])


def draw(rows: list[Row], path: Path, task: str) -> None:
    """Evaluation return, outer and inner objective by environment step: a column per length and width, as a PNG."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter  # noqa: PLC0415

    panels = sorted({_panel(row) for row in rows})
    with rc_context(STYLE):
        figure = Figure(figsize=(max(5.2, 4.2 * len(panels)), 7.4), layout="constrained")
        grid: Any = figure.subplots(3, len(panels), squeeze=False, sharex="col", height_ratios=(2, 1, 1))
        for column, panel in enumerate(panels):
            shown = [row for row in rows if _panel(row) == panel]
            for i, row in enumerate(shown):
                same = [other for other in shown if other.method == row.method]
                style: Any = {
                    "color": COLOURS[row.method],
                    "ls": "-" if row.method not in _methods(shown[:i]) else "--",
                }
                for axes, name in zip(grid[:, column], CURVES, strict=True):
                    values, colour = row.curves[name], COLOURS[row.method]
                    axes.plot(row.step, interquartile_mean(values), lw=1.4, label=_label(row, same), **style)
                    axes.fill_between(row.step, *interval(values), color=colour, alpha=0.15, lw=0)
                axes = grid[0, column]
                axes.plot(row.step, np.mean(row.curves[CURVES[0]], axis=0), color=COLOURS[row.method], lw=0.7, ls=":")
            steps, width = panel
            seeds = " or ".join(map(str, sorted({row.seeds for row in shown})))
            grid[0, column].set(title=f"{task}: width {width}, {steps:,} steps, {seeds} seeds")
            grid[2, column].set(xlabel="Environment steps")
            grid[2, column].xaxis.set_major_locator(MaxNLocator(5))
            grid[2, column].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            for axes in grid[1:, column]:
                axes.set_yscale("log")
        grid[0, 0].set(ylabel="Evaluation return\n(IQM, 95% interval; mean dotted)")
        grid[1, 0].set(ylabel="Outer objective\n(the method's own)")
        grid[2, 0].set(ylabel="Inner objective")
        legend = {}
        for axes in grid[0]:
            for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
                legend.setdefault(label, line)
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
        figure.savefig(path, dpi=130)


def animate(task: str, setting: rl.Setting, q_params: Any, seed: int, path: Path) -> None:
    """One episode of the soft policy as a GIF, every fourth state of at most 300."""
    environment, picture = ENVIRONMENTS[task].environment(), ENVIRONMENTS[task].picture
    roll = jax.jit(lambda q_params, key: rl.rollout(environment, setting, q_params, key))
    worlds, length = roll(q_params, jax.random.key(seed))
    frames = [picture(world) for world in np.asarray(worlds)[: min(int(length), 300) : 4]]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=80, loop=0)
