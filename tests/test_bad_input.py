"""What a user can get wrong: refused while tracing, in words that help; and NaN at run time, which must not spread."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest
from flax import linen, nnx

import funcbilevel as fb

N = 6
X, Y = jnp.ones((N, 3)), jnp.ones(N)
BATCH = (X, Y)
KEY = jax.random.key(0)
SGD = optax.sgd(0.1)


def inner_objective(omega: Any, v: Any, batch: Any) -> Any:
    return jnp.mean((v - omega * batch[1]) ** 2)


def outer_objective(omega: Any, v: Any, batch: Any) -> Any:
    return jnp.mean((v - batch[1]) ** 2) + 0.0 * omega


def problem(inner: Any = inner_objective, outer: Any = outer_objective, **kwargs: Any) -> fb.FunctionalProblem:
    return fb.FunctionalProblem(inner, outer, **kwargs)


def parametric(
    inner: Any = lambda omega, theta, batch: jnp.sum((theta - omega) ** 2),
    outer: Any = lambda omega, theta, batch: jnp.sum(theta**2) + 0.0 * omega,
    **kwargs: Any,
) -> fb.ParametricProblem:
    return fb.ParametricProblem(inner, outer, **kwargs)


def model(apply: Any = lambda theta, x: jnp.dot(x, theta)) -> fb.Model:
    return fb.from_function(lambda key, x: jnp.zeros(3), apply)


def linear(features: Any) -> fb.Estimator:
    return fb.funcid(fb.linear_adjoint(features))


def learned(apply: Any = None, **kwargs: Any) -> fb.Estimator:
    return fb.funcid(fb.learned_adjoint(SGD, 2, model=None if apply is None else model(apply), **kwargs))


POINTWISE_ADJOINT = fb.pointwise_adjoint()
POINTWISE = fb.funcid(POINTWISE_ADJOINT)
PROJECTED = fb.variable_projection(model(lambda theta, x: x * theta[None]), 1)

# The three ways in. Everything happens under `jax.eval_shape`: no number is ever computed.

VALID: dict[str, Any] = {
    "problem": problem(),
    "model": model(),
    "estimator": POINTWISE,
    "outer_params": 1.0,
    "inner_params": jnp.zeros(3),
    "inner_batch": BATCH,
    "outer_batch": BATCH,
    "key": KEY,
}
PARAMETRIC = {"problem": parametric(), "model": None, "estimator": fb.alternating()}


def hypergradient(changes: dict[str, Any]) -> Any:
    return jax.eval_shape(lambda: fb.hypergradient(**VALID | changes))


def bilevel(problem: Any, model: Any, estimator: Any, **kwargs: Any) -> fb.BilevelSolver:
    return fb.bilevel(problem, model, estimator, **{"inner_optimizer": SGD, "outer_optimizer": SGD, **kwargs})


def init(changes: dict[str, Any]) -> Any:
    a = VALID | changes
    solver = bilevel(a["problem"], a["model"], a["estimator"])
    return jax.eval_shape(lambda: solver.init(a["key"], a["outer_params"], a["inner_batch"], a["inner_params"]))


def step(changes: dict[str, Any]) -> Any:
    """On a state put together by hand, so that nothing is refused before."""
    a = VALID | changes
    solver = bilevel(a["problem"], a["model"], a["estimator"])

    def trace() -> Any:
        omega = jax.tree.map(jnp.asarray, a["outer_params"])
        fit = fb.FitState(a["inner_params"], SGD.init(a["inner_params"]), ())
        warm_start = a["estimator"].init(KEY, a["problem"], a["model"], fit, a["inner_batch"])
        state = fb.BilevelState(
            jnp.zeros((), jnp.int32), omega, fit.params, (), fit.opt_state, SGD.init(omega), warm_start, KEY
        )
        return solver.step(state, a["inner_batch"], a["outer_batch"])

    return jax.eval_shape(trace)


ENTRIES = {"hypergradient": hypergradient, "init": init, "step": step}
ALL, WITH_OUTER, STARTS = ("hypergradient", "init", "step"), ("hypergradient", "step"), ("hypergradient", "init")


def test_what_the_cases_depart_from_is_valid() -> None:
    for changes in ({}, PARAMETRIC, {"estimator": learned()}, {"estimator": linear(lambda theta, x: x)}):
        for entry in ENTRIES.values():
            entry(changes)


class Case(NamedTuple):
    """A misuse, and patterns for the parts of the message: the argument, what it got, what it wanted, what to do."""

    changes: dict[str, Any]
    error: type[Exception]
    argument: str
    got: str
    expected: str
    mend: str
    entries: tuple[str, ...] = ALL


def not_scalar(level: str, entries: tuple[str, ...]) -> Case:
    changes = {"problem": problem(**{level: lambda omega, v, batch: (v - omega * batch[1]) ** 2})}
    return Case(changes, ValueError, f"{level}_objective", r"got shape \(6,\)", "a scalar", "jnp.mean", entries)


def not_float(level: str, dtype: str, value: Any, entries: tuple[str, ...]) -> Case:
    changes = {"problem": problem(**{level: value})}
    mend = "compute it from floating-point values"
    return Case(changes, TypeError, f"{level}_objective", f"got dtype {dtype}", "a floating-point", mend, entries)


def not_a_value(value: Any, got: str, mend: str) -> Case:
    changes = {"problem": problem(lambda omega, v, batch: value)}
    return Case(changes, TypeError, "inner_objective", got, "must return a scalar", mend)


def leading_axis(apply: Any, shape: str) -> Case:
    expected = r"the leading axis of the inputs of inner_batch \(6\)"
    return Case({"model": model(apply)}, ValueError, "prediction", f"has shape {shape}", expected, "one row per sample")


def unlike_adjoint(apply: Any, error: type[Exception], got: str, expected: str) -> Case:
    changes = {"estimator": learned(apply)}
    return Case(
        changes, error, "learned_adjoint: .*model's output", got, expected, "give learned_adjoint a model", WITH_OUTER
    )


def bad_features(features: Any, got: str) -> Case:
    changes = {"estimator": linear(features)}
    return Case(changes, ValueError, "features", got, r"shape \[n, p\] with n = 6", "one row", WITH_OUTER)


def not_floats(value: Any, name: str, got: str) -> Case:
    return Case({"outer_params": value}, TypeError, name, f"got {got}", "float", "jnp.asarray|array of floats", STARTS)


def empty(name: str, value: Any, entries: tuple[str, ...] = STARTS) -> Case:
    return Case({name: value}, ValueError, name, "empty pytree", "at least one array", "it must hold", entries)


def ignores_inner(inner: Any) -> Case:
    return Case({"problem": problem(inner)}, ValueError, "inner_objective", *IGNORED)


IGNORED = ("does not depend on the prediction", "nothing to fit", "use the second argument, without .*stop_gradient")


def ignores_both(outer: Any) -> Case:
    got = "depends on neither the prediction nor outer_params"
    changes = {"problem": problem(outer=outer)}
    return Case(
        changes, ValueError, "outer_objective", got, "identically zero", "use the first or the second", WITH_OUTER
    )


def without_v(omega: Any, v: Any, batch: Any) -> Any:
    return jnp.mean((omega * batch[1]) ** 2)


def stopped_v(omega: Any, v: Any, batch: Any) -> Any:
    return inner_objective(omega, jax.lax.stop_gradient(v), batch)


def scanned_without_v(omega: Any, v: Any, batch: Any) -> Any:
    return jax.lax.scan(lambda total, y: (total + omega * y, None), 0.0 * jnp.sum(batch[1]), batch[1])[0]


def constant(omega: Any, v: Any, batch: Any) -> Any:
    return jnp.mean(batch[1])


def stopped(omega: Any, v: Any, batch: Any) -> Any:
    return jax.lax.stop_gradient(inner_objective(omega, v, batch))


def bad_key(value: Any, got: str, expected: str, mend: str, entries: tuple[str, ...] = STARTS) -> Case:
    return Case({"key": value}, TypeError, r"(init|hypergradient): key", got, expected, mend, entries)


def complex_leaf(argument: str, value: Any, name: str) -> Case:
    mend = "keep its real and its imaginary part as two leaves and combine them"
    return Case({argument: value}, TypeError, name, "got dtype complex64", "an array of floats", mend, STARTS)


def wrong_params(value: Any, got: str, entries: tuple[str, ...] = STARTS) -> Case:
    return Case(
        {"inner_params": value}, ValueError, "inner_params", got, "must", "what model.init or an earlier", entries
    )


def ignores_parameters(apply: Any) -> Case:
    changes = {"model": model(apply)}
    got, mend = "does not depend on its parameters", "use the first argument of apply"
    return Case(changes, ValueError, "the model's prediction", got, "nothing to fit", mend, STARTS)


def hand_made(made: fb.Model, expected: str, got: str, entries: tuple[str, ...] = ("hypergradient", "init")) -> Case:
    return Case({"model": made, "estimator": fb.aid(fb.cg(2))}, TypeError, "model", got, expected, "", entries)


def by_hand(estimator: fb.Estimator, error: type[Exception], argument: str, got: str, expected: str, mend: str) -> Case:
    """An estimator with a part that does not keep to the protocol."""
    return Case({"estimator": estimator}, error, argument, got, expected, mend, WITH_OUTER)


def answering(change: Callable[[fb.Hypergradient], fb.Hypergradient]) -> fb.Estimator:
    """`fb.alternating` with another answer."""
    honest = fb.alternating()

    def estimate(*args: Any) -> Any:
        inner, hyper = honest.estimate(*args)
        return inner, change(hyper)

    return honest._replace(estimate=estimate)


def swapped(level: str, objective: Any) -> Case:
    return Case(
        {"problem": problem(**{level: objective})},
        ValueError,
        f"{level}_objective",
        r"when called as \(outer_params, prediction, batch\)",
        r"returns a scalar when called as \(prediction, outer_params, batch\)",
        "put them in the first order",
        ALL if level == "inner" else WITH_OUTER,
    )


def unequal(batch: Any, lengths: str, level: str = "inner", entries: tuple[str, ...] = ALL) -> Case:
    def weighted(omega: Any, v: Any, batch: Any) -> Any:
        return jnp.mean(batch[-1] * (v - omega) ** 2)

    changes = {"problem": problem(weighted, weighted), f"{level}_batch": batch, "estimator": fb.aid(fb.cg(2))}
    mend = "one row per sample"
    return Case(changes, ValueError, f"{level}_objective", lengths, "have different lengths", mend, entries)


def no_samples(batch: Any, name: str, entries: tuple[str, ...] = ALL) -> Case:
    changes = {name: batch, "estimator": fb.aid(fb.cg(2))}
    return Case(changes, ValueError, name, "is empty", "at least one sample", "[Pp]ass", entries)


def foreign_state(estimator: fb.Estimator, state: Any, got: str) -> Case:
    changes = {"estimator": estimator, "state": state}
    return Case(changes, ValueError, "hypergradient: state", got, "must", "start afresh", ("hypergradient",))


def aux(value: Any, got: str, expected: str) -> Case:
    def with_aux(objective: Any) -> Any:
        return lambda *args: (objective(*args), value)

    changes = {"problem": problem(with_aux(inner_objective), with_aux(outer_objective), has_aux=True)}
    return Case(changes, ValueError, "inner_objective", got, expected, "rename", ALL)


HALF = jnp.float16

CASES: dict[str, Case] = {
    "inner objective not scalar": not_scalar("inner", ALL),
    "outer objective not scalar": not_scalar("outer", WITH_OUTER),
    "inner objective an integer": not_float("inner", "int32", lambda omega, v, batch: jnp.sum(v > omega), ALL),
    "inner objective a bool": not_float("inner", "bool", lambda omega, v, batch: jnp.all(v > omega), ALL),
    "inner objective complex": not_float("inner", "complex64", lambda omega, v, batch: jnp.sum(v) * 1j, ALL),
    "outer objective an integer": not_float("outer", "int32", lambda omega, v, batch: jnp.sum(v > 0), WITH_OUTER),
    "inner objective None": not_a_value(None, "got NoneType", "Return the value itself"),
    "inner objective a list": not_a_value([1.0], "got list", "Return the value itself"),
    "inner objective a string": not_a_value("loss", "got str", ""),
    "inner objective with aux unasked for": not_a_value((1.0, {}), "got tuple", "set has_aux=True"),
    "has_aux without aux": Case(
        {"problem": problem(has_aux=True)},
        TypeError,
        "inner_objective",
        r"got an array of shape \(\)",
        r"must return \(scalar, aux\)",
        "set has_aux=False",
    ),
    "has_aux with a triple": Case(
        {"problem": problem(lambda omega, v, batch: (jnp.mean(v), {}, 1), has_aux=True)},
        TypeError,
        "inner_objective",
        "got tuple",
        r"must return \(scalar, aux\)",
        "return a pair",
    ),
    "has_aux for one objective only": Case(
        {"problem": problem(lambda *args: (inner_objective(*args), {}), has_aux=True)},
        TypeError,
        "outer_objective",
        "got an array",
        r"must return \(scalar, aux\)",
        "return a pair",
        WITH_OUTER,
    ),
    "aux that holds a string": Case(
        {"problem": problem(lambda *args: (inner_objective(*args), {"name": "mine"}), has_aux=True)},
        TypeError,
        "inner_objective: aux",
        "got str at 'name'",
        "numbers or arrays",
        "drop it",
    ),
    "prediction without leading axis": leading_axis(lambda theta, x: jnp.sum(x * theta[None]), r"\(\)"),
    "prediction a Python number": leading_axis(lambda theta, x: 1.0, r"\(\)"),
    "prediction with too few rows": leading_axis(lambda theta, x: jnp.dot(x, theta)[:2], r"\(2,\)"),
    "prediction transposed": leading_axis(lambda theta, x: (x * theta[None]).T, r"\(3, 6\)"),
    "prediction of integers": Case(
        {"model": model(lambda theta, x: jnp.argmax(x * theta[None], 1))},
        TypeError,
        "prediction",
        "got dtype int32",
        "must be floating-point",
        "before rounding, argmax",
    ),
    "prediction empty": Case(
        {"model": model(lambda theta, x: ())},
        ValueError,
        "prediction",
        "is an empty pytree",
        "at least one array",
        "the model must return",
    ),
    "prediction on the outer batch": Case(
        {"outer_batch": (jnp.ones((4, 3)), Y), "model": model(lambda theta, x: jnp.ones(N) * theta[0])},
        ValueError,
        "prediction",
        r"has shape \(6,\)",
        r"of the inputs of outer_batch \(4\)",
        "one row per sample",
        WITH_OUTER,
    ),
    "adjoint of another structure": unlike_adjoint(
        lambda theta, x: (jnp.dot(x, theta),), ValueError, r"PyTreeDef\(\(\*,\)\)", r"expected PyTreeDef\(\*\)"
    ),
    "adjoint of another shape": unlike_adjoint(
        lambda theta, x: jnp.dot(x, theta)[:, None], ValueError, r"shape \(6, 1\)", r"expected \(6,\)"
    ),
    "adjoint of another dtype": unlike_adjoint(
        lambda theta, x: jnp.dot(x, theta).astype(HALF), TypeError, "dtype float16", "expected float32"
    ),
    "features of rank 1": bad_features(lambda theta, x: x[:, 0], r"got shape \(6,\)"),
    "features of rank 3": bad_features(lambda theta, x: x[:, :, None], r"got shape \(6, 3, 1\)"),
    "features with too few rows": bad_features(lambda theta, x: x[:2], r"got shape \(2, 3\)"),
    "features in a tuple": bad_features(lambda theta, x: (x,), "got tuple"),
    "features of integers": Case(
        {"estimator": linear(lambda theta, x: x.astype(jnp.int32))},
        TypeError,
        "features",
        "got dtype int32",
        "must be floating-point",
        "convert them",
        WITH_OUTER,
    ),
    "projected features of rank 1": Case(
        {"model": fb.variable_projection(model(), 1), "estimator": fb.alternating()},
        ValueError,
        "features",
        r"got shape \(6,\)",
        r"shape \[n, p\] with n = 6",
        "one row",
    ),
    "learned adjoint of the architecture of a projected model": Case(
        {
            "model": PROJECTED,
            "problem": problem(
                lambda omega, v, batch: inner_objective(omega, v[:, 0], batch),
                lambda omega, v, batch: outer_objective(omega, v[:, 0], batch),
            ),
            "estimator": learned(),
        },
        ValueError,
        "learned_adjoint: model",
        "is None",
        "solved for and not trained",
        "pass model=",
        STARTS,
    ),
    "features of the adjoint of rank 1": Case(
        {"estimator": learned(lambda xi, phi: phi, features=lambda theta, x: x[:, 0])},
        ValueError,
        "learned_adjoint: features",
        r"got shape \(6,\)",
        r"shape \[n, p\] with n = 6",
        "one row",
    ),
    "outer_params an integer": not_floats(1, "outer_params", "dtype int32"),
    "outer_params with an integer leaf": not_floats(
        {"w": 1.0, "n": jnp.arange(3)}, r"outer_params\['n'\]", "dtype int32"
    ),
    "outer_params a bool": not_floats(True, "outer_params", "dtype bool"),
    "outer_params complex": not_floats(1j, "outer_params", "dtype complex64"),
    "outer_params a string": not_floats("1.0", "outer_params", "str"),
    "outer_params an empty dict": empty("outer_params", {}),
    "outer_params None": empty("outer_params", None),
    "inner_params empty": empty("inner_params", []),
    "inner_params of an integer": Case(
        {"inner_params": jnp.arange(3)}, TypeError, "inner_params", "got dtype int32", "float", "jnp.asarray", STARTS
    ),
    "inputs empty": Case(
        {"inner_batch": ((), Y)}, ValueError, "inputs of inner_batch", "are an empty pytree", "needs an array", ""
    ),
    "batch that inputs does not fit": Case(
        {"inner_batch": {"x": X, "y": Y}},
        KeyError,
        "problem.inputs failed on inner_batch",
        r"tree structure PyTreeDef\({'x': \*, 'y': \*}\)",
        "what the model is called on",
        r"FunctionalProblem\(..., inputs=",
    ),
    "inner_batch None": Case(
        {"inner_batch": None},
        TypeError,
        "problem.inputs failed on inner_batch",
        r"PyTreeDef\(None\)",
        "what the model is called on",
        "inputs=",
    ),
    "inner objective without the prediction": ignores_inner(without_v),
    "inner objective with the prediction stopped": ignores_inner(stopped_v),
    "inner objective without the prediction, jitted": ignores_inner(jax.jit(without_v)),
    "inner objective with the prediction stopped, jitted": ignores_inner(jax.jit(stopped_v)),
    "inner objective without the prediction, scanned": ignores_inner(scanned_without_v),
    "inner objective of rounded predictions": ignores_inner(lambda omega, v, batch: jnp.mean(omega * jnp.round(v))),
    "inner objective a constant": ignores_inner(lambda omega, v, batch: 1.0),
    "parametric inner objective without inner_params": Case(
        PARAMETRIC | {"problem": parametric(lambda omega, theta, batch: omega**2)},
        ValueError,
        "inner_objective",
        "does not depend on inner_params",
        "nothing to fit",
        "use the second argument",
    ),
    "outer objective of neither": ignores_both(constant),
    "outer objective of neither, jitted": ignores_both(jax.jit(constant)),
    "outer objective stopped": ignores_both(stopped),
    "outer objective stopped, jitted": ignores_both(jax.jit(stopped)),
    "parametric outer objective of neither": Case(
        PARAMETRIC | {"problem": parametric(outer=constant)},
        ValueError,
        "outer_objective",
        "depends on neither inner_params nor outer_params",
        "identically zero",
        "use the first or the second",
        WITH_OUTER,
    ),
    "model None with a functional problem": Case(
        {"model": None}, ValueError, "model", "got None", "an fb.Model", "fb.from_function, fb.from_linen"
    ),
    "model with a parametric problem": Case(
        PARAMETRIC | {"model": model()}, ValueError, "model", "got Model", "must be None", "use an fb.FunctionalProblem"
    ),
    "model a bare Flax module": Case(
        {"model": linen.Dense(1)}, TypeError, "model", "got Dense", "an fb.Model", "wrap it with fb.from_linen"
    ),
    "funcid with a parametric problem": Case(
        PARAMETRIC | {"estimator": POINTWISE},
        TypeError,
        "fb.funcid",
        "got a ParametricProblem",
        "needs an fb.FunctionalProblem",
        "use fb.aid, fb.itd",
    ),
    "estimator not called": Case(
        {"estimator": fb.aid}, TypeError, "estimator", "got <function aid", "an fb.Estimator", r"fb.aid\(...\)"
    ),
    "estimator by name": Case({"estimator": "itd"}, TypeError, "estimator", "'itd'", "fb.Estimator", r"fb.itd\(...\)"),
    "problem a bare objective": Case(
        {"problem": inner_objective}, TypeError, "problem", "got function", "must be an fb.FunctionalProblem", ""
    ),
    "itd without inner_optimizer": Case(
        {"estimator": fb.itd(2)},
        ValueError,
        "inner_optimizer",
        "is None",
        r"fb.itd\(2\) differentiates through its steps",
        "inner_optimizer=optax.sgd",
        ("hypergradient",),
    ),
    "inner_optimizer not called": Case(
        {"inner_optimizer": optax.adam},
        TypeError,
        "inner_optimizer",
        "got <function adam",
        "an optax.GradientTransformation",
        r"optax.adam\(1e-3\)",
        ("hypergradient",),
    ),
    "learned adjoint without key": Case(
        {"estimator": learned(), "key": None},
        ValueError,
        "learned_adjoint: key",
        "is None",
        "has to be initialised",
        "jax.random.key",
        ("hypergradient",),
    ),
    "learned adjoint without key and without warm start": Case(
        {"estimator": learned(warm_start=False), "key": None, "state": ()},
        ValueError,
        "learned_adjoint: key",
        "is None",
        "has to be initialised",
        "jax.random.key",
        ("hypergradient",),
    ),
    "pointwise adjoint with fewer outer inputs": Case(
        {"outer_batch": (X[:4], Y[:4])},
        ValueError,
        "pointwise_adjoint: inputs of outer_batch",
        r"shape \(4, 3\)",
        r"expected \(6, 3\)",
        "use fb.linear_adjoint",
        WITH_OUTER,
    ),
    "pointwise adjoint with outer inputs of another structure": Case(
        {
            "outer_batch": ({"x": X}, Y),
            "model": model(lambda theta, x: jnp.dot(jax.tree.leaves(x)[0], theta)),
        },
        ValueError,
        "pointwise_adjoint: inputs of outer_batch",
        r"PyTreeDef\({'x': \*}\)",
        r"expected PyTreeDef\(\*\)",
        "use fb.linear_adjoint",
        WITH_OUTER,
    ),
    "inner_params None with a parametric problem": Case(
        PARAMETRIC | {"inner_params": None},
        ValueError,
        "inner_params",
        "is None",
        "no model to draw them from",
        "pass inner_params=",
        ("init",),
    ),
    "inner_params None in a hypergradient": empty("inner_params", None, ("hypergradient",)),
    "key an integer": bad_key(0, r"got 0 of type int", "a random key", r"jax.random.key\(0\)"),
    "key a float": bad_key(jnp.ones(2), r"got float32\[2\]", "a random key", r"jax.random.key\(0\)"),
    "key a seed in an array": bad_key(jnp.arange(1), r"got int32\[1\]", "a random key", r"jax.random.key\(0\)"),
    "several keys": bad_key(jax.random.split(KEY, 3), r"got several, key<fry>\[3\]", "one random key", "jax.vmap"),
    "several keys of the old style": bad_key(
        jax.random.split(jax.random.PRNGKey(0), 3), r"got several, uint32\[3, 2\]", "one random key", "jax.vmap"
    ),
    "key missing": bad_key(None, "is None", "random numbers are drawn", r"pass jax.random.key\(0\)", ("init",)),
    "key and outer_params swapped": Case(
        {"key": 1.0, "outer_params": KEY},
        TypeError,
        "init: key",
        "outer_params holds one",
        "must be a random key, got 1.0",
        "the two are swapped; the order is key, outer_params",
        ("init",),
    ),
    "outer_params with a random key": not_floats({"w": 1.0, "key": KEY}, r"outer_params\['key'\]", "a random key"),
    "outer_params complex in a leaf": complex_leaf("outer_params", {"w": jnp.ones(2) * 1j}, r"outer_params\['w'\]"),
    "inner_params complex": complex_leaf("inner_params", jnp.ones(3) * 1j, "inner_params"),
    "prediction complex": Case(
        {"model": model(lambda theta, x: jnp.dot(x, theta) * 1j)},
        TypeError,
        "prediction",
        "got dtype complex64",
        "must be floating-point",
        "real and its imaginary part as two leaves and combine them",
    ),
    "inner_params of another shape": wrong_params(jnp.zeros(4), r"must have shape \(3,\), got \(4,\)"),
    "inner_params of another rank": wrong_params(jnp.zeros((3, 1)), r"must have shape \(3,\), got \(3, 1\)"),
    "inner_params of another structure": wrong_params(
        {"w": jnp.zeros(3)}, r"must be like float32\[3\], got {'w': float32\[3\]}"
    ),
    "inner_params of another model in a step": wrong_params(jnp.zeros(4), r"shape \(3,\), got \(4,\)", ("step",)),
    "model that ignores its parameters": ignores_parameters(lambda theta, x: x[:, 0]),
    "model with its parameters stopped": ignores_parameters(lambda theta, x: jnp.dot(x, jax.lax.stop_gradient(theta))),
    "model.init not callable": hand_made(fb.Model(None, model().apply), "model.init must be callable", "got NoneType"),
    "model.apply not callable": hand_made(fb.Model(model().init, X), "model.apply must be callable", "got ArrayImpl"),
    "model.init without inputs": hand_made(
        fb.Model(lambda key: (jnp.zeros(3), ()), model().apply),
        r"model.init must take 2 arguments \(key, inputs\)",
        r"got <lambda>\(key\)",
    ),
    "model.apply without a state": hand_made(
        fb.Model(model().init, lambda params, inputs: inputs),
        "model.apply must take 3 arguments",
        r"\(params, inputs\)",
    ),
    "model.apply without train and key": hand_made(
        fb.Model(model().init, lambda params, state, inputs: (inputs, ())),
        "and the keyword arguments train and key",
        r"got <lambda>\(params, state, inputs\)",
    ),
    "model.apply without a pair": hand_made(
        fb.Model(model().init, lambda params, state, inputs, train=False, key=None: jnp.dot(inputs, params)),
        r"model.apply must return \(prediction, model_state\)",
        r"got float32\[6\]",
    ),
    "model.init without a pair": hand_made(
        fb.Model(lambda key, inputs: jnp.zeros(3), model().apply),
        r"model.init must return \(params, model_state\)",
        r"got float32\[3\]",
        ("init",),
    ),
    "adjoint whose values are like parameters": by_hand(
        fb.funcid(POINTWISE_ADJOINT._replace(fit=lambda *_: (jnp.zeros(3), (), {}))),
        ValueError,
        r"a\(x_P\) of adjoint.fit",
        r"got \(3,\)",
        r"must have shape \(6,\)",
        "a pytree like the prediction",
    ),
    "adjoint that returns its values alone": by_hand(
        fb.funcid(POINTWISE_ADJOINT._replace(fit=lambda *_: jnp.zeros(6))),
        TypeError,
        "adjoint.fit",
        r"got float32\[6\]",
        r"must return \(a\(x_P\), state, metrics\)",
        "",
    ),
    "adjoint whose state grows": by_hand(
        fb.funcid(POINTWISE_ADJOINT._replace(fit=lambda *_: (jnp.zeros(6), jnp.zeros(2), {}))),
        ValueError,
        "adjoint.fit's state",
        r"got float32\[2\]",
        r"must be like \(\)",
        "like that of `init`",
    ),
    "adjoint with a metric for each sample": by_hand(
        fb.funcid(POINTWISE_ADJOINT._replace(fit=lambda *_: (jnp.zeros(6), (), {"a": jnp.zeros(2)}))),
        TypeError,
        "adjoint.fit's metrics",
        r"got \{'a': float32\[2\]\}",
        "must be a dict of scalars",
        "",
    ),
    "Newton step on one batch": by_hand(
        fb.funcid(POINTWISE_ADJOINT._replace(newton=lambda *_: (jnp.zeros(6), (), {})), correction=1.0),
        TypeError,
        "adjoint.newton",
        r"got \(float32\[6\], \(\), \{\}\)",
        r"must return \(N\(x_P\), N\(x_Q\), state",
        "",
    ),
    "linear solver with another shape": by_hand(
        fb.aid(fb.LinearSolver(lambda A, b, u: jnp.zeros(2))),
        ValueError,
        "LinearSolver: the solution",
        r"got \(2,\)",
        r"must have shape \(3,\)",
        "a pytree like rhs",
    ),
    "linear solver that returns a pair": by_hand(
        fb.aid(fb.LinearSolver(lambda A, b, u: (b, 0))),
        ValueError,
        "LinearSolver: the solution",
        r"got \(float32\[3\], 0\)",
        r"like float32\[3\]",
        "a pytree like rhs",
    ),
    "estimator without a hypergradient": by_hand(
        fb.alternating()._replace(estimate=lambda *a: (a[2](a[3]), 3)),
        TypeError,
        "estimator.estimate",
        "got .*\n.*InnerSolution",
        r"must return \(fb.InnerSolution, fb.Hyper",
        "`solve`",
    ),
    "estimator with a gradient of another shape": by_hand(
        answering(lambda h: h._replace(gradient=jnp.zeros(2))),
        ValueError,
        "estimator.estimate's gradient",
        r"got \(2,\)",
        r"must have shape \(\)",
        "like outer_params",
    ),
    "estimator with a gradient of another dtype": by_hand(
        answering(lambda h: h._replace(gradient=jnp.zeros((), jnp.float16))),
        TypeError,
        "estimator.estimate's gradient",
        "dtype float16",
        "has float32",
        "cast it",
    ),
    "estimator with a value for each sample": by_hand(
        answering(lambda h: h._replace(outer_value=jnp.zeros(6))),
        ValueError,
        "estimator.estimate's outer_value",
        r"got shape \(6,\)",
        "must be a scalar",
        "value of the outer",
    ),
    "estimator without flags": by_hand(
        answering(lambda h: h._replace(metrics={})),
        ValueError,
        "estimator.estimate's metrics",
        r"got \[\]",
        "must hold 'adjoint_finite'",
        "add jnp.array",
    ),
    "estimator put together by hand of nothing": Case(
        {"estimator": fb.Estimator(None, None)}, TypeError, "estimator.init", "got NoneType", "must be callable", ""
    ),
    "inner objective with arguments swapped": swapped("inner", lambda v, omega, batch: jnp.mean((v[:3] - omega) ** 2)),
    "outer objective with arguments swapped": swapped("outer", lambda v, omega, batch: jnp.sum(v[:, None]) + omega),
    "inner objective that takes the batch first": Case(
        {"problem": problem(lambda batch, omega, v: jnp.mean((v - omega * batch[1]) ** 2))},
        ValueError,
        "inner_objective",
        "fails when called as \\(outer_params, prediction, batch\\)",
        r"returns a scalar when called as \(batch, outer_params, prediction\)",
        "put them in the first order",
    ),
    "objective not scalar because arguments are swapped": Case(
        {"problem": problem(lambda v, omega, batch: jnp.mean(v) * omega)},
        ValueError,
        "inner_objective",
        r"returns shape \(6,\), not a scalar",
        r"returns a scalar when called as \(prediction, outer_params, batch\)",
        "put them in the first order",
    ),
    "batch with fewer targets": unequal((X, Y[:4]), r"6 of inner_batch\['0'\], 4 of inner_batch\['1'\]"),
    "batch with more weights": unequal((X, Y, jnp.ones(7)), r"7 of inner_batch\['2'\]"),
    "outer batch with fewer targets": unequal((X, Y[:4]), r"4 of outer_batch\['1'\]", "outer", WITH_OUTER),
    "batch of no samples": no_samples((X[:0], Y[:0]), "inner_batch"),
    "batch of no inputs": no_samples((X[:0], Y), "inner_batch"),
    "outer batch of no samples": no_samples((X[:0], Y[:0]), "outer_batch", WITH_OUTER),
    "batch of no samples of a parametric problem": Case(
        PARAMETRIC | {"inner_batch": (X[:0], Y[:0])}, ValueError, "inner_batch", "is empty", "at least one sample", ""
    ),
    "axis_name without a mapped axis": Case(
        {"problem": problem(axis_name="devices")},
        ValueError,
        "problem.axis_name",
        "is 'devices'",
        "no mapped axis of that name",
        "call it under jax.pmap",
        WITH_OUTER,
    ),
    "state a string": foreign_state(POINTWISE, "warm", r"must be like \(\), got 'warm'"),
    "state of aid in pointwise": foreign_state(POINTWISE, jnp.zeros(3), r"must be like \(\), got float32\[3\]"),
    "state of nothing in aid": foreign_state(fb.aid(fb.cg(2)), (), r"must be like float32\[3\], got \(\)"),
    "state of aid on another model": foreign_state(
        fb.aid(fb.cg(2)), jnp.zeros(4), r"must have shape \(3,\), got \(4,\)"
    ),
    "state of a learned adjoint in aid": foreign_state(
        fb.aid(fb.cg(2)), fb.FitState(jnp.zeros(3), (), ()), r"must be like float32\[3\], got FitState"
    ),
    "state of aid in a learned adjoint": foreign_state(learned(), jnp.zeros(3), "must be like FitState"),
    "aux named as a metric": aux({"outer_objective": 1.0}, "aux holds 'outer_objective'", "one of the solver's own"),
    "aux named as an estimator's metric": aux(
        {"linear_residual": 1.0}, "aux holds 'linear_residual'", "one of the solver's own"
    ),
    "aux with two entries of one name": aux(
        {"a/b": 1.0, "a": {"b": 2.0}}, "two entries of aux have the name 'a/b'", "keys are joined by '/'"
    ),
}


def refuse(misuse: Callable[[], Any], error: type[Exception], *patterns: str) -> None:
    with pytest.raises(error) as caught:
        misuse()
    assert type(caught.value) is error
    for pattern in patterns:
        caught.match(pattern)


@pytest.mark.parametrize(("name", "entry"), [(name, entry) for name, case in CASES.items() for entry in case.entries])
def test_bad_input_is_refused_while_tracing(name: str, entry: str) -> None:
    changes, error, argument, got, expected, mend, _ = CASES[name]
    refuse(lambda: ENTRIES[entry](changes), error, argument, got, expected, mend)


# Numbers.

WHOLE = [(0, ValueError), (-1, ValueError)] + [(v, TypeError) for v in (2.5, 2.0, True, "3", None, np.nan, jnp.ones(2))]
AT_LEAST_ZERO = [(v, ValueError) for v in (-1.0, -1, np.nan, np.inf)] + [
    (v, TypeError) for v in ("1", None, True, jnp.ones(2), [1.0])
]
POSITIVE = [*AT_LEAST_ZERO, (0.0, ValueError)]


def features(theta: Any, x: Any) -> Any:
    return x


NUMBERS: dict[tuple[str, str], tuple[Callable[[Any], Any], list[tuple[Any, type[Exception]]]]] = {
    ("bilevel", "inner_steps"): (lambda v: bilevel(problem(), model(), POINTWISE, inner_steps=v), WHOLE),
    ("itd", "num_steps"): (fb.itd, WHOLE),
    ("learned_adjoint", "num_steps"): (lambda v: fb.learned_adjoint(SGD, v), WHOLE),
    ("linear_adjoint", "ridge"): (lambda v: fb.linear_adjoint(features, v), AT_LEAST_ZERO),
    ("linear_adjoint", "num_steps"): (lambda v: fb.linear_adjoint(features, num_steps=v), WHOLE),
    ("variable_projection", "num_outputs"): (lambda v: fb.variable_projection(model(), v), WHOLE),
    ("variable_projection", "ridge"): (lambda v: fb.variable_projection(model(), 1, v), AT_LEAST_ZERO),
    ("variable_projection", "num_steps"): (lambda v: fb.variable_projection(model(), 1, num_steps=v), WHOLE),
    ("value_penalty", "num_steps"): (lambda v: fb.value_penalty(SGD, v, 1.0), WHOLE),
    ("value_penalty", "penalty"): (lambda v: fb.value_penalty(SGD, 1, v), POSITIVE),
    ("gradient_penalty", "num_steps"): (lambda v: fb.gradient_penalty(SGD, v, 1.0), WHOLE),
    ("gradient_penalty", "penalty"): (lambda v: fb.gradient_penalty(SGD, 1, v), POSITIVE),
    ("cg", "num_steps"): (fb.cg, WHOLE),
    ("cg", "damping"): (lambda v: fb.cg(2, damping=v), AT_LEAST_ZERO),
    ("cg", "rtol"): (lambda v: fb.cg(2, rtol=v), AT_LEAST_ZERO),
    ("normal_cg", "num_steps"): (fb.normal_cg, WHOLE),
    ("normal_cg", "damping"): (lambda v: fb.normal_cg(2, damping=v), AT_LEAST_ZERO),
    ("gmres", "num_steps"): (fb.gmres, WHOLE),
    ("gmres", "damping"): (lambda v: fb.gmres(2, damping=v), AT_LEAST_ZERO),
    ("neumann", "num_steps"): (lambda v: fb.neumann(v, 0.1), WHOLE),
    ("neumann", "step_size"): (lambda v: fb.neumann(2, v), POSITIVE),
    ("neumann", "damping"): (lambda v: fb.neumann(2, 0.1, damping=v), AT_LEAST_ZERO),
    ("gradient_descent", "num_steps"): (lambda v: fb.gradient_descent(v, 0.1), WHOLE),
    ("gradient_descent", "step_size"): (lambda v: fb.gradient_descent(2, v), POSITIVE),
    ("gradient_descent", "damping"): (lambda v: fb.gradient_descent(2, 0.1, damping=v), AT_LEAST_ZERO),
    ("from_lineax", "damping"): (lambda v: fb.from_lineax(lineax.CG(1e-5, 1e-5), damping=v), AT_LEAST_ZERO),
    ("train", "num_outer_steps"): (lambda v: train(num_outer_steps=v), WHOLE),
    ("train", "chunk"): (lambda v: train(chunk=v), WHOLE),
}


@pytest.mark.parametrize(("function", "argument"), NUMBERS)
def test_numbers_out_of_range_are_refused(function: str, argument: str) -> None:
    call, wrong = NUMBERS[function, argument]
    expected = "at least 1|a Python int" if wrong is WHOLE else "> 0" if wrong is POSITIVE else ">= 0"
    for value, error in wrong:
        with pytest.raises(error, match=expected) as caught:
            call(value)
        message = str(caught.value)
        assert message.startswith(f"{function}: {argument} must be")
        assert f"got {value!r}" in message
    call(1 if wrong is WHOLE else 0.5)


# Calls.


def train(data: Any = lambda key, step: (BATCH, BATCH), num_outer_steps: Any = 2, **kwargs: Any) -> Any:
    solver = bilevel(problem(), model(), fb.alternating())
    return fb.train(solver, solver.init(KEY, 1.0, BATCH), data, num_outer_steps, progress=False, **kwargs)


def run(inner_batches: Any, outer_batches: Any) -> Any:
    solver = bilevel(problem(), model(), POINTWISE)
    state = jax.eval_shape(lambda: solver.init(KEY, 1.0, BATCH))
    return jax.eval_shape(solver.run, state, inner_batches, outer_batches)


def stacked(num_steps: int) -> Any:
    return jax.tree.map(lambda x: jnp.stack([x] * num_steps), BATCH)


def with_optimizer(name: str, optimizer: Any) -> Any:
    return bilevel(problem(), model(), POINTWISE, **{name: optimizer})


NNX_OPTIMIZER = nnx.Optimizer(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), SGD, wrt=nnx.Param)
TRANSFORM = "an optax.GradientTransformation"
CALL_IT = r"optax.adam\(1e-3\)"
LINEAR_SOLVERS = "one of fb.cg, fb.normal_cg, fb.gmres"


def linen_init(**kwargs: Any) -> Any:
    return jax.eval_shape(lambda: fb.from_linen(linen.Dense(1), **kwargs).init(KEY, X))


def without_batch_stats() -> Any:
    normalised = fb.from_linen(linen.BatchNorm())
    scalar = problem(lambda omega, v, batch: jnp.mean((v - omega) ** 2), lambda omega, v, batch: jnp.mean(v**2))
    changes = {"model": normalised, "problem": scalar, "inner_params": {"scale": jnp.ones(3), "bias": jnp.ones(3)}}
    return hypergradient(changes)


def step_with_state_of(estimator: fb.Estimator, other: fb.Estimator) -> Any:
    def trace() -> Any:
        state = bilevel(problem(), model(), other).init(KEY, 1.0, BATCH)
        return bilevel(problem(), model(), estimator).step(state, BATCH, BATCH)

    return jax.eval_shape(trace)


CALLS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "step before init": (
        lambda: bilevel(problem(), model(), POINTWISE).step(None, BATCH, BATCH),
        TypeError,
        ("step: state", "must be an fb.BilevelState", "got None", "solver.init"),
    ),
    "train before init": (
        lambda: fb.train(bilevel(problem(), model(), POINTWISE), {"w": 1.0}, lambda key, step: (BATCH, BATCH), 2),
        TypeError,
        ("train: state", "must be an fb.BilevelState", "got {'w': 1.0}", "solver.init"),
    ),
    "diagnose before init": (
        lambda: fb.diagnose(bilevel(problem(), model(), POINTWISE), None, BATCH, BATCH),
        TypeError,
        ("diagnose: state", "must be an fb.BilevelState", "got None", "solver.init"),
    ),
    "stochastic step before init": (
        lambda: fb.soba(parametric(), inner_optimizer=0.1, linear_optimizer=0.1, outer_optimizer=0.1).step(
            None, BATCH, BATCH
        ),
        TypeError,
        ("step: state", "must be an fb.BilevelState", "got None", "solver.init"),
    ),
    "inner_optimizer a factory": (
        lambda: with_optimizer("inner_optimizer", optax.adam),
        TypeError,
        ("bilevel: inner_optimizer", "got <function adam", TRANSFORM, CALL_IT),
    ),
    "outer_optimizer a factory": (
        lambda: with_optimizer("outer_optimizer", optax.adam),
        TypeError,
        ("bilevel: outer_optimizer", "got <function adam", TRANSFORM, CALL_IT),
    ),
    "outer_optimizer None": (
        lambda: with_optimizer("outer_optimizer", None),
        TypeError,
        ("bilevel: outer_optimizer", "got None", TRANSFORM, CALL_IT),
    ),
    "inner_optimizer a learning rate": (
        lambda: with_optimizer("inner_optimizer", 0.1),
        TypeError,
        ("bilevel: inner_optimizer", "got 0.1", TRANSFORM, CALL_IT),
    ),
    "inner_optimizer of NNX": (
        lambda: with_optimizer("inner_optimizer", NNX_OPTIMIZER),
        TypeError,
        ("bilevel: inner_optimizer", "got an object of type Optimizer", TRANSFORM, CALL_IT),
    ),
    "adjoint's optimizer a factory": (
        lambda: fb.learned_adjoint(optax.sgd, 2),
        TypeError,
        ("learned_adjoint: optimizer", "got <function sgd", TRANSFORM, CALL_IT),
    ),
    "adjoint's model a module": (
        lambda: fb.learned_adjoint(SGD, 2, model=linen.Dense(1)),
        TypeError,
        ("learned_adjoint: model", "got Dense", "an fb.Model or None", "wrap it with fb.from_linen"),
    ),
    "adjoint's features not callable": (
        lambda: fb.learned_adjoint(SGD, 2, model=model(), features=X),
        TypeError,
        ("learned_adjoint: features", "got ArrayImpl", "must be callable"),
    ),
    "adjoint's features without a model": (
        lambda: fb.learned_adjoint(SGD, 2, features=features),
        ValueError,
        ("learned_adjoint: model", "is None", "but features are given", "pass the model"),
    ),
    "value_penalty's optimizer a factory": (
        lambda: fb.value_penalty(optax.sgd, 2, 1.0),
        TypeError,
        ("value_penalty: optimizer", "got <function sgd", TRANSFORM, CALL_IT),
    ),
    "gradient_penalty's optimizer a learning rate": (
        lambda: fb.gradient_penalty(0.1, 2, 1.0),
        TypeError,
        ("gradient_penalty: optimizer", "got 0.1", TRANSFORM, CALL_IT),
    ),
    "variable_projection of a function": (
        lambda: fb.variable_projection(features, 1),
        TypeError,
        ("variable_projection: features", "got function", "an fb.Model", "wrap it with fb.from_linen"),
    ),
    "variable_projection of a projected model": (
        lambda: fb.variable_projection(PROJECTED, 1),
        ValueError,
        ("variable_projection: features", "has a linear head already", "pass the model that was given to it"),
    ),
    "outer_model a module": (
        lambda: bilevel(problem(), model(), POINTWISE, outer_model=linen.Dense(1)),
        TypeError,
        ("bilevel: outer_model", "got Dense", "an fb.Model or None", "wrap it with fb.from_linen"),
    ),
    "outer_model with a head": (
        lambda: bilevel(problem(), model(), POINTWISE, outer_model=PROJECTED),
        ValueError,
        ("bilevel: outer_model", "its whole output", "got one of variable_projection"),
    ),
    "outer_model over a mapped axis": (
        lambda: bilevel(problem(axis_name="devices"), model(), POINTWISE, outer_model=model()),
        ValueError,
        ("bilevel: outer_model", "axis_name is 'devices'", "cannot be averaged", "Shard the batches under jit"),
    ),
    "mixed_precision of a function": (
        lambda: fb.mixed_precision(features),
        TypeError,
        ("mixed_precision: model", "got function", "an fb.Model", "wrap it with fb.from_linen"),
    ),
    "mixed_precision to integers": (
        lambda: fb.mixed_precision(model(), jnp.int8),
        TypeError,
        ("mixed_precision: dtype", "must be floating", "got <class .*int8"),
    ),
    "features not callable": (
        lambda: fb.linear_adjoint(X),
        TypeError,
        ("linear_adjoint: features", "got ArrayImpl", "must be callable"),
    ),
    "adjoint not called": (
        lambda: fb.funcid(fb.pointwise_adjoint),
        TypeError,
        ("funcid: adjoint", "got <function pointwise_adjoint", "an fb.Adjoint", r"fb.pointwise_adjoint\(\)"),
    ),
    "linear solver not called": (
        lambda: fb.aid(fb.cg),
        TypeError,
        ("aid: linear_solver", "got <function cg", LINEAR_SOLVERS, "called with their arguments"),
    ),
    "linear solver by name": (lambda: fb.aid("cg"), TypeError, ("aid: linear_solver", "got 'cg'", LINEAR_SOLVERS)),
    "linear solver of JAX": (
        lambda: fb.aid(jax.scipy.sparse.linalg.cg),
        TypeError,
        ("aid: linear_solver", "got <function cg", LINEAR_SOLVERS),
    ),
    "linear solver an optimizer": (lambda: fb.aid(SGD), TypeError, ("aid: linear_solver", LINEAR_SOLVERS)),
    "from_lineax of ours": (
        lambda: fb.from_lineax(fb.cg(2)),
        TypeError,
        ("from_lineax: solver", "got LinearSolver", "a lineax solver object"),
    ),
    "itd's mode": (
        lambda: fb.itd(2, mode="backward"),
        ValueError,
        ("itd: mode", "got 'backward'", '"reverse" or "forward"'),
    ),
    "T > M": (
        lambda: bilevel(problem(), model(), fb.itd(5), inner_steps=3),
        ValueError,
        ("inner_steps=3", r"itd\(5\) differentiates through 5", "Raise inner_steps, or lower that number"),
    ),
    "problem: an objective of two arguments": (
        lambda: problem(lambda v, batch: jnp.mean(v)),
        TypeError,
        (
            r"FunctionalProblem: inner_objective must take 3 arguments \(outer_params, prediction, batch\)",
            r"got <lambda>\(v, batch\)",
            "wrap it in a lambda",
        ),
    ),
    "problem: an objective of four arguments": (
        lambda: parametric(outer=lambda omega, theta, batch, key: jnp.sum(theta)),
        TypeError,
        ("ParametricProblem: outer_objective must take 3 arguments", r"got <lambda>\(omega, theta, batch, key\)"),
    ),
    "problem: a jitted objective of two arguments": (
        lambda: problem(outer=jax.jit(lambda v, batch: jnp.mean(v))),
        TypeError,
        ("FunctionalProblem: outer_objective must take 3 arguments", r"got <lambda>\(v, batch\)"),
    ),
    "problem: a partial objective of two arguments": (
        lambda: problem(functools.partial(inner_objective, 1.0)),
        TypeError,
        ("FunctionalProblem: inner_objective must take 3 arguments", "got partial", r"\(v, batch\)"),
    ),
    "problem: inputs of two arguments": (
        lambda: problem(inputs=lambda x, y: x),
        TypeError,
        (r"FunctionalProblem: inputs must take 1 argument \(batch\)", r"got <lambda>\(x, y\)"),
    ),
    "from_function: init of the key alone": (
        lambda: fb.from_function(lambda key: jnp.zeros(3), jnp.dot),
        TypeError,
        (r"from_function: init must take 2 arguments \(key, inputs\)", r"got <lambda>\(key\)"),
    ),
    "from_function: apply of three arguments": (
        lambda: fb.from_function(lambda key, x: 0, lambda params, state, x: x),
        TypeError,
        (r"from_function: apply must take 2 arguments \(params, inputs\)", r"got <lambda>\(params, state, x\)"),
    ),
    "from_function: apply an array": (
        lambda: fb.from_function(lambda key, x: 0, X),
        TypeError,
        ("from_function: apply must be callable", "got ArrayImpl"),
    ),
    "features of one argument": (
        lambda: fb.linear_adjoint(lambda x: x),
        TypeError,
        (r"linear_adjoint: features must take 2 arguments \(inner_params, inputs\)", r"got <lambda>\(x\)"),
    ),
    "adjoint's features of three arguments": (
        lambda: fb.learned_adjoint(SGD, 2, model(), features=lambda theta, state, x: x),
        TypeError,
        ("learned_adjoint: features must take 2 arguments", r"got <lambda>\(theta, state, x\)"),
    ),
    "partition: labels of one argument": (
        lambda: fb.partition({"w": X}, lambda path: True),
        TypeError,
        (r"partition: labels must take 2 arguments \(path, leaf\)", r"got <lambda>\(path\)"),
    ),
    "outer_inputs not callable": (
        lambda: bilevel(problem(), model(), POINTWISE, outer_model=model(), outer_inputs=0),
        TypeError,
        ("bilevel: outer_inputs must be callable", "got int"),
    ),
    "outer_inputs of two arguments": (
        lambda: bilevel(problem(), model(), POINTWISE, outer_model=model(), outer_inputs=lambda x, y: x),
        TypeError,
        (r"bilevel: outer_inputs must take 1 argument \(inner_batch\)", r"got <lambda>\(x, y\)"),
    ),
    "outer_model put together by hand": (
        lambda: bilevel(problem(), model(), POINTWISE, outer_model=fb.Model(1, 2)),
        TypeError,
        ("bilevel: outer_model.init must be callable", "got int"),
    ),
    "variable_projection of a model put together by hand": (
        lambda: fb.variable_projection(fb.Model(model().init, lambda x: x), 1),
        TypeError,
        ("variable_projection: features.apply must take 3 arguments", r"got <lambda>\(x\)"),
    ),
    "from_linen of a class": (
        lambda: fb.from_linen(linen.Dense),
        TypeError,
        ("from_linen: module", "got <class .*Dense", "instance", "calling the class"),
    ),
    "from_linen of an NNX module": (
        lambda: fb.from_linen(nnx.Linear(3, 1, rngs=nnx.Rngs(0))),
        TypeError,
        ("from_linen: module", "must be a flax.linen.Module instance", "use fb.from_nnx"),
    ),
    "from_linen: rngs a name": (
        lambda: fb.from_linen(linen.Dense(1), rngs="dropout"),
        TypeError,
        ("from_linen: rngs", "a sequence of names, got 'dropout'", r"\('dropout',\)"),
    ),
    "from_linen: mode of no argument": (
        lambda: fb.from_linen(linen.Dense(1), mode=lambda: {}),
        TypeError,
        (r"from_linen: mode must take 1 argument \(train\)", r"got <lambda>\(\)"),
    ),
    "from_linen: trainable a path": (
        lambda: fb.from_linen(linen.Dense(1), trainable="kernel"),
        TypeError,
        ("from_linen: trainable must be callable", "got str"),
    ),
    "from_linen: trainable of one argument": (
        lambda: fb.from_linen(linen.Dense(1), trainable=lambda path: True),
        TypeError,
        (r"from_linen: trainable must take 2 arguments \(path, leaf\)", r"got <lambda>\(path\)"),
    ),
    "from_linen: trainable returns no bool": (
        lambda: linen_init(trainable=lambda path, leaf: leaf > 0),
        TypeError,
        (
            "from_linen: trainable must return a bool",
            r"got bool\[(1|3, 1)\] for '(bias|kernel)'",
            "by the path or the shape",
        ),
    ),
    "from_linen: trainable returns None": (
        lambda: linen_init(trainable=lambda path, leaf: None),
        TypeError,
        ("from_linen: trainable must return a bool", "got None for '(bias|kernel)'"),
    ),
    "from_linen: nothing trained": (
        lambda: linen_init(trainable=lambda path, leaf: path == "head"),
        ValueError,
        ("from_linen: trainable selects no parameter", "the paths are bias, kernel|the paths are kernel, bias"),
    ),
    "from_linen: frozen parameters missing": (
        lambda: fb.from_linen(linen.Dense(1), trainable=lambda path, leaf: path == "bias").apply({}, (), X),
        ValueError,
        ("from_linen: model_state holds no frozen parameters", "pass model_state="),
    ),
    "from_linen: variables an array": (
        lambda: fb.from_linen(linen.Dense(1), variables=X),
        TypeError,
        ("from_linen: variables must be a dict of collections", r"got float32\[6, 3\]"),
    ),
    "from_linen: variables without a collection": (
        lambda: linen_init(variables={"kernel": X[:3, :1]}),
        ValueError,
        ("from_linen: variables holds kernel, which the module does not have", "params/kernel"),
    ),
    "from_linen: variables of another shape": (
        lambda: linen_init(variables={"params": {"kernel": X}}),
        ValueError,
        ("from_linen: variables: params/kernel", r"must have shape \(3, 1\), got \(6, 3\)"),
    ),
    "from_nnx of a Linen module": (
        lambda: fb.from_nnx(linen.Dense(1)),
        TypeError,
        ("from_nnx: module must be an nnx.Module or a function", "use fb.from_linen"),
    ),
    "from_nnx of a Linen class": (
        lambda: fb.from_nnx(linen.Dense),
        TypeError,
        ("from_nnx: module must be an nnx.Module or a function", "got <class .*Dense", "use fb.from_linen"),
    ),
    "from_nnx of a class that needs sizes": (
        lambda: fb.from_nnx(nnx.Linear),
        TypeError,
        (
            "from_nnx: module is the class Linear",
            "need in_features, out_features, rngs",
            r"lambda rngs: Linear\(..., rngs",
        ),
    ),
    "from_nnx of a function of nothing": (
        lambda: fb.from_nnx(lambda: nnx.Linear(3, 1, rngs=nnx.Rngs(0))),
        TypeError,
        (r"from_nnx: module must take 1 argument \(rngs\)", r"got <lambda>\(\)"),
    ),
    "from_nnx: nothing trained": (
        lambda: fb.from_nnx(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), trainable=nnx.LoRAParam),
        ValueError,
        ("from_nnx: trainable selects no parameter", "the paths are bias, kernel"),
    ),
    "from_nnx: trainable a number": (
        lambda: fb.from_nnx(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), trainable=3),
        TypeError,
        ("from_nnx: trainable must be an NNX filter", "got 3"),
    ),
    "from_nnx: trainable returns no bool": (
        lambda: fb.from_nnx(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), trainable=lambda path, x: 1),
        TypeError,
        ("from_nnx: trainable must return a bool", "got 1 for '(bias|kernel)'"),
    ),
    "hypergradient: batch statistics missing": (
        without_batch_stats,
        ValueError,
        ("hypergradient: model_state must be like {'batch_stats'", r"got \(\)", "pass what model.init"),
    ),
    "step: state of another estimator": (
        lambda: step_with_state_of(fb.aid(fb.cg(2)), POINTWISE),
        ValueError,
        ("step: estimator_state must be like float32\\[3\\]", r"got \(\)", r"this estimator, aid\(cg\(2\)\)"),
    ),
    "step: state of an estimator that carries one": (
        lambda: step_with_state_of(fb.funcid(fb.linear_adjoint(features)), learned()),
        ValueError,
        (r"step: estimator_state must be like \(\)", "got FitState", "or start afresh"),
    ),
    "problem: objective not callable": (
        lambda: problem("mse"),
        TypeError,
        ("FunctionalProblem: inner_objective", "got str", "must be callable"),
    ),
    "problem: inputs not callable": (
        lambda: problem(inputs=0),
        TypeError,
        ("FunctionalProblem: inputs", "got int", "must be callable"),
    ),
    "parametrize: a parametric problem": (
        lambda: fb.parametrize(parametric(), model()),
        TypeError,
        ("parametrize: problem", "got ParametricProblem", "a FunctionalProblem"),
    ),
    "parametrize: a projected model without inner_batch": (
        lambda: fb.parametrize(problem(), PROJECTED),
        ValueError,
        ("parametrize: inner_batch", "is None", "has a linear head", "pass the inner batch"),
    ),
    "parametrize: no model": (
        lambda: fb.parametrize(problem(), None),
        TypeError,
        ("parametrize: model", "got NoneType", "an fb.Model", "fb.from_function"),
    ),
    "run: unequal numbers of steps": (
        lambda: run(stacked(3), stacked(2)),
        ValueError,
        ("inner_batches and outer_batches", r"inner_batches\['1'\]\": 3, .*outer_batches\['0'\]\": 2", "same leading"),
    ),
    "run: unequal leaves within a batch": (
        lambda: run((stacked(3)[0], stacked(2)[1]), stacked(3)),
        ValueError,
        ("inner_batches and outer_batches", r"inner_batches\['1'\]\": 2", "same leading axis"),
    ),
    "run: a scalar leaf": (
        lambda: run((1.0,), stacked(2)),
        ValueError,
        (r"run: inner_batches\['0'\]", "is a scalar", "a leading axis of outer steps", "stack one batch for each"),
    ),
    "run: no batches": (
        lambda: run((), {}),
        ValueError,
        ("run: inner_batches, outer_batches", "hold no arrays", "a leading axis of outer steps", "stack batches"),
    ),
    "train: data None": (
        lambda: train(None),
        TypeError,
        ("train: data", "got NoneType", r"a function \(key, step\) -> .* or an iterable of such pairs"),
    ),
    "train: iterator of triples": (
        lambda: train([(BATCH, BATCH, BATCH)] * 2),
        TypeError,
        ("train: data", "got tuple of 3", r"pairs \(inner_batch, outer_batch\)", "pack extras into them"),
    ),
    "train: iterator of numbers": (lambda: train([1, 2]), TypeError, ("train: data", "got int", "pairs")),
    "train: sampler of a quadruple": (
        lambda: train(lambda key, step: BATCH + BATCH),
        TypeError,
        ("train: data", "got tuple of 4", r"pairs \(inner_batch, outer_batch\)", "pack extras"),
    ),
    "train: sampler of nothing": (lambda: train(lambda key, step: None), TypeError, ("train: data", "got NoneType")),
    "train: unequal batches": (
        lambda: train([(BATCH, BATCH), ((X[:2], Y[:2]), BATCH)]),
        ValueError,
        ("all batches of data", r"\(2, 3\)", "the same structure and shapes", "drop or pad the last"),
    ),
    "train: callback of one argument": (
        lambda: train(callback=lambda metrics: None),
        TypeError,
        (r"train: callback must take 2 arguments \(state, metrics\)", r"got <lambda>\(metrics\)"),
    ),
    "train: callback of three arguments": (
        lambda: train(callback=lambda step, state, metrics: None),
        TypeError,
        (r"train: callback must take 2 arguments \(state, metrics\)", r"got <lambda>\(step, state, metrics\)"),
    ),
    "train: sampler of the key alone": (
        lambda: train(lambda key: (BATCH, BATCH)),
        TypeError,
        (r"train: data must take 2 arguments \(key, step\)", r"got <lambda>\(key\)"),
    ),
    "train: callback": (
        lambda: train(callback="print"),
        TypeError,
        ("train: callback", "got str", "must be callable"),
    ),
    "train: on_nonfinite": (
        lambda: train(on_nonfinite="ignore"),
        ValueError,
        ("train: on_nonfinite", "got 'ignore'", '"raise" or "continue"'),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_calls_are_refused(name: str) -> None:
    misuse, error, patterns = CALLS[name]
    refuse(misuse, error, *patterns)


def test_the_check_of_an_estimator_state_does_not_trace_its_init_again() -> None:
    count = 0
    base = fb.aid(fb.cg(2))

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return base.init(*args)

    solver = bilevel(problem(), model(), base._replace(init=counted))
    state = jax.eval_shape(lambda: solver.init(KEY, 1.0, BATCH))
    for _ in range(2):
        jax.eval_shape(lambda state: solver.step(state, BATCH, BATCH), state)
    assert count == 1


def not_as_it_says(function: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(omega: Any, v: Any, batch: Any) -> Any:
        return function(v)

    return wrapper


class Objective:
    def __call__(self, omega: Any, v: Any, batch: Any = None) -> Any:
        return jnp.mean((v - omega) ** 2)

    def method(self, omega: Any, v: Any, batch: Any, *, scale: float = 1.0) -> Any:
        return scale * self(omega, v)


CALLABLES: dict[str, Any] = {
    "function": inner_objective,
    "variable arguments": lambda *args: 2.0 * inner_objective(*args),
    "defaults": lambda omega, v, batch, scale=1.0: inner_objective(omega, v, batch),
    "partial": functools.partial(lambda scale, omega, v, batch: inner_objective(omega, v, batch), 1.0),
    "partial of JAX": jax.tree_util.Partial(lambda scale, *args: inner_objective(*args), 1.0),
    "callable object": Objective(),
    "method": Objective().method,
    "jitted": jax.jit(inner_objective),
    "rematerialised": jax.checkpoint(inner_objective),
    "custom derivative": jax.custom_jvp(inner_objective),
    "wrapped around less": not_as_it_says(lambda v: jnp.mean(v**2)),
    "no signature": max,
}


@pytest.mark.parametrize("name", CALLABLES)
def test_what_can_be_called_is_taken(name: str) -> None:
    problem(CALLABLES[name], CALLABLES[name])


def test_objectives_are_not_refused_for_what_they_do_use() -> None:
    """The checks look for a path of derivatives, not at values: zero by chance is fine, and so is a roundabout way."""

    def roundabout(omega: Any, v: Any, batch: Any) -> Any:
        total, _ = jax.lax.scan(lambda total, r: (total + r**2, None), 0.0 * v[0], v - omega)
        return jax.lax.cond(batch[1][0] > 0, jnp.sqrt, jnp.square, total)

    hypergradient({"problem": problem(lambda omega, v, batch: 0.0 * jnp.sum((v - omega) ** 2))})
    hypergradient({"problem": problem(outer=lambda omega, v, batch: omega**2)})  # explicit only
    hypergradient({"problem": problem(jax.jit(roundabout), jax.checkpoint(outer_objective))})


# NaN and inf at run time. Each batch says what is to go wrong: `inner` and `outer` multiply the objectives.


def faulty(inner: float = 1.0, outer: float = 1.0) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(N, 3)), rng.normal(size=N)
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), ((x, y, inner), (x, y, outer)))


FAULTY = problem(
    lambda omega, v, batch: batch[2] * jnp.mean((v - omega["w"] * batch[1]) ** 2),
    lambda omega, v, batch: batch[2] * (jnp.mean((v - batch[1]) ** 2) + omega["b"] ** 2 + omega["w"] ** 2),
)
OMEGA = {"w": 0.5, "b": 1.0}
TOO_LARGE = {"inner": 1e-6, "outer": 1e38}  # the outer derivative is finite; divided by the curvature, it overflows

# estimator, and what in a batch breaks its adjoint but not the inner level (None: there is no adjoint to break)
BREAKABLE: dict[str, tuple[fb.Estimator, dict[str, float] | None]] = {
    "funcid-linear": (linear(features), TOO_LARGE),
    "funcid-linear-ridge": (fb.funcid(fb.linear_adjoint(features, ridge=0.1)), TOO_LARGE),
    "funcid-learned": (fb.funcid(fb.learned_adjoint(optax.sgd(0.1, momentum=0.9), 3)), TOO_LARGE),
    "funcid-learned-cold": (
        fb.funcid(fb.learned_adjoint(optax.sgd(0.1, momentum=0.9), 3, warm_start=False)),
        TOO_LARGE,
    ),
    "funcid-pointwise": (POINTWISE, TOO_LARGE),
    "aid-cg": (fb.aid(fb.cg(3)), TOO_LARGE),
    "aid-normal-cg": (fb.aid(fb.normal_cg(3)), TOO_LARGE),
    "aid-gmres": (fb.aid(fb.gmres(3)), TOO_LARGE),
    "aid-neumann": (fb.aid(fb.neumann(3, 0.1)), {"inner": 1e15}),  # a step size beyond the stable range
    "aid-gradient-descent": (fb.aid(fb.gradient_descent(3, 0.1)), {"inner": 1e15}),
    "aid-lineax": (fb.aid(lineax.CG(1e-6, 1e-6)), TOO_LARGE),
    "aid-identity": (fb.aid(fb.identity()), None),
    "itd": (fb.itd(2), None),
    "itd-forward": (fb.itd(2, mode="forward"), None),
    "alternating": (fb.alternating(), None),
    "penalty-value": (fb.value_penalty(optax.sgd(0.1, momentum=0.9), 3, 10.0), TOO_LARGE),
    "penalty-gradient": (fb.gradient_penalty(optax.sgd(0.1, momentum=0.9), 3, 10.0), TOO_LARGE),
}
LEVELS = ("inner", "adjoint", "outer")


@pytest.mark.parametrize("name", BREAKABLE)
def test_a_fault_in_the_middle_of_a_scan_does_not_spread(name: str) -> None:
    estimator, breaks_adjoint = BREAKABLE[name]
    faults: list[tuple[str | None, dict[str, float]]] = [
        (None, {}),
        ("inner", {"inner": np.nan}),
        (None, {}),
        ("inner", {"inner": np.inf}),
        ("adjoint", breaks_adjoint) if breaks_adjoint else (None, {}),
        (None, {}),
        ("outer", {"outer": np.nan}),
        ("outer", {"outer": np.inf}),
        (None, {}),
    ]
    solver = bilevel(
        FAULTY,
        model(),
        estimator,
        # Clipped, so that a large inner objective does not break the inner level itself.
        inner_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        outer_optimizer=optax.adam(0.1),
        inner_steps=3,
    )
    start = solver.init(KEY, OMEGA, faulty()[0])
    batches = jax.tree.map(lambda *xs: jnp.stack(xs), *[faulty(**fault) for _, fault in faults])

    @jax.jit
    def run(state: fb.BilevelState, batches: Any) -> Any:
        def keep(state: fb.BilevelState, batch: Any) -> Any:
            state, metrics = solver.step(state, *batch)
            return state, (state._replace(key=None), metrics)

        return jax.lax.scan(keep, state, batches)[1]

    states, metrics = jax.tree.map(np.asarray, run(start, batches))
    before = start._replace(key=None)
    for i, (level, _) in enumerate(faults):
        after = jax.tree.map(lambda x, i=i: x[i], states)
        flags = {name: bool(metrics[f"{name}_finite"][i]) for name in LEVELS}
        upstream = LEVELS[: LEVELS.index(level)] if level else LEVELS
        assert all(flags[name] for name in upstream), (i, level, flags)
        assert after.step == i + 1
        chex.assert_tree_all_finite(after)
        kept = (before.outer_params, before.outer_opt_state, before.estimator_state)
        now = (after.outer_params, after.outer_opt_state, after.estimator_state)
        if level:
            assert not flags[level], (i, level, flags)
            chex.assert_trees_all_equal(now, kept)
        else:
            assert all(a != b for a, b in zip(*map(jax.tree.leaves, (now[0], kept[0])), strict=True)), i
        moved = any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (after.inner_params, before.inner_params))))
        assert moved == (level != "inner" and faults[i][1].get("inner") != 0.0)
        before = after


# A gradient that is finite, with a square that is not: Adam's second moment would be infinite for ever.
OVERFLOWING: dict[str, tuple[fb.Estimator, dict[str, Any], dict[str, float]]] = {
    "inner": (fb.alternating(), {"inner_optimizer": optax.adam(0.1)}, {"inner": 1e30}),
    "adjoint": (fb.funcid(fb.learned_adjoint(optax.adam(0.1), 3)), {}, {"outer": 1e30}),
    "outer": (fb.alternating(), {"outer_optimizer": optax.adam(0.1)}, {"outer": 1e30}),
}


@pytest.mark.parametrize("level", OVERFLOWING)
def test_an_optimizer_state_that_overflows_is_a_fault(level: str) -> None:
    estimator, optimizers, fault = OVERFLOWING[level]
    solver = bilevel(FAULTY, model(), estimator, **optimizers)
    step = jax.jit(solver.step)
    before, _ = step(solver.init(KEY, OMEGA, faulty()[0]), *faulty())
    after, metrics = step(before, *faulty(**fault))
    assert not metrics[f"{level}_finite"]
    assert all(metrics[f"{upstream}_finite"] for upstream in LEVELS[: LEVELS.index(level)])
    chex.assert_trees_all_equal(after.outer_params, before.outer_params)
    chex.assert_tree_all_finite(after._replace(key=None))
    recovered, metrics = step(after, *faulty())
    assert all(metrics[f"{name}_finite"] for name in LEVELS)
    for now, then in ((recovered.outer_params, after.outer_params), (recovered.inner_params, after.inner_params)):
        assert all(np.all(a != b) for a, b in zip(*map(jax.tree.leaves, (now, then)), strict=True))


PERSISTENT: dict[str, tuple[fb.Estimator, dict[str, Any], str]] = {
    "inner learning rate": (linear(features), {"inner_optimizer": optax.sgd(np.inf)}, "inner"),
    "adjoint's learning rate": (fb.funcid(fb.learned_adjoint(optax.sgd(1e30), 3)), {}, "adjoint"),
    "step size": (fb.aid(fb.neumann(200, 1e3)), {}, "adjoint"),
    "outer learning rate": (linear(features), {"outer_optimizer": optax.sgd(np.inf)}, "outer"),
    "outer gradient": (
        linear(features),
        {"outer_optimizer": optax.stateless(lambda g, p: jax.tree.map(jnp.log, p))},
        "outer",
    ),
}


@pytest.mark.parametrize("name", PERSISTENT)
def test_a_lasting_fault_leaves_outer_params_where_they_were(name: str) -> None:
    estimator, optimizers, level = PERSISTENT[name]
    solver = bilevel(FAULTY, model(), estimator, **optimizers)
    omega = {"w": 0.5, "b": -1.0}
    start = solver.init(KEY, omega, faulty()[0])
    batches = jax.tree.map(lambda x: jnp.stack([x] * 3), faulty())
    end, metrics = jax.jit(solver.run)(start, *batches)
    chex.assert_trees_all_equal(end.outer_params, start.outer_params)
    for upstream in LEVELS[: LEVELS.index(level)]:
        assert metrics[f"{upstream}_finite"].all()
    assert not metrics[f"{level}_finite"].any()


# fb.train tells the user.


def faulty_at(step: int, **fault: float) -> Callable[[Any, jax.Array], Any]:
    good, bad = faulty(), faulty(**fault)
    return lambda key, i: jax.tree.map(lambda g, b: jnp.where(i == step, b, g), good, bad)


TOLD: dict[str, tuple[dict[str, float], str]] = {
    "inner": ({"inner": np.nan}, "inner learning rate"),
    "adjoint": (TOO_LARGE, "ridge or damping"),
    "outer": ({"outer": np.nan}, "outer learning rate"),
}


@pytest.mark.parametrize("level", TOLD)
def test_train_names_the_step_and_the_level(level: str) -> None:
    fault, hint = TOLD[level]
    solver = bilevel(FAULTY, model(), linear(features))
    start = solver.init(KEY, OMEGA, faulty()[0])
    data = faulty_at(5, **fault)

    with pytest.raises(fb.NonFiniteError, match=f"in the {level} level at outer step 5 .*{hint}") as caught:
        fb.train(solver, start, data, 20, chunk=4, progress=False)
    state, metrics = caught.value.state, caught.value.metrics
    assert isinstance(caught.value, FloatingPointError)
    assert state.step == 8  # the end of the chunk
    assert not metrics[f"{level}_finite"][5]
    assert all(isinstance(values, np.ndarray) and len(values) == 8 for values in metrics.values())
    chex.assert_tree_all_finite(state.outer_params)
    resumed, _ = fb.train(solver, state, data, 4, progress=False)  # and so the error's state can go on
    assert resumed.step == 12

    with pytest.warns(UserWarning, match=f"in the {level} level at outer step 5 "):
        end, history = fb.train(solver, start, data, 12, chunk=4, progress=False, on_nonfinite="continue")
    assert list(np.flatnonzero(~history[f"{level}_finite"])) == [5]
    chex.assert_trees_all_close(end.outer_params, resumed.outer_params, rtol=1e-6)
