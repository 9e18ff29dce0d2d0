"""What an outer step costs under each estimator, next to its floor: the plain training steps of the same networks.

    python benchmarks/cost.py --quick

The problem is a functional regression: a multilayer perceptron (the inner level) is fitted to a target that the
outer parameters make; the outer level fits the perceptron's values to data. `floor` is a bare scan of the optax
steps that FuncID cannot do without: M on the prediction network (inner batch), K on the adjoint network (both
batches), and one gradient of the outer objective.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import funcbilevel as fb
from funcbilevel.tasks import _records

INPUTS, OUTPUTS = 10, 1


def perceptron(depth: int, width: int) -> tuple[fb.Model, Callable[[Any, jax.Array], jax.Array]]:
    """A ReLU network with `depth` hidden layers, and its last hidden layer as features."""

    def init(key: jax.Array, x: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        sizes = [x.shape[-1], *([width] * depth), OUTPUTS]
        keys = jax.random.split(key, depth + 1)
        return [
            (jax.random.normal(k, (m, n)) * jnp.sqrt(2 / m), jnp.zeros(n)) for k, m, n in zip(keys, sizes, sizes[1:])
        ]

    def features(params: Any, x: jax.Array) -> jax.Array:
        for kernel, bias in params[:-1]:
            x = jax.nn.relu(x @ kernel + bias[None])
        return x

    def apply(params: Any, x: jax.Array) -> jax.Array:
        kernel, bias = params[-1]
        return features(params, x) @ kernel + bias[None]

    return fb.from_function(init, apply), features


def inner_objective(outer_params: Any, v: jax.Array, batch: Any) -> jax.Array:
    return 0.5 * jnp.mean((v - batch[0] @ outer_params) ** 2)


def outer_objective(outer_params: Any, v: jax.Array, batch: Any) -> jax.Array:
    return 0.5 * jnp.mean((v - batch[1]) ** 2) + 1e-3 * jnp.sum(outer_params**2)


PROBLEM = fb.FunctionalProblem(inner_objective, outer_objective)


def batches(size: int) -> tuple[Any, Any]:
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    x_P, x_Q = jax.random.normal(k1, (size, INPUTS)), jax.random.normal(k2, (size, INPUTS))
    return (x_P,), (x_Q, jnp.sin(x_Q[:, :1]) + 0.1 * jax.random.normal(k3, (size, OUTPUTS)))


def estimators(features: Callable[..., jax.Array], optimizer: Any, steps: int) -> dict[str, fb.Estimator]:
    return {
        "funcid-learned": fb.funcid(fb.learned_adjoint(optimizer, steps)),
        "funcid-linear": fb.funcid(fb.linear_adjoint(features, ridge=1e-3)),
        "aid-cg": fb.aid(fb.cg(steps, damping=1e-2)),
        "itd": fb.itd(steps),
        "alternating": fb.alternating(),
    }


def floor(
    model: fb.Model, optimizer: optax.GradientTransformation, steps: int, inner: Any, outer: Any
) -> Callable[..., Any]:
    """M = K = `steps` plain optax steps of both networks in bare scans, and one gradient of the outer objective."""

    def train(loss: Callable[[Any], jax.Array], carry: Any) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, opt_state = carry
            updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, carry, None, length=steps)[0]

    def run(outer_params: Any, prediction_carry: Any, adjoint_carry: Any, inner: Any, outer: Any) -> Any:
        def values(params: Any, x: jax.Array) -> jax.Array:
            return model.apply(params, (), x)[0]

        prediction_carry = train(lambda p: inner_objective(outer_params, values(p, inner[0]), inner), prediction_carry)
        adjoint_carry = train(
            lambda p: 0.5 * jnp.mean(values(p, inner[0]) ** 2) + jnp.mean(values(p, outer[0]) * outer[1]), adjoint_carry
        )
        gradient = jax.grad(lambda w, p: outer_objective(w, values(p, outer[0]), outer), argnums=(0, 1))(
            outer_params, prediction_carry[0]
        )
        return outer_params - 1e-3 * gradient[0], prediction_carry, adjoint_carry, gradient[1]

    return run


def measure(depth: int, width: int, batch: int, steps: int, repeats: int) -> fb.CostTable:
    """The floor and a whole outer step under each estimator, M = K = T = `steps`."""
    model, features = perceptron(depth, width)
    inner, outer = batches(batch)
    optimizer = optax.adam(1e-3, eps_root=1e-12)
    outer_params = jnp.zeros((INPUTS, OUTPUTS))
    carries = []
    for seed in (1, 2):
        params, _ = model.init(jax.random.key(seed), inner[0])
        carries.append((params, optimizer.init(params)))
    calls: dict[str, Any] = {
        "floor": (floor(model, optimizer, steps, inner, outer), (outer_params, *carries, inner, outer))
    }
    for name, estimator in estimators(features, optimizer, steps).items():
        solver = fb.bilevel(
            PROBLEM,
            model,
            estimator,
            inner_optimizer=optimizer,
            outer_optimizer=optax.sgd(1e-3),
            inner_steps=steps,
        )
        calls[name] = (solver, (solver.init(jax.random.key(1), outer_params, inner), inner, outer))
    return fb.measure_costs(calls, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="one network (depth 4, width 256, batch 512, 10 steps)")
    parser.add_argument("--depth", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--width", type=int, nargs="+", default=[256])
    parser.add_argument("--batch", type=int, nargs="+", default=[512])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20], help="M = K = T")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, help="append one JSON line per measurement to this file")
    args = parser.parse_args()
    sizes = ([4], [256], [512], [10]) if args.quick else (args.depth, args.width, args.batch, args.steps)
    cells = [(d, w, b, s) for d in sizes[0] for w in sizes[1] for b in sizes[2] for s in sizes[3]]
    for depth, width, batch, steps in cells:
        print(f"\ndepth {depth}, width {width}, batch {batch}, M = K = T = {steps}; ratio: to the floor", flush=True)
        table = measure(depth, width, batch, steps, args.repeats)
        print(table, flush=True)
        settings = {"depth": depth, "width": width, "batch": batch, "steps": steps, "repeats": args.repeats}
        for row in table.rows if args.output else ():
            metrics = {k: v for k, v in row._asdict().items() if k != "name" and v is not None}
            _records.append(args.output, _records.record("cost", row.name, 0, settings, metrics, row.seconds))


if __name__ == "__main__":
    main()
