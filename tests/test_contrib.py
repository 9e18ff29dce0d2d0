"""The bridge to benchopt's benchmark, on a stand-in for benchopt with the few names that it uses."""

import sys
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcbilevel as fb
from funcbilevel.contrib.benchopt import benchmark_problem, benchmark_samples, benchmark_solver


class BaseSolver:
    """What benchopt does with a solver class before it runs it: parameters become attributes."""

    parameters: dict[str, Any]

    def __init__(self, **parameters: Any) -> None:
        chosen = {name: values[0] for name, values in type(self).parameters.items()} | parameters
        for name, value in chosen.items():
            setattr(self, name, value)


@pytest.fixture
def benchopt(monkeypatch):
    module, criteria = ModuleType("benchopt"), ModuleType("benchopt.stopping_criterion")
    module.BaseSolver = BaseSolver
    criteria.SufficientProgressCriterion = lambda **kwargs: kwargs
    monkeypatch.setitem(sys.modules, "benchopt", module)
    monkeypatch.setitem(sys.modules, "benchopt.stopping_criterion", criteria)


DATA = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)), jnp.float32)


def f_inner(theta: jax.Array, omega: jax.Array, start: Any = 0, batch_size: int = 1) -> jax.Array:
    x = jax.lax.dynamic_slice(DATA, (start, 0), (batch_size, 3))
    return jnp.mean((x @ (theta - omega)) ** 2) + 0.5 * jnp.sum((theta - omega) ** 2)


def f_outer(theta: jax.Array, omega: jax.Array, start: Any = 0, batch_size: int = 1) -> jax.Array:
    x = jax.lax.dynamic_slice(DATA, (start, 0), (batch_size, 3))
    return jnp.mean((x @ theta - 1.0) ** 2) + 0.1 * jnp.sum(omega**2)


def build(problem: fb.ParametricProblem, step_size: float, outer_ratio: float) -> fb.BilevelSolver:
    return fb.saba(
        problem, inner_optimizer=step_size, linear_optimizer=step_size, outer_optimizer=step_size / outer_ratio
    )


def test_a_solver_of_the_benchmark_takes_the_same_steps_as_the_method(benchopt):
    Solver = benchmark_solver("fb-SABA", build, {"step_size": [0.1], "outer_ratio": [1.0, 2.0]}, "SABA.")
    assert Solver.name == "fb-SABA"
    assert Solver.parameters["outer_ratio"] == [1.0, 2.0]
    assert Solver.get_next(3) == 4
    ran = Solver(batch_size=5, eval_freq=7)
    start = (jnp.zeros(3), -2.0 * jnp.ones(3))
    ran.set_objective(
        f_inner=f_inner,
        f_outer=f_outer,
        n_inner_samples=20,
        n_outer_samples=18,
        inner_var0=start[0],
        outer_var0=start[1],
    )
    ran.run(iter([True, True, False]).__next__)
    got = ran.get_result()

    key, *keys = jax.random.split(jax.random.key(1), 3)
    solver = build(benchmark_problem(f_inner, f_outer, 5, 5), 0.1, 1.0)
    sources = [benchmark_samples(n, 5, k) for n, k in zip((20, 18), keys)]
    assert sources[1].data[:, 0].tolist() == [0, 5, 10]
    state = solver.init(key, start[1], sources[0], start[0], sources[1])
    state, _ = jax.jit(solver.run, static_argnums=3)(state, *sources, 14)
    np.testing.assert_allclose(got["outer_var"], state.outer_params, rtol=1e-5)
    np.testing.assert_allclose(got["inner_var"], state.inner_params, rtol=1e-5)


def test_estimators_run_in_the_benchmark_as_well(benchopt):
    def of_aid(problem: fb.ParametricProblem, step_size: float) -> fb.BilevelSolver:
        sgd = optax.sgd(step_size)
        return fb.bilevel(problem, None, fb.aid(fb.cg(3)), inner_optimizer=sgd, outer_optimizer=sgd, inner_steps=5)

    ran = benchmark_solver("fb-AID", of_aid, {"step_size": [0.1]})(batch_size=5, eval_freq=40)
    ran.set_objective(f_inner, f_outer, 20, 20, jnp.zeros(3), -2.0 * jnp.ones(3))
    before = float(f_outer(jnp.zeros(3), -2.0 * jnp.ones(3), 0, 20))
    ran.run(iter([True, False]).__next__)
    got = ran.get_result()
    assert float(f_outer(got["inner_var"], got["outer_var"], 0, 20)) < 0.5 * before


def test_bad_input(benchopt, monkeypatch):
    with pytest.raises(TypeError, match="step_size"):
        benchmark_solver("x", build, {"momentum": [0.1]})
    monkeypatch.setitem(sys.modules, "benchopt", None)
    with pytest.raises(ImportError, match="benchopt is not installed"):
        benchmark_solver("x", build, {"step_size": [0.1], "outer_ratio": [1.0]})
