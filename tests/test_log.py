"""Logs: each step once and whole, whatever the run goes through, and readable while it goes on."""

import itertools
import json
import os
import struct
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import Killed, killed_at
from test_train_recovery import DATA, LEAST, TARGET, make, start
from test_train_recovery import train as with_rollbacks

import funcbilevel as fb

CALM = make(problem=LEAST)


def plain(key: Any, step: Any) -> Any:
    return (TARGET, TARGET)


def train(callback: Any, num_outer_steps: int = 25, **kwargs: Any) -> Any:
    kwargs = {"solver": CALM, "state": start(CALM), "data": plain, "chunk": 10, "progress": False} | kwargs
    return fb.train(num_outer_steps=num_outer_steps, callback=callback, **kwargs)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# JSON lines.


def test_each_step_is_a_line_with_all_metrics(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    _, metrics = train(fb.log_jsonl(path))
    rows = read(path)
    assert [row["step"] for row in rows] == list(range(25))
    for name, values in metrics.items():
        logged = [row[name] for row in rows]
        np.testing.assert_array_equal(np.array(logged, values.dtype), values)
        assert {type(x) for x in logged} == {bool if values.dtype == np.bool_ else float}
    assert set(rows[0]) == {"step", *metrics}


def test_steps_can_be_left_out(tmp_path: Path) -> None:
    train(fb.log_jsonl(tmp_path / "a", every=7))
    assert [row["step"] for row in read(tmp_path / "a")] == [0, 7, 14, 21]


def test_each_chunk_is_there_at_its_end(tmp_path: Path) -> None:
    path, seen = tmp_path / "a", []
    log = fb.log_jsonl(path)

    def callback(state: Any, metrics: Any) -> None:
        log(state, metrics)
        seen.append(len(read(path)))

    train(callback)
    assert seen == [10, 20, 25]


def test_seeds_are_lists(tmp_path: Path) -> None:
    many = CALM._replace(step=jax.vmap(CALM.step, in_axes=(0, None, None)))
    states = jax.tree.map(lambda x: jnp.stack([x, x]), start(CALM))
    _, metrics = train(fb.log_jsonl(tmp_path / "a"), solver=many, state=states)
    rows = read(tmp_path / "a")
    np.testing.assert_array_equal(
        np.array([row["outer_objective"] for row in rows], np.float32), metrics["outer_objective"]
    )


def test_what_is_not_finite_is_a_string(tmp_path: Path) -> None:
    """As JSON has no number for it; `float` reads it."""

    def step(*args: Any) -> Any:
        state, metrics = CALM.step(*args)
        values = {"nan": jnp.nan, "up": jnp.inf, "down": -jnp.inf, "half": jnp.bfloat16(1.5), "count": state.step}
        return state, metrics | {name: jnp.asarray(x) for name, x in values.items()}

    train(fb.log_jsonl(tmp_path / "a"), solver=CALM._replace(step=step))

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    rows = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "a").read_text().splitlines()]
    assert [rows[0][name] for name in ("nan", "up", "down", "half", "count")] == [
        "NaN",
        "Infinity",
        "-Infinity",
        1.5,
        1,
    ]
    assert float(rows[0]["down"]) == -np.inf


