"""A network with far more parameters than samples: FuncID's hypergradient beside damped and undamped AID's.

python examples/overparametrised.py [figure.png]

The inner level fits a network to one label per sample, and the labels are the outer parameters. Where the network
interpolates, the inner solution at the samples is the labels themselves, and the exact hypergradient is the derivative
of the outer objective at them.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import funcbilevel as fb

SAMPLES, WIDTH = 40, 64
DAMPINGS = 10.0 ** np.arange(-6, 1)


def network() -> fb.Model:
    """2 -> 64 -> 64 -> 1, tanh: 4,417 parameters."""

    def init(key: jax.Array, x: jax.Array) -> list[dict[str, jax.Array]]:
        sizes = (x.shape[1], WIDTH, WIDTH, 1)
        pairs = zip(jax.random.split(key, 3), sizes[:-1], sizes[1:], strict=True)
        return [{"w": jax.random.normal(k, (p, q)) / p**0.5, "b": jnp.zeros(q)} for k, p, q in pairs]

    def apply(layers: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
        for layer in layers[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return (x @ layers[-1]["w"] + layers[-1]["b"])[:, 0]

    return fb.from_function(init, apply)


def inner_objective(omega: jax.Array, v: jax.Array, batch: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.mean(batch[1] * (jnp.cosh(v - omega) - 1.0))  # weighted, and not quadratic


def outer_objective(omega: jax.Array, v: jax.Array, batch: tuple[jax.Array, ...]) -> jax.Array:
    del omega
    return jnp.mean((v - batch[2]) ** 2)


def estimators() -> dict[str, fb.Estimator]:
    damped = {f"aid, damping {d:.0e}": fb.aid(fb.cg(100, damping=float(d))) for d in DAMPINGS}
    return {
        "funcid": fb.funcid(fb.pointwise_adjoint()),
        "funcid, corrected": fb.funcid(fb.pointwise_adjoint(), correction=1.0),
        "aid, no damping": fb.aid(fb.cg(100)),
        **damped,
    }


def main() -> None:
    """Prints errors, true and estimated, and the diagnosis; draws them."""
    problem, model = fb.FunctionalProblem(inner_objective, outer_objective), network()
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.uniform(keys[0], (SAMPLES, 2), minval=-1.0, maxval=1.0)
    weights = jax.random.uniform(keys[1], (SAMPLES,), minval=0.2, maxval=2.0)
    omega = jnp.sin(3.0 * x[:, 0]) * jnp.cos(2.0 * x[:, 1])
    batch = (x, weights, omega + jax.random.normal(keys[2], (SAMPLES,)))
    exact = jax.grad(lambda v: outer_objective(omega, v, batch))(omega)

    solver = fb.bilevel(
        problem,
        model,
        estimators()["funcid"],
        inner_optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, 4000)),
        outer_optimizer=optax.set_to_zero(),
        inner_steps=4000,
    )
    state, metrics = jax.jit(solver.step)(solver.init(keys[3], omega, batch), batch, batch)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.inner_params))
    print(
        f"{parameters} parameters, {SAMPLES} samples; inner objective {metrics['inner_objective']:.1e} after 4000 steps"
    )

    true, estimated = {}, {}
    for name, estimator in estimators().items():
        arguments = (problem, model, estimator, omega, state.inner_params, batch, batch)
        gradient = jax.jit(lambda a=arguments: fb.hypergradient(*a).gradient)()
        true[name] = float(jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact))
        estimated[name] = float(jax.jit(lambda a=arguments: fb.hypergradient_error(*a).relative_error)())
        print(f"{name:22}  error {true[name]:8.1e}  estimated {estimated[name]:8.1e}")
    print(fb.diagnose(solver, state, batch, batch))
    if len(sys.argv) > 1:
        draw(true, estimated, sys.argv[1])


def draw(true: dict[str, float], estimated: dict[str, float], path: str) -> None:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    damped = [f"aid, damping {d:.0e}" for d in DAMPINGS]
    axes.loglog(DAMPINGS, [true[n] for n in damped], "o-", color="C1", label="AID by damping")
    axes.loglog(DAMPINGS, [estimated[n] for n in damped], "x:", color="C1", label="the same, estimated")
    for name, colour in (("aid, no damping", "C3"), ("funcid", "C0"), ("funcid, corrected", "C2")):
        axes.axhline(true[name], color=colour, label=name.replace("aid", "AID").replace("funcid", "FuncID"))
    axes.set(xlabel="damping", ylabel="relative error of the hypergradient")
    axes.legend(fontsize="small", loc=(0.02, 0.15))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
