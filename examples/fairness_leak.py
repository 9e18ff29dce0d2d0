"""Fairness by two players in one network, with and without the leak of the public code

The leader owns the hidden layer and minimises the classification loss, the follower owns the last layer and minimises
the gap between two groups' mean scores. In public code the leader's gradient holds the follower's as well: a leak. It
gives most of the fairness, as a frozen follower shows. Without it the follower pays with accuracy.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import funcbilevel as fb

WEIGHT = 10.0


def data(key: jax.Array, n: int = 2000) -> tuple[jax.Array, ...]:
    """Features, labels, groups; the groups differ in how often the label is 1, and in two of the features."""
    a, b, c = jax.random.split(key, 3)
    group = jax.random.bernoulli(a, 0.5, (n,)) * 1.0
    x = jax.random.normal(b, (n, 8)).at[:, :2].add(0.7 * group[:, None])
    y = jax.random.bernoulli(c, jax.nn.sigmoid(2.0 * x[:, 0] + 2.0 * x[:, 2] * x[:, 3] + x[:, 4] - 0.7)) * 1.0
    return x, y, group


def gap(values: jax.Array, group: jax.Array) -> jax.Array:
    return jnp.abs(jnp.mean(values * group) / jnp.mean(group) - jnp.mean(values * (1 - group)) / jnp.mean(1 - group))


def logits(hidden: Any, last: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ hidden["w"] + hidden["b"]) @ last["w"] + last["b"]


def objective(of_labels: float, of_gap: float) -> Any:
    """A weighted sum of the classification loss and the squared gap, with the gap as metric."""

    def value(hidden: Any, last: Any, batch: Any) -> tuple[jax.Array, Any]:
        x, y, group = batch
        loss = jnp.mean(optax.sigmoid_binary_cross_entropy(logits(hidden, last, x), y))
        of_scores = gap(jax.nn.sigmoid(logits(hidden, last, x)), group)
        return of_labels * loss + of_gap * of_scores**2, {"gap": of_scores}

    return value


def main(num_outer_steps: int = 1500) -> None:
    """Prints accuracies and gaps on test data, and draws the gap during training."""
    train, test = data(jax.random.key(0)), data(jax.random.key(1))
    hidden = {"w": jax.random.normal(jax.random.key(2), (8, 32)) / 8**0.5, "b": jnp.zeros(32)}
    last = {"w": jax.random.normal(jax.random.key(3), (32,)) / 32**0.5, "b": jnp.zeros(())}
    adam, sgd, frozen = optax.adam(3e-3), optax.sgd(0.01), optax.set_to_zero()
    runs = {  # objectives of follower and leader, the follower's optimizer
        "leak": (objective(0, WEIGHT), objective(1, WEIGHT), sgd, "C1-"),
        "leak, follower frozen": (objective(0, WEIGHT), objective(1, WEIGHT), frozen, "C1--"),
        "no leak": (objective(0, WEIGHT), objective(1, 0), sgd, "C0-"),
        "classification alone": (objective(1, 0), objective(1, 0), adam, "k:"),
    }
    axes = (figure := Figure(figsize=(6.6, 3.5), layout="constrained")).subplots()
    for name, (follower, leader, optimizer, style) in runs.items():
        problem = fb.ParametricProblem(follower, leader, has_aux=True)
        solver = fb.bilevel(problem, None, fb.alternating(), inner_optimizer=optimizer, outer_optimizer=adam)
        state = solver.init(jax.random.key(4), hidden, train, last)
        state, metrics = fb.train(solver, state, lambda key, step: (train, train), num_outer_steps)
        scores = logits(state.outer_params, state.inner_params, test[0])
        gaps = gap(scores > 0, test[2]), gap(jax.nn.sigmoid(scores), test[2])
        accuracy = jnp.mean((scores > 0) == test[1])
        print(f"{name}: accuracy {accuracy:.3f}, gap of decisions {gaps[0]:.3f}, of scores {gaps[1]:.3f}")
        axes.plot(metrics["outer/gap"], style, label=name)
    axes.set(xlabel="outer step", ylabel="gap of the groups' mean scores", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=4, fontsize="small")
    figure.savefig("fairness_leak.png", dpi=110)


if __name__ == "__main__":
    main()
