"""`funcbilevel run fairness` and `funcbilevel compare fairness`: one method, or all of them over settings and seeds."""

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import funcbilevel as fb
from funcbilevel.tasks import _records, fairness, fairness_data
from funcbilevel.tasks._experiment.figures import STYLE
from funcbilevel.tasks._experiment.statistics import Interval, hypervolume, mean_interval, pareto_front
from funcbilevel.tasks.fairness import Hyper, Loss, Setting

if TYPE_CHECKING:
    from rich.console import RenderableType

Data: TypeAlias = Literal["synthetic", "adult", "health", "nba"]
COLOURS = {
    "single-objective": "0.35",
    "lagrangian": "C0",
    "alternating": "C1",
    "alternating, simultaneous": "C8",
    "alternating, together": "C3",
    "alternating, round-robin": "C4",
    "leaky-alternating": "C5",
    "frozen-follower": "0.6",
    "aid-cg": "C3",
    "aid-neumann": "C6",
    "itd": "C4",
    "penalty-value": "C2",
}


LATER = {"losses": (), "followers": "one", "attention": None, "num_classes": 2, "label": "income"}
"""Settings that came later, with their defaults: left out where they have them, so that older runs are still known."""


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in LATER or value != LATER[name]}


@dataclass(frozen=True)
class _Shared(_records.Options):
    beside = ("data",)
    dataset: Data = "synthetic"
    """Drawn by scikit-learn, UCI Adult, Heritage Health, or the NBA graph."""
    data: Path | None = None
    """Of adult and nba the directory of the files, of health the file; by default $FUNCBILEVEL_ADULT_DIR,
    $FUNCBILEVEL_NBA_DIR, $FUNCBILEVEL_HEALTH_CSV, or else (not health) downloaded."""
    attributes: tuple[str, ...] = ("sex",)
    """Of adult, what to be fair by: sex, race, or both."""
    label: Literal["income", "education"] = "income"
    """Of adult, what to predict: income, or education in four classes."""
    num_classes: int = 2
    """Of synthetic, how many labels there are."""
    losses: tuple[str, ...] = ()
    """Several losses, the unfairness being their sum: names as of --loss, each over all attributes or, as in
    demographic-parity@race, over one of them."""

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""
        if self.data is not None and not self.data.exists():
            raise ValueError(f"--data: there is no {self.data}.")
        if self.attributes != ("sex",) and self.dataset != "adult":
            raise ValueError(f"--attributes are those of adult, got {self.attributes} with --dataset {self.dataset}.")
        if self.label != "income" and self.dataset != "adult":
            raise ValueError(f"--label is that of adult, got {self.label} with --dataset {self.dataset}.")
        if self.num_classes != 2 and (self.dataset != "synthetic" or self.num_classes < 2):
            raise ValueError(
                f"--num-classes must be at least 2, and is that of synthetic, got {self.num_classes} with --dataset "
                f"{self.dataset}."
            )
        self.parsed_losses()

    def parsed_losses(self) -> tuple[Loss, ...]:
        """What --losses says."""
        known = self.attributes if self.dataset == "adult" else ()

        def parse(text: str) -> Loss:
            name, at, attribute = text.partition("@")
            if name not in fairness.LOSSES:
                raise ValueError(f"--losses must be among {', '.join(fairness.LOSSES)}, got {name!r}.")
            if at and attribute not in known:
                raise ValueError(
                    f"--losses: after @ stands one of the --attributes of adult, here {', '.join(known) or '(none)'}; "
                    f"got {text!r}."
                )
            return Loss(name, known.index(attribute) if at else None)

        return tuple(map(parse, self.losses))

    def adapted(self, setting: Setting) -> Setting:
        """The setting with the losses of --losses, and with one output for each class if there are more than two."""
        classes = fairness_data.ADULT_CLASSES[self.label] if self.dataset == "adult" else self.num_classes
        setting = setting._replace(num_classes=classes, losses=self.parsed_losses() or setting.losses)
        last = "fairness_widths" if setting.position == len(setting.accuracy_widths) + 1 else "accuracy_widths"
        widths: tuple[int, ...] = getattr(setting, last)
        return setting if classes == 2 or widths[-1:] != (1,) else setting._replace(**{last: (*widths[:-1], classes)})

    def settings(self) -> dict[str, Any]:
        """The options that decide the numbers; none that is younger than the records and at its default."""
        return _known(super().settings())

    def status(self, metrics: Mapping[str, Any]) -> str:
        """Accuracy and gap on the test part."""
        return f"accuracy {metrics['accuracy'][-1]:.3f}, parity gap {metrics['dp_gap'][-1]:.3f}"

    def load(self, seed: int = 0) -> fairness_data.Dataset:
        """The data that the options ask for; of the NBA graph, which is small, each seed divides the nodes anew."""
        try:
            if self.dataset == "adult":
                return fairness_data.adult(self.data, self.attributes, label=self.label)
            if self.dataset == "health":
                return fairness_data.health(self.data)
            if self.dataset == "nba":
                return fairness_data.nba(self.data, seed=seed)
        except FileNotFoundError as error:
            raise ValueError(f"--data: {error}") from error
        return fairness_data.synthetic(num_classes=self.num_classes)


