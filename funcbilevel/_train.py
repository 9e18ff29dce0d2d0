"""The host's side of training: jitted chunks of steps, with progress, logging and checkpoints in between."""

import itertools
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import lru_cache, partial
from types import MethodType
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from funcbilevel._arguments import check_callable, check_number
from funcbilevel._bilevel import BilevelSolver, BilevelState
from funcbilevel._typing import Batch, Key, Metrics

HostMetrics: TypeAlias = dict[str, np.ndarray[Any, Any]]
Sampler: TypeAlias = Callable[[Key, jax.Array], tuple[Batch, Batch]]
Callback: TypeAlias = Callable[[BilevelState, HostMetrics], Any]

_LEVELS = ("inner", "adjoint", "outer")  # in the order in which a fault spreads
_HINTS = {
    "inner": "lower the inner learning rate, clip its gradient, or look for NaN in the inner objective and batch",
    "adjoint": "lower the adjoint's learning rate or step size, or add ridge or damping (linear_curvature < 0 in "
    "the metrics means that the Hessian is indefinite: fb.cg then fails, fb.normal_cg does not)",
    "outer": "lower the outer learning rate or clip its gradient; under fb.itd through Adam, give Adam an eps_root",
}


class NonFiniteError(FloatingPointError):
    """NaN or inf in one level of a run.

    Attributes:
        state: the solver's state after the chunk in which it happened, outer_params at their last finite value.
        metrics: that chunk's host metrics, leading axis = outer steps.
    """

    def __init__(self, message: str, state: BilevelState, metrics: HostMetrics) -> None:
        super().__init__(message)
        self.state = state
        self.metrics = metrics


