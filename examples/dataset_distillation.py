"""Ten pictures that stand for a thousand: a classifier trained on them alone is to do well on all the others.

python examples/dataset_distillation.py
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import funcbilevel as fb

LABELS = jnp.arange(10)


def cross_entropy(weights: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x @ weights, y))


def inner_objective(pictures: jax.Array, weights: jax.Array, batch: None) -> jax.Array:
    return cross_entropy(weights, pictures, LABELS) + 1e-2 * jnp.sum(weights**2)


def outer_objective(pictures: jax.Array, weights: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    return cross_entropy(weights, *batch)


def accuracy(weights: jax.Array, x: jax.Array, y: jax.Array) -> float:
    return float(jnp.mean(jnp.argmax(x @ weights, axis=1) == y))


def main() -> None:
    """Prints the accuracy on test data of a classifier trained on one real digit of each kind, and on the distilled."""
    digits = load_digits()
    x, y = jnp.asarray(digits.data / 16.0, jnp.float32), jnp.asarray(digits.target)
    train, test = (x[:1000], y[:1000]), (x[1000:], y[1000:])
    solver = fb.bilevel(
        fb.ParametricProblem(inner_objective, outer_objective),
        None,
        fb.aid(fb.cg(30)),
        inner_optimizer=optax.sgd(0.5, momentum=0.9),
        outer_optimizer=optax.adam(0.02),
        inner_steps=20,
    )
    first = jnp.stack([train[0][jnp.argmax(train[1] == label)] for label in LABELS])
    state = solver.init(jax.random.key(0), first, None, jnp.zeros((64, 10)))
    weights = jnp.zeros((64, 10))
    for _ in range(300):
        weights = weights - 0.5 * jax.grad(inner_objective, argnums=1)(first, weights, None)
    state, _ = fb.train(solver, state, lambda key, step: (None, train), num_outer_steps=300)
    print(f"trained on ten real pictures: {accuracy(weights, *test):.2f} on test data")
    print(f"trained on ten distilled ones: {accuracy(state.inner_params, *test):.2f}")


if __name__ == "__main__":
    main()
