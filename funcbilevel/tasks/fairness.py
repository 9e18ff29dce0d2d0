r"""Fair classification by one network whose layers belong to two players (Yazdani-Jahromi et al. 2024, FairBiNN).

The leader owns the accuracy layers omega, the follower the fairness layers theta, disjoint parts of one network:

.. math::
    L_{out}(\omega, \theta) &= \text{cross entropy} + \beta\,\eta\,\text{unfairness}, \\
    L_{in}(\omega, \theta) &= \eta\,\text{unfairness} + \alpha\,\text{cross entropy} .

FairBiNN has alpha = beta = 0. The Lagrangian is one objective on the same network, cross entropy + eta unfairness, for
all layers. Many runs (cells: a setting of eta and of the rates, and a seed) train at once in one compiled program.

References:
    Yazdani-Jahromi et al., *Fair Bilevel Neural Network (FairBiNN): On Balancing fairness and accuracy via Stackelberg
    Equilibrium*, NeurIPS 2024, https://arxiv.org/abs/2410.16432
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

import funcbilevel as fb
from funcbilevel.tasks.fairness_data import Batch, Dataset, Graph

# What a group gets. `groups` are the numbers of one attribute's groups, `weight` picks the rows that count.


def group_rates(
    values: jax.Array, groups: jax.Array, num_groups: int, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(mean of `values` in each group, whether the group has a row that counts), [num_groups] each."""
    members = jax.nn.one_hot(groups, num_groups, dtype=values.dtype) * weight[:, None]
    counts = jnp.sum(members, axis=0)
    return members.T @ values / jnp.where(counts > 0, counts, 1), counts > 0


def gap(rates: jax.Array, present: jax.Array) -> jax.Array:
    """Largest difference between the rates of groups that are present; zero if there is one group only."""
    highest, lowest = jnp.where(present, rates, -jnp.inf), jnp.where(present, rates, jnp.inf)
    return jnp.where(jnp.any(present), jnp.max(highest) - jnp.min(lowest), 0.0)


def mean_over_pairs(distance: jax.Array, present: jax.Array) -> jax.Array:
    """Mean of distance[i, j], [k, k], over the pairs i < j of groups that are present; zero if there is no pair."""
    pairs = jnp.triu(present[:, None] & present[None, :], k=1)
    return jnp.sum(jnp.where(pairs, distance, 0.0)) / jnp.maximum(jnp.sum(pairs), 1)


def accuracy_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    """Mean cross entropy of labels in {0, 1}."""
    losses = optax.sigmoid_binary_cross_entropy(logits, batch.y)
    return jnp.sum(batch.weight * losses) / jnp.sum(batch.weight)


# Unfairness: what the follower minimises. Each is a sum over the attributes; groups absent from a batch play no part.

FairnessLoss: TypeAlias = Callable[[jax.Array, Batch, tuple[int, ...]], jax.Array]


def demographic_parity(logits: jax.Array, batch: Batch, num_groups: tuple[int, ...]) -> jax.Array:
    """Mean over the pairs of groups of (E[p | g] - E[p | g'])^2; of two groups the squared soft gap."""
    return _over_attributes(_squared_parity, logits, batch, num_groups, batch.weight)


def absolute_demographic_parity(logits: jax.Array, batch: Batch, num_groups: tuple[int, ...]) -> jax.Array:
    """Mean over the pairs of groups of |E[p | g] - E[p | g']|, the article's equation."""

    def parity(p: jax.Array, groups: jax.Array, k: int, weight: jax.Array) -> jax.Array:
        rates, present = group_rates(p, groups, k, weight)
        return mean_over_pairs(jnp.abs(rates[:, None] - rates[None, :]), present)

    return _over_attributes(parity, logits, batch, num_groups, batch.weight)


def published_demographic_parity(logits: jax.Array, batch: Batch, num_groups: tuple[int, ...]) -> jax.Array:
    """What FairBiNN's public code trains: 1/2 (E[s(p) | g = 0] - E[s(p)])^2 with a second sigmoid s around p = s(z).

    Only group 0 is compared. For reproducing its numbers.
    """

    def parity(p: jax.Array, groups: jax.Array, k: int, weight: jax.Array) -> jax.Array:
        twice = jax.nn.sigmoid(p)
        rates, present = group_rates(twice, groups, k, weight)
        overall = jnp.sum(weight * twice) / jnp.maximum(jnp.sum(weight), 1)
        return jnp.where(present[0], 0.5 * (rates[0] - overall) ** 2, 0.0)

    return _over_attributes(parity, logits, batch, num_groups, batch.weight)


