"""Many runs at once, in one compiled program for each method; and the controllers trained again after changes."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcbilevel as fb
from funcbilevel.tasks._experiment.cells import repeat
from funcbilevel.tasks._experiment.grid import Callback, Track, Unit
from funcbilevel.tasks._experiment.methods import find
from funcbilevel.tasks._experiment.players import adam
from funcbilevel.tasks._experiment.store import Result, Run
from funcbilevel.tasks.arm.methods import (
    CHANGES,
    CONTROL,
    METHODS,
    MIDDLE,
    Change,
    Game,
    Hyper,
    Setting,
    hypers,
    init_players,
    moves_at_once,
    num_steps,
)
from funcbilevel.tasks.arm.problem import SHOWN, TEST, VALIDATION, Arm, costs, draw_episodes, held_out, problem, rollout


def _clipped_adam(rate: Any, steps: Any) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), adam(rate, steps))


class Program(NamedTuple):
    """A method's compiled functions over cells: keys, hyper's leaves, players and states have a leading axis.

    Attributes:
        init: (keys, players, hyper, steps) -> states.
        advance: (states, hyper, keys, steps, count) -> (states, metrics of the last step); count of the steps in all.
    """

    init: Callable[..., fb.BilevelState]
    advance: Callable[..., tuple[fb.BilevelState, dict[str, jax.Array]]]


@cache
def program(method: str, setting: Setting) -> Program:
    """The program of a method; the same arguments give the same object, which is compiled once.

    Raises:
        ValueError: there is no such method, or a count is below 1.
    """
    build: Any = find(METHODS, method).build
    for name in ("width", "batch_size", "inner_steps", "solver_steps"):
        if (value := getattr(setting, name)) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")

    def solver(hyper: Hyper, steps: Any) -> fb.BilevelSolver:
        follower_steps = steps * (1 if moves_at_once(method) else setting.inner_steps)
        optimizers = _clipped_adam(hyper.leader_rate, steps), _clipped_adam(hyper.follower_rate, follower_steps)
        return build(Game(problem(hyper.weight, hyper.payload), setting, *optimizers))

    def init(key: jax.Array, players: tuple[Any, Any], hyper: Hyper, steps: Any) -> fb.BilevelState:
        return solver(hyper, steps).init(key, players[0], None, players[1])

    def advance(
        state: fb.BilevelState, hyper: Hyper, key: jax.Array, steps: Any, count: Any
    ) -> tuple[fb.BilevelState, dict[str, jax.Array]]:
        of_method = solver(hyper, steps)

        def step(state: fb.BilevelState, _: jax.Array) -> tuple[fb.BilevelState, dict[str, jax.Array]]:
            inner, outer = jax.random.split(jax.random.fold_in(key, state.step))
            batches = (draw_episodes(k, setting.batch_size) for k in (inner, outer))
            return of_method.step(state, *batches)

        return repeat(step, state, 0, count)

    return Program(
        init=jax.jit(jax.vmap(init, in_axes=(0, 0, 0, None))),
        advance=jax.jit(jax.vmap(advance, in_axes=(0, 0, 0, None, None)), donate_argnums=0),
    )


_PLAYERS = 0xA11  # the initial controllers' key, apart from those of the steps' episodes


@jax.jit
def evaluate(players: tuple[Any, Any], payloads: jax.Array) -> dict[str, jax.Array]:
    """Costs of each cell on the test episodes, and as `validation_` on the validation ones.

    `alone` is the test episodes' tracking with the follower switched off.
    """
    validation, test = held_out(VALIDATION), held_out(TEST)

    def of_cell(players: tuple[Any, Any], payload: jax.Array) -> dict[str, jax.Array]:
        arm, (omega, theta) = Arm(payload=payload), players
        chosen = costs(arm, omega, theta, validation)._asdict()
        alone = costs(arm, omega, None, test).tracking
        result = costs(arm, omega, theta, test)._asdict() | {"alone": alone}
        return result | {f"validation_{name}": value for name, value in chosen.items()}

    return jax.vmap(of_cell)(players, payloads)


class Sweep(NamedTuple):
    """Runs of one method, [seeds, cells] in one row.

    Attributes:
        metrics: name -> values at the end, [runs].
        players: their (omega, theta), leading axis = runs.
        seconds: for all of it, compilation included.
    """

    metrics: dict[str, Any]
    players: tuple[Any, Any]
    seconds: float


def sweep(
    method: str,
    setting: Setting,
    cells: Sequence[Hyper],
    seeds: Sequence[int],
    updates: int,
    *,
    start: tuple[Any, Any] | None = None,
    chunk: int = 50,
    callback: Callback | None = None,
) -> Sweep:
    """Trains every hyper-parameter setting from every seed at once.

    A seed gives the same initial controllers and the same episodes in every setting. `start`, if given, are other
    players to start from, with the leading axis of the runs.
    """
    clock = time.perf_counter()
    compiled, steps = program(method, setting), num_steps(method, setting, updates)
    runs = list(itertools.product(seeds, cells))
    hyper = jax.tree.map(lambda *values: jnp.array(values, jnp.float32), *(hyper for _, hyper in runs))
    keys = jnp.stack([jax.random.key(seed) for seed, _ in runs])
    if start is None:
        start = jax.vmap(lambda key: init_players(jax.random.fold_in(key, _PLAYERS), method, setting))(keys)
    states = compiled.init(keys, jax.tree.map(jnp.copy, start), hyper, steps)  # `advance` takes its buffers
    for first in range(0, steps, chunk):
        count = min(chunk, steps - first)
        states, metrics = compiled.advance(states, hyper, keys, steps, count)
        if callback is not None:
            values = {name: np.full(count, np.mean(value)) for name, value in jax.device_get(metrics).items()}
            callback(states, values)
    players = states.outer_params, states.inner_params
    return Sweep(jax.device_get(evaluate(players, hyper.payload)), players, time.perf_counter() - clock)


@jax.jit
def paths(players: tuple[Any, Any]) -> jax.Array:
    """The angles of each cell's arm on the first test episodes, [cells, episodes, steps, 2]."""
    episodes = jax.tree.map(lambda x: x[:SHOWN], held_out(TEST))

    def of_cell(omega: Any, theta: Any) -> jax.Array:
        return jax.vmap(lambda episode: rollout(Arm(), omega, theta, episode).angles)(episodes)

    return jax.vmap(of_cell)(*players)


