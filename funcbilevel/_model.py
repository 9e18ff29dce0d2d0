"""`Model`, and adapters that make one from plain functions, Flax Linen and Flax NNX."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from funcbilevel._arguments import check_callable
from funcbilevel._described import describe, described, fields_that_differ, show
from funcbilevel._typing import InnerParams, Inputs, Key, LinearMap, ModelState, Prediction, PyTree

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


class FrozenState(NamedTuple):
    """The model state of a model of which only some parameters are trained.

    Attributes:
        frozen: the parameters that are not trained, in the structure that `init` gives the trained ones.
        state: all other non-trainable state.
    """

    frozen: PyTree
    state: ModelState

    def __repr__(self) -> str:
        return fields_that_differ(self)


def without_frozen(model_state: ModelState) -> ModelState:
    """The state without frozen parameters, for one who takes them from elsewhere."""
    return model_state._replace(frozen=()) if isinstance(model_state, FrozenState) else model_state


def with_frozen_of(model_state: ModelState, other: ModelState) -> ModelState:
    """The state with the frozen parameters of another; as it is if there are none."""
    return model_state._replace(frozen=other.frozen) if isinstance(model_state, FrozenState) else model_state


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
    check_callable("from_function", "init", init, "key, inputs")
    check_callable("from_function", "apply", apply, "params, inputs")

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
    trainable: Callable[[str, Any], bool] | None = None,
    variables: Mapping[str, Any] | None = None,
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
        trainable: `(path, leaf) -> bool`, with a path like "Dense_0/kernel": which parameters are trained (a head,
            LoRA adapters). The others are in no gradient and no Hessian; they are part of the model state, a
            `FrozenState`. Batch statistics and the like go on being updated, in the frozen part too. The adjoint of
            `learned_adjoint(model=None)` is divided in the same way: it has trained parameters of its own, and the
            prediction model's frozen ones.
        variables: values to start from, of all or some variables by collection: `{"params": pretrained}`. The others
            are drawn.

    Raises:
        TypeError: `module` is not a Linen module, or an argument is of the wrong kind.
        ValueError: it has no such method; (in `init`) `trainable` selects no parameter, or `variables` do not fit.

    Example: a network, and the same with its last layer trained alone.
        >>> from flax import linen
        >>> class Net(linen.Module):
        ...     @linen.compact
        ...     def __call__(self, x, train: bool):
        ...         x = linen.relu(linen.BatchNorm(use_running_average=not train)(linen.Dense(32)(x)))
        ...         return linen.Dense(1)(linen.Dropout(0.1, deterministic=not train)(x))
        >>> model = fb.from_linen(Net())
        >>> model = fb.from_linen(Net(), trainable=lambda path, leaf: path.startswith("Dense_1/"))
        >>> params, model_state = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> list(params), list(model_state.frozen), list(model_state.state)
        (['Dense_1'], ['Dense_0', 'BatchNorm_0'], ['batch_stats'])
    """
    from flax import linen  # noqa: PLC0415

    if not isinstance(module, linen.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"from_linen: module must be a flax.linen.Module instance, got {module!r}; make one by calling the class, "
            "and use fb.from_nnx for an NNX module."
        )
    called = _method("from_linen", type(module), method)
    if isinstance(rngs, str):
        raise TypeError(f"from_linen: rngs must be a sequence of names, got {rngs!r}; write ({rngs!r},).")
    if mode is not None:
        check_callable("from_linen", "mode", mode, "train")
    if trainable is not None:
        check_callable("from_linen", "trainable", trainable, "path, leaf")
    if variables is not None and not isinstance(variables, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"from_linen: variables must be a dict of collections, such as {{'params': ...}}, got {show(variables)}."
        )
    mode_kwargs = mode or _mode_from_signature(called)

    def init(key: Key, inputs: Inputs, /) -> tuple[InnerParams, ModelState]:
        keys = jax.random.split(key, 1 + len(rngs))
        streams = {"params": keys[0]} | {name: keys[i + 1] for i, name in enumerate(rngs)}
        created = dict(module.init(streams, inputs, method=method, **mode_kwargs(False)))
        created.pop("intermediates", None)
        if variables is not None:
            created = _starting_from(created, variables)
        params = created.pop("params", {})
        if trainable is None:
            return params, created
        trained, frozen = _divided(params, trainable)
        return trained, FrozenState(frozen, created)

    def apply(
        params: InnerParams,
        model_state: ModelState,
        inputs: Inputs,
        /,
        *,
        train: bool = False,
        key: Key | None = None,
    ) -> tuple[Prediction, ModelState]:
        if isinstance(model_state, FrozenState):
            params = _merged(params, model_state.frozen)
            prediction, state = whole(params, model_state.state, inputs, train, key)
            return prediction, model_state._replace(state=state)
        if trainable is not None:
            raise ValueError(_NO_FROZEN.format("from_linen"))
        return whole(params, model_state, inputs, train, key)

    def whole(
        params: PyTree, model_state: ModelState, inputs: Inputs, train: bool, key: Key | None
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
    trainable: Any = None,
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
        trainable: an NNX filter, such as `nnx.LoRAParam` or `nnx.PathContains("head")`: which of the `nnx.Param`
            variables are trained (or, given a type of variable, all of that type). The others are part of the model
            state, a `FrozenState`; see `from_linen`.

    Raises:
        TypeError: `module` is neither an NNX module nor a function that makes one, or an argument is of the wrong kind.
        ValueError: it has no such method, or `trainable` selects no parameter.

    Example: a linear model, and the LoRA adapters of one.
        >>> from flax import nnx
        >>> model = fb.from_nnx(lambda rngs: nnx.Linear(3, 1, rngs=rngs))
        >>> model = fb.from_nnx(
        ...     lambda rngs: nnx.LoRA(3, 2, 1, base_module=nnx.Linear(3, 1, rngs=rngs), rngs=rngs),
        ...     trainable=nnx.LoRAParam,
        ... )
        >>> params, model_state = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> sorted(params), sorted(model_state.frozen)
        (['lora_a', 'lora_b'], ['base_module'])
    """
    from flax import nnx  # noqa: PLC0415

    selected = nnx.Param if trainable is None else _nnx_filter(trainable)

    def split(instance: nnx.Module) -> tuple[Any, ...]:
        graphdef, params, streams, sown, frozen, state = nnx.split(
            instance, selected, nnx.RngState, (nnx.Intermediate, nnx.Perturbation), nnx.Param, ...
        )
        if trainable is not None and not jax.tree.leaves(params):
            raise ValueError(_NONE_TRAINED.format("from_nnx", ", ".join(_paths(frozen)) or "(none)"))
        return graphdef, params, streams, sown, state if trainable is None else FrozenState(frozen, state)

    if isinstance(module, nnx.Module):
        example: Any = module
    elif callable(module) and not _is_linen(module):
        make = module
        _check_makes_module(make)
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
        if trainable is not None and not isinstance(model_state, FrozenState):
            raise ValueError(_NO_FROZEN.format("from_nnx"))
        state = model_state if has_state else own_state  # not the () of a hypergradient that was given none
        states = tuple(state) if isinstance(state, FrozenState) else (state,)
        variables = jax.tree.map(lambda x: x, (params, streams_from(key), sown, *states))
        instance = nnx.merge(graphdef, *variables)
        instance.train() if train else instance.eval()
        call: Any = getattr(instance, method or "__call__")
        if hasattr(nnx, "capture"):  # of newer Flax, where `sow` warns outside of it
            call = nnx.capture(call)
        prediction = call(inputs, **mode_kwargs(train))
        return prediction, with_frozen_of(split(instance)[4], state) if train and has_state else model_state

    return Model(init, apply)


def _in_dtype_of(old: jax.Array, new: jax.Array) -> jax.Array:
    return new if new.dtype == old.dtype else new.astype(old.dtype)


# Some parameters trained, others frozen.

_NONE_TRAINED = "{}: trainable selects no parameter, so there is nothing to fit; the paths are {}."
_NO_FROZEN = (
    "{}: model_state holds no frozen parameters, but with trainable=... some are; pass model_state=<that of model.init "
    "or of a solver's state>."
)


def _divided(params: Any, trainable: Callable[[str, Any], bool]) -> tuple[Any, Any]:
    """The parameters that are trained, and the others, as nested dicts."""
    from flax.traverse_util import flatten_dict, unflatten_dict  # noqa: PLC0415

    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    chosen = {path: _as_bool("from_linen", trainable("/".join(path), leaf), path) for path, leaf in flat.items()}
    if not any(chosen.values()):
        raise ValueError(_NONE_TRAINED.format("from_linen", ", ".join(map("/".join, flat)) or "(none)"))
    trained, frozen = ({path: x for path, x in flat.items() if chosen[path] == part} for part in (True, False))
    return unflatten_dict(trained), unflatten_dict(frozen)


def _merged(trained: Any, frozen: Any) -> Any:
    from flax.traverse_util import flatten_dict, unflatten_dict  # noqa: PLC0415

    return unflatten_dict({**flatten_dict(frozen), **flatten_dict(trained)})


def _starting_from(created: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Variables as they were created, with the given values in their places; copies, so that donation spares them."""
    from flax.core import unfreeze  # noqa: PLC0415
    from flax.traverse_util import flatten_dict, unflatten_dict  # noqa: PLC0415

    flat: dict[tuple[str, ...], Any] = flatten_dict(unfreeze(created))
    for path, value in flatten_dict(unfreeze(dict(given))).items():
        name = "/".join(map(str, path))
        if path not in flat:
            raise ValueError(
                f"from_linen: variables holds {name}, which the module does not have; its variables are "
                f"{', '.join('/'.join(p) for p in flat)}."
            )
        if (got := jax.tree.map(jnp.shape, value)) != (expected := jax.tree.map(jnp.shape, flat[path])):
            raise ValueError(f"from_linen: variables: {name} must have shape {expected}, got {got}.")
        flat[path] = jax.tree.map(jnp.array, value)
    return unflatten_dict(flat)


def _nnx_filter(trainable: Any) -> Any:
    """The filter that selects what is trained: by type as given, otherwise among the parameters."""
    from flax import nnx  # noqa: PLC0415

    if isinstance(trainable, type) and issubclass(trainable, nnx.Variable):
        return trainable
    try:
        predicate = nnx.filterlib.to_predicate(trainable)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"from_nnx: trainable must be an NNX filter, such as nnx.LoRAParam, got {show(trainable)}."
        ) from error
    return nnx.All(nnx.Param, lambda path, x: _as_bool("from_nnx", predicate(path, x), path))


def _as_bool(function: str, value: Any, path: tuple[Any, ...]) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(
            f"{function}: trainable must return a bool, got {show(value)} for {'/'.join(map(str, path))!r}; decide by "
            "the path or the shape."
        )
    return bool(value)


def _paths(state: Any) -> list[str]:
    from flax import nnx  # noqa: PLC0415

    return ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]


def _check_makes_module(make: Callable[..., Any]) -> None:
    if not isinstance(make, type):
        check_callable("from_nnx", "module", make, "rngs")
        return
    parameters = list(inspect.signature(make.__init__).parameters.values())[1:]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    by_position = all(p.kind is not p.KEYWORD_ONLY for p in parameters if p.name in needed)
    if len(needed) > 1 or not by_position:
        raise TypeError(
            f"from_nnx: module is the class {make.__name__}, whose instances need {', '.join(needed)}; pass "
            f"lambda rngs: {make.__name__}(..., rngs=rngs)."
        )


_TRAIN_NAMES = ("train", "training", "is_training", "update_stats")
_EVAL_NAMES = ("deterministic", "use_running_average")


def _is_linen(module: Any) -> bool:
    cls = module if isinstance(module, type) else type(module)
    return any(base.__module__.startswith("flax.linen") for base in cls.__mro__)


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