def equalized_odds(logits: jax.Array, batch: Batch, num_groups: tuple[int, ...]) -> jax.Array:
    """Demographic parity among the rows with y = 0 and among those with y = 1, the mean of both."""
    negative = _over_attributes(_squared_parity, logits, batch, num_groups, batch.weight * (1 - batch.y))
    return 0.5 * (negative + equal_opportunity(logits, batch, num_groups))


def equal_opportunity(logits: jax.Array, batch: Batch, num_groups: tuple[int, ...]) -> jax.Array:
    """Demographic parity among the rows with y = 1."""
    return _over_attributes(_squared_parity, logits, batch, num_groups, batch.weight * batch.y)


def worst_group_loss(logits: jax.Array, batch: Batch, num_groups: tuple[int, ...]) -> jax.Array:
    """The cross entropy of the group that has the largest, of each attribute (group DRO, Sagawa et al. 2020)."""
    losses = optax.sigmoid_binary_cross_entropy(logits, batch.y)

    def worst(p: jax.Array, groups: jax.Array, k: int, weight: jax.Array) -> jax.Array:
        del p
        rates, present = group_rates(losses, groups, k, weight)
        return jnp.max(jnp.where(present, rates, 0.0))  # a cross entropy is positive

    return _over_attributes(worst, logits, batch, num_groups, batch.weight)


def _squared_parity(p: jax.Array, groups: jax.Array, k: int, weight: jax.Array) -> jax.Array:
    rates, present = group_rates(p, groups, k, weight)
    return mean_over_pairs((rates[:, None] - rates[None, :]) ** 2, present)


def _over_attributes(
    term: Callable[[jax.Array, jax.Array, int, jax.Array], jax.Array],
    logits: jax.Array,
    batch: Batch,
    num_groups: tuple[int, ...],
    weight: jax.Array,
) -> jax.Array:
    p = jax.nn.sigmoid(logits)
    terms = [term(p, batch.groups[:, a], k, weight) for a, k in enumerate(num_groups)]
    return jnp.sum(jnp.stack(terms))


LOSSES: dict[str, FairnessLoss] = {
    "demographic-parity": demographic_parity,
    "absolute-parity": absolute_demographic_parity,
    "published-parity": published_demographic_parity,
    "equalized-odds": equalized_odds,
    "equal-opportunity": equal_opportunity,
    "worst-group": worst_group_loss,
}


def measure(logits: jax.Array, batch: Batch, num_groups: tuple[int, ...]) -> dict[str, jax.Array]:
    """What counts, of several attributes the worst; all differences are between the two most different groups.

    `accuracy`; `dp_gap` and `dp_gap_soft`: of the rates of positive decisions, p > 1/2, and of the mean p;
    `eo_gap` and `eo_gap_soft`: the larger of these differences among the rows with y = 0 and those with y = 1;
    `opportunity_gap`: among those with y = 1 only; `worst_group_accuracy`.
    """
    p, decision = jax.nn.sigmoid(logits), (logits > 0).astype(logits.dtype)
    correct = (decision == batch.y).astype(logits.dtype)
    positive, negative = batch.weight * batch.y, batch.weight * (1 - batch.y)

    def worst(values: jax.Array, *weights: jax.Array) -> jax.Array:
        gaps = [
            gap(*group_rates(values, batch.groups[:, a], k, weight))
            for a, k in enumerate(num_groups)
            for weight in weights
        ]
        return jnp.max(jnp.stack(gaps))

    by_group = [group_rates(correct, batch.groups[:, a], k, batch.weight) for a, k in enumerate(num_groups)]
    return {
        "accuracy": jnp.sum(batch.weight * correct) / jnp.sum(batch.weight),
        "dp_gap": worst(decision, batch.weight),
        "dp_gap_soft": worst(p, batch.weight),
        "eo_gap": worst(decision, negative, positive),
        "eo_gap_soft": worst(p, negative, positive),
        "opportunity_gap": worst(decision, positive),
        "worst_group_accuracy": jnp.min(
            jnp.stack([jnp.min(jnp.where(present, rates, jnp.inf)) for rates, present in by_group])
        ),
    }


# Networks: a row of layers, each the leader's or the follower's.

Layers: TypeAlias = tuple[tuple[str, int], ...]
"""(name, width) of each layer, the last of width 1: the logit."""


