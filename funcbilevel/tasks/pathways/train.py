"""All settings from all seeds at once, in one program for each way to train."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbilevel.tasks._experiment.cells import in_chunks, over, stack, tiled
from funcbilevel.tasks._experiment.grid import Callback, Track, Unit
from funcbilevel.tasks._experiment.methods import find
from funcbilevel.tasks._experiment.players import Learner
from funcbilevel.tasks._experiment.store import Result, Run
from funcbilevel.tasks.pathways.methods import METHODS, Hyper, Setting, hypers
from funcbilevel.tasks.pathways.problem import (
    Array,
    Design,
    Expression,
    Params,
    Rows,
    attributions,
    auroc,
    generate,
    initial_network,
    logits,
    share_inside,
)


def program(method: str, setting: Setting, num_genes: int) -> tuple[Callable[..., Any], ...]:
    """(init, advance, params) of a method, compiled, over seeds and cells.

    Raises:
        ValueError: there is no such method.
    """
    return _program(find(METHODS, method).build, setting, num_genes)


@cache
def _program(build: Any, setting: Setting, num_genes: int) -> tuple[Callable[..., Any], ...]:
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, initial_network(num_genes, setting.width, 0)))

    def learner(hyper: Hyper, known: jax.Array) -> Learner:
        return build(setting, shapes, known, hyper)

    def init(hyper: Hyper, params: Params, known: jax.Array) -> Any:
        return learner(hyper, known).init(params)

    def advance(state: Any, hyper: Hyper, rows: Rows, drawn: jax.Array, known: jax.Array) -> tuple[Any, jax.Array]:
        x = rows.x * jnp.where(hyper.known_only > 0, known, 1.0)[None]
        step = learner(hyper, known).step

        def of_rows(state: Any, chosen: jax.Array) -> tuple[Any, jax.Array]:
            seen = Rows(x[chosen], rows.y[chosen])
            return step(state, seen, seen)

        return jax.lax.scan(of_rows, state, drawn)

    def params(state: Any, hyper: Hyper, known: jax.Array) -> Params:
        return learner(hyper, known).result(state)

    return over(init, (0, None, None)), over(advance, (0, 0, None, None, None)), over(params, (0, 0, None))


@jax.jit
def measure(params: Params, hyper: Hyper, data: tuple[Rows, ...], known: jax.Array, true: jax.Array) -> Any:
    """Metrics of networks [seeds, cells] on (validation, test, corrected), rows [seeds, n]; genes [seeds, genes].

    `accuracy`, `known_share` and `true_share` of the attributions, `auroc` of finding the driving pathways' genes by
    their attributions' mass: on the test part, with `validation_` before it on the validation part; and
    `corrected_accuracy`.
    """

    def of_network(params: Params, hyper: Hyper, data: tuple[Rows, ...], known: jax.Array, true: jax.Array) -> Any:
        seen = jnp.where(hyper.known_only > 0, known, 1.0)[None]
        validation, test, corrected = (rows._replace(x=rows.x * seen) for rows in data)

        def accuracy(rows: Rows) -> jax.Array:
            return jnp.mean((logits(params, rows.x) > 0) == (rows.y > 0.5))

        return {
            "accuracy": accuracy(test),
            "corrected_accuracy": accuracy(corrected),
            "known_share": share_inside(params, test.x, known),
            "true_share": share_inside(params, test.x, true),
            "auroc": auroc(jnp.mean(jnp.abs(attributions(params, test.x)), axis=0), true),
            "validation_accuracy": accuracy(validation),
            "validation_known_share": share_inside(params, validation.x, known),
        }

    return jax.vmap(jax.vmap(of_network, in_axes=(0, 0, None, None, None)))(params, hyper, data, known, true)


def sweep(
    method: str,
    setting: Setting,
    data: Sequence[Expression],
    hypers: Sequence[Hyper],
    seeds: Sequence[int],
    callback: Callback | None = None,
    chunk: int = 100,
) -> dict[str, Array]:
    """Trains every setting on every seed's data, and measures: metric -> [seeds, cells].

    Args:
        method: a name of `METHODS`.
        setting: shared by all.
        data: one per seed.
        hypers: the settings.
        seeds: of the initial networks and of the batches.
        callback: as that of `fb.train`, called after every chunk of steps.
        chunk: steps between two calls.
    """
    num_genes = data[0].train.x.shape[1]
    init, advance, params = program(method, setting, num_genes)
    hyper = tiled(hypers, len(seeds))
    known, true = (np.stack(genes).astype(np.float32) for genes in zip(*((d.known, d.true) for d in data), strict=True))
    drawn = np.stack([draws(setting, len(data[0].train.y), seed) for seed in seeds])
    rows = stack([d.train for d in data])
    states = init(hyper, stack([initial_network(num_genes, setting.width, seed) for seed in seeds]), known)
    states = in_chunks(
        lambda states, steps: advance(states, hyper, rows, drawn[:, steps], known),
        states,
        setting.num_steps,
        callback,
        chunk,
    )
    parts = tuple(stack(list(part)) for part in zip(*((d.validation, d.test, d.corrected) for d in data), strict=True))
    return jax.device_get(measure(params(states, hyper, known), hyper, parts, known, true))


def draws(setting: Setting, num_rows: int, seed: int) -> Array:
    """The rows of every step, [steps, b], the same for every method and hyper-parameter setting."""
    return np.random.default_rng(seed).integers(num_rows, size=(setting.num_steps, setting.batch_size), dtype=np.int32)


# The runs of the command.


def runs(methods: Iterable[str], design: Design, setting: Setting, seeds: Iterable[int]) -> list[Run]:
    """Every setting of every method from every seed."""
    shared = design._asdict() | asdict(setting)
    return [
        Run(method, seed, shared | {"eta": hyper.eta, "rate": hyper.rate}, hyper)
        for method in methods
        for hyper in hypers(method)
        for seed in seeds
    ]


def one_program(run: Run) -> Any:
    """Runs that one program serves: all that descend one objective are one."""
    return METHODS[run.method].build


def train(design: Design, setting: Setting, track: Track, unit: Unit) -> list[Result]:
    """Makes the runs of a unit."""
    data = [generate(design, seed) for seed in unit.seeds]
    method, cells = unit.cells[-1].method, [cell.how for cell in unit.cells]
    metrics = sweep(method, setting, data, cells, unit.seeds, track(method, setting.num_steps))
    return [
        Result({name: values[s, c] for name, values in metrics.items()})
        for s in range(len(unit.seeds))
        for c in range(len(cells))
    ]
