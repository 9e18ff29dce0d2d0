"""A classification sample drawn by scikit-learn, with a group that goes with the label. No download."""

from typing import Any

import numpy as np

from funcbilevel.tasks.data.dataset import Dataset, divided, split


def load(n: int = 8000, bias: float = 1.0, seed: int = 0, num_classes: int = 2, use_attributes: bool = True) -> Dataset:
    """`sklearn.datasets.make_classification` with a group that the label and five of 20 features go with.

    A row's group is 1 with probability sigmoid(bias (2 y / (k - 1) - 1)) if there are k classes; group 1 moves five
    features by half a standard deviation, and is a feature itself.

    Args:
        n: rows in all; half are for training, a quarter each for validation and test.
        bias: how strongly label and group go together; 0 for not at all.
        seed: of the draw and of the division.
        num_classes: of the labels, k.
        use_attributes: whether the group is a feature itself.

    Raises:
        ValueError: there are fewer than two classes.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
    from sklearn.datasets import make_classification  # noqa: PLC0415

    drawn: Any = make_classification(
        n,
        n_features=20,
        n_informative=8,
        n_redundant=4,
        n_classes=num_classes,
        flip_y=0.08,
        class_sep=0.8,
        random_state=seed,
    )
    x, y = drawn
    rng = np.random.default_rng(seed)
    group = (rng.uniform(size=n) < 1 / (1 + np.exp(-bias * (2 * y / (num_classes - 1) - 1)))).astype(float)
    x[:, rng.permutation(20)[:5]] += 0.5 * x.std() * group[:, None]
    x = np.hstack([x, group[:, None]]) if use_attributes else x
    parts = split(n, (0.5, 0.25), seed)
    return divided("synthetic", x, y, group[:, None], parts, ("group",), (2,), num_classes)
