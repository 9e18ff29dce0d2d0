r"""The quadratic bilevel problem `simulated` of benchopt's `benchmark_bilevel`, drawn anew from its definition.

Each level is the mean over its samples of

.. math:: \tfrac12 (a^\top \theta)^2 + \tfrac12 (b^\top \omega)^2 + (c^\top \omega)(e^\top \theta) + l^\top \theta
    + m^\top \omega,

where a and b are normal with covariances of random eigenvectors and eigenvalues from mu to 1, evenly spaced in their
logarithm (of b the first one is zero); c = U D g and e = V g with g standard normal, U and V random rotations and D
from mu to L_cross, so that E c e^T = U D V^T; l and m are standard normal. The benchmark stores the samples' Hessians
a a^T, b b^T and cross derivatives c e^T as matrices; here a sample is its vectors, the same function in O(d) operations
instead of O(d^2). Data for which the value function is not convex are drawn again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import funcbilevel as fb

SEED = 2442
MU, CROSS = 0.1, 0.1
START = -2.0
"""Of every outer parameter; the inner ones start at zero."""


class Samples(NamedTuple):
    """Of one level: a, e, l of theta's size, [n, p]; b, c, m of omega's, [n, q]."""

    a: np.ndarray
    e: np.ndarray
    l: np.ndarray  # noqa: E741
    b: np.ndarray
    c: np.ndarray
    m: np.ndarray


class Means(NamedTuple):
    """Of one level over all its samples: d^2/d theta^2, d^2/d omega^2, d^2/d omega d theta, and the linear terms."""

    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    l: np.ndarray  # noqa: E741
    m: np.ndarray


class Data(NamedTuple):
    """The samples of both levels."""

    inner: Samples
    outer: Samples


def generate(n: int = 1024, p: int = 100, q: int = 100, seed: int = SEED) -> Data:
    """Draws both levels, n samples each, with p inner and q outer parameters, until the value function is convex."""
    for attempt in range(20):
        rng = np.random.default_rng([seed, attempt])
        data = Data(*(_level(rng, n, p, q) for _ in range(2)))
        if np.linalg.eigvalsh(value_hessian(data))[0] > 1e-12:
            return data
    raise ValueError(f"generate: of 20 draws with n={n}, p={p}, q={q} none had a convex value function; take more n.")


def _level(rng: np.random.Generator, n: int, p: int, q: int) -> Samples:
    def rotation(d: int) -> np.ndarray:
        return np.linalg.qr(rng.normal(size=(d, d)))[0]

    def correlated(eigenvalues: np.ndarray) -> np.ndarray:
        U = rotation(len(eigenvalues))
        return rng.normal(size=(n, len(eigenvalues))) @ (U * np.sqrt(eigenvalues)) @ U.T

    g = rng.normal(size=(n, p))
    k = min(p, q)
    U, V = rotation(q)[:, :k], rotation(p)
    drawn = Samples(
        a=correlated(np.geomspace(MU, 1.0, p)),
        e=g @ V.T,
        l=rng.normal(size=(n, p)),
        b=correlated(np.append(0.0, np.geomspace(MU, 1.0, q - 1))),
        c=g[:, :k] * np.geomspace(MU, CROSS, k) @ U.T,
        m=rng.normal(size=(n, q)),
    )
    return Samples(*(x.astype(np.float32) for x in drawn))


def objective(omega: jax.Array, theta: jax.Array, batch: Samples) -> jax.Array:
    """The mean over the batch."""
    curved = 0.5 * (batch.a @ theta) ** 2 + 0.5 * (batch.b @ omega) ** 2 + (batch.c @ omega) * (batch.e @ theta)
    return jnp.mean(curved + batch.l @ theta + batch.m @ omega)


PROBLEM = fb.ParametricProblem(objective, objective)


# The value function h(omega) = F(omega, theta*(omega)), in float64.


def means(samples: Samples) -> Means:
    a, e, l, b, c, m = (np.asarray(x, np.float64) for x in samples)  # noqa: E741
    n = len(a)
    return Means(a.T @ a / n, b.T @ b / n, c.T @ e / n, l.mean(axis=0), m.mean(axis=0))


def value_hessian(data: Data) -> np.ndarray:
    """The Hessian of h."""
    G, F = means(data.inner), means(data.outer)
    J = -np.linalg.solve(G.A, G.C.T)
    return J.T @ F.A @ J + F.B + F.C @ J + (F.C @ J).T


def gradient_squared(data: Data, omega: np.ndarray) -> float:
    """||grad h(omega)||^2, by the exact inner solution."""
    G, F = means(data.inner), means(data.outer)
    omega = np.asarray(omega, np.float64)
    theta = -np.linalg.solve(G.A, G.C.T @ omega + G.l)
    u = np.linalg.solve(G.A, F.A @ theta + F.C.T @ omega + F.l)
    gradient = F.B @ omega + F.C @ theta + F.m - G.C @ u
    return float(gradient @ gradient)
