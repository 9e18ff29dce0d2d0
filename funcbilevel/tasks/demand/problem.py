r"""The demand for air tickets (Hartford et al. 2017): instrumental regression on a simulation with known truth.

Sales y depend on the price p, the time of the year t and the type of customer s; something unseen, a conference say,
moves the price and the sales. The cost of fuel c moves the price only:

.. math::
    p = 25 + (c + 3) \psi(t) + v, \quad y = 100 + (10 + p) s \psi(t) - 2p + noise \cdot e, \quad
    \psi(t) = 2\,((t - 5)^4 / 600 + e^{-4 (t - 5)^2} + t / 10 - 2),

with c, v ~ N(0, 1), e ~ N(rho v, 1 - rho^2), t ~ U(0, 10), s uniform on 1..7. The treatment is the price, t and s are
covariates, and the bilevel problem is that of `_instrumental.problem`. Errors are measured on the published grid, a
good part of which lies where no price was seen.

Hartford et al. add e to standardised sales, whose standard deviation is 158: here noise = 158 by default. Xu et al.
have noise = 1, with which there is hardly any confounding to undo: plain regression then does best.

References:
    Hartford, Lewis, Leyton-Brown, Taddy, *Deep IV: A Flexible Approach for Counterfactual Prediction*, ICML 2017;
    Xu et al., ICLR 2021, https://arxiv.org/abs/2010.07154 (DFIV), appendix.
"""

from typing import Any, TypeAlias

import numpy as np

from funcbilevel.tasks._instrumental.problem import Batch, Data, standardised, whole

Array: TypeAlias = np.ndarray[Any, Any]

# Data.


def psi(t: Array) -> Array:
    """How much customers mind the price, over the year."""
    return 2 * ((t - 5) ** 4 / 600 + np.exp(-4 * (t - 5) ** 2) + t / 10 - 2)


def structural(p: Array, t: Array, s: Array) -> Array:
    """The truth: sales if the price were set to p."""
    return 100 + (10 + p) * s * psi(t) - 2 * p


def simulate(n: int, rng: np.random.Generator, rho: float = 0.5, noise: float = 158.0) -> Batch:
    """n independent observations: instruments (c, t, s), treatment p, covariates (t, s)."""
    s, t = rng.integers(1, 8, n).astype(float), rng.uniform(0, 10, n)
    c, v = rng.normal(size=(2, n))
    e = rho * v + np.sqrt(1 - rho**2) * rng.normal(size=n)
    p = 25 + (c + 3) * psi(t) + v
    return Batch(np.stack([c, t, s], axis=1), p[:, None], np.stack([t, s], axis=1), structural(p, t, s) + noise * e)


def published_grid() -> Array:
    """The published 20 prices x 20 times x 7 types, [2800, 3]."""
    axes = np.linspace(10, 25, 20), np.linspace(0, 10, 20), np.arange(1.0, 8.0)
    return np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")], axis=1)


SHOWN_T, SHOWN_S = 5.0, 4.0


def shown_line() -> Array:
    """The prices at which the figure shows the curve, with its time and type, [61, 3]."""
    prices = np.linspace(10, 25, 61)
    return np.stack([prices, np.full_like(prices, SHOWN_T), np.full_like(prices, SHOWN_S)], axis=1)


def points() -> Batch:
    """The published grid and, below it, the line of the figure, as treatments and covariates."""
    x = np.concatenate([published_grid(), shown_line()])
    return Batch(z=None, p=x[:, :1], c=x[:, 1:], y=None)


def arrays(seed: int, n: int, rho: float, noise: float, num_validation: int = 2000) -> Data:
    """The data of one seed, with a fresh validation sample."""
    train_rng, validation_rng = np.random.default_rng(seed).spawn(2)
    train, validation = simulate(n, train_rng, rho, noise), simulate(num_validation, validation_rng, rho, noise)
    return standardised(train, validation, points())


def test_mse(predictions: Array) -> float:
    """Mean squared error to the truth on the published grid; `predictions` are at `points`."""
    grid = published_grid()
    return float(np.mean((predictions[: len(grid)] - structural(*grid.T)) ** 2))


def two_stage(data: Data) -> Array:
    """Predictions at `points` by two-stage least squares, linear in p, t and s and instrumented by c, t and s."""
    sample, one = whole(data), np.ones((len(data.inner.y) + len(data.outer.y), 1))
    z, x = (np.hstack([*(np.asarray(a, float) for a in parts), one]) for parts in ((sample.z,), (sample.p, sample.c)))
    at = np.hstack([data.points.p, data.points.c, np.ones((len(data.points.p), 1))])
    return at @ np.linalg.solve(z.T @ x, z.T @ np.asarray(sample.y, float)) * data.y_std + data.y_mean
