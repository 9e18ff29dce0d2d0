"""The documentation: its code runs and prints what it states, its links lead somewhere, its numbers the records'."""

import importlib.util
import inspect
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import pytest

import funcbilevel as fb
from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.statistics import mean_interval
from funcbilevel.tasks.gates import report as gates_report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks/results"


def script(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    return script("hooks")


# The code on the pages.

EXECUTE = script("execute")
SLOW = {"tutorials/functional-problem.md", "howto/instrumental-variables.md", "howto/which-estimator.md"}


@pytest.fixture
def ordinary_jax(tmp_path):
    """As a user has it: with NumPy's rank promotion, float32 at first, and warnings that are only warnings."""
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings(record=True):
        warnings.simplefilter("ignore")
        yield tmp_path
    jax.config.update("jax_enable_x64", False)


def case(page):
    name = page.relative_to(ROOT / "docs").as_posix()
    return pytest.param(page, id=name, marks=[pytest.mark.slow] * (name in SLOW))


@pytest.mark.parametrize("page", [case(page) for page in EXECUTE.pages()])
def test_code_on_a_page_prints_what_the_page_states(page, ordinary_jax):
    blocks = list(EXECUTE.execute(page, ordinary_jax))
    assert [block.printed.rstrip() for block in blocks] == [block.stated.rstrip() for block in blocks]
    for figure in ordinary_jax.glob("*.png"):
        assert page.with_name(figure.name).exists(), f"no {figure.name}; make it by python docs/execute.py {page}"
        assert f"]({figure.name})" in page.read_text(encoding="utf-8")


def test_a_page_that_states_something_else_is_found(ordinary_jax):
    page = ordinary_jax / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text\n2\n```\n", encoding="utf-8")
    first, second = EXECUTE.execute(page, ordinary_jax)
    assert (first.printed, first.stated) == ("", "")
    assert (second.printed, second.stated) == ("1\n", "2\n")


# The site.


@pytest.fixture(scope="module")
def site(hooks, tmp_path_factory):
    """The built site, warnings being errors: dead links and anchors, pages out of the navigation, unknown names."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return directory


def test_site_has_every_page(site, hooks):
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    pages += [*hooks.api_pages(), *hooks.result_pages(), *hooks.project_pages()]
    assert len(pages) > 60
    assert not [page for page in pages if not (site / page).with_suffix(".html").exists()]


def test_formulas_are_mathml(site):
    text = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.html"))
    assert text.count("<math") > 100
    assert "arithmatex" not in text
    assert ":math:`" not in text


def test_search_finds_every_public_name(site):
    index = (site / "search/search_index.json").read_text(encoding="utf-8")
    assert not [name for name in fb.__all__ if f"funcbilevel.{name}" not in index]


def test_gallery_is_made_without_what_examples_have_left(hooks, monkeypatch, tmp_path):
    monkeypatch.setattr(hooks, "GALLERY", tmp_path)
    page = hooks.gallery_page()
    assert all(f"python examples/{path.name}" in page for path in (ROOT / "examples").glob("*.py"))
    assert "](gallery/" not in page


# Public names.


def test_every_public_name_stands_on_exactly_one_page(hooks):
    listed = Counter(name for names in hooks.api_names().values() for name in names)
    assert listed == Counter(fb.__all__)
    assert "more" not in hooks.api_names(), "give the module of these names a page in docs/hooks.py"
    pages = hooks.api_pages()
    for name in fb.__all__:
        assert sum(text.split().count(f"funcbilevel.{name}") for text in pages.values()) == 1


@pytest.mark.parametrize("name", sorted(name for name in fb.__all__ if not inspect.isclass(getattr(fb, name))))
def test_every_public_function_has_an_example_that_runs(name):
    example = getattr(fb, name).__doc__.partition("Example")[2]
    assert re.search(r"^ *>>> .*fb\.", example, flags=re.MULTILINE)  # tests/test_package.py runs it


def test_everything_in_one_page_names_every_estimator_and_linear_solver(hooks):
    text = (ROOT / "docs/howto/overview.md").read_text(encoding="utf-8")
    names = hooks.api_names()
    functions = [name for page in ("estimators", "linear-solvers") for name in names[page] if name[0].islower()]
    assert not [name for name in functions if f"fb.{name}" not in text]


# The README.

LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")


def links(path):
    return [first or second for first, second in LINK.findall(path.read_text(encoding="utf-8"))]


def slug(heading):
    return re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/README.md"])
def test_links_lead_somewhere(name):
    path = ROOT / name
    for link in links(path):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        found = path.parent / target if target else path
        assert found.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_readme_is_short():
    assert len(README.split()) <= 900


def test_readme_names_only_what_there_is():
    assert not [name for name in set(re.findall(r"\bfb\.(\w+)", README)) if not hasattr(fb, name)]
    stated = re.search(r"(\d+) published stochastic solvers", README)
    assert int(stated[1]) == sum(method.kind == "solver" for method in fb.methods().rows)


# Its numbers, and those of the results page. Tables of results are made of the records: see tests/test_reports.py.


def records(name):
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def swept(method, value, **settings):
    """A metric of the cost sweeps, or its ratio to the floor's, at these settings, where it was measured last."""
    defaults = {"model": "mlp", "depth": 4, "width": 256, "batch": 512, "steps": 20, "outputs": 1, "outer": 10}
    wanted = (method, defaults | settings)
    *_, found = [r["metrics"] for r in records("cost/sweeps.jsonl") if (r["method"], r["settings"]) == wanted]
    return found["seconds"] / found["floor_seconds"] if value == "ratio" else found["temp_bytes"] / 2**20


def row(name, *first, table="table.md"):
    """The cells of the first row of a table that begins with these."""
    lines = (RESULTS / name / table).read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return next(c for c in cells if tuple(c[: len(first)]) == first)


def memory():
    methods = ("funcid-learned", "aid-cg", "itd")
    return [f"{swept(method, 'MiB', what='step', depth=8):.1f}" for method in methods]


def overhead():
    ratios = [
        r["metrics"]["seconds"] / r["metrics"]["floor_seconds"]
        for r in records("cost/sweeps.jsonl")
        if r["method"] == "funcid-learned" and r["settings"]["what"] == "step"
    ]
    return [f"{min(ratios):.2f}", f"{max(ratios):.2f}", str(len(ratios))]


def exactness():
    found = {r["method"]: r["metrics"].get("max_relative_difference") for r in records("schooling/runs.jsonl")[:8]}
    return [f"{max(found[method] for method in ('funcid-linear', 'funcid-learned', 'aid-cg', 'itd')):.1e}"]


def jaxopt():
    ratios = [
        r["metrics"]["ratio"]
        for r in records("peers/runs.jsonl")
        if (r["method"], r["settings"]["peer"]) == ("aid-cg", "jaxopt")
    ]
    return [f"{min(ratios):.2f}", f"{max(ratios):.2f}"]


def transformer():
    of = {"what": "gradient", "model": "transformer", "batch": 64}
    methods = ("funcid-learned", "aid-cg", "itd", "itd-remat")
    mib = [f"{swept(method, 'MiB', **of):,.0f}" for method in methods]
    funcid, aid, itd, remat = (swept(method, "ratio", **of) for method in methods)
    return [*mib, f"{funcid:.2f}", f"{aid:.2f}", f"{itd:.1f}", f"{remat:.1f}"]


def convolutional():
    of = {"what": "gradient", "model": "cnn", "batch": 64}
    funcid, aid, itd = (swept(method, "ratio", **of) for method in ("funcid-learned", "aid-cg", "itd"))
    return [f"{funcid:.2f}", f"{aid:.2f}", f"{itd:.1f}"]


def by_ridge():
    def median(name, method):
        return statistics.median(
            r["metrics"]["test_mse"] for r in records(name) if r["method"] == method and r["seed"] < 7
        )

    return [f"{median('iv/ridge-20-runs.jsonl', 'funcid-linear'):.2f}", f"{median('iv/runs.jsonl', 'dfiv'):.2f}"]


def interval(text):
    """`[+1.35, +1.91]`, `121..161` or `0% [0%, 30%]` as numbers."""
    return [abs(float(x)) for x in re.findall(r"[-+]?\d+(?:\.\d+)?", text.replace("..", " "))]


RUNNER_UP = ("funcid-corrected", "32, 50k", "0.003")  # by selection; the row is the second one of its method


def returns(name, *first):
    cells = row(name, *first)
    return [cells[5], *re.findall(r"\d+", cells[6])]


def both_widths(method):
    return lambda: [x for model in ("3, 50k", "32, 50k") for x in returns("cartpole-fresh", method, model)]


def paired_difference():
    cells = row("cartpole-fresh", "funcid-corrected", "3, 50k", table="paired.md")
    return [*(x.strip("+") for x in (cells[3], *cells[4].split(".."))), cells[7]]


def beside_likelihood(model):
    cells = row("cartpole-fresh", "funcid-corrected", model, table="paired.md")
    both = (returns("cartpole-fresh", method, model) for method in ("funcid-corrected", "mle"))
    return [*itertools.chain(*both), cells[5], *cells[6].split("..")]


IN_TRAINING = ("lagrangian", "exponentiated-gradient", "aid-cg")


def area(name, method):
    """The area of a method beside those from outside, and its interval."""
    return [f"{x:.2f}" for x in interval(row(name, method)[8])]


def without_attribute_difference():
    cell = row("fairness-outside-removed", "aid-cg")[9]
    assert cell.startswith("-")
    less, low, high = (f"{x:.2f}" for x in interval(cell))
    return [less, high, low]


def as_many_at_random():
    """What random sets lose to those of aid-cg, in points, at the settings where these are chosen."""
    where = store.Store(RESULTS / "gates-adult-fresh", "gates")
    of = {block.method: block for block in gates_report.compared(store.records(where))}
    shown = []
    for tolerance in gates_report.TOLERANCES:
        (cells,) = (row.cells for row in gates_report.summarise([*of.values()], tolerance) if row.method == "aid-cg")
        own, random = (gates_report.at_cells(of[m].metrics["accuracy"], cells, 0.0) for m in ("aid-cg", "random-mask"))
        counts = [gates_report.at_cells(of[m].metrics["num_features"], cells, 0.0) for m in ("aid-cg", "random-mask")]
        assert min(cells) >= 0
        assert counts[0] == pytest.approx(counts[1])
        shown += [f"{x:.1f}" for x in mean_interval((100 * (own - random)).tolist())]
    return shown


def leak():
    rows = [("leaky-alternating",), ("frozen-follower",), ("alternating",), ("single-objective",)]
    return [cell for first in rows for cell in row("fairness-published", *first)[3:5]]


def separated():
    """The largest multiple of 0.05 below the mean AUC of each of the methods."""
    names = ("itd", "darts", "saba", "soba", "amigo", "stocbio")
    least = min(interval(row("cleaning", name)[2])[0] for name in names)
    return [f"{math.floor(20 * least) / 20:.2f}"]


def layers():
    of = {(r["settings"]["layer"], r["method"]): r["metrics"]["seconds"] for r in records("implicit/runs.jsonl")}
    ratios = [of[name, "jaxopt"] / ours for (name, library), ours in of.items() if library == "funcbilevel"]
    return [f"{x:.2f}" for x in (min(ratios), max(ratios))]


NUMBER = r"([\d.,]*\d(?:e-\d+)?)"
STATED = [  # (page, text with # for each number, what the records say)
    *(
        (page, "needs # MiB of temporary memory by FuncID, # by AID with conjugate gradients, # by ITD", memory)
        for page in ("README", "results")
    ),
    ("README", "takes # to # times that of the bare training steps in it, over # sizes of a network", overhead),
    ("README", "find two-stage least squares to a relative #", exactness),
    ("results", "find its coefficients to a relative #", exactness),
    ("README", "it takes # to # times [our time]", jaxopt),
    ("results", "jaxopt takes # to # times our time", jaxopt),
    (
        "results",
        "in the median, from # (a quadratic program of 35 unknowns, where we make a product more) to #,",
        layers,
    ),
    (
        "results",
        "needs # MiB by FuncID, # by AID, # by ITD (# rematerialised), and takes #, # and # (#) times",
        transformer,
    ),
    ("results", "Through a convolutional network it takes #, # and # times", convolutional),
    ("results", "medians of # and # over seeds 0 to 6", by_ridge),
    (
        "results",
        "reaches an area of # on a plain network and # on boosted trees",
        lambda: [area("fairness-outside", name)[0] for name in ("thresholds", "boosting-thresholds")],
    ),
    (
        "results",
        "have an area of # (# to #) on the plain network, # on logistic regression, # (# to #) on boosted trees",
        lambda: [
            *area("fairness-outside", "thresholds"),
            area("fairness-outside", "logistic-thresholds")[0],
            *area("fairness-outside", "boosting-thresholds"),
        ],
    ),
    (
        "results",
        "ThresholdOptimizer has #, its ExponentiatedGradient over logistic regressions #.",
        lambda: [area("fairness-outside", name)[0] for name in ("threshold-optimizer", "exponentiated-gradient")],
    ),
    (
        "results",
        "has # (# to #), ExponentiatedGradient over logistic regressions # (# to #), `aid-cg` # (# to #),",
        lambda: [x for name in IN_TRAINING for x in area("fairness-outside-removed", name)],
    ),
    (
        "results",
        "less than the Lagrangian by # (# to #)",
        without_attribute_difference,
    ),
    (
        "results",
        "The gap in equalized odds is then #, # and #.",
        lambda: [row("fairness-outside-removed", name)[6].split()[0] for name in IN_TRAINING],
    ),
    ("results", "bilevel training (`aid-cg`) #.", lambda: [f"{float(row('fairness', 'aid-cg')[10]):.1f}"]),
    (
        "results",
        "opens the equalized-odds gap: #, where accuracy alone has #.",
        lambda: [row("fairness", name)[6] for name in ("aid-cg", "single-objective")],
    ),
    (
        "results",
        "fewer columns than the lasso, too (# against #), and at one point's the saving is #% (# to #)",
        lambda: [
            *(row("gates-adult", "0.5 point", name)[2] for name in ("random-mask", "lasso")),
            *(f"{x:.0f}" for x in interval(row("gates-adult", "1 point", "aid-cg")[7])),
        ],
    ),
    (
        "results",
        "Gates need # of 13 columns to stay within half a point of all of them, random masks #, the lasso #",
        lambda: [row("gates-adult-fresh", "0.5 point", name)[2] for name in ("aid-cg", "random-mask", "lasso")],
    ),
    (
        "results",
        "The saving against the lasso is #% (# to #) and #% (# to #)",
        lambda: [
            f"{x:.0f}"
            for tolerance in ("0.5 point", "1 point")
            for x in interval(row("gates-adult-fresh", tolerance, "aid-cg")[7])
        ],
    ),
    (
        "results",
        "within one point #, # and #.",
        lambda: [row("gates-adult-fresh", "1 point", name)[2] for name in ("aid-cg", "random-mask", "lasso")],
    ),
    ("results", "loses # points more (# to #), at one point's tolerance # (# to #)", as_many_at_random),
    *(
        ("results", text, partial(beside_likelihood, f"{width}, 50k"))
        for width, text in (
            (3, "At width 3 `funcid-corrected` has # (# to #), maximum likelihood # (# to #): # times (# to #)"),
            (32, "At width 32 they have # (# to #) and # (# to #): # times (# to #)"),
        )
    ),
    ("results", "it is # more in the mean (# to #), by Wilcoxon's test p = #:", paired_difference),
    ("results", "on five seeds it has # (# to #)", lambda: returns("cartpole-fresh", *RUNNER_UP)),
    ("results", "(`funcid-pointwise`, the published one) # (# to #) and # (# to #)", both_widths("funcid-pointwise")),
    ("results", "(`funcid-public`) # (# to #) and # (# to #)", both_widths("funcid-public")),
    ("results", "(`vep`) # (# to #) and # (# to #)", both_widths("vep")),
    (
        "results",
        "(+# thousandths, # to #)",
        lambda: [f"{x:.1f}" for x in interval(row("fairness", "aid-cg")[11])],
    ),
    (
        "results",
        "are # and # with the leak, # and # with the leak and a *frozen* follower, # and # without it, # and #",
        leak,
    ),
    (
        "results",
        "linear two-stage least squares has # (# to #)",
        lambda: [row("schooling-neural", "iv2sls")[1], *row("schooling-neural", "iv2sls")[3].split(" to ")],
    ),
    (
        "results",
        "(`aid-cg` # times as much, `itd` #, `alternating` #)",
        lambda: [f"{interval(row('arm', name)[4])[0]:.2f}" for name in ("aid-cg", "itd", "alternating")],
    ),
    (
        "results",
        "rises from # to # and the AUROC of the driving genes from # to #,",
        lambda: [
            f"{interval(row('pathways', name)[column])[0]:.2f}"
            for column in (4, 6)
            for name in ("single-objective", "aid-cg")
        ],
    ),
    ("results", "separate right from wrong labels with an AUC above #;", separated),
    (
        "results",
        "falls as n to the power -#, by",
        lambda: [f"{-records('kernel_rate/runs.jsonl')[0]['metrics']['slope']:.2f}"],
    ),
]


@pytest.mark.parametrize(("page", "text", "found"), STATED, ids=[f"{page}: {text[:30]}" for page, text, _ in STATED])
def test_numbers_are_those_of_the_records(page, text, found):
    path = ROOT / "README.md" if page == "README" else RESULTS / "README.md"
    stated = " ".join(path.read_text(encoding="utf-8").split())
    matches = list(re.finditer(re.escape(text).replace(r"\#", NUMBER), stated))
    assert len(matches) == 1, f"{path} no longer says: {text}"
    assert list(matches[0].groups()) == found()
