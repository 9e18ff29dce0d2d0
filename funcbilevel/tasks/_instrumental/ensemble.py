"""Ensembles on one table: many networks, each on a sample of its rows, trained together and stopped early."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import funcbilevel as fb
from funcbilevel.tasks._instrumental.methods import Setting
from funcbilevel.tasks._instrumental.problem import Array, Batch, Data
from funcbilevel.tasks._instrumental.train import Solver, constant, solver_of


class Networks(NamedTuple):
    """What training has found: omega, theta, and the state of h."""

    outer_params: Any
    inner_params: Any
    model_state: Any


class Programs(NamedTuple):
    """Compiled functions; data, ridges, states, networks and u have a leading axis of members, other batches have not.

    Attributes:
        solver: of all members; its outer batches are (batch, ridge).
        init: (keys, data) -> states.
        losses: (networks, data, ridges) -> mean squared errors of the projection on the validation rows, [m].
        second_stage: (networks, data, ridges) -> u, [m, p].
        predict, derivatives: (networks, u, batch) -> f, [m, n], and the mean of its derivative, [m, k].
        project: (networks, data, u, batch) -> E[f(p, c) | z], [m, n].
    """

    solver: fb.BilevelSolver
    init: Callable[..., fb.BilevelState]
    losses: Callable[..., jax.Array]
    second_stage: Callable[..., jax.Array]
    predict: Callable[..., jax.Array]
    derivatives: Callable[..., jax.Array]
    project: Callable[..., jax.Array]


@cache
def programs(method: str, setting: Setting, own: tuple[tuple[str, float], ...], num_treatments: int) -> Programs:
    """The programs of a method; the same arguments give the same object, which is compiled once."""

    def solver(ridge: Any = 1.0) -> Solver:
        return solver_of(method, setting._replace(outer_ridge=ridge), own, num_treatments)

    def step(state: fb.BilevelState, inner: Batch, outer: tuple[Batch, Any]) -> Any:
        batch, ridge = outer
        return solver(ridge).bilevel.step(state, inner, batch)

    def losses(networks: Networks, data: Data, ridge: Any) -> jax.Array:
        u, h = solver(ridge).second_stage(networks, data)
        return jnp.mean((h(data.validation) @ u - data.validation.y) ** 2)

    def predict(networks: Networks, u: jax.Array, batch: Batch) -> jax.Array:
        return solver().structural(networks.outer_params, u, batch)

    def derivatives(networks: Networks, u: jax.Array, batch: Batch) -> jax.Array:
        total = jax.grad(lambda p: jnp.sum(predict(networks, u, batch._replace(p=p))))(batch.p)  # f is row by row
        return jnp.mean(total, axis=0)

    def project(networks: Networks, data: Data, u: jax.Array, batch: Batch) -> jax.Array:
        return solver().second_stage(networks, data)[1](batch) @ u

    def over_members(function: Callable[..., Any], *axes: int | None) -> Any:
        return jax.jit(jax.vmap(function, in_axes=axes))

    return Programs(
        solver().bilevel._replace(step=jax.vmap(step)),
        over_members(solver().init, 0, 0),
        over_members(losses, 0, 0, 0),
        over_members(lambda networks, data, ridge: solver(ridge).second_stage(networks, data)[0], 0, 0, 0),
        over_members(predict, 0, 0, None),
        over_members(derivatives, 0, 0, None),
        over_members(project, 0, 0, 0, None),
    )


class Best(NamedTuple):
    """The best networks so far: each member's least validation loss, [m], and in which of the steps made it was."""

    networks: Networks
    loss: Array
    step: Array
    steps: int


def fit(
    compiled: Programs,
    keys: jax.Array,
    data: Data,
    ridges: Array,
    num_steps: int,
    patience: int | None,
    callback: Any,
) -> Best:
    """Trains all members, and keeps of each the networks with the least validation loss."""
    state = compiled.init(keys, data)
    best = Best(networks_of(state), np.full(len(keys), np.inf), np.zeros(len(keys), int), 0)

    def after_chunk(state: fb.BilevelState, metrics: Any) -> bool:
        nonlocal best
        networks, step = networks_of(state), best.steps + len(metrics["outer_objective"])
        loss = np.asarray(compiled.losses(networks, data, ridges), float)
        better = loss < best.loss

        def kept(new: Any, old: Any) -> Array:
            return np.where(better.reshape(-1, *[1] * (np.ndim(new) - 1)), new, old)

        networks = jax.tree.map(kept, networks, best.networks)
        best = Best(networks, np.where(better, loss, best.loss), np.where(better, step, best.step), step)
        if callback is not None:
            callback(state, {name: values.mean(axis=1) for name, values in metrics.items()})
        return patience is not None and step - best.step.max() >= patience

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not a stationary point")  # h follows psi by a few Adam steps
        fb.train(
            compiled.solver,
            state,
            jax.tree_util.Partial(constant, (data.inner, (data.outer, ridges))),
            num_steps,
            chunk=min(10, num_steps),
            callback=after_chunk,
            progress=False,
            on_nonfinite="continue",
        )
    return best


def networks_of(state: fb.BilevelState) -> Networks:
    """Copies on the host."""
    return jax.tree.map(np.array, Networks(state.outer_params, state.inner_params, state.model_state))
