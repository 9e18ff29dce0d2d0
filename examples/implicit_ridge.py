"""Implicit layer: a ridge penalty by Newton's method on the validation loss

The closed form of the ridge regression is not differentiated: `fb.custom_root` takes first and second derivatives from
the condition that it satisfies.
"""

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split

import funcbilevel as fb


def main(num_steps: int = 6) -> None:
    """Prints the steps, and how the weights move with the penalty; draws the steps."""
    x, y = load_diabetes(return_X_y=True)
    y = (y - y.mean()) / y.std()
    x, x_val, y, y_val = (jnp.asarray(a, jnp.float32) for a in train_test_split(x, y, test_size=0.5, random_state=0))

    def objective(weights: jax.Array, log_penalty: jax.Array) -> jax.Array:
        return jnp.sum((x @ weights - y) ** 2) / 2 + jnp.exp(log_penalty) * jnp.sum(weights**2) / 2

    @fb.custom_root(jax.grad(objective), linear_solver=fb.cg(20))
    def ridge(init: None, log_penalty: jax.Array) -> jax.Array:
        return jnp.linalg.solve(x.T @ x + jnp.exp(log_penalty) * jnp.eye(10), x.T @ y)

    def F(log_penalty: jax.Array) -> jax.Array:
        return jnp.mean((x_val @ ridge(None, log_penalty) - y_val) ** 2)

    @jax.jit
    def newton(log_penalty: jax.Array) -> tuple[jax.Array, ...]:
        value, slope, curvature = F(log_penalty), jax.grad(F)(log_penalty), jax.hessian(F)(log_penalty)
        return log_penalty - slope / jnp.abs(curvature), value, slope

    log_penalty, path = jnp.log(1.0), []
    for step in range(num_steps):
        new, value, slope = newton(log_penalty)
        print(f"step {step}: penalty {jnp.exp(log_penalty):.4f}, validation error {value:.5f}, slope {slope:+.1e}")
        path.append((jnp.exp(log_penalty), value))
        log_penalty = new
    print("derivative of the weights by the log-penalty:", jax.jacobian(ridge, argnums=1)(None, log_penalty).round(2))

    penalties = jnp.geomspace(1e-3, 3.0, 100)
    axes = (figure := Figure(figsize=(6, 3.3), layout="constrained")).subplots()
    axes.semilogx(penalties, jax.vmap(F)(jnp.log(penalties)), color="0.6", label="validation error")
    axes.plot(*zip(*path), "o:", mfc="none", label="Newton's steps")
    for step, point in enumerate(path[:2]):
        axes.annotate(f"{step}", point, xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set(xlabel="ridge penalty", ylabel="mean squared error, validation data")
    axes.legend(loc="upper left")
    figure.savefig("implicit_ridge.png", dpi=110)


if __name__ == "__main__":
    main()
