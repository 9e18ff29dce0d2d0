r"""A classifier of gene expression that should rest on known pathways, on data drawn with known truth.

Genes of one pathway share its activity; a few driving pathways decide the label. Other genes, in no pathway, carry
noise, and some of them a technical effect of the batch that happens to go with the label: a network may well use them.
One network belongs to two players. The leader owns all layers omega but the first and predicts; the follower owns the
first, theta, and keeps the attributions inside the known pathways K:

.. math::
    L_{out}(\omega, \theta) &= \text{cross entropy}, \qquad
    A_{ij} = x_{ij}\, \partial f_{\omega, \theta}(x_i) / \partial x_{ij}, \\
    L_{in}(\omega, \theta) &= \text{cross entropy}
        + \eta\, \frac{\sum_i \sum_{j \notin K} |A_{ij}|}{\sum_{ij} |A_{ij}|}.

A share cannot be had cheaply by a smaller f, and the cross entropy keeps the follower from a first layer that predicts
nothing. The control, `lagrangian`, is the follower's objective for all layers of the same network: attribution priors.
`known-genes` is a network that is given no other genes, `single-objective` one that is trained by cross entropy alone.

References:
    Shrikumar et al., *Not Just a Black Box: Learning Important Features Through Propagating Activation Differences*,
    2016, https://arxiv.org/abs/1605.01713 (gradient x input); Ross, Hughes, Doshi-Velez, *Right for the Right Reasons*,
    IJCAI 2017, https://arxiv.org/abs/1703.03717; Erion et al., *Improving Performance of Deep Learning Models with
    Axiomatic Attribution Priors*, Nature Machine Intelligence 2021, https://arxiv.org/abs/1906.10670.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcbilevel as fb

Array: TypeAlias = np.ndarray[Any, Any]
Params: TypeAlias = dict[str, dict[str, Any]]

# Data.


class Design(NamedTuple):
    """What is drawn.

    Attributes:
        num_pathways, size: pathways and genes in each.
        overlap: genes that a pathway shares with the next one; 0 for disjoint pathways.
        num_driving: pathways that the label depends on.
        num_background: genes in no pathway.
        num_technical: of these, how many the batch shifts.
        rho: correlation of the genes of one disjoint pathway.
        confounding: correlation of batch and label, but for the last part of the data, where it is zero.
        num_train, num_validation, num_test: rows.
    """

    num_pathways: int = 8
    size: int = 6
    overlap: int = 2
    num_driving: int = 3
    num_background: int = 26
    num_technical: int = 8
    rho: float = 0.5
    confounding: float = 0.5
    num_train: int = 600
    num_validation: int = 1000
    num_test: int = 2000


class Rows(NamedTuple):
    """Samples: expression x, [n, genes], and labels y, 0 or 1, [n]."""

    x: Any
    y: Any


class Expression(NamedTuple):
    """The data of one seed.

    Attributes:
        pathways: whether a gene is in a pathway, [pathways, genes] bool.
        driving: whether a pathway drives the label, [pathways] bool.
        train, validation, test: rows of one distribution.
        corrected: test rows whose batch does not go with the label.
    """

    pathways: Array
    driving: Array
    train: Rows
    validation: Rows
    test: Rows
    corrected: Rows

    @property
    def known(self) -> Array:
        """Whether a gene is in any pathway, [genes] bool."""
        return np.any(self.pathways, axis=0)

    @property
    def true(self) -> Array:
        """Whether a gene is in a driving pathway, [genes] bool."""
        return np.any(self.pathways[self.driving], axis=0)


def membership(design: Design) -> Array:
    """Which genes each pathway has, [pathways, genes] bool: one after the other, the background last."""
    step = design.size - design.overlap
    genes = step * design.num_pathways + design.overlap + design.num_background
    number = np.arange(genes) - step * np.arange(design.num_pathways)[:, None]
    return (number >= 0) & (number < design.size)


def generate(design: Design, seed: int) -> Expression:
    """Draws the data of a seed.

    With activities a_g and noise e from N(0, 1), gene j of the pathways G_j has the expression sqrt(rho / |G_j|) times
    the sum of a_g over G_j plus sqrt(1 - rho) e; a gene in no pathway has e. The label is Bernoulli with log-odds
    2 (sum_k s_k a_k + a_1 a_2) over the driving pathways k, with random signs s_k. The batch, -1 or 1, shifts the
    technical genes by itself.

    Raises:
        ValueError: a number is out of range.
    """
    check(design)
    rng = np.random.default_rng(seed)
    pathways = membership(design)
    drivers = rng.permutation(design.num_pathways)[: design.num_driving]
    signs = rng.choice([-1.0, 1.0], design.num_driving)
    counts = pathways.sum(axis=0)
    background = np.flatnonzero(counts == 0)
    technical = rng.permutation(background)[: design.num_technical]

    def rows(n: int, confounding: float) -> Rows:
        activity = rng.normal(size=(n, design.num_pathways))
        signal = np.sqrt(design.rho / np.maximum(counts, 1)) * (activity @ pathways)
        x = signal + np.where(counts > 0, np.sqrt(1 - design.rho), 1.0) * rng.normal(size=signal.shape)
        a = activity[:, drivers]
        log_odds = 2 * (a @ signs + (a[:, 0] * a[:, 1] if design.num_driving > 1 else 0.0))
        y = rng.uniform(size=n) < 1 / (1 + np.exp(-log_odds))
        agrees = rng.uniform(size=n) < (1 + confounding) / 2
        x[:, technical] += np.where(agrees, 2.0 * y - 1, 1 - 2.0 * y)[:, None]
        return Rows(x.astype(np.float32), y.astype(np.float32))

    sizes = (design.num_train, design.num_validation, design.num_test)
    train, validation, test = (rows(n, design.confounding) for n in sizes)
    driving = np.isin(np.arange(design.num_pathways), drivers)
    return Expression(pathways, driving, train, validation, test, rows(design.num_test, 0.0))


def check(design: Design) -> None:
    """Raises a ValueError that names the number that is out of range."""
    bounds = {
        "size": (1, np.inf),
        "overlap": (0, design.size // 2),
        "num_driving": (1, design.num_pathways - 1),
        "num_background": (1, np.inf),
        "num_technical": (0, design.num_background),
        "rho": (0, 1),
        "confounding": (0, 1),
        "num_train": (1, np.inf),
        "num_validation": (1, np.inf),
        "num_test": (1, np.inf),
    }
    for name, (low, high) in bounds.items():
        if not low <= (value := getattr(design, name)) <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {value}.")


# The network and its attributions.


def initial_network(num_genes: int, width: int, seed: int) -> Params:
    """Three layers, `input`, `hidden` and `output`: `w` of variance 1 / fan-in and `b`."""
    rng = np.random.default_rng(seed)
    widths = {"input": (num_genes, width), "hidden": (width, width), "output": (width, 1)}
    return {
        name: {
            "w": (rng.normal(size=(n, m)) / np.sqrt(n)).astype(np.float32),
            "b": np.zeros(m, np.float32),
        }
        for name, (n, m) in widths.items()
    }


def is_followers(path: str, leaf: Any) -> bool:
    """The label of a parameter, for `fb.partition`: the follower owns the first layer."""
    del leaf
    return path.startswith("input")


def logits(params: Params, x: jax.Array) -> jax.Array:
    """f, [n, genes] -> [n]."""
    for name in ("input", "hidden"):
        x = jnp.tanh(x @ params[name]["w"] + params[name]["b"][None])
    return (x @ params["output"]["w"] + params["output"]["b"][None])[:, 0]


def cross_entropy(params: Params, rows: Rows) -> jax.Array:
    """The mean over the rows."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits(params, rows.x), rows.y))


