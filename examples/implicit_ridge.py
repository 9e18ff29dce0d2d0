"""A ridge penalty by Newton's method on the validation loss, through a closed form that is not differentiated.

python examples/implicit_ridge.py
"""

import jax
import jax.numpy as jnp
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split

import funcbilevel as fb


def main() -> None:
    """Prints the steps, and how the weights move with the penalty."""
    x, y = load_diabetes(return_X_y=True)
    y = (y - y.mean()) / y.std()
    x, x_val, y, y_val = (jnp.asarray(a, jnp.float32) for a in train_test_split(x, y, test_size=0.5, random_state=0))

    def objective(weights: jax.Array, log_penalty: jax.Array) -> jax.Array:
        return jnp.sum((x @ weights - y) ** 2) / 2 + jnp.exp(log_penalty) * jnp.sum(weights**2) / 2

    @fb.custom_root(jax.grad(objective), linear_solver=fb.cg(20))
    def ridge(init: None, log_penalty: jax.Array) -> jax.Array:
        return jnp.linalg.solve(x.T @ x + jnp.exp(log_penalty) * jnp.eye(10), x.T @ y)

    @jax.jit
    def newton(log_penalty: jax.Array) -> tuple[jax.Array, ...]:
        def F(log_penalty: jax.Array) -> jax.Array:
            return jnp.mean((x_val @ ridge(None, log_penalty) - y_val) ** 2)

        value, slope, curvature = F(log_penalty), jax.grad(F)(log_penalty), jax.hessian(F)(log_penalty)
        return log_penalty - slope / jnp.abs(curvature), value, slope

    log_penalty = jnp.log(1.0)
    for step in range(6):
        new, value, slope = newton(log_penalty)
        print(f"step {step}: penalty {jnp.exp(log_penalty):.4f}, validation error {value:.5f}, slope {slope:+.1e}")
        log_penalty = new
    print("derivative of the weights by the log-penalty:", jax.jacobian(ridge, argnums=1)(None, log_penalty).round(2))


if __name__ == "__main__":
    main()
