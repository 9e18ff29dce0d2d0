"""The engine under all tasks, on a stub experiment: what is recorded is not lost, not double, and not overwritten."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import stub

from funcbilevel.tasks._experiment import grid, methods, options, report, select, store, table
from funcbilevel.tasks._experiment.blocks import blocks
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.progress import without_alarms
from funcbilevel.tasks._experiment.store import Result, Run, Store, StoreWarning

ROOT = Path(__file__).parents[1]


def process(directory, *args, **more):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"} | more.pop("env", {})
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests/stub.py"), "--output-dir", str(directory), *args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def finished(directory):
    """Key -> metrics and curves of every line, each line once."""
    where = Store(directory, "stub")
    lines = [json.loads(line) for line in where.path.read_text().splitlines()]
    curves = [json.loads(line) for line in where.beside("curves").read_text().splitlines()]
    for of in (lines, curves):
        assert len({store.key_of(line) for line in of}) == len(of)
    of_run = {store.key_of(line): line["loss"] for line in curves}
    assert of_run.keys() == {store.key_of(line) for line in lines}
    return {store.key_of(line): (line["metrics"], of_run[store.key_of(line)]) for line in lines}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MPLBACKEND", raising=False)
        stub.main(["--output-dir", str(directory)])
    assert len(finished(directory)) == 3 * 2 * 3
    return finished(directory), (directory / "table.md").read_text()


# Interruptions.


def test_killed_at_random_moments_and_started_again(tmp_path, uninterrupted):
    moments = random.Random(0)
    for _ in range(3):
        run = process(tmp_path, "--pause", "0.05")
        while not (tmp_path / ".claims").exists() and run.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.6))
        run.send_signal(signal.SIGKILL)
        run.communicate()
    run = process(tmp_path)
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    assert finished(tmp_path) == uninterrupted[0]
    assert (tmp_path / "table.md").read_text() == uninterrupted[1]


def test_two_processes_side_by_side(tmp_path, uninterrupted):
    runs = [process(tmp_path, "--pause", "0.05") for _ in range(2)]
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert finished(tmp_path) == uninterrupted[0]
    solves = [line for _, errors in outputs for line in errors.splitlines() if "outer steps" in line]
    assert len(solves) == 6  # they share the work


def test_what_another_process_has_recorded_is_not_recorded_twice(tmp_path):
    where, run = Store(tmp_path, "stub"), Run("itd", 0, {"rate": 0.5, "width": 4})
    for loss in (1.0, 2.0):
        store.add(where, [(run, Result({"loss": loss}))])
    (line,) = where.path.read_text().splitlines()
    assert json.loads(line)["metrics"]["loss"] == 1.0


def test_interrupted_by_ctrl_c(tmp_path):
    run = process(tmp_path, "--pause", "0.3")
    while not (tmp_path / "runs.jsonl").exists():
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    output, errors = run.communicate(timeout=10)
    assert run.returncode == 130
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith(f"funcbilevel: interrupted; 3 runs are recorded in {tmp_path}. To go on: funcbilevel run")
    assert f"--output-dir {tmp_path} --pause 0.3" in last
    assert f"results go to {tmp_path}" in output


def test_interrupted_by_ctrl_c_outside_of_the_work():
    """JAX's callback to the garbage collector, for one, swallows a KeyboardInterrupt."""
    code = (
        "import os, signal, time\n"
        "from funcbilevel.tasks._experiment.command import user_errors\n"
        "with user_errors():\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(9)\n"
        "    except KeyboardInterrupt:\n        pass\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], check=False, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (130, "funcbilevel: interrupted.\n")


def test_full_disk_keeps_what_was_recorded(tmp_path):
    run = process(tmp_path, "--seeds", "9")
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (6000, 6000))
    _, errors = run.communicate()
    assert run.returncode == 2
    assert "Traceback" not in errors
    assert f"{tmp_path}/runs.jsonl: " in errors
    assert "What was recorded before stays valid." in errors
    before = len(store.read(tmp_path / "runs.jsonl"))  # no warning: no line is cut off
    stub.main(["--output-dir", str(tmp_path), "--seeds", "9"])
    assert before < len(finished(tmp_path)) == 3 * 2 * 9


