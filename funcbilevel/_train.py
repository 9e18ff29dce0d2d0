"""The host's side of training: jitted chunks of steps, with progress, logging and checkpoints in between."""

import itertools
import math
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache, partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from funcbilevel._arguments import check_callable, check_number
from funcbilevel._bilevel import BilevelSolver, BilevelState
from funcbilevel._check import warn_of_run
from funcbilevel._data import (
    DataFunction,
    Pair,
    Signature,
    check_alike,
    check_form,
    check_not_itself_a_pair,
    faulty_leaf,
    is_itself_a_pair,
    on_the_devices_of,
    read_data,
    read_pair,
    signature,
    stack,
    warn_of_frozen_draws,
)
from funcbilevel._history import History, HostMetrics, fault_message, first_fault
from funcbilevel._typing import Batch, Key, Metrics

Callback: TypeAlias = Callable[[BilevelState, HostMetrics], Any]


class StopTraining(Exception):
    """Raised by a callback of `train`: the run ends, and `train` returns the state and the metrics so far."""


class NonFiniteError(FloatingPointError):
    """NaN or inf in one level of a run.

    Attributes:
        state: the solver's state after the chunk in which it happened, outer_params at their last finite value.
        metrics: host metrics of the run up to the end of that chunk, leading axis = outer steps.
    """

    def __init__(self, message: str, state: BilevelState, metrics: HostMetrics) -> None:
        super().__init__(message)
        self.state = state
        self.metrics = metrics


