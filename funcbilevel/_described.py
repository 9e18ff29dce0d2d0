"""What objects say of themselves: the call that made them, and the shapes of what they hold; never an address."""

import dataclasses
import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
import optax

from funcbilevel._tree import path_name

P = ParamSpec("P")
T = TypeVar("T")

LINE = 100


def described(factory: Callable[P, T]) -> Callable[P, T]:
    """The same factory, whose result says in its `repr` how it was made: `cg(20, damping=0.001)`.

    The text goes into the result's field `description`; a `BilevelSolver`, which is unpacked as three functions, bears
    it on its `init`.
    """
    parameters = list(inspect.signature(factory).parameters.values())
    name = factory.__name__

    @functools.wraps(factory)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        made: Any = factory(*args, **kwargs)
        given = [(value, p.default) for value, p in zip(args, parameters, strict=False)]
        while given and _equal(*given[-1]):
            given.pop()
        defaults = {p.name: p.default for p in parameters}
        named = {n: value for n, value in kwargs.items() if not _equal(value, defaults.get(n, inspect.Parameter.empty))}
        text = call(name, [show(value) for value, _ in given] + [f"{n}={show(value)}" for n, value in named.items()])
        if "description" in made._fields:
            return made._replace(description=text)
        made.init.description = text
        return made

    return wrapper


def describe(made: Any) -> str:
    """The `repr` of a NamedTuple that a factory made, or that a user put together by hand."""
    text = getattr(made, "description", "") or getattr(getattr(made, "init", None), "description", "")
    return text or fields_that_differ(made)


def fields_that_differ(value: Any) -> str:
    """`Name(field=...)` of a NamedTuple or a dataclass, without the fields that have their default value."""
    if dataclasses.is_dataclass(value):
        fields = [(f.name, f.default) for f in dataclasses.fields(value) if f.repr]
    else:
        fields = [(name, value._field_defaults.get(name, inspect.Parameter.empty)) for name in value._fields]
    held = [(name, getattr(value, name), default) for name, default in fields]
    return call(type(value).__name__, [f"{name}={show(x)}" for name, x, default in held if not _equal(x, default)])


def call(name: str, parts: Iterable[str], brackets: str = "()") -> str:
    """`name(part, part)`, on several lines if one is too short."""
    parts = list(parts)
    line = f"{name}{brackets[0]}{', '.join(parts)}{brackets[1]}"
    if len(line) <= LINE and "\n" not in line:
        return line
    indented = [part.replace("\n", "\n    ") for part in parts]
    return f"{name}{brackets[0]}\n" + "".join(f"    {part},\n" for part in indented) + brackets[1]