def layers(accuracy_widths: Sequence[int], fairness_widths: Sequence[int], position: int) -> Layers:
    """The layers with the follower's put at a position, 1 being before all of the leader's, as in the article.

    The last layer of the row is the output, a logit of width 1, whose ever it is: with widths (64, 64), (1,) and
    position 3 the output layer is the follower's.

    Raises:
        ValueError: a width is below 1, the position is not from 1 to one after the leader's layers, one of the players
            has no layer, or the last layer is not 1 wide.
    """
    if not accuracy_widths or not fairness_widths or min(*accuracy_widths, *fairness_widths) < 1:
        raise ValueError(
            "accuracy_widths and fairness_widths must hold at least one width each, all of them at least 1, got "
            f"{tuple(accuracy_widths)} and {tuple(fairness_widths)}."
        )
    if not 1 <= position <= len(accuracy_widths) + 1:
        raise ValueError(
            f"position must be from 1 (before the accuracy layers) to {len(accuracy_widths) + 1} (after them), got "
            f"{position}."
        )
    leader = [(f"accuracy_{i}", width) for i, width in enumerate(accuracy_widths)]
    follower = [(f"fairness_{i}", width) for i, width in enumerate(fairness_widths)]
    row = (*leader[: position - 1], *follower, *leader[position - 1 :])
    if row[-1][1] != 1:
        raise ValueError(
            f"the last layer is the output and must be 1 wide, got widths {[width for _, width in row]}; the "
            "accuracy widths include the output, unless the fairness layers stand last."
        )
    return row


def is_followers(path: str, leaf: Any) -> bool:
    """The label of a parameter, for `fb.partition`."""
    del leaf
    return "fairness_" in path


_dense = partial(linen.Dense, kernel_init=linen.initializers.variance_scaling(1 / 3, "fan_in", "uniform"))
_convolution = partial(linen.Conv, kernel_size=(3, 3), strides=2)


class MLP(linen.Module):
    """Features [n, d] -> logits [n]. Weights start uniform in +-1/sqrt(fan-in), as in the published code."""

    layers: Layers

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits, [n]."""
        for name, width in self.layers[:-1]:
            x = linen.relu(_dense(width, name=name)(x))
        return _dense(1, name=self.layers[-1][0])(x)[:, 0]


class CNN(linen.Module):
    """Pictures [n, h, w, c] -> logits [n]: convolutions of stride 2, the mean over the picture, a linear output."""

    layers: Layers

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits, [n]."""
        for name, width in self.layers[:-1]:
            x = linen.relu(_convolution(width, name=name)(x))
        return _dense(1, name=self.layers[-1][0])(jnp.mean(x, axis=(1, 2)))[:, 0]


class GCN(linen.Module):
    """A graph of n nodes -> logits [n] (Kipf and Welling 2017); the first two layers mix each node with its neighbours.

    Layers after those see one node each, as FairBiNN's do: each further mixing would smooth the nodes' differences out.
    """

    layers: Layers

    @linen.compact
    def __call__(self, graph: Graph) -> jax.Array:
        """The logits, [n]."""
        x = graph.features
        for i, (name, width) in enumerate(self.layers):
            x = _dense(width, name=name)(x)
            x = graph.adjacency @ x if i < 2 and i < len(self.layers) - 1 else x
            x = linen.relu(x) if i < len(self.layers) - 1 else x
        return x[:, 0]


def network(x: Any, of_layers: Layers) -> linen.Module:
    """The network for such inputs: a graph, pictures or features."""
    if isinstance(x, Graph):
        return GCN(of_layers)
    return CNN(of_layers) if x.ndim == 4 else MLP(of_layers)


# Methods.


