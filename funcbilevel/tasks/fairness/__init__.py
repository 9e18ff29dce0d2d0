"""Fair classification by two players: `funcbilevel run` and `compare fairness`. The problem is in `problem`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from funcbilevel.tasks._experiment import methods as _methods
from funcbilevel.tasks._experiment.command import Task
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.grid import Track, complete
from funcbilevel.tasks._experiment.options import Options, Sweep, flag
from funcbilevel.tasks._experiment.store import Run, Store
from funcbilevel.tasks.fairness import outside, report, runs
from funcbilevel.tasks.fairness.losses import LOSSES, Loss
from funcbilevel.tasks.fairness.methods import METHODS, SINGLE, check
from funcbilevel.tasks.fairness.outside import NEED_ATTRIBUTE, OUTSIDE
from funcbilevel.tasks.fairness.problem import Hyper, Setting
from funcbilevel.tasks.fairness.protocols import PROTOCOLS, Variant, etas, plans
from funcbilevel.tasks.fairness.runs import Data, Plan, Source

Followers = Literal["one", "together", "round-robin"]


@dataclass(frozen=True)
class _Shared(Options):
    task = "fairness"
    table = METHODS
    counts = ("chunk", "num_epochs")
    not_negative = ("division",)
    seed: int = 0
    """Seed of all random numbers but the division of adult and health, which has --division."""
    dataset: Data = "synthetic"
    """Data: drawn by scikit-learn, UCI Adult, Heritage Health, or the NBA graph."""
    data: Path | None = None
    """Place of the data: of adult and nba the directory, of health the file. By default $FUNCBILEVEL_ADULT_DIR,
    $FUNCBILEVEL_NBA_DIR, $FUNCBILEVEL_HEALTH_CSV, or else (not health) a download."""
    attributes: tuple[str, ...] = ("sex",)
    """Adult only: protected attributes, sex, race, or both."""
    attribute: Literal["used", "removed"] = "used"
    """Protected attributes as inputs: used, or removed, and then methods that need them when they decide are not
    available."""
    label: Literal["income", "education"] = "income"
    """Adult only: label to predict, income or education in four classes."""
    num_classes: int = 2
    """Synthetic only: number of classes."""
    division: int = 0
    """Adult and health only: seed of the division into training and validation part, one for all seeds."""
    losses: tuple[str, ...] = ()
    """Several losses, whose sum is the unfairness: names as of --loss, each over all attributes or, as in
    demographic-parity@race, over one of them."""
    chunk: int = 10
    """Epochs between two evaluations."""

    def check(self) -> None:
        """Raises a UserError that names an option out of range."""
        super().check()
        elsewhere = f"with --dataset {self.dataset}"
        if self.data is not None and self.dataset == "synthetic":
            raise UserError(f"--data is for adult, health and nba, got it {elsewhere}.")
        if self.attributes != ("sex",) and self.dataset != "adult":
            raise UserError(f"--attributes are those of adult, got {', '.join(self.attributes)} {elsewhere}.")
        if self.label != "income" and self.dataset != "adult":
            raise UserError(f"--label is that of adult, got {self.label} {elsewhere}.")
        if self.num_classes != 2 and (self.dataset != "synthetic" or not 2 <= self.num_classes <= 128):
            raise UserError(
                f"--num-classes must be from 2 to 128, and is that of synthetic, got {self.num_classes} {elsewhere}."
            )
        if self.division and self.dataset not in ("adult", "health"):
            raise UserError(f"--division is that of adult and health, got {self.division} {elsewhere}.")
        self.parsed_losses()

    def check_setting(self, method: str, setting: Setting) -> None:
        """Raises a UserError that names the option by which a method cannot be run."""
        try:
            check(method, setting)
        except ValueError as error:
            names = {field.name for field in fields(self)}
            first, *rest = re.split(r"(?=[ :])", str(error), maxsplit=1)
            words = [flag(first) if first in names else first, *rest]
            text = re.sub(r"(?<![\w-])[a-z]+_[a-z]+(?!\w)", lambda found: flag(found[0]), "".join(words))
            raise UserError(text) from error

    def parsed_losses(self) -> tuple[Loss, ...]:
        """What --losses says."""
        known = self.attributes if self.dataset == "adult" else ()

        def parse(text: str) -> Loss:
            name, at, attribute = text.partition("@")
            if name not in LOSSES:
                raise UserError(f"--losses must be among {', '.join(LOSSES)}, got {name!r}.")
            if at and attribute not in known:
                raise UserError(
                    f"--losses: after @ stands one of the --attributes of adult, here {', '.join(known) or '(none)'}; "
                    f"got {text!r}."
                )
            return Loss(name, known.index(attribute) if at else None)

        return tuple(map(parse, self.losses))

    @property
    def source(self) -> Source:
        """Where the data come from."""
        return Source(
            self.dataset,
            self.data,
            self.attributes,
            self.label,
            self.num_classes,
            self.division,
            attribute=self.attribute,
        )

    def adapted(self, setting: Setting) -> Setting:
        """The setting with the losses of --losses, and with one output for each class if there are more than two."""
        classes = self.source.classes
        setting = setting._replace(num_classes=classes, losses=self.parsed_losses() or setting.losses)
        last = "fairness_widths" if setting.position == len(setting.accuracy_widths) + 1 else "accuracy_widths"
        widths: tuple[int, ...] = getattr(setting, last)
        return setting if classes == 2 or widths[-1:] != (1,) else setting._replace(**{last: (*widths[:-1], classes)})

    def settings(self) -> dict[str, Any]:
        """The options that decide the numbers; none that is younger than the records and at its default."""
        return runs.without_later(super().settings())

    def status(self, metrics: Mapping[str, Any]) -> str:
        """Accuracy and gap on the test part."""
        return f"accuracy {metrics['accuracy'][-1]:.3f}, parity gap {metrics['dp_gap'][-1]:.3f}"


@dataclass(frozen=True)
class RunFairness(_Shared):
    """A classifier that should be accurate and fair, trained by one method, beside one trained for accuracy alone."""

    beside = ("data", "chunk")
    counts = ("batch_size", "inner_steps")
    not_negative = ("eta", "leader_rate", "follower_rate", "follower_accuracy", "leader_fairness")
    method: str = "aid-cg"
    """Method of training."""
    eta: float = 10.0
    """Weight of the unfairness."""
    loss: str = "demographic-parity"
    """Follower's loss: demographic-parity, absolute-parity, published-parity, equalized-odds, equal-opportunity, or
    worst-group. Several: --losses."""
    followers: Followers = "one"
    """Followers: one for the sum of the losses, or (alternating only) one for each of --losses, with a layer of
    --fairness-widths each, stepping together from the same point, or one after the other."""
    num_epochs: int = 30
    """Passes over the training part."""
    batch_size: int = 200
    """Rows per step; of a graph always all."""
    leader_rate: float = 2e-3
    """Learning rate of Adam for the accuracy layers."""
    follower_rate: float = 2e-3
    """Learning rate of Adam for the fairness layers."""
    follower_accuracy: float = 1.0
    """Weight of the cross entropy in the follower's objective; FairBiNN has 0."""
    leader_fairness: float = 0.0
    """Weight of the unfairness in the leader's objective, as a multiple of eta."""
    inner_steps: int = 5
    """Follower's steps per step of the leader; with leaky-alternating 1."""
    accuracy_widths: tuple[int, ...] = (64, 64)
    """Leader's layers, the output included unless the fairness layers stand last."""
    fairness_widths: tuple[int, ...] = (1,)
    """Follower's layers; by default the output layer."""
    position: int = 3
    """Place of the fairness layers: 1 is before all accuracy layers."""
    attention: str | None = None
    """Layer to be self-attention over the columns, accuracy_0 or fairness_0 for example."""
    update: Literal["sequential", "simultaneous"] = "sequential"
    """Alternating only: the follower first, or both players at once after one forward pass."""
    chunk: int = 2
    """Epochs between two evaluations."""

    def check(self) -> None:
        """Raises a UserError that names an option out of range."""
        super().check()
        if self.loss not in LOSSES:
            raise UserError(f"--loss must be one of {', '.join(LOSSES)}, got {self.loss!r}.")
        for plan in self.plans:
            self.check_setting(plan.method, plan.setting)

    @property
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

    @property
    def plans(self) -> list[Plan]:
        """The method, and accuracy alone on the same network."""
        method = _methods.resolve("--method", METHODS, self.method)
        hyper = Hyper(self.eta, self.leader_rate, self.follower_rate, self.follower_accuracy, self.leader_fairness)
        alone = self.setting._replace(followers="one", inner_steps=1, update="sequential")
        if method == SINGLE:
            return [Plan(SINGLE, SINGLE, alone, Hyper(0.0, self.leader_rate))]
        return [Plan(method, method, self.setting, hyper), Plan(SINGLE, SINGLE, alone, Hyper(0.0, self.leader_rate))]

    def work(self, directory: Path, track: Track) -> None:
        """Writes the records of both and their curves."""
        wanted = runs.runs(self.source, self.plans, self.num_epochs, [self.seed])
        complete(
            Store(directory, self.task), wanted, partial(runs.train, self.source, self.num_epochs, self.chunk, track)
        )