@pytest.mark.parametrize("variable", ["MPLBACKEND", "JAX_PLATFORMS"])
def test_odd_surroundings(tmp_path, variable):
    run = process(tmp_path / "run", env={variable: "nope"})
    _, errors = run.communicate()
    assert run.returncode == 2
    assert f"{variable}=nope" in errors
    assert "unset it" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


# Files.

GOOD = json.dumps(store.record("stub", "itd", 0, {"rate": 0.5, "width": 4}, {"loss": 1.0}, 1.0)).encode()
OTHER = json.dumps(store.record("stub", "itd", 1, {"rate": 0.5, "width": 4}, {"loss": 1.0}, 1.0)).encode()
LEFT_OUT = {
    "cut off": (GOOD + b"\n" + OTHER[:60], "line 2 is cut off"),
    "cut off, with an end": (GOOD + b"\n" + OTHER[:60] + b"\n", "line 2 is cut off"),
    "cut off and NULs": (GOOD + b"\n" + OTHER[:60] + b"\0" * 50, "line 2 is cut off"),
    "blank line": (GOOD + b"\n\n", "line 2 holds nothing"),
    "blank line in between": (GOOD + b"\n  \n" + OTHER + b"\n", "line 2 holds nothing"),
    "NULs": (GOOD + b"\n" + b"\0" * 4096, "line 2 holds NULs"),
    "only NULs": (b"\0" * 10, "line 1 holds NULs"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_power_loss_leaves_is_left_out_and_runs_again(tmp_path, uninterrupted, case):
    content, words = LEFT_OUT[case]
    path = tmp_path / "runs.jsonl"
    path.write_bytes(content)
    with pytest.warns(StoreWarning, match=words) as caught:
        there = store.read(path)
    assert str(path) in str(caught[0].message)
    assert len(there) == content.count(b'"machine"')
    assert path.read_bytes() == content  # reading changes nothing
    where = Store(tmp_path, "stub")
    with pytest.warns(StoreWarning, match=words):
        store.add(where, [(Run("itd", 1, {"rate": 0.5, "width": 4}), Result({"loss": 2.0}))])
    assert [record["seed"] for record in store.records(where)] == ([0, 1] if there else [1])
    assert path.read_bytes().endswith(b"\n")
    assert b"\0" not in path.read_bytes()


DAMAGED = {
    "no JSON": (b"loss 3\n", r"line 1 is damaged: it is no JSON"),
    "cut off in the middle": (GOOD[:60] + GOOD + b"\n" + OTHER, r"line 1 is damaged"),
    "NaN": (GOOD.replace(b"1.0", b"NaN", 1) + b"\n" + OTHER, r"line 1 is damaged"),
    "another encoding": (b'{"task": "\xff\xfe"}\n' + GOOD, r"line 1 is damaged"),
    "no object": (GOOD + b"\n[1, 2]\n", r"line 2: a record is a JSON object"),
    "other keys": (GOOD + b'\n{"task": "iv", "loss": 1}\n', r"line 2: a record has the keys task,.*got task, loss"),
    "another key": (GOOD[:-1] + b', "note": 1}\n', r"line 1: a record has the keys .*note"),
    "settings of another kind": (GOOD.replace(b'{"rate": 0.5, "width": 4}', b"3") + b"\n", "line 1: settings is 3"),
    "a text for a seed": (GOOD.replace(b'"seed": 0', b'"seed": "0"') + b"\n", 'line 1: seed is "0"'),
    "a text for a metric": (GOOD.replace(b'{"loss": 1.0}', b'{"loss": "x"}') + b"\n", "line 1: the metric loss"),
    "another task": (GOOD.replace(b"stub", b"iv") + b"\n", "holds runs of iv, not of stub"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_or_foreign_files_are_named_and_kept(tmp_path, capsys, case):
    content, words = DAMAGED[case]
    (tmp_path / "config.json").write_text('{"task": "stub", "rate": 0.5}')
    (path := tmp_path / "runs.jsonl").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        stub.main(["--output-dir", str(tmp_path)])
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert str(path) in errors
    assert len(errors.strip().splitlines()) == 1
    with pytest.raises(UserError, match=words):
        store.records(Store(tmp_path, "stub"))
    assert path.read_bytes() == content


def test_a_curve_without_its_record_is_never_left_twice(tmp_path, uninterrupted):
    """A process was killed between the two."""
    where, runs = Store(tmp_path, "stub"), [Run("itd", seed, {"rate": 0.5, "width": 4}) for seed in (0, 1)]
    results = [(run, Result({"loss": 1.0}, {"curves": {"loss": [run.seed]}})) for run in runs]
    store.add(where, results)
    lines = where.path.read_bytes().splitlines(keepends=True)
    where.path.write_bytes(lines[0])
    assert [key.seed for key in store.beside(where, "curves")] == [0]
    assert store.missing(where, runs) == [runs[1]]
    store.add(where, results)
    assert [line["loss"] for line in store.beside(where, "curves").values()] == [[0], [1]]
    assert len(where.beside("curves").read_bytes().splitlines()) == 2


def test_settings_are_the_same_before_and_after_a_file(tmp_path):
    where = Store(tmp_path, "stub")
    settings = {"widths": (4, 2), "rate": 1.0, "n": np.int64(3), "deep": {"b": 1, "a": None}}
    store.add(where, [(Run("itd", 0, settings), Result({"loss": np.float32(0.5), "broken": np.nan}))])
    again = {"deep": {"a": None, "b": 1.0}, "n": 3, "rate": 1, "widths": [4, 2]}
    assert store.missing(where, [Run("itd", 0, again), Run("itd", 0, settings | {"n": 4})]) == [
        Run("itd", 0, settings | {"n": 4})
    ]
    (record,) = store.records(where)
    assert record["metrics"] == {"loss": 0.5, "broken": None}
    assert np.isnan(store.values(record)["broken"])


def test_committed_records_are_readable():
    directories = sorted((ROOT / "benchmarks/results").iterdir())
    assert len(directories) > 15
    for directory in directories:
        for path in directory.glob("*.jsonl"):
            if not any(kind in path.name for kind in ("-curves", "-features", "-paths", "-worst")):
                assert store.read(path), path


# Directories.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text(""), "a file stands where a directory is needed"),
        (
            lambda path: (path.mkdir(), (path / "notes.txt").write_text("")),
            r"not empty, and notes\.txt is not of a run",
        ),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("{")), r"config\.json is damaged"),
        (
            lambda path: (
                path.mkdir(),
                (path / "config.json").write_text('{"task": "stub", "rate": 0.1}'),
                (path / "runs.jsonl").write_bytes(GOOD + b"\n"),
            ),
            r"other settings \(its config\.json: rate\)",
        ),
        (lambda path: path.symlink_to(path), "loop of symbolic links|a file stands"),
    ],
)
def test_directories_of_others(tmp_path, make, words):
    make(tmp_path / "run")
    with pytest.raises(UserError, match=words):
        options.open_directory(stub.Stub(output_dir=tmp_path / "run"))


