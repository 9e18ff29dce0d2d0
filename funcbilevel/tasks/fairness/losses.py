"""What a group gets: losses that measure unfairness, and the metrics of a classifier.

`groups` are the numbers of one attribute's groups, `weight` picks the rows that count.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from funcbilevel.tasks.data.dataset import Batch


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


NUM_BINS = 10
"""Of `calibration_error`."""


def calibration_error(logits: jax.Array, batch: Batch) -> jax.Array:
    """Expected calibration error in `NUM_BINS` bins of equal width: sum_b n_b/n |mean p - share of y = 1 in bin b|.

    Of more than two classes p is that of the most probable class, and what counts is whether it is the true one.
    """
    if logits.ndim == 1:
        p, true = jax.nn.sigmoid(logits), batch.y
    else:
        p, true = jnp.max(jax.nn.softmax(logits), axis=1), (jnp.argmax(logits, axis=1) == batch.y).astype(logits.dtype)
    bins = jnp.minimum(jnp.floor(NUM_BINS * p), NUM_BINS - 1).astype(jnp.int32)
    excess = jax.ops.segment_sum(batch.weight * (p - true), bins, NUM_BINS)
    return jnp.sum(jnp.abs(excess)) / jnp.sum(batch.weight)


def measure(logits: jax.Array, batch: Batch, num_groups: tuple[int, ...]) -> dict[str, jax.Array]:
    """What counts, of several attributes the worst; all differences are between the two most different groups.

    `accuracy`; `dp_gap` and `dp_gap_soft`: of the rates of positive decisions, p > 1/2, and of the mean p;
    `eo_gap` and `eo_gap_soft`: the larger of these differences among the rows with y = 0 and those with y = 1;
    `opportunity_gap`: among those with y = 1 only; `worst_group_accuracy`; `calibration_error`. Of more than two
    classes the decision is for the most probable, and a gap is the largest over the classes, each against the rest.
    With several attributes `dp_gap_<a>` and `eo_gap_<a>` are those of attribute number a.
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
        "calibration_error": calibration_error(logits, batch),
    } | (of_each if len(num_groups) > 1 else {})
