"""What MkDocs does beside turning Markdown into pages: API pages from `funcbilevel.__all__`, results from the records,
the examples' sources, and formulas as MathML, which browsers show without a script.
"""

import ast
import inspect
import json
import logging
import re
import textwrap
from collections import defaultdict
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import funcbilevel as fb

LOG = logging.getLogger("mkdocs.hooks")  # its warnings fail a strict build
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
EXAMPLES = ROOT / "examples"
GALLERY = ROOT / "docs/gallery"

# The pages of the API reference, and the modules whose names stand there; a name of any other module goes to the last.
API = {
    "problems": (
        "Problems and models",
        r"_(problem|model|partition|precision|microbatches|variable_projection|predictor|projection|kernel.*)",
    ),
    "solver": ("Solver and training", r"_(bilevel|train|draws|state|checkpoint|recovery|followers|log|sharding|hosts)"),
    "estimators": ("Estimators and adjoints", r"_estimators\..*"),
    "linear-solvers": ("Linear solvers", r"_(linear_solvers|nystrom.*|precondition.*)"),
    "implicit": ("Implicit layers", r"_(implicit|argmin|prox)"),
    "stochastic": ("Stochastic and first-order solvers", r"_(stochastic.*|methods)"),
    "checks": ("Checks and costs", r"_(cost|certify|diagnose|error|check.*)"),
    "protocol": ("Writing an estimator", r"_(estimator|fit)"),
    "more": ("More", r".*"),
}

# What is not in the flat namespace: page -> (title, module, its names, and the methods that are shown of a name).
BESIDE = {
    "instrumental-variables": (
        "Instrumental variables",
        "funcbilevel.iv",
        {
            "NeuralIV": [
                *("fit", "predict", "predict_interval", "average_derivatives", "partial_dependence", "score"),
            ],
            "Band": [],
            "FirstStage": [],
            "WeakInstrumentWarning": [],
        },
    ),
    "benchopt": (
        "Benchopt",
        "funcbilevel.contrib.benchopt",
        {"benchmark_solver": [], "benchmark_problem": []},
    ),
}


def api_names() -> dict[str, list[str]]:
    """Page -> the public names on it, all of `funcbilevel.__all__` once; pages without names are left out."""
    pages = defaultdict(list)
    for name in fb.__all__:
        module = getattr(fb, name).__module__.removeprefix("funcbilevel.")
        pages[next(page for page, (_, modules) in API.items() if re.fullmatch(modules, module))].append(name)
    return {page: sorted(pages[page], key=str.lower) for page in API if pages[page]}


def api_pages() -> dict[str, str]:
    """Path -> Markdown of the API reference."""
    index = ["# API reference\n\nEverything is in one flat namespace: `import funcbilevel as fb`.\n"]
    pages = {}
    for page, names in api_names().items():
        title = API[page][0]
        index.append(f"\n## [{title}]({page}.md)\n\n| Name | |\n| --- | --- |\n")
        index += [f"| [`fb.{name}`]({page}.md#funcbilevel.{name}) | {_summary(name)} |\n" for name in names]
        pages[f"api/{page}.md"] = f"# {title}\n\n" + "\n".join(f"::: funcbilevel.{name}\n" for name in names)
    for page, (title, module, names) in BESIDE.items():
        index.append(f"\n## [{title}]({page}.md)\n\nIn `{module}`: {', '.join(f'`{name}`' for name in names)}.\n")
        parts = [
            f"::: {module}.{name}\n" + f"    options:\n      members: {json.dumps(methods)}\n" * bool(methods)
            for name, methods in names.items()
        ]
        pages[f"api/{page}.md"] = f"# {title}\n\n" + "\n".join(parts)
    return {"api/index.md": "".join(index)} | pages


def _summary(name: str) -> str:
    first = (inspect.getdoc(getattr(fb, name)) or "").partition("\n\n")[0].replace("\n", " ")
    return re.sub(r":math:`([^`]*)`", r"\\(\1\\)", first.replace(r"\|", r"\Vert ")).replace("|", r"\|")


# Results.


def result_pages() -> dict[str, str]:
    """Path -> Markdown of one page for each committed directory of records."""
    found = sorted(path for path in RESULTS.iterdir() if any(path.glob("*.jsonl")))
    rows = [f"| [{path.name}]({path.name}.md) | {_count(path)} | {_versions(path)} |\n" for path in found]
    index = (RESULTS / "README.md").read_text(encoding="utf-8").rstrip()
    index = re.sub(r"\]\(([\w-]+)/\w+\.md\)", r"](\1.md)", index).replace("](../../docs/", "](../")
    index += "\n\n| Directory | records | made with |\n| --- | --- | --- |\n" + "".join(rows)
    return {"results/index.md": index} | {f"results/{path.name}.md": _result_page(path) for path in found}


