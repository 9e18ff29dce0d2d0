"""What `compare` runs: methods, their settings and trials."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from funcbilevel.tasks.fairness.losses import Loss
from funcbilevel.tasks.fairness.methods import SINGLE, label_of
from funcbilevel.tasks.fairness.problem import Hyper, Setting
from funcbilevel.tasks.fairness.runs import Plan


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
        return label_of(self.method, self.setting)


class Protocol(NamedTuple):
    """What `compare` runs.

    Attributes:
        setting: shared by all variants.
        variants: methods with their trials.
        etas: weights of the unfairness.
        num_epochs: of training.
    """

    setting: Setting
    variants: tuple[Variant, ...]
    etas: tuple[float, ...]
    num_epochs: int


def etas(low: float, high: float, count: int) -> tuple[float, ...]:
    """`count` weights from low to high, evenly spaced on a logarithmic scale."""
    return tuple(float(f"{value:.3g}") for value in np.geomspace(low, high, count))


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
    "pareto": Protocol(_HEAD, _COMPARED, etas(0.3, 100.0, 8), 50),
    "graph": Protocol(
        _HEAD._replace(batch_size=None, weight_decay=1e-3, decay_epochs=60),
        _COMPARED,
        etas(0.3, 100.0, 8),
        300,
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
        etas(0.3, 30.0, 4),
        12,
    ),
    # The public code's network, rates, loss and eta.
    "published": Protocol(_FIVE, _REPRODUCED, (1e4,), 100),
    # The article's: two accuracy layers, a fairness layer, an accuracy layer.
    "article": Protocol(
        _FIVE._replace(accuracy_widths=(101, 101, 1), position=3, batch_size=100),
        _REPRODUCED,
        (100.0, 1000.0),
        50,
    ),
}


def plans(variants: Sequence[Variant], of: Callable[[Variant], Setting], weights: Sequence[float]) -> list[Plan]:
    """Each variant with each of its trials and each weight; accuracy alone has no weight."""
    return [
        Plan(variant.method, variant.label, of(variant), Hyper(eta=eta, **trial))
        for variant in variants
        for eta in ((0.0,) if variant.method == SINGLE else weights)
        for trial in variant.hyper
    ]
