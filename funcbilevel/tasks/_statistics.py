"""What comparisons over seeds are summarised by."""

from collections.abc import Callable
from typing import Any

import numpy as np


def bootstrap_interval(sample: np.ndarray[Any, Any], statistic: Callable[..., Any] = np.median) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of a statistic, from 10,000 resamples with a fixed seed."""
    resamples = np.random.default_rng(0).choice(sample, (10_000, len(sample)))
    low, high = np.quantile(statistic(resamples, axis=1), (0.025, 0.975))
    return float(low), float(high)


def paired_p_value(differences: np.ndarray[Any, Any]) -> float | None:
    """Of the two-sided Wilcoxon signed-rank test; None for fewer than five pairs or if all are equal."""
    if len(differences) < 5 or not np.any(differences):
        return None
    from scipy import stats  # noqa: PLC0415

    result: Any = stats.wilcoxon(differences)
    return float(result.pvalue)
