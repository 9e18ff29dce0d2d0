r"""Which features does a network need? The leader predicts, the follower owns one gate per feature and keeps few open.

A feature is a column of the table; all one-hot parts of a categorical column share its gate z, which multiplies them.
Leader omega, a network's weights, and follower theta, the gates' means mu, play

.. math::
    L_{out}(\omega, \mu) &= E_\epsilon\, \text{cross entropy}(\omega, x \odot z),
        \quad z_j = \min(\max(\mu_j + \sigma \epsilon_j, 0), 1), \quad \epsilon_j \sim N(0, 1), \\
    L_{in}(\omega, \mu) &= E_\epsilon\, \text{cross entropy}(\omega, x \odot z)
        + \lambda \sum_j P(z_j > 0), \quad P(z_j > 0) = \Phi(\mu_j / \sigma) .

These are the stochastic gates of Yamada et al. (2020); a feature is selected if its gate without noise is open, mu > 0.
The leader does not pay for open gates. As the count does not depend on omega, `alternating` is joint training of
network and gates; the hypergradients of `aid-cg` and `itd` see in addition that the gates will answer.

Controls on the same network: `lasso` and `group-lasso` soften the first layer's weights by proximal gradient steps,
singly or in one block per feature, and select the features that keep any; `random-mask` draws as many features as
`aid-cg` has selected. Whatever selected them, the selected features are given to a new network, trained always alike.

References:
    Yamada, Lindenbaum, Negahban, Kluger, *Feature Selection using Stochastic Gates*, ICML 2020,
    https://arxiv.org/abs/1810.04247; Louizos, Welling, Kingma, *Learning Sparse Neural Networks through L0
    Regularization*, ICLR 2018, https://arxiv.org/abs/1712.01312; Scardapane et al., *Group Sparse Regularization for
    Deep Neural Networks*, Neurocomputing 2017, https://arxiv.org/abs/1607.00485 (lasso and group lasso of a layer).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcbilevel as fb
from funcbilevel.tasks import fairness_data
from funcbilevel.tasks._experiment.players import cosine, stack

Array: TypeAlias = np.ndarray[Any, Any]
Params: TypeAlias = dict[str, jax.Array]

# Data.


class Rows(NamedTuple):
    """Rows to train or to measure on.

    Attributes:
        x: inputs, [n, d].
        y: labels, 0 or 1, [n].
    """

    x: Any
    y: Any


class Table(NamedTuple):
    """A classification task whose features are columns of a table.

    Attributes:
        name: of the data.
        features: names of the features.
        feature_of: the feature, by its number, to which each input column belongs, [d].
        train, validation, test: disjoint rows.
    """

    name: str
    features: tuple[str, ...]
    feature_of: tuple[int, ...]
    train: Rows
    validation: Rows
    test: Rows


def standardised(x: Array, train: Array, feature_of: Sequence[int]) -> Array:
    """x centred, and divided by the root of the feature's variance, the sum over its columns, in the training part.

    Every feature has then a variance of one there, of however many columns it consists: penalties treat all alike.
    """
    members = np.eye(max(feature_of) + 1)[list(feature_of)]  # [d, features]
    variance = members @ (members.T @ train.var(axis=0))
    return ((x - train.mean(axis=0)) / np.sqrt(np.where(variance > 0, variance, 1.0))).astype(np.float32)


def _table(
    name: str, features: Sequence[str], feature_of: Sequence[int], parts: Sequence[tuple[Array, Array]]
) -> Table:
    train = parts[0][0]
    rows = [Rows(standardised(x, train, feature_of), y.astype(np.float32)) for x, y in parts]
    return Table(name, tuple(features), tuple(feature_of), *rows)


FOLDS = 3


def breast_cancer(seed: int = 0, fold: int = 0) -> Table:
    """Breast cancer of Wisconsin (569 tumours, 30 features; Street, Wolberg, Mangasarian 1993), as scikit-learn has it.

    The seed draws 143 rows for the test part and divides the others into three parts of 142; one of these, the fold,
    is the validation part.
    """
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415

    data: Any = load_breast_cancer()
    *folds, test = fairness_data.split(len(data.target), (0.25, 0.25, 0.25), seed)
    kept = np.concatenate([rows for i, rows in enumerate(folds) if i != fold])
    parts = [(data.data[rows], data.target[rows]) for rows in (kept, folds[fold], test)]
    names: list[str] = [str(name) for name in data.feature_names]
    return _table("breast-cancer", names, range(len(names)), parts)


def adult(directory: str | Path | None = None, seed: int = 0) -> Table:
    """UCI Adult of `fairness_data.adult` with its 13 columns as features.

    A fifth of adult.data, chosen by the seed, is the validation part; adult.test is the test part.
    """
    categories = fairness_data.ADULT_CATEGORIES
    data = fairness_data.adult(directory, attributes=categories, seed=seed)
    widths = {name: 1 if name == "sex" else k for name, k in zip(categories, data.num_groups, strict=True)}
    widths = dict.fromkeys(fairness_data.ADULT_NUMBERS, 1) | widths
    feature_of = [i for i, width in enumerate(widths.values()) for _ in range(width)]
    parts = [(part.x, part.y) for part in (data.train, data.validation, data.test)]
    return _table("adult", tuple(widths), feature_of, parts)


# Gates.

SIGMA = 0.5
"""Standard deviation of a gate's noise, as in Yamada et al."""


