"""A small world model that learns what matters: values against likelihood

Of five quantities only the first decides the reward, and the model has too few hidden units for all. By likelihood it
spends them on what varies most; by values, computed inside it and compared with observed returns, on what matters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import funcbilevel as fb

SIZES = {"a": (5, 3), "b": (3,), "c": (3, 5)}  # of the model: five quantities, three hidden units
DISCOUNT, CENTRES, DECAY = 0.9, jnp.linspace(-2.0, 2.0, 16), 1e-5


def world(s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The next state and the reward: a slow double well in the first quantity, and a loud, turning rest."""
    rest = 2.0 * jnp.tanh(jnp.roll(s[..., 1:], 1, axis=-1) * jnp.array([2.0, -2.0, 2.0, 2.0]))
    following = jnp.concatenate([s[..., :1] + 0.3 * jnp.sin(3.0 * s[..., :1]), rest], axis=-1)
    return following, jnp.exp(-2.0 * (s[..., 0] - 1.0) ** 2)


def draw(key: jax.Array, n: int) -> Any:
    s = jax.random.uniform(key, (n, 5), minval=-2.0, maxval=2.0)
    _, rewards = jax.lax.scan(lambda s, _: world(s), s, length=100)  # returns are observed discounted sums of them
    return s, *world(s), DISCOUNT ** jnp.arange(100) @ rewards


def model_step(omega: Any, s: jax.Array) -> jax.Array:
    return s + jnp.tanh(s @ omega["a"] + omega["b"]) @ omega["c"]


def features(s: jax.Array) -> jax.Array:
    return jnp.exp(-(((s[..., :1] - CENTRES) / 0.3) ** 2))


def differences(omega: Any, s: jax.Array) -> jax.Array:
    return features(s) - DISCOUNT * features(model_step(omega, s))


def bellman_error(omega: Any, theta: jax.Array, batch: Any) -> jax.Array:
    return jnp.mean((differences(omega, batch[0]) @ theta - batch[2]) ** 2) + DECAY * jnp.sum(theta**2)


def values(omega: Any, key: Any, batch: Any) -> jax.Array:
    d, n = differences(omega, batch[0]), len(batch[0])
    return jnp.linalg.solve(d.T @ d / n + DECAY * jnp.eye(16), d.T @ batch[2] / n)  # the minimiser of bellman_error


def main(num_outer_steps: int = 1500) -> None:
    """Prints both models' errors on test data, and draws the values computed inside them."""
    state_error = lambda omega, theta, batch: jnp.mean((model_step(omega, batch[0]) - batch[1]) ** 2)  # noqa: E731
    value_error = lambda omega, theta, batch: jnp.mean((features(batch[0]) @ theta - batch[3]) ** 2)  # noqa: E731
    keys = iter(jax.random.split(jax.random.key(0), 8))
    omega = {name: jax.random.normal(next(keys), shape) / 2 for name, shape in SIZES.items()}
    train, validation, test = (draw(next(keys), n) for n in (500, 500, 2000))
    line, closed, adam = jnp.linspace(-2.0, 2.0, 100)[:, None], optax.set_to_zero(), optax.adam(0.01)
    axes = (figure := Figure(figsize=(6, 3.6), layout="constrained")).subplots()
    axes.plot(test[0][:, 0], test[3], ".", color="0.7", label="in the world")
    runs = {"likelihood": (state_error, fb.alternating(), "C1--"), "values": (value_error, fb.aid(fb.cg(30)), "C0-")}
    for name, (outer_objective, estimator, style) in runs.items():  # the second model starts from the first
        problem = fb.ParametricProblem(bellman_error, outer_objective)
        solver = fb.bilevel(problem, None, estimator, inner_optimizer=closed, outer_optimizer=adam, inner_init=values)
        state = solver.init(jax.random.key(1), omega, train)
        omega = fb.train(solver, state, lambda key, step: (train, validation), num_outer_steps)[0].outer_params
        theta = values(omega, None, train)
        of_values, of_states = value_error(omega, theta, test), state_error(omega, theta, test)
        print(f"model by {name}: mean squared error of values {of_values:.2f}, of the next state {of_states:.2f}")
        axes.plot(line, features(line) @ theta, style, label=f"in the model by {name}")
    axes.set(xlabel="first quantity of the state", ylabel="value: discounted sum of rewards")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    figure.savefig("world_model.png", dpi=110)


if __name__ == "__main__":
    main()
