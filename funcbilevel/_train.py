"""The host's side of training: jitted chunks of steps, with progress, logging and checkpoints in between."""

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
from funcbilevel._bilevel import BilevelSolver, BilevelState, check_state
from funcbilevel._check import warn_of_run
from funcbilevel._checkpoint import Checkpoint, CheckpointError, Position, Store
from funcbilevel._data import (
    DataFunction,
    Feed,
    Pair,
    check_alike_on_all,
    check_form,
    check_not_itself_a_pair,
    faulty_leaf,
    is_itself_a_pair,
    on_the_devices_of,
    read_data,
    read_pair,
    warn_of_frozen_draws,
)
from funcbilevel._history import History, HostMetrics, broken_at_the_end, fault_message, first_fault
from funcbilevel._hosts import Processes, devices_of, own_shape
from funcbilevel._identity import identity
from funcbilevel._recovery import Rollback, check_can_scale, refreshed, with_smaller_steps
from funcbilevel._state import on_host, spans_processes
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
    on_nonfinite: Literal["raise", "continue"] | Rollback = "raise",
    checkpoint: Checkpoint | None = None,
    prefetch: bool = False,
) -> tuple[BilevelState, HostMetrics]:
    """Runs outer steps in jitted chunks and comes back to the host between them.

    All chunks share one compiled program, the last and shorter one included; its buffers are donated.

    On a mesh of several processes (see `data_parallel`) all of them make the same call, each with its own shard of an
    iterator's batches. The run ends on all where the callback of one ends it, or where one has no data any more.

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
        on_nonfinite: "raise" a `NonFiniteError` that names the step and the level; "continue" with a warning that
            does; or go back, by a `Rollback`. outer_params keep their last finite value in any case. A run that goes on
            and is still broken at the end of a chunk gets fresh moments of its optimizers and a fresh warm start of its
            estimator, which may have caused it.
        checkpoint: where to save the run, so that the same call, made again, goes on from there: see `Checkpoint`. Its
            result is then, bit for bit, that of a run in one piece, all metrics included. `state` and `data` must be
            those of the run's beginning. An iterator with `get_state` and `set_state` is set to where it was; another
            one is read on to that place. The callback sees only the steps that are made now; where it ends the run,
            the run has ended for later calls too. Ctrl-C and SIGTERM finish the running chunk, save, and end the
            process as usual, by `KeyboardInterrupt` and `SystemExit(143)`; a second one does not wait.
        prefetch: whether to pull and stack the batches of the next chunk while the devices are busy with this one. The
            iterator must not depend on what the callback does, and is up to a chunk ahead where a run ends early.

    Returns:
        The last state, and all metrics with the outer steps as leading axis.

    Raises:
        NonFiniteError: NaN or inf in a level, with `on_nonfinite="raise"`, or once more than a `Rollback` allows. It
            carries state and metrics.
        CheckpointError: a checkpoint cannot be written, is damaged, or is of another run. Earlier ones stay.
        ProcessError: of a run over several processes (`jax.distributed`), another one has failed or died.
        ValueError, TypeError: an argument is out of range or of the wrong kind.

        Whatever ends the run, from data, from the callback or by Ctrl-C (which waits for the running chunk; a second
        one does not), carries `state` and `metrics` of the chunks that were done as attributes, and a note that says
        so. An error inside the compiled program, such as that of a host callback, has lost the state: it is None.

    Warns:
        UserWarning: the iterable ended early (what was done is returned); NaN, where it does not raise; a
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
    check_state("train", state)
    check_number("train", "num_outer_steps", num_outer_steps)
    check_number("train", "chunk", chunk)
    _check_policies(solver, on_nonfinite, checkpoint)
    if callback is not None:
        check_callable("train", "callback", callback, "state, metrics")
    run = _Run(solver, state, data, num_outer_steps, chunk, on_nonfinite, checkpoint, prefetch)
    del state  # the run has its own; where nobody else holds the given one, its memory is free
    try:
        with (
            _Signals(checkpoint is not None) as signals,
            _ProgressBar(num_outer_steps) if run.processes.first and _show(progress) else nullcontext() as bar,
        ):
            run.resume()
            while run.goes_on:
                metrics = run.chunk(signals)
                if metrics is not None and bar is not None:
                    bar.update(run.history.length, metrics)
                ended = metrics is not None and callback is not None and _stops(callback, run.state, metrics)
                signum = run.agree(signals, ended)
                run.save(now=signum != 0 or not run.goes_on)
                if signum:
                    run.stop(signum)
            run.close()
            if signum := run.agree(signals):  # that came while the last checkpoint was written
                run.stop(signum)
    except BaseException as error:
        _hand_over(error, run.state, run.history)
        run.give_up(error)
        raise
    all_metrics = run.history.arrays()
    if run.processes.first:
        warn_of_run("train", all_metrics)
    return run.state, all_metrics


def _check_policies(solver: BilevelSolver, on_nonfinite: Any, checkpoint: Any) -> None:
    if not (isinstance(on_nonfinite, Rollback) or on_nonfinite in ("raise", "continue")):
        raise ValueError(
            f'train: on_nonfinite must be "raise" or "continue" or fb.Rollback(...), got {on_nonfinite!r}.'
        )
    if not (checkpoint is None or isinstance(checkpoint, Checkpoint)):
        raise TypeError(f"train: checkpoint must be fb.Checkpoint(directory), got {checkpoint!r}.")
    if isinstance(on_nonfinite, Rollback):
        check_can_scale(solver, on_nonfinite)
        if checkpoint is None:
            raise ValueError(
                "train: on_nonfinite is fb.Rollback, but checkpoint is None, so that there is nothing to go back to; "
                "pass checkpoint=fb.Checkpoint(directory)."
            )


class _Run:
    """A run while it goes on: its state and metrics, its place in the data, and its checkpoints."""

    def __init__(
        self,
        solver: BilevelSolver,
        state: BilevelState,
        data: Any,
        num_outer_steps: int,
        chunk: int,
        on_nonfinite: Any,
        checkpoint: Checkpoint | None,
        prefetch: bool,
    ) -> None:
        self._solver, self._data, self._policy = solver, data, on_nonfinite
        self._given = state if isinstance(on_nonfinite, Rollback) else None
        self._num_steps, self._chunk = num_outer_steps, min(chunk, num_outer_steps)
        self._sampler, batches = read_data(data)
        if batches is not None and not state.batch_form:
            check_not_itself_a_pair(solver.step, state, data)
        put_state, put_stacked = (getattr(solver.init, name, None) for name in ("put_state", "put_stacked"))
        # On a mesh, if the solver has one.
        self.state = jax.tree.map(jnp.copy, state if put_state is None else put_state(state))
        self.processes = Processes(devices_of(self.state))
        form, seeds = state.batch_form, (self.state.step.shape, own_shape(self.state.step))
        self._feed = None if batches is None else Feed(batches, data, form, seeds, self._chunk, put_stacked)
        self.history = History(num_outer_steps)
        self._place = self._start = Position() if self._feed is None else self._feed.position()
        self._counts, self._placed = {"rollbacks": 0, "again": 0, "fault": 0, "ended": False}, False
        self._prefetch = prefetch and (
            not isinstance(on_nonfinite, Rollback) or getattr(self._feed, "can_go_back", False)
        )
        kind = "a function" if self._feed is None else "an iterator"
        self._store = None
        if checkpoint is not None:
            self._store = Store(checkpoint, identity(solver, self.state, kind), self.processes)

    # Checkpoints.

    def resume(self) -> None:
        """Goes to where an earlier call of the same run came to."""
        if self._store is None or (found := self._store.restore(self.state, self._num_steps)) is None:
            return
        self.state, metrics, position = found
        self.history.append(metrics)
        self._counts = {name: getattr(position, name) for name in self._counts}
        told = "" if self._feed is None or not self.goes_on else self._feed.go_to(position)  # which may fail on one
        self._place = position
        where = f"step {self.history.length} of {self._num_steps} in {self._store.directory}{told}"
        say = self.processes.say
        say(f"train: goes on from {where}." if self.goes_on else f"train: the run had ended, at {where}.")

    def save(self, now: bool) -> None:
        """Starts to write a checkpoint, if one is due or `now`."""
        done = self.history.length
        if self._store is not None and (now or self._store.steps_left(done) == self._store.every):
            position = self._place._replace(done=done, **self._counts)
            self._store.save(self.state, self.history.view(), position)

    def stop(self, signum: int) -> None:
        """Ends the run, and as a rule the process, as the signal would have."""
        assert self._store is not None
        self._store.wait()
        self.processes.say(
            f"train: stopped by {signal.Signals(signum).name} after {self.history.length} of {self._num_steps} outer "
            f"steps, which are saved in {self._store.directory}; the same call goes on from there."
        )
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)

    def close(self) -> None:
        """Waits until the last checkpoint is written."""
        if self._store is not None:
            self._store.close()

    def give_up(self, error: BaseException) -> None:
        """Lets the other processes know, and waits for the last checkpoint, unless those have died that it needs."""
        self.processes.tell(error)
        if self.processes.lost:
            there = "" if self._store is None else f" from the last checkpoint in {self._store.directory}"
            error.add_note(
                "train: this process cannot go on without the others, of which one may have died: see what they say. "
                f"Start all of them again, and the same call goes on{there}."
            )
        try:
            if self._store is not None:
                self._store.close(wait=not self.processes.lost)
        except CheckpointError as another:
            error.add_note(str(another))

    # Steps.

    @property
    def goes_on(self) -> bool:
        """Whether there are steps to make."""
        return not self._counts["ended"] and self.history.length < self._num_steps

    def agree(self, signals: list[int], ended: bool = False) -> int:
        """The signal to end of whichever process has one; the run ends where the callback of one says so."""
        answers = self.processes.ask(signal=signals[0] if signals else 0, ended=int(ended))
        if any(answer.ended for answer in answers):
            self._counts["ended"] = True
        return max(answer.signal for answer in answers)

    def _size(self, start: int) -> int:
        """Of the chunk from there: not beyond the next checkpoint."""
        size = min(self._chunk, self._num_steps - start)
        return size if self._store is None else min(size, self._store.steps_left(start))

    def chunk(self, signals: list[int]) -> HostMetrics | None:
        """Makes a chunk of steps; None if none remains of it."""
        start = self.history.length
        size = self._size(start)
        source: Any = self._sampler
        feed = self._feed
        stopping = bool(signals) and not self.processes.several
        if feed is not None:
            source, got = feed.take(size, start)
            answers = self.processes.ask(signal=len(signals), taken=got, form=feed.checksum)
            check_alike_on_all(self.processes.indices, [answer.form for answer in answers])
            stopping, got = any(answer.signal for answer in answers), min(answer.taken for answer in answers)
            if got < size:
                self._warn(_ended(start + got, self._num_steps, self._data), stacklevel=4)
                self._num_steps, size = start + got, got
            if size and not self._placed:
                self.state, self._placed = on_the_devices_of(source, self.state), True
        if not size or stopping:
            return None
        place = Position() if feed is None else feed.position()
        function = _sampled_chunk if feed is None else _stacked_chunk
        solver = self._solver
        if isinstance(self._policy, Rollback):
            solver = with_smaller_steps(solver, self._policy, self._counts["rollbacks"])
        with nullcontext() if self._store is not None else _interrupts_wait():
            new_state, values = _compiled(function, solver, self._chunk)(self.state, size, source)
            if feed is not None and self._prefetch and (following := self._size(start + size)):
                feed.fetch(following, start + size)
            values = {name: on_host(x) if spans_processes(x) else x for name, x in values.items()}
            metrics = {name: np.array(x[:size]) for name, x in jax.device_get(values).items()}
            self.history.append(metrics)
            self.state, self._place = new_state, place
        fault = first_fault(self.history.view(), start)
        if fault is None:
            return metrics
        message = _fault_message(self.history, fault, self.state, source, start)
        return self._after_fault(fault[0], message, metrics, source, size)

    def _after_fault(self, step: int, message: str, metrics: HostMetrics, source: Any, size: int) -> HostMetrics | None:
        """Raises, goes on or goes back, as the policy is."""
        rollbacks = self._counts["rollbacks"]
        if isinstance(self._policy, Rollback) and rollbacks < self._policy.max_times:
            self._go_back(step, message)
            return None
        if self._policy != "continue":
            after = f" It had gone back {rollbacks} times." if isinstance(self._policy, Rollback) else ""
            raise NonFiniteError(message + after, self.state, self.history.arrays())
        broken = broken_at_the_end(metrics)
        if np.any(broken):  # not by a batch that has passed
            pair = _sampled(source, self.state) if self._feed is None else jax.tree.map(lambda x: x[size - 1], source)
            fresh = refreshed(self._solver, self.state, pair[0], broken)
            if fresh is not None:
                self.state = fresh
                message += " The run goes on from fresh moments of the optimizers and a fresh warm start."
        self._warn(message, stacklevel=5)
        return metrics

    def _go_back(self, step: int, message: str) -> None:
        """To the last checkpoint, and on with smaller steps; to the one before it where that was not far enough."""
        assert self._store is not None
        counts = self._counts
        counts["again"] = 1 if step > counts["fault"] + self._store.every else counts["again"] + 1
        counts["fault"] = step
        counts["rollbacks"] += 1
        self._store.drop_last(counts["again"] - 1)
        found = self._store.restore(self.state, self._num_steps)
        if found is None:
            self.state, self._placed = jax.tree.map(jnp.copy, self._given), False
            position = self._start
        else:
            self.state, _, position = found
        self.history.cut(position.done)
        if self._feed is not None:
            self._feed.go_back(position)
            position = position._replace(pulled=self._feed.pulled)
        self._place = position
        self._warn(
            f"{message} The run goes back to its step {position.done}, and on from there with steps of "
            f"{self._policy.factor ** counts['rollbacks']:.3g} of their size (rollback {counts['rollbacks']} of "
            f"{self._policy.max_times}).",
            stacklevel=6,
        )

    def _warn(self, message: str, stacklevel: int) -> None:
        if self.processes.first:
            warnings.warn(message, stacklevel=stacklevel)


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


class _Signals(list[int]):
    """The signals to end that have come, Ctrl-C and SIGTERM: once each, for a second one does what it did before.

    Only in the main thread, where Python lets signals be handled, and not those that are ignored.
    """

    def __init__(self, active: bool) -> None:
        super().__init__()
        self._active = active and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def _receive(self, signum: int, _: Any) -> None:
        self.append(signum)
        signal.signal(signum, self._before[signum])

    def __enter__(self) -> "_Signals":
        for signum in (signal.SIGINT, signal.SIGTERM) if self._active else ():
            handler = signal.getsignal(signum)
            if handler not in (signal.SIG_IGN, None):
                self._before[signum] = handler
                signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


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
    check_form(state.batch_form, jax.eval_shape(_sampled, sampler, state), (state.step.shape,), sampler)
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