def _records(directory: Path) -> list[dict[str, Any]]:
    """The records of a directory: `runs.jsonl`, or whatever files of records there are."""
    paths = [directory / "runs.jsonl"] if (directory / "runs.jsonl").exists() else sorted(directory.glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def _count(directory: Path) -> int:
    return len(_records(directory))


def _versions(directory: Path) -> str:
    """Commits, or where older records name none the versions, that the records were made with."""
    commits = {record["commit"][:10] for record in _records(directory) if record.get("commit")}
    versions = {
        f"funcbilevel {record['versions']['funcbilevel']}, jax {record['versions']['jax']}"
        for record in _records(directory)
        if "funcbilevel" in record.get("versions", {})
    }
    return ", ".join(sorted(f"commit {commit}" for commit in commits) or sorted(versions))


def _result_page(directory: Path) -> str:
    name = directory.name
    title = TASKS[name][0] if name in TASKS else OTHERS.get(name, name.replace("-", " ").capitalize())
    parts = [
        f"# {title}\n\n_{_count(directory)} records, made with {_versions(directory)}._ "
        "[What they show and what they do not](index.md).\n"
    ]
    parts += [_figure(path, f"{title}: figure made from the records") for path in sorted(directory.glob("*.png"))]
    texts = [re.sub(r"^# .*\n", "", path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.md"))]
    texts = [re.sub(r"!\[[^]]*\]\([^)]*\)\n*", "", text) for text in texts]  # the figures stand above
    config = directory / "config.json"
    settings = config.read_text(encoding="utf-8").rstrip() if config.exists() else ""
    if settings:
        texts.append(f"## Settings\n\n```json\n{settings}\n```")
    where = f"`benchmarks/results/{name}`"
    again = f"```bash\nfuncbilevel report benchmarks/results/{name}\n```" if settings else ""
    texts.append(
        f"## Records\n\nThe records stand in {where}. {'Table and figure come out again by' * bool(again)}\n\n{again}"
    )
    return "\n\n".join([*parts, *texts])


def _figure(path: Path, alt: str) -> str:
    return f"![{alt}](figures/{path.parent.name}/{path.name})\n"


# The project's own pages, and the gallery's examples.


def project_pages() -> dict[str, str]:
    """Path -> Markdown of what stands at the root of the repository."""
    index = (ROOT / "README.md").read_text(encoding="utf-8")
    index = index.replace("benchmarks/results/README.md", "results/index.md")
    index = re.sub(r"benchmarks/results/([\w-]+)/\w+\.md", r"results/\1.md", index)
    index = re.sub(r"(\]\(|src=\")docs/", r"\1", index)
    index = re.sub(r"\]\((CONTRIBUTING|CHANGELOG)\.md\)", lambda match: f"]({match[1].lower()}.md)", index)
    index = (
        index.replace("](gallery)", "](gallery.md)")
        .replace("[CITATION.cff](CITATION.cff)", "`CITATION.cff`")
        .replace("```bash newcomer", "```bash")
    )
    root = {
        f"{name.lower()}.md": (ROOT / f"{name}.md").read_text(encoding="utf-8")
        for name in ("CONTRIBUTING", "CHANGELOG")
    }
    return {"index.md": index, "gallery.md": gallery_page()} | root


# The gallery: tasks by their committed records, examples by what `docs/execute.py` has kept of them.

TASKS = {  # directory of records -> (title, command)
    "iv": ("Instrumental regression on pictures (dSprites)", "run iv"),
    "demand": ("Demand for tickets (Hartford et al. 2017)", "compare demand"),
    "schooling": ("Returns to schooling (Card 1995)", "run schooling"),
    "cartpole-fresh": (
        "Model-based reinforcement learning: CartPole",
        "compare cartpole --select --selection-steps 15000 --value-bound 100",
    ),
    "pendulum": ("Model-based reinforcement learning: Pendulum", "run pendulum --model-width 32 --value-bound 1630"),
    "fairness": ("Accuracy and parity: leader and follower in one network", "compare fairness"),
    "gates-adult": ("Feature gates on Adult", "run gates --dataset adult"),
    "arm": ("A two-link arm that tracks and saves torque", "run arm"),
    "pathways": ("Attributions inside known gene pathways", "run pathways"),
    "cleaning": ("Data hyper-cleaning: wrong labels found by their weights", "compare cleaning"),
}
OTHERS = {  # further directories of records -> title
    "beside_benchopt": "Beside the field's benchmark",
    "cost": "What a hypergradient costs",
    "devices": "Many devices, on paper",
    "fairness-article": "Adult, the article's settings",
    "fairness-nba": "Accuracy and parity: NBA",
    "fairness-outside": "Adult, beside methods from outside",
    "fairness-outside-removed": "Adult, without the attribute",
    "fairness-published": "Adult, the public code's settings",
    "fairness-two-followers": "Two followers: parity and odds",
    "fairness-two-followers-race": "Two followers: sex and race",
    "gates-adult-fresh": "Feature gates on Adult, fresh seeds",
    "gates": "Feature gates on breast cancer",
    "kernel_rate": "The rate of kernel bilevel optimization",
    "iv-10000": "dSprites, 10,000 samples",
    "peers": "Other libraries",
    "simulated": "The field's quadratic benchmark",
    "schooling-neural": "Returns to schooling, by networks",
}


def gallery_page() -> str:
    """All examples and tasks: figure, command, figures reached, running time."""
    parts = ["# Gallery\n\n## Examples\n\nScripts of at most 80 lines, each at most a minute on two cores.\n"]
    for path in sorted(EXAMPLES.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        title, _, about = ast.get_docstring(ast.parse(source)).partition("\n\n")
        title = " ".join(title.split()).rstrip(".")
        about = re.sub(rf"^python examples/{path.name}.*\n*", "", about)  # the command stands below
        kept = GALLERY / f"{path.stem}.json"
        record = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {"printed": "", "seconds": None}
        figure = f"![What the example draws](gallery/{path.stem}.png)" if kept.with_suffix(".png").exists() else ""
        took = f"About {record['seconds']} s on two cores. " if record["seconds"] else ""
        text = f"It prints:\n\n```text\n{record['printed']}\n```" if record["printed"] else ""
        code = textwrap.indent(f"```python\n{source.rstrip()}\n```", "    ")
        parts.append(
            f"### {title}\n\n{about}\n\n{figure}\n\n```bash\npython examples/{path.name}\n```\n\n"
            f"{took}{text}\n\n"
            f'??? example "{path.name}"\n\n{code}\n'
        )
    parts.append(
        "## Tasks\n\nThe command line's experiments, each with its baselines and controls. [Results](results/index.md) "
        "says what their records show and what is not settled.\n"
    )
    for name, (title, command) in TASKS.items():
        directory = RESULTS / name
        figure = sorted(directory.glob("*.png"))[0]
        records = _records(directory)
        minutes = sum(record["seconds"] for record in records) / 60
        parts.append(
            f"### {title}\n\n![{title}: figure made from the records](results/figures/{name}/{figure.name})\n\n"
            f"```bash\nfuncbilevel {command}\n```\n\n{len(records)} runs on two cores: {minutes:.0f} minutes in all. "
            f"[Table and settings](results/{name}.md)\n"
        )
    return "\n".join(parts)


# MkDocs' events.


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills in the two generated parts of the navigation."""
    generated = {"api/": api_pages(), "results/": result_pages()}
    for entry in config.nav or []:
        (title, path), *_ = entry.items()
        if isinstance(path, str) and path in generated:
            entry[title] = sorted(generated[path], key=lambda page: not page.endswith("index.md"))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, the figures of the results and the examples' figures."""
    for path, text in (api_pages() | result_pages() | project_pages()).items():
        files.append(File.generated(config, path, content=text))
    for figure in sorted(RESULTS.glob("*/*.png")):
        path = f"results/figures/{figure.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, path, abs_src_path=str(figure)))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML."""
    html = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: _mathml(m[1], "inline"), html, flags=re.S)
    return re.sub(
        r'<(div|p) class="arithmatex">\s*\\\[(.*?)\\\]\s*</\1>', lambda m: _mathml(m[2], "block"), html, flags=re.S
    )


def _mathml(formula: str, display: str) -> str:
    made = convert(unescape(formula).strip().replace(r"\arg\min", r"\operatorname*{argmin}"), display=display)
    if unknown := re.findall(r"<m[io]>(\\\w+|&)<", made):
        LOG.warning("%s: no MathML for %s", formula, ", ".join(unknown))
    return made
