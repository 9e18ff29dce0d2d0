r"""Fair classification by one network whose layers belong to two players (Yazdani-Jahromi et al. 2024, FairBiNN).

The leader owns the accuracy layers omega, the follower the fairness layers theta, disjoint parts of one network:

.. math::
    L_{out}(\omega, \theta) &= \text{cross entropy} + \beta\,\eta\,\text{unfairness}, \\
    L_{in}(\omega, \theta) &= \eta\,\text{unfairness} + \alpha\,\text{cross entropy} .

FairBiNN has alpha = beta = 0. The Lagrangian is one objective on the same network, cross entropy + eta unfairness, for
all layers. Many runs (cells: a setting of eta and of the rates, and a seed) train at once in one compiled program.

With several losses, parity and equalized odds or parity by sex and by race, unfairness is their sum and one follower
minimises it, or each loss has a follower with layers of its own: theta = (theta_1, ..., theta_m), and

.. math::
    \theta_j \text{ minimises } L_j = \eta\,\text{unfairness}_j + \alpha\,\text{cross entropy},
    \quad\text{the other players' layers held fixed.}

Labels in {0, ..., k - 1}, k > 2, are classified by a softmax, and one layer may be self-attention over the columns
(`ColumnAttention`).

What the theory does not cover. The article assumes that every layer is linear with a Lipschitz activation and has
bounded outputs (assumption 4, lemma 5), that the leader's loss is strictly convex near its optimum (assumption 2) and
that the follower's steps are as small as it takes (assumption 3); its section 5 excludes softmax and attention.

- The softmax by itself is no obstacle, whatever that section says: its Jacobian diag(p) - p p' has a norm of at most
  1/2, and cross entropy of logits is Lipschitz too. Multiclass training is as far inside the theory as binary training.
- Dot-product attention is one: no linear map with an activation but a softmax of products of its inputs, times them,
  and not Lipschitz on an unbounded domain (Kim et al. 2021). On a bounded one, such as columns scaled to [0, 1], it
  is, with a constant that depends on the norms of its weights and on the number of columns: nothing bounds it here.
- Strict convexity is proved for no network with hidden layers; it is an assumption about the solution found.
- Several followers play a Nash game below the leader; its equilibrium need be neither unique nor attained by gradient
  steps, one after the other or together. The article has one follower and one loss.

References:
    Yazdani-Jahromi et al., *Fair Bilevel Neural Network (FairBiNN): On Balancing fairness and accuracy via Stackelberg
    Equilibrium*, NeurIPS 2024, https://arxiv.org/abs/2410.16432
    Kim, Papamakarios, Mnih, *The Lipschitz constant of self-attention*, ICML 2021, https://arxiv.org/abs/2006.04710
"""

import itertools
import re
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
from funcbilevel.tasks._experiment.players import finite, move, solver_of_step
from funcbilevel.tasks._experiment.statistics import hypervolume, pareto_front
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


