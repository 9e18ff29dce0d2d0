"""`bilevel(..., outer_model=)`: the step without it, from one evaluation of the outer network and one derivative."""

import functools
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import funcbilevel as fb

N, WIDE, HIDDEN, OUTPUTS = 8, 37, 5, 2  # nothing else has 37 columns

# An instrumental regression. The inner batch is (instruments, treatments), the outer one (instruments, outcomes); the
# outer objective has a term in the treatment features themselves.


def inner_objective(f: jax.Array, v: jax.Array, batch: Any) -> jax.Array:
    return jnp.mean((v - f) ** 2)


def outer_objective(f: jax.Array, v: jax.Array, batch: Any) -> jax.Array:
    return jnp.mean((jnp.sum(v, axis=1) - batch[1]) ** 2) + 0.1 * jnp.mean(f**4)


def network(omega: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ omega["in"]) @ omega["out"]


def init_network(key: jax.Array, x: jax.Array) -> Any:
    keys = jax.random.split(key)
    return {
        "in": jax.random.normal(keys[0], (x.shape[1], HIDDEN), x.dtype) / x.shape[1] ** 0.5,
        "out": jax.random.normal(keys[1], (HIDDEN, OUTPUTS), x.dtype),
    }


MODEL = fb.from_function(
    lambda key, z: 0.1 * jax.random.normal(key, (z.shape[1], OUTPUTS), z.dtype), lambda theta, z: z @ theta
)
OUTER_MODEL = fb.from_function(init_network, network)


def treatments(batch: Any) -> jax.Array:
    return batch[1]


@functools.cache
def batches(dtype: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    inner = rng.normal(size=(N, 3)), rng.normal(size=(N, WIDE))
    outer = rng.normal(size=(N + 1, 3)), rng.normal(size=N + 1)
    return jax.tree.map(lambda a: a.astype(dtype), (inner, outer))


ESTIMATORS: dict[str, fb.Estimator] = {
    "funcid-linear": fb.funcid(fb.linear_adjoint(lambda theta, z: z, ridge=0.1)),
    "aid-cg": fb.aid(fb.cg(3)),
    "itd": fb.itd(2),
    "alternating": fb.alternating(),
    "penalty-value": fb.value_penalty(optax.sgd(0.1), 3, 10.0),
    "penalty-gradient": fb.gradient_penalty(optax.sgd(0.1), 3, 10.0),
}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def solver_of(name: str, outer_model: Any = OUTER_MODEL, problem: Any = None) -> fb.BilevelSolver:
    return fb.bilevel(
        problem or fb.FunctionalProblem(inner_objective, outer_objective),
        MODEL,
        ESTIMATORS[name],
        inner_optimizer=optax.sgd(0.1, momentum=0.5),
        outer_optimizer=optax.sgd(0.1),
        inner_steps=3,
        outer_model=outer_model,
        outer_inputs=treatments,
    )


def calling_the_network(name: str, inner: Any) -> fb.BilevelSolver:
    """The same problem with objectives that call the network on omega themselves."""
    problem = fb.FunctionalProblem(
        lambda omega, v, batch: inner_objective(network(omega, batch[1]), v, batch),
        lambda omega, v, batch: outer_objective(network(omega, inner[1]), v, batch),
    )
    return solver_of(name, None, problem)


@every_estimator
def test_the_step_is_that_of_objectives_that_call_the_network(x64, name):
    inner, outer = batches(np.float64)
    with_model, without = solver_of(name), calling_the_network(name, inner)
    state = with_model.init(jax.random.key(0), None, inner)
    other = without.init(jax.random.key(0), state.outer_params, inner)
    first = state
    steps = jax.jit(with_model.step), jax.jit(without.step)
    for _ in range(2):
        before = state
        (state, metrics), (other, other_metrics) = steps[0](state, inner, outer), steps[1](other, inner, outer)
    for part in ("outer_params", "inner_params", "estimator_state"):
        chex.assert_trees_all_close(getattr(state, part), getattr(other, part), rtol=1e-10, atol=1e-12)
    for key in ("outer_objective", "inner_objective", "hypergradient_norm"):
        np.testing.assert_allclose(metrics[key], other_metrics[key], rtol=1e-10)
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), state.outer_params, first.outer_params)
    assert min(jax.tree.leaves(moved)) > 1e-3

    # The parts are those of the derivatives by the network's output, and each is there. A penalty's is taken at y.
    if not name.startswith("penalty"):
        f = network(before.outer_params, inner[1])
        np.testing.assert_allclose(metrics["explicit_norm"], jnp.linalg.norm(0.4 * f**3 / f.size), rtol=1e-10)
    assert (float(metrics["implicit_norm"]) > 1e-3) == (name != "alternating")


