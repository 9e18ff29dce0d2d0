"""The examples: short scripts that say what they do, print what they find and draw one figure; run in reduced form."""

import ast
import contextlib
import importlib.util
import inspect
import re
from pathlib import Path

import jax
import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
IMPLICIT = {"custom_root", "few_shot", "implicit_ridge", "svm_dual"}


@pytest.fixture(autouse=True)
def ordinary_jax():
    """As a user has it: with NumPy's rank promotion."""
    with jax.numpy_rank_promotion("allow"):
        yield


def numbers(printed, pattern):
    """The numbers that a pattern's groups find in what an example printed, once or more."""
    found = re.findall(pattern, printed)
    assert found, f"{pattern} is not in:\n{printed}"
    return [float(x) for x in (found[0] if isinstance(found[0], tuple) else found)]


def below(first, second):
    """What is printed for the first stays below what is for the second."""

    def check(printed):
        (low,), (high,) = numbers(printed, first), numbers(printed, second)
        assert low < high

    return check


def custom_root(printed):
    """The equation's own derivative at the prices printed, by NumPy."""
    import numpy as np

    prices = np.array(numbers(printed, r"log prices \[ *([\d.]+) +([\d.]+) +([\d.]+) *\]"))
    cross = np.array([[1.0, -0.3, 0.1], [0.2, 1.0, -0.4], [-0.1, 0.3, 1.0]])
    demand = np.exp(1.0 - cross @ (prices + 0.1))
    np.testing.assert_allclose(demand, np.exp(0.5 * prices), rtol=2e-3)
    by_prices = -demand[:, None] * cross - np.diag(0.5 * np.exp(0.5 * prices))
    row = numbers(printed, r"by the taxes\n\[\[ *(-?[\d.]+) +(-?[\d.]+) +(-?[\d.]+) *\]")
    np.testing.assert_allclose(row, np.linalg.solve(by_prices, demand[:, None] * cross)[0], atol=3e-3)


def feature_gates(printed):
    kept = numbers(printed, r"price [\d.]+: (\d+) columns")
    assert len(kept) == 8
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < 15


def implicit_ridge(printed):
    slopes = numbers(printed, r"slope ([-+\de.]+)")
    assert abs(slopes[-1]) < 0.02 * abs(slopes[0])


def overparametrised(printed):
    (plain,), (corrected,) = (
        numbers(printed, r"FuncID  .*error +([\d.e+-]+)  e"),
        numbers(printed, r"corrected.*error +([\d.e+-]+)  e"),
    )
    assert corrected < 0.2 * plain


# Stem -> (arguments of main, what the figures that it prints have to satisfy).
REDUCED = {
    "custom_root": ({"num_points": 3}, custom_root),
    "data_cleaning": ({"num_outer_steps": 40}, below(r", ([\d.]+)% of those", r"wrong labels: ([\d.]+)%")),
    "dataset_distillation": (
        {"num_outer_steps": 30},
        below(r"real pictures: test accuracy ([\d.]+)", r"distilled pictures: ([\d.]+)"),
    ),
    "fairness_leak": (
        {"num_outer_steps": 100},
        below(r"leak, follower.*scores ([\d.]+)", r"alone: .*scores ([\d.]+)"),
    ),
    "feature_gates": ({"num_outer_steps": 100}, feature_gates),
    "few_shot": ({"num_outer_steps": 100}, below(r"step 100: .* ([\d.]+)", r"step 1: .* ([\d.]+)")),
    "implicit_ridge": ({"num_steps": 3}, implicit_ridge),
    "instrumental_regression": (
        {"num_steps": 10, "num_members": 2},
        below(r"NeuralIV: .*error ([\d.]+)", r"regression: .*error ([\d.]+)"),
    ),
    "logistic_penalties": (
        {"num_outer_steps": 20},
        below(r"learned, best: test loss ([\d.]+)", r"equal penalties: test loss ([\d.]+)"),
    ),
    "loss_weights": (
        {"num_outer_steps": 40},
        below(r"learned: test error ([\d.]+)", r"equal weights: test error ([\d.]+)"),
    ),
    "maml": ({"num_outer_steps": 40}, below(r"MAML: .*last ([\d.]+)\ni", r"\AMAML: .*first ([\d.]+)")),
    "overparametrised": ({"num_inner_steps": 400, "num_dampings": 1}, overparametrised),
    "quick_start": (
        {"num_outer_steps": 100},
        below(r"NNX: mean squared error to the truth ([\d.]+)", r"least squares: .*truth ([\d.]+)"),
    ),
    "ridge_penalties": (
        {"num_outer_steps": 100},
        below(r"AID: test error ([\d.]+)", r"least squares: test error ([\d.]+)"),
    ),
    "svm_dual": ({"num_outer_steps": 5}, below(r", then ([\d.]+); penalty", r"validation loss ([\d.]+),")),
    "world_model": (
        {"num_outer_steps": 150},
        below(r"by values: .* values ([\d.]+)", r"by likelihood: .* values ([\d.]+)"),
    ),
}


def test_every_example_is_run():
    assert REDUCED.keys() == {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_is_short_and_says_what_it_does(path):
    text = path.read_text(encoding="utf-8")
    title, blank, *about = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    assert title
    assert not blank
    assert len(" ".join(about)) > 60
    assert len(text.splitlines()) <= (60 if path.stem in IMPLICIT else 80)
    assert text.endswith('if __name__ == "__main__":\n    main()\n')


@pytest.mark.filterwarnings("ignore:train. the inner solution is not a stationary point")  # few steps
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs_in_reduced_form(path, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments, check = REDUCED[path.stem]
    full = {name: parameter.default for name, parameter in inspect.signature(module.main).parameters.items()}
    assert all(full[name] > value for name, value in arguments.items())
    with contextlib.chdir(tmp_path):
        module.main(**arguments)
    assert [file.name for file in tmp_path.iterdir()] == [f"{path.stem}.png"]
    assert (tmp_path / f"{path.stem}.png").read_bytes().startswith(b"\x89PNG")
    check(capsys.readouterr().out)
