"""Which level `fb.train` blames: the first cause, not its last consequence. Real solvers, broken on purpose."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcbilevel as fb
from funcbilevel._history import fault_message, first_fault

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(16, 3)).astype(np.float32), RNG.normal(size=16).astype(np.float32)
BATCH = (X, Y)
MODEL = fb.from_function(lambda key, x: jnp.zeros(3), lambda theta, x: jnp.dot(x, theta))
ESTIMATORS = {
    "linear": fb.funcid(fb.linear_adjoint(lambda theta, x: x)),
    "learned": fb.funcid(fb.learned_adjoint(optax.sgd(0.1), 3)),
    "pointwise": fb.funcid(fb.pointwise_adjoint()),
    "aid": fb.aid(fb.cg(3)),
    "itd": fb.itd(1),
    "value_penalty": fb.value_penalty(optax.sgd(0.1), 2, 1.0),
}


def inner(w: Any, v: Any, batch: Any) -> Any:
    return jnp.mean((v - w * batch[1]) ** 2)


def outer(w: Any, v: Any, batch: Any) -> Any:
    return jnp.mean((v - 2 * batch[1]) ** 2) + 0.01 * w**2


def infinite(w: Any, v: Any, batch: Any) -> Any:
    return 1e30 * (1e30 * outer(w, v, batch))


def with_first(x: Any, value: float) -> Any:
    return np.concatenate([np.full((1, *x.shape[1:]), value, x.dtype), x[1:]])


# What is broken: (inner learning rate, outer learning rate, outer objective, omega, batches); level; what is said.
NAN = with_first(X, np.nan)
BROKEN: dict[str, tuple[tuple[float, float, Any, float, Any], str, str]] = {
    "inner learning rate": ((2.0, 1e-4, outer, 0.5, (BATCH, BATCH)), "inner", "lower the inner learning rate"),
    "omega": ((0.1, 0.1, outer, np.nan, (BATCH, BATCH)), "outer", "NaN or inf before the run's first step; start from"),
    "infinite omega": ((0.1, 0.1, outer, np.inf, (BATCH, BATCH)), "outer", "before the run's first step; start from"),
    "outer objective": ((0.1, 0.1, infinite, 0.5, (BATCH, BATCH)), "outer", "look for overflow, log or"),
    "NaN in the inner batch": ((0.1, 0.1, outer, 0.5, ((NAN, Y), BATCH)), "inner", r"inner_batch\[0\] holds NaN"),
}


def train(name: str, estimator: str, **kwargs: Any) -> Any:
    inner_rate, outer_rate, objective, omega, batches = BROKEN[name][0]
    solver = fb.bilevel(
        fb.FunctionalProblem(inner, objective),
        MODEL,
        ESTIMATORS[estimator],
        inner_optimizer=optax.sgd(inner_rate),
        outer_optimizer=optax.sgd(outer_rate),
    )
    state = solver.init(jax.random.key(0), 0.5, BATCH)._replace(outer_params=jnp.float32(omega))
    return fb.train(solver, state, itertools.repeat(batches), 200, progress=False, **kwargs)


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        *(("inner learning rate", estimator) for estimator in ESTIMATORS),
        *(("outer objective", estimator) for estimator in ESTIMATORS),
        *((name, "linear") for name in BROKEN if name not in ("inner learning rate", "outer objective")),
    ],
)
def test_the_first_cause_is_blamed(name: str, estimator: str) -> None:
    _, level, hint = BROKEN[name]
    with pytest.raises(fb.NonFiniteError, match=f"in the {level} level at outer step .* To mend: .*{hint}"):
        train(name, estimator)


def test_the_message_of_one_run_does_not_hide_its_metrics() -> None:
    with pytest.raises(fb.NonFiniteError) as caught:
        train("inner learning rate", "linear", chunk=3)
    state, metrics = caught.value.state, caught.value.metrics
    assert {len(values) for values in metrics.values()} == {int(state.step)}
    assert state.step > 3
    assert metrics["inner_objective"][0] < 10 < metrics["inner_objective"][3]


# Histories written out: (inner objective, outer objective, level whose flag falls at which step), and who is blamed.
GROWING = 10.0 ** np.arange(0, 20, 2)  # by 100 a step
STEADY = np.ones(10)
HISTORIES: dict[str, tuple[Any, Any, dict[str, list[int]], str]] = {
    "inner grows, the adjoint's flag falls": (GROWING, GROWING, {"adjoint": [9]}, "inner"),
    "inner grows, the outer's flag falls": (GROWING, STEADY, {"outer": [9]}, "inner"),
    "inner grows a step behind": (np.append(1.0, GROWING[:9]), GROWING, {"adjoint": [9]}, "inner"),
    "inner grows on though omega stands": (GROWING, GROWING, {"adjoint": [6, 7, 8, 9]}, "inner"),
    "inner stops with omega": (np.minimum(GROWING, 1e12), GROWING, {"outer": [6, 7, 8, 9]}, "outer"),
    "outer grows, the inner's flag falls": (STEADY, GROWING, {"inner": [9]}, "outer"),
    "outer grows, the adjoint's flag falls": (STEADY, GROWING, {"adjoint": [9]}, "outer"),
    "outer jumps to inf": (STEADY, np.append(STEADY[:9], np.inf), {"adjoint": [9], "outer": [9]}, "outer"),
    "the adjoint alone": (STEADY, STEADY, {"adjoint": [9]}, "adjoint"),
    "the adjoint before the outer": (STEADY, STEADY, {"adjoint": [9], "outer": [9]}, "adjoint"),
    "a large objective from the start": (1e9 * STEADY, 1e9 * STEADY, {"adjoint": [9]}, "adjoint"),
    "an earlier fault that has passed": (STEADY, np.where(np.arange(10) == 3, 1e30, 1.0), {"inner": [9]}, "inner"),
    "inner NaN at once": (np.append(STEADY[:9], np.nan), np.append(STEADY[:9], np.nan), {"inner": [9]}, "inner"),
}


@pytest.mark.parametrize("seeds", [(), (2,)])
@pytest.mark.parametrize("name", HISTORIES)
def test_the_history_tells_who_was_first(name: str, seeds: tuple[int, ...]) -> None:
    inner, outer, fallen, level = HISTORIES[name]
    flags = {f"{of}_finite": ~np.isin(np.arange(10), fallen.get(of, [])) for of in ("inner", "adjoint", "outer")}
    metrics = {"inner_objective": inner, "outer_objective": outer, **flags}
    if seeds:  # the other one is healthy
        healthy = {name: np.ones_like(values) for name, values in metrics.items()}
        metrics = {name: np.stack([healthy[name], values], axis=1) for name, values in metrics.items()}
    fault = first_fault(metrics, 0)
    assert fault == (min(itertools.chain(*fallen.values())), *(1 for _ in seeds))
    message = fault_message(metrics, fault, 40, np.ones((*seeds, 3)), np.ones(seeds), {})
    of_seed = " of seed 1" if seeds else ""
    assert f"in the {level} level at outer step {40 + fault[0]}{of_seed} (inner_objective" in message
    assert f"lower the {level}" in message