def gates(mu: jax.Array, noise: jax.Array | float = 0.0) -> jax.Array:
    """z in [0, 1] of means mu, [features]; without noise as in evaluation."""
    return jnp.clip(mu + SIGMA * noise, 0.0, 1.0)


def expected_open(mu: jax.Array) -> jax.Array:
    """The expected number of gates with z > 0."""
    return jnp.sum(jax.scipy.stats.norm.cdf(mu / SIGMA))


# The network.


def initial_network(d: int, width: int, seed: int) -> dict[str, Array]:
    """Weights of variance 2 / fan-in: `w1` [d, width], `b1` [width], `w2` [width], `b2` scalar."""
    rng = np.random.default_rng(seed)
    network = {
        "w1": rng.normal(size=(d, width)) * (2 / d) ** 0.5,
        "b1": np.zeros(width),
        "w2": rng.normal(size=width) * (2 / width) ** 0.5,
        "b2": np.zeros(()),
    }
    return {name: weights.astype(np.float32) for name, weights in network.items()}


def logits(omega: Params, x: jax.Array) -> jax.Array:
    """[n, d] -> [n]."""
    return jax.nn.relu(x @ omega["w1"] + omega["b1"][None]) @ omega["w2"] + omega["b2"]


def gated(omega: Params, z: jax.Array) -> Params:
    """The network whose inputs are multiplied by z, [d]: the product may as well be with the first layer."""
    return omega | {"w1": z[:, None] * omega["w1"]}


