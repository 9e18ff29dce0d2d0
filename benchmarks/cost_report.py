"""The report of benchmarks/cost.py: cost.md, cost.png and cost.html (one page, its plots inside).

python benchmarks/cost_report.py benchmarks/results/cost/sweeps.jsonl [--output-dir benchmarks/results/cost]
"""

import argparse
import html
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cost import BASE, METHODS, SWEEPS, WHATS, Cell, title

from funcbilevel.tasks._experiment import store

Value = Callable[[store.Record], float | None]
OPTIONS = ("mlp-remat", "mlp-bf16")
"""Models that are "mlp" computed in another way."""


class Table(NamedTuple):
    """A heading row and rows of cells."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Section(NamedTuple):
    """A heading, and paragraphs, tables and figures (as SVG) in order."""

    heading: str
    parts: Sequence[str | Table]
    figure: Any = None


# Reading.


def last_records(records: Iterable[store.Record]) -> list[store.Record]:
    """One record per measurement: the last, and one with a time rather than one without."""
    kept: dict[tuple[Any, ...], store.Record] = {}
    for record in records:
        key = (record["method"], *sorted((k, str(v)) for k, v in record["settings"].items()))
        if key not in kept or seconds(record) is not None or seconds(kept[key]) is None:
            kept[key] = record
    return list(kept.values())


def seconds(record: store.Record) -> float | None:
    return record["metrics"].get("seconds")


def temp_bytes(record: store.Record) -> float | None:
    return record["metrics"].get("temp_bytes")


def to_floor(record: store.Record) -> float | None:
    """Its time over that of the floor in the same turns."""
    metrics = record["metrics"]
    return metrics["seconds"] / metrics["floor_seconds"] if metrics.get("seconds") else None


def cell_of(record: store.Record) -> Cell:
    return Cell(**{name: record["settings"][name] for name in Cell._fields})


def curve(
    records: Iterable[store.Record], method: str, what: str, factor: str, base: Cell, value: Value
) -> tuple[np.ndarray, np.ndarray]:
    """The values of one method along one sweep, by increasing factor."""
    points = sorted(
        (record["settings"][factor], y)
        for record in records
        if record["method"] == method
        and record["settings"]["what"] == what
        and cell_of(record)._replace(**{factor: getattr(base, factor)}) == base
        and (y := value(record)) is not None
    )
    x, y = np.array(points, float).reshape(-1, 2).T
    return x, y


# Fits.


def power(x: np.ndarray, y: np.ndarray) -> float | None:
    """The p of y ~ x^p: the slope in log axes. None for fewer than two points."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(x) > 1 else None


def slope(x: np.ndarray, y: np.ndarray) -> float | None:
    """The b of y ~ a + b x, by least squares in relative errors. None for fewer than two points."""
    return float(np.polyfit(x, y, 1, w=1 / np.abs(y))[0]) if len(x) > 1 else None


# The sections.


def sections(records: Sequence[store.Record]) -> list[Section]:
    measured = [r for r in records if r["settings"]["what"] in WHATS]
    models = [m for m in BASE if m not in OPTIONS and any(r["settings"]["model"] == m for r in measured)]
    parts = [introduction(records)]
    parts += [model_section(measured, model) for model in models]
    parts += [paper_section(measured)]
    last = (targets_section(measured), options_section(measured), seeds_section(records))
    parts += [section for section in last if section.parts]
    parts += [sweeps_section(measured)]
    return parts


