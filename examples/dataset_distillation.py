"""Dataset distillation: ten pictures that stand for a thousand

The inner level trains a classifier on ten pictures, the outer level draws the pictures such that the classifier does
well on a thousand others. The baselines train on one real picture, and on the mean picture, of each digit.
"""

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import funcbilevel as fb

LABELS = jnp.arange(10)


def cross_entropy(weights: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x @ weights, y))


def inner_objective(pictures: jax.Array, weights: jax.Array, batch: None) -> jax.Array:
    return cross_entropy(weights, pictures, LABELS) + 1e-2 * jnp.sum(weights**2)


def outer_objective(pictures: jax.Array, weights: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    return cross_entropy(weights, *batch)


@jax.jit
def fit(x: jax.Array, y: jax.Array) -> jax.Array:
    def loss(weights: jax.Array) -> jax.Array:
        return cross_entropy(weights, x, y) + 1e-2 * jnp.sum(weights**2)

    return jax.lax.fori_loop(0, 500, lambda i, w: w - 0.5 * jax.grad(loss)(w), jnp.zeros((64, 10)))


def main(num_outer_steps: int = 500) -> None:
    """Prints the accuracies on test data of classifiers trained on few pictures, and draws the pictures."""
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16.0, jnp.float32), jnp.asarray(y)
    train, test = (x[:1000], y[:1000]), (x[1000:], y[1000:])
    of_label = jax.nn.one_hot(train[1], 10).T  # [10, 1000]
    means = of_label @ train[0] / of_label.sum(axis=1, keepdims=True)
    draws = jax.random.categorical(jax.random.key(0), jnp.log(of_label), shape=(20, 10))  # one picture of each digit

    solver = fb.bilevel(
        fb.ParametricProblem(inner_objective, outer_objective),
        None,
        fb.aid(fb.cg(30)),
        inner_optimizer=optax.sgd(0.5, momentum=0.9),
        outer_optimizer=optax.chain(optax.adam(0.01), optax.keep_params_nonnegative()),
        inner_steps=20,
    )
    state = solver.init(jax.random.key(1), means, None, jnp.zeros((64, 10)))
    state, _ = fb.train(solver, state, lambda key, step: (None, train), num_outer_steps)

    def accuracy(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(jnp.argmax(test[0] @ fit(x, y), axis=1) == test[1])

    real = jnp.mean(jax.vmap(lambda rows: accuracy(train[0][rows], LABELS))(draws))
    print(f"ten real pictures: test accuracy {real:.3f}, mean of 20 draws")
    print(f"ten mean pictures: {accuracy(means, LABELS):.3f}")
    print(f"ten distilled pictures: {accuracy(state.outer_params, LABELS):.3f}")
    print(f"all thousand: {accuracy(*train):.3f}")

    figure = Figure(figsize=(7, 2.4), layout="constrained")
    shown = {"real": train[0][draws[0]], "mean": means, "distilled": state.outer_params}
    for row, (name, pictures) in zip(figure.subplots(3, 10), shown.items()):
        row[0].set_ylabel(name)
        for axes, picture in zip(row, pictures):
            axes.imshow(picture.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
    figure.savefig("dataset_distillation.png", dpi=110)


if __name__ == "__main__":
    main()