def train(
    solver: BilevelSolver,
    state: BilevelState,
    data: DataFunction | Iterable[tuple[Batch, Batch]],
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
            `(inner_batch, outer_batch)` of equal structure, shapes and dtypes, for example
            `itertools.repeat((inner_batch, outer_batch))`. Inner batches must look like the one that `solver.init`
            was given, but for their first axis. NumPy batches are stacked on the host, those that are on devices
            there, divided over them as they were. Arrays that a function closes over are compiled into the
            program as constants: bind large ones, or ones that change from call to call, by
            `jax.tree_util.Partial(function, arrays)`, as leading arguments.
        num_outer_steps: how many outer steps to take, >= 1.
        chunk: steps per chunk, >= 1.
        callback: `(state, metrics)` after each chunk; metrics are NumPy arrays with the chunk's steps as leading
            axis. The state's buffers are reused by the next chunk: copy what must outlive the call. The run ends
            when it returns True or raises `StopTraining`.
        progress: whether to show a progress bar with the objectives on stderr; None: if stderr is a terminal.
        on_nonfinite: "raise" a `NonFiniteError` that names the step and the level, or "continue" with a warning
            that does (outer_params keep their last finite value either way).

    Returns:
        The last state, and all metrics with the outer steps as leading axis.

    Raises:
        NonFiniteError: NaN or inf in a level, with `on_nonfinite="raise"`. It carries state and metrics.
        ValueError, TypeError: an argument is out of range or of the wrong kind.

        Whatever ends the run, from data, from the callback or by Ctrl-C (which waits for the running chunk; a second
        one does not), carries `state` and `metrics` of the chunks that were done as attributes, and a note that says
        so. An error inside the compiled program, such as that of a host callback, has lost the state: it is None.

    Warns:
        UserWarning: the iterable ended early (what was done is returned); NaN with `on_nonfinite="continue"`; a
            function that draws by other means than its key, which would give the same numbers at every step; an
            assumption of the estimator that plainly fails: in the last tenth of a run of thirty steps or more the inner
            solutions are not stationary (`inner_gradient_relative` > 0.05), or the batches of `pointwise_adjoint`
            differ.

    Example: full batches, until the outer objective is small.
        >>> import itertools, jax, optax, jax.numpy as jnp, funcbilevel as fb
        >>> mse = lambda u, y: jnp.mean((u - y) ** 2)
        >>> problem = fb.ParametricProblem(lambda w, u, y: mse(u, w), lambda w, u, y: mse(u, y))
        >>> adam = optax.inject_hyperparams(optax.adam)(optax.cosine_decay_schedule(0.1, 1000))
        >>> solver = fb.bilevel(
        ...     problem, None, fb.aid(fb.cg(1)), inner_optimizer=optax.sgd(0.5), outer_optimizer=adam
        ... )
        >>> y = jnp.ones(3)
        >>> start = solver.init(jax.random.key(0), 0.0, y, 0.0)
        >>> def enough(state, metrics):
        ...     return metrics["outer_objective"][-1] < 1e-3
        >>> state, metrics = fb.train(solver, start, itertools.repeat((y, y)), 1000, chunk=10, callback=enough)
        >>> int(state.step) == len(metrics["outer_objective"]) < 1000
        True

        Learning rates under `optax.inject_hyperparams` are in the optimizers' states, and a callback finds them there,
        those of a schedule included, once per chunk; what is wanted of every step becomes a metric of the step.

        >>> float(state.outer_opt_state.hyperparams["learning_rate"]) < 0.1
        True
        >>> def step(state, inner_batch, outer_batch):
        ...     state, metrics = solver.step(state, inner_batch, outer_batch)
        ...     return state, metrics | {"learning_rate": state.outer_opt_state.hyperparams["learning_rate"]}
        >>> _, metrics = fb.train(solver._replace(step=step), start, lambda key, step: (y, y), 20)
        >>> metrics["learning_rate"].shape
        (20,)
    """
    check_number("train", "num_outer_steps", num_outer_steps)
    check_number("train", "chunk", chunk)
    if on_nonfinite not in ("raise", "continue"):
        raise ValueError(f'train: on_nonfinite must be "raise" or "continue", got {on_nonfinite!r}.')
    if callback is not None:
        check_callable("train", "callback", callback, "state, metrics")
    chunk = min(chunk, num_outer_steps)
    sampler, batches = read_data(data)
    if batches is not None and not state.batch_form:
        check_not_itself_a_pair(solver.step, state, data)
    run_chunk = _compiled(_stacked_chunk if sampler is None else _sampled_chunk, solver, chunk)

    state = jax.tree.map(jnp.copy, state)
    history = History(num_outer_steps)
    expected: Signature | None = None
    try:
        with _ProgressBar(num_outer_steps) if _show(progress) else nullcontext() as bar:
            while history.length < num_outer_steps:
                start = history.length
                size = min(chunk, num_outer_steps - start)
                source: Any = sampler
                if batches is not None:
                    pairs: list[Pair] = []
                    for pair in map(read_pair, itertools.islice(batches, size)):
                        if expected is None:
                            check_form(state.batch_form, pair, state.step.shape, data)
                            expected = signature(pair)
                        check_alike(signature(pair), expected, start + len(pairs))
                        pairs.append(pair)
                    if len(pairs) < size:
                        warnings.warn(_ended(start + len(pairs), num_outer_steps, data), stacklevel=2)
                        num_outer_steps = start + (size := len(pairs))
                        if not pairs:
                            break
                    # Padded, so that the last chunk needs no other program.
                    source = stack(pairs + [pairs[-1]] * (chunk - size))
                    if start == 0:
                        state = on_the_devices_of(source, state)
                with _interrupts_wait():
                    new_state, values = run_chunk(state, size, source)
                    metrics = {name: np.array(x[:size]) for name, x in jax.device_get(values).items()}
                    history.append(metrics)
                    state = new_state
                if (fault := first_fault(history.view(), start)) is not None:
                    message = _fault_message(history, fault, state, source, start)
                    if on_nonfinite == "raise":
                        raise NonFiniteError(message, state, history.arrays())
                    warnings.warn(message, stacklevel=2)
                if bar is not None:
                    bar.update(history.length, metrics)
                if callback is not None and _stops(callback, state, metrics):
                    break
    except BaseException as error:
        _hand_over(error, state, history)
        raise
    all_metrics = history.arrays()
    warn_of_run("train", all_metrics)
    return state, all_metrics


def _ended(done: int, num_outer_steps: int, data: Any) -> str:
    hint = (
        "; if data is one pair (inner_batch, outer_batch) for every step, pass itertools.repeat(data)"
        if is_itself_a_pair(data)
        else ""
    )
    return f"train: data ended after {done} of {num_outer_steps} steps{hint}."


def _stops(callback: Callback, state: BilevelState, metrics: HostMetrics) -> bool:
    """Whether the callback ends the run: it returns a true bool of Python, NumPy or JAX, or raises `StopTraining`."""
    try:
        answer = callback(state, metrics)
    except StopTraining:
        return True
    is_bool = isinstance(answer, bool) or getattr(answer, "dtype", None) == np.bool_
    if is_bool and np.shape(answer) != ():
        raise ValueError(
            f"train: callback must return True to end the run, or None or False, got bools of shape "
            f"{np.shape(answer)}; say which it is by np.all or np.any."
        )
    return is_bool and bool(answer)


@contextmanager
def _interrupts_wait() -> Generator[None]:
    """Lets Ctrl-C wait to the end of a chunk, whose program has taken the state's buffers; a second one does not wait.

    Python reports it no sooner in any case, unless it falls between the instructions that bring the results home.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[Any] = []

    def receive(*args: Any) -> None:
        received.append(args)
        signal.signal(signal.SIGINT, handler)

    signal.signal(signal.SIGINT, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        handler(*received[0])


def _hand_over(error: BaseException, state: BilevelState, history: History) -> None:
    """Gives an exception what the run has done so far."""
    if isinstance(error, NonFiniteError) and error.state is state:
        return
    lost = any(x.is_deleted() for x in jax.tree.leaves(state))
    with suppress(AttributeError):  # a class of exceptions may forbid it
        error.state, error.metrics = None if lost else state, history.arrays()  # pyright: ignore[reportAttributeAccessIssue]
        if history.length and not lost:
            error.add_note(
                f"train: error.state and error.metrics hold what was done, {history.length} outer steps; "
                "fb.train goes on from that state."
            )
        elif lost:
            error.add_note(
                f"train: error.metrics hold the {history.length} outer steps that were done; error.state is None, "
                "since the compiled chunk that failed had taken the state's buffers."
            )


def _fault_message(history: History, fault: tuple[int, ...], state: BilevelState, source: Any, start: int) -> str:
    """Says where a run broke; `source` is its sampler or the chunk's stacked batches."""
    step, *seed = fault

    def at_fault(x: Any) -> Any:
        return x[(step - start, *(seed if x.shape[1 : 1 + len(seed)] == state.step.shape else ()))]

    pair = () if isinstance(source, jax.tree_util.Partial) else jax.tree.map(at_fault, source)
    faulty = {level: faulty_leaf(f"{level}_batch", batch) for level, batch in zip(("inner", "outer"), pair)}
    first_step = int(np.max(state.step)) - history.length
    known = {level: leaf for level, leaf in faulty.items() if leaf is not None}
    return fault_message(history.view(), fault, first_step, state.outer_params, state.inner_params, known)


@lru_cache(maxsize=64)
def _compiled(function: Callable[..., Any], solver: BilevelSolver, chunk: int) -> Callable[..., Any]:
    """One jitted function per solver, so that a second `train` with it finds its program compiled."""
    return jax.jit(partial(function, solver, chunk), donate_argnums=0)


def _sampled_chunk(
    solver: BilevelSolver, chunk: int, state: BilevelState, size: jax.Array, sampler: jax.tree_util.Partial
) -> tuple[BilevelState, Metrics]:
    warn_of_frozen_draws(sampler, _sampling_key(state), state.step)
    check_form(state.batch_form, jax.eval_shape(_sampled, sampler, state), state.step.shape, sampler)
    return _steps(solver, lambda state, _: _sampled(sampler, state), chunk, state, size)


def _sampled(sampler: jax.tree_util.Partial, state: BilevelState) -> Pair:
    return read_pair(sampler(_sampling_key(state), state.step))


def _sampling_key(state: BilevelState) -> Key:
    """Kept apart from the keys that a step splits off."""
    fold_in = jax.random.fold_in
    for _ in state.step.shape:  # the seeds of a vmapped solver
        fold_in = jax.vmap(fold_in, in_axes=(0, None))
    return fold_in(state.key, 0xDA7A)


def _stacked_chunk(
    solver: BilevelSolver, chunk: int, state: BilevelState, size: jax.Array, stacked: Pair
) -> tuple[BilevelState, Metrics]:
    return _steps(solver, lambda _, i: jax.tree.map(lambda x: x[i], stacked), chunk, state, size)


def _steps(
    solver: BilevelSolver,
    batches: Callable[[BilevelState, jax.Array], Pair],
    chunk: int,
    state: BilevelState,
    size: jax.Array,
) -> tuple[BilevelState, Metrics]:
    """The first `size` of at most `chunk` steps, and their metrics in arrays of length `chunk` or a little more.

    In rows of steps: what a loop on a CPU carries costs it time in every turn, and so long arrays of metrics would.
    """
    row = min(chunk, max(100, math.isqrt(chunk)))

    def step(state: BilevelState, i: jax.Array) -> tuple[BilevelState, Metrics]:
        return solver.step(state, *batches(state, i))

    def zeros(*shape: int) -> Metrics:
        return jax.tree.map(lambda s: jnp.zeros((*shape, *s.shape), s.dtype), shapes)

    def put(trace: Metrics, i: jax.Array, metrics: Metrics) -> Metrics:
        return jax.tree.map(lambda xs, x: xs.at[i].set(x), trace, metrics)

    def take_row(j: jax.Array, carry: tuple[BilevelState, Metrics]) -> tuple[BilevelState, Metrics]:
        def take_step(i: jax.Array, carry: tuple[BilevelState, Metrics]) -> tuple[BilevelState, Metrics]:
            state, metrics = step(carry[0], j * row + i)
            return state, put(carry[1], i, metrics)

        state, metrics = jax.lax.fori_loop(0, jnp.minimum(row, size - j * row), take_step, (carry[0], zeros(row)))
        return state, put(carry[1], j, metrics)

    shapes = jax.eval_shape(lambda s: step(s, jnp.zeros((), jnp.int32))[1], state)
    num_rows = -(-chunk // row)
    state, trace = jax.lax.fori_loop(0, -(-size // row), take_row, (state, zeros(num_rows, row)))
    return state, jax.tree.map(lambda x: jnp.reshape(x, (num_rows * row, *x.shape[2:])), trace)


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
