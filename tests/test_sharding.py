"""`fb.data_parallel`, `fb.fully_sharded` on eight simulated devices: results of one, placed for ever, few messages."""

import itertools
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_data_parallel import ESTIMATORS, MODEL, PROJECTED, features, make
from test_stochastic import METHODS, OMEGA, THETA, build, terms

import funcbilevel as fb

ON_MESH = {"data_parallel": fb.data_parallel, "fully_sharded": fb.fully_sharded}
SAMPLES = 64
FAST = {("soba", "data_parallel"), ("saba", "fully_sharded"), ("f2sa", "fully_sharded")}


def mesh(*shape: int, names: tuple[str, ...] = ("data",), kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    shape = shape or (8,)
    return jax.make_mesh(shape, names, devices=jax.devices()[: int(np.prod(shape))], axis_types=(kind,) * len(shape))


def batch(seed: int = 0, samples: int = SAMPLES) -> Any:
    x = np.random.default_rng(seed).normal(size=(samples, 3)).astype(np.float32)
    return (x, np.sin(np.sum(x, axis=1, keepdims=True)), np.full((samples, 1), 1.5, np.float32))


def start(solver: fb.BilevelSolver) -> fb.BilevelState:
    return solver.init(jax.random.key(2), {"slope": 0.5}, batch())


def assert_placed_alike(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def assert_close(a: Any, b: Any, atol: float = 2e-5) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol)


ROWS = {name: (estimator, MODEL) for name, estimator in ESTIMATORS.items()}
ROWS["funcid-linear-projected"] = (fb.funcid(fb.linear_adjoint(features, ridge=0.1)), PROJECTED)
ROWS["darts"] = (fb.darts(0.1, radius=0.1), MODEL)
ROWS["pzobo"] = (fb.pzobo(2, 2, radius=0.3), MODEL)
ROWS["evolution-strategy"] = (fb.evolution_strategy(2, 2, 0.3), MODEL)
ROWS["prox-aid"] = (fb.prox_aid(fb.cg(5, damping=1.0), lambda theta, omega, step_size: theta), MODEL)
ROWS["funcid-kernel"] = (fb.funcid(fb.kernel_adjoint(fb.gaussian_kernel(1.0), 0.1)), MODEL)


@pytest.mark.parametrize("kind", ON_MESH)
@pytest.mark.parametrize("name", ROWS)
def test_eight_devices_give_the_step_of_one(name: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    one = make(ROWS[name][0], None, ROWS[name][1])
    many = ON_MESH[kind](one, mesh())
    expected, state = start(one), start(many)
    step = jax.jit(one.step)
    with jax.log_compiles():
        for i in range(3):
            expected, history = step(expected, batch(i), batch(i + 5))
            before = state
            state, metrics = many.step(state, batch(i), batch(i + 5))
            assert_placed_alike(state, before)
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]
    assert sum("step_on_mesh" in message for message in compiled) == 1
    assert_close((state.outer_params, state.inner_params), (expected.outer_params, expected.inner_params))
    for key in ("outer_objective", "inner_objective", "hypergradient_norm", "inner_finite"):
        np.testing.assert_allclose(metrics[key], history[key], rtol=1e-4, atol=1e-5)


def finite_sums(samples: int = 8) -> tuple[dict[str, Any], dict[str, Any]]:
    """The quadratics of `test_stochastic.py` with more samples: 4 inner and 3 outer blocks of 8."""
    times = 1 + 0.1 * np.arange(samples // 2)
    inner, outer = (jax.tree.map(lambda x: np.concatenate([x * t for t in times]), level) for level in terms())
    return inner, outer


def sums(inner: Any, outer: Any) -> tuple[fb.FiniteSum, fb.FiniteSum]:
    return fb.finite_sum(inner, 8), fb.finite_sum(outer, 8, key=jax.random.key(3))


def two_steps(solver: fb.BilevelSolver, inner: fb.FiniteSum, outer: fb.FiniteSum) -> Any:
    step = jax.jit(solver.step)
    state = solver.init(jax.random.key(1), OMEGA, inner, THETA, outer)
    state, _ = step(state, inner, outer)
    return step(state, inner, outer)


STOCHASTIC = [
    pytest.param(name, kind, marks=[pytest.mark.slow] * ((name, kind) not in FAST), id=f"{name}-{kind}")
    for name in METHODS
    for kind in ON_MESH
]


@pytest.mark.parametrize(("name", "kind"), STOCHASTIC)
def test_stochastic_methods_on_eight_devices_take_the_steps_of_one(name: str, kind: str, x64: None) -> None:
    one = build(name)
    expected, history = two_steps(one, *sums(*finite_sums()))
    state, metrics = two_steps(ON_MESH[kind](one, mesh()), *sums(*finite_sums()))
    assert len(state.outer_params.sharding.device_set) == 8
    for x, y in zip(jax.tree.leaves((state, metrics)), jax.tree.leaves((expected, history)), strict=True):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


def wide() -> fb.BilevelSolver:
    hidden = lambda theta, x: jnp.tanh(x @ theta["hidden"])
    model = fb.from_function(
        lambda key, x: {"hidden": jax.random.normal(key, (3, 512)), "head": jnp.ones((512, 8)) / 512},
        lambda theta, x: hidden(theta, x) @ theta["head"],
    )
    problem = fb.FunctionalProblem(
        lambda w, v, b: jnp.mean((v - w[None, :] * b[1]) ** 2), lambda w, v, b: jnp.mean((v - 2 * b[1]) ** 2)
    )
    return fb.bilevel(
        problem,
        model,
        fb.funcid(fb.learned_adjoint(optax.adam(1e-2), 3)),
        inner_optimizer=optax.adam(1e-2),
        outer_optimizer=optax.adam(1e-2),
        inner_steps=3,
    )


def test_a_fully_sharded_state_takes_an_eighth() -> None:
    """Of the bytes on one device; it stays so, step after step."""
    solver = wide()
    one = solver.init(jax.random.key(0), jnp.ones(8), batch())
    many = fb.fully_sharded(solver, mesh())
    state = many.init(jax.random.key(0), jnp.ones(8), batch())

    def on_first(tree: Any) -> int:
        shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == jax.devices()[0]]
        return sum(s.data.nbytes for s in shards if hasattr(s.data, "nbytes"))

    for _ in range(2):
        assert on_first(state) <= 0.2 * on_first(one)
        before = state
        state, _ = many.step(state, batch(), batch(1))
        assert_placed_alike(state, before)


# Sources of batches, and `train`.


def sample(key: Any, step: Any) -> Any:
    x = jax.random.normal(key, (SAMPLES, 3))
    b = (x, jnp.sin(jnp.sum(x, axis=1, keepdims=True)), jnp.full((SAMPLES, 1), 1.5))
    return b, b


def kinds_of_data() -> dict[str, Any]:
    draws = fb.Sampler(jax.tree_util.Partial(lambda key: sample(key, 0)[0]))
    blocks = fb.finite_sum(jax.tree.map(jnp.asarray, batch(samples=4 * SAMPLES)), SAMPLES)
    several = fb.Minibatches(jax.tree.map(lambda *xs: np.stack(xs), *(batch(i) for i in range(3))))
    return {
        "sampler": lambda: sample,
        "fb.Sampler": lambda: lambda key, step: (draws, sample(key, step)[1]),
        "finite sum": lambda: jax.tree_util.Partial(lambda blocks, key, step: (blocks, blocks), blocks),
        "iterator": lambda: ((batch(i), batch(-i % 7)) for i in itertools.count()),
        "minibatches": lambda: itertools.repeat((several, batch())),
    }


@pytest.mark.parametrize("kind", ON_MESH)
@pytest.mark.parametrize("name", kinds_of_data())
def test_training_on_a_mesh(name: str, kind: str, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As on one device, with one program, and resumed from its checkpoint."""
    one = make(ESTIMATORS["aid-cg"], None)
    many = ON_MESH[kind](one, mesh())
    data = kinds_of_data()[name]
    expected, history = fb.train(one, start(one), data(), 7, chunk=3, progress=False)
    with jax.log_compiles():
        state, metrics = fb.train(many, start(many), data(), 7, chunk=3, progress=False, prefetch=True)
    messages = [r.getMessage() for r in caplog.records]
    assert sum(m.startswith("Compiling") and "_chunk" in m for m in messages) == 1
    assert_close(state.outer_params, expected.outer_params, atol=1e-4)
    np.testing.assert_allclose(metrics["outer_objective"], history["outer_objective"], rtol=1e-3, atol=1e-5)
    assert_placed_alike(state, start(many))
    checkpoint = fb.Checkpoint(tmp_path, every=3)
    fb.train(many, start(many), data(), 3, chunk=3, progress=False, checkpoint=checkpoint)
    again, _ = fb.train(many, start(many), data(), 7, chunk=3, progress=False, checkpoint=checkpoint)
    assert_placed_alike(again, state)
    for a, b in zip(jax.tree.leaves(again.outer_params), jax.tree.leaves(state.outer_params)):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_of_eight_devices_goes_on_on_four_and_on_one(tmp_path: Any) -> None:
    """Whichever way the solver was divided."""
    one = make(ESTIMATORS["funcid-linear"], None)
    expected, _ = fb.train(one, start(one), sample, 8, chunk=4, progress=False)
    wide = fb.fully_sharded(one, mesh())
    fb.train(wide, start(wide), sample, 4, chunk=4, progress=False, checkpoint=fb.Checkpoint(tmp_path / "8"))
    others = {"4": fb.fully_sharded(one, mesh(4)), "copied": fb.data_parallel(one, mesh(4)), "1": one}
    for name, solver in others.items():
        shutil.copytree(tmp_path / "8", tmp_path / name)
        checkpoint = fb.Checkpoint(tmp_path / name)
        state, _ = fb.train(solver, start(solver), sample, 8, chunk=4, progress=False, checkpoint=checkpoint)
        assert state.step == 8
        assert_placed_alike(state, start(solver))
        assert_close(state.outer_params, expected.outer_params, atol=1e-6)


def test_batches_of_an_iterator_are_put_where_they_belong() -> None:
    many = fb.data_parallel(make(ESTIMATORS["aid-cg"], None), mesh())
    stacked = jax.tree.map(lambda x: np.stack([x] * 5), (batch(), batch()))
    for leaf in jax.tree.leaves(many.init.put_stacked(stacked)):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh(), P(None, "data")), leaf.ndim)


def test_seeds_on_one_axis_and_data_on_the_other() -> None:
    solver = make(ESTIMATORS["funcid-linear"], None)
    both = mesh(2, 4, names=("seed", "data"))
    seeds = jax.random.split(jax.random.key(0), 4)
    states = jax.vmap(lambda key: solver.init(key, {"slope": 0.5}, batch()))(seeds)
    many = solver._replace(init=lambda *_: states, step=jax.vmap(solver.step))
    on_mesh = fb.data_parallel(many, both, seeds="seed")
    batches = jax.tree.map(lambda x: np.stack([x * (1 + 0.1 * i) for i in range(4)]), batch())
    state = on_mesh.init(None, None, None)
    expected = states
    for _ in range(2):
        before = state
        state, metrics = on_mesh.step(state, batches, batches)
        assert_placed_alike(state, before)
        expected, history = jax.jit(many.step)(expected, batches, batches)
    assert state.outer_params["slope"].sharding.spec == P("seed")
    assert_close(state.outer_params, expected.outer_params)
    np.testing.assert_allclose(metrics["outer_objective"], history["outer_objective"], rtol=1e-4)


@pytest.mark.parametrize("kind", ON_MESH)
def test_many_steps_in_one_scan(kind: str) -> None:
    one = make(ESTIMATORS["funcid-linear"], None)
    many = ON_MESH[kind](one, mesh())
    batches = jax.tree.map(lambda *xs: jnp.stack(xs), *(batch(i) for i in range(3)))
    expected, _ = one.run(start(one), batches, batches)
    state, metrics = many.run(start(many), batches, batches)
    assert_close(state.outer_params, expected.outer_params)
    assert metrics["outer_objective"].shape == (3,)


# Messages between devices.


def collectives(solver: fb.BilevelSolver, kind: str) -> dict[str, list[str]]:
    """Kind of collective -> where each stands in the compiled step: in which loop, or outside."""
    many = ON_MESH[kind](solver, mesh())
    state = start(many)
    placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh(), P("data"))), (batch(), batch(1)))
    text = jax.jit(many.step).lower(state, *placed).compile().as_text()
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        match = re.search(
            r"= .*? (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line
        )
        if match:
            found.setdefault(match[1], []).append("loop" if "while/body" in line else "once")
    return found


STEPS = {"inner_optimizer": optax.adam(1e-2), "outer_optimizer": optax.adam(1e-2), "inner_steps": 10}


@pytest.mark.parametrize(
    ("name", "kind", "most"),
    [
        # In loops: an inner step, a conjugate gradient. Once: the moments, the first residual, the flags, and all that
        # is left: cross derivative, values, norms.
        ("funcid-linear", "data_parallel", {"all-reduce": (2, 4)}),
        # In loops: an inner step; an adjoint step, on each of its two batches. Once: the flags, and all that is left.
        ("funcid-learned", "data_parallel", {"all-reduce": (3, 2)}),
        # And each of the two layers, in each computation that uses it.
        ("funcid-linear", "fully_sharded", {"all-reduce": (3, 4), "all-gather": (2, 2)}),
        ("funcid-learned", "fully_sharded", {"all-reduce": (5, 2), "all-gather": (7, 4)}),
    ],
)
def test_messages_of_a_step(name: str, kind: str, most: dict[str, tuple[int, int]]) -> None:
    """Of each kind, in loops and outside of them."""
    from test_data_parallel import problem

    estimator = {
        "funcid-linear": fb.funcid(fb.linear_adjoint(features)),
        "funcid-learned": fb.funcid(fb.learned_adjoint(optax.adam(1e-2), 10)),
    }[name]
    found = collectives(fb.bilevel(problem(None), MODEL, estimator, **STEPS), kind)
    assert set(found) == set(most)
    for message, (in_loops, once) in most.items():
        assert found[message].count("loop") <= in_loops
        assert found[message].count("once") <= once


@pytest.mark.parametrize("kind", ON_MESH)
def test_a_mesh_with_explicit_axes_is_taken_for_one_with_auto_axes(kind: str) -> None:
    """Arrays that are on it as well; but the solver does not run where it is set."""
    solver, explicit = make(ESTIMATORS["aid-cg"], None), mesh(kind=AxisType.Explicit)
    states = []
    for where in (explicit, mesh()):
        many = ON_MESH[kind](solver, where)
        there = jax.device_put(batch(), NamedSharding(where, P("data")))
        states.append(many.step(start(many), there, batch())[0])
    assert_placed_alike(*states)
    assert_close(states[0].outer_params, states[1].outer_params, atol=0)
    with jax.set_mesh(explicit), pytest.raises(ValueError, match=f"{kind}: .*call it outside of that"):
        many.step(states[1], batch(), batch())


# Errors.


@pytest.mark.parametrize("kind", ON_MESH)
def test_errors(kind: str) -> None:
    solver = make(ESTIMATORS["aid-cg"], None)
    make_on = ON_MESH[kind]
    with pytest.raises(TypeError, match=f"{kind}: mesh must be a jax.sharding.Mesh, got list"):
        make_on(solver, jax.devices())  # pyright: ignore
    with pytest.raises(ValueError, match=f"{kind}: mesh must have the axis 'samples', got 'data'"):
        make_on(solver, mesh(), axis="samples")
    many = make_on(solver, mesh())
    with pytest.raises(
        ValueError, match=rf"{kind}: inner_batch\['0'\] has 30 samples, which the 8 devices of mesh axis"
    ):
        many.step(start(many), batch(samples=30), batch())
    with pytest.raises(ValueError, match=rf"{kind}: outer_batch\['0'\] has 30 samples"):
        many.step(start(many), batch(), batch(samples=30))
