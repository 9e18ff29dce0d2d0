"""Training a part of a Flax model's parameters: the same numbers as a model with the rest closed over."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import funcbilevel as fb

KEY = jax.random.key(0)
N = 8


class Net(linen.Module):
    """A body with batch statistics, and a head."""

    dtype: Any = jnp.float64

    @linen.compact
    def features(self, x: Any, train: bool = False) -> Any:
        x = linen.Dense(5, name="body", param_dtype=self.dtype)(x)
        x = linen.BatchNorm(use_running_average=not train, param_dtype=self.dtype, name="norm")(x)
        return jnp.tanh(x)

    @linen.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        return linen.Dense(2, name="head", param_dtype=self.dtype)(self.features(x, train))


def batch_norm(rngs: nnx.Rngs) -> nnx.BatchNorm:
    norm = nnx.BatchNorm(5, rngs=rngs, param_dtype=jnp.float64)
    norm.mean, norm.var = nnx.BatchStat(jnp.zeros(5)), nnx.BatchStat(jnp.ones(5))  # not in float32
    return norm


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.body = nnx.Linear(3, 5, rngs=rngs, param_dtype=jnp.float64)
        self.norm = batch_norm(rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs, param_dtype=jnp.float64)

    def features(self, x: Any) -> Any:
        return jnp.tanh(self.norm(self.body(x)))

    def __call__(self, x: Any) -> Any:
        return self.head(self.features(x))


class LoRANet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        base = nnx.Linear(3, 5, rngs=rngs, param_dtype=jnp.float64)
        initializer = nnx.initializers.normal(0.5)  # by default one factor is zero, and so the other's gradient
        self.body = nnx.LoRA(3, 2, 5, base_module=base, b_initializer=initializer, param_dtype=jnp.float64, rngs=rngs)
        self.norm = batch_norm(rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x: Any) -> Any:
        return self.head(jnp.tanh(self.norm(self.body(x))))


def is_head(path: str, leaf: Any) -> bool:
    return path.startswith("head/")


class Case(NamedTuple):
    """A model of which some parameters are trained, the whole one, and how their parameters go together."""

    partial: Callable[[], fb.Model]
    whole: Callable[[], fb.Model]
    merge: Callable[[Any, Any], Any]


def merge_nnx(trained: Any, frozen: Any) -> Any:
    return nnx.merge_state(trained, frozen)


CASES = {
    "linen head": Case(
        lambda: fb.from_linen(Net(), trainable=is_head), lambda: fb.from_linen(Net()), lambda t, f: {**f, **t}
    ),
    "linen kernels": Case(
        lambda: fb.from_linen(Net(), trainable=lambda path, leaf: leaf.ndim == 2),
        lambda: fb.from_linen(Net()),
        lambda t, f: {name: {**f.get(name, {}), **t.get(name, {})} for name in {**f, **t}},
    ),
    "nnx head": Case(
        lambda: fb.from_nnx(NNXNet, trainable=nnx.PathContains("head")), lambda: fb.from_nnx(NNXNet), merge_nnx
    ),
    "nnx module": Case(
        lambda: fb.from_nnx(NNXNet(nnx.Rngs(0)), trainable=lambda path, x: path[0] == "head"),
        lambda: fb.from_nnx(NNXNet(nnx.Rngs(0))),
        merge_nnx,
    ),
    "nnx LoRA": Case(lambda: fb.from_nnx(LoRANet, trainable=nnx.LoRAParam), lambda: fb.from_nnx(LoRANet), merge_nnx),
}


def closed_over(case: Case, frozen: Any) -> fb.Model:
    """The model with its frozen part closed over, by hand."""
    whole = case.whole()

    def apply(params: Any, state: Any, x: Any, /, *, train: bool = False, key: Any = None) -> Any:
        return whole.apply(case.merge(params, frozen), state, x, train=train, key=key)

    def init(key: Any, x: Any, /) -> Any:
        params, state = case.partial().init(key, x)
        return params, state.state

    return fb.Model(init, apply)


def inner(omega: Any, v: Any, batch: Any) -> Any:
    _, y = batch
    return jnp.mean(jnp.exp(omega["s"]) * (v - y * omega["w"]) ** 2) + 0.1 * jnp.mean(v**4)


def outer(omega: Any, v: Any, batch: Any) -> Any:
    _, y = batch
    return jnp.mean((v - y) ** 2) + 0.1 * omega["s"] ** 2


PROBLEM = fb.FunctionalProblem(inner, outer)


def batches() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return tuple((jnp.asarray(rng.normal(size=(N, 3))), jnp.asarray(rng.normal(size=(N, 2)))) for _ in range(2))


OMEGA = {"s": 0.3, "w": jnp.array([[0.5, -0.7]])}

ESTIMATORS: dict[str, fb.Estimator] = {
    "aid": fb.aid(fb.cg(30, damping=0.1)),
    "itd": fb.itd(2),
    "pointwise": fb.funcid(fb.pointwise_adjoint()),
    "alternating": fb.alternating(),
}


def solver(model: fb.Model, estimator: fb.Estimator) -> fb.BilevelSolver:
    optimizers = {"inner_optimizer": optax.adam(0.05, eps_root=1e-8), "outer_optimizer": optax.sgd(0.1)}
    return fb.bilevel(PROBLEM, model, estimator, inner_steps=3, **optimizers)


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "aid") for name in CASES] + [(name, method) for name in ("linen head",) for method in ESTIMATORS][1:],
)
def test_steps_equal_those_with_the_frozen_part_closed_over(name: str, method: str, x64: None) -> None:
    case, estimator = CASES[name], ESTIMATORS[method]
    inner_batch, outer_batch = batches()
    ours = solver(case.partial(), estimator)
    state = ours.init(KEY, OMEGA, inner_batch)
    frozen = state.model_state.frozen
    assert not jax.tree.leaves(frozen)[0].weak_type
    theirs = solver(closed_over(case, frozen), estimator)
    expected = theirs.init(KEY, OMEGA, inner_batch)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 2), (inner_batch, outer_batch))
    after, metrics = jax.jit(ours.run)(state, *stacked)
    expected, expected_metrics = jax.jit(theirs.run)(expected, *stacked)
    chex.assert_trees_all_close(after.outer_params, expected.outer_params, rtol=1e-12)
    chex.assert_trees_all_close(after.inner_params, expected.inner_params, rtol=1e-12)
    chex.assert_trees_all_close(after.model_state.state, expected.model_state, rtol=1e-12)
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_equal(after.model_state.frozen, frozen)
    moved = jax.tree.map(
        lambda a, b: bool(jnp.any(a != b)),
        (after.inner_params, after.model_state.state),
        (state.inner_params, state.model_state.state),
    )  # the trained part, and the batch statistics
    assert all(jax.tree.leaves(moved))
    assert jax.tree.leaves(moved[1])


@pytest.mark.parametrize("name", ["linen head", "nnx LoRA"])
def test_the_hessian_is_of_the_trained_part_alone(name: str, x64: None) -> None:
    shapes: list[Any] = []

    def solve(matvec: Any, rhs: Any, initial: Any) -> Any:
        shapes.extend(jax.tree.map(jnp.shape, (rhs, matvec(rhs))))
        return rhs

    model = CASES[name].partial()
    params, state = model.init(KEY, batches()[0][0])
    arguments = (OMEGA, params, *batches())
    estimator = fb.aid(fb.LinearSolver(solve))
    jax.eval_shape(lambda: fb.hypergradient(PROBLEM, model, estimator, *arguments, model_state=state))
    assert shapes == [jax.tree.map(jnp.shape, params)] * 2
    trained, frozen = (sum(x.size for x in jax.tree.leaves(part)) for part in (params, state.frozen))
    assert (trained, frozen) == {"linen head": (12, 30), "nnx LoRA": (16, 42)}[name]


@pytest.mark.filterwarnings("ignore:hypergradient. the inner solution is not a stationary point")
def test_a_linear_adjoint_takes_features_that_share_parameters_and_state(x64: None) -> None:
    case, (inner_batch, outer_batch) = CASES["linen head"], batches()
    model = case.partial()
    params, state = model.init(KEY, inner_batch[0])
    whole = {"params": {**params, **state.frozen}, **state.state}

    def gradient(features: Any) -> Any:
        estimator = fb.funcid(fb.linear_adjoint(features, ridge=1e-3))
        arguments = (OMEGA, params, inner_batch, outer_batch)
        return fb.hypergradient(PROBLEM, model, estimator, *arguments, model_state=state).gradient

    by_hand = gradient(lambda theta, x: Net().apply(whole, x, method="features"))
    for features in (
        fb.from_linen(Net(), method="features", trainable=is_head),
        fb.from_linen(Net(), method="features"),
    ):
        chex.assert_trees_all_close(gradient(features), by_hand, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:hypergradient. the inner solution is not a stationary point")
def test_a_learned_adjoint_stands_on_the_frozen_part_of_the_prediction_model(x64: None) -> None:
    """Not on one that its own key draws; and it does not carry that part."""
    (inner_batch, outer_batch), case = batches(), CASES["linen head"]
    model = case.partial()
    params, state = model.init(KEY, inner_batch[0])

    def gradient(adjoint_model: fb.Model | None) -> fb.Hypergradient:
        estimator = fb.funcid(fb.learned_adjoint(optax.adam(0.1), 20, model=adjoint_model))
        arguments = (OMEGA, params, inner_batch, outer_batch)
        return fb.hypergradient(PROBLEM, model, estimator, *arguments, model_state=state, key=jax.random.key(7))

    got, want = gradient(None), gradient(closed_over(case, state.frozen))
    chex.assert_trees_all_close(got.gradient, want.gradient, rtol=1e-12)
    chex.assert_trees_all_close(got.state.params, want.state.params, rtol=1e-12)
    assert got.state.model_state.frozen == ()


def test_donation_seeds_and_mixed_precision(x64: None) -> None:
    inner_batch, outer_batch = batches()
    pretrained = {"params": {"body": {"kernel": jnp.full((3, 5), 1 / 3)}}}
    model = fb.from_linen(Net(), trainable=is_head, variables=pretrained)
    made = solver(fb.mixed_precision(model, jnp.float32), fb.funcid(fb.learned_adjoint(optax.adam(0.1), 2)))
    state = jax.vmap(made.init, (0, None, None))(jax.random.split(KEY, 2), OMEGA, inner_batch)
    step = jax.jit(jax.vmap(made.step, (0, None, None)), donate_argnums=0)
    for _ in range(2):
        state, metrics = step(state, inner_batch, outer_batch)
    body = state.model_state.frozen["body"]["kernel"]
    np.testing.assert_array_equal(body, np.full((2, 3, 5), 1 / 3))  # neither rounded nor moved
    assert np.all(metrics["outer_finite"])
    assert np.any(state.inner_params["head"]["kernel"][0] != state.inner_params["head"]["kernel"][1])
    once = solver(model, fb.alternating()).init(KEY, OMEGA, inner_batch)
    jax.jit(lambda s: s, donate_argnums=0)(once)
    np.testing.assert_array_equal(pretrained["params"]["body"]["kernel"], np.full((3, 5), 1 / 3))  # not deleted
