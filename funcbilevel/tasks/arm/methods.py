"""How leader and follower are trained on the arm, and the weighted reward, one objective for both."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import optax

import funcbilevel as fb
from funcbilevel.tasks._experiment.methods import Method, table
from funcbilevel.tasks._experiment.players import PlayersSetting, estimators, finite, move, solver_of_step
from funcbilevel.tasks.arm.problem import Episodes, init_leader, init_network


@dataclass(frozen=True)
class Setting(PlayersSetting):
    """What decides the compiled program; samples are episodes."""

    width: int = 16
    batch_size: int = 8
    inner_steps: int = 3


class Hyper(NamedTuple):
    """What may differ between the cells of one program, scalars.

    Attributes:
        weight: w, of energy and intrusion.
        leader_rate, follower_rate: of Adam, falling to zero as a cosine; a player with rate 0 stays where it is.
        payload: in kg.
    """

    weight: Any = 1.0
    leader_rate: Any = 1e-2
    follower_rate: Any = 1e-2
    payload: Any = 0.0


class Game(NamedTuple):
    """One cell's problem, its setting, and the two players' optimizers."""

    problem: fb.ParametricProblem
    setting: Setting
    leader_optimizer: optax.GradientTransformation
    follower_optimizer: optax.GradientTransformation


def _sequential(estimator: Callable[[Any], fb.Estimator]) -> Callable[[Game], fb.BilevelSolver]:
    """The follower moves, then the leader, by the estimator's hypergradient."""
    return lambda game: fb.bilevel(
        game.problem,
        None,
        estimator(game.setting),
        inner_optimizer=game.follower_optimizer,
        outer_optimizer=game.leader_optimizer,
        inner_steps=game.setting.inner_steps,
    )


def weighted_reward(game: Game) -> fb.BilevelSolver:
    """Both players descend the inner objective, tracking + w (energy + intrusion), at once, on the outer batch.

    A step whose objective or gradient is not finite moves nobody; `outer_finite` says so.
    """

    def step(
        state: fb.BilevelState, inner_batch: Any, outer_batch: Episodes
    ) -> tuple[fb.BilevelState, dict[str, jax.Array]]:
        del inner_batch
        omega, theta = state.outer_params, state.inner_params
        value, (g_omega, g_theta) = jax.value_and_grad(game.problem.inner_objective, argnums=(0, 1))(
            omega, theta, outer_batch
        )
        well = finite(value, (g_omega, g_theta))
        omega, outer_opt_state = move(game.leader_optimizer, g_omega, state.outer_opt_state, omega, well)
        theta, inner_opt_state = move(game.follower_optimizer, g_theta, state.inner_opt_state, theta, well)
        new = state._replace(
            step=state.step + 1,
            outer_params=omega,
            inner_params=theta,
            outer_opt_state=outer_opt_state,
            inner_opt_state=inner_opt_state,
        )
        return new, {"outer_objective": value, "inner_objective": value, "outer_finite": well}

    return solver_of_step(game.leader_optimizer, game.follower_optimizer, step)


CONTROL, ALONE = "lagrangian", "leader-only"
_ONE = ({"leader_rate": 1e-2, "follower_rate": 1e-2}, {"leader_rate": 3e-2, "follower_rate": 3e-2})
_TWO = ({"leader_rate": 1e-2, "follower_rate": 1e-2}, {"leader_rate": 1e-3, "follower_rate": 3e-2})
_IN_TURN = estimators(_sequential, _TWO, chosen=1)
METHODS = table(
    Method(
        CONTROL,
        "the weighted reward, one objective for both networks",
        weighted_reward,
        _ONE,
        chosen=1,
        colour="C0",
        label="weighted reward",
    ),
    Method(
        ALONE,
        "the same, on one network with as many weights as the two have",
        weighted_reward,
        _ONE,
        chosen=1,
        colour="0.5",
        label="weighted reward, one network",
    ),
    *(_IN_TURN[name] for name in ("alternating", "aid-cg", "itd")),
)
WEIGHTS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
MIDDLE = 0.3
"""The weight of the controllers that are trained again for other conditions; `chosen` are the rates for it."""


class Change(NamedTuple):
    """What becomes different after training: its name, the payload, and the weight."""

    name: str
    payload: float
    weight: float


CHANGES = (Change("payload", 1.0, MIDDLE), Change("weight", 0.0, 10 * MIDDLE))


def hypers(method: str) -> list[Hyper]:
    """The settings of a method: every weight with every trial of its rates."""
    return [Hyper(weight, **trial) for weight in WEIGHTS for trial in METHODS[method].trials]


def moves_at_once(method: str) -> bool:
    """Whether both players move in one step, of the same objective."""
    return METHODS[method].build is weighted_reward


def num_steps(method: str, setting: Setting, updates: int) -> int:
    """The leader's steps in so many steps of Adam, where the follower's steps count as well."""
    return max(1, updates // (1 if moves_at_once(method) else setting.inner_steps + 1))


def init_players(key: jax.Array, method: str, setting: Setting) -> tuple[Any, Any]:
    """(omega, theta) at the start, the same for all methods but `leader-only`, whose theta is None."""
    leader, follower = jax.random.split(key)
    if method == ALONE:
        return init_leader(leader, 2 * setting.width), None
    return init_leader(leader, setting.width), init_network(follower, setting.width)
