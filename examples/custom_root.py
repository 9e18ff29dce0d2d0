"""Implicit layer: prices at which supply meets demand, found by SciPy, with derivatives of any order

Nothing in the solver is differentiated: the derivatives come from the equation that its solution satisfies.
"""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy import optimize

import funcbilevel as fb

CROSS = np.array([[1.0, -0.3, 0.1], [0.2, 1.0, -0.4], [-0.1, 0.3, 1.0]])  # what each price does to each demand


def excess_demand(log_prices: jax.Array, taxes: jax.Array) -> jax.Array:
    """Zero at the equilibrium; its Jacobian is not symmetric."""
    return jnp.exp(1.0 - CROSS @ (log_prices + taxes)) - jnp.exp(0.5 * log_prices)


@fb.custom_root(excess_demand)
def equilibrium(init: jax.Array, taxes: jax.Array) -> jax.Array:
    def solve(init: np.ndarray, taxes: np.ndarray) -> np.ndarray:
        prices = optimize.root(lambda p: np.exp(1.0 - CROSS @ (p + taxes)) - np.exp(0.5 * p), init, tol=1e-10).x
        return prices.astype(init.dtype)

    shape = jax.ShapeDtypeStruct(init.shape, init.dtype)
    return jax.pure_callback(solve, shape, init, taxes, vmap_method="sequential")


def revenue(taxes: jax.Array) -> jax.Array:
    log_prices = equilibrium(jnp.zeros(3), taxes)
    return jnp.sum((jnp.exp(taxes) - 1.0) * jnp.exp(1.5 * log_prices))


def main(num_points: int = 41) -> None:
    """Prices, how they move with taxes, and how the revenue of the taxes does."""
    taxes = jnp.full(3, 0.1)
    print("log prices", np.array(equilibrium(jnp.zeros(3), taxes)).round(3))
    derivative = jax.jacobian(equilibrium, argnums=1)(jnp.zeros(3), taxes)
    print("their derivative by the taxes", np.array(derivative).round(3), sep="\n")
    print("second derivatives of the revenue", np.array(jax.hessian(revenue)(taxes)).round(3), sep="\n")

    rates = jnp.linspace(0.0, 1.5, num_points)
    values, slopes = jax.lax.map(jax.value_and_grad(lambda rate: revenue(rate * jnp.ones(3))), rates)
    left, right = (figure := Figure(figsize=(7.5, 3.2), layout="constrained")).subplots(1, 2)
    left.plot(rates, values)
    left.set(xlabel="log tax factor, all goods", ylabel="revenue of the taxes")
    right.plot(rates, slopes, label="implicit derivative")
    right.plot(rates, jnp.gradient(values, rates), "k:", lw=2.5, label="finite differences")
    right.axhline(0.0, color="0.7", lw=1)
    right.set(xlabel="log tax factor, all goods", ylabel="derivative of the revenue")
    right.legend(loc="upper right")
    figure.savefig("custom_root.png", dpi=110)


if __name__ == "__main__":
    main()
