"""Quick start: an effect that plain regression gets wrong, by FuncID on minibatches, in Flax Linen and in Flax NNX

Something unseen moves treatment x and outcome y; an instrument z moves x alone. The inner level fits h(z) = E[f(x) | z]
by a network, on a minibatch for each step; the outer level chooses f such that h(z) is near y.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx
from matplotlib.figure import Figure

import funcbilevel as fb

TRUTH = jnp.array([0.0, 1.2, 0.5, -0.3])  # coefficients of a cubic


class Network(linen.Module):
    def setup(self) -> None:
        self.hidden, self.head = linen.Dense(32), linen.Dense(1)

    def features(self, z: jax.Array) -> jax.Array:
        return jnp.tanh(self.hidden(z))

    def __call__(self, z: jax.Array) -> jax.Array:
        return self.head(self.features(z))[:, 0]


class NNXNetwork(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden, self.head = nnx.Linear(1, 32, rngs=rngs), nnx.Linear(32, 1, rngs=rngs)

    features, __call__ = Network.features, Network.__call__


def powers(x: jax.Array) -> jax.Array:
    return jnp.stack([x**0, x, x**2, x**3], axis=-1)


def sample(data: Any, key: jax.Array) -> Any:
    rows = jax.random.randint(key, (1024,), 0, len(data[1]))
    return jax.tree.map(lambda a: a[rows], data)


def batches(data: Any, key: jax.Array, step: jax.Array) -> Any:
    return fb.Sampler(jax.tree_util.Partial(sample, data)), sample(data, key)


def main(num_outer_steps: int = 1500) -> None:
    """Prints errors to the truth and draws the curves."""
    z, unseen, noise = jax.random.normal(jax.random.key(0), (3, 10_000))
    x = z + 0.5 * unseen
    data = (z[:, None], x, powers(x) @ TRUTH + 1.5 * unseen + 0.1 * noise)
    inner_objective = lambda omega, h, batch: jnp.mean((h - powers(batch[1]) @ omega) ** 2)  # noqa: E731
    problem = fb.FunctionalProblem(inner_objective, lambda omega, h, batch: jnp.mean((h - batch[2]) ** 2))
    runs = {"FuncID, Linen": (fb.from_linen, Network()), "FuncID, NNX": (fb.from_nnx, NNXNetwork(nnx.Rngs(0)))}
    found = {"least squares": jnp.linalg.lstsq(powers(x), data[2])[0]}
    outer = optax.adam(optax.cosine_decay_schedule(0.02, num_outer_steps))
    for name, (adapted, network) in runs.items():
        estimator = fb.funcid(fb.linear_adjoint(adapted(network, method="features"), ridge=1e-3))
        model, inner = adapted(network), optax.adam(3e-3)
        solver = fb.bilevel(problem, model, estimator, inner_optimizer=inner, outer_optimizer=outer, inner_steps=10)
        state = solver.init(jax.random.key(1), jnp.zeros(4), sample(data, jax.random.key(2)))
        found[name] = fb.train(solver, state, jax.tree_util.Partial(batches, data), num_outer_steps)[0].outer_params
    grid = jnp.linspace(-2.0, 2.0, 100)
    axes = (figure := Figure(figsize=(6, 3.5), layout="constrained")).subplots()
    axes.plot(grid, powers(grid) @ TRUTH, color="0.6", lw=4, label="truth")
    for (name, omega), style in zip(found.items(), (":", "--", "-.")):
        print(f"{name}: mean squared error to the truth {jnp.mean((powers(grid) @ (omega - TRUTH)) ** 2):.3f}")
        axes.plot(grid, powers(grid) @ omega, style, label=name)
    axes.set(xlabel="treatment x", ylabel="outcome caused, f(x)")
    axes.legend(loc="upper center")
    figure.savefig("quick_start.png", dpi=110)


if __name__ == "__main__":
    main()
