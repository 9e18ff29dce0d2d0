r"""Instrumental regression on dSprites (Xu et al. 2021) as a functional bilevel problem (Petrulionyte et al. 2024).

The treatment x is a picture, the instruments z say how it came about, and something unseen moves both the picture and
the outcome y. With features f_omega(x) of the picture,

.. math::
    \min_\omega\; \min_u\; E\,(y - u^\top [h_\omega(z), 1])^2 + \lambda_2 \|u\|^2 \quad\text{with}\quad
    h_\omega = \arg\min_h E\,\|h(z) - f_\omega(x)\|^2 = E[f_\omega(x) | z],

and u'[f_omega(x), 1] is the estimate of the structural function. h is a network with a linear head in closed form
(variable projection). Objectives are means where the published code has sums: its L2 of 0.1 on the weights is 0.1/n.

References:
    Petrulionyte, Mairal, Arbel, NeurIPS 2024, https://arxiv.org/abs/2403.20233, section 4.1;
    Xu, Chen, Srinivasan, de Freitas, Doucet, Gretton, *Learning Deep Features in Instrumental Variable Regression*,
    ICLR 2021, https://arxiv.org/abs/2010.07154 (DFIV).
"""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

import funcbilevel as fb
from funcbilevel.tasks._instrumental.formulas import ridge_objective, ridge_regression, with_constant
from funcbilevel.tasks.data import dsprites

Norm: TypeAlias = Literal["layer", "batch"]

# Networks.


def _dense(x: jax.Array, width: int, train: bool) -> jax.Array:
    """A linear layer whose matrix has spectral norm 1, by one power iteration per call in train mode.

    Weights and biases start as in the published code, from U(-1, 1) / sqrt(fan-in), but that Flax stores the weights
    divided by their first norm. With Flax's own biases of zero the instrument network's units would all bend at z = 0.
    """

    def biases(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) / np.sqrt(x.shape[-1])

    kernels = linen.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return linen.SpectralNorm(linen.Dense(width, kernel_init=kernels, bias_init=biases))(x, update_stats=train)


def _normalise(x: jax.Array, norm: Norm, train: bool) -> jax.Array:
    return linen.LayerNorm()(x) if norm == "layer" else linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)


class TreatmentNet(linen.Module):
    """f_omega: pictures [n, 4096] -> features [n, widths[-1]] in (-1, 1)."""

    widths: tuple[int, int, int, int] = (1024, 512, 128, 32)
    norm: Norm = "layer"

    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """The features of pictures, [n, widths[-1]]."""
        x = linen.relu(_dense(x, self.widths[0], train))
        x = _normalise(linen.relu(_dense(x, self.widths[1], train)), self.norm, train)
        x = linen.relu(_dense(x, self.widths[2], train))
        return jnp.tanh(_normalise(_dense(x, self.widths[3], train), self.norm, train))


class InstrumentNet(linen.Module):
    """phi_theta: instruments [n, 3] -> features and a constant, [n, 33]."""

    norm: Norm = "layer"

    @linen.compact
    def __call__(self, z: jax.Array, train: bool) -> jax.Array:
        """The features of instruments and a constant, [n, 33]."""
        z = linen.relu(_dense(z, 256, train))
        z = _normalise(linen.relu(_dense(z, 128, train)), self.norm, train)
        z = _normalise(linen.relu(_dense(z, 128, train)), self.norm, train)
        z = linen.relu(_normalise(_dense(z, 32, train), self.norm, train))
        return jnp.hstack([z, jnp.ones((len(z), 1), z.dtype)])


# The problem.

INNER_RIDGE = 0.1  # on |V|^2, the head of h
OUTER_RIDGE = 0.1  # on |u|^2


class Batch(NamedTuple):
    """A sample of one of the two levels.

    Attributes:
        z: instruments, [n, 3].
        x: pictures, [n, 4096]; the outer level does not see them.
        y: outcomes, [n]; the inner level does not see them.
    """

    z: Any
    x: Any = None
    y: Any = None


def second_stage(h: jax.Array, y: jax.Array) -> jax.Array:
    """u, [k + 1]: the ridge regression of y on [h, 1], in closed form."""
    return ridge_regression(with_constant(h), y, OUTER_RIDGE)


def inner_objective(f: jax.Array, h: jax.Array, batch: Batch) -> jax.Array:
    """E |h(z) - f(x)|^2; f, [n, k], are the features of the inner batch's pictures."""
    del batch
    return jnp.mean(jnp.sum((h - f) ** 2, axis=1))


def outer_objective(f: jax.Array, h: jax.Array, batch: Batch) -> jax.Array:
    """The second stage's ridge objective at its minimum over u."""
    del f
    return ridge_objective(with_constant(h), batch.y, OUTER_RIDGE)


problem = fb.FunctionalProblem(inner_objective, outer_objective, inputs=lambda batch: batch.z)


class Arrays(NamedTuple):
    """Everything that a run reads, on the device.

    Attributes:
        inner, outer, validation: samples.
        test_x, test_y: clean pictures, [588, 4096], and the structural function there, [588].
    """

    inner: Batch
    outer: Batch
    validation: Batch
    test_x: jax.Array
    test_y: jax.Array


def arrays(n: int, seed: int, source: dsprites.Hearts, B: np.ndarray[Any, Any], num_validation: int = 200) -> Arrays:
    """The data of one seed."""
    data, test = dsprites.generate(n, seed, source, B), dsprites.test_set(source, B)
    valid = dsprites.validation(num_validation, seed, source, B)
    return jax.tree.map(
        jnp.asarray,
        Arrays(
            inner=Batch(data.z_inner, data.x_inner),
            outer=Batch(data.z_outer, y=data.y_outer),
            validation=Batch(valid.z, y=valid.y),
            test_x=jnp.asarray(test.x),
            test_y=jnp.asarray(test.y),
        ),
    )
