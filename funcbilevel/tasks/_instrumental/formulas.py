"""Ridge regression in closed form, which is the outer level's second stage, and Adam with an L2 penalty."""

import jax
import jax.numpy as jnp
import optax


def ridge_regression(features: jax.Array, y: jax.Array, ridge: float) -> jax.Array:
    """u, [p], that minimises E (y - u'features)^2 + ridge |u|^2 for features [n, p], in closed form."""
    gram = features.T @ features / len(y) + ridge * jnp.eye(features.shape[1], dtype=features.dtype)
    return jax.scipy.linalg.solve(gram, features.T @ y / len(y), assume_a="pos")


def ridge_objective(features: jax.Array, y: jax.Array, ridge: float) -> jax.Array:
    """E (y - u'features)^2 + ridge |u|^2 at its minimum over u."""
    u = ridge_regression(features, y, ridge)
    return jnp.mean((y - features @ u) ** 2) + ridge * jnp.sum(u**2)


def with_constant(h: jax.Array) -> jax.Array:
    """[h, 1], [n, k + 1]."""
    return jnp.hstack([h, jnp.ones((len(h), 1), h.dtype)])


def adam(learning_rate: optax.ScalarOrSchedule, l2: float) -> optax.GradientTransformation:
    """Adam on the objective plus l2/2 |parameters|^2. eps is small because the objectives are means, not sums."""
    return optax.chain(optax.add_decayed_weights(l2), optax.adam(learning_rate, eps=1e-11, eps_root=1e-20))
