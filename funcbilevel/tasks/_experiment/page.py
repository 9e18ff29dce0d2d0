"""`report.html`: one page with figures, tables, settings, versions and machine, a pure function of the records."""

import base64
import html
import json
import mimetypes
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.options import read_config
from funcbilevel.tasks._experiment.report import Report

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.2; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: white; }
figcaption { color: gray; font-size: 0.85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.75rem 0.25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8884; }
thead th { white-space: nowrap; }
code { overflow-wrap: anywhere; }
@media (max-width: 40rem) { figure { overflow-x: auto; } img { max-width: none; width: 44rem; } }
"""


def page(report: Report, directory: Path) -> str:
    """The page of a directory whose figures are written."""
    runs = directory / "runs.jsonl"
    paths = [runs] if runs.is_file() else sorted(directory.glob("*.jsonl"))
    records = [record for path in paths for record in _records(path)]
    task = records[0]["task"] if records else directory.name
    figures = "\n".join(_figure(directory / name) for name in report.figures)
    texts = "\n".join(markdown(text) for name, text in report.texts.items() if name.endswith(".md"))
    seeds = sorted({record["seed"] for record in records})
    methods = sorted({record["method"] for record in records})
    facts = {
        "records": str(len(records)),
        "methods": ", ".join(methods),
        "seeds": f"{len(seeds)}, from {seeds[0]} to {seeds[-1]}" if seeds else "none",
        "computing time": f"{sum(record['seconds'] for record in records) / 60:.1f} minutes",
    }
    commits = {commit for record in records if (commit := record.get("commit"))}
    environment = {
        **_values(record["versions"] for record in records),
        **_values(record["machine"] for record in records),
        "commit": ", ".join(sorted(commits)) or "not recorded",
    }
    title = html.escape(f"funcbilevel: {task}")
    body = f"""
<h1>{title}</h1>
{_facts(facts)}
<h2>Figures</h2>
{figures or "<p>No run is finished yet.</p>"}
<h2>Tables</h2>
{texts or "<p>This report has no table.</p>"}
<h2>Settings</h2>
{_facts({name: _text(value) for name, value in read_config(directory).items()}) or "<p>No config.json.</p>"}
<h2>Environment</h2>
{_facts(environment)}
"""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>{body}</body>\n</html>\n"
    )


def _records(path: Path) -> list[store.Record]:
    """The records of a file; none if it is of what stands beside records."""
    known = {candidate.stem for candidate in path.parent.glob("*.jsonl")}
    return [] if any(path.stem.startswith(f"{name}-") for name in known - {path.stem}) else store.read(path)


def _figure(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    data = base64.b64encode(path.read_bytes()).decode()
    name = html.escape(path.name)
    return f'<figure><img alt="{name}" src="data:{kind};base64,{data}"><figcaption>{name}</figcaption></figure>'


def _values(dictionaries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Name -> all values that it has, once each."""
    found: dict[str, list[str]] = {}
    for dictionary in dictionaries:
        for name, value in dictionary.items():
            if str(value) not in found.setdefault(name, []):
                found[name].append(str(value))
    return {name.replace("_", " "): ", ".join(values) for name, values in found.items()}


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in facts.items())
    return f'<div class="wide"><table>{rows}</table></div>' if rows else ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# The little Markdown that reports are written in.


def markdown(text: str) -> str:
    """Headings, tables, lists and paragraphs as HTML; figures are left out, since they stand above."""
    blocks = re.split(r"\n\s*\n", re.sub(r"!\[[^]]*\]\([^)]*\)", "", text).strip())
    return "\n".join(_block(block.splitlines()) for block in blocks if block.strip())


def _block(lines: Sequence[str]) -> str:
    if match := re.match(r"(#+) +(.*)", lines[0]):
        level = min(len(match[1]) + 1, 4)  # the page has a title of its own
        rest = _block(lines[1:]) if lines[1:] else ""
        return f"<h{level}>{_inline(match[2])}</h{level}>{rest}"
    if lines[0].startswith("|"):
        return _table([line for line in lines if line.startswith("|")])
    if lines[0].startswith("- "):
        items = re.split(r"\n- ", "\n".join(lines)[2:])
        return f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in items)}</ul>"
    return f"<p>{_inline(' '.join(lines))}</p>"


def _table(lines: Sequence[str]) -> str:
    rows = [[_inline(cell.strip()) for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in lines]
    head, body = rows[0], [row for row in rows[1:] if set("".join(row)) - set("-: ")]
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    of_rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{of_rows}</tbody></table></div>'


def _inline(text: str) -> str:
    text = html.escape(text, quote=False).replace(r"\|", "|")
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text)
