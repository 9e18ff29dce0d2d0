"""The loop: one program per solver and shape, the same numbers however it is run, and what the state carries."""

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import funcbilevel as fb

N, STEPS, DEVICES = 16, 5, 8
INNER_STEPS = 3


# The problem: labels are rescaled and shifted so that a network fitted to them predicts well on other labels.

traces: Counter[str] = Counter()  # how often each objective was traced


def inner_objective(omega: Any, v: jax.Array, batch: Any) -> Any:
    traces["inner"] += 1
    target = omega["scale"] * batch["y"] + omega["shift"]
    return jnp.mean((v - target) ** 2)


def outer_objective(omega: Any, v: jax.Array, batch: Any) -> Any:
    traces["outer"] += 1
    return jnp.mean((v - batch["y"]) ** 2) + 0.1 * omega["scale"] ** 2 + 0.1 * jnp.sum(omega["shift"] ** 2)


def inputs(batch: Any) -> jax.Array:
    return batch["x"]


def init_weights(key: jax.Array, x: jax.Array) -> Any:
    return {"w": jax.random.normal(key, (x.shape[1],)), "b": jnp.zeros(())}


def predict(theta: Any, x: jax.Array) -> jax.Array:
    """Linear, because a small program compiles fast."""
    return jnp.dot(x, theta["w"]) + theta["b"]


def features(theta: Any, x: jax.Array) -> jax.Array:
    return x


PROBLEM = fb.FunctionalProblem(inner_objective, outer_objective, inputs)
MODEL = fb.from_function(init_weights, predict)
OMEGA = {"scale": 1.0, "shift": np.zeros((), np.float32)}


def batches(num_steps: int = STEPS, seed: int = 0) -> tuple[Any, Any]:
    """Inner and outer batches of as many steps; both have the same inputs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_steps, N, 3)).astype(np.float32)
    noise = rng.normal(size=(2, num_steps, N)).astype(np.float32)
    y = np.sin(x[..., 0]) + 0.1 * noise
    return jax.tree.map(jnp.asarray, ({"x": x, "y": y[0]}, {"x": x, "y": 2.0 * y[1]}))


@contextmanager
def nothing_compiled(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Neither traced nor compiled: a new sharding object alone makes a cache entry, but no new program."""
    traced = traces.copy()
    caplog.clear()
    with jax.log_compiles():
        yield
    assert traces == traced
    assert not [record.message for record in caplog.records if "ompil" in record.message]


def at(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


INNER, OUTER = at(batches(), 0)

ADJOINT_OPTIMIZER = optax.adam(1e-2)

ESTIMATORS: dict[str, fb.Estimator] = {
    "funcid-linear": fb.funcid(fb.linear_adjoint(features, ridge=1e-2)),
    "funcid-learned": fb.funcid(fb.learned_adjoint(ADJOINT_OPTIMIZER, 3)),
    "funcid-learned-cold": fb.funcid(fb.learned_adjoint(ADJOINT_OPTIMIZER, 3, warm_start=False)),
    "funcid-pointwise": fb.funcid(fb.pointwise_adjoint()),
    "funcid-learned-corrected": fb.funcid(fb.learned_adjoint(ADJOINT_OPTIMIZER, 3), correction=1.0),
    "aid-cg": fb.aid(fb.cg(4, damping=3.0)),
    "aid-cg-cold": fb.aid(fb.cg(4, damping=3.0), warm_start=False),
    "aid-normal-cg": fb.aid(fb.normal_cg(4, damping=3.0)),
    "aid-gmres": fb.aid(fb.gmres(4, damping=3.0)),
    "aid-neumann": fb.aid(fb.neumann(4, 0.1)),
    "aid-gradient-descent": fb.aid(fb.gradient_descent(4, 0.1)),
    "aid-identity": fb.aid(fb.identity()),
    "aid-lineax": fb.aid(fb.from_lineax(lineax.CG(1e-4, 1e-4), damping=3.0)),
    "itd-reverse": fb.itd(INNER_STEPS),
    "itd-truncated": fb.itd(INNER_STEPS - 1),
    "itd-forward": fb.itd(INNER_STEPS, mode="forward"),
    "itd-remat": fb.itd(INNER_STEPS, remat=True),
    "alternating": fb.alternating(),
    "penalty-value": fb.value_penalty(optax.sgd(0.1), 3, 10.0),
    "penalty-gradient": fb.gradient_penalty(optax.sgd(0.01), 3, 10.0),
}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
# For what takes long to compile, without the rows that differ from another one in nothing that matters there.
VARIATIONS = ("funcid-learned-cold", "aid-cg-cold", "aid-lineax", "itd-truncated")
every_method = pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in VARIATIONS])


