"""How fast the hypergradient of kernel bilevel optimization approaches that of the population.

The theory (El Khoury, Pauwels, Vaiter, Arbel, 2025, https://arxiv.org/abs/2502.08457) says 1/sqrt(m) + 1/sqrt(n) with n
inner and m outer samples and a fixed ridge. Here the inner level is kernel ridge regression of noisy targets that
depend on omega, the outer level the squared error of that function on other noisy targets. The population's
hypergradient is the same computation on the nodes of a quadrature, whose weights stand in the objectives.

    python benchmarks/kernel_rate.py [--out kernel_rate.png]

prints one JSON line with the mean errors for n = m and the fitted slope in log-log scale, which the theory says is
-1/2.
"""

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import funcbilevel as fb

RIDGE, SIZES, SEEDS = 0.05, (25, 50, 100, 200, 400, 800), 64
OMEGA = np.array([3.0, -1.0, 0.5])
KERNEL = fb.gaussian_kernel(0.3)

PROBLEM = fb.FunctionalProblem(
    lambda omega, v, batch: 0.5 * jnp.sum(batch[2] * (v[:, 0] - target(omega, batch[0]) - batch[1]) ** 2),
    lambda omega, v, batch: 0.5 * jnp.sum(batch[2] * (v[:, 0] - batch[1]) ** 2),
)


def target(omega: jax.Array, x: jax.Array) -> jax.Array:
    """What the inner level regresses on, without its noise."""
    return jnp.sin(omega[0] * x[:, 0]) + omega[1] * x[:, 0] ** 2 + omega[2]


def truth(x: jax.Array) -> jax.Array:
    """What the outer level wants, without its noise."""
    return jnp.cos(4.0 * x[:, 0])


def hypergradient(inner_batch: Any, outer_batch: Any) -> jax.Array:
    """At OMEGA, with the inner level solved exactly on (inputs, noise, weights)."""
    model = fb.kernel_model(KERNEL, inner_batch[0], num_outputs=1, ridge=RIDGE, num_steps=100)
    estimator = fb.funcid(fb.kernel_adjoint(KERNEL, RIDGE))
    return fb.hypergradient(
        *(PROBLEM, model, estimator, jnp.asarray(OMEGA), jnp.zeros(1), inner_batch, outer_batch)
    ).gradient


def population() -> np.ndarray:
    """On the nodes of a Gauss-Legendre quadrature of the uniform distribution on [-1, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    x, w = jnp.asarray(nodes[:, None]), jnp.asarray(weights / 2)
    return np.asarray(jax.jit(hypergradient)((x, jnp.zeros(len(x)), w), (x, truth(x), w)))


def errors(n: int, m: int, reference: np.ndarray) -> np.ndarray:
    """|hypergradient - population's| for each seed."""

    def batch(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        x_key, noise_key = jax.random.split(key)
        x = jax.random.uniform(x_key, (size, 1), minval=-1.0, maxval=1.0)
        return x, jax.random.normal(noise_key, (size,)), jnp.full(size, 1.0 / size)

    def error(key: jax.Array) -> jax.Array:
        inner_key, outer_key = jax.random.split(key)
        z, noise, w = batch(outer_key, m)
        return jnp.linalg.norm(hypergradient(batch(inner_key, n), (z, truth(z) + noise, w)) - reference)

    return np.asarray(jax.jit(lambda keys: jax.lax.map(error, keys))(jax.random.split(jax.random.key(n + m), SEEDS)))


def main(out: str | None) -> None:
    start = time.perf_counter()
    reference = population()
    mean = np.array([errors(n, n, reference).mean() for n in SIZES])
    slope = float(np.polyfit(np.log(SIZES), np.log(mean), 1)[0])
    record = {
        "task": "kernel_rate",
        "sizes": list(SIZES),
        "mean_error": [float(f"{x:.4g}") for x in mean],
        "seeds": SEEDS,
        "slope": round(slope, 3),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(record))
    if out is None:
        return
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    axes.loglog(SIZES, mean, "o-", label=f"n = m, slope {slope:.2f}")
    axes.loglog(SIZES, mean[0] * np.sqrt(SIZES[0] / np.array(SIZES)), "k--", label="slope -1/2")
    axes.set(xlabel="samples of each level", ylabel="error of the hypergradient")
    axes.legend()
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The rate of kernel bilevel optimization.")
    parser.add_argument("--out", help="where to save the figure")
    with jax.enable_x64(True):
        main(parser.parse_args().out)