# What the compiled step costs.


def products(text: str) -> tuple[list[str], bool]:
    """The matrix products in an HLO text that have a 37 among their axes, and whether any is part of a loop."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line)):
            computations[header[1]] = lines = []
        elif " = " in line:
            lines.append(line.strip())
    shape = {m[1]: m[2] for m in re.finditer(r"%?([\w.\-]+) = \w+\[([\d,]*)\]", text)}

    def wide(line: str) -> bool:
        product = re.match(r"(?:ROOT )?%?([\w.\-]+) = .*? (?:dot|custom-call)\((.*?)\)", line)
        if product is None or ("custom-call" in line and "matmul" not in line):
            return False
        names = [product[1], *re.findall(r"%([\w.\-]+)", product[2])]
        return any(str(WIDE) in shape.get(name, "").split(",") for name in names)

    found = {name: [line for line in lines if wide(line)] for name, lines in computations.items()}
    looped = set(re.findall(r"body=%?([\w.\-]+)", text))
    reached: set[str] = set()
    while looped - reached:
        reached |= looped
        calls = "\n".join(line for name in looped for line in computations[name])
        looped |= set(re.findall(r"%([\w.\-]+)", calls)) & set(computations)
    return [line for lines in found.values() for line in lines], any(found[name] for name in looped)


@every_estimator
def test_the_outer_network_is_evaluated_once_and_differentiated_once(name):
    """x W forwards, and x' g for the derivative by W: two products over the network's input, none of them in a loop."""
    inner, outer = batches(np.float32)

    def compiled(solver: fb.BilevelSolver, omega: Any) -> str:
        state = solver.init(jax.random.key(0), omega, inner)
        return jax.jit(solver.step).lower(state, inner, outer).compile().as_text()

    lines, looped = products(compiled(solver_of(name), None))
    forwards = [x for x in lines if re.search(rf"= f32\[{N},{HIDDEN}\]", x)]
    backwards = [x for x in lines if re.search(rf"= f32\[(?:{WIDE},{HIDDEN}|{HIDDEN},{WIDE})\]", x)]
    assert (len(lines), len(forwards), len(backwards)) == (2, 1, 1), lines
    assert not looped

    if name in ("funcid-linear", "itd"):  # what it would cost otherwise
        omega = solver_of(name).init(jax.random.key(0), None, inner).outer_params
        lines, looped = products(compiled(calling_the_network(name, inner), omega))
        assert len(lines) > 2 or looped


# The outer model's own parameters and state.


def test_init_draws_the_outer_params_or_takes_them():
    inner, _ = batches(np.float32)
    solver = solver_of("funcid-linear")
    first, again, other = (solver.init(jax.random.key(seed), None, inner) for seed in (0, 0, 1))
    chex.assert_trees_all_equal_shapes(first.outer_params, init_network(jax.random.key(0), inner[1]))
    chex.assert_trees_all_equal(first.outer_params, again.outer_params)
    assert not np.allclose(first.outer_params["in"], other.outer_params["in"])
    given = jax.tree.map(jnp.ones_like, first.outer_params)
    taken = solver.init(jax.random.key(0), given, inner)
    chex.assert_trees_all_equal(taken.outer_params, given)
    chex.assert_trees_all_equal(taken.inner_params, first.inner_params)


class Stateful(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = jnp.tanh(linen.SpectralNorm(linen.Dense(HIDDEN))(x, update_stats=train))
        return linen.Dense(OUTPUTS)(linen.BatchNorm(momentum=0.9, use_running_average=not train)(x))


@every_estimator
def test_statistics_of_the_outer_model_are_updated_once_a_step(name):
    """Three inner steps and the estimator's passes, but one update, the one of the parameters before the step."""
    inner, outer = batches(np.float32)
    outer_model = fb.from_linen(Stateful())
    solver = solver_of(name, outer_model)
    step = jax.jit(solver.step)
    start = state = solver.init(jax.random.key(0), None, inner)
    for _ in range(2):
        _, expected = outer_model.apply(state.outer_params, state.outer_model_state, inner[1], train=True)
        state, metrics = step(state, inner, outer)
        chex.assert_trees_all_close(state.outer_model_state, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (start.outer_model_state, state.outer_model_state)), strict=True):
        assert np.max(np.abs(a - b)) > 1e-4
    assert metrics["outer_finite"]

    broken, metrics = step(state, inner, (outer[0], np.float32(np.nan) * outer[1]))
    assert metrics["inner_finite"]
    assert not metrics["outer_finite"]
    chex.assert_trees_all_equal(broken.outer_params, state.outer_params)
    chex.assert_trees_all_equal(broken.outer_model_state, state.outer_model_state)
    assert np.any(broken.inner_params != state.inner_params)


