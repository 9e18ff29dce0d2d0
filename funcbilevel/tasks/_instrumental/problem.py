r"""Instrumental regression with observed covariates: the data and the networks that small tables have in common.

The outcome y depends on a treatment p, which something unseen moves as well, and on covariates c; the instruments z
contain c. With treatment features psi_omega(p) and covariate features xi_omega(c), both with a constant added,

.. math::
    \min_\omega\; \min_u\; E\,(y - u^\top (h_\omega(z) \otimes \xi_\omega(c)))^2 + \lambda_2 \|u\|^2
    \quad\text{with}\quad
    h_\omega = \arg\min_h E\,\|h(z) - \psi_\omega(p)\|^2 = E[\psi_\omega(p) | z],

and u'(psi_omega(p) x xi_omega(c)) is the estimate of the structural function: given z the covariates are known, so
that only the treatment's features need their conditional mean (Xu et al., appendix on observable confounders). h is a
network with a linear head in closed form (variable projection), u is solved for.

References:
    Xu, Chen, Srinivasan, de Freitas, Doucet, Gretton, *Learning Deep Features in Instrumental Variable Regression*,
    ICLR 2021, https://arxiv.org/abs/2010.07154 (DFIV);
    Petrulionyte, Mairal, Arbel, NeurIPS 2024, https://arxiv.org/abs/2403.20233, section 4.1.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from funcbilevel.tasks._instrumental.formulas import with_constant

Array: TypeAlias = np.ndarray[Any, Any]


class Batch(NamedTuple):
    """Observations.

    Attributes:
        z: instruments, the covariates among them, [n, q].
        p: treatment, [n, 1].
        c: covariates, [n, r].
        y: outcomes, [n].
    """

    z: Any
    p: Any
    c: Any
    y: Any


class Data(NamedTuple):
    """What a run reads, all standardised by the means and standard deviations of the training sample.

    Attributes:
        inner, outer: the two halves of the training sample.
        validation: observations that are not trained on.
        points: treatments [m, 1] and covariates [m, r] at which the structural function is wanted; no z, no y.
        y_mean, y_std: what takes y back.
    """

    inner: Batch
    outer: Batch
    validation: Batch
    points: Batch
    y_mean: Any
    y_std: Any


def standardised(train: Batch, validation: Batch, points: Batch) -> Data:
    """The data of a run; the first half of the training sample is the inner level's."""
    mean, std = (Batch(*(statistic(a, axis=0) for a in train)) for statistic in (np.mean, np.std))

    def scaled(batch: Batch, rows: slice = slice(None)) -> Batch:
        return Batch(*(None if a is None else (a[rows] - m) / s for a, m, s in zip(batch, mean, std, strict=True)))

    half = len(train.y) // 2
    data = Data(
        inner=scaled(train, slice(half)),
        outer=scaled(train, slice(half, None)),
        validation=scaled(validation),
        points=scaled(points),
        y_mean=mean.y,
        y_std=std.y,
    )
    return jax.tree.map(lambda a: np.asarray(a, np.float32), data)


def whole(data: Data) -> Batch:
    """The training sample."""
    return jax.tree.map(lambda inner, outer: jnp.concatenate([inner, outer]), data.inner, data.outer)


class Net(linen.Module):
    """tanh layers: inputs x [n, k] -> features in (-1, 1), if `linear_part` x itself, and a constant, [n, p].

    Biases start from U(-1, 1), so that the units bend in different places.
    """

    widths: tuple[int, ...]
    linear_part: bool = False

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The features and the constant."""

        def biases(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -1.0, 1.0)

        features = x
        for width in self.widths:
            features = linen.tanh(linen.Dense(width, bias_init=biases)(features))
        return with_constant(jnp.hstack([features, x]) if self.linear_part else features)


class OuterParams(NamedTuple):
    """omega.

    Attributes:
        treatment: parameters of psi.
        covariates: parameters of xi.
    """

    treatment: Any
    covariates: Any


def products(a: jax.Array, b: jax.Array) -> jax.Array:
    """All products of a feature of the one kind with one of the other, [n, k] and [n, m] -> [n, k m]."""
    return (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)