def test_a_resumed_run_goes_on_in_the_file(tmp_path: Path) -> None:
    """With the steps that were logged, but lost by the checkpoint, and a line that was cut off."""
    path, checkpoint = tmp_path / "a", fb.Checkpoint(tmp_path / "checkpoints", every=10)
    log = fb.log_jsonl(path)

    def callback(state: Any, metrics: Any) -> None:
        log(state, metrics)
        killed_at(20)(state, metrics)

    with pytest.raises(Killed):
        train(callback, checkpoint=checkpoint)
    assert len(read(path)) == 20
    with open(path, "a") as file:
        file.write('{"step": 20, "outer_ob')
    train(fb.log_jsonl(path), checkpoint=checkpoint)
    train(fb.log_jsonl(tmp_path / "whole"))
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_rollback_is_in_the_log(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        _, metrics = with_rollbacks(tmp_path / "c", data=DATA["sampler"](), callback=fb.log_jsonl(tmp_path / "a"))
    rows = read(tmp_path / "a")
    assert [row["step"] for row in rows] == list(range(60))
    np.testing.assert_array_equal([row["step_scale"] for row in rows], metrics["step_scale"])
    assert rows[-1]["step_scale"] < 1


def test_a_second_run_goes_on_in_the_file(tmp_path: Path) -> None:
    half, _ = train(fb.log_jsonl(tmp_path / "a"))
    train(fb.log_jsonl(tmp_path / "a"), state=half)
    assert [row["step"] for row in read(tmp_path / "a")] == list(range(50))


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("dear diary\n")
    with pytest.raises(ValueError, match=r"log_jsonl: .*a has a line that is not of such a log: 'dear diary"):
        train(fb.log_jsonl(tmp_path / "a"))
    assert (tmp_path / "a").read_text() == "dear diary\n"


READER = """
    import json, sys, time
    seen, end = 0, time.time() + 60
    while seen < 400 and time.time() < end:
        try:
            lines = open(sys.argv[1]).read()
            lines = lines[: lines.rfind("\\n") + 1]  # the kernel makes a write visible page by page
        except FileNotFoundError:
            continue
        steps = [json.loads(line)["step"] for line in lines.splitlines()]
        assert steps == list(range(len(steps))) and len(steps) >= seen
        seen = len(steps)
    print(seen)
"""


def test_it_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(READER), str(tmp_path / "a")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as reader:
        train(fb.log_jsonl(tmp_path / "a"), 400, chunk=2)
        out, err = reader.communicate()
    assert out.strip() == "400", err


@pytest.mark.parametrize("log", [fb.log_jsonl, fb.log_tensorboard])
def test_arguments(log: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with pytest.raises(ValueError, match=f"{log.__name__}: every must be at least 1, got 0"):
        log(tmp_path / "a", every=0)


# TensorBoard.


def events(directory: Path) -> list[Any]:
    """Read as the format says: length, its checksum, an event, its checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found: list[Any] = []
    for path in sorted(directory.glob("*tfevents*"), key=os.path.getmtime):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(directory):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_gets_each_metric(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    log, seen = fb.log_tensorboard(tmp_path / "a", every=3), []

    def callback(state: Any, metrics: Any) -> None:
        log(state, metrics)
        seen.append(len(scalars(tmp_path / "a")["outer_objective"]))

    _, metrics = train(callback)
    found = scalars(tmp_path / "a")
    assert seen == [4, 7, 9]
    assert set(found) == set(metrics)
    for name, values in metrics.items():
        assert [step for step, _ in found[name]] == list(range(0, 25, 3))
        np.testing.assert_allclose([x for _, x in found[name]], values[::3].astype(np.float32), rtol=1e-6)


def test_tensorboard_gets_each_seed_and_is_told_to_forget(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    many = CALM._replace(step=jax.vmap(CALM.step, in_axes=(0, None, None)))
    states = jax.tree.map(lambda x: jnp.stack([x, x]), start(CALM))
    for steps in (20, 10):
        train(fb.log_tensorboard(tmp_path), steps, solver=many, state=states)
    assert {"outer_objective/0", "outer_objective/1"} <= set(scalars(tmp_path))
    sessions = [(e.step, e.session_log.status) for e in events(tmp_path) if e.HasField("session_log")]
    assert sessions == [(0, 1), (0, 1)]


def test_without_tensorboardx_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    with pytest.raises(
        ImportError, match="log_tensorboard: needs tensorboardX; install it with pip install tensorboardX"
    ):
        fb.log_tensorboard("x")


def test_iterators_are_logged_alike(tmp_path: Path) -> None:
    train(fb.log_jsonl(tmp_path / "a"), data=itertools.repeat((TARGET, TARGET)))
    train(fb.log_jsonl(tmp_path / "b"))
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert [list(row) for row in a] == [list(row) for row in b]