def introduction(records: Sequence[store.Record]) -> Section:
    machine = records[-1]["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in records[-1]["versions"].items())
    return Section(
        "What was measured",
        [
            "A functional regression by a multilayer perceptron (`mlp`), a small convolutional network (`cnn`) and a "
            "small Transformer encoder. `gradient` is one total-gradient estimate (of `itd`, with the T inner steps it "
            "differentiates through), `step` one whole outer step; M = K = T = steps. `floor` is a bare scan of the "
            "optax steps that FuncID with a learned adjoint cannot do without: M on the prediction network (`step` "
            "only), K on the adjoint network with both batches, and one gradient of the outer objective. Times are "
            "medians of calls in turns with the others of the cell; MiB are XLA's temporary buffers, exact and "
            "repeatable. Empty: not measured.",
            f"{machine['cpu']}, {machine['cpu_count']} cores, {machine['device']}; {versions}.",
        ],
    )


def model_section(records: Sequence[store.Record], model: str) -> Section:
    base = BASE[model]
    rows = []
    for method in METHODS:
        found = {r["settings"]["what"]: r for r in records if r["method"] == method and cell_of(r) == base}
        if found:
            cells = [
                number(value(found[what]) if what in found else None, scale, form)
                for what in WHATS
                for value, scale, form in ((seconds, 1e3, ".1f"), (to_floor, 1, ".2f"), (temp_bytes, 2**-20, ".1f"))
            ]
            rows.append([method, *cells])
    header = ["method", *(f"{what}: {unit}" for what in WHATS for unit in ("ms", "/ floor", "MiB"))]
    return Section(
        title(base),
        [Table(header, rows), slopes_table(records, base)],
        figure(records, base),
    )


def slopes_table(records: Sequence[store.Record], base: Cell) -> Table:
    """Fitted along the sweeps of steps and depth: p in value ~ factor^p, and b in value ~ a + b factor."""
    header, rows = ["slopes of `gradient`"], []
    for short in ("K", "depth"):
        header += [f"time ~ {short}^p", f"ms / {short}", f"MiB ~ {short}^p", f"MiB / {short}"]
    for method in METHODS:
        cells = []
        for factor in ("steps", "depth"):
            for value, scale in ((seconds, 1e3), (temp_bytes, 2**-20)):
                x, y = curve(records, method, "gradient", factor, base, value)
                cells += [number(power(x, y)), number(slope(x, y), scale, ".3g")]
        if any(cells):
            rows.append([method, *cells])
    return Table(header, rows)


def number(value: float | None, scale: float = 1.0, form: str = ".2f") -> str:
    if value is None:
        return ""
    scaled = value * scale
    return format(0.0 if abs(scaled) < 1e-9 else scaled, form)


class Claim(NamedTuple):
    """What the cost table says, a figure that tells, and whether it does."""

    text: str
    figure: str
    holds: bool | None


def paper_section(records: Sequence[store.Record]) -> Section:
    formulas = Table(
        ["per step of the linear solver", "time", "memory"],
        [
            ["AID", "gamma (T_in + T_h)", "beta M_h + M_in^h"],
            ["FuncID", "gamma T_in + (delta + 1) T_a + T_h", "M_a + M_in^out"],
        ],
    )
    rows = [
        [model, c.text, c.figure, "" if c.holds is None else "agrees" if c.holds else "differs"]
        for model in BASE
        for c in claims(records, BASE[model])
    ]
    return Section(
        "Next to the paper's table",
        [
            "The costs that Petrulionyte, Mairal and Arbel (arXiv:2403.20233) give for their methods, as the project "
            "quotes them; they were not checked against the paper's own pages, which could not be opened where this "
            "was written. T_h, T_a and T_in are the times of evaluating the prediction network, the adjoint network "
            "and the inner objective; M is the memory of their intermediate values (^h: for derivatives by the "
            "network's parameters, ^out: by its output); gamma, delta and beta are constants of automatic "
            "differentiation, for a Hessian product, a gradient, and the former's memory. This reading of the symbols "
            "is ours.",
            formulas,
            Table(["model", "the table says", "measured", ""], rows) if rows else "No sweep was measured.",
        ],
    )


def claims(records: Sequence[store.Record], base: Cell) -> list[Claim]:
    """The table's statements that the sweeps can decide."""

    def fit(
        fitted: Callable[..., float | None], method: str, factor: str, value: Value, least: float = 0
    ) -> float | None:
        x, y = curve(records, method, "gradient", factor, base, value)
        return fitted(x[x >= least], y[x >= least])

    def claim(text: str, form: str, holds: Callable[..., bool], *figures: float | None) -> Claim | None:
        if any(f is None for f in figures):
            return None
        return Claim(text, form.format(*figures), holds(*figures))

    AID, FUNCID = "aid-cg", "funcid-learned"
    per_step = {m: fit(slope, m, "steps", seconds, 5) for m in (AID, FUNCID, "floor")}
    per_layer = {m: fit(slope, m, "depth", temp_bytes) for m in (AID, FUNCID)}
    span = {
        m: (y[-1] / y[0] if len(y := curve(records, m, "gradient", "steps", base, temp_bytes)[1]) > 1 else None)
        for m in (AID, FUNCID, "itd")
    }
    found = [
        *(
            claim(f"{m}: time grows in proportion to the steps", "time ~ K^{:.2f} from K = 5", _near_one, p)
            for m in (AID, FUNCID)
            for p in (fit(power, m, "steps", seconds, 5),)
        ),
        claim(
            "FuncID: a step costs a training step of the adjoint network, (delta + 1) T_a, and little more",
            "{:.3g} s per step, bare training step {:.3g} s",
            lambda a, b: a <= 1.15 * b,
            per_step[FUNCID],
            per_step["floor"],
        ),
        claim(
            "AID: a step costs gamma T_h, FuncID's (delta + 1) T_a on both batches; gamma is the larger",
            "AID's step {:.3g} s, FuncID's {:.3g} s",
            lambda a, b: a >= b,
            per_step[AID],
            per_step[FUNCID],
        ),
        claim(
            "neither's memory depends on the number of steps",
            "from the fewest to the most steps: AID x{:.3f}, FuncID x{:.3f} (ITD x{:.0f})",
            lambda a, b, _: max(abs(a - 1), abs(b - 1)) <= 0.05,
            *(span[m] for m in (AID, FUNCID, "itd")),
        ),
        claim(
            "a layer adds beta M_h to AID's memory and M_a to FuncID's, beta > 1",
            "AID {:.0f} bytes per layer, FuncID {:.0f}",
            lambda a, b: a > b,
            per_layer[AID],
            per_layer[FUNCID],
        ),
    ]
    return [c for c in found if c is not None]


def _near_one(p: float) -> bool:
    return abs(p - 1) <= 0.1


def targets_section(records: Sequence[store.Record]) -> Section:
    """The figures that the project promises, where they were measured."""
    results = {(r["method"], r["settings"]["what"], cell_of(r)): r for r in records}

    def ratio(value: Value, method: str, other: str, what: str, cell: Cell) -> float | None:
        pair = [results.get((m, what, cell)) for m in (method, other)]
        values = [None if r is None else value(r) for r in pair]
        return None if None in values else values[0] / values[1]  # type: ignore[operator]

    rows: list[list[str]] = []

    def row(text: str, figure: float | None, limit: float) -> None:
        if figure is not None:
            rows.append([text, f"{figure:.3f}", f"≤ {limit:g}", "met" if figure <= limit else "missed"])

    for depth in (4, 8):
        for width in (256, 1024):
            cell = Cell(depth=depth, width=width)
            found = results.get(("funcid-learned", "step", cell))
            row(f"time of a step, FuncID / floor, depth {depth}, width {width}", found and to_floor(found), 1.05)
    deep = Cell(depth=8)
    row(
        "time of a gradient, FuncID-linear / AID-CG, depth 8",
        ratio(seconds, "funcid-linear", "aid-cg", "gradient", deep),
        0.10,
    )
    for what in WHATS:
        for other, limit in (("aid-cg", 0.6), ("itd", 0.05)):
            figure = ratio(temp_bytes, "funcid-learned", other, what, deep)
            row(f"bytes of a {what}, FuncID / {other}, depth 8", figure, limit)
        _, y = curve(records, "funcid-learned", what, "steps", Cell(), temp_bytes)
        flat = float(np.max(y[1:]) / np.min(y[1:]) - 1) if len(y) > 2 else None
        row(f"bytes of a {what}, FuncID, relative range over K > 1", flat, 0.01)
    return Section("Targets", [Table(["figure", "measured", "target", ""], rows)] if rows else [])


def options_section(records: Sequence[store.Record]) -> Section:
    """The same perceptron with rematerialised layers, and in bfloat16."""
    cell = BASE[OPTIONS[0]]._replace(model="mlp")
    found = {(r["method"], r["settings"]["what"], cell_of(r)): r for r in records}
    rows: list[list[str]] = []
    for method in METHODS:
        results = [found.get((method, "gradient", cell._replace(model=m))) for m in ("mlp", *OPTIONS)]
        if any(results[1:]):
            error = results[2]["metrics"].get("error") if results[2] else None
            times = [number(r and seconds(r), 1e3, ".1f") for r in results]
            sizes = [number(r and temp_bytes(r), 2**-20, ".1f") for r in results]
            rows.append([method, *times, *sizes, number(error, 1, ".1e")])
    if not rows:
        return Section("Options", [])
    header = ["method", *(f"{unit}, {name}" for unit in ("ms", "MiB") for name in ("plain", "remat", "bf16"))]
    text = (
        "One `gradient`. `remat`: every hidden layer in `jax.checkpoint`, as `flax.linen.remat` does it. `bf16`: "
        "`fb.mixed_precision`, with the relative error of its hypergradient to that in float32 at the same parameters "
        "(CPUs compute bfloat16 by way of float32: the time is not a GPU's or a TPU's)."
    )
    return Section(f"Options: {title(cell)}", [text, Table([*header, "error, bf16"], rows)])


def seeds_section(records: Sequence[store.Record]) -> Section:
    found = [r for r in records if r["settings"]["what"] == "seeds"]
    if not found:
        return Section("Seeds under vmap", [])
    settings = found[0]["settings"]
    rows = [
        [
            r["method"],
            number(r["metrics"]["sequential_seconds"], 1e3, ".0f"),
            number(r["metrics"]["vmap_seconds"], 1e3, ".0f"),
            number(r["metrics"]["speed_up"]),
            number(r["metrics"].get("spread_speed_up")),
        ]
        for r in found
    ]
    return Section(
        "Seeds under vmap",
        [
            f"{settings['num_seeds']} seeds of {settings['outer_steps']} outer steps, {title(cell_of(found[0]))}.",
            "`over devices`: under vmap too, and each of the CPU's cores is a device with its share of the seeds "
            "(funcid-linear with NPROC=3, without which batched factorisations on two devices deadlock jaxlib 0.10).",
            Table(["method", "one after the other, ms", "vmap, ms", "faster by", "over devices"], rows),
        ],
    )


def sweeps_section(records: Sequence[store.Record]) -> Section:
    parts: list[str | Table] = []
    for model, base in BASE.items():
        for factor in (f for f in SWEEPS if f in Cell._fields):
            for what in WHATS:
                parts += sweep_tables(records, base, factor, what, model)
    return Section("All sweeps", parts)


def sweep_tables(records: Sequence[store.Record], base: Cell, factor: str, what: str, model: str) -> list[str | Table]:
    """Time and memory by method along one sweep; nothing if it has a single point."""
    tables = []
    for name, value, scale, form in (("ms", seconds, 1e3, ".1f"), ("MiB", temp_bytes, 2**-20, ".1f")):
        curves = {m: dict(zip(*curve(records, m, what, factor, base, value))) for m in METHODS}
        levels = sorted({x for points in curves.values() for x in points})
        if len(levels) > 1:
            rows = [
                [m, *(number(points.get(x), scale, form) for x in levels)] for m, points in curves.items() if points
            ]
            tables.append(Table([f"{model}, {what}, {name}", *(f"{factor} {x:,.0f}" for x in levels)], rows))
    return tables


# Plots.

STYLES: Mapping[str, dict[str, Any]] = {  # lines that may coincide differ in width: the floor is a broad one below all
    "floor": {"color": "0.8", "lw": 6, "marker": "", "zorder": 1},
    "funcid-linear": {"color": "C3", "marker": "o", "lw": 2.2},
    "funcid-learned": {"color": "C1", "marker": "s", "lw": 2.6},
    "aid-cg": {"color": "C2", "marker": "^", "lw": 1.2},
    "aid-neumann": {"color": "C2", "marker": "v", "ls": ":"},
    "aid-gmres": {"color": "C2", "marker": "d", "ls": "-."},
    "itd": {"color": "C4", "marker": "x"},
    "itd-remat": {"color": "C4", "marker": "+", "ls": ":"},
    "itd-forward": {"color": "C4", "marker": "*", "ls": "-."},
    "alternating": {"color": "black", "marker": ".", "lw": 1.0, "ls": "--", "zorder": 3},
}


def figure(records: Sequence[store.Record], base: Cell) -> Any:
    """Time and memory of a gradient and of a step against steps and depth, in log axes."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import FuncFormatter, LogFormatter, NullFormatter  # noqa: PLC0415

    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    plain = FuncFormatter(lambda x, _: f"{x:g}")
    with rc_context(style | {"svg.fonttype": "none"}):
        columns = [
            (what, factor)
            for what in WHATS
            for factor in ("steps", "depth")
            if any(len(curve(records, m, what, factor, base, temp_bytes)[0]) > 1 for m in METHODS)
        ]
        if not columns:
            return None
        picture = Figure(figsize=(2 + 2.4 * len(columns), 5.6), layout="constrained")
        axes: Any = picture.subplots(2, len(columns), squeeze=False)
        for column, (what, factor) in enumerate(columns):
            for row, (label, value, scale) in enumerate((("ms", seconds, 1e3), ("MiB", temp_bytes, 2**-20))):
                panel = axes[row, column]
                levels: set[float] = set()
                for method in METHODS:
                    x, y = curve(records, method, what, factor, base, value)
                    if len(x):
                        levels |= set(x)
                        panel.plot(x, y * scale, label=method, **{"ms": 5, "lw": 1.4, "zorder": 2} | STYLES[method])
                if not levels:
                    panel.set_visible(False)  # memory was measured, time was not
                    continue
                panel.set(xscale="log", yscale="log", ylabel=label if column == 0 else None)
                panel.set_xlabel("steps K = M = T" if factor == "steps" else "depth (layers)")
                panel.set_xticks(sorted(levels))
                panel.xaxis.set_major_formatter(plain)
                panel.xaxis.set_minor_formatter(NullFormatter())
                panel.yaxis.set_major_formatter(plain)
                panel.yaxis.set_minor_formatter(LogFormatter())  # shown where there are fewer than two powers of ten
                panel.grid(alpha=0.25, lw=0.5)
                panel.set_title(f"{'one gradient' if what == 'gradient' else 'one outer step'}, {label}")
        handles = {label: handle for panel in axes.flat for handle, label in zip(*panel.get_legend_handles_labels())}
        ordered = [m for m in METHODS if m in handles]
        picture.legend([handles[m] for m in ordered], ordered, loc="outside right center", frameon=False)
    return picture


def svg(picture: Any) -> str:
    buffer = io.StringIO()
    picture.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


# Writing.


def as_markdown(parts: Sequence[Section], image: str) -> str:
    blocks = ["# The cost of a hypergradient"]
    for section in parts:
        blocks.append(f"## {section.heading}")
        if section.figure is not None and image:
            blocks.append(f"![time and memory against K and depth]({image})")
            image = ""
        blocks += [_markdown_table(part) if isinstance(part, Table) else part for part in section.parts]
    return "\n\n".join(blocks) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def as_html(parts: Sequence[Section]) -> str:
    blocks = []
    for section in parts:
        blocks.append(f"<h2>{_inline(section.heading)}</h2>")
        if section.figure is not None:
            blocks.append(f"<figure>{svg(section.figure)}</figure>")
        blocks += [
            _html_table(part) if isinstance(part, Table) else f"<p>{_inline(part)}</p>" for part in section.parts
        ]
    return _PAGE.format("\n".join(blocks))


def _html_table(table: Table) -> str:
    def cell(text: str) -> str:
        kind = ' class="number"' if re.fullmatch(r"[-+.,e\d]+", text) else ""
        return f"<td{kind}>{_inline(text)}</td>"

    head = "".join(f"<th>{_inline(text)}</th>" for text in table.header)
    rows = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in table.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _inline(text: str) -> str:
    """HTML of a text in which `...` is code."""
    pieces = html.escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>The cost of a hypergradient</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222; }}
table {{ border-collapse: collapse; margin: 1em 0; font-size: 13px; }}
th, td {{ padding: 2px 10px; text-align: left; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }}
td.number {{ text-align: right; }}
figure {{ margin: 1em 0; }} figure svg {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>The cost of a hypergradient</h1>
{}
</body></html>
"""


def write(records: Iterable[store.Record], directory: Path) -> list[Path]:
    """Writes cost.md, cost.png (of the first model) and cost.html.

    Raises:
        ValueError: there are no records.
    """
    kept = last_records(records)
    if not kept:
        raise ValueError("cost_report: the file holds no records; run benchmarks/cost.py --output <file> first.")
    parts = sections(kept)
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / name for name in ("cost.md", "cost.html", "cost.png")]
    figures = [section.figure for section in parts if section.figure is not None]
    paths[0].write_text(as_markdown(parts, paths[2].name if figures else ""), encoding="utf-8")
    paths[1].write_text(as_html(parts), encoding="utf-8")
    if figures:
        figures[0].savefig(paths[2], dpi=150)
    return [path for path in paths if path.exists()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("records", type=Path, help="what benchmarks/cost.py --output has written")
    parser.add_argument("--output-dir", type=Path, help="default: where the records are")
    args = parser.parse_args(argv)
    for path in write(store.read(args.records), args.output_dir or args.records.parent):
        print(path)


if __name__ == "__main__":
    main()
