"""What comparisons over seeds are summarised by."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

Interval: TypeAlias = tuple[float, float, float]
"""(mean, low, high)."""


def bootstrap_interval(sample: np.ndarray[Any, Any], statistic: Callable[..., Any] = np.median) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of a statistic, from 10,000 resamples with a fixed seed."""
    resamples = np.random.default_rng(0).choice(sample, (10_000, len(sample)))
    low, high = np.quantile(statistic(resamples, axis=1), (0.025, 0.975))
    return float(low), float(high)


def mean_interval(sample: Sequence[float]) -> Interval:
    """The mean and its 95% bootstrap interval."""
    array = np.array(sample)
    return float(array.mean()), *bootstrap_interval(array, np.mean)


def paired_p_value(differences: np.ndarray[Any, Any]) -> float | None:
    """Of the two-sided Wilcoxon signed-rank test; None for fewer than five pairs or if all are equal."""
    if len(differences) < 5 or not np.any(differences):
        return None
    from scipy import stats  # noqa: PLC0415

    result: Any = stats.wilcoxon(differences)
    return float(result.pvalue)


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
