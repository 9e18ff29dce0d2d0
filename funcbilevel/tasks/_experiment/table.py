"""Tables, in Markdown and for a terminal."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


class terminal:
    """The same for a terminal: numbers flush right, and whole columns dropped where it is too narrow.

    Args:
        header: the columns' names.
        rows: the cells.
        title: above the table.
        left: the columns that are flush left.
        sections: numbers of the rows that a line follows.
        dim: numbers of the rows that are printed dim.
    """

    def __init__(
        self,
        header: Sequence[str],
        rows: Iterable[Sequence[str]],
        title: str | None = None,
        left: Sequence[str] = ("method",),
        sections: Sequence[int] = (),
        dim: Sequence[int] = (),
    ) -> None:
        self.header, self.rows, self.title, self.left = list(header), [list(row) for row in rows], title, left
        self.sections, self.dim = sections, dim

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """Yields the table and, if columns are missing, their names."""
        shown = fitting(self.header, self.rows, options.max_width)
        yield self._table(shown)
        if dropped := self.header[shown:]:
            yield f"Too narrow for: {', '.join(dropped)}."

    def _table(self, num_columns: int) -> "RenderableType":
        from rich import box  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        title: Any = None if self.title is None else Text(self.title)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, title=title, title_justify="left", padding=(0, 1, 0, 0))
        for name in self.header[:num_columns]:
            table.add_column(Text(name), justify="left" if name in self.left else "right", no_wrap=True)
        for i, row in enumerate(self.rows):
            cells = [Text(cell) for cell in row[:num_columns]]
            table.add_row(*cells, style="dim" if i in self.dim else None, end_section=i in self.sections)
        return table


def fitting(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> int:
    """How many columns, from the left, a terminal of this width takes whole; at least one."""
    from rich.cells import cell_len  # noqa: PLC0415

    used = 0
    for i, name in enumerate(header):
        used += max(map(cell_len, [name, *(row[i] for row in rows)])) + (2 if i else 1)
        if used > width:
            return max(1, i)
    return len(header)


class page:
    """Tables and notes, one below the other; a note is broken at 78 characters, and several lines of one are indented.

    Args:
        parts: what rich can render, and texts.
    """

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """Yields the parts with an empty line between them."""
        for i, part in enumerate(self.parts):
            if i:
                yield ""
            yield _broken(part) if isinstance(part, str) else part


def _broken(text: str) -> str:
    lines = text.splitlines()
    return "\n".join(textwrap.fill(line, 78, subsequent_indent="  " if len(lines) > 1 else "") for line in lines)


def facts(lines: Mapping[str, str]) -> "RenderableType":
    """Names and what there is to say of them, less those without a text."""
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    grid = Table.grid(padding=(0, 2))
    for name, text in lines.items():
        if text:
            grid.add_row(Text(name), Text(text))
    return grid
