"""Reports: tables, figures and pages, pure functions of the store."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType


class Report(NamedTuple):
    """What is shown of a directory's records.

    Attributes:
        shown: for the terminal.
        texts: file name -> content: tables in Markdown, pages.
        figures: file name -> function that draws it to a path.
    """

    shown: "RenderableType"
    texts: Mapping[str, str] = {}
    figures: Mapping[str, Callable[[Path], None]] = {}


def write(report: Report, directory: Path) -> None:
    """Writes a report's files, each whole or not at all."""
    for name, text in report.texts.items():
        store.replace(directory / name, text.encode())
    for name, draw in report.figures.items():
        path = directory / name
        partial = path.with_name(f".{os.getpid()}.{name}")
        try:
            draw(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def task_of(directory: Path) -> str:
    """The task whose records a directory holds.

    Raises:
        UserError: there is no such directory, or it holds no records.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; pass one that `run` or `compare` has written to.")
    found = [record for path in sorted(directory.glob("*.jsonl")) for record in _first(path)]
    if not found:
        raise UserError(f"{directory} holds no records; pass a directory that `run` or `compare` has written to.")
    return found[0]["task"]


def _first(path: Path) -> list[store.Record]:
    """The first record of a file, none if the file is of what stands beside records."""
    known = {candidate.stem for candidate in path.parent.glob("*.jsonl")}
    if any(path.stem.startswith(f"{name}-") for name in known - {path.stem}):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", store.StoreWarning)
        return store.read(path)[:1]