def cross_entropies(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Of each row, [n]: by a sigmoid of logits [n] (labels 0 and 1), by a softmax of [n, k] (labels 0 to k - 1)."""
    if logits.ndim == 1:
        return optax.sigmoid_binary_cross_entropy(logits, y)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y.astype(jnp.int32))


def accuracy_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    """Mean cross entropy."""
    return jnp.sum(batch.weight * cross_entropies(logits, batch.y)) / jnp.sum(batch.weight)


def one_vs_rest(logits: jax.Array, y: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """(probability, truth) of each class, [n] each; of two classes, whose logits are [n], of class 1 alone."""
    if logits.ndim == 1:
        return [(jax.nn.sigmoid(logits), y)]
    p = jax.nn.softmax(logits)
    return [(p[:, c], (y == c).astype(p.dtype)) for c in range(p.shape[1])]


# Unfairness: what the follower minimises. Each is a sum over the attributes; groups absent from a batch play no part.
# Of more than two classes it is the mean over the classes of what it would be for each of them against the rest.

FairnessLoss: TypeAlias = Callable[[jax.Array, Batch, tuple[int, ...]], jax.Array]
Term: TypeAlias = Callable[[jax.Array, jax.Array, int, jax.Array], jax.Array]
"""(probabilities [n], groups [n], number of groups, weight [n]) -> scalar."""


def demographic_parity(logits: jax.Array, batch: Batch, num_groups: tuple[int, ...]) -> jax.Array:
    """Mean over the pairs of groups of (E[p | g] - E[p | g'])^2; of two groups the squared soft gap."""
    classes = one_vs_rest(logits, batch.y)
    return _mean([_over_attributes(_squared_parity, p, batch, num_groups, batch.weight) for p, _ in classes])


def absolute_demographic_parity(logits: jax.Array, batch: Batch, num_groups: tuple[int, ...]) -> jax.Array:
    """Mean over the pairs of groups of |E[p | g] - E[p | g']|, the article's equation."""

    def parity(p: jax.Array, groups: jax.Array, k: int, weight: jax.Array) -> jax.Array:
        rates, present = group_rates(p, groups, k, weight)
        return mean_over_pairs(jnp.abs(rates[:, None] - rates[None, :]), present)

    classes = one_vs_rest(logits, batch.y)
    return _mean([_over_attributes(parity, p, batch, num_groups, batch.weight) for p, _ in classes])


def published_demographic_parity(logits: jax.Array, batch: Batch, num_groups: tuple[int, ...]) -> jax.Array:
    """What FairBiNN's public code trains: 1/2 (E[s(p) | g = 0] - E[s(p)])^2 with a second sigmoid s around p = s(z).

    Only group 0 is compared. For reproducing its numbers, so for two classes only.
    """
    if logits.ndim != 1:
        raise ValueError(f"published-parity is defined for logits of two classes, [n], got shape {logits.shape}.")

    def parity(p: jax.Array, groups: jax.Array, k: int, weight: jax.Array) -> jax.Array:
        twice = jax.nn.sigmoid(p)
        rates, present = group_rates(twice, groups, k, weight)
        overall = jnp.sum(weight * twice) / jnp.maximum(jnp.sum(weight), 1)
        return jnp.where(present[0], 0.5 * (rates[0] - overall) ** 2, 0.0)

    return _over_attributes(parity, jax.nn.sigmoid(logits), batch, num_groups, batch.weight)


def equalized_odds(logits: jax.Array, batch: Batch, num_groups: tuple[int, ...]) -> jax.Array:
    """Demographic parity among the rows with y = 0 and among those with y = 1, the mean of both."""
    classes = one_vs_rest(logits, batch.y)
    negative = [
        _over_attributes(_squared_parity, p, batch, num_groups, batch.weight * (1 - truth)) for p, truth in classes
    ]
    return 0.5 * (_mean(negative) + equal_opportunity(logits, batch, num_groups))


def equal_opportunity(logits: jax.Array, batch: Batch, num_groups: tuple[int, ...]) -> jax.Array:
    """Demographic parity among the rows with y = 1."""
    classes = one_vs_rest(logits, batch.y)
    return _mean(
        [_over_attributes(_squared_parity, p, batch, num_groups, batch.weight * truth) for p, truth in classes]
    )


def worst_group_loss(logits: jax.Array, batch: Batch, num_groups: tuple[int, ...]) -> jax.Array:
    """The cross entropy of the group that has the largest, of each attribute (group DRO, Sagawa et al. 2020)."""

    def worst(losses: jax.Array, groups: jax.Array, k: int, weight: jax.Array) -> jax.Array:
        rates, present = group_rates(losses, groups, k, weight)
        return jnp.max(jnp.where(present, rates, 0.0))  # a cross entropy is positive

    return _over_attributes(worst, cross_entropies(logits, batch.y), batch, num_groups, batch.weight)


def _squared_parity(p: jax.Array, groups: jax.Array, k: int, weight: jax.Array) -> jax.Array:
    rates, present = group_rates(p, groups, k, weight)
    return mean_over_pairs((rates[:, None] - rates[None, :]) ** 2, present)


def _over_attributes(
    term: Term, values: jax.Array, batch: Batch, num_groups: tuple[int, ...], weight: jax.Array
) -> jax.Array:
    terms = [term(values, batch.groups[:, a], k, weight) for a, k in enumerate(num_groups)]
    return jnp.sum(jnp.stack(terms))


def _mean(values: list[jax.Array]) -> jax.Array:
    return values[0] if len(values) == 1 else jnp.mean(jnp.stack(values))


LOSSES: dict[str, FairnessLoss] = {
    "demographic-parity": demographic_parity,
    "absolute-parity": absolute_demographic_parity,
    "published-parity": published_demographic_parity,
    "equalized-odds": equalized_odds,
    "equal-opportunity": equal_opportunity,
    "worst-group": worst_group_loss,
}


class Loss(NamedTuple):
    """One of several losses.

    Attributes:
        name: of `LOSSES`.
        attribute: the number of the one attribute that it looks at; None for the sum over all.
    """

    name: str
    attribute: int | None = None


def losses_of(
    losses: tuple[Loss, ...], num_groups: tuple[int, ...]
) -> tuple[Callable[[jax.Array, Batch], jax.Array], ...]:
    """The losses as functions (logits, batch) -> scalar; unfairness is their sum."""

    def loss(name: str, attribute: int | None) -> Callable[[jax.Array, Batch], jax.Array]:
        if attribute is None:
            return lambda logits, batch: LOSSES[name](logits, batch, num_groups)
        one, of_one = [attribute], (num_groups[attribute],)
        return lambda logits, batch: LOSSES[name](logits, batch._replace(groups=batch.groups[:, one]), of_one)

    return tuple(loss(*of) for of in losses)


def sum_of(losses: Sequence[Callable[[jax.Array, Batch], jax.Array]]) -> Callable[[jax.Array, Batch], jax.Array]:
    """(logits, batch) -> the sum of the losses."""
    return lambda logits, batch: sum((loss(logits, batch) for loss in losses[1:]), losses[0](logits, batch))


def measure(logits: jax.Array, batch: Batch, num_groups: tuple[int, ...]) -> dict[str, jax.Array]:
    """What counts, of several attributes the worst; all differences are between the two most different groups.

    `accuracy`; `dp_gap` and `dp_gap_soft`: of the rates of positive decisions, p > 1/2, and of the mean p;
    `eo_gap` and `eo_gap_soft`: the larger of these differences among the rows with y = 0 and those with y = 1;
    `opportunity_gap`: among those with y = 1 only; `worst_group_accuracy`. Of more than two classes the decision is for
    the most probable, and a gap is the largest over the classes, each against the rest. With several attributes
    `dp_gap_<a>` and `eo_gap_<a>` are those of attribute number a.
    """
    dtype = logits.dtype
    label = (logits > 0) if logits.ndim == 1 else jnp.argmax(logits, axis=1)
    correct = (label == batch.y).astype(dtype)
    classes = one_vs_rest(logits, batch.y)
    positive = [batch.weight * truth for _, truth in classes]
    negative = [batch.weight * (1 - truth) for _, truth in classes]
    everybody = [batch.weight for _ in classes]
    soft = [p for p, _ in classes]
    hard = [label.astype(dtype)] if logits.ndim == 1 else [(label == c).astype(dtype) for c in range(len(classes))]
    all_attributes = range(len(num_groups))

    def worst(
        values: list[jax.Array], *weights: list[jax.Array], attributes: Sequence[int] = all_attributes
    ) -> jax.Array:
        gaps = [
            gap(*group_rates(value, batch.groups[:, a], num_groups[a], weight))
            for a in attributes
            for of_kind in weights
            for value, weight in zip(values, of_kind, strict=True)
        ]
        return jnp.max(jnp.stack(gaps))

    by_group = [group_rates(correct, batch.groups[:, a], k, batch.weight) for a, k in enumerate(num_groups)]
    of_each = {
        f"{name}_{a}": worst(hard, *weights, attributes=[a])
        for a in all_attributes
        for name, weights in (("dp_gap", [everybody]), ("eo_gap", [negative, positive]))
    }
    return {
        "accuracy": jnp.sum(batch.weight * correct) / jnp.sum(batch.weight),
        "dp_gap": worst(hard, everybody),
        "dp_gap_soft": worst(soft, everybody),
        "eo_gap": worst(hard, negative, positive),
        "eo_gap_soft": worst(soft, negative, positive),
        "opportunity_gap": worst(hard, positive),
        "worst_group_accuracy": jnp.min(
            jnp.stack([jnp.min(jnp.where(present, rates, jnp.inf)) for rates, present in by_group])
        ),
    } | (of_each if len(num_groups) > 1 else {})


# Networks: a row of layers, each the leader's or the follower's.

Layers: TypeAlias = tuple[tuple[str, int], ...]
"""(name, width) of each layer, the last as wide as there are logits: 1 for two classes, else one of each class."""
ATTENTION = "_attention"
"""Ends the name of a layer that is self-attention over the columns."""


def layers(
    accuracy_widths: Sequence[int],
    fairness_widths: Sequence[int],
    position: int,
    num_classes: int = 2,
    attention: str | None = None,
) -> Layers:
    """The layers with the follower's put at a position, 1 being before all of the leader's, as in the article.

    The last layer of the row is the output, whose ever it is, one logit for two classes and else one for each: with
    widths (64, 64), (1,) and position 3 the output layer is the follower's. The layer that `attention` names, such as
    fairness_0, is self-attention over the columns.

    Raises:
        ValueError: a width is below 1, the position is not from 1 to one after the leader's layers, one of the players
            has no layer, the last layer has another width, or `attention` names no layer, the output, or a layer of
            odd width.
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
    outputs = 1 if num_classes == 2 else num_classes
    if row[-1][1] != outputs:
        raise ValueError(
            f"the last layer is the output and must be {outputs} wide, got widths {[width for _, width in row]}; the "
            "accuracy widths include the output, unless the fairness layers stand last."
        )
    if attention is not None and attention not in (known := [name for name, width in row[:-1] if width % 2 == 0]):
        raise ValueError(
            f"attention must name a layer before the output that is of even width (it has two heads), here one of "
            f"{', '.join(known) or '(none)'}, got {attention!r}."
        )
    return tuple((name + ATTENTION if name == attention else name, width) for name, width in row)


def is_followers(path: str, leaf: Any) -> bool:
    """The label of a parameter, for `fb.partition`."""
    del leaf
    return "fairness_" in path


def follower_of(path: str, num_followers: int) -> int:
    """Whose a parameter of the fairness layers is: layer i belongs to follower i, the last one takes the rest."""
    found = re.search(r"fairness_(\d+)", path)
    assert found is not None
    return min(int(found[1]), num_followers - 1)


def followers_of(theta: Any, num_followers: int) -> Any:
    """A tree like theta with each parameter's follower, a label for `optax.partition`."""
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, _: follower_of(name(path), num_followers), theta)


def seen_by(theta: Any, follower: int, num_followers: int) -> Any:
    """theta, whose derivative is that in one follower's layers: those of the others are held fixed."""
    owners = followers_of(theta, num_followers)
    return jax.tree.map(lambda p, owner: p if owner == follower else jax.lax.stop_gradient(p), theta, owners)


_dense = partial(linen.Dense, kernel_init=linen.initializers.variance_scaling(1 / 3, "fan_in", "uniform"))
_convolution = partial(linen.Conv, kernel_size=(3, 3), strides=2)


def _logits(z: jax.Array) -> jax.Array:
    """[n] for two classes, which have one output, else [n, k]."""
    return z[:, 0] if z.shape[1] == 1 else z


class ColumnAttention(linen.Module):
    """Columns [n, d] -> [n, width]: each column a token, one layer of self-attention with two heads, their mean.

    Column j with value x_j becomes the token x_j u_j + v_j, as in the FT-Transformer (Gorishniy et al. 2021); u and v
    are learnt. It takes memory for 2 n d^2 attention weights. What the theory says of it stands at the module's head.
    """

    width: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, width]."""
        shape = (x.shape[1], self.width)
        u, v = (self.param(name, linen.initializers.normal(1.0), shape, x.dtype) for name in ("scales", "offsets"))
        tokens = x[:, :, None] * u[None] + v[None]
        return jnp.mean(linen.MultiHeadDotProductAttention(num_heads=2)(tokens), axis=1)


class MLP(linen.Module):
    """Features [n, d] -> logits. Weights start uniform in +-1/sqrt(fan-in), as in the published code."""

    layers: Layers

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits, [n] or [n, k]."""
        for name, width in self.layers[:-1]:
            layer = ColumnAttention if name.endswith(ATTENTION) else _dense
            x = linen.relu(layer(width, name=name)(x))
        name, width = self.layers[-1]
        return _logits(_dense(width, name=name)(x))


class CNN(linen.Module):
    """Pictures [n, h, w, c] -> logits: convolutions of stride 2, the mean over the picture, a linear output."""

    layers: Layers

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits, [n] or [n, k]."""
        for name, width in self.layers[:-1]:
            x = linen.relu(_convolution(width, name=name)(x))
        name, width = self.layers[-1]
        return _logits(_dense(width, name=name)(jnp.mean(x, axis=(1, 2))))


class GCN(linen.Module):
    """A graph of n nodes -> logits (Kipf and Welling 2017); the first two layers mix each node with its neighbours.

    Layers after those see one node each, as FairBiNN's do: each further mixing would smooth the nodes' differences out.
    """

    layers: Layers

    @linen.compact
    def __call__(self, graph: Graph) -> jax.Array:
        """The logits, [n] or [n, k]."""
        x = graph.features
        for i, (name, width) in enumerate(self.layers):
            x = _dense(width, name=name)(x)
            x = graph.adjacency @ x if i < 2 and i < len(self.layers) - 1 else x
            x = linen.relu(x) if i < len(self.layers) - 1 else x
        return _logits(x)


def network(x: Any, of_layers: Layers) -> linen.Module:
    """The network for such inputs: a graph, pictures or features.

    Raises:
        ValueError: a layer is attention over columns, and the inputs are not features.
    """
    if any(name.endswith(ATTENTION) for name, _ in of_layers) and (isinstance(x, Graph) or x.ndim != 2):
        raise ValueError(f"attention is over the columns of features [n, d], got inputs {jax.tree.map(jnp.shape, x)}.")
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
        losses: several in place of `loss`; unfairness is their sum.
        followers: `one` minimises that sum. Else (in sequential `alternating`) each loss has a follower with fairness
            layers and an Adam of its own; `inner_steps` are those of each. They step `together`, all from the same
            point, or one after the other, each seeing the steps of those before it: `round-robin`.
        attention: the layer, fairness_0 for example, that is self-attention over the columns; None for none.
        num_classes: of the labels.
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
    losses: tuple[Loss, ...] = ()
    followers: Literal["one", "together", "round-robin"] = "one"
    attention: str | None = None
    num_classes: int = 2

    @property
    def row(self) -> Layers:
        """The network's layers."""
        return layers(self.accuracy_widths, self.fairness_widths, self.position, self.num_classes, self.attention)

    @property
    def terms(self) -> tuple[Loss, ...]:
        """The losses that make up the unfairness."""
        return self.losses or (Loss(self.loss),)

    @property
    def num_followers(self) -> int:
        """How many players there are below the leader."""
        return 1 if self.followers == "one" else len(self.losses)


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
        logits: (omega, theta, x) -> [n] or [n, k].
        fairness: (logits, batch) -> scalar.
        hyper, setting: as above.
        leader_optimizer, follower_optimizer: each for its own player's parameters.
        losses: (logits, batch) -> scalar of each follower, if there are several.
    """

    logits: Callable[[Any, Any, Any], jax.Array]
    fairness: Callable[[jax.Array, Batch], jax.Array]
    hyper: Hyper
    setting: Setting
    leader_optimizer: optax.GradientTransformation
    follower_optimizer: optax.GradientTransformation
    losses: tuple[Callable[[jax.Array, Batch], jax.Array], ...] = ()


def problem(game: Game) -> fb.ParametricProblem:
    """The bilevel problem: leader omega = outer_params, follower theta = inner_params.

    Several followers have the inner objective sum_j L_j(omega, theta_j, stop_gradient(the others')). Its gradient is
    the followers' gradients side by side, d L_j / d theta_j, so that one inner step is a step of each from the same
    point; XLA makes one forward pass of the m alike. It is a game's gradient and not that of a function of theta, and
    stop_gradient hides how the followers respond to each other: for `alternating`, and for no implicit estimator.
    """
    eta, _, _, alpha, beta = game.hyper

    def inner_objective(omega: Any, theta: Any, batch: Batch) -> jax.Array:
        losses = game.losses or (game.fairness,)

        def objective(j: int) -> jax.Array:
            mine = theta if len(losses) == 1 else seen_by(theta, j, len(losses))
            logits = game.logits(omega, mine, batch.x)
            return eta * losses[j](logits, batch) + alpha * accuracy_loss(logits, batch)

        return sum((objective(j) for j in range(1, len(losses))), objective(0))

    def outer_objective(omega: Any, theta: Any, batch: Batch) -> jax.Array:
        logits = game.logits(omega, theta, batch.x)
        return accuracy_loss(logits, batch) + beta * eta * game.fairness(logits, batch)

    return fb.ParametricProblem(inner_objective, outer_objective)


def _sequential(game: Game, estimator: fb.Estimator) -> fb.BilevelSolver:
    """The follower moves, or all followers do, then the leader, by the estimator's hypergradient."""
    m = game.setting.num_followers
    return fb.bilevel(
        problem(game),
        None,
        estimator,
        inner_optimizer=game.follower_optimizer,
        outer_optimizer=game.leader_optimizer,
        inner_steps=game.setting.inner_steps * (m if game.setting.followers == "round-robin" else 1),
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
    one objective. The follower sees the leader's batch. With None it stays where it is. NaN and inf are kept out and
    reported as `fb.bilevel` does: a level that breaks does not move, and the leader moves only if both levels are well.
    """

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

        outer_value = leader[0] * accuracy + leader[1] * unfairness
        inner_value = unfairness if follower is None else follower[0] * accuracy + follower[1] * unfairness
        g_leader, g_follower = gradients(leader)
        if follower is not None and follower is not leader:
            g_follower = gradients(follower)[1]
        inner_finite = jnp.isfinite(inner_value) if follower is None else finite(inner_value, g_follower)
        outer_finite = finite(outer_value, g_leader)
        new_omega, outer_opt_state = move(
            game.leader_optimizer, g_leader, state.outer_opt_state, omega, inner_finite & outer_finite
        )
        new_theta, inner_opt_state = theta, state.inner_opt_state
        if follower is not None:
            new_theta, inner_opt_state = move(game.follower_optimizer, g_follower, inner_opt_state, theta, inner_finite)
        norm = optax.tree.norm(g_leader)
        metrics = {
            "outer_objective": outer_value,
            "inner_objective": inner_value,
            "hypergradient_norm": norm,
            "explicit_norm": norm,
            "implicit_norm": jnp.zeros_like(norm),
            "inner_finite": inner_finite,
            "adjoint_finite": jnp.array(True),
            "outer_finite": outer_finite,
        }
        new = state._replace(
            step=state.step + 1,
            outer_params=new_omega,
            inner_params=new_theta,
            inner_opt_state=inner_opt_state,
            outer_opt_state=outer_opt_state,
        )
        return new, metrics

    return solver_of_step(game.leader_optimizer, game.follower_optimizer, step)


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


def of_followers(optimizer: optax.GradientTransformation, setting: Setting) -> optax.GradientTransformation:
    """One such optimizer for each follower's layers; in round-robin follower j takes every m-th inner step, from j."""
    m = setting.num_followers
    if m == 1:
        return optimizer

    def turns(j: int) -> optax.GradientTransformationExtraArgs:
        def is_next(step: Any, **_: Any) -> Any:
            return step % m == j

        return optax.transforms.conditionally_mask(optimizer, is_next)

    alike = setting.followers == "together"
    return optax.partition(
        {j: optimizer if alike else turns(j) for j in range(m)}, lambda theta: followers_of(theta, m)
    )


def check(method: str, setting: Setting) -> None:
    """Whether a method can be run with a setting.

    Raises:
        ValueError: there is no such method or loss, the layers do not fit, or there cannot be such followers.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    for name, _ in setting.terms:
        if name not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}.")
    if setting.update not in ("sequential", "simultaneous"):
        raise ValueError(f"update must be 'sequential' or 'simultaneous', got {setting.update!r}.")
    if setting.num_classes > 2 and any(loss.name == "published-parity" for loss in setting.terms):
        raise ValueError(f"loss: published-parity is defined for two classes, got {setting.num_classes}.")
    if setting.followers not in (known := ("one", "together", "round-robin")):
        raise ValueError(f"followers must be one of {', '.join(known)}, got {setting.followers!r}.")
    if setting.followers != "one" and (method != "alternating" or setting.update != "sequential"):
        raise ValueError(
            f"followers: {setting.followers} is for method alternating with the sequential update, got {method} with "
            f"the {setting.update} one."
        )
    if setting.followers != "one" and not 2 <= len(setting.losses) <= len(setting.fairness_widths):
        raise ValueError(
            f"followers: {setting.followers} takes at least two losses and a fairness layer for each of them, got "
            f"{len(setting.losses)} losses and fairness_widths {setting.fairness_widths}."
        )
    _ = setting.row


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
        ValueError: as `check` says.
    """
    check(method, setting)
    row, losses, m = setting.row, losses_of(setting.terms, num_groups), setting.num_followers

    def size(train: Batch) -> tuple[int, int]:
        """Rows per step and steps per epoch."""
        rows = min(setting.batch_size or len(train.y), len(train.y))
        return rows, len(train.y) // rows

    def solver(hyper: Hyper, train: Batch) -> fb.BilevelSolver:
        every = setting.decay_epochs * size(train)[1]
        follower_every = every * setting.inner_steps
        game = Game(
            logits=logits_of(row, train.x),
            fairness=sum_of(losses),
            hyper=hyper,
            setting=setting,
            leader_optimizer=_adam(hyper.leader_rate, setting.leader_decay, every, setting.weight_decay),
            follower_optimizer=of_followers(
                _adam(hyper.follower_rate, setting.follower_decay, follower_every, setting.weight_decay), setting
            ),
            losses=losses if m > 1 else (),
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
    row: Layers, losses: tuple[Loss, ...], num_groups: tuple[int, ...]
) -> Callable[[Parts, Hyper, Batch], dict[str, jax.Array]]:
    """(parts, hyper, train) -> on the training part how far the follower is from a solution, by its gradient's norm.

    `follower_gradient` is that of one follower's objective, with the sum of the losses if there are several;
    `follower_gradient_of_leader` that of the leader's; both by theta.
    """

    def diagnose(parts: Parts, hyper: Hyper, train: Batch) -> dict[str, jax.Array]:
        omega, theta = parts
        logits, unfairness = logits_of(row, train.x), sum_of(losses_of(losses, num_groups))

        def objectives(theta: Any) -> tuple[jax.Array, jax.Array]:
            z = logits(omega, theta, train.x)
            return accuracy_loss(z, train), unfairness(z, train)

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
    evaluate = evaluator(setting.row, dataset.num_groups)
    diagnose = diagnosis(setting.row, setting.terms, dataset.num_groups)
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


PARITY = ("dp_gap",)


def points(
    cells: Sequence[Mapping[str, float]], prefix: str = "", gaps: Sequence[str] = PARITY
) -> np.ndarray[Any, Any]:
    """(accuracy, 1 - the largest of these gaps) of each, [n, 2]; (0, 0) for a run that broke."""
    pairs = [(cell[f"{prefix}accuracy"], 1.0 - max(cell[f"{prefix}{gap}"] for gap in gaps)) for cell in cells]
    array = np.array(pairs, float).reshape(-1, 2)
    return np.where(np.isfinite(array).all(axis=1, keepdims=True), array, 0.0)


def selected_hypervolume(
    cells: Sequence[Mapping[str, float]], reference: tuple[float, float] = (0.0, 0.0), gaps: Sequence[str] = PARITY
) -> float:
    """The test points' hypervolume of those settings that are on the validation part's Pareto front."""
    chosen = pareto_front(points(cells, "validation_", gaps))
    return hypervolume(points(cells, gaps=gaps)[chosen], reference)


def etas(low: float, high: float, count: int) -> Iterator[float]:
    """`count` weights from low to high, evenly spaced on a logarithmic scale."""
    yield from (float(f"{value:.3g}") for value in np.geomspace(low, high, count))