# The runs of the commands.


def settings_of(setting: Setting, hyper: Hyper, updates: int) -> dict[str, Any]:
    """What a record says of a run."""
    return {"updates": updates} | asdict(setting) | hyper._asdict()


def runs(methods: Iterable[str], setting: Setting, updates: int, seeds: Iterable[int]) -> list[Run]:
    """Every setting of every method from every seed."""
    return [
        Run(method, seed, settings_of(setting, hyper, updates), hyper)
        for method in methods
        for hyper in hypers(method)
        for seed in seeds
    ]


def train(setting: Setting, updates: int, shown: int, track: Track, unit: Unit) -> list[Result]:
    """Makes the runs of a unit, all of one method; of the seed `shown` the paths are kept."""
    method, cells = unit.cells[0].method, [cell.how for cell in unit.cells]
    outcome = sweep(
        method, setting, cells, unit.seeds, updates, callback=track(method, num_steps(method, setting, updates))
    )
    results = _results(outcome)
    if shown in unit.seeds:
        first = unit.seeds.index(shown) * len(cells)
        angles = jax.device_get(paths(jax.tree.map(lambda x: x[first : first + len(cells)], outcome.players)))
        for i, values in enumerate(angles.astype(float), start=first):
            if np.isfinite(values).all():
                results[i] = results[i]._replace(beside={"paths": {"angles": values.round(3).tolist()}})
    return results


def _results(outcome: Sweep) -> list[Result]:
    number = len(outcome.metrics["tracking"])
    of_sweep = {"sweep_cells": number, "sweep_seconds": outcome.seconds}
    return [
        Result({name: float(f"{values[i]:.6g}") for name, values in outcome.metrics.items()} | of_sweep)
        for i in range(number)
    ]


CHANGED = (CONTROL, "aid-cg")
"""The methods whose controllers are trained again."""
RETRAINING = (25, 100, 400)
"""Steps after a change."""
RATES = (3e-3, 1e-2)
"""Of Adam in these, one of which validation chooses."""


def change_runs(methods: Iterable[str], setting: Setting, seeds: Iterable[int]) -> list[Run]:
    """Controllers as they were, the follower alone trained again, or both players, after each change."""

    def ways(change: Change) -> list[Hyper]:
        after = Hyper(change.weight, 0.0, 0.0, change.payload)
        both = [after._replace(leader_rate=rate, follower_rate=rate) for rate in RATES]
        return [after, *(hyper._replace(leader_rate=0.0) for hyper in both), *both]

    return [
        Run(method, seed, settings_of(setting, hyper, updates) | {"change": change.name}, hyper)
        for method in methods
        for change in CHANGES
        for updates in RETRAINING
        for hyper in ways(change)
        for seed in seeds
    ]


def one_change(run: Run) -> tuple[str, str, int]:
    """Runs that are trained again together: after the same change, for as many steps."""
    return run.method, run.settings["change"], run.settings["updates"]


def retrain(setting: Setting, updates: int, track: Track) -> Callable[[Unit], list[Result]]:
    """What makes the runs of a unit of one change; the controllers to start from are trained once for all units."""

    @cache
    def trained(method: str, seeds: tuple[int, ...]) -> tuple[Any, Any]:
        hyper = Hyper(MIDDLE, **METHODS[method].hyper)
        callback = track(f"{method} before", num_steps(method, setting, updates))
        return sweep(method, setting, [hyper], seeds, updates, callback=callback).players

    def train(unit: Unit) -> list[Result]:
        method, change, after = one_change(unit.cells[0])
        start = jax.tree.map(lambda x: jnp.repeat(x, len(unit.cells), axis=0), trained(method, unit.seeds))
        cells = [cell.how for cell in unit.cells]
        callback = track(f"{method} {change}", num_steps(CONTROL, setting, after))
        return _results(sweep(CONTROL, setting, cells, unit.seeds, after, start=start, callback=callback))

    return train
