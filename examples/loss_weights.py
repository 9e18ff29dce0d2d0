"""Learned loss weights: which of four other tasks help the one that matters

One linear model is fitted to a weighted sum of five tasks' losses. The main task has few samples; two others are like
it, two are not. The outer level chooses the weights for validation data of the main task.
"""

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import funcbilevel as fb

FEATURES, SAMPLES, NOISE = 30, 20, 0.5
TASKS = ("main", "related 1", "related 2", "unrelated 1", "unrelated 2")

Batch = tuple[jax.Array, jax.Array]


def draw(key: jax.Array, truth: jax.Array, n: int) -> Batch:
    x = jax.random.normal(key, (n, FEATURES))
    return x, x @ truth + NOISE * jax.random.normal(jax.random.fold_in(key, 1), (n,))


def error(theta: jax.Array, batch: Batch) -> jax.Array:
    x, y = batch
    return jnp.mean((x @ theta - y) ** 2)


def inner_objective(logits: jax.Array, theta: jax.Array, tasks: Batch) -> jax.Array:
    losses = jax.vmap(error, in_axes=(None, 0))(theta, tasks)
    return jnp.vdot(jax.nn.softmax(logits), losses) + 1e-2 * jnp.sum(theta**2)


@jax.jit
def fit(weights: jax.Array, tasks: Batch) -> jax.Array:
    """The inner solution in closed form, for the comparison."""
    x, y = tasks
    gram = jnp.einsum("t,tni,tnj->ij", weights, x, x) / SAMPLES + 1e-2 * jnp.eye(FEATURES)
    return jnp.linalg.solve(gram, jnp.einsum("t,tni,tn->i", weights, x, y) / SAMPLES)


def main(num_outer_steps: int = 400) -> None:
    """Prints errors on test data of the main task, and draws the weights."""
    keys = jax.random.split(jax.random.key(0), 12)
    truth = jax.random.normal(keys[0], (FEATURES,)) / FEATURES**0.5
    near = [truth + 0.3 * jax.random.normal(key, (FEATURES,)) / FEATURES**0.5 for key in keys[1:3]]
    far = [2.0 * jax.random.normal(key, (FEATURES,)) / FEATURES**0.5 for key in keys[3:5]]
    tasks = [draw(key, theta, SAMPLES) for key, theta in zip(keys[5:], [truth, *near, *far])]
    train = jax.tree.map(lambda *a: jnp.stack(a), *tasks)  # [tasks, samples, ...]
    validation, test = draw(keys[10], truth, 40), draw(keys[11], truth, 2000)

    solver = fb.bilevel(
        fb.ParametricProblem(inner_objective, lambda logits, theta, batch: error(theta, batch)),
        None,
        fb.aid(fb.cg(FEATURES)),
        inner_optimizer=optax.sgd(0.1, momentum=0.9),
        outer_optimizer=optax.adam(0.02),
        inner_steps=20,
    )
    trace = [jnp.full(5, 0.2)]
    state = solver.init(jax.random.key(1), jnp.zeros(5), train, fit(trace[0], train))
    data = lambda key, step: (train, validation)  # noqa: E731
    keep = lambda state, metrics: trace.append(jax.nn.softmax(state.outer_params))  # noqa: E731
    fb.train(solver, state, data, num_outer_steps, chunk=10, callback=keep)
    choices = {"main task alone": jax.nn.one_hot(0, 5), "equal weights": trace[0], "learned": trace[-1]}
    for name, weights in choices.items():
        print(f"{name}: test error {error(fit(weights, train), test):.2f}; the noise alone gives {NOISE**2}")

    axes = (figure := Figure(figsize=(6, 3.3), layout="constrained")).subplots()
    for name, weights, style in zip(TASKS, jnp.stack(trace, axis=1), ("k-", "C0-", "C0--", "C1-", "C1--")):
        axes.plot(10 * jnp.arange(len(weights)), weights, style, label=name)
    axes.set(xlabel="outer step", ylabel="weight of the task's loss", ylim=(0, None))
    figure.legend(loc="outside right upper")
    figure.savefig("loss_weights.png", dpi=110)


if __name__ == "__main__":
    main()
