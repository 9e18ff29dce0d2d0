"""Implicit layer with constraints: the regularisation of a multiclass support vector machine, by its dual

The dual variables of each sample lie on a simplex. `fb.prox_aid` differentiates through the projection, on the
variables that can move.
"""

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_iris
from sklearn.model_selection import train_test_split

import funcbilevel as fb


def primal(log_penalty: jax.Array, beta: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Weights [features, classes] from the dual variables beta [samples, classes], whose rows are on the simplex."""
    return x.T @ (y - beta) / jnp.exp(log_penalty)


def inner_objective(log_penalty: jax.Array, beta: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The negative dual of Crammer and Singer's machine, per sample."""
    weights = primal(log_penalty, beta, *batch)
    return (0.5 * jnp.exp(log_penalty) * jnp.sum(weights**2) - jnp.vdot(beta, 1.0 - batch[1])) / len(beta)


def projection(beta: jax.Array, log_penalty: jax.Array, step_size: float) -> jax.Array:
    return jax.vmap(optax.projections.projection_simplex)(beta)


def main(num_outer_steps: int = 60) -> None:
    """Learns the penalty on validation data; prints and draws what it does there."""
    x, y = load_iris(return_X_y=True)
    x = jnp.concatenate([jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32), jnp.ones((len(x), 1))], axis=1)
    x, x_val, y, y_val = train_test_split(x, jax.nn.one_hot(y, 3), test_size=0.5, random_state=0)

    def outer_objective(log_penalty: jax.Array, beta: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.mean(optax.softmax_cross_entropy(batch[0] @ primal(log_penalty, beta, x, y), batch[1]))

    estimator = fb.prox_aid(fb.cg(50), projection, step_size=0.5)
    inner = fb.proximal(optax.sgd(0.5, momentum=0.9, nesterov=True), projection, step_size=0.5)
    problem, outer = fb.ParametricProblem(inner_objective, outer_objective), optax.adam(0.1)
    solver = fb.bilevel(problem, None, estimator, inner_optimizer=inner, outer_optimizer=outer, inner_steps=200)
    state = solver.init(jax.random.key(0), jnp.log(30.0), (x, y), jnp.full(y.shape, 1 / 3))
    state, metrics = fb.train(solver, state, lambda key, step: ((x, y), (x_val, y_val)), num_outer_steps)
    loss, active = metrics["outer_objective"], metrics["active_set_size"]
    print(f"validation loss {loss[0]:.3f}, then {loss[-1]:.3f}; penalty {jnp.exp(state.outer_params):.2f}")
    print(f"dual variables that can move: {active[0]}, then {active[-1]}")
    for axes, values in zip((figure := Figure(figsize=(7.5, 3), layout="constrained")).subplots(1, 2), (loss, active)):
        axes.plot(values)
        axes.set(xlabel="outer step", ylabel="validation loss" if values is loss else "dual variables that can move")
    figure.savefig("svm_dual.png", dpi=110)


if __name__ == "__main__":
    main()
