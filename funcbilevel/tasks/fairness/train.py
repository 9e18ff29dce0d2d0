"""Many runs (cells: a setting of eta and of the rates, and a seed) in one compiled program."""

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcbilevel as fb
from funcbilevel.tasks._experiment.cells import repeat
from funcbilevel.tasks._experiment.grid import Callback
from funcbilevel.tasks.data.dataset import Batch, Dataset
from funcbilevel.tasks.fairness.losses import Loss, accuracy_loss, losses_of, measure, sum_of
from funcbilevel.tasks.fairness.methods import METHODS, check
from funcbilevel.tasks.fairness.networks import Layers, followers_of, is_followers, logits_of, network
from funcbilevel.tasks.fairness.problem import Game, Hyper, Setting


def take(batch: Batch, rows: jax.Array) -> Batch:
    """The batch's rows with these numbers."""
    return jax.tree.map(lambda a: a[rows], batch)


def _adam(rate: Any, decay: float, steps: int, weight_decay: float) -> optax.GradientTransformation:
    schedule: Any = rate if decay == 1.0 else lambda count: rate * decay ** (count // steps)
    # eps_root: `itd` differentiates the root of a second moment that is zero for units that are off.
    adam = optax.adam(schedule, eps_root=1e-20)
    return optax.chain(optax.add_decayed_weights(weight_decay), adam) if weight_decay else adam


def of_followers(optimizer: optax.GradientTransformation, setting: Setting) -> optax.GradientTransformation:
    """One such optimizer for each follower's layers; in round-robin follower j takes every m-th inner step, from j."""
    m = setting.num_followers
    if m == 1:
        return optimizer

    def turns(j: int) -> optax.GradientTransformationExtraArgs:
        def is_next(step: Any, **_: Any) -> Any:
            return step % m == j

        return optax.transforms.conditionally_mask(optimizer, is_next)

    alike = setting.followers == "together"
    return optax.partition(
        {j: optimizer if alike else turns(j) for j in range(m)}, lambda theta: followers_of(theta, m)
    )


class Program(NamedTuple):
    """A method's compiled functions over cells: hyper's leaves, keys and states have a leading axis.

    Attributes:
        init: (keys, hyper, train) -> states.
        epochs: (states, hyper, keys, train, first epoch, number of epochs) -> (states, metrics of the last epoch).
    """

    init: Callable[..., fb.BilevelState]
    epochs: Callable[..., tuple[fb.BilevelState, dict[str, jax.Array]]]


@cache
def program(method: str, setting: Setting, num_groups: tuple[int, ...]) -> Program:
    """The program of a method; the same arguments give the same object, which is compiled once.

    Raises:
        ValueError: as `check` says.
    """
    check(method, setting)
    row, losses, m = setting.row, losses_of(setting.terms, num_groups), setting.num_followers

    def size(train: Batch) -> tuple[int, int]:
        """Rows per step and steps per epoch."""
        rows = min(setting.batch_size or len(train.y), len(train.y))
        return rows, len(train.y) // rows

    def solver(hyper: Hyper, train: Batch) -> fb.BilevelSolver:
        every = setting.decay_epochs * size(train)[1]
        follower_every = every * setting.inner_steps
        game = Game(
            logits=logits_of(row, train.x),
            fairness=sum_of(losses),
            hyper=hyper,
            setting=setting,
            leader_optimizer=_adam(hyper.leader_rate, setting.leader_decay, every, setting.weight_decay),
            follower_optimizer=of_followers(
                _adam(hyper.follower_rate, setting.follower_decay, follower_every, setting.weight_decay), setting
            ),
            losses=losses if m > 1 else (),
        )
        build: Any = METHODS[method].build
        return build(game)

    def init(key: jax.Array, hyper: Hyper, train: Batch) -> fb.BilevelState:
        module: Any = network(train.x, row)
        leader, follower, _ = fb.partition(module.init(key, train.x), is_followers)
        return solver(hyper, train).init(key, leader, None, follower)

    def epochs(
        state: fb.BilevelState, hyper: Hyper, key: jax.Array, train: Batch, first: jax.Array, count: jax.Array
    ) -> tuple[fb.BilevelState, dict[str, jax.Array]]:
        rows, steps = size(train)
        whole = rows == len(train.y) and setting.inner_batch_size is None
        of_method = solver(hyper, train)

        def step(state: fb.BilevelState, of_step: tuple[jax.Array, jax.Array]) -> tuple[fb.BilevelState, Any]:
            chosen, step_key = of_step
            outer = train if whole else take(train, chosen)
            inner = outer
            if setting.inner_batch_size is not None:
                inner = take(train, jax.random.randint(step_key, (setting.inner_batch_size,), 0, len(train.y)))
            return of_method.step(state, inner, outer)

        def epoch(state: fb.BilevelState, number: jax.Array) -> tuple[fb.BilevelState, Any]:
            order_key, inner_key = jax.random.split(jax.random.fold_in(key, number))
            order = jnp.arange(steps) if whole else jax.random.permutation(order_key, len(train.y))[: steps * rows]
            keys = jax.random.split(inner_key, steps)
            state, trace = jax.lax.scan(step, state, (order.reshape(steps, -1), keys))
            return state, jax.tree.map(lambda values: jnp.mean(values.astype(jnp.float32)), trace)

        return repeat(epoch, state, first, count)

    return Program(
        init=jax.jit(jax.vmap(init, in_axes=(0, 0, None))),
        epochs=jax.jit(jax.vmap(epochs, in_axes=(0, 0, 0, None, None, None)), donate_argnums=0),
    )


Parts: TypeAlias = tuple[Any, Any]
"""(omega, theta) of cells, leading axes alike."""


@cache
def evaluator(row: Layers, num_groups: tuple[int, ...]) -> Callable[[Parts, tuple[Batch, ...]], dict[str, jax.Array]]:
    """(parts, (validation, test)) -> metrics of each cell; those of the validation part begin with `validation_`.

    One cell after the other, as all test rows of all cells at once would need gigabytes. It serves every method.
    """

    def evaluate(parts: Parts, batches: tuple[Batch, ...]) -> dict[str, jax.Array]:
        validation, test = (measure(logits_of(row, b.x)(*parts, b.x), b, num_groups) for b in batches)
        return test | {f"validation_{name}": value for name, value in validation.items()}

    return jax.jit(lambda parts, batches: jax.lax.map(lambda cell: evaluate(cell, batches), parts))


@cache
def diagnosis(
    row: Layers, losses: tuple[Loss, ...], num_groups: tuple[int, ...]
) -> Callable[[Parts, Hyper, Batch], dict[str, jax.Array]]:
    """(parts, hyper, train) -> on the training part how far the follower is from a solution, by its gradient's norm.

    `follower_gradient` is that of one follower's objective, with the sum of the losses if there are several;
    `follower_gradient_of_leader` that of the leader's; both by theta.
    """

    def diagnose(parts: Parts, hyper: Hyper, train: Batch) -> dict[str, jax.Array]:
        omega, theta = parts
        logits, unfairness = logits_of(row, train.x), sum_of(losses_of(losses, num_groups))

        def objectives(theta: Any) -> tuple[jax.Array, jax.Array]:
            z = logits(omega, theta, train.x)
            return accuracy_loss(z, train), unfairness(z, train)

        values, pull = jax.vjp(objectives, theta)
        eta, alpha, beta = hyper.eta, hyper.follower_accuracy, hyper.leader_fairness
        one = jnp.ones_like(values[0])
        return {
            "follower_gradient": optax.tree.norm(pull((alpha * one, eta * one))),
            "follower_gradient_of_leader": optax.tree.norm(pull((one, beta * eta * one))),
            "train_accuracy_loss": values[0],
            "train_unfairness": values[1],
        }

    return jax.jit(
        lambda parts, hyper, train: jax.lax.map(lambda cell: diagnose(cell[0], cell[1], train), (parts, hyper))
    )


class Cell(NamedTuple):
    """One finished run.

    Attributes:
        hyper: its hyper-parameters.
        seed: of its initial network and the order of its rows.
        metrics: at the end.
        curves: `epoch` and metrics after each chunk of epochs.
    """

    hyper: Hyper
    seed: int
    metrics: dict[str, float]
    curves: dict[str, list[float]]


class Outcome(NamedTuple):
    """Runs of one method.

    Attributes:
        cells: the runs.
        seconds: for all of it, compilation included.
        epoch_seconds: of one epoch of all cells together, the median over the chunks after the first; NaN if there
            is one chunk only.
        parts: what was trained, (omega, theta), leaves with a leading axis of cells.
    """

    cells: list[Cell]
    seconds: float
    epoch_seconds: float
    parts: Parts | None = None


CURVES = ("epoch", "accuracy", "dp_gap", "dp_gap_soft", "eo_gap", "outer_objective", "inner_objective")


def sweep(
    method: str,
    setting: Setting,
    dataset: Dataset,
    cells: Sequence[tuple[Hyper, int]],
    num_epochs: int,
    *,
    chunk: int = 10,
    callback: Callback | None = None,
) -> Outcome:
    """Trains every cell, hyper-parameters and a seed, at once, and evaluates after each chunk of epochs.

    A seed gives the same initial network and the same order of rows in every setting and for every method.
    """
    start = time.perf_counter()
    compiled = program(method, setting, dataset.num_groups)
    train, *others = jax.tree.map(jnp.asarray, (dataset.train, dataset.validation, dataset.test))
    hyper = jax.tree.map(lambda *values: jnp.array(values, jnp.float32), *(hyper for hyper, _ in cells))
    keys = jnp.stack([jax.random.key(seed) for _, seed in cells])
    evaluate = evaluator(setting.row, dataset.num_groups)
    diagnose = diagnosis(setting.row, setting.terms, dataset.num_groups)
    states = compiled.init(keys, hyper, train)
    history: list[dict[str, Any]] = []
    seconds: list[float] = []
    for first in range(0, num_epochs, chunk):
        clock = time.perf_counter()
        count = min(chunk, num_epochs - first)
        states, trained = jax.block_until_ready(compiled.epochs(states, hyper, keys, train, first, count))
        seconds.append((time.perf_counter() - clock) / count)
        metrics = jax.device_get(trained | evaluate((states.outer_params, states.inner_params), tuple(others)))
        history.append({"epoch": np.full(len(cells), first + count)} | metrics)
        if callback is not None:
            callback(states, {name: np.full(count, np.mean(values)) for name, values in metrics.items()})
    history[-1] |= jax.device_get(diagnose((states.outer_params, states.inner_params), hyper, train))
    done = [
        Cell(
            of_cell,
            seed,
            {name: float(values[i]) for name, values in history[-1].items() if name != "epoch"},
            {name: [float(chunk[name][i]) for chunk in history] for name in CURVES},
        )
        for i, (of_cell, seed) in enumerate(cells)
    ]
    rest = seconds[1:]
    parts = states.outer_params, states.inner_params
    return Outcome(done, time.perf_counter() - start, float(np.median(rest)) if rest else float("nan"), parts)
