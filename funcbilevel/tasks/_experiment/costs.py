"""`funcbilevel cost`: what one outer step costs on this machine, by each estimator, on a functional regression."""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

import funcbilevel as fb
from funcbilevel.tasks._experiment import table
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.options import flag

if TYPE_CHECKING:
    from rich.console import RenderableType

FEATURES = 16


@dataclass(frozen=True)
class Cost:
    """What one outer step costs on this machine, by each estimator: time, temporary memory, time to compile.

    The problem is a functional regression with a network of some depth and width at the inner level. Example:
    `funcbilevel cost --depth 8 --width 256 --steps 20`.
    """

    depth: int = 2
    """Hidden layers of the network."""
    width: int = 64
    """Units of each hidden layer."""
    steps: int = 10
    """Inner steps, steps of the adjoint and of the linear solvers, and steps that ITD goes back through."""
    samples: int = 256
    """Samples in each batch."""
    repeats: int = 10
    """Timed steps of each estimator; they take turns."""
    device: str | None = None
    """Device to compute on: cpu, gpu or tpu. By default the fastest that JAX finds."""
    x64: bool = False
    """Compute in float64; by default in float32."""

    def check(self) -> None:
        """Raises a UserError that names an option out of range."""
        for name in ("depth", "width", "steps", "samples", "repeats"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{flag(name)} must be at least 1, got {value}.")


def measure(options: Cost) -> fb.CostTable:
    """The costs of one outer step by each estimator, that of the linear adjoint first."""
    with jax.enable_x64(options.x64):
        x = jax.random.normal(jax.random.key(0), (options.samples, FEATURES), float)
        batch = (x, jnp.sin(x).sum(axis=1, keepdims=True))
        return fb.compare_costs(
            fb.FunctionalProblem(
                lambda w, v, batch: jnp.mean((v - w * batch[1]) ** 2),
                lambda w, v, batch: jnp.mean((v - 2 * batch[1]) ** 2) + 1e-3 * w**2,
            ),
            fb.from_function(lambda key, x: _initial(options, key, x), lambda theta, x: _hidden(theta, x) @ theta[-1]),
            _estimators(options.steps),
            jnp.ones((), float),
            batch,
            batch,
            inner_optimizer=optax.adam(1e-2),
            outer_optimizer=optax.adam(1e-2),
            inner_steps=options.steps,
            repeats=options.repeats,
        )


def _initial(options: Cost, key: jax.Array, x: jax.Array) -> list[jax.Array]:
    widths = (FEATURES, *(options.width,) * options.depth, 1)
    shapes = list(pairwise(widths))
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(k, s, x.dtype) / s[0] ** 0.5 for k, s in zip(keys, shapes, strict=True)]


def _hidden(theta: list[jax.Array], x: jax.Array) -> jax.Array:
    for weights in theta[:-1]:
        x = jnp.tanh(x @ weights)
    return x


def _estimators(steps: int) -> dict[str, fb.Estimator]:
    return {
        "funcid-linear": fb.funcid(fb.linear_adjoint(_hidden, ridge=1e-3)),
        "funcid-learned": fb.funcid(fb.learned_adjoint(optax.adam(1e-2), steps)),
        "funcid-pointwise": fb.funcid(fb.pointwise_adjoint()),
        "aid-cg": fb.aid(fb.cg(steps, damping=0.01)),
        "aid-neumann": fb.aid(fb.neumann(steps, step_size=0.01)),
        "itd": fb.itd(steps),
        "alternating": fb.alternating(),
    }


def shown(options: Cost, costs: fb.CostTable) -> "RenderableType":
    """The table for the terminal."""
    header = ("estimator", "ms", "quartiles", "ratio", "temp MiB", "compile s")
    first = costs.rows[0]
    rows = [
        (
            row.name,
            f"{1e3 * row.seconds:.2f}",
            f"{1e3 * row.seconds_low:.2f}-{1e3 * row.seconds_high:.2f}",
            f"{row.seconds / first.seconds:.2f}",
            f"{row.temp_bytes / 2**20:.2f}",
            f"{row.compile_seconds:.2f}",
        )
        for row in costs.rows
    ]
    parts: list[Any] = [
        table.terminal(header, rows, left=("estimator",)),
        f"One outer step with {options.steps} inner steps, {options.depth} hidden layers of {options.width} units and "
        f"batches of {options.samples}, in {'float64' if options.x64 else 'float32'} on "
        f"{jax.devices()[0].device_kind}; ratio: to {first.name}; temp: XLA's temporary buffers.",
    ]
    return table.page(*parts)
