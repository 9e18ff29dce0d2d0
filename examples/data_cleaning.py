"""Data hyper-cleaning: a weight for each training sample, learned from a few samples with clean labels

Of 800 pictures of digits more than half have a wrong label. The inner level fits a classifier to weighted samples, the
outer level chooses the weights for a hundred clean samples. The baseline to beat trains on the clean samples alone.
"""

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import funcbilevel as fb

Batch = tuple[jax.Array, jax.Array]


def losses(theta: jax.Array, batch: Batch) -> jax.Array:
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(x @ theta, y)


def inner_objective(logits: jax.Array, theta: jax.Array, batch: Batch) -> jax.Array:
    return jnp.mean(jax.nn.sigmoid(logits) * losses(theta, batch)) + 1e-3 * jnp.sum(theta**2)


def outer_objective(logits: jax.Array, theta: jax.Array, batch: Batch) -> jax.Array:
    return jnp.mean(losses(theta, batch))


@jax.jit
def fit(weights: jax.Array, batch: Batch) -> jax.Array:
    def loss(theta: jax.Array) -> jax.Array:
        return jnp.sum(weights * losses(theta, batch)) / jnp.sum(weights) + 1e-3 * jnp.sum(theta**2)

    return jax.lax.fori_loop(0, 1000, lambda i, theta: theta - 0.5 * jax.grad(loss)(theta), jnp.zeros((64, 10)))


def main(num_outer_steps: int = 400) -> None:
    """Prints accuracies on test data and draws the weights."""
    x, y = load_digits(return_X_y=True)
    order = jax.random.permutation(jax.random.key(0), len(y))
    x, y = jnp.asarray(x / 16.0, jnp.float32)[order], jnp.asarray(y)[order]
    wrong = jax.random.bernoulli(jax.random.key(1), 0.55, (800,))
    noisy = (y[:800] + wrong * jax.random.randint(jax.random.key(2), (800,), 1, 10)) % 10
    train, clean, test = (x[:800], noisy), (x[800:900], y[800:900]), (x[900:], y[900:])

    solver = fb.bilevel(
        fb.ParametricProblem(inner_objective, outer_objective),
        None,
        fb.aid(fb.cg(20)),
        inner_optimizer=optax.sgd(0.5, momentum=0.9),
        outer_optimizer=optax.adam(0.1),
        inner_steps=20,
    )
    state = solver.init(jax.random.key(3), jnp.zeros(800), train, jnp.zeros((64, 10)))
    state, _ = fb.train(solver, state, lambda key, step: (train, clean), num_outer_steps)
    weights = jax.nn.sigmoid(state.outer_params)
    kept = weights > 0.5

    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), train, clean)
    for name, theta in {
        "all samples, equal weights": fit(jnp.ones(800), train),
        "clean samples alone": fit(jnp.ones(100), clean),
        "learned weights": fit(weights, train),
        "kept and clean samples": fit(jnp.concatenate([kept * 1.0, jnp.ones(100)]), both),
    }.items():
        print(f"{name}: test accuracy {jnp.mean(jnp.argmax(test[0] @ theta, axis=1) == test[1]):.3f}")
    print(f"wrong labels: {wrong.mean():.1%} of all samples, {wrong[kept].mean():.1%} of those with weight > 0.5")

    axes = (figure := Figure(figsize=(6, 3.3), layout="constrained")).subplots()
    axes.hist([weights[~wrong], weights[wrong]], bins=20, range=(0, 1), label=["right label", "wrong label"])
    axes.set(xlabel="learned weight", ylabel="number of training samples")
    axes.legend(loc="upper center")
    figure.savefig("data_cleaning.png", dpi=110)


if __name__ == "__main__":
    main()
