"""A solution that SciPy finds, with derivatives of any order: prices at which supply meets demand.

python examples/custom_root.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

import funcbilevel as fb

CROSS = np.array([[1.0, -0.3, 0.1], [0.2, 1.0, -0.4], [-0.1, 0.3, 1.0]])  # what each price does to each demand


def excess_demand(log_prices: jax.Array, taxes: jax.Array) -> jax.Array:
    """Zero at the equilibrium; its Jacobian is not symmetric."""
    demand = jnp.exp(1.0 - CROSS @ (log_prices + taxes))
    return demand - jnp.exp(0.5 * log_prices)


@fb.custom_root(excess_demand)
def equilibrium(init: jax.Array, taxes: jax.Array) -> jax.Array:
    """Plain NumPy and SciPy: never differentiated."""

    def solve(init: np.ndarray, taxes: np.ndarray) -> np.ndarray:
        prices = optimize.root(lambda p: np.exp(1.0 - CROSS @ (p + taxes)) - np.exp(0.5 * p), init, tol=1e-10).x
        return prices.astype(init.dtype)

    shape = jax.ShapeDtypeStruct(init.shape, init.dtype)
    return jax.pure_callback(solve, shape, init, taxes, vmap_method="sequential")


def revenue(taxes: jax.Array) -> jax.Array:
    log_prices = equilibrium(jnp.zeros(3), taxes)
    return jnp.sum((jnp.exp(taxes) - 1.0) * jnp.exp(log_prices + 0.5 * log_prices))


def main() -> None:
    """Prices, how they move with taxes, and how the revenue of the taxes does."""
    taxes = jnp.full(3, 0.1)
    print("log prices", equilibrium(jnp.zeros(3), taxes).round(3))
    print("their derivative by the taxes", jax.jacobian(equilibrium, argnums=1)(jnp.zeros(3), taxes).round(3), sep="\n")
    print("second derivatives of the revenue", jax.hessian(revenue)(taxes).round(3), sep="\n")


if __name__ == "__main__":
    main()
