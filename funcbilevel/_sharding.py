"""Solvers over a mesh of devices: batches divided along their samples; states copied, or divided as well."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from funcbilevel._bilevel import BilevelSolver
from funcbilevel._draws import FiniteSum, Minibatches, Sampler, run_steps
from funcbilevel._hosts import Processes, put_own, put_shared
from funcbilevel._state import is_key, spans_processes
from funcbilevel._tree import at_path
from funcbilevel._typing import Batch, PyTree


def data_parallel(solver: BilevelSolver, mesh: Mesh, *, axis: str = "data", seeds: str | None = None) -> BilevelSolver:
    r"""The same solver with inner and outer batches divided over a mesh, each along its samples; the state is copied.

    Objectives are means over the whole batch, as they are on one device, and so are all results, up to the order of
    sums. Each derivative is a mean over devices: the compiler puts all-reduces where it is needed.

    Arguments:
        solver: any; with `seeds`, one whose step is under `jax.vmap` and whose states have the seeds in front.
        mesh: from `jax.make_mesh`. Explicit axes are taken for Auto ones: the compiler places what is in between.
        axis: the mesh's axis over which samples are divided. Their number must be a multiple of its size, in each of
            the two batches; a `Sampler` is divided draw by draw, a `FiniteSum` along the samples of its blocks.
        seeds: the mesh's axis over which seeds (or hyper-parameters) are divided, if the solver has them: the leading
            axis of every leaf of the state and of the batches. None: it has none.

    The mesh may span several processes (`jax.distributed`). Batches given to `init`, `step`, `run` and, by an iterator,
    to `train` are then this process's shard: the samples that its own devices hold, or arrays that are on the mesh
    already. The key and parameters given to `init` must be the same on all.

    Returns:
        A `BilevelSolver`. `init` gives a state on the mesh; `step` is jitted, takes arguments from wherever they are,
        and gives a state that is placed as the one before: one compiled program for ever. `train` takes it as any
        other, and puts the batches of an iterator where they belong.

    Raises:
        ValueError, TypeError: the mesh lacks the axis; samples cannot be divided evenly; `jax.set_mesh` has set a mesh
            with explicit axes.

    Example:
        >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> problem = fb.ParametricProblem(
        ...     lambda w, u, x: jnp.mean((u - w * x) ** 2), lambda w, u, x: jnp.mean((u - 2 * x) ** 2)
        ... )
        >>> sgd = optax.sgd(0.1)
        >>> solver = fb.bilevel(problem, None, fb.aid(fb.cg(1)), inner_optimizer=sgd, outer_optimizer=sgd)
        >>> solver = fb.data_parallel(solver, mesh)
        >>> x = jnp.ones(8 * jax.device_count())
        >>> state = solver.init(jax.random.key(0), 0.0, x, 0.0)
        >>> state, metrics = solver.step(state, x, x)
        >>> state.outer_params.sharding.is_fully_replicated
        True
    """
    name = "data_parallel"
    mesh = _with_auto_axes(name, mesh, axis, seeds)
    front = () if seeds is None else (seeds,)
    return _on_mesh(name, solver, mesh, axis, front, lambda x: P(*front))


def fully_sharded(solver: BilevelSolver, mesh: Mesh, *, axis: str = "data") -> BilevelSolver:
    r"""The same solver with batches and the whole state divided over a mesh, for what does not fit on one device.

    Each leaf of the state (parameters of both levels, both optimizers' moments, the estimator's warm start) is divided
    along its longest axis that the number of devices divides; leaves without one are copied. The compiler gathers
    parameters where they are used.

    Arguments:
        solver: any.
        mesh: from `jax.make_mesh`. Explicit axes are taken for Auto ones: the compiler places what is in between.
        axis: the mesh's axis over which samples and the state are divided.

    Returns:
        A `BilevelSolver`, as of `data_parallel`.

    Raises:
        ValueError, TypeError: as `data_parallel`.

    Example:
        >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> problem = fb.ParametricProblem(
        ...     lambda w, u, x: jnp.mean((x @ (u - w)) ** 2), lambda w, u, x: jnp.mean((x @ u - 1) ** 2)
        ... )
        >>> adam = optax.adam(0.1)
        >>> solver = fb.bilevel(problem, None, fb.aid(fb.cg(1)), inner_optimizer=adam, outer_optimizer=adam)
        >>> solver = fb.fully_sharded(solver, mesh)
        >>> D = jax.device_count()
        >>> x = jnp.ones((D, 4 * D))
        >>> state = solver.init(jax.random.key(0), jnp.zeros(4 * D), x, jnp.zeros(4 * D))
        >>> state, metrics = solver.step(state, x, x)
        >>> state.inner_opt_state[0].mu.addressable_shards[0].data.shape
        (4,)
    """
    name = "fully_sharded"
    mesh = _with_auto_axes(name, mesh, axis, None)
    size = mesh.shape[axis]

    def spec(x: Any) -> P:
        divisible = [(n, -i) for i, n in enumerate(np.shape(x)) if n and n % size == 0]
        if not divisible or is_key(x):
            return P()
        longest = -max(divisible)[1]
        return P(*[None] * longest, axis)

    return _on_mesh(name, solver, mesh, axis, (), spec)


def _with_auto_axes(name: str, mesh: Mesh, *axes: str | None) -> Mesh:
    if not isinstance(mesh, Mesh):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"{name}: mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}; make one by jax.make_mesh."
        )
    if jax.process_index() not in {device.process_index for device in mesh.devices.flat}:
        raise ValueError(
            f"{name}: mesh must have a device of this process, number {jax.process_index()}, got none; make it of "
            "jax.devices(), which are those of all processes."
        )
    for axis in axes:
        if axis is not None and axis not in mesh.shape:
            raise ValueError(f"{name}: mesh must have the axis {axis!r}, got {', '.join(map(repr, mesh.shape))}.")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _check_context(name: str) -> None:
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        raise ValueError(
            f"{name}: the solver has a mesh with axes of type Auto, but jax.set_mesh has set one with explicit axes; "
            "call it outside of that."
        )


def _on_mesh(
    name: str, solver: BilevelSolver, mesh: Mesh, axis: str, front: tuple[str, ...], spec: Callable[[Any], P]
) -> BilevelSolver:
    processes = Processes(mesh.devices.flat)

    def is_local(x: Any) -> bool:
        """Whether an array has to go to a mesh of which other processes have a part."""
        return processes.several and not isinstance(x, Tracer) and not spans_processes(x)

    def put(x: Any, where: P, from_processes: Callable[[Any, NamedSharding], jax.Array] = put_shared) -> Any:
        sharding = NamedSharding(mesh, where)
        if isinstance(x, Tracer):
            return jax.lax.with_sharding_constraint(x, sharding)
        return from_processes(x, sharding) if is_local(x) else jax.device_put(x, sharding)

    def put_state(state: PyTree) -> PyTree:
        return jax.tree.map(lambda x: put(x, spec(x)), state)

    def put_batch(level: str, batch: Batch, before: tuple[str | None, ...] = front) -> Batch:
        """Leaves [*before, n, ...], divided along n; what has no such axis is copied."""
        if isinstance(batch, Minibatches):
            return Minibatches(put_batch(level, batch.batches, (*before, None)))
        if isinstance(batch, Sampler):
            return Sampler(jax.tree_util.Partial(draw_and_put, jax.tree.map(lambda x: put(x, P()), batch.sample)))
        if isinstance(batch, FiniteSum):
            return FiniteSum(
                put_batch(level, batch.data, (*before, None)), put(batch.key, P()), batch.replace, batch.first
            )

        def put_leaf(path: Any, x: Any) -> Any:
            if np.ndim(x) <= len(before):
                return put(x, P(*before[: np.ndim(x)]), put_own)
            devices = (mesh.local_mesh if is_local(x) else mesh).shape[axis]
            if np.shape(x)[len(before)] % devices:
                raise ValueError(
                    f"{name}: {level}_batch{at_path(path)} has {np.shape(x)[len(before)]} samples, which the "
                    f"{devices} devices of mesh axis {axis!r}{' on this process' if is_local(x) else ''} cannot share "
                    "evenly; drop or pad some."
                )
            return put(x, P(*before, axis), put_own)

        return jax.tree_util.tree_map_with_path(put_leaf, batch)

    def draw_and_put(sample: Any, key: Any) -> Any:
        return put_batch("inner", sample(key), ())

    def step_on_mesh(state: Any, inner_batch: Batch, outer_batch: Batch) -> Any:
        _check_context(name)
        state = put_state(state)
        after, metrics = solver.step(state, put_batch("inner", inner_batch), put_batch("outer", outer_batch))
        return put_state(after), jax.tree.map(lambda x: put(x, P(*front)), metrics)

    def init_on_mesh(*args: Any) -> Any:
        """In a program, which alone can compute with arrays that no process has as a whole."""
        constrain = jax.lax.with_sharding_constraint
        return jax.tree.map(lambda x: constrain(x, NamedSharding(mesh, spec(x))), solver.init(*args))

    jitted, jitted_init = jax.jit(step_on_mesh), jax.jit(init_on_mesh)

    def init(
        key: Any, outer_params: Any, inner_batch: Batch, inner_params: Any = None, outer_batch: Batch = None
    ) -> Any:
        _check_context(name)
        if not processes.several:
            return put_state(solver.init(key, outer_params, inner_batch, inner_params, outer_batch))
        _check_same(name, processes, key=key, outer_params=outer_params, inner_params=inner_params)
        key, outer_params, inner_params = jax.tree.map(lambda x: put(x, P()), (key, outer_params, inner_params))
        return jitted_init(
            key, outer_params, put_batch("inner", inner_batch), inner_params, put_batch("outer", outer_batch)
        )

    def step(state: Any, inner_batch: Batch, outer_batch: Batch) -> Any:
        return jitted(put_state(state), put_batch("inner", inner_batch), put_batch("outer", outer_batch))

    def run(state: Any, inner_batches: Batch, outer_batches: Batch, num_steps: int | None = None) -> Any:
        inner_batches, outer_batches = put_steps("inner", inner_batches), put_steps("outer", outer_batches)
        return run_steps(step_on_mesh, put_state(state), inner_batches, outer_batches, num_steps)

    def put_steps(level: str, batches: Batch) -> Batch:
        """Batches with the steps in front; a source is one for all."""
        return put_batch(level, batches, front if isinstance(batches, (Sampler, FiniteSum)) else (None, *front))

    def put_stacked(pair: tuple[Batch, Batch]) -> tuple[Batch, Batch]:
        """Batches of several steps, with the steps in front."""
        inner, outer = (put_batch(level, batch, (None, *front)) for level, batch in zip(("inner", "outer"), pair))
        return inner, outer

    made: Any = BilevelSolver(init, step, run)
    made.init.description = f"{name}({solver!r})"
    made.init.put_state, made.init.put_stacked, made.init.unplaced = put_state, put_stacked, solver  # for `train`
    return made


def _check_same(name: str, processes: Processes, **values: PyTree) -> None:
    """That all processes start from the same: what is copied to each must not differ."""
    sums = processes.gather({argument: _checksum(value) for argument, value in values.items()})
    for argument in values:
        others = [i for i, theirs in zip(processes.indices, sums) if theirs[argument] != sums[0][argument]]
        if others:
            raise ValueError(
                f"{name}: init needs the same {argument} on all processes, got another on process "
                f"{', '.join(map(str, others))} than on process {processes.indices[0]}; make it of the same seed."
            )


def _checksum(tree: PyTree) -> int:
    leaves = [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(tree) if not spans_processes(x)]
    return zlib.crc32(b"".join(np.asarray(x).tobytes() for x in leaves))