def test_a_directory_under_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output-dir .*file/run cannot be used: .* a part of this path is a file"):
        options.open_directory(stub.Stub(output_dir=tmp_path / "file" / "run"))


def test_a_run_that_failed_before_its_first_step_does_not_block_its_directory(tmp_path):
    for rate in (0.1, 0.2):
        directory = options.open_directory(stub.Stub(output_dir=tmp_path, rate=rate))
        assert json.loads((directory / "config.json").read_text()) == {"task": "stub", "rate": rate}


def test_a_longer_run_goes_on_from_a_shorter(tmp_path, uninterrupted, capsys):
    stub.main(["--output-dir", str(tmp_path), "--seeds", "1", "--methods", "itd"])
    stub.main(["--output-dir", str(tmp_path)])
    assert finished(tmp_path) == uninterrupted[0]
    assert "where 4 runs are recorded already" in capsys.readouterr().out


# Options.


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--seed=-1"], "--seed must be from 0 to 2147483647, got -1"),
        (["--seed", str(2**70)], "--seed must be at most 2147483647"),
        (["--seed", str(2**31 - 1)], "--seed plus --seeds must be at most"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--rate", "nan"], "--rate must be a finite number, got nan"),
        (["--rate=-inf"], "--rate must be a finite number, got -inf"),
        (["--methods"], "--methods must name at least one, got none"),
        (["--methods", "itd", "itd"], "--methods must name each once, got itd, itd"),
        (["--methods", "itd", "unrolled"], "--methods must name each method once, got itd, unrolled"),
        (["--methods", "lagrangian"], "--methods must be among aid-cg, itd, got lagrangian"),
        (["--methods", "mask"], "--methods must be among aid-cg, itd, got mask"),
    ],
)
def test_bad_options(tmp_path, capsys, args, words):
    with pytest.raises(SystemExit) as stopped:
        stub.main([*args, "--output-dir", str(tmp_path / "run")])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Grid, selection, tables.


