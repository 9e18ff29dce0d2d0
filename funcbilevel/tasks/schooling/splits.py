"""Returns to schooling (Card 1995) with neural f and h: how far the methods agree, over seeds.

Education is the treatment, nearness to a college its instrument, the other regressors of `problem` are covariates; the
bilevel problem is that of `_instrumental.problem`. There is no truth to compare with. What is reported is the mean
slope: the average over all men of f(educ + 1/2, c) - f(educ - 1/2, c), in log wage per year, beside the coefficients
that two-stage and ordinary least squares give. A seed is a split of the men (40% inner, 40% outer, 20% validation) and
of the initial networks.
"""

from functools import cache

import numpy as np

from funcbilevel.tasks._instrumental.methods import Setting
from funcbilevel.tasks._instrumental.problem import Array, Batch, Data, standardised
from funcbilevel.tasks.schooling.problem import COVARIATES, load

SETTING = Setting(  # small ridges: nearness to a college explains half a percent of what the covariates leave of educ
    num_outer_steps=100,
    treatment_widths=(8, 2),
    covariate_widths=(16, 4),
    instrument_widths=(32, 16),
    linear_part=True,
    inner_ridge=1e-4,
    outer_ridge=1e-5,
)


@cache
def sample() -> Batch:
    """All men: instruments [3010, 6], education [3010, 1], covariates [3010, 5], log wage [3010]."""
    frame = load()
    z, p, c = (frame[names].to_numpy() for names in (["nearc4", *COVARIATES], ["educ"], [*COVARIATES]))
    return Batch(z, p, c, frame["lwage"].to_numpy())


def points() -> Batch:
    """Every man with half a year more and, below, with half a year less."""
    men = sample()
    return Batch(z=None, p=np.concatenate([men.p + 0.5, men.p - 0.5]), c=np.concatenate([men.c, men.c]), y=None)


def arrays(seed: int) -> Data:
    """One split."""
    men = sample()
    order = np.random.default_rng(seed).permutation(len(men.y))
    cut = 2 * int(0.4 * len(order))
    train, validation = (Batch(*(a[rows] for a in men)) for rows in (order[:cut], order[cut:]))
    return standardised(train, validation, points())


def mean_slope(predictions: Array) -> float:
    """Log wage per year of education, from predictions at `points`."""
    more, less = np.split(predictions, 2)
    return float(np.mean(more - less))
