"""The metrics of a run on the host, and which level broke first in it."""

import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

HostMetrics: TypeAlias = dict[str, np.ndarray[Any, Any]]


_AT_FIRST = 2**20


class History:
    """Metrics of the steps so far, in arrays for a million, which double from there until they hold `limit` steps.

    Memory that has not been written to yet costs nothing.

    They are copies: an array that came from a device would keep its buffer there alive.
    """

    def __init__(self, limit: int) -> None:
        self.length = 0
        self._limit = limit
        self._arrays: HostMetrics = {}

    def append(self, metrics: HostMetrics) -> None:
        """Adds the steps of a chunk, the leading axis of metrics."""
        size = len(next(iter(metrics.values())))
        end = self.length + size
        if self._arrays and set(metrics) != set(self._arrays):
            raise ValueError(f"train: metrics were {', '.join(self._arrays)}, and are now {', '.join(metrics)}.")
        for name, values in metrics.items():
            array = self._arrays.get(name)
            if array is None or len(array) < end:
                grown = np.empty(
                    (min(self._limit, max(2 * self.length, end, _AT_FIRST)), *values.shape[1:]), values.dtype
                )
                if array is not None:
                    grown[: self.length] = array[: self.length]
                self._arrays[name] = array = grown
            array[self.length : end] = values
        self.length = end

    def cut(self, length: int) -> None:
        """Forgets the steps after the first `length`."""
        self.length = length

    def view(self) -> HostMetrics:
        """All steps so far, as views that the next `append` may leave behind."""
        return {name: array[: self.length] for name, array in self._arrays.items()}

    def arrays(self) -> HostMetrics:
        """All steps so far, in arrays of that length."""
        return {
            name: array if len(array) == self.length else array[: self.length].copy()
            for name, array in self._arrays.items()
        }


# Which level broke first.

_LEVELS = ("inner", "adjoint", "outer")  # in the order in which a fault spreads
_HINTS = {
    "inner": "lower the inner learning rate, clip its gradient, or look for NaN in the inner objective and batch",
    "adjoint": "lower the adjoint's learning rate or step size, or add ridge or damping (linear_curvature < 0 in "
    "the metrics means that the Hessian is indefinite: fb.cg then fails, fb.normal_cg does not)",
    "outer": "lower the outer learning rate or clip its gradient; under fb.itd through Adam, give Adam an eps_root",
}
_GROWTH, _HUGE = 1e6, 1e16  # an objective that has grown by the one, or beyond the other, has exploded


def broken_at_the_end(metrics: HostMetrics) -> np.ndarray[Any, Any]:
    """Whether the last step had a fault; for each seed."""
    return ~np.all([metrics[f"{level}_finite"][-1] for level in _LEVELS], axis=0)


def first_fault(metrics: HostMetrics, start: int) -> tuple[int, ...] | None:
    """(step, *seed) at which a flag fell for the first time since step `start` of the run."""
    healthy = np.all([metrics[f"{level}_finite"][start:] for level in _LEVELS], axis=0)  # [steps, *seeds]
    if healthy.all():
        return None
    step, *seed = (int(i) for i in np.argwhere(~healthy)[0])
    return start + step, *seed


def fault_message(
    metrics: HostMetrics,
    fault: tuple[int, ...],
    first_step: int,
    outer_params: Any,
    inner_params: Any,
    faulty_batch: dict[str, str],
) -> str:
    """Names the level that is the first cause of a fault, and what to do.

    Arguments:
        metrics: of the whole run.
        fault: (step, *seed), from `first_fault`.
        first_step: the run's first step.
        outer_params, inner_params: after the fault. A step does not write what is not finite, so NaN in them was
            there before the run.
        faulty_batch: level -> what is wrong with its batch at that step.
    """
    step, *seed = fault
    level, what, mend = _blame(metrics, fault, outer_params, inner_params, faulty_batch)
    of_seed = f" of seed {', '.join(map(str, seed))}" if seed else ""
    kept = "outer_params keep their last finite value. " if _finite(outer_params, seed) else ""
    return (
        f"train: {what} in the {level} level at outer step {first_step + step}{of_seed} "
        f"(inner_objective {metrics['inner_objective'][fault]:.6g}, outer_objective "
        f"{metrics['outer_objective'][fault]:.6g}). {kept}To mend: {mend}."
    )


