"""How the two players of the network are trained, and the control that has one objective for both."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

import funcbilevel as fb
from funcbilevel.tasks._experiment.methods import Method, table
from funcbilevel.tasks._experiment.players import Learner, PlayersSetting, adam, descent, estimators, turns
from funcbilevel.tasks.pathways.problem import Params, follower_objective, is_followers, problem


@dataclass(frozen=True)
class Setting(PlayersSetting):
    """What decides the compiled program; both players see the same rows, drawn with replacement.

    Attributes:
        num_steps: of the leader.
    """

    width: int = 8
    batch_size: int = 32
    solver_steps: int = 3
    damping: float = 1.0
    num_steps: int = 400


class Hyper(NamedTuple):
    """What may differ between the cells of one program.

    Attributes:
        eta: weight of the attributions outside the known pathways.
        rate: of Adam, for both players.
        known_only: 1 if the network gets the known genes only, else 0.
    """

    eta: Any = 0.0
    rate: Any = 0.01
    known_only: Any = 0.0


def _played(estimator: Callable[[Any], fb.Estimator]) -> Callable[..., Learner]:
    """The follower moves, then the leader, by the estimator's hypergradient."""

    def learner(setting: Setting, shapes: Params, known: jax.Array, hyper: Hyper) -> Learner:
        merge = fb.partition(shapes, is_followers).merge
        solver = fb.bilevel(
            problem(merge, known, hyper.eta),
            None,
            estimator(setting),
            inner_optimizer=adam(hyper.rate, setting.num_steps * setting.inner_steps),
            outer_optimizer=adam(hyper.rate, setting.num_steps),
            inner_steps=setting.inner_steps,
        )
        return turns(
            solver,
            lambda params: fb.partition(params, is_followers)[:2],
            lambda state: merge(state.outer_params, state.inner_params),
        )

    return learner


def _lagrangian(setting: Setting, shapes: Params, known: jax.Array, hyper: Hyper) -> Learner:
    """The follower's objective for all layers."""
    del shapes
    return descent(
        lambda params, rows: follower_objective(params, rows, known, hyper.eta), adam(hyper.rate, setting.num_steps)
    )


ALONE, KNOWN, LAGRANGIAN = "single-objective", "known-genes", "lagrangian"
RATES = ({"rate": 0.01}, {"rate": 0.02})
METHODS = table(
    Method(ALONE, "cross entropy alone", _lagrangian, RATES, colour="0.35", always=True),
    Method(
        KNOWN, "the same, on a network that gets the known genes only", _lagrangian, RATES, colour="C2", always=True
    ),
    Method(LAGRANGIAN, "the follower's objective for both players", _lagrangian, RATES, colour="C0", always=True),
    *estimators(_played, RATES).values(),
)
ETAS = (0.1, 0.3, 1.0, 1.7, 3.0, 6.0)


def hypers(method: str) -> list[Hyper]:
    """The settings of a method: of those that trade, every eta with every rate."""
    etas = (0.0,) if method in (ALONE, KNOWN) else ETAS
    return [Hyper(eta, known_only=float(method == KNOWN), **trial) for trial in METHODS[method].trials for eta in etas]
