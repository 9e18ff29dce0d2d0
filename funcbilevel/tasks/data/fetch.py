"""Files of data: downloads that are checked and land whole, and one sentence on a file that cannot be used."""

import csv
import hashlib
import http.client
import os
import struct
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.errors import UserError, sentence

CACHE = Path("~/.cache/funcbilevel")
"""Where downloads go."""


def sha256(data: bytes) -> str:
    """The SHA-256 checksum in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def git_blob(data: bytes) -> str:
    """The name that git gives to this content: SHA-1 of its length and itself, in hexadecimal digits."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def fetch(url: str, path: Path, checksum: str, digest: Callable[[bytes], str] = sha256) -> None:
    """Downloads a file unless it is there; either way its checksum is compared, and no half of a file is left behind.

    Args:
        url: where it is.
        path: where it goes.
        checksum: what `digest` must give.
        digest: of the file's content.

    Raises:
        UserError: the download failed, or what came, or is there already, has another checksum.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        if (got := digest(path.read_bytes())) != checksum:
            raise UserError(
                f"{path} is damaged: its checksum is {got}, not {checksum}; remove it, and it is downloaded again."
            )
        return
    by_hand = f"try again, or fetch it by hand to {path}"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} cannot be downloaded ({_reason(error)}); {by_hand}.") from error
    if (got := digest(data)) != checksum:
        raise UserError(f"What came from {url} has the checksum {got}, not {checksum}; {by_hand}.")
    store.replace(path, data)


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)  # of a URLError
    text = sentence(cause) if isinstance(cause, OSError) else str(cause)
    return text.rstrip(".").partition("; ")[0] or type(error).__name__


def fetch_all(url: str, checksums: Mapping[str, str], directory: Path) -> Path:
    """The same for several files below one URL, by their names; returns the directory."""
    folder = directory.expanduser()
    for name, checksum in checksums.items():
        fetch(url + name, folder / name, checksum)
    return folder


def given(path: str | Path | None, variable: str) -> Path | None:
    """The path that the caller or else a variable of the environment gives, None if neither does."""
    found = path or os.environ.get(variable)
    return Path(found) if found else None


_BROKEN = (
    *(ValueError, LookupError, TypeError, ArithmeticError, EOFError, MemoryError, NotImplementedError, RuntimeError),
    *(csv.Error, struct.error, zipfile.BadZipFile, zlib.error),
)
"""What the readers of several formats raise for a file that is damaged or of another format."""


@contextmanager
def reading(path: Path, mend: str) -> Generator[None]:
    """Whatever goes wrong with a file becomes one sentence: its path, what is wrong, and the mend.

    Raises:
        UserError: there is no such file, it cannot be read, or it holds something else.
    """
    if not path.exists():
        raise UserError(f"There is no file {path}; {mend}.")
    if not path.is_file():
        raise UserError(f"{path} is no file; {mend}.")
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); {mend}.") from error
    except _BROKEN as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} is damaged or another file: {lines[0].rstrip('.')}; {mend}.") from error
