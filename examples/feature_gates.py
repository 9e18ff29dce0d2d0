"""Feature gates: a follower closes the gates of columns that the leader's classifier can do without

The leader fits a logistic regression on gated columns, the follower pays a price for every open gate. The columns that
are left are refitted without gates, and stand beside those that a lasso picks.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

import funcbilevel as fb

PRICES = np.geomspace(1e-3, 0.1, 8).astype(np.float32)


def logistic_loss(leader: Any, gates: jax.Array, batch: Any) -> jax.Array:
    logits = batch["x"] * jax.nn.sigmoid(gates) @ leader["w"] + leader["b"]
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, batch["y"]))


def inner_objective(leader: Any, gates: jax.Array, batch: Any) -> jax.Array:
    return logistic_loss(leader, gates, batch) + jnp.sum(batch["price"] * jax.nn.sigmoid(gates) + 1e-4 * gates**2)


def outer_objective(leader: Any, gates: jax.Array, batch: Any) -> jax.Array:
    return logistic_loss(leader, gates, batch) + 1e-3 * jnp.sum(leader["w"] ** 2)


def batches(batch: Any, key: jax.Array, step: jax.Array) -> Any:
    return batch, batch


def main(num_outer_steps: int = 1000) -> None:
    """Prints the columns kept and the accuracy of each price, and draws them beside the lasso's."""
    x, y = load_breast_cancer(return_X_y=True)
    x, x_test, y, y_test = train_test_split((x - x.mean(0)) / x.std(0), y, test_size=1 / 3, random_state=0)

    def refitted(kept: np.ndarray) -> tuple[int, float]:
        if not kept.any():
            return 0, max(y_test.mean(), 1 - y_test.mean())
        return int(kept.sum()), LogisticRegression().fit(x[:, kept], y).score(x_test[:, kept], y_test)

    solver = fb.bilevel(
        fb.ParametricProblem(inner_objective, outer_objective),
        None,
        fb.aid(fb.cg(10, damping=1e-2)),
        inner_optimizer=optax.adam(0.03),
        outer_optimizer=optax.adam(0.01),
        inner_steps=5,
    )
    gates = []
    for price in PRICES:
        batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32), "price": jnp.asarray(price)}
        state = solver.init(jax.random.key(0), {"w": jnp.zeros(30), "b": jnp.zeros(())}, batch, jnp.ones(30))
        state, _ = fb.train(solver, state, jax.tree_util.Partial(batches, batch), num_outer_steps)
        gates.append(refitted(np.asarray(state.inner_params > 0)))
        print(f"price {price:.3f}: {gates[-1][0]} columns, test accuracy {gates[-1][1]:.3f}")
    lasso = partial(LogisticRegression, l1_ratio=1.0, solver="liblinear", random_state=0)
    others = [refitted(lasso(C=c).fit(x, y).coef_[0] != 0) for c in np.geomspace(3e-3, 1.0, 10)]
    print("lasso: " + ", ".join(f"{count} columns {accuracy:.3f}" for count, accuracy in sorted(set(others))))

    axes = (figure := Figure(figsize=(6, 3.5), layout="constrained")).subplots()
    axes.axhline(refitted(np.ones(30, bool))[1], color="0.6", label="all 30 columns")
    axes.plot(*np.transpose(others), "s", mfc="none", ms=9, color="C1", label="lasso")
    axes.plot(*np.transpose(gates), "o", color="C0", label="gates")
    axes.set(xlabel="number of columns kept", ylabel="test accuracy, refitted", xticks=range(0, 31, 5))
    axes.legend(loc="lower right")
    figure.savefig("feature_gates.png", dpi=110)


if __name__ == "__main__":
    main()
