"""Model-based reinforcement learning: `funcbilevel run cartpole` and `pendulum`. The problem is in `problem`."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from funcbilevel.tasks._experiment.command import Task
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.grid import Track, by_setting, complete
from funcbilevel.tasks._experiment.methods import resolve
from funcbilevel.tasks._experiment.options import Seeded, Sweep, flag
from funcbilevel.tasks._experiment.select import Rule, choose, trial_runs
from funcbilevel.tasks._experiment.store import Run, Store
from funcbilevel.tasks.rl import report, train
from funcbilevel.tasks.rl.methods import METHODS, Setting

RANDOM_STEPS = Setting().random_steps
SELECTION = Rule("return_auc", seeds=(1000, 1001, 1002, 1003, 1004), largest=True)
TOGETHER = 5
"""Seeds per device that are trained together; more make a step no faster per seed, fewer make it slower."""


def _together(run: Run) -> Hashable:
    """As many seeds of a setting as the devices take."""
    return by_setting(run), run.seed // (TOGETHER * len(jax.devices()))


@dataclass(frozen=True)
class _Shared(Seeded):
    table = METHODS
    spread = True
    counts = ("inner_steps", "evaluation_interval")
    seeds: int = 10
    """Number of seeds, from --seed on."""
    steps: int = 50_000
    """Steps of the environment per seed."""
    inner_steps: int = 1
    """Steps of the Q-networks per step of the environment, on one batch."""
    inner_learning_rate: float | None = None
    """Learning rate of the Q-networks; by default the method's own."""
    outer_learning_rate: float | None = None
    """Learning rate of the world model; by default 1e-3."""
    warm_adam: bool | None = None
    """Whether Adam's moments on the Q-networks are kept from step to step; by default as the method's publication."""
    tau: float | None = None
    """Update rate of the target networks; by default 0.01."""
    value_bound: float | None = None
    """Bound of the soft value in all targets; by default, as published, there is none, and long runs may diverge."""
    evaluation_interval: int = 1000
    """Steps between evaluations, which are ten episodes each."""

    def check(self) -> None:
        """Raises a UserError that names an option out of range."""
        super().check()
        if self.steps <= RANDOM_STEPS:
            raise UserError(
                f"--steps must be more than the {RANDOM_STEPS} random ones at the beginning, got {self.steps}."
            )
        if (self.steps - RANDOM_STEPS) % self.evaluation_interval:
            raise UserError(
                f"--evaluation-interval must divide the {self.steps - RANDOM_STEPS} steps after the {RANDOM_STEPS} "
                f"random ones, got {self.evaluation_interval}."
            )
        for name in ("inner_learning_rate", "outer_learning_rate", "value_bound"):
            if (rate := getattr(self, name)) is not None and rate <= 0:
                raise UserError(f"{flag(name)} must be positive, got {rate}.")
        if self.tau is not None and not 0 < self.tau <= 1:
            raise UserError(f"--tau must be in (0, 1], got {self.tau}.")

    def status(self, metrics: Mapping[str, Any]) -> str:
        """The evaluation's return and the throughput."""
        return f"return {metrics['evaluation_return'][-1]:.0f}, {metrics['steps_per_second'][-1]:,.0f} steps/s"

    def setting(self, method: str, model_width: int) -> Setting:
        """The method's own setting, with the options that were given."""
        setting = Setting(
            model_width=model_width,
            steps=self.steps,
            inner_steps=self.inner_steps,
            evaluation_interval=self.evaluation_interval,
        )._replace(**METHODS[method].hyper)
        names = ("inner_learning_rate", "outer_learning_rate", "warm_adam", "tau", "value_bound")
        given = {name: getattr(self, name) for name in names}
        return setting._replace(**{name: value for name, value in given.items() if value is not None})

    def complete(self, where: Store, track: Track, runs: list[Run]) -> None:
        """Adds the runs that are missing, a few seeds of a setting together."""
        directory = where.directory
        make, forget = partial(train.train, self.task, directory, track), partial(train.forget, directory)
        complete(where, runs, make, _together, forget)


