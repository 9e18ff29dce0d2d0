"""One penalty for each feature of a logistic regression, with early stopping of the outer level

To thirty columns of measurements a hundred of noise are added. So many penalties can be overfitted to validation data,
as weights can to training data: a third part of the data decides when to stop, by the callback of `fb.train`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer

import funcbilevel as fb

COLUMNS, NOISE = 30, 100


def logistic_loss(theta: jax.Array, batch: Any) -> jax.Array:
    return jnp.mean(optax.sigmoid_binary_cross_entropy(batch[0] @ theta, batch[1]))


def inner_objective(log_penalties: jax.Array, theta: jax.Array, batch: Any) -> jax.Array:
    return logistic_loss(theta, batch) + jnp.sum(jnp.exp(log_penalties) * theta**2)


def data() -> tuple[Any, ...]:
    x, y = load_breast_cancer(return_X_y=True)
    rng = np.random.default_rng(0)
    x = np.hstack([(x - x.mean(0)) / x.std(0), rng.normal(size=(len(x), NOISE))])
    parts = np.split(rng.permutation(len(y)), [100, 200, 300])
    return tuple((jnp.asarray(x[rows], jnp.float32), jnp.asarray(y[rows], jnp.float32)) for rows in parts)


@jax.jit
def fit(w: jax.Array, batch: Any) -> jax.Array:
    return jax.lax.fori_loop(0, 5000, lambda i, t: t - 0.05 * jax.grad(inner_objective, 1)(w, t, batch), 0.0 * w)


def main(num_outer_steps: int = 500) -> None:
    """Prints losses on test data; draws those of two parts by outer step, and the penalties."""
    train, validation, stopping, test = data()
    problem = fb.ParametricProblem(inner_objective, lambda w, theta, batch: logistic_loss(theta, batch))
    inner, outer = optax.adam(0.01), optax.adam(0.05)
    solver = fb.bilevel(problem, None, fb.aid(fb.cg(30)), inner_optimizer=inner, outer_optimizer=outer, inner_steps=30)
    trace: list[tuple[int, float, float, Any]] = []

    def stop(state: fb.BilevelState, metrics: Any) -> bool:
        """Ends the run when the stopping loss has not fallen for a hundred steps."""
        loss = float(logistic_loss(state.inner_params, stopping))
        trace.append((int(state.step), float(metrics["outer_objective"][-1]), loss, np.array(state.outer_params)))
        return trace[-1][0] - min(trace, key=lambda row: row[2])[0] >= 100

    start = jnp.full(COLUMNS + NOISE, -5.0)
    state = solver.init(jax.random.key(0), start, train, fit(start, train))
    fb.train(solver, state, lambda key, step: (train, validation), num_outer_steps, chunk=10, callback=stop)
    best = min(trace, key=lambda row: row[2])
    print(f"stopped at step {trace[-1][0]}, best at step {best[0]}")
    names = "equal penalties", "learned, last step", "learned, best"
    for name, penalties in zip(names, (start, trace[-1][3], best[3])):
        print(f"{name}: test loss {logistic_loss(fit(penalties, train), test):.3f}")

    steps, validated, stopped, _ = zip(*trace)
    left, right = (figure := Figure(figsize=(8.5, 3.3), layout="constrained")).subplots(1, 2)
    left.plot(steps, validated, label="validation data (outer level)")
    left.plot(steps, stopped, "--", label="third part (decides when to stop)")
    left.axvline(best[0], color="0.6", lw=1)
    left.set(xlabel="outer step", ylabel="logistic loss", ylim=(0, 1.5 * max(*validated, *stopped)))
    left.legend(loc="upper right")
    parts = [best[3][:COLUMNS], best[3][COLUMNS:]]
    right.hist(parts, bins=16, density=True, label=["columns of the data", "columns of noise"])
    right.set(xlabel="logarithm of the learned penalty, best step", ylabel="share of columns, per unit")
    right.legend(loc="upper center", fontsize="small")
    figure.savefig("logistic_penalties.png", dpi=110)


if __name__ == "__main__":
    main()
