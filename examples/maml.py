"""MAML and iMAML on sinusoids: a network that learns a new one from ten of its points

Every outer step brings 25 new sinusoids. MAML differentiates through five inner steps back to their start, which the
outer level has learned. iMAML pulls the inner solution towards that start, and differentiates implicitly: its
memory does not grow with the inner steps. Its inner problem asks for more steps, and is not quite solved by them.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import funcbilevel as fb

TASKS, SAMPLES, WIDTH, PULL = 25, 10, 40, 0.3


def network(theta: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ theta["a"] + theta["b"])
    return jnp.tanh(h @ theta["c"] + theta["d"]) @ theta["e"]


def initial(key: jax.Array) -> Any:
    shapes = {"a": (1, WIDTH), "b": (WIDTH,), "c": (WIDTH, WIDTH), "d": (WIDTH,), "e": (WIDTH, 1)}
    keys = dict(zip(shapes, jax.random.split(key, 5)))
    return {name: jax.random.normal(keys[name], shape) / shape[0] ** 0.5 for name, shape in shapes.items()}


def sinusoids(key: jax.Array, step: Any = 0) -> tuple[Any, Any]:
    """Points to adapt to and points to predict, [tasks, samples, 1] each."""
    a, p, x = jax.random.split(key, 3)
    amplitude = jax.random.uniform(a, (TASKS, 1, 1), minval=0.5, maxval=5.0)
    phase = jax.random.uniform(p, (TASKS, 1, 1), maxval=jnp.pi)
    x = jax.random.uniform(x, (2, TASKS, SAMPLES, 1), minval=-5.0, maxval=5.0)
    return tuple((x, amplitude * jnp.sin(x - phase)) for x in x)


def error(thetas: Any, batch: Any) -> jax.Array:
    return jnp.mean((jax.vmap(network)(thetas, batch[0]) - batch[1]) ** 2)


def pulled(omega: Any, thetas: Any, batch: Any) -> jax.Array:
    apart = optax.tree.norm(jax.tree.map(lambda t, w: t - w, thetas, omega), squared=True)
    return TASKS * error(thetas, batch) + 0.5 * PULL * apart  # a sum: each task has its own gradient


def main(num_outer_steps: int = 1000) -> None:
    """Prints the error on new tasks after adaptation, and draws it by outer step."""
    warnings.filterwarnings("ignore", ".*not a stationary point")  # as said above
    inner = {"MAML": lambda omega, thetas, batch: TASKS * error(thetas, batch), "iMAML": pulled}
    estimators = {"MAML": (fb.itd(5), 5), "iMAML": (fb.aid(fb.cg(10), warm_start=False), 30)}
    optimizers = {"MAML": optax.sgd(0.02), "iMAML": optax.sgd(0.02, momentum=0.9)}
    axes = (figure := Figure(figsize=(6, 3.5), layout="constrained")).subplots()
    for (name, (estimator, inner_steps)), style in zip(estimators.items(), ("C0-", "C1--")):
        solver = fb.bilevel(
            fb.ParametricProblem(inner[name], lambda omega, thetas, batch: error(thetas, batch)),
            None,
            estimator,
            inner_optimizer=optimizers[name],
            outer_optimizer=optax.adam(3e-3),
            inner_steps=inner_steps,
            inner_init=lambda omega, key, batch: jax.tree.map(lambda w: jnp.stack([w] * TASKS), omega),
        )
        state = solver.init(jax.random.key(0), initial(jax.random.key(1)), sinusoids(jax.random.key(2))[0])
        _, metrics = fb.train(solver, state, sinusoids, num_outer_steps)
        errors = metrics["outer_objective"]
        window = max(1, num_outer_steps // 25)
        errors = errors[: len(errors) // window * window].reshape(-1, window).mean(axis=1)
        print(f"{name}: mean squared error on new tasks, first {errors[0]:.2f}, last {errors[-1]:.2f}")
        axes.plot(window * jnp.arange(1, len(errors) + 1), errors, style, label=f"{name}, {inner_steps} inner steps")
    axes.set(xlabel="outer step", ylabel="mean squared error after adaptation", ylim=(0, None))
    axes.legend(loc="upper right")
    figure.savefig("maml.png", dpi=110)


if __name__ == "__main__":
    main()