class Setting(NamedTuple):
    """What decides the compiled program.

    Attributes:
        accuracy_widths, fairness_widths, position: of `layers`; by default the public code's five layers.
        loss: the follower's, a name of `LOSSES`.
        batch_size: rows per step, drawn without replacement in each epoch; None for all.
        inner_batch_size: rows of the follower's steps, drawn apart; None: it sees the leader's rows.
        update: `alternating` lets the follower move first (sequential), or both at once after one forward pass.
        inner_steps: the follower's steps per step of the leader.
        solver_steps, damping: of the linear solver of `aid-cg` and `aid-neumann`.
        step_size: of the Neumann series.
        penalty: lambda of `penalty-value`, whose second follower takes `inner_steps` steps too.
        leader_decay, follower_decay, decay_epochs: factors of the rates every so many epochs.
        weight_decay: the leader's and the follower's L2 penalty is weight_decay/2 |parameters|^2.
    """

    accuracy_widths: tuple[int, ...] = (101, 101, 101, 1)
    fairness_widths: tuple[int, ...] = (101,)
    position: int = 2
    loss: str = "demographic-parity"
    batch_size: int | None = 200
    inner_batch_size: int | None = None
    update: Literal["sequential", "simultaneous"] = "sequential"
    inner_steps: int = 1
    solver_steps: int = 5
    damping: float = 0.01
    step_size: float = 0.1
    penalty: float = 10.0
    leader_decay: float = 1.0
    follower_decay: float = 1.0
    decay_epochs: int = 50
    weight_decay: float = 0.0


class Hyper(NamedTuple):
    """What may differ between the cells of one program, scalars.

    Attributes:
        eta: weight of the unfairness.
        leader_rate, follower_rate: of Adam. Where both players follow one objective (`lagrangian`,
            `single-objective`), the leader's is that of all layers.
        follower_accuracy: alpha, the cross entropy's weight in the follower's objective.
        leader_fairness: beta, the unfairness' weight in the leader's objective, as a multiple of eta.
    """

    eta: Any = 1.0
    leader_rate: Any = 1e-3
    follower_rate: Any = 1e-3
    follower_accuracy: Any = 0.0
    leader_fairness: Any = 0.0


class Game(NamedTuple):
    """The two players and their network.

    Attributes:
        logits: (omega, theta, x) -> [n].
        fairness: (logits, batch) -> scalar.
        hyper, setting: as above.
        leader_optimizer, follower_optimizer: each for its own player's parameters.
    """

    logits: Callable[[Any, Any, Any], jax.Array]
    fairness: Callable[[jax.Array, Batch], jax.Array]
    hyper: Hyper
    setting: Setting
    leader_optimizer: optax.GradientTransformation
    follower_optimizer: optax.GradientTransformation


def problem(game: Game) -> fb.ParametricProblem:
    """The bilevel problem: leader omega = outer_params, follower theta = inner_params."""
    eta, _, _, alpha, beta = game.hyper

    def inner_objective(omega: Any, theta: Any, batch: Batch) -> jax.Array:
        logits = game.logits(omega, theta, batch.x)
        return eta * game.fairness(logits, batch) + alpha * accuracy_loss(logits, batch)

    def outer_objective(omega: Any, theta: Any, batch: Batch) -> jax.Array:
        logits = game.logits(omega, theta, batch.x)
        return accuracy_loss(logits, batch) + beta * eta * game.fairness(logits, batch)

    return fb.ParametricProblem(inner_objective, outer_objective)


def _sequential(game: Game, estimator: fb.Estimator) -> fb.BilevelSolver:
    """The follower moves, then the leader, by the estimator's hypergradient."""
    return fb.bilevel(
        problem(game),
        None,
        estimator,
        inner_optimizer=game.follower_optimizer,
        outer_optimizer=game.leader_optimizer,
        inner_steps=game.setting.inner_steps,
    )


def leaky_alternating() -> fb.Estimator:
    r"""FairBiNN as its public code has it: the follower's gradient leaks into the leader's.

    One `zero_grad` before two backward passes adds, at the follower's parameters theta before and theta' after its
    step,

    .. math:: \partial_\omega L_{in}(\omega, \theta) + \partial_\omega L_{out}(\omega, \theta') .

    For comparison; with one follower step. The leak stands in `implicit`, though it is no implicit gradient.
    """

    def init(key: Any, problem: fb.ParametricProblem, model: Any, inner: fb.FitState, inner_batch: Any, /) -> Any:
        return jax.tree.map(jnp.copy, inner.params)

    def estimate(
        problem: fb.ParametricProblem,
        model: Any,
        solve: Any,
        outer_params: Any,
        inner_batch: Any,
        outer_batch: Any,
        state: Any,
        key: Any,
        /,
    ) -> tuple[fb.InnerSolution, fb.Hypergradient]:
        inner = solve(outer_params)
        value, g_exp = jax.value_and_grad(problem.outer_objective)(outer_params, inner.fit.params, outer_batch)
        leak = jax.grad(problem.inner_objective)(outer_params, state, inner_batch)
        gradient = jax.tree.map(jnp.add, g_exp, leak)
        metrics = {"adjoint_finite": jnp.array(True)}
        return inner, fb.Hypergradient(gradient, g_exp, leak, value, inner.fit.params, metrics)

    return fb.Estimator(init, estimate)


