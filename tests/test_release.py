"""What is published: the contents and metadata of sdist and wheel, and that the wheel works without the sources."""

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import funcbilevel as fb

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
pytestmark = pytest.mark.skipif(not (ROOT / "LICENSE").is_file(), reason="the sources are not here")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it, as `python -m build` makes them."""
    directory = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory), str(ROOT)]
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert made.returncode == 0, made.stdout + made.stderr
    (sdist,), (wheel,) = directory.glob("*.tar.gz"), directory.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(built[1]) as archive:
        yield archive


def test_wheel_holds_the_package_and_nothing_else(wheel):
    info = f"funcbilevel-{fb.__version__}.dist-info"
    names = wheel.namelist()
    assert {name.partition("/")[0] for name in names} == {"funcbilevel", info}
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "funcbilevel").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if not name.startswith(info)} == sources
    assert "funcbilevel/py.typed" in names
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert wheel.read(f"{info}/entry_points.txt").decode().split() == [
        *("[console_scripts]", "funcbilevel", "=", "funcbilevel.cli:main")
    ]


def test_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Version"] == fb.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    required = {line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == {re.sub(r" ", "", dependency) for dependency in PROJECT["dependencies"]}
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert (
        metadata.get_payload(decode=True).decode().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    )


def test_sdist_holds_what_the_tests_need_and_no_results_of_work(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "LICENSE",
        "README.md",
        "CITATION.cff",
        "constraints.txt",
        "tests/conftest.py",
        "funcbilevel/py.typed",
    ):
        assert needed in names
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.py")} <= names
    kept_out = {"runs", "site", "dist", "build"}
    assert not [name for name in names if "__pycache__" in name or name.partition("/")[0] in kept_out]


def test_wheel_works_without_the_sources(built, tmp_path):
    """Installed into a directory of its own, which comes first on the path; what it needs is here already."""
    command = [*(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"), "--target", str(tmp_path)]
    subprocess.run([*command, str(built[1])], check=True, timeout=120)
    code = (
        "import funcbilevel as fb, jax, jax.numpy as jnp\n"
        f"assert fb.__file__.startswith({str(tmp_path)!r}), fb.__file__\n"
        "square = lambda a, b: jnp.mean((a - b) ** 2)\n"
        "problem = fb.ParametricProblem(lambda w, t, b: square(t, w), lambda w, t, b: square(t, b))\n"
        "h = fb.hypergradient(problem, None, fb.aid(fb.cg(1)), 1.0, 1.0, 0.0, 3.0)\n"
        "assert jnp.allclose(h.gradient, -4.0), h\n"
        "from funcbilevel.cli import main\n"
        "main(['list'])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "Demand for air tickets" in run.stdout


def test_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^version: {re.escape(fb.__version__)}$", citation, flags=re.MULTILINE)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(fb.__version__)} ", changelog, flags=re.MULTILINE)


def test_classifiers_name_the_lowest_version_of_python_and_ci_tests_it():
    (lowest,) = re.fullmatch(r">=(3\.\d+)", PROJECT["requires-python"]).groups()
    assert f"Programming Language :: Python :: {lowest}" in PROJECT["classifiers"]
    workflow = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    assert named <= set(re.findall(r'"(3\.\d+)"', workflow))


def test_publishing_waits_for_the_tests_of_what_was_built():
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    jobs = dict(zip(*[iter(re.split(r"^  (\w+):.*\n", text.partition("\njobs:\n")[2], flags=re.MULTILINE)[1:])] * 2))
    assert list(jobs) == ["build", "test", "publish"]
    assert "needs: build" in jobs["test"]
    assert "needs: test" in jobs["publish"]
    assert [name for name, job in jobs.items() if "id-token: write" in job] == ["publish"]
    assert "password" not in text.replace("no password", "")
