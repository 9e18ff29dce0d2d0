"""Few-shot regression by implicit MAML: a network that adapts to a new sinusoid from ten of its points.

python examples/few_shot.py
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import funcbilevel as fb

TASKS, SAMPLES, WIDTH = 25, 10, 40


def network(theta: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x[..., None] * theta["w1"] + theta["b1"])
    return jnp.tanh(h @ theta["w2"] + theta["b2"]) @ theta["v"]


def sinusoids(key: jax.Array) -> tuple[Any, Any]:
    """Points to adapt to and points to predict, each [tasks, samples]."""
    a, p, x = jax.random.split(key, 3)
    amplitude, phase = jax.random.uniform(a, (TASKS, 1), minval=0.5, maxval=2.0), 3 * jax.random.uniform(p, (TASKS, 1))
    x = jax.random.uniform(x, (2, TASKS, SAMPLES), minval=-3.0, maxval=3.0)
    return tuple((x, amplitude * jnp.sin(x + phase)) for x in x)


def error(theta: Any, batch: Any) -> jax.Array:
    return jnp.mean(jax.vmap(lambda theta, x, y: jnp.mean((network(theta, x) - y) ** 2))(theta, *batch))


def adapt(omega: Any, theta: Any, batch: Any) -> jax.Array:
    """The loss of networks that stay near omega, from where they start."""
    near = optax.tree.norm(jax.tree.map(lambda t, w: t - w, theta, omega), squared=True)
    return error(theta, batch) + 0.5 * near / TASKS


def main() -> None:
    """Prints the error after adaptation on tasks not seen before."""
    problem = fb.ParametricProblem(adapt, lambda omega, theta, batch: error(theta, batch))
    layer, optimizer = fb.argmin(problem, None, fb.aid(fb.cg(10))), optax.adam(1e-2)

    def adapted_error(omega: Any, support: Any, query: Any) -> jax.Array:
        def descend(_: int, theta: Any) -> Any:
            return jax.tree.map(lambda t, g: t - 0.5 * g, theta, jax.grad(adapt, argnums=1)(omega, theta, support))

        theta = jax.lax.fori_loop(0, 30, descend, jax.tree.map(lambda w: jnp.stack([w] * TASKS), omega))
        return error(layer(omega, theta, support), query)

    @jax.jit
    def step(omega: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(adapted_error)(omega, *sinusoids(key)), state)
        return optax.apply_updates(omega, updates), state

    shapes = {"w1": (WIDTH,), "b1": (WIDTH,), "w2": (WIDTH, WIDTH), "b2": (WIDTH,), "v": (WIDTH,)}
    keys = jax.random.split(jax.random.key(0), 300)
    omega = {n: jax.random.normal(k, s) / WIDTH ** (n in "w2v" and 0.5) for k, (n, s) in zip(keys, shapes.items())}
    state, test = optimizer.init(omega), sinusoids(jax.random.key(1))
    print(f"before: {adapted_error(omega, *test):.2f}")
    for key in keys:
        omega, state = step(omega, state, key)
    print(f"after {len(keys)} outer steps: {adapted_error(omega, *test):.2f}")


if __name__ == "__main__":
    main()