def cross_entropy(omega: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean over the rows."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits(omega, x), y))


def accuracy(omega: Params, rows: Rows) -> jax.Array:
    """Share of the rows with the right sign."""
    return jnp.mean((logits(omega, rows.x) > 0) == (rows.y > 0.5))


class Setting(NamedTuple):
    """What decides the compiled program.

    Attributes:
        width: of the hidden layer.
        batch_size: rows per step, drawn with replacement, leader's and follower's apart.
        num_steps: of the leader; rates fall to zero by half a cosine over them.
        inner_steps: the follower's steps per step of the leader.
        solver_steps, damping: of conjugate gradients in `aid-cg`.
        weight_decay: in every method weight_decay/2 |weights|^2 is added to the leader's objective.
    """

    width: int = 32
    batch_size: int = 64
    num_steps: int = 1200
    inner_steps: int = 1
    solver_steps: int = 5
    damping: float = 0.1
    weight_decay: float = 1e-3


class Hyper(NamedTuple):
    """What may differ between the cells of one program.

    Attributes:
        penalty: lambda, the weight of the number of open gates, or of the norm in the lassos.
        leader_rate: of Adam on the network; of gradient descent in the lassos.
        follower_rate: of Adam on the gates.
        mask: of `refit`: 1 for the features that the network gets, [features].
    """

    penalty: Any = 0.0
    leader_rate: Any = 0.01
    follower_rate: Any = 0.003
    mask: Any = 1.0


class Batch(NamedTuple):
    """Rows drawn for a step, and the gates' noise in it.

    Attributes:
        x, y: [b, d] and [b].
        noise: [features].
    """

    x: Any
    y: Any
    noise: Any


class Learner(NamedTuple):
    """A way to train, in pure functions.

    Attributes:
        init: initial network -> state.
        step: (state, follower's batch, leader's batch) -> (state, leader's objective).
        result: state -> the features selected, [features] bool; of `refit` the network.
    """

    init: Callable[[Params], Any]
    step: Callable[[Any, Batch, Batch], tuple[Any, jax.Array]]
    result: Callable[[Any], Any]


def problem(penalty: Any, feature_of: Sequence[int], weight_decay: float = 0.0) -> fb.ParametricProblem:
    """The bilevel problem: leader omega = outer_params, follower mu = inner_params."""
    columns = jnp.array(feature_of)

    def gated_cross_entropy(omega: Params, mu: jax.Array, batch: Batch) -> jax.Array:
        return cross_entropy(gated(omega, gates(mu, batch.noise)[columns]), batch.x, batch.y)

    def inner_objective(omega: Params, mu: jax.Array, batch: Batch) -> jax.Array:
        return gated_cross_entropy(omega, mu, batch) + penalty * expected_open(mu)

    def outer_objective(omega: Params, mu: jax.Array, batch: Batch) -> jax.Array:
        return gated_cross_entropy(omega, mu, batch) + 0.5 * weight_decay * optax.tree.norm(omega, squared=True)

    return fb.ParametricProblem(inner_objective, outer_objective)


def _adam(rate: Any, num_steps: int) -> optax.GradientTransformation:
    # eps_root: `itd` differentiates the root of a second moment that is zero for gates that are shut.
    return optax.adam(lambda count: rate * cosine(count, num_steps), eps_root=1e-16)


def _gated(estimator: Callable[[Setting], fb.Estimator]) -> Callable[..., Learner]:
    """The follower moves, then the leader, by the estimator's hypergradient."""

    def learner(setting: Setting, feature_of: Sequence[int], hyper: Hyper) -> Learner:
        num_features = max(feature_of) + 1
        solver = fb.bilevel(
            problem(hyper.penalty, feature_of, setting.weight_decay),
            None,
            estimator(setting),
            inner_optimizer=_adam(hyper.follower_rate, setting.num_steps * setting.inner_steps),
            outer_optimizer=_adam(hyper.leader_rate, setting.num_steps),
            inner_steps=setting.inner_steps,
        )

        def init(omega: Params) -> fb.BilevelState:
            return solver.init(jax.random.key(0), omega, None, jnp.full(num_features, 0.5))

        def step(state: fb.BilevelState, inner: Batch, outer: Batch) -> tuple[fb.BilevelState, jax.Array]:
            state, metrics = solver.step(state, inner, outer)
            return state, metrics["outer_objective"]

        return Learner(init, step, lambda state: state.inner_params > 0)

    return learner


def soften(w: jax.Array, threshold: Any) -> jax.Array:
    """The proximal map of threshold |w|_1: each weight comes nearer to zero by the threshold, or is zero."""
    return jnp.sign(w) * jnp.maximum(jnp.abs(w) - threshold, 0.0)


def soften_groups(w: jax.Array, threshold: Any, feature_of: Sequence[int]) -> jax.Array:
    """The proximal map of threshold times the sum of the norms of each feature's rows of w, [d, width]."""
    columns = jnp.array(feature_of)
    squares = jax.ops.segment_sum(jnp.sum(w**2, axis=1), columns, max(feature_of) + 1)
    norms = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
    return w * jnp.where(squares > 0, jnp.maximum(1 - threshold / norms, 0.0), 0.0)[columns][:, None]


def _lasso(proximal: Callable[[jax.Array, Any, Sequence[int]], jax.Array]) -> Callable[..., Learner]:
    """Stochastic proximal gradient descent on cross entropy + penalty x norm of the first layer."""

    def learner(setting: Setting, feature_of: Sequence[int], hyper: Hyper) -> Learner:
        def init(omega: Params) -> tuple[jax.Array, Params]:
            return jnp.zeros((), jnp.int32), omega

        def step(state: tuple[jax.Array, Params], _: Batch, batch: Batch) -> tuple[Any, jax.Array]:
            count, omega = state
            value, gradient = jax.value_and_grad(cross_entropy)(omega, batch.x, batch.y)
            rate = hyper.leader_rate * cosine(count, setting.num_steps)
            omega = jax.tree.map(lambda w, g: w - rate * (g + setting.weight_decay * w), omega, gradient)
            w1 = proximal(omega["w1"], rate * hyper.penalty, feature_of)
            return (count + 1, omega | {"w1": w1}), value

        def selected(state: tuple[jax.Array, Params]) -> jax.Array:
            used = jnp.any(state[1]["w1"] != 0, axis=1).astype(jnp.int32)
            return jax.ops.segment_sum(used, jnp.array(feature_of), max(feature_of) + 1) > 0

        return Learner(init, step, selected)

    return learner


def _refit(setting: Setting, feature_of: Sequence[int], hyper: Hyper) -> Learner:
    """A new network on the features of `hyper.mask`, by Adam."""
    optimizer = _adam(hyper.leader_rate, setting.num_steps)
    mask = jnp.broadcast_to(hyper.mask, (max(feature_of) + 1,))[jnp.array(feature_of)]

    def init(omega: Params) -> tuple[Params, Any]:
        return omega, optimizer.init(omega)

    def step(state: tuple[Params, Any], _: Batch, batch: Batch) -> tuple[Any, jax.Array]:
        omega, opt_state = state
        value, gradient = jax.value_and_grad(lambda w: cross_entropy(gated(w, mask), batch.x, batch.y))(omega)
        gradient = jax.tree.map(lambda g, w: g + setting.weight_decay * w, gradient, omega)
        updates, opt_state = optimizer.update(gradient, opt_state, omega)
        return (optax.apply_updates(omega, updates), opt_state), value

    return Learner(init, step, lambda state: gated(state[0], mask))


METHODS: dict[str, Callable[[Setting, Sequence[int], Hyper], Learner]] = {
    "alternating": _gated(lambda setting: fb.alternating()),
    "aid-cg": _gated(lambda setting: fb.aid(fb.cg(setting.solver_steps, setting.damping))),
    "itd": _gated(lambda setting: fb.itd(setting.inner_steps)),
    "lasso": _lasso(lambda w, threshold, feature_of: soften(w, threshold)),
    "group-lasso": _lasso(soften_groups),
    "refit": _refit,
}


# Training: all hyper-parameter settings (cells) on all divisions of the data (runs) at once.


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
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")

    def learner(hyper: Hyper) -> Learner:
        return METHODS[method](setting, feature_of, hyper)

    def advance(state: Any, hyper: Hyper, rows: Rows, drawn: Draws) -> tuple[Any, jax.Array]:
        def step(state: Any, drawn: Draws) -> tuple[Any, jax.Array]:
            inner, outer = (Batch(rows.x[r], rows.y[r], noise) for r, noise in zip(*drawn, strict=True))
            return learner(hyper).step(state, inner, outer)

        return jax.lax.scan(step, state, drawn)

    def over(function: Callable[..., Any], in_cells: tuple[int | None, ...]) -> Any:
        return jax.jit(jax.vmap(jax.vmap(function, in_axes=in_cells)))

    return Program(
        init=over(lambda omega, hyper: learner(hyper).init(omega), (None, 0)),
        advance=over(advance, (0, 0, None, None)),
        result=over(lambda state, hyper: learner(hyper).result(state), (0, 0)),
    )


def train(
    method: str,
    setting: Setting,
    tables: Sequence[Table],
    hypers: Sequence[Hyper] | Hyper,
    seeds: Sequence[int],
    callback: Callable[[Any, Mapping[str, Any]], None] | None = None,
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
        hypers = jax.tree.map(lambda *values: np.tile(np.array(values, np.float32), (len(seeds), 1)), *hypers)
    first, feature_of = tables[0], tables[0].feature_of
    compiled = program(method, setting, feature_of)
    rows = stack([table.train for table in tables])
    drawn = stack([draws(setting, len(first.train.y), len(first.features), seed) for seed in seeds])
    states = compiled.init(stack([initial_network(len(feature_of), setting.width, seed) for seed in seeds]), hypers)
    for start in range(0, setting.num_steps, chunk):
        of_chunk = Draws(*(values[:, start : start + chunk] for values in drawn))
        states, values = jax.block_until_ready(compiled.advance(states, hypers, rows, of_chunk))
        if callback is not None:
            callback(states, {"outer_objective": np.mean(values, axis=(0, 1))})
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
    callback: Callable[[Any, Mapping[str, Any]], None] | None = None,
) -> tuple[Array, Array]:
    """Accuracy on validation and test part of a network refitted to each set of features.

    Arguments:
        masks: the sets, [runs, cells, features] bool.

    Returns:
        (validation, test), [runs, cells] each.
    """
    scalars = [np.full(masks.shape[:2], value, np.float32) for value in Hyper()[:3]]
    networks = train("refit", setting, tables, Hyper(*scalars, mask=masks.astype(np.float32)), seeds, callback)
    parts = [stack([table.validation for table in tables]), stack([table.test for table in tables])]
    validation, test = map(np.asarray, _accuracies(networks, parts))
    return validation, test


def random_masks(masks: Array, seed: int = 0) -> Array:
    """Sets of the same sizes, drawn at random, [..., features]."""
    ranks = np.random.default_rng(seed).random(masks.shape).argsort(axis=-1).argsort(axis=-1)
    return ranks < masks.sum(axis=-1, keepdims=True)


# How many features are needed.

TOLERANCES = (0.005, 0.01)
"""Of accuracy: half a point, and one."""


def needed(validation: Array, counts: Array, full: Array, tolerance: float) -> Array:
    """The setting with the fewest features among those whose validation accuracy is nearly that of all features.

    Of settings with as many features, it is the most accurate.

    Arguments:
        validation, counts: accuracies and numbers of features, [..., cells].
        full: accuracy of the network with all features, [...].
        tolerance: how far below it the accuracy may be.

    Returns:
        The number of the cell, [...]; -1 if none is as good, so that all features are needed.
    """
    enough = validation >= full[..., None] - tolerance - 1e-6  # float32 means of the same rows differ by rounding
    best = np.lexsort((-validation, np.where(enough, np.round(counts, 6), np.inf)), axis=-1)[..., 0]
    return np.where(enough.any(axis=-1), best, -1)
