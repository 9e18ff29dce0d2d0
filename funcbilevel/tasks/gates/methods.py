"""Ways to select features: gates by the leader's hypergradient, and two lassos; and a network on given features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcbilevel as fb
from funcbilevel.tasks._experiment.methods import Method, table
from funcbilevel.tasks._experiment.players import Learner, PlayersSetting, adam, cosine, descent, estimators, turns
from funcbilevel.tasks.gates.problem import Batch, Params, cross_entropy, gated, problem


@dataclass(frozen=True)
class Setting(PlayersSetting):
    """What decides the compiled program; leader and follower draw rows apart, with replacement.

    Attributes:
        num_steps: of the leader.
        weight_decay: in every method weight_decay/2 |weights|^2 is added to the leader's objective.
    """

    width: int = 32
    batch_size: int = 64
    num_steps: int = 1200
    weight_decay: float = 1e-3


class Hyper(NamedTuple):
    """What may differ between the cells of one program.

    Attributes:
        penalty: lambda, the weight of the number of open gates, or of the norm in the lassos.
        leader_rate: of Adam on the network; of gradient descent in the lassos.
        follower_rate: of Adam on the gates.
        mask: of `refit`: 1 for the features that the network gets, [features].
    """

    penalty: Any = 0.0
    leader_rate: Any = 0.01
    follower_rate: Any = 0.003
    mask: Any = 1.0


def _gated(estimator: Callable[[Any], fb.Estimator]) -> Callable[..., Learner]:
    """The follower moves, then the leader, by the estimator's hypergradient; the result are the open gates."""

    def learner(setting: Setting, feature_of: Sequence[int], hyper: Hyper) -> Learner:
        solver = fb.bilevel(
            problem(hyper.penalty, feature_of, setting.weight_decay),
            None,
            estimator(setting),
            inner_optimizer=adam(hyper.follower_rate, setting.num_steps * setting.inner_steps),
            outer_optimizer=adam(hyper.leader_rate, setting.num_steps),
            inner_steps=setting.inner_steps,
        )
        half_open = jnp.full(max(feature_of) + 1, 0.5)
        return turns(solver, lambda omega: (omega, half_open), lambda state: state.inner_params > 0)

    return learner


def soften(w: jax.Array, threshold: Any) -> jax.Array:
    """The proximal map of threshold |w|_1: each weight comes nearer to zero by the threshold, or is zero."""
    return jnp.sign(w) * jnp.maximum(jnp.abs(w) - threshold, 0.0)


def soften_groups(w: jax.Array, threshold: Any, feature_of: Sequence[int]) -> jax.Array:
    """The proximal map of threshold times the sum of the norms of each feature's rows of w, [d, width]."""
    columns = jnp.array(feature_of)
    squares = jax.ops.segment_sum(jnp.sum(w**2, axis=1), columns, max(feature_of) + 1)
    norms = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
    return w * jnp.where(squares > 0, jnp.maximum(1 - threshold / norms, 0.0), 0.0)[columns][:, None]


def _lasso(proximal: Callable[[jax.Array, Any, Sequence[int]], jax.Array]) -> Callable[..., Learner]:
    """Stochastic proximal gradient descent on cross entropy + penalty x norm of the first layer."""

    def learner(setting: Setting, feature_of: Sequence[int], hyper: Hyper) -> Learner:
        def init(omega: Params) -> tuple[jax.Array, Params]:
            return jnp.zeros((), jnp.int32), omega

        def step(state: tuple[jax.Array, Params], _: Batch, batch: Batch) -> tuple[Any, jax.Array]:
            count, omega = state
            value, gradient = jax.value_and_grad(cross_entropy)(omega, batch.x, batch.y)
            rate = hyper.leader_rate * cosine(count, setting.num_steps)
            omega = jax.tree.map(lambda w, g: w - rate * (g + setting.weight_decay * w), omega, gradient)
            w1 = proximal(omega["w1"], rate * hyper.penalty, feature_of)
            return (count + 1, omega | {"w1": w1}), value

        def selected(state: tuple[jax.Array, Params]) -> jax.Array:
            used = jnp.any(state[1]["w1"] != 0, axis=1).astype(jnp.int32)
            return jax.ops.segment_sum(used, jnp.array(feature_of), max(feature_of) + 1) > 0

        return Learner(init, step, selected)

    return learner


def _refit(setting: Setting, feature_of: Sequence[int], hyper: Hyper) -> Learner:
    """A new network on the features of `hyper.mask`, by Adam."""
    mask = jnp.broadcast_to(hyper.mask, (max(feature_of) + 1,))[jnp.array(feature_of)]
    return descent(
        lambda omega, batch: cross_entropy(gated(omega, mask), batch.x, batch.y),
        optax.chain(optax.add_decayed_weights(setting.weight_decay), adam(hyper.leader_rate, setting.num_steps)),
        lambda omega: gated(omega, mask),
    )


ALL, RANDOM, LASSO, GROUP_LASSO = "single-objective", "random-mask", "lasso", "group-lasso"
GATE_TRIALS = ({"leader_rate": 0.01, "follower_rate": 0.003}, {"leader_rate": 0.01, "follower_rate": 0.01})
LASSO_TRIALS = ({"leader_rate": 0.03}, {"leader_rate": 0.1})
METHODS = table(
    Method(ALL, "all features", _refit, ({"leader_rate": 0.01},), colour="0.35", always=True),
    *estimators(_gated, GATE_TRIALS).values(),
    Method(GROUP_LASSO, "group lasso of the first layer, by feature", _lasso(soften_groups), LASSO_TRIALS, colour="C0"),
    Method(
        LASSO,
        "lasso of the first layer's weights",
        _lasso(lambda w, threshold, feature_of: soften(w, threshold)),
        LASSO_TRIALS,
        colour="C9",
    ),
    Method(RANDOM, "as many features, drawn at random", _refit, colour="0.6", always=True),
)
NUM_PENALTIES = 6
# dataset -> method -> the range of its penalties: where validation accuracy falls, by trials with seeds 100 to 104; the
# lassos' go on to where they select next to nothing.
PENALTIES: dict[str, dict[str, tuple[float, float]]] = {
    "breast-cancer": {"gates": (0.003, 0.02), GROUP_LASSO: (0.08, 0.6), LASSO: (0.06, 0.25)},
    "adult": {"gates": (0.002, 0.012), GROUP_LASSO: (0.07, 0.25), LASSO: (0.03, 0.1)},
}


def trials(dataset: str, method: str) -> list[dict[str, float]]:
    """The hyper-parameters of a method, as many for each: every penalty with every trial of its rates."""
    if method == ALL:
        return [dict(trial) for trial in METHODS[ALL].trials]
    ranges = PENALTIES[dataset]
    penalties = np.geomspace(*ranges.get(method, ranges["gates"]), NUM_PENALTIES)
    return [{"penalty": float(f"{penalty:.3g}"), **trial} for trial in METHODS[method].trials for penalty in penalties]