def solver_with(estimator: fb.Estimator, **kwargs: Any) -> fb.BilevelSolver:
    defaults = {
        "inner_optimizer": optax.sgd(0.05, momentum=0.5),
        "outer_optimizer": optax.adam(1e-2),
        "inner_steps": INNER_STEPS,
    }
    return fb.bilevel(PROBLEM, MODEL, estimator, **defaults | kwargs)


class Compiled(NamedTuple):
    solver: fb.BilevelSolver
    step: Any  # donates its state
    run: Any


@functools.cache
def compiled(name: str) -> Compiled:
    solver = solver_with(ESTIMATORS[name])
    return Compiled(solver, jax.jit(solver.step, donate_argnums=0), jax.jit(solver.run))


def assert_states_close(got: Any, expected: Any, rtol: float = 1e-5) -> None:
    """To `rtol` of each leaf's largest entry; keys and counts are equal."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            scale = max(float(np.max(np.abs(b))), 1e-2)
            np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale, err_msg=jax.tree_util.keystr(path))
        elif jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(jax.random.key_data(a), jax.random.key_data(b))
        else:
            np.testing.assert_array_equal(a, b)


# One program.


@every_estimator
def test_a_thousand_steps_are_one_trace_and_reuse_their_buffers(name: str) -> None:
    solver, step, _ = compiled(name)
    even, odd = (at(batches(), i) for i in (0, 1))
    state, _ = step(solver.init(jax.random.key(0), OMEGA, INNER), *even)  # from Python floats and NumPy
    traced = traces.copy()
    given = state
    for _ in range(500):
        state, _ = step(state, *odd)
        state, metrics = step(state, *even)
    assert traces == traced
    assert step._cache_size() == 1
    assert given.outer_params["scale"].is_deleted()
    assert state.step == 1001
    assert np.isfinite(metrics["outer_objective"])

    arrays = {"scale": jnp.float32(2.0), "shift": jnp.zeros(())}
    state = solver.init(jax.random.key(1), arrays, INNER)
    traced = traces.copy()
    step(state, *even)
    assert traces == traced
    assert step._cache_size() == 1


def test_weak_types_do_not_make_a_second_program() -> None:
    """Whatever a model or an optimizer starts from, `init` gives it the type that `step` gives back."""

    def init(key: jax.Array, x: jax.Array) -> Any:
        return {"w": [0.5, 1.0, 1.5], "b": 0.0}, {"calls": jnp.asarray(0.0), "limit": jnp.asarray(3)}

    def apply(theta: Any, state: Any, x: jax.Array, *, train: bool = False, key: Any = None) -> Any:
        prediction = predict({"w": jnp.stack(theta["w"]), "b": theta["b"]}, x)
        return prediction, state | {"calls": state["calls"] + jnp.ones_like(x[0, 0])} if train else state

    solver = fb.bilevel(
        PROBLEM,
        fb.Model(init, apply),
        fb.funcid(fb.pointwise_adjoint()),
        inner_optimizer=optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
        outer_optimizer=optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    )
    assert jnp.asarray(0.0).weak_type
    state = solver.init(jax.random.key(0), OMEGA, INNER)
    step = jax.jit(solver.step)
    state, _ = step(state, INNER, OUTER)
    traced = traces.copy()
    for _ in range(2):
        state, _ = step(state, INNER, OUTER)
    assert traces == traced
    assert step._cache_size() == 1
    assert state.model_state["calls"] == 3


@every_estimator
def test_the_program_keeps_to_the_device_and_its_types(name: str) -> None:
    solver = compiled(name).solver
    state = solver.init(jax.random.key(0), OMEGA, INNER)
    traced = jax.jit(solver.step).trace(state, INNER, OUTER)
    jaxpr, lowered = str(traced.jaxpr), traced.lower().as_text()
    assert "scan" in jaxpr  # this is the whole program: loops are spelt out, and so would callbacks be
    for word in ("callback", "infeed", "outfeed", "io_effect"):
        assert word not in jaxpr.lower()
        assert word not in lowered.lower()

    after, metrics = traced.out_info
    assert isinstance(after, fb.BilevelState)
    for given, returned in zip(*map(jax.tree.leaves, (state, after)), strict=True):
        assert (given.shape, given.dtype) == (returned.shape, returned.dtype)
    assert all(isinstance(key, str) and value.shape == () for key, value in metrics.items())
    assert {"outer_objective", "inner_objective", "hypergradient_norm", "explicit_norm", "implicit_norm"} <= set(
        metrics
    )
    assert {"inner_finite", "adjoint_finite", "outer_finite"} <= set(metrics)
    has_linear_solve = name.startswith("aid") or name in ("funcid-linear", "funcid-pointwise")
    assert ({"linear_residual", "linear_converged"} <= set(metrics)) == has_linear_solve


# The same numbers: step by step, in one scan, over seeds, over devices.


@functools.cache
def starts(name: str) -> fb.BilevelState:
    """The initial states of eight seeds, stacked."""
    keys = jnp.stack([jax.random.key(seed) for seed in range(DEVICES)])
    return jax.jit(jax.vmap(compiled(name).solver.init, (0, None, None)))(keys, OMEGA, INNER)


@functools.cache
def single_runs(name: str) -> tuple[fb.BilevelState, Any]:
    """Eight seeds run one by one: last states and metrics, stacked."""
    runs = [compiled(name).run(at(starts(name), seed), *batches()) for seed in range(DEVICES)]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *runs)


@every_method
def test_run_is_step_after_step(name: str) -> None:
    solver, step, _ = compiled(name)
    states, metrics = single_runs(name)
    state = solver.init(jax.random.key(3), OMEGA, INNER)
    for i in range(STEPS):
        state, step_metrics = step(state, *at(batches(), i))
        assert set(step_metrics) == set(metrics)
        for key, value in step_metrics.items():
            np.testing.assert_allclose(value, metrics[key][3, i], rtol=1e-4, atol=1e-6, err_msg=key)
    assert_states_close(state, at(states, 3))


@every_method
def test_vmap_over_seeds_equals_single_runs(name: str) -> None:
    states, metrics = single_runs(name)
    assert len(np.unique(states.inner_params["w"][:, 0])) == DEVICES
    together, together_metrics = jax.jit(jax.vmap(compiled(name).solver.run, (0, None, None)))(starts(name), *batches())
    assert_states_close(together, states)
    chex.assert_trees_all_equal_shapes(together_metrics, metrics)


# A device's program is that of a single run, whichever linear solver or mode stands in it.
@pytest.mark.parametrize("name", ["funcid-linear", "funcid-learned", "aid-cg", "itd-reverse", "alternating"])
def test_pmap_over_seeds_equals_single_runs(name: str) -> None:
    states, metrics = single_runs(name)
    spread, spread_metrics = jax.pmap(compiled(name).solver.run, in_axes=(0, None, None))(starts(name), *batches())
    assert len(spread.outer_params["scale"].sharding.device_set) == DEVICES
    assert_states_close(spread, states)
    np.testing.assert_allclose(spread_metrics["outer_objective"], metrics["outer_objective"], rtol=1e-5)


# Explicit axes are what `jax.make_mesh` makes unless told otherwise.
EXPLICIT = ("funcid-linear", "funcid-learned", "funcid-pointwise", "aid-cg", "itd-forward", "alternating")


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [(name, AxisType.Auto) for name in ESTIMATORS if name not in VARIATIONS]
    + [(name, AxisType.Explicit) for name in EXPLICIT],
)
def test_a_sharded_batch_gives_the_single_device_result(
    name: str, axis_type: AxisType, caplog: pytest.LogCaptureFixture
) -> None:
    solver, step, _ = compiled(name)
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(axis_type,))
    replicated, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (None, "batch")))
    alone = solver.init(jax.random.key(0), OMEGA, INNER)
    given = state = jax.device_put(jax.tree.map(jnp.copy, alone), replicated)
    sharded_batches = jax.device_put(batches(), split)

    sharded_step = jax.jit(solver.step)
    first, *others = [at(sharded_batches, i) for i in range(3)]
    state, _ = sharded_step(state, *first)
    with nothing_compiled(caplog):
        for batch in others:
            state, _ = sharded_step(state, *batch)

    for i in range(3):
        alone, _ = step(alone, *at(batches(), i))
    assert_states_close(state, alone, rtol=1e-5)
    for before, after in zip(*map(jax.tree.leaves, (given, state)), strict=True):
        assert after.sharding.is_equivalent_to(before.sharding, after.ndim)
        assert after.sharding.is_fully_replicated
    assert not at(sharded_batches, 0)[0]["x"].sharding.is_fully_replicated


class StepVariants(chex.TestCase):
    """With and without jit, on one device and mapped over all."""

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_variants_agree(self) -> None:
        solver = compiled("funcid-pointwise").solver
        state = solver.init(jax.random.PRNGKey(0), OMEGA, INNER)  # a raw key: chex cannot broadcast a typed one
        expected, metrics = jax.jit(solver.step)(state, INNER, OUTER)
        got, got_metrics = self.variant(solver.step)(state, INNER, OUTER)
        assert_states_close(jax.tree.map(jnp.asarray, got), expected)
        chex.assert_trees_all_close(got_metrics, metrics, rtol=1e-5, atol=1e-6)


# What the user gets.


@pytest.mark.parametrize("name", ["funcid-linear", "aid-cg", "itd-reverse", "alternating"])
def test_the_outer_update_is_the_optimizers(name: str) -> None:
    rate = 0.1
    solver = solver_with(ESTIMATORS[name], outer_optimizer=optax.sgd(rate), inner_optimizer=optax.sgd(1e-2))
    state = solver.init(jax.random.key(0), OMEGA, INNER)
    after, metrics = jax.jit(solver.step)(state, INNER, OUTER)
    moved = jax.tree.map(lambda a, b: (b - a) / rate, after.outer_params, state.outer_params)
    norm = optax.tree.norm(moved)
    np.testing.assert_allclose(norm, metrics["hypergradient_norm"], rtol=1e-4)
    # Explicit part: d/d scale of 0.1 scale^2 at 1, and none for the shift at 0.
    np.testing.assert_allclose(metrics["explicit_norm"], 0.2, rtol=1e-5)
    explicit = {"scale": 0.2, "shift": 0.0}
    implicit = optax.tree.norm(jax.tree.map(lambda m, e: m - e, moved, explicit))
    np.testing.assert_allclose(implicit, metrics["implicit_norm"], rtol=1e-3, atol=1e-5)
    assert (metrics["implicit_norm"] > 1e-3) == (name != "alternating")
    np.testing.assert_allclose(metrics["outer_objective"], outer_at(after.inner_params), rtol=1e-5)


def outer_at(theta: Any) -> float:
    omega = jax.tree.map(jnp.float32, OMEGA)
    return float(outer_objective(omega, predict(theta, OUTER["x"]), OUTER))


AUX_ESTIMATORS = ("funcid-pointwise", "aid-cg", "itd-reverse", "itd-forward", "alternating")


@pytest.mark.filterwarnings("ignore:hypergradient. the inner solution is not a stationary point")
@pytest.mark.parametrize("name", AUX_ESTIMATORS)
def test_aux_reaches_the_metrics(name: str) -> None:
    def inner(omega: Any, v: Any, batch: Any) -> Any:
        return inner_objective(omega, v, batch), {"seen": {"y": batch["y"]}, "count": jnp.int32(3)}

    def outer(omega: Any, v: Any, batch: Any) -> Any:
        return outer_objective(omega, v, batch), (omega["scale"], v)

    problem = fb.FunctionalProblem(inner, outer, inputs, has_aux=True)
    solver = fb.bilevel(
        problem, MODEL, ESTIMATORS[name], inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1), inner_steps=3
    )
    state = solver.init(jax.random.key(0), OMEGA, INNER)
    after, metrics = jax.jit(solver.step)(state, INNER, OUTER)
    np.testing.assert_allclose(metrics["inner/seen/y"], jnp.mean(INNER["y"]), rtol=1e-5)
    assert metrics["inner/count"] == 3
    assert metrics["outer/0"] == 1.0
    np.testing.assert_allclose(metrics["outer/1"], jnp.mean(predict(after.inner_params, OUTER["x"])), rtol=1e-4)

    h = fb.hypergradient(
        problem,
        MODEL,
        ESTIMATORS[name],
        OMEGA,
        after.inner_params,
        INNER,
        OUTER,
        inner_optimizer=optax.sgd(0.1),
        key=jax.random.key(0),
    )
    assert h.metrics["outer/0"] == 1.0


# Parametric problems: a ridge regression's penalty.

PARAMETRIC = [name for name, estimator in ESTIMATORS.items() if not estimator.functional]
RIDGE = fb.ParametricProblem(
    lambda omega, theta, batch: (
        jnp.mean((jnp.dot(batch["x"], theta) - batch["y"]) ** 2) + jnp.exp(omega) * jnp.sum(theta**2)
    ),
    lambda omega, theta, batch: jnp.mean((jnp.dot(batch["x"], theta) - batch["y"]) ** 2) + 0.0 * omega,
)


@pytest.mark.parametrize("name", PARAMETRIC)
def test_a_parametric_problem_needs_no_model(name: str) -> None:
    solver = fb.bilevel(
        RIDGE, None, ESTIMATORS[name], inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1), inner_steps=3
    )
    theta = np.ones(3, np.float32)
    with_batch = solver.init(jax.random.key(0), 0.0, INNER, theta)
    state = solver.init(jax.random.key(0), 0.0, None, inner_params=theta)
    assert_states_close(state, with_batch._replace(batch_form=state.batch_form))
    after, metrics = jax.jit(solver.step)(state, INNER, OUTER)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert np.any(after.inner_params != theta)
    assert (after.outer_params != 0.0) == (name != "alternating")
    assert metrics["inner_finite"] & metrics["adjoint_finite"] & metrics["outer_finite"]


def test_init_starts_from_the_given_inner_params() -> None:
    solver = compiled("aid-cg").solver
    theta = {"w": np.ones(3, np.float32), "b": np.float32(2.0)}
    given = solver.init(jax.random.key(0), OMEGA, INNER, theta)
    chex.assert_trees_all_equal(given.inner_params, theta)
    drawn = solver.init(jax.random.key(0), OMEGA, INNER)
    other = solver.init(jax.random.key(1), OMEGA, INNER)
    assert np.all(drawn.inner_params["w"] != other.inner_params["w"])


@pytest.mark.usefixtures("x64")
def test_dtypes_are_the_users() -> None:
    solver = compiled("funcid-linear").solver
    for dtype in (jnp.float32, jnp.float64):
        inner, outer, theta = jax.tree.map(
            lambda x, dtype=dtype: jnp.asarray(x, dtype), (INNER, OUTER, init_weights(jax.random.key(0), INNER["x"]))
        )
        omega = {"scale": jnp.ones((), dtype), "shift": jnp.zeros((), dtype)}
        state = solver.init(jax.random.key(0), omega, inner, theta)
        after, metrics = jax.eval_shape(solver.step, state, inner, outer)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        floats = [x.dtype for x in jax.tree.leaves((after, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert set(floats) == {jnp.dtype(dtype)}


# Warm starts.


def warm_metrics(estimator: fb.Estimator, num_steps: int = 20) -> tuple[fb.BilevelState, Any]:
    """The same batch again and again with both levels (nearly) at rest: only the estimator makes progress."""
    solver = solver_with(estimator, inner_optimizer=optax.sgd(1e-6), outer_optimizer=optax.sgd(1e-6), inner_steps=1)
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_steps, *x.shape)), (INNER, OUTER))
    return jax.jit(solver.run)(solver.init(jax.random.key(0), OMEGA, INNER), *repeated)


LINEAR_SOLVERS = {
    "cg": fb.cg(1, damping=1.0),
    "normal_cg": fb.normal_cg(1, damping=1.0),
    "gmres": fb.gmres(1, damping=1.0),
    "gradient_descent": fb.gradient_descent(1, 0.2, damping=1.0),
}


@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_linear_systems_are_warm_started(name: str) -> None:
    _, cold = warm_metrics(fb.aid(LINEAR_SOLVERS[name], warm_start=False))
    state, warm = warm_metrics(fb.aid(LINEAR_SOLVERS[name]))
    np.testing.assert_allclose(warm["linear_residual"][0], cold["linear_residual"][0], rtol=1e-4)
    np.testing.assert_allclose(cold["linear_residual"][-1], cold["linear_residual"][0], rtol=1e-2)
    assert warm["linear_residual"][-1] < 0.5 * warm["linear_residual"][0]
    chex.assert_trees_all_equal_shapes_and_dtypes(state.estimator_state, state.inner_params)


def test_the_learned_adjoint_is_warm_started() -> None:
    num_steps, outer_steps = 4, 30
    state, warm = warm_metrics(fb.funcid(fb.learned_adjoint(optax.adam(3e-2), num_steps)), outer_steps)
    start = solver_with(ESTIMATORS["funcid-learned"]).init(jax.random.key(0), OMEGA, INNER)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.estimator_state, start.estimator_state)
    assert state.estimator_state.opt_state[0].count == num_steps * outer_steps
    objective = warm["adjoint_objective"]
    assert np.all(np.diff(objective[5:]) <= 1e-4)  # one descent throughout, not thirty
    assert objective[-1] < 0  # below a = 0

    state, cold = warm_metrics(
        fb.funcid(fb.learned_adjoint(optax.adam(3e-2), num_steps, warm_start=False)), outer_steps
    )
    assert state.estimator_state == ()
    assert len(np.unique(cold["adjoint_objective"])) == outer_steps  # another network each time
    assert np.mean(cold["adjoint_objective"][-5:]) > objective[-1]


def test_the_inner_level_is_warm_started() -> None:
    solver = solver_with(ESTIMATORS["alternating"], inner_optimizer=optax.adam(1e-2))
    state, _ = jax.jit(solver.run)(solver.init(jax.random.key(0), OMEGA, INNER), *batches())
    assert state.inner_opt_state[0].count == STEPS * INNER_STEPS
    assert state.outer_opt_state[0].count == STEPS


# Any optax chain on either level.

QUIET = fb.alternating()  # the explicit gradient alone: 0.2 * scale


def history(estimator: fb.Estimator, num_steps: int, **kwargs: Any) -> tuple[list[Any], list[Any]]:
    """outer_params["scale"] and inner_params["w"] before and after each of `num_steps` steps on one batch."""
    solver = solver_with(estimator, **kwargs)
    state = solver.init(jax.random.key(0), OMEGA, INNER)
    step = jax.jit(solver.step)
    outer, inner = [state.outer_params["scale"]], [state.inner_params["w"]]
    for _ in range(num_steps):
        state, metrics = step(state, INNER, OUTER)
        assert metrics["inner_finite"] & metrics["adjoint_finite"] & metrics["outer_finite"]
        outer.append(state.outer_params["scale"])
        inner.append(state.inner_params["w"])
    assert step._cache_size() == 1
    return outer, inner


def moves(values: list[Any]) -> list[bool]:
    return [bool(np.any(a != b)) for a, b in itertools.pairwise(values)]


def vanishing(count: Any) -> Any:
    return jnp.where(count < 4, 0.1, 0.0)


OPTAX: dict[str, tuple[dict[str, Any], list[bool], list[bool]]] = {
    # name: optimizers, on which of six outer steps outer_params move, and inner_params
    "outer schedule": ({"outer_optimizer": optax.sgd(vanishing)}, [True] * 4 + [False] * 2, [True] * 6),
    "inner schedule": (
        {"inner_optimizer": optax.sgd(vanishing), "inner_steps": 2},
        [True] * 6,
        [True] * 2 + [False] * 4,
    ),
    "outer MultiSteps": (
        {"outer_optimizer": optax.MultiSteps(optax.adam(0.1), 3)},
        [False, False, True] * 2,
        [True] * 6,
    ),
    "outer MultiSteps as a transformation": (
        {"outer_optimizer": optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation()},
        [False, False, True] * 2,
        [True] * 6,
    ),
    "inner MultiSteps": (
        {"inner_optimizer": optax.MultiSteps(optax.adam(0.1), 4), "inner_steps": 2},
        [True] * 6,
        [False, True] * 3,
    ),
    "frozen parts": (
        {
            "inner_optimizer": optax.partition(
                {"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, {"b": "train", "w": "freeze"}
            )
        },
        [True] * 6,
        [False] * 6,
    ),
    "injected hyperparameters": (
        {"outer_optimizer": optax.inject_hyperparams(optax.sgd)(learning_rate=vanishing)},
        [True] * 4 + [False] * 2,
        [True] * 6,
    ),
    "polyak outer step size": ({"outer_optimizer": optax.polyak_sgd(0.1)}, [True] * 6, [True] * 6),
    "polyak inner step size": ({"inner_optimizer": optax.polyak_sgd(0.1)}, [True] * 6, [True] * 6),
    "lookahead of the inner level's signs": ({"inner_optimizer": optax.lion(1e-2)}, [True] * 6, [True] * 6),
}


@pytest.mark.parametrize("name", OPTAX)
def test_optax_state_is_carried_on_both_levels(name: str) -> None:
    optimizers, outer_moves, inner_moves = OPTAX[name]
    outer, inner = history(QUIET, len(outer_moves), **optimizers)
    assert moves(outer) == outer_moves
    assert moves(inner) == inner_moves


def test_itd_goes_through_multi_steps_and_schedules() -> None:
    """Nothing moves in the first three of four accumulated steps, so there is no implicit part until the fourth."""
    optimizer = optax.MultiSteps(optax.sgd(vanishing), 4)
    solver = solver_with(fb.itd(1), inner_optimizer=optimizer, inner_steps=1)
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), (INNER, OUTER))
    _, metrics = jax.jit(solver.run)(solver.init(jax.random.key(0), OMEGA, INNER), *repeated)
    assert list(metrics["implicit_norm"] > 0) == [False, False, False, True] * 2


def test_clipping_and_weight_decay_on_the_outer_level() -> None:
    limit = 1e-3
    outer, _ = history(QUIET, 3, outer_optimizer=optax.chain(optax.clip_by_global_norm(limit), optax.sgd(1.0)))
    np.testing.assert_allclose(-np.diff(outer), limit, rtol=1e-2)

    decay, rate = 0.5, 0.1
    plain, _ = history(QUIET, 1, outer_optimizer=optax.sgd(rate))
    decayed, _ = history(QUIET, 1, outer_optimizer=optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate)))
    np.testing.assert_allclose(plain[1] - decayed[1], rate * decay * plain[0], rtol=1e-5)


def test_clipping_and_weight_decay_on_the_inner_level() -> None:
    limit = 1e-3
    optimizer = optax.chain(optax.clip_by_global_norm(limit), optax.sgd(1.0))
    _, inner = history(QUIET, 1, inner_optimizer=optimizer, inner_steps=1)
    assert 0 < np.linalg.norm(inner[1] - inner[0]) <= limit * (1 + 1e-5)

    decay, rate = 0.5, 0.1
    _, plain = history(QUIET, 1, inner_optimizer=optax.sgd(rate), inner_steps=1)
    _, decayed = history(
        QUIET, 1, inner_optimizer=optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate)), inner_steps=1
    )
    np.testing.assert_allclose(plain[1] - decayed[1], rate * decay * plain[0], rtol=1e-4, atol=1e-6)


def test_an_inner_line_search() -> None:
    """`optax.lbfgs` needs value, gradient and objective; a few of its steps solve what gradient descent does not."""
    design = np.column_stack([INNER["x"], np.ones(N)])
    squares = np.linalg.lstsq(design, INNER["y"])[1]
    errors = {}
    for name, optimizer in (("lbfgs", optax.lbfgs()), ("sgd", optax.sgd(0.05))):
        solver = solver_with(
            ESTIMATORS["funcid-linear"],
            inner_optimizer=optimizer,
            outer_optimizer=optax.sgd(1e-6),
            inner_steps=10,
        )
        state = solver.init(jax.random.key(0), OMEGA, INNER)
        step = jax.jit(solver.step)
        for _ in range(2):
            state, metrics = step(state, INNER, OUTER)
            assert metrics["inner_finite"] & metrics["outer_finite"]
        assert step._cache_size() == 1
        errors[name] = float(metrics["inner_objective"]) * N / squares[0] - 1
    assert errors["lbfgs"] < 1e-4
    assert errors["sgd"] > 1e-2


@pytest.mark.parametrize("level", ["inner", "outer"])
def test_reduce_on_plateau_sees_the_objective(level: str) -> None:
    """On a batch that stands still at a learning rate of nearly zero, the scale is reduced."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2, atol=1e-2)
    optimizer = optax.chain(optax.sgd(1e-6), plateau)
    solver = solver_with(
        QUIET,
        **{"inner_optimizer": optax.sgd(1e-6), "outer_optimizer": optax.sgd(1e-6), f"{level}_optimizer": optimizer},
    )
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (9, *x.shape)), (INNER, OUTER))
    start = solver.init(jax.random.key(0), OMEGA, INNER)
    end, metrics = jax.jit(solver.run)(start, *repeated)
    assert metrics[f"{level}_finite"].all()  # although its best value starts at infinity
    state = getattr(end, f"{level}_opt_state")[-1]
    np.testing.assert_allclose(state.best_value, metrics[f"{level}_objective"][0], rtol=1e-5)
    assert state.scale < 0.6