def test_each_step_has_a_key_of_its_own():
    """The key that the outer model gets is no part of the inner steps' keys, nor of any later state's."""

    def init(key: jax.Array, x: jax.Array) -> Any:
        return jnp.ones(x.shape[1]), jnp.zeros(2, jnp.uint32)

    def remember(params: Any, state: Any, x: jax.Array, *, train: bool = False, key: Any = None) -> Any:
        return jnp.broadcast_to((x @ params)[:, None], (len(x), OUTPUTS)), jax.random.key_data(key) if train else state

    inner, outer = batches(np.float32)
    solver = solver_of("alternating", fb.Model(init, remember))
    step, state = jax.jit(solver.step), solver.init(jax.random.key(0), None, inner)
    seen = [tuple(np.asarray(jax.random.key_data(state.key)))]
    for _ in range(3):
        state, _ = step(state, inner, outer)
        seen += [tuple(np.asarray(jax.random.key_data(state.key))), tuple(np.asarray(state.outer_model_state))]
    assert len(set(seen)) == len(seen)


def test_it_trains_over_seeds_and_in_chunks():
    """`train` over two vmapped seeds is stepping each one by hand."""
    data = jax.tree.map(jnp.asarray, batches(np.float32))
    outer_model = fb.from_linen(Stateful())
    solver = solver_of("funcid-linear", outer_model)
    keys = jax.random.split(jax.random.key(0), 2)
    start = jax.vmap(solver.init, (0, None, None))(keys, None, data[0])

    def sample(data: Any, key: Any, step: Any) -> Any:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (2, *x.shape)), data)

    together = solver._replace(step=jax.vmap(solver.step))
    end, history = fb.train(together, start, jax.tree_util.Partial(sample, data), 5, chunk=2, progress=False)
    step: Callable[..., Any] = jax.jit(solver.step)
    for seed in range(2):
        state, metrics = solver.init(keys[seed], None, data[0]), {}
        for _ in range(5):
            state, metrics = step(state, *data)
        for part in ("outer_params", "outer_model_state", "inner_params"):
            got = jax.tree.map(lambda x, seed=seed: x[seed], getattr(end, part))
            chex.assert_trees_all_close(got, getattr(state, part), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(history["outer_objective"][-1, seed], metrics["outer_objective"], rtol=1e-4)
    assert history["outer_objective"].shape == (5, 2)
    assert np.all(history["outer_objective"][-1] < history["outer_objective"][0])