def _blame(
    metrics: HostMetrics, fault: tuple[int, ...], outer_params: Any, inner_params: Any, faulty_batch: dict[str, str]
) -> tuple[str, str, str]:
    """(level, what happened there, what to do): what came first, not what it led to."""
    step, *seed = fault
    inner, outer = (np.abs(_series(metrics[f"{level}_objective"], seed)) for level in ("inner", "outer"))
    fallen = next(level for level in _LEVELS if not metrics[f"{level}_finite"][fault])
    of_batch = "inner" if fallen == "inner" else "outer"
    inner_at, outer_at = _explosion(inner[: step + 1]), _explosion(outer[: step + 1])
    broken = "NaN or inf"
    if not _finite(outer_params, seed):
        return "outer", broken, "outer_params were NaN or inf before the run's first step; start from finite ones"
    if fallen == "inner" and not _finite(inner_params, seed):
        return "inner", broken, "inner_params were NaN or inf before the run's first step; start from finite ones"
    if of_batch in faulty_batch:
        return of_batch, broken, f"{faulty_batch[of_batch]} at that step; look there first"
    # At its last inner step, before the update, the inner objective is one step behind.
    if outer_at < step and outer_at + 1 < inner_at:
        return "outer", broken, f"the outer objective grew first, {_growth(outer, step)}; {_HINTS['outer']}"
    grown = inner_at <= step and np.isfinite(inner[inner_at])
    if grown and (fallen == "inner" or _went_on(inner, metrics, fault)):
        mend = f"the inner objective had grown {_growth(inner, step)}; {_HINTS['inner']}"
        beside = "; if that does not help, outer_params grew first: lower the outer learning rate"
        return "inner", "divergence", mend + (beside if outer_at <= step else "")
    if fallen != "inner" and not np.isfinite(outer[step]):
        mend = "look for overflow, log or division of 0 in the outer objective and batch, where it is NaN or inf, or "
        return "outer", broken, mend + _HINTS["outer"]
    return fallen, "NaN, inf or divergence" if fallen == "inner" else broken, _HINTS[fallen]


def _series(values: np.ndarray[Any, Any], seed: list[int]) -> np.ndarray[Any, Any]:
    return values[(slice(None), *seed)].astype(np.float64)


def _finite(tree: Any, seed: list[int]) -> bool:
    leaves = (leaf[tuple(seed)] for leaf in jax.tree.leaves(tree))
    return all(bool(jnp.all(jnp.isfinite(x))) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact))


def _explosion(values: np.ndarray[Any, Any]) -> int:
    """The step since which a series has been beyond all bounds up to its end; its length if it is not."""
    normal = values <= min(_HUGE, _GROWTH * max(1.0, _least(values)))
    return int(np.flatnonzero(normal)[-1]) + 1 if normal.any() else 0


def _least(values: np.ndarray[Any, Any]) -> float:
    return float(np.min(values, initial=np.inf, where=np.isfinite(values)))


def _growth(values: np.ndarray[Any, Any], step: int) -> str:
    return f"from {_least(values[: step + 1]):.3g} to {values[step]:.3g}"


def _went_on(inner: np.ndarray[Any, Any], metrics: HostMetrics, fault: tuple[int, ...]) -> bool:
    """Whether the inner objective grew on while faults held outer_params still, at half its earlier pace at least.

    If so, it was not outer_params that drove it. True if there is no later step to tell.
    """
    step, *seed = fault
    if not np.isfinite(inner[step]):
        return True
    healthy = np.all([metrics[f"{level}_finite"][(slice(step, None), *seed)] for level in _LEVELS], axis=0)
    still = min(int(np.argmax(healthy)) if healthy.any() else len(healthy), len(healthy) - 1)  # steps with equal omega
    before = inner[: step + 1]
    least = int(np.nanargmin(before))
    pace = math.log(before[-1] / max(1.0, before[least])) / max(1, step - least)
    after = inner[step + still] / before[-1]
    return still == 0 or not after < math.inf or math.log(max(after, 1e-300)) > 0.5 * still * pace
