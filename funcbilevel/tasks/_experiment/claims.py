"""Claims on parts of the work, so that two processes do not do the same."""

import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from funcbilevel.tasks._experiment.store import fcntl

Claim = Callable[[str, bool], Any]
"""`claim(what, wait) -> context manager of a bool`: whether this process alone is at `what` as long as it lasts."""


@contextmanager
def claims(directory: Path) -> Generator[Claim]:
    """Yields a `Claim`; a process that dies loses what it has claimed."""
    with (directory / ".claims").open("ab") as file:

        @contextmanager
        def claim(what: str, wait: bool) -> Generator[bool]:
            if fcntl is None:
                yield True
                return
            place = zlib.crc32(what.encode())
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
            except (BlockingIOError, PermissionError):
                yield False
                return
            try:
                yield True
            finally:
                fcntl.lockf(file, fcntl.LOCK_UN, 1, place)

        yield claim