def test_units_are_whole_rectangles():
    def run(method, width, seed):
        return Run(method, seed, {"width": width})

    runs = [run("a", width, seed) for width in (1, 2) for seed in (0, 1)] + [run("b", 1, 1)]
    assert [(len(unit.cells), unit.seeds) for unit in grid.units(runs)] == [(2, (0, 1)), (1, (1,))]
    assert grid.units(runs)[0].runs == [run("a", 1, 0), run("a", 2, 0), run("a", 1, 1), run("a", 2, 1)]


def test_only_what_is_missing_is_made(tmp_path):
    where, made = Store(tmp_path, "stub"), []

    def train(unit):
        made.append(sorted((run.method, run.seed) for run in unit.runs))
        return [Result({"loss": run.seed}) for run in unit.runs]

    def runs(seeds):
        return [Run(method, seed, {}) for method in ("a", "b") for seed in seeds]

    grid.complete(where, runs([1]), train, grid.by_method)
    records = grid.complete(where, runs([2, 1]), train, grid.by_method)
    assert made == [[("a", 1)], [("b", 1)], [("a", 2)], [("b", 2)]]
    assert [record["metrics"]["loss"] for record in records] == [2, 1, 2, 1]
    with pytest.raises(RuntimeError, match="train gave 0 results for 2 runs"):
        grid.complete(where, runs([3]), lambda unit: [], lambda run: 0)


def test_selection_is_by_the_mean_over_the_seeds_and_recorded(tmp_path):
    where = Store(tmp_path, "stub", "selection")
    trials = {"a": [Run("a", 0, {"rate": rate}) for rate in (1, 2, 3)], "b": [Run("b", 0, {"rate": 1})]}
    losses = {(1, 0): 1.0, (1, 1): 5.0, (2, 0): 2.0, (2, 1): 3.0, (3, 0): 0.0, (3, 1): np.nan}
    rule = select.Rule("validation_loss", (0, 1))

    def train(unit):
        return [Result({"validation_loss": losses[run.settings["rate"], run.seed]}) for run in unit.runs]

    grid.complete(where, select.trial_runs(trials, rule), train)
    chosen = select.choose(where, trials, rule)
    assert {name: run.settings["rate"] for name, run in chosen.items()} == {"a": 2, "b": 1}
    note = json.loads((tmp_path / "selection.json").read_text())
    assert note["seeds"] == [0, 1]
    assert note["methods"]["a"] == {"chosen": {"rate": 2}, "trials": 3, "means": [3.0, 2.5, None]}
    assert select.choose(where, trials, rule._replace(largest=True))["a"].settings["rate"] == 1
    assert select.best({"x": [], "y": [np.nan], "z": [9.0], "w": [9.0]}) == "z"
    with pytest.raises(ValueError, match="as many trials"):
        select.check_budgets({"a": 3, "b": 1})


