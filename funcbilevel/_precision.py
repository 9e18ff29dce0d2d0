"""A model computed in a lower precision."""

from typing import Any

import jax
import jax.numpy as jnp

from funcbilevel._check import check_is_model
from funcbilevel._described import described
from funcbilevel._model import FrozenState, Model, with_frozen_of
from funcbilevel._typing import Inputs, Key, ModelState, Prediction, PyTree


@described
def mixed_precision(model: Model, dtype: Any = jnp.bfloat16) -> Model:
    """The same model, computed in `dtype`: parameters are stored, updated and differentiated in their own dtype.

    Floating parameters and inputs are rounded to `dtype` on the way in, and the prediction goes back to the parameters'
    dtype on the way out, so that objectives, adjoints, linear solvers and optimizers keep their precision. Activations
    take half the memory in bfloat16. Products of matrices accumulate in float32 on GPUs, TPUs and XLA's CPU backend.
    The model state (batch statistics) is not rounded.

    Arguments:
        model: any `Model`.
        dtype: a floating dtype.

    Returns:
        A `Model` with the same parameters as `model`, the one for the other at any time.

    Raises:
        TypeError: `model` is not a `Model`, or `dtype` is not floating.

    Example:
        >>> import flax.linen as nn, funcbilevel as fb
        >>> model = fb.mixed_precision(fb.from_linen(nn.Dense(1)))

    References:
        Micikevicius et al., *Mixed Precision Training*, ICLR 2018, https://arxiv.org/abs/1710.03740
    """
    check_is_model("mixed_precision", "model", model)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"mixed_precision: dtype must be floating, for example jnp.bfloat16, got {dtype!r}.")

    def apply(
        params: PyTree, model_state: ModelState, inputs: Inputs, /, *, train: bool = False, key: Key | None = None
    ) -> tuple[Prediction, ModelState]:
        state = model_state
        if isinstance(model_state, FrozenState):  # parameters, too
            state = model_state._replace(frozen=_cast(model_state.frozen, dtype))
        prediction, after = model.apply(_cast(params, dtype), state, _cast(inputs, dtype), train=train, key=key)
        after = with_frozen_of(after, model_state)
        kept = jnp.result_type(*(x for x in jax.tree.leaves(params) if _is_floating(x)), dtype)
        after = jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), after, model_state)
        return _cast(prediction, kept), after

    return model._replace(apply=apply)


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    """Floating leaves in another dtype; others as they are."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if _is_floating(x) else x, tree)