def train(
    solver: BilevelSolver,
    state: BilevelState,
    data: Sampler | Iterable[tuple[Batch, Batch]],
    num_outer_steps: int,
    *,
    chunk: int = 100,
    callback: Callback | None = None,
    progress: bool | None = None,
    on_nonfinite: Literal["raise", "continue"] = "raise",
) -> tuple[BilevelState, HostMetrics]:
    """Runs outer steps in jitted chunks and comes back to the host between them.

    All chunks share one compiled program, the last and shorter one included; its buffers are donated.

    A solver over several seeds at once goes in as `solver._replace(step=jax.vmap(solver.step))`, with a state from
    `jax.vmap(solver.init)`; `data` then gives one pair of batches for each seed (its key and step are arrays over the
    seeds, so `jax.vmap` of a sampler serves), and metrics have the seeds as second axis.

    Arguments:
        solver: from `bilevel`.
        state: from `solver.init`, or of an earlier run. It is copied, so it stays usable.
        data: a pure function `(key, step) -> (inner_batch, outer_batch)`, compiled into the loop (its key comes from
            the state, so a run in two halves equals one in one piece); or an iterable of
            `(inner_batch, outer_batch)` of equal shapes. Arrays that a function closes over are compiled into the
            program as constants: bind large ones, or ones that change from call to call, by
            `jax.tree_util.Partial(function, arrays)`, as leading arguments.
        num_outer_steps: how many outer steps to take, >= 1.
        chunk: steps per chunk, >= 1.
        callback: `(state, metrics)` after each chunk; metrics are NumPy arrays with the chunk's steps as leading
            axis. The state's buffers are reused by the next chunk: copy what must outlive the call.
        progress: whether to show a progress bar with the objectives on stderr; None: if stderr is a terminal.
        on_nonfinite: "raise" a `NonFiniteError` that names the step and the level, or "continue" with a warning
            that does (outer_params keep their last finite value either way).

    Returns:
        The last state, and all metrics with the outer steps as leading axis.

    Raises:
        NonFiniteError: NaN or inf in a level, with `on_nonfinite="raise"`. It carries state and metrics.
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Warns:
        UserWarning: the iterable ended early (what was done is returned), or NaN with `on_nonfinite="continue"`.

    Example: full batches.
        >>> state, metrics = fb.train(  # doctest: +SKIP
        ...     solver, state, lambda key, step: (batch, batch), num_outer_steps=1000
        ... )
    """
    check_number("train", "num_outer_steps", num_outer_steps)
    check_number("train", "chunk", chunk)
    if on_nonfinite not in ("raise", "continue"):
        raise ValueError(f'train: on_nonfinite must be "raise" or "continue", got {on_nonfinite!r}.')
    if callback is not None:
        check_callable("train", "callback", callback, "state, metrics")
    chunk = min(chunk, num_outer_steps)
    if callable(data):
        check_callable("train", "data", data, "key, step")
        run_chunk = _compiled(_sampled_chunk, solver, chunk)
        # As a method, which Python compares by its object's identity, whatever == means for that object.
        sampler = data if isinstance(data, jax.tree_util.Partial) else jax.tree_util.Partial(MethodType(_call, data))
        batches = None
    elif isinstance(data, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        run_chunk, sampler = _compiled(_stacked_chunk, solver, chunk), None
        batches = iter(data)
    else:
        raise TypeError(
            f"train: data must be a function (key, step) -> (inner_batch, outer_batch) or an iterable of such pairs, "
            f"got {type(data).__name__}."
        )

    state = jax.tree.map(jnp.copy, state)
    history: list[HostMetrics] = []
    done = 0
    with _ProgressBar(num_outer_steps) if _show(progress) else nullcontext() as bar:
        while done < num_outer_steps:
            size = min(chunk, num_outer_steps - done)
            if batches is None:
                state, metrics = run_chunk(state, size, sampler)
            else:
                pairs = [_pair(pair) for pair in itertools.islice(batches, size)]
                if len(pairs) < size:
                    warnings.warn(
                        f"train: data ended after {done + len(pairs)} of {num_outer_steps} steps.", stacklevel=2
                    )
                    num_outer_steps = done + (size := len(pairs))
                    if not pairs:
                        break
                pairs += [pairs[-1]] * (chunk - size)  # so that the last chunk needs no other program
                state, metrics = run_chunk(state, size, _stack(pairs))
            chunk_metrics = {name: np.asarray(values)[:size] for name, values in jax.device_get(metrics).items()}
            history.append(chunk_metrics)
            if message := _nonfinite(chunk_metrics, int(np.max(state.step)) - size):
                if on_nonfinite == "raise":
                    raise NonFiniteError(message, state, chunk_metrics)
                warnings.warn(message, stacklevel=2)
            done += size
            if bar is not None:
                bar.update(done, chunk_metrics)
            if callback is not None:
                callback(state, chunk_metrics)
    return state, {name: np.concatenate([m[name] for m in history]) for name in (history[0] if history else {})}


@lru_cache(maxsize=64)
def _compiled(function: Callable[..., Any], solver: BilevelSolver, chunk: int) -> Callable[..., Any]:
    """One jitted function per solver, so that a second `train` with it finds its program compiled."""
    return jax.jit(partial(function, solver, chunk), donate_argnums=0)


def _call(sampler: Sampler, key: Key, step: jax.Array) -> tuple[Batch, Batch]:
    return sampler(key, step)


def _pair(pair: Any) -> tuple[Batch, Batch]:
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):  # pyright: ignore[reportUnknownArgumentType]
        got = f"{type(pair).__name__} of {len(pair)}" if isinstance(pair, (tuple, list)) else type(pair).__name__
        raise TypeError(f"train: data must give pairs (inner_batch, outer_batch), got {got}; pack extras into them.")
    return pair[0], pair[1]


def _sampled_chunk(
    solver: BilevelSolver, chunk: int, state: BilevelState, size: jax.Array, sampler: Sampler
) -> tuple[BilevelState, Metrics]:
    def batches(state: BilevelState, i: jax.Array) -> tuple[Batch, Batch]:
        del i
        fold_in = jax.random.fold_in
        for _ in state.step.shape:  # the seeds of a vmapped solver
            fold_in = jax.vmap(fold_in, in_axes=(0, None))
        return _pair(sampler(fold_in(state.key, _DATA_STREAM), state.step))

    return _steps(solver, batches, chunk, state, size)


