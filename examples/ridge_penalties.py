"""One ridge penalty per feature, learned on validation data: a parametric problem without a model

Thirty features, of which five matter, and sixty samples. AID differentiates implicitly, ITD through the last ten inner
steps: the estimator is the only difference.
"""

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import funcbilevel as fb

FEATURES, RELEVANT, SAMPLES = 30, 5, 60


def data(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A linear regression in which only the first features matter."""
    key_x, key_noise = jax.random.split(key)
    x = jax.random.normal(key_x, (SAMPLES, FEATURES))
    return x, jnp.sum(x[:, :RELEVANT], axis=1) + 0.5 * jax.random.normal(key_noise, (SAMPLES,))


def squared_error(weights: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, y = batch
    return jnp.mean((x @ weights - y) ** 2)


def inner_objective(log_penalties: jax.Array, weights: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    return squared_error(weights, batch) + jnp.sum(jnp.exp(log_penalties) * weights**2)


def outer_objective(log_penalties: jax.Array, weights: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    del log_penalties  # validation data decide, without penalty
    return squared_error(weights, batch)


def main(num_outer_steps: int = 500) -> None:
    """Trains with AID and with ITD, prints the loss on test data, and draws the penalties found."""
    train, validation, test = (data(jax.random.key(seed)) for seed in range(3))
    least_squares, *_ = jnp.linalg.lstsq(*train)
    print(f"least squares: test error {squared_error(least_squares, test):.3f}; the noise alone gives 0.25")
    axes = (figure := Figure(figsize=(6, 3.3), layout="constrained")).subplots()
    for (name, estimator), marker in zip({"AID": fb.aid(fb.cg(10)), "ITD": fb.itd(10)}.items(), "os"):
        solver = fb.bilevel(
            fb.ParametricProblem(inner_objective, outer_objective),
            None,
            estimator,
            inner_optimizer=optax.adam(0.03),
            outer_optimizer=optax.adam(0.05),
            inner_steps=10,
        )
        state = solver.init(jax.random.key(0), jnp.full(FEATURES, -2.0), train, jnp.zeros(FEATURES))
        state, _ = fb.train(solver, state, lambda key, step: (train, validation), num_outer_steps)
        penalties = jnp.exp(state.outer_params)
        print(
            f"{name}: test error {squared_error(state.inner_params, test):.3f}; median penalty "
            f"{jnp.median(penalties[:RELEVANT]):.2g} on the relevant features, "
            f"{jnp.median(penalties[RELEVANT:]):.2g} on the others"
        )
        axes.semilogy(range(1, FEATURES + 1), penalties, marker, mfc="none", label=name)
    axes.axvspan(0.5, RELEVANT + 0.5, color="0.9", label="features that matter")
    axes.set(xlabel="number of the feature", ylabel="learned penalty")
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig("ridge_penalties.png", dpi=110)


if __name__ == "__main__":
    main()