def show(value: Any) -> str:
    """A value in few words: numbers as they are, arrays by dtype and shape, functions by name."""
    if isinstance(value, np.generic):
        return repr(value.item())
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, (type, np.dtype)):
        return getattr(value, "__name__", None) or str(value)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, optax.MultiSteps) or (hasattr(value, "init") and hasattr(value, "update")):
        return optimizer(value)
    if type(value).__module__.startswith("funcbilevel.") and type(value).__repr__ is not object.__repr__:
        return repr(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return fields_that_differ(value)
    if isinstance(value, (tuple, list)):
        text = call("", map(show, value), "()" if isinstance(value, tuple) else "[]")  # pyright: ignore
        return text[:-1] + ",)" if isinstance(value, tuple) and len(value) == 1 and "\n" not in text else text
    if isinstance(value, dict):
        return call("", [f"{show(k)}: {show(x)}" for k, x in value.items()], "{}")  # pyright: ignore
    if any(cls.__module__.startswith("flax.linen") for cls in type(value).__mro__):
        return _linen(value)
    if isinstance(value, functools.partial):
        named = [f"{name}={show(x)}" for name, x in value.keywords.items()]
        return call("partial", [show(value.func), *map(show, value.args), *named])
    if isinstance(value, (operator.itemgetter, operator.attrgetter)):
        return repr(value)
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return fields_that_differ(value) if dataclasses.is_dataclass(value) else _pytree(value)


def _linen(module: Any) -> str:
    """A Flax Linen module's class, with the hyper-parameters that are not its defaults."""
    held = [(f.name, getattr(module, f.name, None), f.default) for f in dataclasses.fields(module)]
    parts = [f"{n}={show(x)}" for n, x, default in held if n not in ("parent", "name") and not _equal(x, default)]
    return call(type(module).__name__, parts) if parts else type(module).__name__


def _pytree(value: Any) -> str:
    """A pytree of a type that is not known here by the paths of its leaves; other objects by their type."""
    leaves = jax.tree_util.tree_flatten_with_path(value)[0]
    if not (len(leaves) == 1 and leaves[0][1] is value):
        return call(type(value).__name__, [f"{path_name(path)}: {show(leaf)}" for path, leaf in leaves])
    text = repr(value)
    return type(value).__name__ if len(text) > LINE or re.search(r"\n| at 0x", text) else text


def _equal(value: Any, default: Any) -> bool:
    if value is default:
        return True
    if type(value) is not type(default):
        return False
    if isinstance(value, tuple):
        return len(value) == len(default) and all(map(_equal, value, default))
    return isinstance(value, (bool, int, float, str)) and value == default


# Optimizers. Optax keeps no names, but every transformation's functions have one, and what they close over tells the
# rest: a chain its members, a wrapper what it wraps.


def optimizer(transform: Any) -> str:
    """`adam`, `chain(clip_by_global_norm, sgd)`, `masked(adam)`: an optax optimizer without its numbers."""
    return _update(transform.update)


def _update(update: Any) -> str:
    if isinstance(owner := getattr(update, "__self__", None), optax.MultiSteps):
        return f"MultiSteps({optimizer(owner.inner_opt)})"
    if not inspect.isfunction(update):
        return type(owner if owner is not None else update).__name__
    name = update.__qualname__.partition(".<locals>")[0].rpartition(".")[2]
    closure = inspect.getclosurevars(update).nonlocals
    if name == "with_extra_args_support":
        return optimizer(closure["tx"])
    if name == "chain":
        return _aliases().get(_signature(update)) or call("chain", map(_update, closure["update_fns"]))
    inside = [closure.get("inner_factory")] if "inner_factory" in closure else _transforms(list(closure.values()))
    return call(name, [optimizer(x) if hasattr(x, "update") else show(x) for x in inside]) if inside else name


def _transforms(value: Any) -> list[Any]:
    """The optimizers in lists and dicts that a function closes over."""
    if hasattr(value, "init") and hasattr(value, "update"):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [x for v in value for x in _transforms(v)] if isinstance(value, (list, tuple)) else []


def _signature(update: Any) -> tuple[Any, ...]:
    """The names of a chain's members with their switches; whatever scales by a learning rate counts alike."""
    closure = inspect.getclosurevars(update).nonlocals
    if "tx" in closure:
        return _signature(closure["tx"].update)
    if "update_fns" in closure:
        return tuple(_signature(member) for member in closure["update_fns"])
    name = update.__qualname__.partition(".<locals>")[0]
    rate = name in ("scale", "scale_by_schedule", "scale_by_learning_rate")
    switches = sorted((k, v) for k, v in closure.items() if isinstance(v, bool))
    return ("learning rate",) if rate else (name, *switches)


@functools.cache
def _aliases() -> dict[tuple[Any, ...], str]:
    """The chains that are optax's own optimizers."""
    names = ("sgd", "adam", "adamw", "nadam", "nadamw", "adamax", "adamaxw", "amsgrad", "adabelief", "adagrad", "adan")
    more = ("rmsprop", "lion", "lamb", "lars", "radam", "yogi", "novograd", "adadelta", "sm3", "fromage", "rprop")
    made = [(name, {}) for name in (*names, *more)]
    made += [("sgd", {"momentum": 0.9}), ("sgd", {"momentum": 0.9, "nesterov": True}), ("rmsprop", {"momentum": 0.9})]
    table: dict[tuple[Any, ...], str] = {}
    for name, kwargs in made:
        if hasattr(optax, name):
            update = getattr(optax, name)(learning_rate=0.1, **kwargs).update
            if "update_fns" in inspect.getclosurevars(update).nonlocals:
                table.setdefault(_signature(update), name)
    return table