# The state is a pytree.


def on_the_host(state: Any) -> Any:
    """As NumPy arrays, a typed key as its data."""

    def to_numpy(x: Any) -> Any:
        return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    return jax.tree.map(to_numpy, state)


def from_the_host(host: Any, like: Any) -> Any:
    def to_jax(x: Any, like: Any) -> Any:
        return jax.random.wrap_key_data(x) if jnp.issubdtype(like.dtype, jax.dtypes.prng_key) else jnp.asarray(x)

    return jax.tree.map(to_jax, host, like)


@pytest.mark.parametrize("name", ["funcid-learned", "aid-cg", "itd-reverse"])
@pytest.mark.parametrize("how", ["tree map", "numpy", "orbax"])
def test_a_restored_state_goes_on_as_if_nothing_had_happened(name: str, how: str, tmp_path: Path) -> None:
    solver, step, _ = compiled(name)
    state = solver.init(jax.random.key(0), OMEGA, INNER)
    for i in range(2):
        state, _ = step(state, *at(batches(), i))
    shapes = jax.eval_shape(lambda: state)

    if how == "tree map":
        restored = jax.tree.map(jnp.copy, state)
    elif how == "numpy":
        restored = from_the_host(on_the_host(state), state)
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / "state", shapes)
        assert isinstance(restored, fb.BilevelState)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)

    traced = traces.copy()
    for i in range(2, STEPS):
        state, _ = step(state, *at(batches(), i))
        restored, _ = step(restored, *at(batches(), i))
    assert traces == traced
    chex.assert_trees_all_equal(on_the_host(restored), on_the_host(state))