COMPARED = (
    *(name for name in METHODS if any(name == v.method for protocol in PROTOCOLS.values() for v in protocol.variants)),
    *OUTSIDE,
)


@dataclass(frozen=True)
class CompareFairness(_Shared, Sweep):
    """Methods over many weights of the unfairness and seeds. Run it again to go on where it stopped."""

    table = METHODS | OUTSIDE
    beside = (*Sweep.beside, "data", "followers", "costs", "chunk", "trials")
    counts = ("trials",)
    dataset: Data = "adult"
    """Data: drawn by scikit-learn, UCI Adult, Heritage Health, or the NBA graph."""
    protocol: Literal["pareto", "graph", "followers", "published", "article"] = "pareto"
    """Protocol: pareto (for nba: graph) compares fronts under an equal tuning budget; followers does the same for two
    losses, parity and equalized odds unless --losses says others, with one follower or two; published and article are
    FairBiNN's setting in its public code and in its paper."""
    followers: tuple[Followers, ...] = ("one", "together", "round-robin")
    """Protocol followers only: which of these to run."""
    methods: tuple[str, ...] = COMPARED
    """Methods to run, by default all of the protocol; table and figure show all that the output directory holds."""
    num_epochs: int | None = None
    """Passes over the training part; by default the protocol's."""
    trials: int | None = None
    """Trials of each method, weights of the unfairness or tolerances of the gap; by default the protocol's."""
    redivide: bool = False
    """Adult and health only: another division into training and validation part for each seed, --division plus it."""
    costs: bool = True
    """Time of one epoch of alternating over that of the Lagrangian."""

    def check(self) -> None:
        """Raises a UserError that names an option out of range."""
        super().check()
        if self.redivide and self.dataset not in ("adult", "health"):
            raise UserError(f"--redivide is for adult and health, got it with --dataset {self.dataset}.")
        known = dict.fromkeys(variant.method for variant in PROTOCOLS[self.protocol].variants)
        known |= dict.fromkeys(OUTSIDE if self.has_outside else ())
        if self.methods != COMPARED and (unknown := [name for name in self.all_methods if name not in known]):
            raise UserError(
                f"--methods must be among {', '.join(known)} in protocol {self.protocol}, got {', '.join(unknown)}."
            )
        if self.attribute == "removed" and not set(self.all_methods) - set(NEED_ATTRIBUTE):
            raise UserError(
                f"--methods: {', '.join(self.all_methods)} need the attribute when they decide; pass --attribute used, "
                "or other methods."
            )
        outside.check_installed(self.outside_methods)
        if not self.variants and not self.outside_methods:
            raise UserError(f"--followers: no method is left with {', '.join(self.followers)}.")
        for variant in self.variants:
            self.check_setting(variant.method, self.setting_of(variant))

    @property
    def source(self) -> Source:
        """Where the data come from."""
        return super().source._replace(redivide=self.redivide)

    @property
    def has_outside(self) -> bool:
        """Whether methods from outside take part: they are for two classes, features, and fronts of one loss."""
        return self.protocol == "pareto" and self.dataset != "nba" and self.source.classes == 2 and not self.losses

    @property
    def outside_methods(self) -> list[str]:
        """Those of them that are to be run."""
        return [name for name in self.all_methods if name in OUTSIDE] if self.has_outside else []

    @property
    def variants(self) -> list[Variant]:
        """What the options leave of the protocol's."""
        return [
            variant
            for variant in PROTOCOLS[self.protocol].variants
            if variant.method in self.all_methods and variant.setting.get("followers", "one") in self.followers
        ]

    def setting_of(self, variant: Variant) -> Setting:
        """A variant's setting for the data."""
        setting = self.adapted(PROTOCOLS[self.protocol].setting._replace(**variant.setting))
        return setting._replace(batch_size=None) if self.dataset == "nba" else setting

    @property
    def epochs(self) -> int:
        """Passes over the training part."""
        return self.num_epochs or PROTOCOLS[self.protocol].num_epochs

    @property
    def network_runs(self) -> list[Run]:
        """The runs of networks."""
        weights = PROTOCOLS[self.protocol].etas
        weights = weights if self.trials is None else etas(weights[0], weights[-1], self.trials)
        return runs.runs(self.source, plans(self.variants, self.setting_of, weights), self.epochs, self.all_seeds)

    @property
    def plain(self) -> Plan:
        """Accuracy alone, the network below `thresholds`."""
        variants = [variant for variant in PROTOCOLS[self.protocol].variants if variant.method == SINGLE]
        return plans(variants, self.setting_of, ())[0]

    @property
    def outside_runs(self) -> list[Run]:
        """The runs of methods from outside."""
        if not self.outside_methods:
            return []
        trials = self.trials or len(PROTOCOLS[self.protocol].etas)
        return outside.runs(self.source, self.outside_methods, self.plain, self.epochs, trials, self.all_seeds)

    def work(self, directory: Path, track: Track) -> None:
        """Adds what is missing to runs.jsonl, and measures the costs."""
        protocol, source, epochs, where = (
            PROTOCOLS[self.protocol],
            self.source,
            self.epochs,
            Store(directory, self.task),
        )
        train = partial(runs.train, source, epochs, self.chunk, track)
        complete(where, self.network_runs, train, partial(runs.one_program, source))
        if wanted := self.outside_runs:
            complete(where, wanted, partial(outside.train, source, self.plain, epochs, track), outside.by_seed)
        if self.costs:
            measured = runs.cost_runs(source, self.adapted(protocol.setting), self.seed)
            complete(Store(directory, self.task, "costs"), measured, partial(runs.measure_costs, source), lambda run: 0)


TASK = Task("fairness", report.report, run=RunFairness, compare=CompareFairness)
