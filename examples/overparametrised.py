"""A network with far more parameters than samples: FuncID's hypergradient beside damped and undamped AID's

The inner level fits a network to one label per sample, and the labels are the outer parameters. Where the network
interpolates, the inner solution at the samples is the labels themselves, and the exact hypergradient is the derivative
of the outer objective at them. `fb.hypergradient_error` estimates the error without the truth.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen
from matplotlib.figure import Figure

import funcbilevel as fb

SAMPLES = 40


def inner_objective(omega: jax.Array, v: jax.Array, batch: Any) -> jax.Array:
    return jnp.mean(batch[1] * (jnp.cosh(v[:, 0] - omega) - 1.0))  # weighted, and not quadratic


def outer_objective(omega: jax.Array, v: jax.Array, batch: Any) -> jax.Array:
    return jnp.mean((v[:, 0] - batch[2]) ** 2)


def main(num_inner_steps: int = 4000, num_dampings: int = 4) -> None:
    """Prints and draws errors, true and estimated."""
    problem = fb.FunctionalProblem(inner_objective, outer_objective)
    model = fb.from_linen(linen.Sequential([linen.Dense(64), jnp.tanh, linen.Dense(64), jnp.tanh, linen.Dense(1)]))
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.uniform(keys[0], (SAMPLES, 2), minval=-1.0, maxval=1.0)
    omega = jnp.sin(3.0 * x[:, 0]) * jnp.cos(2.0 * x[:, 1])
    weights = jax.random.uniform(keys[1], (SAMPLES,), minval=0.2, maxval=2.0)
    batch = (x, weights, omega + jax.random.normal(keys[2], (SAMPLES,)))
    exact = jax.grad(lambda v: outer_objective(omega, v[:, None], batch))(omega)

    solver = fb.bilevel(
        problem,
        model,
        fb.funcid(fb.pointwise_adjoint()),
        inner_optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, num_inner_steps)),
        outer_optimizer=optax.set_to_zero(),
        inner_steps=num_inner_steps,
    )
    state, metrics = jax.jit(solver.step)(solver.init(keys[3], omega, batch), batch, batch)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.inner_params))
    print(f"{count} parameters, {SAMPLES} samples; inner objective {metrics['inner_objective']:.1e} after the fit")

    dampings = np.geomspace(1e-6, 1.0, num_dampings)
    estimators = {
        "FuncID": fb.funcid(fb.pointwise_adjoint()),
        "FuncID, corrected": fb.funcid(fb.pointwise_adjoint(), correction=1.0),
        "AID, no damping": fb.aid(fb.cg(100)),
        **{f"AID, damping {d:.0e}": fb.aid(fb.cg(100, damping=float(d))) for d in dampings},
    }
    errors = {}
    for name, estimator in estimators.items():
        arguments = (problem, model, estimator, omega, state.inner_params, batch, batch)
        gradient = jax.jit(lambda a=arguments: fb.hypergradient(*a).gradient)()
        estimated = jax.jit(lambda a=arguments: fb.hypergradient_error(*a).relative_error)()
        errors[name] = true, _ = float(jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact)), float(estimated)
        print(f"{name:22}  error {true:8.1e}  estimated {estimated:8.1e}")

    axes = (figure := Figure(figsize=(6.4, 3.8), layout="constrained")).subplots()
    damped = np.array([error for name, error in errors.items() if "AID, damping" in name])
    axes.loglog(dampings, damped[:, 0], "o-", color="C1", label="AID by damping")
    axes.loglog(dampings, damped[:, 1], "x:", color="C1", label="the same, estimated")
    for name, style in (("AID, no damping", "k-."), ("FuncID", "C0-"), ("FuncID, corrected", "C0--")):
        axes.plot(dampings, [errors[name][0]] * len(dampings), style, label=name)
    axes.set(xlabel="damping of AID", ylabel="relative error of the hypergradient")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    figure.savefig("overparametrised.png", dpi=110)


if __name__ == "__main__":
    main()
