"""Names for the pytrees that the library passes around (see the vocabulary in the documentation)."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

PyTree: TypeAlias = Any
OuterParams: TypeAlias = PyTree  # omega
InnerParams: TypeAlias = PyTree  # theta
ModelState: TypeAlias = PyTree  # non-trainable variables of a model
Inputs: TypeAlias = PyTree  # x: leaves [n, ...]
Prediction: TypeAlias = PyTree  # v = h_theta(x): leaves [n, ...]
Batch: TypeAlias = PyTree
Key: TypeAlias = jax.Array
Metrics: TypeAlias = dict[str, jax.Array]  # flat, scalars only

Objective: TypeAlias = Callable[[OuterParams, Any, Batch], Any]
LinearMap: TypeAlias = Callable[[PyTree], PyTree]
