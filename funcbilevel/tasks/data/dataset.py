"""Classification data with groups: rows divided into a training, a validation and a test part.

Whatever is fitted to data (scalers) is fitted to the training part only.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]


class Batch(NamedTuple):
    """Rows to train or to measure on.

    Attributes:
        x: what the network is called on: features [n, d], pictures [n, h, w, c], or a `Graph` of n nodes.
        y: labels, 0 or 1, or 0 to k - 1, [n].
        groups: for each attribute the number of the row's group, from 0 on, [n, num_attributes].
        weight: 1 for rows that count and 0 for those that do not (other nodes of the graph), [n].
    """

    x: Any
    y: Any
    groups: Any
    weight: Any


class Graph(NamedTuple):
    """A graph with n nodes.

    Attributes:
        features: of the nodes, [n, d].
        adjacency: D^-1/2 (A + I) D^-1/2 with A the symmetric adjacency matrix and D the degrees of A + I, [n, n].
    """

    features: Any
    adjacency: Any


class Dataset(NamedTuple):
    """A classification task with attributes by which it should be fair.

    Attributes:
        name: of the data.
        train, validation, test: disjoint rows; of a graph the same nodes with different weights.
        attributes: names of the attributes.
        num_groups: how many groups each of them has.
        num_classes: how many labels there are.
    """

    name: str
    train: Batch
    validation: Batch
    test: Batch
    attributes: tuple[str, ...]
    num_groups: tuple[int, ...]
    num_classes: int = 2


def split(n: int, fractions: Sequence[float], seed: int) -> list[Array]:
    """Disjoint random sets of row numbers, the first of them the given fractions of n, the last what remains."""
    ends = np.cumsum([round(n * fraction) for fraction in fractions])
    return np.split(np.random.default_rng(seed).permutation(n), ends)


def scaler(train: Array) -> tuple[Array, Array]:
    """(low, range) of each column of the training part; `(x - low) / range` is in [0, 1] there."""
    low, high = train.min(axis=0), train.max(axis=0)
    return low, np.where(high > low, high - low, 1.0)


def divided(
    name: str,
    x: Array,
    y: Array,
    groups: Array,
    parts: Sequence[Array],
    attributes: tuple[str, ...],
    num_groups: tuple[int, ...],
    num_classes: int = 2,
) -> Dataset:
    """Rows scaled by the training part and divided into `parts`: training, validation, test."""
    low, extent = scaler(x[parts[0]])
    x = (x - low) / extent
    train, validation, test = (_batch(x[rows], y[rows], groups[rows]) for rows in parts)
    return Dataset(name, train, validation, test, attributes, num_groups, num_classes)


def _batch(x: Array, y: Array, groups: Array) -> Batch:
    return Batch(x.astype(np.float32), y.astype(np.float32), groups.astype(np.int32), np.ones(len(y), np.float32))