def test_a_method_that_the_table_does_not_know_is_shown():
    names = ["ghost", "itd", "aid-cg", "ghost"]
    assert methods.in_order(stub.METHODS, names) == ["aid-cg", "itd", "ghost"]
    assert methods.colour(stub.METHODS, "ghost") == methods.GREY
    assert methods.label(stub.METHODS, "ghost") == "ghost"
    assert methods.choices(stub.METHODS) == ("aid-cg", "itd")


def test_blocks_of_an_unfinished_grid():
    def record(method, seed, width):
        return store.record("stub", method, seed, {"width": width}, {"loss": 10 * width + seed}, 1.0)

    runs = [record("itd", seed, width) for width in (2, 1) for seed in (1, 0)]
    (block,) = blocks(runs, stub.METHODS, lambda of: of["width"])
    assert block.settings == [{"width": 1}, {"width": 2}]
    assert block.metrics["loss"].tolist() == [[10, 20], [11, 21]]
    cut = blocks([*runs[:3], record("ghost", 0, 1)], stub.METHODS, lambda of: of["width"])
    assert [(of.method, len(of.settings), of.seeds) for of in cut] == [("itd", 1, [0, 1]), ("ghost", 1, [0])]
    apart = blocks([record("itd", 0, 1), record("itd", 1, 2)], stub.METHODS, lambda of: of["width"])
    assert apart[0].metrics["loss"].tolist() == [[10]]


@pytest.mark.parametrize("width", [20, 40, 60, 80])
def test_a_narrow_table_drops_columns_and_no_digits(width):
    from rich.console import Console

    header = ("method", "median", "quartiles", "95% of median", "p", "time")
    rows = [("funcid-linear", "1974.55", "1800.12-2100.98", "1850.00-2000.00", "0.00012", "12.50")]
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(table.terminal(header, rows))
    lines = console.export_text().splitlines()
    shown = lines[2].split()
    assert shown == list(rows[0][: len(shown)])
    assert max(map(len, lines[:3])) <= width
    missing = header[len(shown) :]
    text = " ".join(" ".join(lines[3:]).split())
    assert text == (f"Too narrow for: {', '.join(missing)}." if missing else "")
    assert len(shown) == {20: 1, 40: 3, 60: 4, 80: 6}[width]


def test_alarms_of_the_compiler_are_left_out():
    alarm = (
        b"E0000 00:00:1792 5 slow_operation_alarm.cc:73] \n********************************\n"
        b"[Compiling module jit_step] Very slow compile? If you want to file a bug, run with envvar "
        b"XLA_FLAGS=--xla_dump_to=/tmp/foo and attach the results.\n********************************\n"
    )
    assert without_alarms(b"before\n" + alarm + b"after\n" + alarm) == b"before\nafter\n"


def test_reports_are_functions_of_the_records(tmp_path, uninterrupted):
    stub.main(["--output-dir", str(tmp_path)])
    ghost = Run("ghost", 0, {"rate": 0.5, "width": 4})
    store.add(Store(tmp_path, "stub"), [(ghost, Result({"loss": 1.0}))])
    for name in ("table.md", "stub.png"):
        (tmp_path / name).unlink()
    report.write(stub.report(tmp_path), tmp_path)
    assert (tmp_path / "table.md").read_text().splitlines()[:-1] != uninterrupted[1].splitlines()
    assert set(uninterrupted[1].splitlines()) < set((tmp_path / "table.md").read_text().splitlines())
    assert "| ghost | 0 | 1.000 |" in (tmp_path / "table.md").read_text()
    assert report.task_of(tmp_path) == "stub"
    with pytest.raises(UserError, match="holds no records"):
        report.task_of(ROOT / "tests")
