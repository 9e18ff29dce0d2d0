r"""Which features does a network need? The leader predicts, the follower owns one gate per feature and keeps few open.

A feature is a column of the table; all one-hot parts of a categorical column share its gate z, which multiplies them.
Leader omega, a network's weights, and follower theta, the gates' means mu, play

.. math::
    L_{out}(\omega, \mu) &= E_\epsilon\, \text{cross entropy}(\omega, x \odot z),
        \quad z_j = \min(\max(\mu_j + \sigma \epsilon_j, 0), 1), \quad \epsilon_j \sim N(0, 1), \\
    L_{in}(\omega, \mu) &= E_\epsilon\, \text{cross entropy}(\omega, x \odot z)
        + \lambda \sum_j P(z_j > 0), \quad P(z_j > 0) = \Phi(\mu_j / \sigma) .

These are the stochastic gates of Yamada et al. (2020); a feature is selected if its gate without noise is open, mu > 0.
The leader does not pay for open gates. As the count does not depend on omega, `alternating` is joint training of
network and gates; the hypergradients of `aid-cg` and `itd` see in addition that the gates will answer.

Controls on the same network: `lasso` and `group-lasso` soften the first layer's weights by proximal gradient steps,
singly or in one block per feature, and select the features that keep any; `random-mask` draws as many features as
`aid-cg` has selected. Whatever selected them, the selected features are given to a new network, trained always alike.

References:
    Yamada, Lindenbaum, Negahban, Kluger, *Feature Selection using Stochastic Gates*, ICML 2020,
    https://arxiv.org/abs/1810.04247; Louizos, Welling, Kingma, *Learning Sparse Neural Networks through L0
    Regularization*, ICLR 2018, https://arxiv.org/abs/1712.01312; Scardapane et al., *Group Sparse Regularization for
    Deep Neural Networks*, Neurocomputing 2017, https://arxiv.org/abs/1607.00485 (lasso and group lasso of a layer).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcbilevel as fb
from funcbilevel.tasks.data import adult as adult_data
from funcbilevel.tasks.data.dataset import split

Array: TypeAlias = np.ndarray[Any, Any]
Params: TypeAlias = dict[str, jax.Array]

# Data.


class Rows(NamedTuple):
    """Rows to train or to measure on.

    Attributes:
        x: inputs, [n, d].
        y: labels, 0 or 1, [n].
    """

    x: Any
    y: Any


class Table(NamedTuple):
    """A classification task whose features are columns of a table.

    Attributes:
        name: of the data.
        features: names of the features.
        feature_of: the feature, by its number, to which each input column belongs, [d].
        train, validation, test: disjoint rows.
    """

    name: str
    features: tuple[str, ...]
    feature_of: tuple[int, ...]
    train: Rows
    validation: Rows
    test: Rows


def standardised(x: Array, train: Array, feature_of: Sequence[int]) -> Array:
    """x centred, and divided by the root of the feature's variance, the sum over its columns, in the training part.

    Every feature has then a variance of one there, of however many columns it consists: penalties treat all alike.
    """
    members = np.eye(max(feature_of) + 1)[list(feature_of)]  # [d, features]
    variance = members @ (members.T @ train.var(axis=0))
    return ((x - train.mean(axis=0)) / np.sqrt(np.where(variance > 0, variance, 1.0))).astype(np.float32)


def _table(
    name: str, features: Sequence[str], feature_of: Sequence[int], parts: Sequence[tuple[Array, Array]]
) -> Table:
    train = parts[0][0]
    rows = [Rows(standardised(x, train, feature_of), y.astype(np.float32)) for x, y in parts]
    return Table(name, tuple(features), tuple(feature_of), *rows)


FOLDS = 3
SIZES = {"breast-cancer": (284, 142, 143), "adult": (24130, 6032, 15060)}
"""Rows to train, to validate and to test of each."""


def breast_cancer(seed: int = 0, fold: int = 0) -> Table:
    """Breast cancer of Wisconsin (569 tumours, 30 features; Street, Wolberg, Mangasarian 1993), as scikit-learn has it.

    The seed draws 143 rows for the test part and divides the others into three parts of 142; one of these, the fold,
    is the validation part.
    """
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415

    data: Any = load_breast_cancer()
    *folds, test = split(len(data.target), (0.25, 0.25, 0.25), seed)
    kept = np.concatenate([rows for i, rows in enumerate(folds) if i != fold])
    parts = [(data.data[rows], data.target[rows]) for rows in (kept, folds[fold], test)]
    names: list[str] = [str(name) for name in data.feature_names]
    return _table("breast-cancer", names, range(len(names)), parts)


def adult(directory: str | Path | None = None, seed: int = 0) -> Table:
    """UCI Adult of `data.adult` with its 13 columns as features.

    A fifth of adult.data, chosen by the seed, is the validation part; adult.test is the test part.
    """
    categories = adult_data.CATEGORIES
    data = adult_data.load(directory, attributes=categories, seed=seed)
    widths = {name: 1 if name == "sex" else k for name, k in zip(categories, data.num_groups, strict=True)}
    widths = dict.fromkeys(adult_data.NUMBERS, 1) | widths
    feature_of = [i for i, width in enumerate(widths.values()) for _ in range(width)]
    parts = [(part.x, part.y) for part in (data.train, data.validation, data.test)]
    return _table("adult", tuple(widths), feature_of, parts)


def load(dataset: str, directory: Path | None, seed: int) -> list[Table]:
    """The data as the seed divides them: of breast cancer several folds.

    Raises:
        UserError: the directory does not hold the files of adult, or something else is in them.
    """
    if dataset == "breast-cancer":
        return [breast_cancer(seed, fold) for fold in range(FOLDS)]
    return [adult(directory, seed)]


# Gates.

SIGMA = 0.5
"""Standard deviation of a gate's noise, as in Yamada et al."""


