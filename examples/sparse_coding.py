"""Sparse coding for a task: a dictionary learned through the lasso, so that a classifier on the codes does well.

python examples/sparse_coding.py
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import funcbilevel as fb

ATOMS, PENALTY, STEP_SIZE = 24, 0.1, 0.04


def data() -> dict[str, jax.Array]:
    """Digits 3 and 8, each picture of norm one."""
    digits = load_digits()
    kept = (digits.target == 3) | (digits.target == 8)
    x = jnp.asarray(digits.data[kept], jnp.float32)
    x, y = x / jnp.linalg.norm(x, axis=1, keepdims=True), jnp.where(digits.target[kept] == 8, 1.0, -1.0)
    return {"x": x[:200], "y": y[:200]}


def inner_objective(omega: dict[str, jax.Array], codes: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    return 0.5 * jnp.sum((codes @ unit(omega["dictionary"]) - batch["x"]) ** 2)


def outer_objective(omega: dict[str, jax.Array], codes: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    return jnp.mean(jax.nn.softplus(-batch["y"] * (codes @ omega["classifier"]))) + 1e-3 * optax.tree.norm(omega) ** 2


def unit(dictionary: jax.Array) -> jax.Array:
    return dictionary / jnp.linalg.norm(dictionary, axis=1, keepdims=True)


def prox(codes: jax.Array, omega: dict[str, jax.Array], step_size: float) -> jax.Array:
    return fb.prox_l1(codes, step_size * PENALTY)


def main() -> None:
    """Trains the dictionary and the classifier together."""
    train = data()
    solver = fb.bilevel(
        fb.ParametricProblem(inner_objective, outer_objective),
        None,
        fb.prox_aid(fb.cg(30), prox, STEP_SIZE),
        inner_optimizer=fb.proximal(optax.sgd(STEP_SIZE), prox, STEP_SIZE),
        outer_optimizer=optax.adam(0.02),
        inner_steps=20,
    )
    omega = {"dictionary": train["x"][:ATOMS], "classifier": jnp.zeros(ATOMS)}
    state = solver.init(jax.random.key(0), omega, train, jnp.zeros((len(train["x"]), ATOMS)))
    state, metrics = fb.train(solver, state, lambda key, step: (train, train), num_outer_steps=300)
    print(
        f"training loss {metrics['outer_objective'][0]:.3f} at first, {metrics['outer_objective'][-1]:.3f} in the end"
    )
    print(f"{metrics['active_set_size'][-1] / len(train['x']):.1f} of {ATOMS} atoms in a code")


if __name__ == "__main__":
    main()