# One run.


@dataclass(frozen=True)
class RunFairness(_Shared):
    """A classifier that should be accurate and fair, trained by one method, with live progress and a figure."""

    task = "fairness"
    method: str = "aid-cg"
    """One of single-objective, lagrangian, alternating, leaky-alternating, frozen-follower, aid-cg, aid-neumann, itd,
    penalty-value."""
    eta: float = 10.0
    """Weight of the unfairness."""
    loss: str = "demographic-parity"
    """The follower's: demographic-parity, absolute-parity, published-parity, equalized-odds, equal-opportunity,
    worst-group. Several: --losses."""
    followers: Literal["one", "together", "round-robin"] = "one"
    """One for the sum of the losses, or, in alternating, one for each of --losses, with a layer of --fairness-widths
    each: stepping together from the same point, or one after the other."""
    num_epochs: int = 30
    """Passes over the training part."""
    batch_size: int = 200
    """Rows per step; of a graph always all."""
    leader_rate: float = 2e-3
    """Adam's, for the accuracy layers."""
    follower_rate: float = 2e-3
    """Adam's, for the fairness layers."""
    follower_accuracy: float = 1.0
    """Weight of the cross entropy in the follower's objective; FairBiNN has 0."""
    leader_fairness: float = 0.0
    """Weight of the unfairness in the leader's objective, as a multiple of eta."""
    inner_steps: int = 5
    """The follower's steps per step of the leader; with leaky-alternating 1."""
    accuracy_widths: tuple[int, ...] = (64, 64)
    """The leader's layers, the output included unless the fairness layers stand last."""
    fairness_widths: tuple[int, ...] = (1,)
    """The follower's layers; by default the output layer."""
    position: int = 3
    """Where the fairness layers stand: 1 is before all accuracy layers."""
    attention: str | None = None
    """A layer, accuracy_0 or fairness_0 for example, to be self-attention over the columns."""
    update: Literal["sequential", "simultaneous"] = "sequential"
    """In alternating: the follower first, or both players at once after one forward pass."""
    chunk: int = 2
    """Epochs between two evaluations."""

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""
        super().check()
        self.check_counts("num_epochs", "batch_size", "chunk", "inner_steps")
        if self.method not in fairness.METHODS:
            raise ValueError(f"--method must be one of {', '.join(fairness.METHODS)}, got {self.method!r}.")
        if self.loss not in fairness.LOSSES:
            raise ValueError(f"--loss must be one of {', '.join(fairness.LOSSES)}, got {self.loss!r}.")
        fairness.check(self.method, self.setting())

    def setting(self) -> Setting:
        """What decides the compiled program."""
        setting = Setting(
            self.accuracy_widths,
            self.fairness_widths,
            self.position,
            self.loss,
            None if self.dataset == "nba" else self.batch_size,
            update=self.update,
            inner_steps=1 if self.method == "leaky-alternating" else self.inner_steps,
            damping=0.1,
            solver_steps=10,
            leader_decay=0.5,
            follower_decay=0.5,
            decay_epochs=max(1, self.num_epochs // 5),
            followers=self.followers,
            attention=self.attention,
        )
        return self.adapted(setting)

    def run(self, directory: Path, track: _records.Track) -> "RenderableType":
        """Writes metrics.jsonl, its curves and fairness.png into `directory`; returns a table."""
        dataset = self.load(self.seed)
        setting = self.setting()
        hyper = Hyper(self.eta, self.leader_rate, self.follower_rate, self.follower_accuracy, self.leader_fairness)
        epochs = self.num_epochs
        callback = track(self.method, epochs)
        outcome = fairness.sweep(
            self.method, setting, dataset, [hyper], [self.seed], epochs, chunk=self.chunk, callback=callback
        )
        write(directory, self.method, dataset, setting, outcome, epochs)
        draw_run(self.method, outcome.cells[0], directory / "fairness.png")
        return _run_report(self.method, dataset, setting, outcome)


def settings_of(dataset: fairness_data.Dataset, setting: Setting, hyper: Hyper, num_epochs: int) -> dict[str, Any]:
    """What a record says of a run, as it comes back from JSON."""
    settings = {"dataset": dataset.name, "attributes": dataset.attributes, "num_epochs": num_epochs}
    whole: dict[str, Any] = json.loads(json.dumps(settings | _known(setting._asdict()) | hyper._asdict()))
    return whole


def write(
    directory: Path,
    method: str,
    dataset: fairness_data.Dataset,
    setting: Setting,
    outcome: fairness.Sweep,
    num_epochs: int,
) -> None:
    """The records go to runs.jsonl, the curves to runs-curves.jsonl; seconds are the cell's share of the sweep's."""
    share = outcome.seconds / len(outcome.cells)
    with (directory / "runs-curves.jsonl").open("a", encoding="utf-8") as file:
        for cell in outcome.cells:
            curves = {name: [float(f"{value:.5g}") for value in values] for name, values in cell.curves.items()}
            key = {"dataset": dataset.name, "method": method, "seed": cell.seed, "eta": cell.hyper.eta}
            file.write(json.dumps(key | curves) + "\n")
    for cell in outcome.cells:
        metrics = {name: float(f"{value:.6g}") for name, value in cell.metrics.items()}
        metrics |= {"sweep_cells": len(outcome.cells), "sweep_seconds": outcome.seconds}
        metrics |= {"sweep_epoch_seconds": outcome.epoch_seconds, "majority": majority_accuracy(dataset)}
        settings = settings_of(dataset, setting, cell.hyper, num_epochs)
        _records.append(
            directory / "runs.jsonl", _records.record("fairness", method, cell.seed, settings, metrics, share)
        )


def majority_accuracy(dataset: fairness_data.Dataset) -> float:
    """Test accuracy of giving everybody the more frequent label."""
    labels = dataset.test.y[dataset.test.weight > 0].astype(int)
    return float(np.max(np.bincount(labels)) / len(labels))


def _run_report(
    method: str, dataset: fairness_data.Dataset, setting: Setting, outcome: fairness.Sweep
) -> "RenderableType":
    from rich.table import Table  # noqa: PLC0415

    metrics = outcome.cells[0].metrics
    sizes = [int(np.sum(part.weight)) for part in (dataset.train, dataset.validation, dataset.test)]
    majority = majority_accuracy(dataset)
    table = Table.grid(padding=(0, 2))
    table.add_row("data", f"{dataset.name}, by {' and '.join(dataset.attributes)}")
    table.add_row("rows", "{} training, {} validation, {} test".format(*sizes))
    table.add_row("layers", " ".join(_layer(*layer, setting.num_followers) for layer in setting.row) + "  (*follower)")
    table.add_row("method", method if setting.followers == "one" else f"{method}, followers {setting.followers}")
    table.add_row("unfairness", " + ".join(_loss(loss, dataset.attributes) for loss in setting.terms))
    table.add_row("accuracy", f"{metrics['accuracy']:.3f}  (the majority's label: {majority:.3f})")
    table.add_row("parity gap", f"{metrics['dp_gap']:.3f}  (of mean probabilities: {metrics['dp_gap_soft']:.3f})")
    table.add_row("odds gap", f"{metrics['eo_gap']:.3f}  (of mean probabilities: {metrics['eo_gap_soft']:.3f})")
    table.add_row("worst group", f"{metrics['worst_group_accuracy']:.3f}  accuracy")
    table.add_row("seconds per epoch", f"{outcome.epoch_seconds:.2f}")
    return table


def _layer(name: str, width: int, num_followers: int) -> str:
    """Its width, with a star for each follower up to its own, and "a" for attention."""
    stars = 1 + fairness.follower_of(name, num_followers) if "fairness_" in name else 0
    return f"{width}{'a' if name.endswith(fairness.ATTENTION) else ''}{'*' * stars}"


def _loss(loss: Loss, attributes: tuple[str, ...]) -> str:
    return loss.name if loss.attribute is None else f"{loss.name} by {attributes[loss.attribute]}"


def draw_run(method: str, cell: fairness.Cell, path: Path) -> None:
    """Test accuracy, gaps and both objectives by epoch, as a PNG."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    epochs = cell.curves["epoch"]
    marker = "." if len(epochs) < 40 else None
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        accuracy, gaps, objectives = figure.subplots(1, 3)
        accuracy.plot(epochs, cell.curves["accuracy"], color="C3", marker=marker)
        accuracy.set_title(f"Test accuracy, {method}")
        names = {"dp_gap": "parity, decisions", "dp_gap_soft": "parity, probabilities", "eo_gap": "odds, decisions"}
        for (name, label), colour in zip(names.items(), ("C0", "C9", "C4"), strict=True):
            gaps.plot(epochs, cell.curves[name], color=colour, marker=marker, label=label)
        gaps.set_title("Differences between groups")
        gaps.set_ylim(bottom=0)
        gaps.legend(frameon=False, fontsize=7.5)
        objectives.plot(epochs, cell.curves["outer_objective"], color="C3", marker=marker, label="leader")
        objectives.plot(epochs, cell.curves["inner_objective"], color="C0", marker=marker, label="follower")
        objectives.set_title("Training objectives")
        objectives.legend(frameon=False, fontsize=7.5)
        for axes in (accuracy, gaps, objectives):
            axes.set_xlabel("Epoch")
        figure.savefig(path, dpi=150)


# All of them.


class Variant(NamedTuple):
    """A method as a protocol runs it.

    Attributes:
        method: its name.
        setting: what differs from the protocol's setting.
        hyper: its trials but for eta: each with each eta.
    """

    method: str
    setting: Mapping[str, Any] = {}
    hyper: tuple[Mapping[str, float], ...] = ({},)

    @property
    def label(self) -> str:
        """The name in tables and figures."""
        return label_of(self.method, {"update": "sequential"} | dict(self.setting))


def label_of(method: str, settings: Mapping[str, Any]) -> str:
    """The name in tables and figures of a method with one of the updates, and with one follower or several."""
    if (followers := settings.get("followers", "one")) != "one":
        return f"{method}, {followers}"
    return f"{method}, simultaneous" if settings["update"] == "simultaneous" else method


class Protocol(NamedTuple):
    """What `compare` runs.

    Attributes:
        setting: shared by all variants.
        variants: methods with their trials.
        etas: weights of the unfairness, unless --etas asks for others.
        num_epochs: of training.
        front: whether to compare Pareto fronts over the settings, or to show each setting by itself.
    """

    setting: Setting
    variants: tuple[Variant, ...]
    etas: tuple[float, ...]
    num_epochs: int
    front: bool


_FIVE = Setting(loss="published-parity", leader_decay=0.5, follower_decay=0.9, decay_epochs=50)
_RATES = ({"leader_rate": 1e-3, "follower_rate": 1e-5},)
_REPRODUCED = (
    Variant("single-objective", {}, _RATES),
    Variant("lagrangian", {}, _RATES),
    Variant("leaky-alternating", {}, _RATES),
    Variant("frozen-follower", {}, _RATES),
    Variant("alternating", {}, _RATES),
    Variant("alternating", {"update": "simultaneous"}, _RATES),
)
# Two hidden layers of the leader's; the output layer is the follower's, which makes its problem small and well posed.
_HEAD = Setting((64, 64), (1,), 3, batch_size=500, leader_decay=0.5, follower_decay=0.5, decay_epochs=10)
_BILEVEL = {"inner_steps": 5, "damping": 0.1, "solver_steps": 10}
_TRIAL = ({"leader_rate": 2e-3, "follower_rate": 2e-3, "follower_accuracy": 1.0},)
_TRIALS = tuple({**_TRIAL[0], "leader_fairness": beta} for beta in (0.0, 0.5))
_COMPARED = (
    Variant("single-objective", {}, ({"leader_rate": 2e-3},)),
    Variant("lagrangian", {}, ({"leader_rate": 2e-3},)),
    Variant("alternating", _BILEVEL, _TRIAL),
    Variant("leaky-alternating", {}, _TRIAL),
    Variant("aid-cg", _BILEVEL, _TRIAL),
    Variant("itd", _BILEVEL, _TRIAL),
    Variant("penalty-value", _BILEVEL, _TRIAL),
)
# Two hidden layers of the leader's, one of the first follower's, and the output layer, the second follower's.
_TWO = Setting(
    (32, 32),
    (16, 1),
    3,
    batch_size=500,
    leader_decay=0.5,
    follower_decay=0.5,
    decay_epochs=4,
    losses=(Loss("demographic-parity"), Loss("equalized-odds")),
)
PROTOCOLS: dict[str, Protocol] = {
    "pareto": Protocol(_HEAD, _COMPARED, tuple(fairness.etas(0.3, 100.0, 8)), 50, front=True),
    "graph": Protocol(
        _HEAD._replace(batch_size=None, weight_decay=1e-3, decay_epochs=60),
        _COMPARED,
        tuple(fairness.etas(0.3, 100.0, 8)),
        300,
        front=True,
    ),
    # Two losses: their sum as the Lagrangian's and as one follower's, or two followers.
    "followers": Protocol(
        _TWO,
        (
            Variant("single-objective", {}, ({"leader_rate": 2e-3}, {"leader_rate": 5e-3})),
            Variant("lagrangian", {}, ({"leader_rate": 2e-3}, {"leader_rate": 5e-3})),
            Variant("alternating", {"inner_steps": 2}, _TRIALS),
            Variant("alternating", {"inner_steps": 2, "followers": "together"}, _TRIALS),
            Variant("alternating", {"inner_steps": 2, "followers": "round-robin"}, _TRIALS),
        ),
        tuple(fairness.etas(0.3, 30.0, 4)),
        12,
        front=True,
    ),
    # The public code's network, rates, loss and eta.
    "published": Protocol(_FIVE, _REPRODUCED, (1e4,), 100, front=False),
    # The article's: two accuracy layers, a fairness layer, an accuracy layer.
    "article": Protocol(
        _FIVE._replace(accuracy_widths=(101, 101, 1), position=3, batch_size=100),
        _REPRODUCED,
        (100.0, 1000.0),
        50,
        False,
    ),
}


@dataclass(frozen=True)
class CompareFairness(_Shared):
    """Methods over many weights of the unfairness and seeds. Run it again to go on where it stopped."""

    task = "fairness"
    resumable = True
    beside = (*_Shared.beside, "seed", "seeds", "methods", "followers", "costs", "chunk")
    dataset: Data = "adult"
    """Drawn by scikit-learn, UCI Adult, Heritage Health, or the NBA graph."""
    protocol: Literal["pareto", "graph", "followers", "published", "article"] = "pareto"
    """pareto, and for nba graph: fronts under an equal tuning budget; followers: the same for two losses, parity and
    equalized odds unless --losses says others, with one follower or two; published and article: FairBiNN's setting in
    its public code and in its paper."""
    followers: tuple[Literal["one", "together", "round-robin"], ...] = ("one", "together", "round-robin")
    """In protocol followers, which of these to run."""
    methods: tuple[str, ...] = ()
    """Methods to run; by default all of the protocol. The figure and the table show all that the directory holds."""
    seeds: int = 5
    """Number of seeds, from --seed on."""
    num_epochs: int | None = None
    """Passes over the training part; by default the protocol's."""
    costs: bool = True
    """Measure the time of one epoch of alternating over that of the Lagrangian."""
    chunk: int = 10
    """Epochs between two evaluations."""

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""
        super().check()
        self.check_counts("num_epochs", "seeds", "chunk")
        known = dict.fromkeys(variant.method for variant in PROTOCOLS[self.protocol].variants)
        if unknown := [method for method in self.methods if method not in known]:
            raise ValueError(f"--methods must be among {', '.join(known)}, got {', '.join(unknown)}.")
        for variant in self.variants():
            fairness.check(variant.method, self.setting_of(variant))

    def variants(self) -> list[Variant]:
        """What the options leave of the protocol's."""
        return [
            variant
            for variant in PROTOCOLS[self.protocol].variants
            if (not self.methods or variant.method in self.methods)
            and variant.setting.get("followers", "one") in self.followers
        ]

    def setting_of(self, variant: Variant) -> Setting:
        """A variant's setting for the data."""
        setting = self.adapted(PROTOCOLS[self.protocol].setting._replace(**variant.setting))
        return setting._replace(batch_size=None) if self.dataset == "nba" else setting

    def run(self, directory: Path, track: _records.Track) -> "RenderableType":
        """Adds what is missing to runs.jsonl, draws fairness.png, and returns the table (also table.md)."""
        protocol = PROTOCOLS[self.protocol]
        epochs, path = self.num_epochs or protocol.num_epochs, directory / "runs.jsonl"
        done = {_records.identity(record) for record in _records.read_existing(path)}
        for variant in self.variants():
            self._one(directory, protocol, variant, epochs, done, track)
        setting = self.adapted(protocol.setting)
        if self.costs and not (directory / "costs.jsonl").exists():
            _measure(directory / "costs.jsonl", self.load(), setting)
        runs, gaps = list(_records.read_existing(path)), gaps_of(setting)
        rows = summarise(runs, protocol.front, gaps)
        title = f"{self.dataset}, {epochs} epochs"
        if setting.losses:
            title += ", " + " and ".join(_loss(loss, self.attributes) for loss in setting.losses)
        note = SEVERAL if setting.losses else ""
        (directory / "table.md").write_text(markdown(rows) + note, encoding="utf-8")
        draw_comparison(runs, rows, directory / "fairness.png", title, gaps)
        costs = list(_records.read_existing(directory / "costs.jsonl"))
        return _comparison_table(rows, costs, several=bool(setting.losses))

    def _one(
        self,
        directory: Path,
        protocol: Protocol,
        variant: Variant,
        epochs: int,
        done: set[tuple[str, int, str]],
        track: _records.Track,
    ) -> None:
        """All runs of a variant that are not done: of a graph, whose division the seed decides, seed by seed."""
        setting = self.setting_of(variant)
        weights = (0.0,) if variant.method == "single-objective" else protocol.etas
        hypers = [Hyper(eta=eta, **trial) for eta in weights for trial in variant.hyper]
        all_seeds = range(self.seed, self.seed + self.seeds)
        for seeds in [[seed] for seed in all_seeds] if self.dataset == "nba" else [all_seeds]:
            dataset = self.load(seeds[0])
            keys = [_records.settings_key(settings_of(dataset, setting, hyper, epochs)) for hyper in hypers]
            missing = [
                hyper
                for hyper, key in zip(hypers, keys, strict=True)
                if any((variant.method, seed, key) not in done for seed in seeds)
            ]
            if missing:
                callback = track(variant.label.removeprefix("alternating, ")[:17], epochs)
                outcome = fairness.sweep(
                    variant.method, setting, dataset, missing, seeds, epochs, chunk=self.chunk, callback=callback
                )
                write(directory, variant.method, dataset, setting, outcome, epochs)


def _measure(path: Path, dataset: fairness_data.Dataset, setting: Setting) -> None:
    """One epoch of one cell of alternating, either update, beside one of the Lagrangian on the same network."""
    setting = setting._replace(inner_steps=1, inner_batch_size=None)
    train = jax.tree.map(jnp.asarray, dataset.train)
    keys, hyper = jnp.stack([jax.random.key(0)]), jax.tree.map(lambda value: jnp.array([value]), Hyper())
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    for method, update in (
        ("lagrangian", "simultaneous"),
        ("alternating", "simultaneous"),
        ("alternating", "sequential"),
    ):
        compiled = fairness.program(method, setting._replace(update=update), dataset.num_groups)
        states = compiled.init(keys, hyper, train)
        calls[f"{method} {update}"] = (compiled.epochs, (states, hyper, keys, train, 0, 1))
    table = fb.measure_costs(calls)
    for cost in table.rows:
        method, update = cost.name.split()
        metrics = {"seconds": cost.seconds, "ratio": cost.seconds / table.rows[0].seconds}
        metrics |= {"seconds_low": cost.seconds_low, "seconds_high": cost.seconds_high}
        metrics |= {"flops": cost.flops or np.nan, "temp_bytes": cost.temp_bytes}
        settings = settings_of(dataset, setting._replace(update=update), Hyper(), 1)
        _records.append(path, _records.record("fairness", method, 0, settings, metrics, cost.seconds))


# What is shown of it.


class Row(NamedTuple):
    """One method at one of its settings; means over the seeds.

    Attributes:
        label: method and update.
        eta: of the setting shown: each, or the one that validation chose.
        trials: how many settings the method had.
        accuracy, dp_gap, dp_gap_soft, eo_gap: on the test part.
        largest_gap: the largest `dp_gap_soft` over the seeds, which the article reports.
        hypervolume: (accuracy, 1 - dp_gap) of the front that validation chose, seed -> value; empty without a front.
        difference: mean difference of the hypervolume to the Lagrangian's on the same seeds, and its 95% interval.
        above: the same two above the reference point of `references`.
    """

    label: str
    eta: float
    trials: int
    seeds: int
    accuracy: float
    dp_gap: float
    dp_gap_soft: float
    eo_gap: float
    largest_gap: float
    hypervolume: dict[int, float]
    difference: Interval | None
    above: dict[int, float]
    above_difference: Interval | None


def label(record: _records.Record) -> str:
    """Method and update of a record."""
    return label_of(record["method"], record["settings"])


def _values(record: _records.Record) -> dict[str, float]:
    return {name: np.nan if value is None else value for name, value in record["metrics"].items()}


def gaps_of(setting: Setting) -> tuple[str, ...]:
    """The metrics that go with the losses; fronts are of accuracy and one less the largest of them."""
    odds = ("equalized-odds", "equal-opportunity")
    if not setting.losses:
        return fairness.PARITY
    return tuple(dict.fromkeys("eo_gap" if loss.name in odds else "dp_gap" for loss in setting.losses))


def _gap(values: Mapping[str, float], gaps: Sequence[str], prefix: str = "") -> float:
    return max(values[f"{prefix}{gap}"] for gap in gaps)


def reference(
    runs: Sequence[_records.Record], gaps: Sequence[str] = fairness.PARITY, prefix: str = ""
) -> tuple[float, float]:
    """The point that bounds the front from below: the majority's label, and accuracy only's gap (else a gap of 1)."""
    alone = [1 - _gap(_values(record), gaps, prefix) for record in runs if record["method"] == "single-objective"]
    majority = float(np.mean([_values(record)["majority"] for record in runs]))
    return majority, float(np.mean(alone)) if alone else 0.0


def _trial(record: _records.Record) -> str:
    return _records.settings_key(record["settings"])


def summarise(runs: Sequence[_records.Record], front: bool, gaps: Sequence[str] = fairness.PARITY) -> list[Row]:
    """One row per method, with its front, or one per setting."""
    labels = [name for name in COLOURS if any(label(record) == name for record in runs)]
    point = reference(runs, gaps)
    # Of several losses the majority's label, fair by all of them, would have the largest sum.
    several = any(record["settings"].get("losses") for record in runs)
    validation = reference(runs, gaps, "validation_") if several else None
    of = {name: [record for record in runs if label(record) == name] for name in labels}
    volumes = {name: (_volumes(of[name], (0.0, 0.0), gaps), _volumes(of[name], point, gaps)) for name in labels}
    rows: list[Row] = []
    for name in labels:
        trials = dict.fromkeys(_trial(record) for record in of[name])
        shown = [max(trials, key=lambda trial: _score(of[name], trial, gaps, validation))] if front else list(trials)
        plain, above = volumes[name]
        for trial in shown:
            records = [record for record in of[name] if _trial(record) == trial]
            means = {
                metric: float(np.mean([_values(record)[metric] for record in records]))
                for metric in ("accuracy", "dp_gap", "dp_gap_soft", "eo_gap")
            }
            rows.append(
                Row(
                    name,
                    float(records[0]["settings"]["eta"]),
                    len(trials),
                    len(records),
                    **means,
                    largest_gap=max(_values(record)["dp_gap_soft"] for record in records),
                    hypervolume=plain if front else {},
                    difference=_difference(volumes, name, 0) if front else None,
                    above=above if front else {},
                    above_difference=_difference(volumes, name, 1) if front else None,
                )
            )
    return rows


def _volumes(runs: Sequence[_records.Record], point: tuple[float, float], gaps: Sequence[str]) -> dict[int, float]:
    """Seed -> hypervolume of the front that the validation part chose among the seed's runs."""
    by_seed: dict[int, list[dict[str, float]]] = {}
    for record in runs:
        by_seed.setdefault(record["seed"], []).append(_values(record))
    return {seed: fairness.selected_hypervolume(cells, point, gaps) for seed, cells in sorted(by_seed.items())}


def _score(
    runs: Sequence[_records.Record], trial: str, gaps: Sequence[str], point: tuple[float, float] | None
) -> float:
    """Validation accuracy less validation gap, the mean over the seeds; above a reference point, their area."""
    values = [_values(record) for record in runs if _trial(record) == trial]
    means = np.mean(fairness.points(values, "validation_", gaps), axis=0)
    return float(np.sum(means)) if point is None else hypervolume(means[None], point)


def _difference(volumes: Mapping[str, tuple[dict[int, float], ...]], name: str, which: int) -> Interval | None:
    if name == "lagrangian" or "lagrangian" not in volumes:
        return None
    mine, other = volumes[name][which], volumes["lagrangian"][which]
    common = sorted(mine.keys() & other.keys())
    return mean_interval([mine[seed] - other[seed] for seed in common]) if common else None


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


def header(rows: Sequence[Row]) -> tuple[str, ...]:
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


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    return _records.markdown_table(header(rows), map(_cells, rows))


SEVERAL = """
Fronts are of accuracy and one less the larger of the gaps that the losses are about. The plain hypervolume also counts
the majority's label, which is fair by any measure and which some weights of the unfairness lead to; judge by the area
above the reference point.
"""


def _comparison_table(rows: Sequence[Row], costs: Sequence[_records.Record], several: bool = False) -> "RenderableType":
    from rich.console import Group  # noqa: PLC0415

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

    table = _records.terminal_table(names, map(shown, rows))
    note = "Means over the seeds on the test part. gap: demographic parity of decisions; "
    note += "odds: equalized odds; " if several else ""
    note += "" if front else "soft gap: of probabilities, and its largest value over the seeds. table.md has more."
    if several:
        note += (
            "area, times 1000: the hypervolume of (accuracy, 1 - the larger of the gaps that the losses are about) of "
            "the settings on the validation part's front, above the majority's label and accuracy only's gap; its "
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
        f"{label(cost)}: {cost['metrics']['ratio']:.2f} times the Lagrangian's epoch{_arithmetic(cost, costs[0])}"
        for cost in costs
        if cost["method"] != "lagrangian"
    ]
    return Group(table, "", textwrap.fill(note, 78), *lines)


def _arithmetic(cost: _records.Record, first: _records.Record) -> str:
    flops, of_first = (record["metrics"].get("flops") for record in (cost, first))
    return f", {flops / of_first:.2f} times its arithmetic" if flops and of_first else ""


def draw_comparison(
    runs: Sequence[_records.Record],
    rows: Sequence[Row],
    path: Path,
    title: str,
    gaps: Sequence[str] = fairness.PARITY,
) -> None:
    """Test accuracy against gap of every setting (mean over seeds; seeds faint), hypervolumes by method, as a PNG."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    names = list(dict.fromkeys(row.label for row in rows))
    front = any(row.hypervolume for row in rows)
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4) if front else (6.5, 4.4), layout="constrained")
        panels: Any = figure.subplots(1, 2 if front else 1, width_ratios=(1.5, 1) if front else None)
        plane = panels[0] if front else panels
        lows: list[float] = []
        for name in names:
            of_name = [record for record in runs if label(record) == name]
            points = fairness.points([_values(record) for record in of_name], gaps=gaps)
            trials = [_trial(record) for record in of_name]
            means = np.array([points[[t == trial for t in trials]].mean(axis=0) for trial in dict.fromkeys(trials)])
            best = pareto_front(means)
            line = means[best][np.argsort(means[best][:, 1])]
            lows.append(float(np.min(line[:, 0])))
            colour = COLOURS[name]
            plane.scatter(1 - points[:, 1], points[:, 0], s=5, color=colour, alpha=0.25, lw=0)
            plane.scatter(1 - means[:, 1], means[:, 0], s=16, color=colour, lw=0, alpha=0.7)
            plane.plot(1 - line[:, 1], line[:, 0], color=colour, marker="o", ms=4.5, lw=1.3, label=name)
        names_of = {"dp_gap": "demographic parity", "eo_gap": "equalized odds"}
        gap = " or ".join(names_of[name] for name in gaps)
        gap = f"{gap.capitalize()} gap" if len(gaps) == 1 else f"Gap in {gap}, the larger,"
        plane.set(xlabel=f"{gap} of decisions (test)", ylabel="Accuracy (test)", title=title)
        plane.set_xlim(left=-0.003)
        bottom, majority = min(lows) - 0.012, reference(runs, gaps)[0]  # settings far below the fronts are left out
        plane.set_ylim(bottom=bottom)
        if majority > bottom:
            plane.axhline(majority, color="0.7", lw=0.8, ls=":")
            place: Any = {"xy": (0.2, majority), "xycoords": ("axes fraction", "data")}
            plane.annotate("majority's label", **place, va="bottom", color="0.5", fontsize=7.5)
        plane.legend(frameon=False, fontsize=7.5, loc="lower right")
        if front:
            _draw_volumes(panels[1], rows)
        figure.savefig(path, dpi=150)


def _draw_volumes(axes: Any, rows: Sequence[Row]) -> None:
    """Hypervolume above the reference point by method, with its interval over seeds."""
    for i, row in enumerate(reversed(rows)):
        mean, low, high = mean_interval(list(row.above.values()))
        axes.plot([1e3 * low, 1e3 * high], [i, i], color=COLOURS[row.label], lw=2)
        values = 1e3 * np.array(list(row.above.values()))
        axes.scatter(values, np.full(len(values), i), s=8, color=COLOURS[row.label], alpha=0.4, lw=0)
        axes.plot(1e3 * mean, i, "o", color=COLOURS[row.label], ms=5)
    axes.set_yticks(range(len(rows)), [row.label for row in reversed(rows)])
    axes.set(
        xlabel="Hypervolume above the reference point, x1000", title="Fronts chosen on validation, seeds and 95% CI"
    )
