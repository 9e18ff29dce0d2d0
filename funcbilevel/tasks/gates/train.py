"""All hyper-parameter settings (cells) on all divisions of the data (runs) at once: selection, then a new network."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.cells import in_chunks, over, stack, tiled
from funcbilevel.tasks._experiment.grid import Callback, Track, Unit
from funcbilevel.tasks._experiment.methods import find
from funcbilevel.tasks._experiment.players import Learner
from funcbilevel.tasks._experiment.store import Result, Run, Store
from funcbilevel.tasks.gates.methods import ALL, METHODS, RANDOM, Hyper, Setting, trials
from funcbilevel.tasks.gates.problem import Array, Batch, Params, Rows, Table, accuracy, initial_network


class Draws(NamedTuple):
    """What is drawn for the steps of training, for the follower [..., 0, :] and the leader [..., 1, :].

    Attributes:
        rows: numbers of the rows, [steps, 2, b].
        noise: of the gates, [steps, 2, features].
    """

    rows: Any
    noise: Any


def draws(setting: Setting, num_rows: int, num_features: int, seed: int) -> Draws:
    """The draws of a seed, the same for every method and hyper-parameter setting."""
    rng, steps = np.random.default_rng(seed), setting.num_steps
    rows = rng.integers(num_rows, size=(steps, 2, setting.batch_size), dtype=np.int32)
    return Draws(rows, rng.standard_normal((steps, 2, num_features), np.float32))


class Program(NamedTuple):
    """A method's compiled functions; hyper's leaves have the axes [runs, cells, ...], all else [runs, ...].

    Attributes:
        init: (initial networks, hyper) -> states.
        advance: (states, hyper, rows, draws of some steps) -> (states, leader's objective, [runs, cells, steps]).
        result: (states, hyper) -> results.
    """

    init: Callable[..., Any]
    advance: Callable[..., tuple[Any, jax.Array]]
    result: Callable[..., Any]


@cache
def program(method: str, setting: Setting, feature_of: tuple[int, ...]) -> Program:
    """The program of a method; the same arguments give the same object, which is compiled once.

    Raises:
        ValueError: there is no such method.
    """
    build: Any = find(METHODS, method).build

    def learner(hyper: Hyper) -> Learner:
        return build(setting, feature_of, hyper)

    def advance(state: Any, hyper: Hyper, rows: Rows, drawn: Draws) -> tuple[Any, jax.Array]:
        def step(state: Any, drawn: Draws) -> tuple[Any, jax.Array]:
            inner, outer = (Batch(rows.x[r], rows.y[r], noise) for r, noise in zip(*drawn, strict=True))
            return learner(hyper).step(state, inner, outer)

        return jax.lax.scan(step, state, drawn)

    return Program(
        init=over(lambda omega, hyper: learner(hyper).init(omega), (None, 0)),
        advance=over(advance, (0, 0, None, None)),
        result=over(lambda state, hyper: learner(hyper).result(state), (0, 0)),
    )


def sweep(
    method: str,
    setting: Setting,
    tables: Sequence[Table],
    hypers: Sequence[Hyper] | Hyper,
    seeds: Sequence[int],
    callback: Callback | None = None,
    chunk: int = 100,
) -> Any:
    """Trains every setting (cells) on every table (runs).

    Args:
        method: a name of `METHODS`.
        setting: shared by all.
        tables: the data, one per run.
        hypers: the settings, the same for every run; or one `Hyper` of arrays [runs, cells, ...].
        seeds: of the initial network and of the batches, one per run.
        callback: as that of `fb.train`, called after every chunk of steps.
        chunk: steps between two calls.

    Returns:
        The learner's result with leading axes [runs, cells].
    """
    if not isinstance(hypers, Hyper):
        hypers = tiled(hypers, len(seeds))
    first, feature_of = tables[0], tables[0].feature_of
    compiled = program(method, setting, feature_of)
    rows = stack([table.train for table in tables])
    drawn = stack([draws(setting, len(first.train.y), len(first.features), seed) for seed in seeds])
    states = compiled.init(stack([initial_network(len(feature_of), setting.width, seed) for seed in seeds]), hypers)

    def advance(states: Any, steps: slice) -> tuple[Any, jax.Array]:
        return compiled.advance(states, hypers, rows, Draws(*(values[:, steps] for values in drawn)))

    states = in_chunks(advance, states, setting.num_steps, callback, chunk)
    return jax.device_get(compiled.result(states, hypers))


@jax.jit
def _accuracies(networks: Params, parts: Sequence[Rows]) -> list[jax.Array]:
    """Of networks [runs, cells] on each part, rows [runs, n]; one network after the other, as rows are many."""

    def of_run(run: tuple[Params, Rows]) -> jax.Array:
        omega, rows = run
        return jax.lax.map(lambda omega: accuracy(omega, rows), omega)

    return [jax.lax.map(of_run, (networks, rows)) for rows in parts]


def measure(
    setting: Setting,
    tables: Sequence[Table],
    masks: Array,
    seeds: Sequence[int],
    callback: Callback | None = None,
) -> tuple[Array, Array]:
    """Accuracy on validation and test part of a network refitted to each set of features.

    Arguments:
        masks: the sets, [runs, cells, features] bool.

    Returns:
        (validation, test), [runs, cells] each.
    """
    scalars = [np.full(masks.shape[:2], value, np.float32) for value in Hyper()[:3]]
    networks = sweep(ALL, setting, tables, Hyper(*scalars, mask=masks.astype(np.float32)), seeds, callback)
    parts = [stack([table.validation for table in tables]), stack([table.test for table in tables])]
    validation, test = map(np.asarray, _accuracies(networks, parts))
    return validation, test


def random_mask(size: int, num_features: int, seed: Sequence[int]) -> Array:
    """So many features, drawn at random, [num_features] bool."""
    return np.random.default_rng(seed).permutation(num_features) < size


# The runs of the command.

REFIT_STEPS = 300
FIRST = "aid-cg"
"""The method as many features as whose the random sets have, unless a setting says otherwise."""


def settings_of(dataset: str, setting: Setting, trial: Mapping[str, float]) -> dict[str, Any]:
    """What a record says of a run."""
    return {"dataset": dataset} | asdict(setting) | {"refit_steps": REFIT_STEPS} | dict(trial)


def runs(dataset: str, methods: Iterable[str], setting: Setting, seeds: Iterable[int]) -> list[Run]:
    """Every setting of every method from every seed."""
    return [
        Run(method, seed, settings_of(dataset, setting, trial), trial)
        for method in methods
        for trial in trials(dataset, method)
        for seed in seeds
    ]


def random_runs(dataset: str, first: str, setting: Setting, seeds: Iterable[int]) -> list[Run]:
    """Random sets, each as large as one that the method `first` has selected."""
    sizes_of = {} if first == FIRST else {"sizes_of": first}
    followed = runs(dataset, [first], setting, seeds)
    return [run._replace(method=RANDOM, settings={**run.settings, **sizes_of}) for run in followed]


def train(
    where: Store, load: Callable[[int], Sequence[Table]], setting: Setting, track: Track, unit: Unit
) -> list[Result]:
    """Makes the runs of a unit: one method's selections, and a new network on each.

    Args:
        where: the store; random sets are as large as those that are recorded there.
        load: seed -> the divisions of its data, its folds.
        setting: shared by all.
        track: as that of `progress`.
        unit: the runs.
    """
    folds = {seed: load(seed) for seed in unit.seeds}
    tables = [table for of_seed in folds.values() for table in of_seed]
    seeds = [seed for seed, of_seed in folds.items() for _ in of_seed]
    method, features = unit.cells[0].method, tables[0].features
    if method == ALL:
        masks = np.ones((len(tables), len(unit.cells), len(features)), bool)
    elif method == RANDOM:
        masks = random_masks(where, unit, folds)
    else:
        hypers = [Hyper(**cell.how) for cell in unit.cells]
        masks = sweep(method, setting, tables, hypers, seeds, track(method, setting.num_steps))
    refit = replace(setting, num_steps=REFIT_STEPS)
    accuracies = measure(refit, tables, masks, seeds, track(f"refit {method}", REFIT_STEPS))

    def by_seed(values: Array) -> Array:
        return np.asarray(values).reshape(len(folds), -1, *values.shape[1:])

    masks, (validation, test) = by_seed(masks), map(by_seed, accuracies)  # [seeds, folds, cells, ...]
    return [
        _result(features, masks[s, :, c], test[s, :, c], validation[s, :, c])
        for s in range(len(folds))
        for c in range(len(unit.cells))
    ]


def _result(features: Sequence[str], masks: Array, test: Array, validation: Array) -> Result:
    """Of one run: masks [folds, features], accuracies [folds]."""
    sizes, shares = masks.sum(axis=1), masks.mean(axis=0)
    metrics = {
        "num_features": sizes.mean(),
        "accuracy": test.mean(dtype=float),
        "validation_accuracy": validation.mean(dtype=float),
    }
    often = {name: round(float(share), 3) for name, share in zip(features, shares, strict=True) if share > 0}
    return Result(metrics, {"features": {"features": often, "sizes": sizes.tolist()}})


def random_masks(where: Store, unit: Unit, folds: Mapping[int, Sequence[Table]]) -> Array:
    """Sets as large as those of the method that they follow, [runs, cells, features]; none depends on the others."""
    lines, records = store.beside(where, "features"), {store.key_of(line): line for line in store.records(where)}

    def of_cell(cell: Run, seed: int) -> Array:
        """[folds, features]."""
        settings = dict(cell.settings)
        first = settings.pop("sizes_of", FIRST)
        key = store.run_key(where.task, Run(first, seed, settings))
        mean = round(store.values(records[key])["num_features"])  # of records that do not tell the sizes apart
        sizes = lines.get(key, {}).get("sizes", [mean] * len(folds[seed]))
        place = trials(settings["dataset"], first).index(cell.how)
        return np.stack(
            [random_mask(size, len(folds[seed][0].features), [seed, i, place]) for i, size in enumerate(sizes)]
        )

    return np.concatenate([np.stack([of_cell(cell, seed) for cell in unit.cells], axis=1) for seed in unit.seeds])
