"""Runs over 2 and 4 processes on loopback: what one process gives, agreement on all that ends a run, and survival."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import hosts
import jax
import numpy as np
import pytest

import funcbilevel as fb

# The processes compile each for themselves: with FUNCBILEVEL_TEST_ALL=1 seven minutes more.
AT_LENGTH = (
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("FUNCBILEVEL_TEST_ALL"), reason="takes minutes; set FUNCBILEVEL_TEST_ALL=1"),
)


def at_length(test: Any) -> Any:
    for mark in AT_LENGTH:
        test = mark(test)
    return test


class Ended(NamedTuple):
    """A process at its end; `seconds` since the first of them ended."""

    code: int
    errors: str
    seconds: float


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Launched:
    """Processes of `hosts.py`, which share four devices."""

    def __init__(self, number: int, directory: Path, tasks: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        port = free_port()
        flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
        devices = f"--xla_force_host_platform_device_count={hosts.DEVICES // number}"
        path = os.pathsep.join([str(Path(fb.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"XLA_FLAGS": " ".join([*flags, devices])}
        environment |= {"JAX_ENABLE_X64": "1", "PYTHONPATH": path}
        self._logs = [directory / f"{k}.log" for k in range(number)]
        self._running: list[subprocess.Popen[bytes]] = []
        for k, log in enumerate(self._logs):
            command = [sys.executable, hosts.__file__, *map(str, (k, number, port, directory)), tasks]
            with open(log, "wb") as errors:
                self._running.append(subprocess.Popen(command, stderr=errors, stdout=errors, env=environment))

    def wait(self, timeout: float = 300) -> list[Ended]:
        """Until all have ended; those that do not in time are killed."""
        begun = time.monotonic()
        ends: dict[int, float] = {}
        while len(ends) < len(self._running) and time.monotonic() < begun + timeout:
            ends |= {k: time.monotonic() for k, p in enumerate(self._running) if k not in ends and p.poll() is not None}
            time.sleep(0.05)
        for process in self._running:
            process.kill()
            process.wait()
        first = min(ends.values(), default=begun)
        logs = [log.read_text(encoding="utf-8", errors="replace") for log in self._logs]
        assert len(ends) == len(self._running), "\n".join(["some do not end", *logs])
        return [Ended(p.returncode, log, ends[k] - first) for k, (p, log) in enumerate(zip(self._running, logs))]

    def succeed(self) -> None:
        """Waits for all to end well."""
        ended = self.wait()
        assert [one.code for one in ended] == [0] * len(ended), "\n".join(one.errors[-5000:] for one in ended)


def alone(directory: Path, *tasks: str) -> None:
    """The same tasks in this process, on as many devices."""
    directory.mkdir(exist_ok=True)
    with jax.enable_x64(True):
        for task in tasks:
            hosts.run(task, directory)


def assert_same_results(some: Path, others: Path, pattern: str = "*", rtol: float = 1e-9) -> None:
    """States and metrics, in float64."""
    names = sorted(path.name for path in others.glob(f"{pattern}.npz"))
    assert names
    for name in names:
        a, b = np.load(some / name), np.load(others / name)
        assert set(a.files) == set(b.files)
        for key in a.files:
            assert a[key].dtype != np.float32
            np.testing.assert_allclose(a[key], b[key], rtol=rtol, atol=1e-9, err_msg=f"{name}: {key}")


def seen(case: str, directory: Path) -> list[Any]:
    return [json.loads((directory / f"{case}.{k}.json").read_text(encoding="utf-8")) for k in (0, 1)]


def assert_like(got: Any, expected: Any) -> None:
    if isinstance(expected, str):
        assert re.fullmatch(expected, got, re.DOTALL), got
    elif isinstance(expected, list):
        assert len(got) == len(expected), got
        for one, other in zip(got, expected):
            assert_like(one, other)
    else:
        assert got == expected


# Two processes; of four devices each has two.

TOLD = r"ProcessError: train: the run ends on all processes, since it failed on process {} \({}.*\)\."
SAVED = r"train: stopped by SIGTERM after 6 of 9 outer steps, which are saved in .*; the same call goes on from there\."
SHORT = {
    "callback_ends": [6, 6],
    "data_ends": [[5, [r"train: data ended after 5 of 9 steps\."]], [5, []]],
    "data_fails": [TOLD.format(1, "OSError: the disk is gone"), "OSError: the disk is gone"],
    "shapes_differ": [r"ValueError: train: batches of data must have the same .*those of process 1 differ.*"] * 2,
    "uneven": [r"ValueError: data_parallel: inner_batch\['0'\] has 31 samples, which the 2 devices .*this process.*"]
    * 2,
    "starts_differ": [r"ValueError: data_parallel: init needs the same key on all processes, .* on process 1 .*"] * 2,
    "nan_of_one": [r"NonFiniteError: .*at outer step 4 .*outer_batch\[1\] holds NaN or inf at that step.*"] * 2,
    "terminated": [
        ["SystemExit: 143", [SAVED, r"train: goes on from step 6 of 9 in [^;]*\."], True, True],
        ["SystemExit: 143", [], True, True],
    ],
    "cannot_commit": [r"CheckpointError: .*Earlier checkpoints stay: .*", TOLD.format(0, "CheckpointError: train: ")],
}
LONG = {
    "callback_fails": [TOLD.format(1, "ZeroDivisionError"), "ZeroDivisionError: division by zero"],
    "rolls_back": [[9, [1.0] * 3 + [0.5] * 6, 1], [9, [1.0] * 3 + [0.5] * 6, 0]],
    "logged": [[True, True], [False, False]],
    "cannot_write": [r"CheckpointError: .*step_6 could not be written.*", TOLD.format(0, "CheckpointError: train: ")],
    "busy": [r"CheckpointError: .*another run is writing its checkpoints.*", TOLD.format(0, "CheckpointError: ")],
    "of_its_own": [
        [4, True, "ValueError: train: checkpoint needs a state on a mesh of all 2 processes.*"],
        [6, True, "ValueError: train: checkpoint needs a state on a mesh of all 2 processes.*"],
    ],
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    two = Launched(2, directory / "two", "training:data_parallel;cases:" + ":".join(SHORT))
    alone(directory / "one", "training:data_parallel")
    two.succeed()
    return directory


@pytest.fixture(scope="module")
def long_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    Launched(2, directory, "cases:" + ":".join(LONG)).succeed()
    return directory


def test_training_on_two_processes_is_that_on_one(pair: Path) -> None:
    assert_same_results(pair / "two", pair / "one")


@pytest.mark.parametrize("case", SHORT)
def test_two_processes_agree(case: str, pair: Path) -> None:
    assert_like(seen(case, pair / "two"), SHORT[case])


@at_length
@pytest.mark.parametrize("case", LONG)
def test_two_processes_agree_at_length(case: str, long_pair: Path) -> None:
    assert_like(seen(case, long_pair), LONG[case])


# Any number of processes.


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one")
    alone(directory, "rows", "stochastic", "training", "sampling", "sources", "seeds")
    return directory


@at_length
@pytest.mark.parametrize(
    ("number", "tasks"), [(2, "rows;stochastic;training;sampling;sources;seeds"), (4, "rows:data_parallel;sampling")]
)
def test_all_estimators_and_sources_give_what_one_process_gives(
    number: int, tasks: str, one: Path, tmp_path: Path
) -> None:
    Launched(number, tmp_path, tasks).succeed()
    assert_same_results(one, tmp_path)


@at_length
def test_checkpoints_go_on_on_another_number_of_processes(tmp_path: Path) -> None:
    alone(tmp_path / "1", "checkpoints")
    alone(tmp_path / "whole", "resumed")
    Launched(4, tmp_path / "4", "checkpoints").succeed()
    assert_same_results(tmp_path / "1", tmp_path / "4")
    for begun, then in ((1, 4), (4, 1), (4, 2)):
        there = tmp_path / f"{begun} to {then}"
        shutil.copytree(tmp_path / str(begun), there)
        if then == 1:
            alone(there, "resumed")
        else:
            Launched(then, there, "resumed").succeed()
        assert_same_results(tmp_path / "whole", there, "resumed*")


@pytest.mark.slow
@pytest.mark.parametrize("which", [pytest.param(0, marks=AT_LENGTH), 1])
def test_a_killed_process_ends_the_other_with_a_message_and_the_run_goes_on(which: int, tmp_path: Path) -> None:
    ended = Launched(2, tmp_path / "two", f"killed:{which}").wait()
    other = ended[1 - which]
    assert ended[which].code == -signal.SIGKILL
    assert other.code != 0
    assert other.seconds < 60
    if which == 1:
        assert "ProcessError: train: another process of the run has died" in other.errors
        assert "the same call goes on from the last checkpoint in" in other.errors
    else:  # with it the service that all depend on; JAX ends the others at once
        assert "Terminating process because the JAX distributed service detected fatal errors" in other.errors
    Launched(2, tmp_path / "two", "killed:none").succeed()
    log = (tmp_path / "two" / "0.log").read_text(encoding="utf-8")
    assert re.search(r"goes on from step [36] of 12", log), log
    alone(tmp_path / "one", "killed:none")
    assert_same_results(tmp_path / "two", tmp_path / "one")


# The page on hosts.

PAGE = (Path(__file__).parents[1] / "docs/howto/hosts.md").read_text(encoding="utf-8")


def block(kind: str) -> str:
    """The first of its kind on the page."""
    found = re.search(rf"^```{kind}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["plain", pytest.param("slurm", marks=AT_LENGTH)])
def test_the_program_on_the_page_prints_what_the_page_states(launcher: str, tmp_path: Path) -> None:
    """Started by the page's own line, or with the variables that SLURM sets."""
    (tmp_path / "train.py").write_text(block("py"), encoding="utf-8")
    root = str(Path(fb.__file__).parents[1])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": root, "PATH": path, "XLA_FLAGS": ""}
    if launcher == "plain":
        assert "localhost:8476" in block("bash")
        line = block("bash").replace("8476", str(free_port()))
    else:
        job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
        line = "for k in 0 1; do SLURM_PROCID=$k SLURM_LOCALID=$k python train.py & done; wait"
        environment |= job
    run = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert block("text") in run.stdout, run.stderr  # among what gloo says of its connections
    assert len((tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 100
    assert (tmp_path / "run/checkpoints/step_100/commit.json").exists()
