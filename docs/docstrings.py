"""Turns our docstrings into Markdown: maths of reStructuredText, and doctests."""

import re
from textwrap import dedent, indent
from typing import Any

import griffe


class Markdown(griffe.Extension):
    """A Griffe extension for mkdocstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring before it is parsed."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring with `:math:` and `.. math::` as LaTeX, and each doctest as one fenced block."""
    text = re.sub(r":math:`([^`]*)`", r"\\(\1\\)", text)
    text = re.sub(r"^( *)\.\. math:: *(.*(?:\n(?:\1 +\S.*|\s*$))*)", _display, text, flags=re.MULTILINE)
    text = re.sub(r"(Returns:\n +[^\n:]*): ", r"\1 - ", text)  # what stands before a colon would be taken for a type
    text = re.sub(r" *# doctest: \+SKIP", "", text)
    return re.sub(r"^( *)>>> .*(?:\n\1(?!\s*$).*)*", _fenced, text, flags=re.MULTILINE)


def _display(match: re.Match[str]) -> str:
    margin, formula = match.groups()
    lines = " ".join(line.strip() for line in formula.splitlines())
    body = rf"\begin{{align*}}{lines}\end{{align*}}" if "&" in lines else lines.strip()
    return f"\n{margin}\\[{body}\\]\n"


def _fenced(match: re.Match[str]) -> str:
    margin, code = match[1], dedent(match[0])
    return indent(f"```pycon\n{code}\n```", margin)
