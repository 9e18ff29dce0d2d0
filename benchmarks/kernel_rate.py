"""How fast the hypergradient of kernel bilevel optimization approaches that of the population.

The theory (El Khoury, Pauwels, Vaiter, Arbel, 2025, https://arxiv.org/abs/2502.08457) says 1/sqrt(m) + 1/sqrt(n) with n
inner and m outer samples and a fixed ridge. Here the inner level is kernel ridge regression of noisy targets that
depend on omega, the outer level the squared error of that function on other noisy targets. The population's
hypergradient is the same computation on the nodes of a quadrature, whose weights stand in the objectives.

    python benchmarks/kernel_rate.py [--output benchmarks/results/kernel_rate]

prints one record, a JSON line, with the mean errors for n = m and the fitted slope in log-log scale, which the theory
says is -1/2. With a directory it also stands there, as runs.jsonl, with a table and a figure.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import funcbilevel as fb
from funcbilevel.tasks._experiment import figures, store, table

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


def table_of(record: store.Record) -> str:
    """In Markdown."""
    metrics = record["metrics"]
    rows = ((str(n), f"{metrics[f'error_{n}']:.4f}") for n in record["settings"]["sizes"])
    return (
        "# The rate of kernel bilevel optimization\n\n"
        f"Error of the hypergradient with n inner and as many outer samples, means over {record['settings']['seeds']} "
        f"draws. The slope in log-log scale is {metrics['slope']:.3f}, by the theory -1/2.\n\n"
        + table.markdown(("samples of each level", "error"), rows)
    )


def draw(record: store.Record, path: Path) -> None:
    """Error by samples, and the slope of the theory."""
    sizes = np.array(record["settings"]["sizes"])
    mean = np.array([record["metrics"][f"error_{n}"] for n in sizes])
    with figures.drawn(path, figsize=(4.5, 3.2)) as figure:
        axes = figure.subplots()
        axes.loglog(sizes, mean, "o-", label=f"measured, slope {record['metrics']['slope']:.2f}")
        axes.loglog(sizes, mean[0] * np.sqrt(sizes[0] / sizes), "k--", label="theory, slope -0.5")
        axes.set(xlabel="samples of each level, n", ylabel="error of the hypergradient")
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.set_yticks(ticks := [0.05, 0.1, 0.2], [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.legend(frameon=False)


def main(output: Path | None) -> None:
    start = time.perf_counter()
    reference = population()
    mean = np.array([errors(n, n, reference).mean() for n in SIZES])
    slope = float(np.polyfit(np.log(SIZES), np.log(mean), 1)[0])
    settings = {"sizes": list(SIZES), "seeds": SEEDS, "ridge": RIDGE}
    metrics = {"slope": slope} | {f"error_{n}": error for n, error in zip(SIZES, mean, strict=True)}
    record = store.record("kernel_rate", "funcid-kernel", 0, settings, metrics, time.perf_counter() - start)
    print(json.dumps(record))
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    (output / "runs.jsonl").unlink(missing_ok=True)
    store.append(output / "runs.jsonl", [record])
    store.replace(output / "table.md", table_of(record).encode())
    draw(record, output / "kernel_rate.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The rate of kernel bilevel optimization.")
    parser.add_argument("--output", type=Path, help="directory for record, table and figure")
    with jax.enable_x64(True):
        main(parser.parse_args().output)
