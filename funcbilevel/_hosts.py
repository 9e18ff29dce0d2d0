"""Several processes that make one run: what lies on devices of all of them, and what they have to agree on."""

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from funcbilevel._state import is_key, with_kind_of
from funcbilevel._typing import PyTree

_T = TypeVar("_T")
_TOLD = 1000  # characters of an error that the other processes get to see


class ProcessError(Exception):
    """Another process of a run over several has failed: the message repeats its error, if it could still tell it."""


class Status(NamedTuple):
    """What a process has to say to the others of its run, all of them small integers.

    Attributes:
        failed: whether it has raised an exception.
        size: bytes that it sends after this.
        signal: the signal to end that it has received; 0: none.
        ended: whether its callback ends the run.
        taken: the steps for which it has data.
        form: a checksum of the shapes of its data.
    """

    failed: int = 0
    size: int = 0
    signal: int = 0
    ended: int = 0
    taken: int = 0
    form: int = 0


class Processes:
    """Those of a run: one alone, or all on whose devices its state lies. They ask one another in the same order.

    Attributes:
        indices: as `jax.process_index` numbers them.
        several: whether there are others. If not, nothing is sent.
        first: whether this one prints, logs and commits checkpoints.
        lost: whether this one cannot reach the others any more.
    """

    def __init__(self, devices: Iterable[Any]) -> None:
        by_process = {d.process_index: d for d in sorted(devices, key=lambda d: d.id, reverse=True)}
        self.indices = sorted(by_process) or [jax.process_index()]
        self.several = len(self.indices) > 1
        self.first = jax.process_index() == self.indices[0]
        self._mesh = Mesh(np.array([by_process[i] for i in self.indices]), ("process",)) if self.several else None
        self.lost = False
        self._over = False  # once one has failed, or while this one waits for an answer

    def ask(self, **status: int) -> list[Status]:
        """The status of each process, in order; raises where one has failed."""
        mine = Status(**status)
        if not self.several:
            return [mine]
        all_of_them = self._exchange(mine)
        if any(one.failed for one in all_of_them):
            self._raise_of_others(all_of_them, b"")
        return all_of_them

    def gather(self, value: Any) -> list[Any]:
        """What each process has as `value`, which is plain JSON."""
        if not self.several:
            return [value]
        text = json.dumps(value).encode()
        statuses = self.ask(size=len(text))
        return [json.loads(part) for part in self._exchange_bytes(text, statuses)]

    def of_first(self, value: Any) -> Any:
        """What the first process has."""
        return self.gather(value if self.first else None)[0]

    def together(self, work: Callable[[], _T]) -> _T:
        """Does what may fail on one process alone; all of them fail then."""
        try:
            result = work()
        except BaseException as error:
            self.tell(error)
            raise
        self.ask()
        return result

    def tell(self, error: BaseException) -> None:
        """Lets the others, who are about to ask, know of an error, unless it comes from them or from the devices."""
        if not self.several or self._over:
            return
        self._over = self.lost = isinstance(error, jax.errors.JaxRuntimeError)
        if self.lost:
            return
        text = f"{type(error).__name__}: {error}"[:_TOLD].encode()
        with suppress(ProcessError):  # it has lost them, as `lost` says
            self._exchange_bytes(text, self._exchange(Status(failed=1, size=len(text))))
        self._over = True

    def say(self, text: str) -> None:
        """One line on stderr, from the first process."""
        if self.first:
            print(text, file=sys.stderr, flush=True)

    def _raise_of_others(self, statuses: list[Status], text: bytes) -> NoReturn:
        texts = self._exchange_bytes(text, statuses)
        self._over = True
        failed = [f"{i} ({t.decode(errors='replace')})" for i, t, s in zip(self.indices, texts, statuses) if s.failed]
        raise ProcessError(f"train: the run ends on all processes, since it failed on process {', '.join(failed)}.")

    def _exchange(self, mine: Status) -> list[Status]:
        rows = self._all(np.array(mine, np.int32))
        return [Status(*map(int, row)) for row in rows]

    def _exchange_bytes(self, text: bytes, statuses: list[Status]) -> list[bytes]:
        width = 256  # then powers of two, so that few programs serve all sizes
        while width < max(s.size for s in statuses):
            width *= 2
        rows = self._all(np.frombuffer(text.ljust(width), np.uint8))
        return [row.tobytes()[: s.size] for row, s in zip(rows, statuses)]

    def _all(self, mine: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """[processes, ...], the same on each of them."""
        assert self._mesh is not None
        self._over, over = True, self._over  # who is interrupted here cannot be understood any more
        spread = NamedSharding(self._mesh, PartitionSpec("process"))
        try:
            rows = np.asarray(_copies(self._mesh)(jax.make_array_from_process_local_data(spread, mine[None])))
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # gloo's come as either
            self.lost = True
            raise ProcessError(
                f"train: another process of the run has died, or cannot be reached any more ({error})."
            ) from error
        self._over = over
        return rows


@lru_cache(maxsize=16)
def _copies(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _same(x: jax.Array) -> jax.Array:
    return x


# Arrays on devices of several processes.


def devices_of(tree: PyTree) -> set[Any]:
    """All that hold a part of one of the tree's arrays."""
    return {d for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) for d in x.sharding.device_set}


def own_shape(x: jax.Array) -> tuple[int, ...]:
    """Of the part of an array that is on this process's devices."""
    parts = x.sharding.addressable_devices_indices_map(x.shape).values()
    ranges = ({part[i].indices(n)[:2] for part in parts if part is not None} for i, n in enumerate(x.shape))
    return tuple(sum(end - begin for begin, end in of_axis) for of_axis in ranges)


def put_shared(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array that all processes hold as a whole, on a mesh of theirs: each sends to its own devices."""
    if is_key(x):
        return with_kind_of(x, put_shared(jax.random.key_data(x), sharding))
    array = np.asarray(x)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_own(x: Any, sharding: NamedSharding) -> jax.Array:
    """The array of which each process holds what belongs on its own devices."""
    if is_key(x):
        return with_kind_of(x, put_own(jax.random.key_data(x), sharding))
    return jax.make_array_from_process_local_data(sharding, x if isinstance(x, jax.Array) else np.asarray(x))
