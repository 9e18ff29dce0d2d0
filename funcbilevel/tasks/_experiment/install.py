"""The command that installs an extra for whoever lacks it: from the index, or from one's clone."""

import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse


def install_command(extra: str) -> str:
    """A command for this very interpreter: `python -m pip install "funcbilevel[tasks]"`, or with the clone's path."""
    source, editable = _clone()
    python = shlex.quote(sys.executable or "python")
    what = f"{source}[{extra}]" if source else f"funcbilevel[{extra}]"
    return f'{python} -m pip install {"-e " if editable else ""}"{what}"'


def _clone() -> tuple[str, bool]:
    """The directory that pip installed the package from, and whether as editable; empty where it was no directory.

    A package that is not installed at all, but imported from its clone, counts as editable.
    """
    try:
        text = distribution("funcbilevel").read_text("direct_url.json")
    except PackageNotFoundError:
        root = Path(__file__).parents[3]
        return (str(root), True) if (root / "pyproject.toml").is_file() else ("", False)
    origin = json.loads(text) if text else {}
    if "dir_info" not in origin:
        return "", False
    directory = unquote(urlparse(origin["url"]).path)
    return (directory, bool(origin["dir_info"].get("editable"))) if Path(directory).is_dir() else ("", False)
