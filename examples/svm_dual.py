"""The regularisation of a multiclass support vector machine, by its dual: one simplex constraint per sample.

python examples/svm_dual.py
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_iris
from sklearn.model_selection import train_test_split

import funcbilevel as fb


def primal(log_penalty: jax.Array, beta: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Weights [features, classes] from the dual variables beta [samples, classes], whose rows are on the simplex."""
    return x.T @ (y - beta) / jnp.exp(log_penalty)


def inner_objective(log_penalty: jax.Array, beta: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The negative dual of Crammer and Singer's machine, per sample."""
    x, y = batch
    weights = primal(log_penalty, beta, x, y)
    return (0.5 * jnp.exp(log_penalty) * jnp.sum(weights**2) - jnp.vdot(beta, 1.0 - y)) / len(x)


def projection(beta: jax.Array, log_penalty: jax.Array, step_size: float) -> jax.Array:
    return jax.vmap(optax.projections.projection_simplex)(beta)


def main() -> None:
    """Learns the penalty on validation data, and prints what it does there."""
    x, y = load_iris(return_X_y=True)
    x = jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32)
    x = jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1)
    x, x_val, y, y_val = train_test_split(x, jax.nn.one_hot(y, 3), test_size=0.5, random_state=0)

    def outer_objective(log_penalty: jax.Array, beta: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = batch[0] @ primal(log_penalty, beta, x, y)
        return jnp.mean(optax.softmax_cross_entropy(logits, batch[1]))

    solver = fb.bilevel(
        fb.ParametricProblem(inner_objective, outer_objective),
        None,
        fb.prox_aid(fb.cg(50), projection, step_size=0.5),
        inner_optimizer=fb.proximal(optax.sgd(0.5, momentum=0.9, nesterov=True), projection, step_size=0.5),
        outer_optimizer=optax.adam(0.1),
        inner_steps=200,
    )
    state = solver.init(jax.random.key(0), jnp.log(30.0), (x, y), jnp.full(y.shape, 1 / 3))
    state, metrics = fb.train(solver, state, lambda key, step: ((x, y), (x_val, y_val)), num_outer_steps=60)
    for step in (0, -1):
        print(f"validation loss {metrics['outer_objective'][step]:.3f}", end="; ")
    print(f"penalty {jnp.exp(state.outer_params):.2f}, {metrics['active_set_size'][-1]} dual variables can move")


if __name__ == "__main__":
    main()
