"""Every committed table comes out again from the committed records, byte for byte."""

import shutil
from pathlib import Path

import pytest

from funcbilevel import cli

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
DIRECTORIES = (
    *("iv", "iv-10000", "demand", "schooling", "schooling-neural"),
    *("cartpole-fresh", "pendulum", "pathways", "arm", "gates", "gates-adult", "gates-adult-fresh"),
    "cleaning",
    *("fairness", "fairness-article", "fairness-nba", "fairness-published"),
    *("fairness-outside", "fairness-outside-removed"),
    *("fairness-two-followers", "fairness-two-followers-race"),
)


@pytest.mark.parametrize("name", DIRECTORIES)
def test_committed_tables_come_out_again(tmp_path, capsys, name):
    directory = tmp_path / name
    directory.mkdir()
    for path in (*RESULTS.joinpath(name).glob("*.jsonl"), *RESULTS.joinpath(name).glob("*.json")):
        shutil.copy(path, directory)
    cli.main(["report", str(directory)])
    made = {path.name for path in directory.iterdir() if path.suffix in (".md", ".png")}
    assert made == {path.name for path in RESULTS.joinpath(name).iterdir() if path.suffix in (".md", ".png")}
    for path in directory.glob("*.md"):
        assert path.read_text() == RESULTS.joinpath(name, path.name).read_text()
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80 + len(str(directory))