@dataclass(frozen=True)
class RunCartPole(_Shared):
    """CartPole by one method: evaluation returns over seeds, a figure and an animation."""

    task = "cartpole"
    counts = ("model_width",)
    method: str = "funcid-pointwise"
    """Method by which the world model is learned."""
    model_width: int = 3
    """Width of the hidden layers of the world model."""

    def check(self) -> None:
        """Raises a UserError that names an option out of range."""
        super().check()
        resolve("--method", METHODS, self.method)

    def settings(self) -> dict[str, Any]:
        """The options that decide the numbers, as config.json has them."""
        return super().settings() | {"method": resolve("--method", METHODS, self.method)}

    def work(self, directory: Path, track: Track) -> None:
        """Adds what is missing to runs.jsonl."""
        method = resolve("--method", METHODS, self.method)
        setting = self.setting(method, self.model_width)
        runs = [train.run(method, setting, seed, label=method) for seed in self.all_seeds]
        self.complete(Store(directory, self.task), track, runs)


@dataclass(frozen=True)
class CompareCartPole(_Shared, Sweep):
    """CartPole by several methods and model widths over seeds; a directory may hold several lengths and settings."""

    task = "cartpole"
    counts = ("model_widths",)
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to run; figure and table show all that the output directory holds."""
    model_widths: tuple[int, ...] = (3, 32)
    """Widths of the hidden layers of the world model."""
    select: bool = False
    """Selection of each method's rates among four trials, by the mean return of five other seeds; selection.jsonl."""
    selection_steps: int = 50_000
    """Steps of the environment of a trial."""

    def check(self) -> None:
        """Raises a UserError that names an option out of range."""
        super().check()
        if self.select:
            self._check_selection()

    def _check_selection(self) -> None:
        after = self.selection_steps - RANDOM_STEPS
        if after < 1 or after % self.evaluation_interval:
            raise UserError(
                f"--selection-steps less the {RANDOM_STEPS} random ones must be a multiple of --evaluation-interval="
                f"{self.evaluation_interval}, got {self.selection_steps}."
            )
        if seen := [seed for seed in SELECTION.seeds if seed in self.all_seeds]:
            raise UserError(f"--seed and --seeds must leave out the seeds of --select, got {seen[0]} among them.")
        for name in ("inner_learning_rate", "warm_adam"):
            if getattr(self, name) is not None:
                raise UserError(f"{flag(name)} must not be given with --select, which chooses it.")

    def settings(self) -> dict[str, Any]:
        """None: each record has its own settings, and the directory may hold several lengths and widths."""
        return {}

    def work(self, directory: Path, track: Track) -> None:
        """Adds what is missing to selection.jsonl and runs.jsonl."""
        plans = {
            f"{method} {width}": (method, self.setting(method, width))
            for width in self.model_widths
            for method in self.all_methods
        }
        if self.select:
            plans = self._selected(directory, track, plans)
        runs = [train.run(*plan, seed, label) for label, plan in plans.items() for seed in self.all_seeds]
        self.complete(Store(directory, self.task), track, runs)

    def _selected(
        self, directory: Path, track: Track, plans: Mapping[str, tuple[str, Setting]]
    ) -> dict[str, tuple[str, Setting]]:
        """Each plan with the best of its method's trials."""
        trials = {label: self._trials(label, *plan) for label, plan in plans.items()}
        where = Store(directory, self.task, "selection")
        self.complete(where, track, trial_runs(trials, SELECTION))
        chosen = choose(where, trials, SELECTION)
        return {
            label: (run.method, run.how.setting._replace(steps=self.steps, capacity=plans[label][1].capacity))
            for label, run in chosen.items()
        }

    def _trials(self, label: str, method: str, setting: Setting) -> list[Run]:
        capacity = setting.capacity or max(self.steps, self.selection_steps)  # all, and the buffer of the runs' size
        setting = setting._replace(steps=self.selection_steps, capacity=capacity)
        return [
            train.run(method, setting._replace(**trial), self.seed, f"{label}, {i}")
            for i, trial in enumerate(METHODS[method].trials, start=1)
        ]


@dataclass(frozen=True)
class RunPendulum(RunCartPole):
    """Pendulum with three torques, by one method: the same agents."""

    task = "pendulum"


@dataclass(frozen=True)
class ComparePendulum(CompareCartPole):
    """Pendulum with three torques, by several methods and model widths over seeds."""

    task = "pendulum"


CARTPOLE = Task("cartpole", partial(report.report, "cartpole"), run=RunCartPole, compare=CompareCartPole)
PENDULUM = Task("pendulum", partial(report.report, "pendulum"), run=RunPendulum, compare=ComparePendulum)
