"""The README's quick start runs as printed and gives the numbers that it states."""

import re
import tomllib
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def ordinary_jax():
    """As a user has it: with NumPy's rank promotion."""
    with jax.numpy_rank_promotion("allow"):
        yield


def test_quick_start(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.splitlines()) <= 30
    stated = re.search(r"# ([\d.]+); least squares of y on x gives ([\d.]+)", code)
    variables = {}
    exec(compile(code, "README.md", "exec"), variables)
    assert f"effect of x on y: {stated[1]}" in capsys.readouterr().out
    x, y = variables["x"], variables["y"]
    assert f"{(x * y).sum() / (x * x).sum():.2f}" == stated[2]


def test_setup_is_two_commands():
    commands = re.findall(r"```bash newcomer\n(.*?)```", README, flags=re.DOTALL)
    assert [len(block.strip().splitlines()) for block in commands] == [1, 1]


def test_lowest_constraints_are_the_lower_bounds_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["lineax"], *extras["log"], *extras["tasks"], *extras["test"]]
    bounds = dict(r.split(">=") for r in requirements if ">=" in r)
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert pins.pop("jaxlib") == bounds["jax"]
    assert pins == bounds