_DATA_STREAM = 0xDA7A  # keeps the sampler's key apart from those that a step splits off


def _stacked_chunk(
    solver: BilevelSolver, chunk: int, state: BilevelState, size: jax.Array, stacked: tuple[Batch, Batch]
) -> tuple[BilevelState, Metrics]:
    return _steps(solver, lambda _, i: jax.tree.map(lambda x: x[i], stacked), chunk, state, size)


def _steps(
    solver: BilevelSolver,
    batches: Callable[[BilevelState, jax.Array], tuple[Batch, Batch]],
    chunk: int,
    state: BilevelState,
    size: jax.Array,
) -> tuple[BilevelState, Metrics]:
    """The first `size` of at most `chunk` steps, and their metrics in arrays of length `chunk`."""

    def step(state: BilevelState, i: jax.Array) -> tuple[BilevelState, Metrics]:
        return solver.step(state, *batches(state, i))

    def body(i: jax.Array, carry: tuple[BilevelState, Metrics]) -> tuple[BilevelState, Metrics]:
        state, trace = carry
        state, metrics = step(state, i)
        return state, jax.tree.map(lambda xs, x: xs.at[i].set(x), trace, metrics)

    shapes = jax.eval_shape(lambda s: step(s, jnp.zeros((), jnp.int32))[1], state)
    trace = jax.tree.map(lambda s: jnp.zeros((chunk, *s.shape), s.dtype), shapes)
    return jax.lax.fori_loop(0, size, body, (state, trace))


def _stack(pairs: list[tuple[Batch, Batch]]) -> tuple[Batch, Batch]:
    structures = {str(jax.tree.map(np.shape, pair)) for pair in pairs}
    if len(structures) != 1:
        raise ValueError(
            "train: all batches of data must have the same structure and shapes, got "
            f"{' and '.join(sorted(structures))}; drop or pad the last, shorter batch of an epoch."
        )
    return jax.tree.map(lambda *xs: np.stack(xs), *pairs)


def _nonfinite(metrics: HostMetrics, first_step: int) -> str | None:
    """Says which level broke, and when first."""
    healthy = np.stack([metrics[f"{level}_finite"] for level in _LEVELS], axis=-1)  # [steps, (seeds,) levels]
    if healthy.all():
        return None
    first = tuple(int(i) for i in np.argwhere(~healthy.all(axis=-1))[0])  # (step,) or (step, seed)
    level = _LEVELS[int(np.argmin(healthy[first]))]
    seed = f" of seed {', '.join(map(str, first[1:]))}" if first[1:] else ""
    return (
        f"train: NaN or inf in the {level} level at outer step {first_step + first[0]}{seed} "
        f"(inner_objective {metrics['inner_objective'][first]:.6g}, outer_objective "
        f"{metrics['outer_objective'][first]:.6g}). outer_params keep their last finite value. To mend: "
        f"{_HINTS[level]}."
    )


def _show(progress: bool | None) -> bool:
    return sys.stderr.isatty() if progress is None else progress


class _ProgressBar:
    """Steps, speed, time left and the two objectives, on one line of stderr."""

    def __init__(self, total: int) -> None:
        # rich comes with flax; imported here because most programs never show a bar.
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("outer {task.fields[outer]:.4g}  inner {task.fields[inner]:.4g}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("outer steps", total=total, outer=float("nan"), inner=float("nan"))

    def __enter__(self) -> "_ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, metrics: HostMetrics) -> None:
        self._bar.update(
            self._task,
            completed=done,
            outer=np.mean(metrics["outer_objective"][-1]),
            inner=np.mean(metrics["inner_objective"][-1]),
        )
