"""All seeds of a method in one program."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import funcbilevel as fb
from funcbilevel.tasks._experiment.cells import stack
from funcbilevel.tasks._experiment.grid import Callback, Track, Unit
from funcbilevel.tasks._experiment.store import Result, Run
from funcbilevel.tasks.cleaning.methods import ALL, ALONE, METHODS, Setting
from funcbilevel.tasks.cleaning.problem import (
    Array,
    Data,
    Samples,
    accuracy,
    auc,
    corrupt,
    cross_entropy,
    logits,
    model,
    penalty,
)

POINTS, WORST = 20, 30
"""Measurements along a run, and pictures that are kept."""


def baseline(data: Data, which: str, setting: Setting, key: jax.Array) -> dict[str, jax.Array]:
    """The network after as many steps as the others make, on the validation samples alone or on all."""
    samples = data.validation
    if which == ALL:
        samples = Samples(*(jnp.concatenate(pair) for pair in zip(data.train, data.validation, strict=True)))
    theta, _ = model(setting.network).init(key, samples.x)

    def loss(theta: Any, rows: jax.Array) -> jax.Array:
        return jnp.mean(cross_entropy(logits(theta, samples.x[rows]), samples.y[rows])) + penalty(theta)

    def step(theta: Any, key: jax.Array) -> tuple[Any, None]:
        rows = jax.random.randint(key, (setting.batch_size,), 0, len(samples.y))
        return jax.tree.map(lambda p, g: p - setting.inner_rate * g, theta, jax.grad(loss)(theta, rows)), None

    theta, _ = jax.lax.scan(step, theta, jax.random.split(key, setting.num_steps * setting.inner_steps))
    return {"accuracy": accuracy(theta, data.test), "validation_accuracy": accuracy(theta, data.validation)}


def measured(state: fb.BilevelState, data: Data) -> dict[str, jax.Array]:
    """What is recorded of a state."""
    return {
        "accuracy": accuracy(state.inner_params, data.test),
        "validation_accuracy": accuracy(state.inner_params, data.validation),
        "auc": auc(state.outer_params, data.wrong),
    }


def weights(
    method: str, setting: Setting, data: Data, seeds: tuple[int, ...], callback: Callback | None = None
) -> tuple[Array, list[int], dict[str, Array]]:
    """The weights' logits, [seeds, n]; and at which steps what was measured, name -> [seeds, points].

    Arguments:
        method: a name of `METHODS`.
        setting: shared by all.
        data: with a leading axis of seeds.
        seeds: of the initial networks and of the draws.
        callback: as that of `fb.train`.

    Raises:
        ValueError: the batch does not divide the training samples.
    """
    build: Any = METHODS[method].build
    solver, num_steps = build(setting)
    blocks = len(data.train.y[0])
    if blocks % setting.batch_size:
        raise ValueError(f"batch_size must divide {blocks} training samples, got {setting.batch_size}.")
    half = len(data.validation.y[0]) // 2

    def sources(seed: jax.Array, data: Data) -> tuple[fb.FiniteSum, fb.FiniteSum]:
        inner, outer = jax.random.split(jax.random.fold_in(jax.random.key(1), seed))
        train = fb.finite_sum(data.train, setting.batch_size, key=inner)
        return train, fb.finite_sum(data.validation, half, key=outer)

    def init(seed: jax.Array, data: Data) -> fb.BilevelState:
        network, own = jax.random.split(jax.random.key(seed))
        train, validation = sources(seed, data)
        theta, _ = model(setting.network).init(network, data.train.x)
        return solver.init(own, jnp.zeros(len(data.train.y)), train, theta, validation)

    chunk = max(1, num_steps // POINTS)

    def advance(state: fb.BilevelState, seed: jax.Array, data: Data) -> tuple[fb.BilevelState, Any, Any]:
        state, metrics = solver.run(state, *sources(seed, data), num_steps=chunk)
        return state, metrics["outer_objective"], measured(state, data)

    axis = np.asarray(seeds)
    states = jax.jit(jax.vmap(init))(axis, data)
    run = jax.jit(jax.vmap(advance), donate_argnums=0)
    points: list[Any] = []
    for _ in range(num_steps // chunk):
        states, values, point = jax.block_until_ready(run(states, axis, data))
        points.append(point)
        if callback is not None:
            callback(states, {"outer_objective": np.mean(values, axis=0)})
    curves = {name: np.stack([point[name] for point in points], axis=1) for name in points[0]}
    return np.asarray(states.outer_params), [chunk * (i + 1) for i in range(len(points))], curves


def steps_of(method: str, setting: Setting) -> int:
    """How many outer steps the progress bar shows."""
    build: Any = METHODS[method].build
    steps = setting.num_steps if build is None else build(setting)[1]
    return steps // max(1, steps // POINTS) * max(1, steps // POINTS)


# The runs of the commands.


def runs(methods: Iterable[str], dataset: str, corruption: float, setting: Setting, seeds: Iterable[int]) -> list[Run]:
    """Each method from every seed."""
    shared = {"dataset": dataset, "corruption": corruption} | asdict(setting)
    return [Run(method, seed, shared) for method in methods for seed in seeds]


def train(
    load: Callable[[], tuple[Array, Array]],
    sizes: tuple[int, int],
    corruption: float,
    setting: Setting,
    track: Track,
    unit: Unit,
) -> list[Result]:
    """Makes the runs of a unit: one method, all seeds."""
    x, y = load()
    of_seeds = [corrupt(x, y, sizes, seed, corruption) for seed in unit.seeds]
    data, method = stack(of_seeds), unit.cells[0].method
    callback = track(method, steps_of(method, setting))
    if method in (ALONE, ALL):
        keys = jax.vmap(jax.random.key)(np.asarray(unit.seeds))
        last = jax.device_get(jax.jit(jax.vmap(partial(baseline, which=method, setting=setting)))(data, key=keys))
        callback(None, {"outer_objective": np.full(setting.num_steps, np.nan)})
        return [Result({name: values[s] for name, values in last.items()}) for s in range(len(unit.seeds))]
    omega, steps, curves = weights(method, setting, data, unit.seeds, callback)
    return [
        Result(
            {name: values[s, -1] for name, values in curves.items()},
            {"curves": {"step": steps} | {name: values[s].tolist() for name, values in curves.items()}}
            | ({"worst": worst(omega[s], of_seeds[s])} if s == 0 else {}),
        )
        for s in range(len(unit.seeds))
    ]


def worst(omega: Array, data: Data) -> dict[str, Any]:
    """The samples with the least weights, pictures in 16 shades of grey."""
    rows = np.argsort(omega, kind="stable")[:WORST]
    return {
        "weight": [float(f"{w:.3g}") for w in 1 / (1 + np.exp(-omega[rows].astype(float)))],
        "label": data.train.y[rows].tolist(),
        "wrong": data.wrong[rows].tolist(),
        "picture": np.round(16 * data.train.x[rows]).astype(int).tolist(),
    }
