"""Runs the code of the pages and the examples: `python docs/execute.py [PAGE or EXAMPLE...]`.

What a page prints and draws is written into the page and beside it; that of an example goes to docs/gallery, from which
the gallery is made.

Blocks marked ```python run in order, in one namespace per page; a block ```text after one holds what it prints. Blocks
with another mark (```py, ```bash) are only shown. The tests run the same, and compare.
"""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

DOCS = Path(__file__).parent
GALLERY = DOCS / "gallery"
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code, what the page says that it prints, and what it did print."""

    code: str
    stated: str
    printed: str


def pages() -> list[Path]:
    """The pages that hold code to run."""
    return sorted(page for page in DOCS.rglob("*.md") if BLOCK.search(page.read_text(encoding="utf-8")))


def execute(page: Path, directory: Path) -> Iterator[Block]:
    """Runs a page's blocks; its figures go to `directory`."""
    mpl.use("agg")
    variables: dict[str, Any] = {"__name__": "__page__"}
    text = page.read_text(encoding="utf-8")
    with contextlib.chdir(directory):
        for match in BLOCK.finditer(text):
            lines_before = text[: match.start("code")].count("\n")
            code = compile("\n" * lines_before + match["code"], str(page), "exec")  # errors name the page's line
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, variables)
            yield Block(match["code"], match["output"] or "", printed.getvalue())


def refresh(page: Path) -> None:
    """Writes what the code prints into the page, and its figures beside it."""
    directory = Path(tempfile.mkdtemp())
    blocks = execute(page, directory)

    def with_output(match: re.Match[str]) -> str:
        block = next(blocks)
        output = f"\n```text\n{block.printed.rstrip()}\n```\n" if block.printed else ""
        return f"```python\n{block.code}```\n{output}"

    page.write_text(BLOCK.sub(with_output, page.read_text(encoding="utf-8")), encoding="utf-8")
    for figure in directory.glob("*.png"):
        shutil.copy(figure, page.parent)
    shutil.rmtree(directory)


def run_example(path: Path) -> None:
    """Runs an example in a process of its own, and keeps its figure, what it prints, and how long it took."""
    GALLERY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        command = [sys.executable, str(path)]
        run = subprocess.run(command, cwd=directory, check=True, stdout=subprocess.PIPE, text=True)
        record = {"seconds": round(time.perf_counter() - start), "printed": run.stdout.rstrip()}
        for figure in Path(directory).glob("*.png"):
            shutil.copy(figure, GALLERY)
    text = json.dumps(record, indent=2, ensure_ascii=False)
    GALLERY.joinpath(f"{path.stem}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for path in [Path(argument).resolve() for argument in sys.argv[1:]] or pages():
        print(path.name, flush=True)
        refresh(path) if path.suffix == ".md" else run_example(path)
