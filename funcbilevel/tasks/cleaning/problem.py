r"""Data hyper-cleaning: a weight for each training sample, half of which have a wrong label.

With v = h_theta(x) the logits of a classifier, omega_i the logit of sample i's weight and s the sigmoid,

.. math::
    L_{in}(\omega, v) &= \text{mean}_i\; s(\omega_i)\, \text{cross entropy}(v_i, y_i) \;(+\; C \|\theta\|^2), \\
    L_{out}(v) &= \text{mean over clean validation samples of the cross entropy.}

The functional problem has no theta: there the inner optimizer decays the parameters by the same C. Every wrong label
differs from the right one, so that the area under the ROC curve of the weights is 1 where
they tell right from wrong.

References:
    Franceschi, Donini, Frasconi, Pontil, *Forward and reverse gradient-based hyperparameter optimization*, ICML 2017,
    https://arxiv.org/abs/1703.01785, section 5.1.
"""

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcbilevel as fb
from funcbilevel.tasks.data.fetch import given, reading

Array: TypeAlias = np.ndarray[Any, Any]
Params: TypeAlias = dict[str, Any]
HIDDEN = 300
DECAY = 1e-3
"""C."""


class Samples(NamedTuple):
    """Pictures x in [0, 1], [n, d]; labels y, [n]; and the number of each sample's weight, [n]."""

    x: Any
    y: Any
    number: Any


class Data(NamedTuple):
    """The data of one seed.

    Attributes:
        train: with corrupted labels.
        wrong: which, [n] bool.
        validation, test: with right labels.
    """

    train: Samples
    wrong: Any
    validation: Samples
    test: Samples


# Data.


def pictures(dataset: str, path: Path | None = None) -> tuple[Array, Array]:
    """x, [n, d] in [0, 1], and y of scikit-learn's digits, or of MNIST as the file `mnist.npz` of Keras.

    Raises:
        UserError: there is no such file, or it is another.
    """
    if dataset == "digits":
        from sklearn.datasets import load_digits  # noqa: PLC0415

        x, y = load_digits(return_X_y=True)
        return (x / 16).astype(np.float32), y.astype(np.int32)
    mend = "pass --data, or set $FUNCBILEVEL_MNIST, to the mnist.npz of Keras"
    file = given(path, "FUNCBILEVEL_MNIST") or Path("mnist.npz")
    with reading(file, mend), np.load(file) as arrays:
        x, y = (np.concatenate([arrays[f"{name}_train"], arrays[f"{name}_test"]]) for name in ("x", "y"))
    return (x.reshape(len(x), -1) / 255).astype(np.float32), y.astype(np.int32)


SIZES = {"digits": (1000, 250), "mnist": (20_000, 5000)}
"""Training and validation samples; the rest are for the test, 10,000 at most."""


def corrupt(x: Array, y: Array, sizes: tuple[int, int], seed: int, fraction: float = 0.5) -> Data:
    """Divides the samples at random and gives a fraction of the training labels another value."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    n, m = sizes
    parts = (order[:n], order[n : n + m], order[n + m : n + m + 10_000])
    train, validation, test = (Samples(x[rows], y[rows], np.arange(len(rows), dtype=np.int32)) for rows in parts)
    wrong = np.zeros(n, bool)
    wrong[rng.permutation(n)[: round(fraction * n)]] = True
    other = (train.y + rng.integers(1, 10, n)) % 10
    return Data(train._replace(y=np.where(wrong, other, train.y).astype(np.int32)), wrong, validation, test)


# Networks: linear, or with one hidden layer of 300.


def model(network: str) -> fb.Model:
    """Logits of ten classes; the linear one starts at zero."""

    def init(key: jax.Array, x: jax.Array) -> Params:
        if network == "linear":
            return {"w": jnp.zeros((x.shape[1], 10)), "b": jnp.zeros(10)}
        first, last = jax.random.split(key)
        scaled = jax.nn.initializers.he_normal()
        hidden = {"w1": scaled(first, (x.shape[1], HIDDEN)), "b1": jnp.zeros(HIDDEN)}
        return hidden | {"w": scaled(last, (HIDDEN, 10)), "b": jnp.zeros(10)}

    return fb.from_function(init, logits)


def last_layer(theta: Params, x: jax.Array) -> jax.Array:
    """What the last layer gets, [n, p]."""
    return jax.nn.relu(x @ theta["w1"] + theta["b1"][None]) if "w1" in theta else x


def logits(theta: Params, x: jax.Array) -> jax.Array:
    """h_theta(x), [n, 10]."""
    return last_layer(theta, x) @ theta["w"] + theta["b"][None]


def features(theta: Params, x: jax.Array) -> jax.Array:
    """The last layer's inputs and a constant, [n, p + 1]: those of the linear adjoint."""
    return jnp.concatenate([last_layer(theta, x), jnp.ones((len(x), 1))], axis=1)


# The two levels.


def cross_entropy(v: jax.Array, y: jax.Array) -> jax.Array:
    """Of each sample, [n]."""
    return optax.softmax_cross_entropy_with_integer_labels(v, y)


def inner_objective(omega: jax.Array, v: jax.Array, batch: Samples) -> jax.Array:
    """The mean of the weighted cross entropies."""
    return jnp.mean(jax.nn.sigmoid(omega[batch.number]) * cross_entropy(v, batch.y))


def outer_objective(omega: jax.Array, v: jax.Array, batch: Samples) -> jax.Array:
    """The mean of the cross entropies."""
    del omega
    return jnp.mean(cross_entropy(v, batch.y))


FUNCTIONAL = fb.FunctionalProblem(inner_objective, outer_objective, inputs=operator.itemgetter(0))


def penalty(theta: Params) -> jax.Array:
    """C |theta|^2."""
    return DECAY * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(theta))


PARAMETRIC = fb.ParametricProblem(
    lambda omega, theta, batch: inner_objective(omega, logits(theta, batch.x), batch) + penalty(theta),
    lambda omega, theta, batch: outer_objective(omega, logits(theta, batch.x), batch),
)


# Measures.


def accuracy(theta: Params, samples: Samples) -> jax.Array:
    """The share of right predictions."""
    return jnp.mean(jnp.argmax(logits(theta, samples.x), axis=1) == samples.y)


def auc(omega: jax.Array, wrong: jax.Array) -> jax.Array:
    """The probability that a sample with the right label weighs more than one with a wrong one, ties counting half."""
    order = jnp.sort(omega)
    below, up_to = (jnp.searchsorted(order, omega, side=side) for side in ("left", "right"))
    rank = (below + up_to + 1) / 2
    right = jnp.sum(~wrong)
    return (jnp.sum(jnp.where(wrong, 0.0, rank)) - right * (right + 1) / 2) / (right * jnp.sum(wrong))


Measure: TypeAlias = Callable[[Any, Any, Data], dict[str, jax.Array]]
