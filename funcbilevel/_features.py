"""Features of the prediction model that an adjoint is built on."""

from collections.abc import Callable
from typing import TypeAlias

import jax

from funcbilevel._arguments import check_callable
from funcbilevel._check import check_features
from funcbilevel._fit import FitState
from funcbilevel._model import Model
from funcbilevel._typing import InnerParams, Inputs

Features: TypeAlias = Callable[[InnerParams, Inputs], jax.Array] | Model
"""`(inner_params, inputs) -> [n, p]`, or a `Model` that shares the prediction model's parameters and state."""


def check_is_features(function: str, features: object) -> None:
    """That `features` is of the right kind."""
    if not isinstance(features, Model):
        check_callable(function, "features", features, "inner_params, inputs")


def evaluate_features(function: str, features: Features, inner: FitState, inputs: Inputs) -> jax.Array:
    """phi(x), [n, p], in evaluation mode; `function` is named in errors."""
    if isinstance(features, Model):
        phi, _ = features.apply(inner.params, inner.model_state, inputs)
    else:
        phi = features(inner.params, inputs)
    check_features(function, phi, inputs)
    return phi
