"""What each process of `test_hosts.py` runs: `python hosts.py PROCESS NUMBER PORT TASK DIRECTORY`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

PROCESS, NUMBER, PORT = map(int, sys.argv[1:4]) if __name__ == "__main__" else (0, 1, 0)
if NUMBER > 1:
    jax.distributed.initialize(f"127.0.0.1:{PORT}", NUMBER, PROCESS, heartbeat_timeout_seconds=10)

from test_sharding import ON_MESH, ROWS, batch, make, start  # noqa: E402 (which asks for devices)

import funcbilevel as fb  # noqa: E402

DEVICES = 4


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh(
        (DEVICES,), ("data",), devices=jax.devices()[:DEVICES], axis_types=(jax.sharding.AxisType.Auto,)
    )


def own(whole: Any) -> Any:
    """This process's shard of a batch."""
    return jax.tree.map(lambda x: np.split(x, NUMBER)[PROCESS], whole)


def keep(directory: Path, name: str, state: fb.BilevelState, metrics: Any) -> None:
    arrays = fb.state_to_arrays((state, metrics))
    if PROCESS == 0:
        np.savez(directory / f"{name}.npz", **arrays)


def rows(directory: Path) -> None:
    """Two steps of every row of `test_sharding.py`."""
    for kind, wrap in ON_MESH.items():
        for name, (estimator, model) in ROWS.items():
            solver = wrap(make(estimator, None, model), mesh())
            state = solver.init(jax.random.key(2), {"slope": 0.5}, own(batch()))
            for i in range(2):
                state, metrics = solver.step(state, own(batch(i)), own(batch(i + 5)))
            keep(directory, f"{kind} {name}", state, metrics)


TASKS: dict[str, Callable[[Path], None]] = {"rows": rows}

if __name__ == "__main__":
    TASKS[sys.argv[4]](Path(sys.argv[5]))