def gates(mu: jax.Array, noise: jax.Array | float = 0.0) -> jax.Array:
    """z in [0, 1] of means mu, [features]; without noise as in evaluation."""
    return jnp.clip(mu + SIGMA * noise, 0.0, 1.0)


def expected_open(mu: jax.Array) -> jax.Array:
    """The expected number of gates with z > 0."""
    return jnp.sum(jax.scipy.stats.norm.cdf(mu / SIGMA))


# The network.


def initial_network(d: int, width: int, seed: int) -> dict[str, Array]:
    """Weights of variance 2 / fan-in: `w1` [d, width], `b1` [width], `w2` [width], `b2` scalar."""
    rng = np.random.default_rng(seed)
    network = {
        "w1": rng.normal(size=(d, width)) * (2 / d) ** 0.5,
        "b1": np.zeros(width),
        "w2": rng.normal(size=width) * (2 / width) ** 0.5,
        "b2": np.zeros(()),
    }
    return {name: weights.astype(np.float32) for name, weights in network.items()}


def logits(omega: Params, x: jax.Array) -> jax.Array:
    """[n, d] -> [n]."""
    return jax.nn.relu(x @ omega["w1"] + omega["b1"][None]) @ omega["w2"] + omega["b2"]


def gated(omega: Params, z: jax.Array) -> Params:
    """The network whose inputs are multiplied by z, [d]: the product may as well be with the first layer."""
    return omega | {"w1": z[:, None] * omega["w1"]}


def cross_entropy(omega: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean over the rows."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits(omega, x), y))


def accuracy(omega: Params, rows: Rows) -> jax.Array:
    """Share of the rows with the right sign."""
    return jnp.mean((logits(omega, rows.x) > 0) == (rows.y > 0.5))


# The two players.


class Batch(NamedTuple):
    """Rows drawn for a step, and the gates' noise in it.

    Attributes:
        x, y: [b, d] and [b].
        noise: [features].
    """

    x: Any
    y: Any
    noise: Any


def problem(penalty: Any, feature_of: Sequence[int], weight_decay: float = 0.0) -> fb.ParametricProblem:
    """The bilevel problem: leader omega = outer_params, follower mu = inner_params."""
    columns = jnp.array(feature_of)

    def gated_cross_entropy(omega: Params, mu: jax.Array, batch: Batch) -> jax.Array:
        return cross_entropy(gated(omega, gates(mu, batch.noise)[columns]), batch.x, batch.y)

    def inner_objective(omega: Params, mu: jax.Array, batch: Batch) -> jax.Array:
        return gated_cross_entropy(omega, mu, batch) + penalty * expected_open(mu)

    def outer_objective(omega: Params, mu: jax.Array, batch: Batch) -> jax.Array:
        return gated_cross_entropy(omega, mu, batch) + 0.5 * weight_decay * optax.tree.norm(omega, squared=True)

    return fb.ParametricProblem(inner_objective, outer_objective)
