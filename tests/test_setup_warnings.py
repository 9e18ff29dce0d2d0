"""What is no error but can hardly be meant: said once, while tracing."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import funcbilevel as fb

N = 6
X, Y = jnp.ones((N, 3)), jnp.ones(N)
KEY = jax.random.key(0)
SGD = optax.sgd(0.1)


def told(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(call)
    return [str(w.message) for w in caught if w.category is UserWarning]


# A prediction [n, 1] against targets [n], or the other way round.

Objective = Callable[[Any, Any, Any], Any]


def mse(omega: Any, v: Any, batch: Any) -> Any:
    return jnp.mean((v - omega * batch[1]) ** 2)


def fitting(omega: Any, v: Any, batch: Any) -> Any:
    """An objective that suits every prediction."""
    return sum(jnp.sum((leaf - omega) ** 2) for leaf in jax.tree.leaves(v))


def rbf(a: Any, b: Any) -> Any:
    return jnp.exp(-(jnp.sum(a**2, 1)[:, None] + jnp.sum(b**2, 1) - 2 * a @ b.T))


def in_a_loop(omega: Any, v: Any, batch: Any) -> Any:
    return jax.lax.scan(lambda total, _: (total + mse(omega, v, batch), None), 0.0, jnp.arange(3))[0]


def nll(omega: Any, v: Any, batch: Any) -> Any:
    return jnp.mean((v["mean"] - omega * batch[1]) ** 2 * jnp.exp(-v["log"]) + v["log"])


def column(theta: Any, x: Any) -> Any:  # [n, 1]
    return x @ theta


def row(theta: Any, x: Any) -> Any:  # [n]
    return (x @ theta)[:, 0]


def hypergradient(inner: Objective, apply: Any, y: Any, outer: Objective = fitting) -> list[str]:
    problem = fb.FunctionalProblem(inner, outer)
    model = fb.from_function(lambda key, x: jnp.zeros((3, 1)), apply)
    batch, estimator = (X, y), fb.aid(fb.cg(2))
    with jax.numpy_rank_promotion("allow"):
        return told(lambda: fb.hypergradient(problem, model, estimator, 1.0, jnp.zeros((3, 1)), batch, batch))


PAIRED: dict[str, tuple[Any, ...]] = {
    "column against row": (mse, column, Y, fitting, r"(6, 1) and (6,)"),
    "row against column": (mse, row, Y[:, None], fitting, r"(6,) and (6, 1)"),
    "outer": (fitting, column, Y, mse, "outer_objective broadcasts"),
    "jitted": (jax.jit(mse), column, Y, fitting, "(6, 6)"),
    "in a loop": (in_a_loop, column, Y, fitting, "(6, 6)"),
    "weights": (lambda w, v, b: jnp.mean(w * b[1] * (v - 1.0) ** 2), column, Y, fitting, "(6, 6)"),
    "weights beside targets": (
        lambda w, v, b: jnp.mean(b[1]["w"] * (v - w * b[1]["y"]) ** 2),
        column,
        {"w": Y, "y": Y[:, None]},
        fitting,
        "(6, 6)",
    ),
    "several leaves": (nll, lambda theta, x: {"mean": x @ theta, "log": x @ theta}, Y, fitting, "['log']"),
    "one of several leaves": (
        lambda w, v, b: jnp.mean((v["f"][0] - w * b[1]) ** 2) + jnp.sum(v["g"]),
        lambda theta, x: {"f": [x @ theta], "g": x @ theta @ jnp.ones((1, 2))},
        Y,
        fitting,
        "prediction['f/0'] has shape (6, 1); let the model return (6,)",
    ),
    "beside a kernel matrix of the inputs": (
        lambda w, v, b: mse(w, v, b) + w * jnp.mean(rbf(b[0], b[0])),
        column,
        Y,
        fitting,
        "(6, 6)",
    ),
}


@pytest.mark.parametrize("name", PAIRED)
def test_samples_that_are_paired_by_broadcasting_are_told(name: str) -> None:
    inner, apply, y, outer, expected = PAIRED[name]
    (message,) = hypergradient(inner, apply, y, outer)
    assert expected in message
    assert "all pairs of samples" in message


MEANT: dict[str, tuple[Any, ...]] = {
    "columns": (mse, column, Y[:, None]),
    "rows": (mse, row, Y),
    "MMD": (lambda w, v, b: jnp.mean(rbf(v, v)) - 2 * jnp.mean(rbf(v, w * b[1])), column, Y[:, None]),
    "MMD of rows": (lambda w, v, b: jnp.mean(rbf(v[:, None], v[:, None] * w)), row, Y),
    "Gram matrix": (lambda w, v, b: w * jnp.mean(v @ v.T), column, Y),
    "differences by transposition": (lambda w, v, b: w * jnp.mean((v - v.T) ** 2), column, Y),
    "differences of rows": (lambda w, v, b: w * jnp.mean((v[:, None] - v) ** 2), row, Y),
    "differences by indexing": (lambda w, v, b: w * jnp.mean((v - v[:, 0]) ** 2), column, Y),
    "all pairs with the targets": (lambda w, v, b: jnp.mean((v[:, None] - w * b[1]) ** 2), row, Y),
    "all pairs with targets of another axis": (lambda w, v, b: jnp.mean((v - w * b[1][None]) ** 2), column, Y),
    "as many outputs as samples": (
        lambda w, v, b: jnp.mean((v - w * b[1]) ** 2),
        lambda theta, x: x @ theta @ jnp.ones((1, N)),
        Y,
    ),
    "a kernel matrix of the inputs": (lambda w, v, b: mse(w, v, b) + w * jnp.mean(rbf(b[0], b[0])), row, Y),
    "several columns": (mse, lambda theta, x: x @ theta @ jnp.ones((1, 2)), jnp.ones((N, 1))),
}


@pytest.mark.parametrize("name", MEANT)
def test_pairs_that_are_meant_are_not_told(name: str) -> None:
    assert hypergradient(*MEANT[name]) == []


# A hypergradient that is zero.


def parametric(inner_sees: bool, outer_sees: bool) -> fb.ParametricProblem:
    def inner(omega: Any, theta: Any, batch: Any) -> Any:
        return jnp.sum((theta - (omega if inner_sees else 1.0)) ** 2)

    def outer(omega: Any, theta: Any, batch: Any) -> Any:
        return jnp.sum(theta**2) + (omega**2 if outer_sees else 0.0)

    return fb.ParametricProblem(inner, outer)


NOTHING_MOVES = "the hypergradient is zero"
FOR_EVER = "inner_objective does not depend on outer_params, so the implicit part"

# estimator, whether the inner and the outer objective see outer_params, and parts of the warning
ZERO: list[tuple[fb.Estimator, bool, bool, tuple[str, ...]]] = [
    (fb.aid(fb.cg(2)), True, False, ()),
    (fb.aid(fb.cg(2)), False, True, (FOR_EVER, "aid(cg(2))")),
    (fb.aid(fb.cg(2)), False, False, (FOR_EVER, NOTHING_MOVES)),
    (fb.itd(1), False, True, (FOR_EVER, "itd(1)")),
    (fb.value_penalty(SGD, 1, 1.0), False, True, (FOR_EVER, "value_penalty(sgd, 1, 1.0)")),
    (fb.alternating(), True, True, ()),
    (fb.alternating(), False, True, ()),
    (fb.alternating(), True, False, ("outer_objective does not depend on outer_params", NOTHING_MOVES)),
]


@pytest.mark.parametrize(("estimator", "inner_sees", "outer_sees", "parts"), ZERO)
def test_a_hypergradient_that_is_zero_for_ever_is_told_once(
    estimator: fb.Estimator, inner_sees: bool, outer_sees: bool, parts: tuple[str, ...]
) -> None:
    problem = parametric(inner_sees, outer_sees)
    solver = fb.bilevel(problem, None, estimator, inner_optimizer=SGD, outer_optimizer=SGD)

    def steps() -> Any:
        state = solver.init(KEY, 1.0, None, jnp.ones(2))
        for _ in range(3):
            state, _ = solver.step(state, None, None)
        return state

    def once() -> Any:
        return fb.hypergradient(problem, None, estimator, 1.0, jnp.ones(2), None, None, inner_optimizer=SGD)

    for call in (steps, once):
        messages = told(call)
        assert len(messages) == bool(parts)
        for part in parts:
            assert part in messages[0]


def test_alternating_reaches_outer_params_through_a_linear_head() -> None:
    features = fb.from_function(lambda key, x: jnp.ones((3, 2)), lambda theta, x: x @ theta)
    problem = fb.FunctionalProblem(
        lambda w, v, b: jnp.mean((v - w) ** 2), lambda w, v, b: jnp.mean((v[:, 0] - b[1]) ** 2)
    )
    model = fb.variable_projection(features, 1)
    arguments = (1.0, jnp.ones((3, 2)), (X, Y), (X, Y))
    assert told(lambda: fb.hypergradient(problem, model, fb.alternating(), *arguments)) == []