def attributions(params: Params, x: jax.Array) -> jax.Array:
    """A_ij = x_ij d f(x_i) / d x_ij, gradient x input, [n, genes]."""
    return x * jax.grad(lambda x: jnp.sum(logits(params, x)))(x)


def share_inside(params: Params, x: jax.Array, genes: jax.Array) -> jax.Array:
    """The share of the attributions' absolute mass that falls on `genes`, [genes] 0 or 1."""
    mass = jnp.sum(jnp.abs(attributions(params, x)), axis=0)
    return jnp.sum(mass * genes) / (jnp.sum(mass) + 1e-12)


def auroc(score: jax.Array, positive: jax.Array) -> jax.Array:
    """The probability that a positive has a higher score than a negative, ties counting half; [n] each."""
    higher = jnp.sign(score[:, None] - score[None, :]) / 2 + 0.5
    pairs = positive[:, None] * (1 - positive)[None, :]
    return jnp.sum(higher * pairs) / jnp.sum(pairs)


# The two players.


def follower_objective(params: Params, rows: Rows, known: jax.Array, eta: Any) -> jax.Array:
    """Cross entropy + eta x the attributions' share outside the known genes."""
    return cross_entropy(params, rows) + eta * (1 - share_inside(params, rows.x, known))


def problem(merge: Callable[[Any, Any], Params], known: jax.Array, eta: Any) -> fb.ParametricProblem:
    """The bilevel problem: leader omega = outer_params, follower theta = inner_params, batches are `Rows`."""
    return fb.ParametricProblem(
        inner_objective=lambda omega, theta, rows: follower_objective(merge(omega, theta), rows, known, eta),
        outer_objective=lambda omega, theta, rows: cross_entropy(merge(omega, theta), rows),
    )
