"""What simple methods reach on dSprites' instrumental regression: two floors, and a reference from outside.

Each returns its mean squared error on the test set.
"""

from collections.abc import Sequence

import numpy as np

from funcbilevel.tasks.data.dsprites import Array, Clean, Data

RIDGES = np.logspace(-10, 2, 37)


def least_squares_floor(data: Data, test: Clean) -> float:
    """Ridge regression of y on the pixels, which takes the confounder for an effect.

    Fitted on the inner half, the ridge is the best on the outer half; then all are fitted again.
    """
    x, mean, y, y_mean = _centred(data.x_inner, data.y_inner)
    values, vectors = np.linalg.eigh(x @ x.T)
    unit = np.mean(values)
    coefficients = (vectors.T @ y)[:, None] / (values[:, None] + unit * RIDGES)
    predictions = y_mean + (data.x_outer - mean) @ (x.T @ (vectors @ coefficients))
    ridge = unit * RIDGES[np.argmin(np.mean((predictions - data.y_outer[:, None]) ** 2, axis=0))]

    x, mean, y, y_mean = _centred(np.concatenate([data.x_inner, data.x_outer]), np.append(data.y_inner, data.y_outer))
    slope = x.T @ np.linalg.solve(x @ x.T + 2 * ridge * np.eye(len(x)), y)  # twice the rows, twice the ridge
    return _test_mse(y_mean + (test.x - mean) @ slope, test)


def two_stage_floor(data: Data, test: Clean, ridge: float = 1e-6) -> float:
    """Linear two-stage least squares on the raw instruments, which explain few of the pixels' directions.

    Both stages take both halves. The ridge of the second is relative to the predicted pixels' total variance.
    """
    x, mean, y, y_mean = _centred(np.concatenate([data.x_inner, data.x_outer]), np.append(data.y_inner, data.y_outer))
    z, *_ = _centred(np.concatenate([data.z_inner, data.z_outer]), y)
    w = np.linalg.solve(z.T @ z, z.T @ x)
    # The predicted x are z w, of rank 3: (w'z'z w + r I)^-1 w'z'y = w' (z'z w w' + r I)^-1 z'y.
    normal = z.T @ z @ (w @ w.T)
    slope = w.T @ np.linalg.solve(normal + ridge * np.trace(normal) * np.eye(len(w)), z.T @ y)
    return _test_mse(y_mean + (test.x - mean) @ slope, test)


def kernel_iv(data: Data, test: Clean) -> float:
    r"""Kernel instrumental regression (KIV): both stages are ridge regressions in Gaussian kernels' spaces.

    With stage 1 the inner half, of size n, and stage 2 the outer one, marked by a tilde, of size m,

    .. math::
        \Gamma = (K_{ZZ} + n \lambda I)^{-1} K_{Z \tilde Z}, \quad
        \alpha = \Gamma (\Gamma^\top K_{XX} \Gamma + m \xi I)^{-1} \tilde y, \quad f(x) = K_{xX} \alpha ,

    which is the paper's :math:`(W W^\top + m \xi K_{XX})^{-1} W \tilde y` with :math:`W = K_{XX} \Gamma`. The ridge
    :math:`\lambda` has the least loss of stage 1 on the half of stage 2, and :math:`\xi` the least squared residual
    of f on the half of stage 1. Kernel widths are median distances; the instruments enter as they are, unscaled.

    References:
        Singh, Sahani, Gretton, *Kernel Instrumental Variable Regression*, NeurIPS 2019,
        https://arxiv.org/abs/1906.00232.
    """
    k_zz, k_zz2 = _gaussian(data.z_inner, (data.z_inner, data.z_outer))
    k_xx, k_xx2, k_xtest = _gaussian(data.x_inner, (data.x_inner, data.x_outer, test.x))

    gamma = _stage_one(k_zz, k_zz2, k_xx, k_xx2)
    values, vectors = np.linalg.eigh(gamma.T @ k_xx @ gamma)
    basis = gamma @ vectors
    ridges = len(values) * RIDGES
    alphas = basis @ ((vectors.T @ data.y_outer)[:, None] / (np.maximum(values, 0)[:, None] + ridges))
    losses = np.mean((k_xx @ alphas - data.y_inner[:, None]) ** 2, axis=0)
    return _test_mse(k_xtest.T @ alphas[:, np.argmin(losses)], test)


def _stage_one(k_zz: Array, k_zz2: Array, k_xx: Array, k_xx2: Array) -> Array:
    """Gamma with the best lambda, [n, m]: column j weighs the pictures of stage 1 into the mean one given z2_j."""
    values, vectors = np.linalg.eigh(k_zz)
    # In the eigenvectors' basis Gamma is `diag(d) rotated`, d = 1 / (values + n lambda), and the loss without its
    # constant, tr(Gamma' K_XX Gamma - 2 K_X2X Gamma), is a quadratic form in d.
    rotated = vectors.T @ k_zz2
    quadratic = (vectors.T @ k_xx @ vectors) * (rotated @ rotated.T)
    linear = np.sum((vectors.T @ k_xx2) * rotated, axis=1)
    d = 1 / (np.maximum(values, 0)[:, None] + len(values) * RIDGES)
    losses = np.sum(d * (quadratic @ d), axis=0) - 2 * linear @ d
    return vectors @ (d[:, [np.argmin(losses)]] * rotated)


def _centred(x: Array, y: Array) -> tuple[Array, Array, Array, float]:
    """x and y, in float64, without their means; x, its mean, y, its mean."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    return x - x.mean(axis=0), x.mean(axis=0), y - y.mean(), float(y.mean())


def _squared_distances(a: Array, b: Array) -> Array:
    """Between the rows of a, [n, d], and of b, [m, d]: [n, m], float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.maximum(np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1) - 2 * a @ b.T, 0)


def _gaussian(a: Array, others: Sequence[Array]) -> list[Array]:
    """Kernel matrices of a, [n, d], with each of the others, [m, d]: [n, m]; its width is a's median distance."""
    squared_width = np.median(_squared_distances(a, a))
    return [np.exp(-_squared_distances(a, b) / (2 * squared_width)) for b in others]


def _test_mse(predictions: Array, test: Clean) -> float:
    return float(np.mean((predictions - test.y) ** 2))