Weights: TypeAlias = tuple[Any, Any]
"""Of cross entropy and unfairness in a player's objective."""


def simultaneous(game: Game, leader: Weights, follower: Weights | None) -> fb.BilevelSolver:
    """Both players move at once, each by the gradient of its own objective in its own parameters.

    Both gradients come from one forward pass, and from one backward pass if `follower is leader`: gradient descent on
    one objective. The follower sees the leader's batch. With None it stays where it is.
    """

    def init(key: Any, outer_params: Any, inner_batch: Any, inner_params: Any = None) -> fb.BilevelState:
        del inner_batch
        return fb.BilevelState(
            step=jnp.zeros((), jnp.int32),
            outer_params=outer_params,
            inner_params=inner_params,
            model_state=(),
            inner_opt_state=game.follower_optimizer.init(inner_params),
            outer_opt_state=game.leader_optimizer.init(outer_params),
            estimator_state=(),
            key=key,
        )

    def step(
        state: fb.BilevelState, inner_batch: Batch, outer_batch: Batch
    ) -> tuple[fb.BilevelState, dict[str, jax.Array]]:
        del inner_batch
        omega, theta = state.outer_params, state.inner_params
        logits, pull = jax.vjp(lambda omega, theta: game.logits(omega, theta, outer_batch.x), omega, theta)
        accuracy, d_accuracy = jax.value_and_grad(accuracy_loss)(logits, outer_batch)
        unfairness, d_unfairness = jax.value_and_grad(game.fairness)(logits, outer_batch)

        def gradients(weights: Weights) -> tuple[Any, Any]:
            return pull(weights[0] * d_accuracy + weights[1] * d_unfairness)

        g_leader, g_follower = gradients(leader)
        updates, outer_opt_state = game.leader_optimizer.update(g_leader, state.outer_opt_state, omega)
        new = state._replace(
            step=state.step + 1, outer_params=optax.apply_updates(omega, updates), outer_opt_state=outer_opt_state
        )
        if follower is not None:
            g_follower = g_follower if follower is leader else gradients(follower)[1]
            updates, inner_opt_state = game.follower_optimizer.update(g_follower, state.inner_opt_state, theta)
            new = new._replace(inner_params=optax.apply_updates(theta, updates), inner_opt_state=inner_opt_state)
        norm = optax.tree.norm(g_leader)
        values = {
            "outer_objective": leader[0] * accuracy + leader[1] * unfairness,
            "inner_objective": unfairness if follower is None else follower[0] * accuracy + follower[1] * unfairness,
        }
        return new, values | {"hypergradient_norm": norm, "explicit_norm": norm, "implicit_norm": jnp.zeros_like(norm)}

    def run(state: fb.BilevelState, inner_batches: Any, outer_batches: Any) -> tuple[fb.BilevelState, Any]:
        return jax.lax.scan(lambda s, batches: step(s, *batches), state, (inner_batches, outer_batches))

    return fb.BilevelSolver(init, step, run)


def _alternating(game: Game) -> fb.BilevelSolver:
    if game.setting.update == "sequential":
        return _sequential(game, fb.alternating())
    eta, _, _, alpha, beta = game.hyper
    return simultaneous(game, leader=(1.0, beta * eta), follower=(alpha, eta))


def _aid_cg(game: Game) -> fb.BilevelSolver:
    return _sequential(game, fb.aid(fb.cg(game.setting.solver_steps, game.setting.damping)))


def _aid_neumann(game: Game) -> fb.BilevelSolver:
    of = game.setting
    return _sequential(game, fb.aid(fb.neumann(of.solver_steps, of.step_size, of.damping)))


def _itd(game: Game) -> fb.BilevelSolver:
    return _sequential(game, fb.itd(game.setting.inner_steps))


def _value_penalty(game: Game) -> fb.BilevelSolver:
    of = game.setting
    return _sequential(game, fb.value_penalty(game.follower_optimizer, of.inner_steps, of.penalty))


def _lagrangian(game: Game) -> fb.BilevelSolver:
    weights = (1.0, game.hyper.eta)
    return simultaneous(game._replace(follower_optimizer=game.leader_optimizer), weights, weights)


