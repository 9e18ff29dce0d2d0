"""`Model`, and adapters that make one from plain functions, Flax Linen and Flax NNX."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from funcbilevel._described import describe, described, fields_that_differ
from funcbilevel._typing import InnerParams, Inputs, Key, LinearMap, ModelState, Prediction

if TYPE_CHECKING:
    from flax import linen, nnx


class _Init(Protocol):
    def __call__(self, key: Key, inputs: Inputs, /) -> tuple[InnerParams, ModelState]: ...


class _Apply(Protocol):
    def __call__(
        self,
        params: InnerParams,
        model_state: ModelState,
        inputs: Inputs,
        /,
        *,
        train: bool = False,
        key: Key | None = None,
    ) -> tuple[Prediction, ModelState]: ...


class LinearHead(NamedTuple):
    """A last, linear layer that is not trained but solved for; see `variable_projection`.

    Attributes:
        fit: `(C, rhs, phi, v, mean) -> V`, with v of the prediction's shape, the [p, num_outputs] minimiser of
            1/2 <phi V, C[phi V]> - <rhs, V> + ridge/2 |V|^2.
        num_outputs: columns of the prediction.
        ridge: >= 0.
    """

    fit: Callable[[LinearMap, jax.Array, jax.Array, jax.Array, LinearMap], jax.Array]
    num_outputs: int
    ridge: float

    def __repr__(self) -> str:
        return fields_that_differ(self)


class Model(NamedTuple):
    """A prediction model (or an adjoint's) as two pure functions; parameters and other state are kept apart.

    Attributes:
        init: `(key, inputs) -> (params, model_state)`.
        apply: `(params, model_state, inputs, *, train=False, key=None) -> (prediction, model_state)`. With
            `train=True` batch statistics and the like are updated and `key` feeds dropout; with `train=False`
            the model is deterministic and `model_state` comes back as it went in. Leaves of the prediction have
            the leading axis of the inputs.
        head: with a head, from `variable_projection`, `apply` gives features phi(x), [n, p], and the prediction is
            phi(x) V with V solved for on the inner batch.
        description: the call that made it, for `repr`.
    """

    init: _Init
    apply: _Apply
    head: LinearHead | None = None
    description: str = ""

    def __repr__(self) -> str:
        return describe(self)


@described
def from_function(
    init: Callable[[Key, Inputs], InnerParams], apply: Callable[[InnerParams, Inputs], Prediction]
) -> Model:
    """A `Model` from two pure functions, without non-trainable state.

    Arguments:
        init: `(key, inputs) -> params`.
        apply: `(params, inputs) -> prediction`.

    Raises:
        TypeError: an argument is not callable.

    Example: a linear model.
        >>> import jax.numpy as jnp, funcbilevel as fb
        >>> model = fb.from_function(
        ...     init=lambda key, x: jnp.zeros(x.shape[-1]), apply=lambda params, x: x @ params
        ... )
    """
    for name, function in (("init", init), ("apply", apply)):
        if not callable(function):
            raise TypeError(f"from_function: {name} must be callable, got {type(function).__name__}.")

    def model_init(key: Key, inputs: Inputs, /) -> tuple[InnerParams, ModelState]:
        return init(key, inputs), ()

    def model_apply(
        params: InnerParams,
        model_state: ModelState,
        inputs: Inputs,
        /,
        *,
        train: bool = False,
        key: Key | None = None,
    ) -> tuple[Prediction, ModelState]:
        del train, key
        return apply(params, inputs), model_state

    return Model(model_init, model_apply)


@described
def from_linen(
    module: linen.Module,
    *,
    mode: Callable[[bool], dict[str, Any]] | None = None,
    rngs: Sequence[str] = ("dropout",),
    method: str | None = None,
) -> Model:
    """A `Model` from a Flax Linen module.

    The `params` collection is trained; every other collection that `init` creates (`batch_stats` of BatchNorm
    and SpectralNorm, ...) is the model state, updated in train mode only. What the module `sow`s is dropped.

    Arguments:
        module: the module, called on the inputs as its only positional argument.
        mode: `train -> keyword arguments` of the call. By default the usual names are recognised in the
            signature: `train`, `training`, `is_training` and `update_stats` receive `train`;
            `deterministic` and `use_running_average` receive `not train`.
        rngs: names of the random streams that train mode needs, each with a fresh key per step.
        method: the module's method to call, by default `__call__`. A `Model` of another method that shares the
            parameters can serve as `features` of `linear_adjoint`.

    Raises:
        TypeError: `module` is not a Linen module.
        ValueError: it has no such method.

    Example:
        >>> from flax import linen
        >>> class Net(linen.Module):
        ...     @linen.compact
        ...     def __call__(self, x, train: bool):
        ...         x = linen.relu(linen.BatchNorm(use_running_average=not train)(linen.Dense(32)(x)))
        ...         return linen.Dense(1)(linen.Dropout(0.1, deterministic=not train)(x))
        >>> model = fb.from_linen(Net())
    """
    from flax import linen  # noqa: PLC0415

    if not isinstance(module, linen.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"from_linen: module must be a flax.linen.Module instance, got {module!r}; make one by calling the class, "
            "and use fb.from_nnx for an NNX module."
        )
    called = _method("from_linen", type(module), method)
    mode_kwargs = mode or _mode_from_signature(called)

    def init(key: Key, inputs: Inputs, /) -> tuple[InnerParams, ModelState]:
        keys = jax.random.split(key, 1 + len(rngs))
        streams = {"params": keys[0]} | {name: keys[i + 1] for i, name in enumerate(rngs)}
        variables = dict(module.init(streams, inputs, method=method, **mode_kwargs(False)))
        variables.pop("intermediates", None)
        return variables.pop("params", {}), variables

    def apply(
        params: InnerParams,
        model_state: ModelState,
        inputs: Inputs,
        /,
        *,
        train: bool = False,
        key: Key | None = None,
    ) -> tuple[Prediction, ModelState]:
        variables = {"params": params, **dict(model_state)}
        kwargs: dict[str, Any] = {"method": method, **mode_kwargs(train)}
        if not train:
            return module.apply(variables, inputs, **kwargs), model_state
        streams = {} if key is None else {name: jax.random.fold_in(key, i) for i, name in enumerate(rngs)}
        if not model_state:  # {}, or the () of a hypergradient that was given none
            return module.apply(variables, inputs, rngs=streams, **kwargs), model_state
        prediction, updated = module.apply(variables, inputs, rngs=streams, mutable=list(model_state), **kwargs)
        # A collection that has grown was sown into. Dtypes stay as they came in: BatchNorm's statistics start in
        # float32 whatever the inputs are.
        size = {name: len(jax.tree.leaves(old)) for name, old in model_state.items()}
        kept = {name: new for name, new in updated.items() if len(jax.tree.leaves(new)) == size[name]}
        return prediction, jax.tree.map(_in_dtype_of, dict(model_state), dict(model_state) | kept)

    return Model(init, apply)


@described
def from_nnx(
    module: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
    *,
    mode: Callable[[bool], dict[str, Any]] | None = None,
    method: str | None = None,
) -> Model:
    """A `Model` from a Flax NNX module.

    `nnx.Param` variables are trained; all others but random streams are the model state, updated in train mode
    only (`module.train()` and `module.eval()` choose the mode). Random streams are made anew from each step's
    key; what the module `sow`s is dropped. Parameters and state are `nnx.State` pytrees:
    `nnx.update(module, params, model_state)` writes them back.

    Arguments:
        module: a function from `nnx.Rngs` to a module, so that each key gives its own initial parameters; or a
            module, in which case `init` returns that module's present parameters whatever the key.
        mode: `train -> keyword arguments` of the call; default as in `from_linen`.
        method: the module's method to call, by default `__call__`.

    Raises:
        TypeError: `module` is neither an NNX module nor a function that makes one.
        ValueError: it has no such method.

    Example:
        >>> from flax import nnx
        >>> model = fb.from_nnx(lambda rngs: nnx.Linear(3, 1, rngs=rngs))
    """
    from flax import nnx  # noqa: PLC0415

    def split(instance: nnx.Module) -> tuple[Any, ...]:
        return nnx.split(instance, nnx.Param, nnx.RngState, (nnx.Intermediate, nnx.Perturbation), ...)

    if isinstance(module, nnx.Module):
        example: Any = module
    elif callable(module) and not _is_linen(module):
        make = module
        example = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        if not isinstance(example, nnx.Module):
            raise TypeError(f"from_nnx: the function must return an nnx.Module, got {type(example).__name__}.")
    else:
        raise TypeError(
            f"from_nnx: module must be an nnx.Module or a function nnx.Rngs -> nnx.Module, got {module!r}; for a Linen "
            "module use fb.from_linen."
        )
    called = _method("from_nnx", type(example), method)
    mode_kwargs = mode or _mode_from_signature(called)
    graphdef, own_params, streams, sown, own_state = split(example)
    has_state = bool(jax.tree.leaves(own_state))
    stream_leaves, stream_structure = jax.tree.flatten(streams)
    stream_shapes = [(x.shape, x.dtype) for x in stream_leaves]

    def init(key: Key, inputs: Inputs, /) -> tuple[InnerParams, ModelState]:
        del inputs
        if isinstance(module, nnx.Module):
            return jax.tree.map(jnp.copy, (own_params, own_state))  # the module's own must survive donation
        _, params, _, _, model_state = split(module(nnx.Rngs(key)))
        return params, model_state

    def streams_from(key: Key | None) -> Any:
        key = jax.random.key(0) if key is None else key

        def fresh(i: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
            return jax.random.split(jax.random.fold_in(key, i), shape) if is_key else jnp.zeros(shape, dtype)

        return jax.tree.unflatten(stream_structure, [fresh(i, *s) for i, s in enumerate(stream_shapes)])

    def apply(
        params: InnerParams,
        model_state: ModelState,
        inputs: Inputs,
        /,
        *,
        train: bool = False,
        key: Key | None = None,
    ) -> tuple[Prediction, ModelState]:
        # Through jax.tree.map, because modules write into their variables: these are new ones, the caller's stay.
        state = model_state if has_state else own_state  # not the () of a hypergradient that was given none
        variables = jax.tree.map(lambda x: x, (params, streams_from(key), sown, state))
        instance = nnx.merge(graphdef, *variables)
        instance.train() if train else instance.eval()
        call: Any = getattr(instance, method or "__call__")
        if hasattr(nnx, "capture"):  # of newer Flax, where `sow` warns outside of it
            call = nnx.capture(call)
        prediction = call(inputs, **mode_kwargs(train))
        return prediction, split(instance)[4] if train and has_state else model_state

    return Model(init, apply)


def _in_dtype_of(old: jax.Array, new: jax.Array) -> jax.Array:
    return new if new.dtype == old.dtype else new.astype(old.dtype)


_TRAIN_NAMES = ("train", "training", "is_training", "update_stats")
_EVAL_NAMES = ("deterministic", "use_running_average")


def _is_linen(module: Any) -> bool:
    return any(cls.__module__.startswith("flax.linen") for cls in type(module).__mro__)


def _method(function: str, cls: type, name: str | None) -> Callable[..., Any]:
    if name is not None and not callable(getattr(cls, name, None)):
        raise ValueError(
            f"{function}: {cls.__name__} has no method {name!r}; pass method=<the name of one of its own>."
        )
    return getattr(cls, name or "__call__")


def _mode_from_signature(function: Callable[..., Any]) -> Callable[[bool], dict[str, Any]]:
    names = inspect.signature(function).parameters

    def mode_kwargs(train: bool) -> dict[str, Any]:
        return {n: train for n in _TRAIN_NAMES if n in names} | {n: not train for n in _EVAL_NAMES if n in names}

    return mode_kwargs
