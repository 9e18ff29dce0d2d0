"""What a run is known by: its solver with the numbers in it, the form of its state, and where it started."""

import dataclasses
import functools
import inspect
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcbilevel._described import describe
from funcbilevel._state import is_key, leaf_name
from funcbilevel._typing import PyTree

Identity = dict[str, Any]  # plain JSON

_LARGE = 10**7  # arrays of more elements, that a function closes over, are not looked at


def identity(solver: Any, state: PyTree, kind: str) -> Identity:
    """All by which `differences` tells one run from another."""
    solver = getattr(solver.init, "unplaced", solver)  # on however many devices
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}
    found: dict[str, str] = {}
    _collect(solver, "solver", found, {}, ours=True)
    return {
        "solver": describe(solver),
        "settings": found,
        "data": kind,
        "state": {name: f"{leaf.dtype}{list(np.shape(leaf))}" for name, leaf in leaves.items()},
        "start": {name: summary for name, leaf in leaves.items() if (summary := _summary(leaf)) is not None},
    }


def differences(there: Identity, here: Identity) -> list[str]:
    """One phrase for each thing in which two runs differ; the numbers of what is not the same at all are not named."""
    found: list[str] = []
    if there["data"] != here["data"]:
        found.append(f"data was {there['data']} and is now {here['data']}")
    if there["solver"] != here["solver"]:
        was, now = (_lines(run["solver"]) for run in (there, here))
        gone, new = ([line for line in a if line not in b] for a, b in ((was, now), (now, was)))
        return [*found, f"the solver was made with {', '.join(gone or was)} and is now with {', '.join(new or now)}"]
    then, now = there["state"], here["state"]
    found += [f"the state had {name} {then[name]}" for name in then if name not in now]
    found += [f"the state now has {name} {now[name]}" for name in now if name not in then]
    found += [f"{n} was {then[n]} and is now {now[n]}" for n in then if n in now and then[n] != now[n]]
    if found:
        return found
    then, now = there["settings"], here["settings"]
    found += [f"{n} was {then[n]} and is now {now[n]}" for n in then if n in now and then[n] != now[n]]
    then, now = there["start"], here["start"]
    found += [f"the run started from another {n}" for n in then if n in now and not _alike(then[n], now[n])]
    return found


def _lines(text: str) -> list[str]:
    return [line.strip().rstrip(",") for line in text.splitlines()]


def _summary(leaf: Any) -> list[float] | int | None:
    """Norm and sum of floats, which other devices give as well up to rounding; a checksum of all else."""
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return None
    array = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return zlib.crc32(array.tobytes())
    values = np.abs(array) if np.iscomplexobj(array) else array.astype(np.float64)
    return [float(np.sqrt(np.sum(values**2))), float(np.sum(values))]


def _alike(a: Any, b: Any) -> bool:
    if not (isinstance(a, list) and isinstance(b, list)):
        return a == b
    near = 1e-3 * max(map(abs, (a[0], b[0])))
    return all(x == y or abs(x - y) <= near or (math.isnan(x) and math.isnan(y)) for x, y in zip(a, b))


# Numbers in a solver: those that its functions, and the optimizers', close over.


def _collect(value: Any, path: str, found: dict[str, str], seen: dict[int, Any], ours: bool) -> None:
    """Adds path -> text.

    `ours`: whether the holder is a function of optax or of this package, whose dicts and lists are settings; those of a
    user's functions may be what they count in.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, np.generic)):
        found[path] = repr(value.item() if isinstance(value, np.generic) else value)
        return
    if id(value) in seen:
        return
    seen[id(value)] = value  # and alive: no other object gets its id
    if isinstance(value, (np.ndarray, jax.Array)):
        if value.size <= _LARGE and value.dtype != object and getattr(value, "is_fully_addressable", True):
            array = np.asarray(jax.random.key_data(value) if is_key(value) else value)
            text = repr(array.item()) if array.size == 1 else f"{zlib.crc32(array.tobytes()):08x}"
            found[path] = f"{text} ({array.dtype}{list(array.shape)})"
        return
    for name, part, of_ours in _parts(value, ours):
        _collect(part, f"{path}.{name}" if name else path, found, seen, of_ours)


def _parts(value: Any, ours: bool) -> list[tuple[str, Any, bool]]:
    """(name, part, whether it belongs to a function of optax or of this package)."""
    if isinstance(value, tuple):
        names: Any = getattr(value, "_fields", range(len(value)))
        return [(str(name), part, ours) for name, part in zip(names, value)]
    if isinstance(value, functools.partial):
        keywords = [(name, part, ours) for name, part in value.keywords.items()]
        return [("", value.func, ours), *((str(i), part, ours) for i, part in enumerate(value.args)), *keywords]
    if inspect.ismethod(value):
        return [("", value.__func__, ours), ("", value.__self__, ours)]
    if hasattr(value, "__wrapped__"):  # jit, vmap, custom_vjp
        return [("", value.__wrapped__, ours)]
    if inspect.isfunction(value):
        ours = _is_ours(value.__module__)
        cells = zip(value.__code__.co_freevars, value.__closure__ or ())
        held = [(name, cell.cell_contents, ours) for name, cell in cells if _is_filled(cell)]
        named = inspect.signature(value, follow_wrapped=False).parameters.values()
        return held + [(p.name, p.default, ours) for p in named if p.default is not inspect.Parameter.empty]
    if ours and isinstance(value, dict):
        return [(str(name), part, ours) for name, part in value.items()]
    if ours and isinstance(value, list):
        return [(str(i), part, ours) for i, part in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
        return [(name, part, ours) for name, part in fields if name not in ("parent", "name")]
    if _is_ours(type(value).__module__) and hasattr(value, "__dict__"):
        return [(name, part, True) for name, part in vars(value).items()]
    return []


def _is_ours(module: str | None) -> bool:
    return (module or "").partition(".")[0] in ("optax", "funcbilevel")


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