def _single_objective(game: Game) -> fb.BilevelSolver:
    weights = (1.0, 0.0)
    return simultaneous(game._replace(follower_optimizer=game.leader_optimizer), weights, weights)


def _frozen_follower(game: Game) -> fb.BilevelSolver:
    return simultaneous(game, leader=(1.0, game.hyper.eta), follower=None)


METHODS: dict[str, Callable[[Game], fb.BilevelSolver]] = {
    "single-objective": _single_objective,  # accuracy only
    "lagrangian": _lagrangian,
    "alternating": _alternating,
    "leaky-alternating": lambda game: _sequential(game, leaky_alternating()),
    "frozen-follower": _frozen_follower,  # the Lagrangian's gradient for the leader, the follower as initialised
    "aid-cg": _aid_cg,
    "aid-neumann": _aid_neumann,
    "itd": _itd,
    "penalty-value": _value_penalty,
}


# Training.


def take(batch: Batch, rows: jax.Array) -> Batch:
    """The batch's rows with these numbers."""
    return jax.tree.map(lambda a: a[rows], batch)


def _adam(rate: Any, decay: float, steps: int, weight_decay: float) -> optax.GradientTransformation:
    schedule: Any = rate if decay == 1.0 else lambda count: rate * decay ** (count // steps)
    # eps_root: `itd` differentiates the root of a second moment that is zero for units that are off.
    adam = optax.adam(schedule, eps_root=1e-20)
    return optax.chain(optax.add_decayed_weights(weight_decay), adam) if weight_decay else adam


class Program(NamedTuple):
    """A method's compiled functions over cells: hyper's leaves, keys and states have a leading axis.

    Attributes:
        init: (keys, hyper, train) -> states.
        epochs: (states, hyper, keys, train, first epoch, number of epochs) -> (states, metrics of the last epoch).
    """

    init: Callable[..., fb.BilevelState]
    epochs: Callable[..., tuple[fb.BilevelState, dict[str, jax.Array]]]


@cache
def program(method: str, setting: Setting, num_groups: tuple[int, ...]) -> Program:
    """The program of a method; the same arguments give the same object, which is compiled once.

    Raises:
        ValueError: there is no such method or loss, or the layers do not fit.
    """
    for name, value, known in (("method", method, METHODS), ("loss", setting.loss, LOSSES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    if setting.update not in ("sequential", "simultaneous"):
        raise ValueError(f"update must be 'sequential' or 'simultaneous', got {setting.update!r}.")
    row = layers(setting.accuracy_widths, setting.fairness_widths, setting.position)

    def size(train: Batch) -> tuple[int, int]:
        """Rows per step and steps per epoch."""
        rows = min(setting.batch_size or len(train.y), len(train.y))
        return rows, len(train.y) // rows

    def solver(hyper: Hyper, train: Batch) -> fb.BilevelSolver:
        every = setting.decay_epochs * size(train)[1]
        follower_every = every * setting.inner_steps
        game = Game(
            logits=logits_of(row, train.x),
            fairness=lambda logits, batch: LOSSES[setting.loss](logits, batch, num_groups),
            hyper=hyper,
            setting=setting,
            leader_optimizer=_adam(hyper.leader_rate, setting.leader_decay, every, setting.weight_decay),
            follower_optimizer=_adam(hyper.follower_rate, setting.follower_decay, follower_every, setting.weight_decay),
        )
        return METHODS[method](game)

    def init(key: jax.Array, hyper: Hyper, train: Batch) -> fb.BilevelState:
        module: Any = network(train.x, row)
        leader, follower, _ = fb.partition(module.init(key, train.x), is_followers)
        return solver(hyper, train).init(key, leader, None, follower)

    def epochs(
        state: fb.BilevelState, hyper: Hyper, key: jax.Array, train: Batch, first: jax.Array, count: jax.Array
    ) -> tuple[fb.BilevelState, dict[str, jax.Array]]:
        rows, steps = size(train)
        whole = rows == len(train.y) and setting.inner_batch_size is None
        of_method = solver(hyper, train)

        def step(state: fb.BilevelState, of_step: tuple[jax.Array, jax.Array]) -> tuple[fb.BilevelState, Any]:
            chosen, step_key = of_step
            outer = train if whole else take(train, chosen)
            inner = outer
            if setting.inner_batch_size is not None:
                inner = take(train, jax.random.randint(step_key, (setting.inner_batch_size,), 0, len(train.y)))
            return of_method.step(state, inner, outer)

        def epoch(state: fb.BilevelState, number: jax.Array) -> tuple[fb.BilevelState, Any]:
            order_key, inner_key = jax.random.split(jax.random.fold_in(key, number))
            order = jnp.arange(steps) if whole else jax.random.permutation(order_key, len(train.y))[: steps * rows]
            keys = jax.random.split(inner_key, steps)
            state, trace = jax.lax.scan(step, state, (order.reshape(steps, -1), keys))
            return state, jax.tree.map(lambda values: jnp.mean(values.astype(jnp.float32)), trace)

        shapes = jax.eval_shape(lambda s: epoch(s, jnp.zeros((), jnp.int32))[1], state)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.fori_loop(first, first + count, lambda i, carry: epoch(carry[0], i), (state, zeros))

    return Program(
        init=jax.jit(jax.vmap(init, in_axes=(0, 0, None))),
        epochs=jax.jit(jax.vmap(epochs, in_axes=(0, 0, 0, None, None, None)), donate_argnums=0),
    )


def logits_of(row: Layers, x: Any) -> Callable[[Any, Any, Any], jax.Array]:
    """(omega, theta, inputs) -> logits of the network for inputs like x."""
    module: Any = network(x, row)
    merge = fb.partition(jax.eval_shape(module.init, jax.random.key(0), x), is_followers).merge
    return lambda omega, theta, x: module.apply(merge(omega, theta), x)


Parts: TypeAlias = tuple[Any, Any]
"""(omega, theta) of cells, leading axes alike."""


@cache
def evaluator(row: Layers, num_groups: tuple[int, ...]) -> Callable[[Parts, tuple[Batch, ...]], dict[str, jax.Array]]:
    """(parts, (validation, test)) -> metrics of each cell; those of the validation part begin with `validation_`.

    One cell after the other, as all test rows of all cells at once would need gigabytes. It serves every method.
    """

    def evaluate(parts: Parts, batches: tuple[Batch, ...]) -> dict[str, jax.Array]:
        validation, test = (measure(logits_of(row, b.x)(*parts, b.x), b, num_groups) for b in batches)
        return test | {f"validation_{name}": value for name, value in validation.items()}

    return jax.jit(lambda parts, batches: jax.lax.map(lambda cell: evaluate(cell, batches), parts))


@cache
def diagnosis(
    row: Layers, loss: str, num_groups: tuple[int, ...]
) -> Callable[[Parts, Hyper, Batch], dict[str, jax.Array]]:
    """(parts, hyper, train) -> on the training part how far the follower is from a solution, by its gradient's norm.

    `follower_gradient` is that of its objective, `follower_gradient_of_leader` that of the leader's, both by theta.
    """

    def diagnose(parts: Parts, hyper: Hyper, train: Batch) -> dict[str, jax.Array]:
        omega, theta = parts
        logits, fairness_loss = logits_of(row, train.x), LOSSES[loss]

        def objectives(theta: Any) -> tuple[jax.Array, jax.Array]:
            z = logits(omega, theta, train.x)
            return accuracy_loss(z, train), fairness_loss(z, train, num_groups)

        values, pull = jax.vjp(objectives, theta)
        eta, alpha, beta = hyper.eta, hyper.follower_accuracy, hyper.leader_fairness
        one = jnp.ones_like(values[0])
        return {
            "follower_gradient": optax.tree.norm(pull((alpha * one, eta * one))),
            "follower_gradient_of_leader": optax.tree.norm(pull((one, beta * eta * one))),
            "train_accuracy_loss": values[0],
            "train_unfairness": values[1],
        }

    return jax.jit(
        lambda parts, hyper, train: jax.lax.map(lambda cell: diagnose(cell[0], cell[1], train), (parts, hyper))
    )


class Cell(NamedTuple):
    """One finished run.

    Attributes:
        hyper: its hyper-parameters.
        seed: of its initial network and the order of its rows.
        metrics: at the end.
        curves: `epoch` and metrics after each chunk of epochs.
    """

    hyper: Hyper
    seed: int
    metrics: dict[str, float]
    curves: dict[str, list[float]]


class Sweep(NamedTuple):
    """All runs of one method.

    Attributes:
        cells: the runs, seeds varying fastest.
        seconds: for all of it, compilation included.
        epoch_seconds: of one epoch of all cells together, the median over the chunks after the first; NaN if there
            is one chunk only.
    """

    cells: list[Cell]
    seconds: float
    epoch_seconds: float


def sweep(
    method: str,
    setting: Setting,
    dataset: Dataset,
    hypers: Sequence[Hyper],
    seeds: Sequence[int],
    num_epochs: int,
    *,
    chunk: int = 10,
    callback: Callable[[Any, Mapping[str, Any]], None] | None = None,
) -> Sweep:
    """Trains every hyper-parameter setting from every seed at once, and evaluates after each chunk of epochs.

    A seed gives the same initial network and the same order of rows in every setting and for every method.
    """
    start = time.perf_counter()
    compiled = program(method, setting, dataset.num_groups)
    parts = jax.tree.map(jnp.asarray, (dataset.train, dataset.validation, dataset.test))
    cells = list(itertools.product(hypers, seeds))
    hyper = jax.tree.map(lambda *values: jnp.array(values, jnp.float32), *(hyper for hyper, _ in cells))
    keys = jnp.stack([jax.random.key(seed) for _, seed in cells])
    train, *others = parts
    row = layers(setting.accuracy_widths, setting.fairness_widths, setting.position)
    evaluate = evaluator(row, dataset.num_groups)
    diagnose = diagnosis(row, setting.loss, dataset.num_groups)
    states = compiled.init(keys, hyper, train)
    history: list[dict[str, Any]] = []
    seconds: list[float] = []
    for first in range(0, num_epochs, chunk):
        clock = time.perf_counter()
        count = min(chunk, num_epochs - first)
        states, trained = jax.block_until_ready(compiled.epochs(states, hyper, keys, train, first, count))
        seconds.append((time.perf_counter() - clock) / count)
        metrics = jax.device_get(trained | evaluate((states.outer_params, states.inner_params), tuple(others)))
        history.append({"epoch": np.full(len(cells), first + count)} | metrics)
        if callback is not None:
            callback(states, {name: np.full(count, np.mean(values)) for name, values in metrics.items()})
    history[-1] |= jax.device_get(diagnose((states.outer_params, states.inner_params), hyper, train))
    done = [
        Cell(
            of_cell,
            seed,
            {name: float(values[i]) for name, values in history[-1].items() if name != "epoch"},
            {name: [float(chunk[name][i]) for chunk in history] for name in CURVES},
        )
        for i, (of_cell, seed) in enumerate(cells)
    ]
    rest = seconds[1:]
    return Sweep(done, time.perf_counter() - start, float(np.median(rest)) if rest else float("nan"))


CURVES = ("epoch", "accuracy", "dp_gap", "dp_gap_soft", "eo_gap", "outer_objective", "inner_objective")


# Accuracy against fairness.


def pareto_front(points: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Which of the points, [n, 2], both coordinates to be large, no other point dominates, [n] bool."""
    x, y = points.T
    dominates = (x >= x[:, None]) & (y >= y[:, None]) & ((x > x[:, None]) | (y > y[:, None]))
    return ~np.max(dominates, axis=1)


def hypervolume(points: np.ndarray[Any, Any], reference: tuple[float, float] = (0.0, 0.0)) -> float:
    """Area that the points, [n, 2], both coordinates to be large, dominate above the reference point."""
    area, height = 0.0, reference[1]
    for x, y in sorted(points.tolist(), reverse=True):
        if x > reference[0] and y > height:
            area += (x - reference[0]) * (y - height)
            height = y
    return area


def points(cells: Sequence[Mapping[str, float]], prefix: str = "") -> np.ndarray[Any, Any]:
    """(accuracy, 1 - dp_gap) of each, [n, 2]; (0, 0) for a run that broke."""
    pairs = [(cell[f"{prefix}accuracy"], 1.0 - cell[f"{prefix}dp_gap"]) for cell in cells]
    array = np.array(pairs, float).reshape(-1, 2)
    return np.where(np.isfinite(array).all(axis=1, keepdims=True), array, 0.0)


def selected_hypervolume(cells: Sequence[Mapping[str, float]], reference: tuple[float, float] = (0.0, 0.0)) -> float:
    """The test points' hypervolume of those settings that are on the validation part's Pareto front."""
    chosen = pareto_front(points(cells, "validation_"))
    return hypervolume(points(cells)[chosen], reference)


def etas(low: float, high: float, count: int) -> Iterator[float]:
    """`count` weights from low to high, evenly spaced on a logarithmic scale."""
    yield from (float(f"{value:.3g}") for value in np.geomspace(low, high, count))
