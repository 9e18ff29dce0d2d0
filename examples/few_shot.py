"""Implicit layer: few-shot regression by implicit MAML, with the inner loop written by hand

A network adapts to a new sinusoid from ten points by gradient descent; `fb.argmin` gives the result its derivative.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import funcbilevel as fb

TASKS, SAMPLES, WIDTH = 25, 10, 80


def sinusoids(key: jax.Array) -> tuple[Any, Any]:
    a, p, x = jax.random.split(key, 3)
    amplitude, phase = jax.random.uniform(a, (TASKS, 1), minval=0.5, maxval=2.0), 3 * jax.random.uniform(p, (TASKS, 1))
    return tuple((x, amplitude * jnp.sin(x + phase)) for x in 6 * jax.random.uniform(x, (2, TASKS, SAMPLES)) - 3)


def error(theta: Any, batch: Any) -> jax.Array:
    w, b, v = (theta[name][:, :, None] for name in "wbv")  # [tasks, width, 1]
    return jnp.mean((jnp.sum(v * jnp.tanh(w * batch[0][:, None] + b), axis=1) - batch[1]) ** 2)


def adapt(omega: Any, theta: Any, batch: Any) -> jax.Array:
    return error(theta, batch) + 0.5 * optax.tree.norm(optax.tree.sub(theta, omega), squared=True) / TASKS


def main(num_outer_steps: int = 300) -> None:
    """Prints and draws the error after adaptation on tasks not seen before."""
    layer = fb.argmin(fb.ParametricProblem(adapt, lambda omega, theta, batch: 0.0), None, fb.aid(fb.cg(10)))
    optimizer = optax.adam(3e-3)

    @jax.jit
    @jax.value_and_grad
    def adapted_error(omega: Any, support: Any, query: Any) -> jax.Array:
        descend = lambda _, t: optax.tree.add_scale(t, -0.2, jax.grad(adapt, argnums=1)(omega, t, support))  # noqa: E731
        theta = jax.lax.fori_loop(0, 60, descend, jax.tree.map(lambda w: jnp.stack([w] * TASKS), omega))
        return error(layer(omega, theta, support), query)

    omega = dict(zip("wbv", jax.random.normal(jax.random.key(1), (3, WIDTH)) / jnp.array([[1], [1], [9]])))
    state, errors = optimizer.init(omega), []
    for number, key in enumerate(jax.random.split(jax.random.key(0), num_outer_steps), 1):
        value, gradient = adapted_error(omega, *sinusoids(key))
        updates, state = optimizer.update(gradient, state)
        omega, errors = optax.apply_updates(omega, updates), [*errors, float(value)]
        if number == 1 or number % 100 == 0:
            print(f"outer step {number}: error after adaptation {value:.2f}", flush=True)
    axes = (figure := Figure(figsize=(6, 3.3), layout="constrained")).subplots()
    axes.plot(range(1, len(errors) + 1), errors)
    axes.set(xlabel="outer step", ylabel="error after adaptation, new tasks", ylim=(0, None))
    figure.savefig("few_shot.png", dpi=110)


if __name__ == "__main__":
    main()
