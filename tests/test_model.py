"""The three adapters: parameters and other state apart, train mode in the inner fit only, one and the same answer."""

import functools
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

N, WIDTH = 32, 8


# One network three times: as plain functions, in Linen and in NNX. Parts have the same names everywhere, so that the
# leaves of parameters and state come in the same order.


class LinenNet(linen.Module):
    rate: float = 0.2
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.hidden = linen.Dense(WIDTH, param_dtype=self.dtype)
        self.norm = linen.BatchNorm(momentum=0.9, param_dtype=self.dtype)
        self.dropout = linen.Dropout(self.rate)
        self.spectral = linen.SpectralNorm(linen.Dense(WIDTH, param_dtype=self.dtype), param_dtype=self.dtype)
        self.head = linen.Dense(1, param_dtype=self.dtype)

    def features(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = self.norm(jnp.tanh(self.hidden(x)), use_running_average=not train)
        return jnp.tanh(self.spectral(self.dropout(x, deterministic=not train), update_stats=train))

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return self.head(self.features(x, train))


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, rate: float = 0.2, dtype: Any = jnp.float32) -> None:
        self.hidden = nnx.Linear(3, WIDTH, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.9, param_dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        layer = nnx.Linear(WIDTH, WIDTH, param_dtype=dtype, rngs=rngs)
        self.spectral = nnx.SpectralNorm(layer, param_dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 1, param_dtype=dtype, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.spectral(self.dropout(self.norm(jnp.tanh(self.hidden(x))))))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.features(x))


def function_features(variables: Any, x: jax.Array) -> jax.Array:
    """The network in evaluation mode, written out."""
    params, stats = variables
    layer, norm = params["spectral"]["layer"], params["norm"]
    x = jnp.tanh(dense(params["hidden"], x))
    mean, var, scale, bias = (s[None] for s in (stats["mean"], stats["var"], norm["scale"], norm["bias"]))
    x = (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias
    v = stats["u"] @ layer["kernel"].T
    u = v @ layer["kernel"]
    v, u = jax.lax.stop_gradient((v / jnp.linalg.norm(v), u / jnp.linalg.norm(u)))
    sigma = (v @ layer["kernel"] @ u.T)[0, 0]
    return jnp.tanh(dense({"kernel": layer["kernel"] / sigma, "bias": layer["bias"]}, x))


def dense(params: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("np,pk->nk", x, params["kernel"]) + params["bias"][None]


class PlainLinen(linen.Module):
    """Without state, for what differentiates through train mode."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = linen.Dense(WIDTH, param_dtype=jnp.float64, name="hidden")
        return linen.Dense(1, param_dtype=jnp.float64, name="zhead")(jnp.tanh(hidden(x)))


class PlainNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(3, WIDTH, param_dtype=jnp.float64, rngs=rngs)
        self.zhead = nnx.Linear(WIDTH, 1, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.zhead(jnp.tanh(self.hidden(x)))


def plain_function(params: Any, x: jax.Array) -> jax.Array:
    return dense(params["zhead"], jnp.tanh(dense(params["hidden"], x)))


class Adapted(NamedTuple):
    """A model with the common weights, and its features."""

    model: fb.Model
    params: Any
    model_state: Any
    features: Any


@functools.cache
def adapters(stateful: bool) -> dict[str, Adapted]:
    """The same network, weights and statistics through all three adapters."""
    x = batches()[0][0]
    if not stateful:
        linen_model = fb.from_linen(PlainLinen())
        params, state = linen_model.init(jax.random.key(0), x)
        nnx_model = fb.from_nnx(PlainNnx)
        nnx_params, nnx_state = nnx_model.init(jax.random.key(1), x)
        return {
            "function": Adapted(fb.from_function(lambda key, x: params, plain_function), params, (), None),
            "linen": Adapted(linen_model, params, state, None),
            "nnx": Adapted(nnx_model, copied(params, nnx_params), nnx_state, None),
        }
    module = LinenNet(dtype=jnp.float64)
    linen_model = fb.from_linen(module)
    params, state = linen_model.init(jax.random.key(0), x)
    state = jax.tree.map(lambda s: s.astype(jnp.float64), state)
    for i in range(3):  # statistics of their own
        _, state = linen_model.apply(params, state, 2 * x + 1, train=True, key=jax.random.key(i))

    def make(rngs: nnx.Rngs) -> NnxNet:
        return NnxNet(rngs, dtype=jnp.float64)

    nnx_model = fb.from_nnx(make)
    nnx_params, nnx_state = nnx_model.init(jax.random.key(1), x)

    mean, var, _, u = jax.tree.leaves(state)
    plain = {
        "head": params["head"],
        "hidden": params["hidden"],
        "norm": params["norm"],
        "spectral": {"layer": jax.tree.unflatten(jax.tree.structure({"bias": 0, "kernel": 0}), spectral(params))},
    }
    stats = {"mean": mean, "var": var, "u": u}

    def features(params: Any, x: jax.Array) -> jax.Array:
        return function_features((params, stats), x)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return dense(params["head"], features(params, x))

    return {
        "function": Adapted(fb.from_function(lambda key, x: plain, apply), plain, (), features),
        "linen": Adapted(linen_model, params, state, fb.from_linen(module, method="features")),
        "nnx": Adapted(
            nnx_model,
            copied(params, nnx_params),
            copied(state, jax.tree.map(lambda s: s.astype(jnp.float64), nnx_state)),
            fb.from_nnx(make, method="features"),
        ),
    }


def spectral(params: Any) -> list[jax.Array]:
    """bias and kernel of the layer under spectral norm."""
    return jax.tree.leaves(params["spectral"])


def copied(values: Any, like: Any) -> Any:
    """The leaves of `values` in the structure of `like`."""
    tree = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(values))
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, like)
    return tree


def batches(seed: int = 0) -> tuple[Any, Any]:
    """Two batches (x, y) of a smooth function; the second has the first one's inputs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, 3))
    y, z = np.sin(2 * x[:, :1]) + x[:, 1:2], np.cos(x[:, :1])
    inner, outer = (x, y), (x, z)
    return jax.tree.map(jnp.asarray, (inner, outer))


def inner_objective(omega: Any, v: jax.Array, batch: Any) -> jax.Array:
    return jnp.mean((v - omega["scale"] * batch[1] - omega["shift"]) ** 2)


def outer_objective(omega: Any, v: jax.Array, batch: Any) -> jax.Array:
    return jnp.mean((v - batch[1]) ** 2) + 0.1 * omega["scale"] ** 2


PROBLEM = fb.FunctionalProblem(inner_objective, outer_objective)
OMEGA = {"scale": 1.0, "shift": 0.1}

# Every estimator. `features` is the model's own last hidden layer.


class Row(NamedTuple):
    make: Callable[[Any], fb.Estimator]
    eval_only: bool = True  # never runs the model in train mode, which plain functions do not have
    stateful: bool = True  # compared on the network with state; it takes longer to compile


ADJOINT_OPTIMIZER = optax.adam(1e-2)

ESTIMATORS: dict[str, Row] = {
    "funcid-linear": Row(lambda features: fb.funcid(fb.linear_adjoint(features, ridge=1e-3))),
    "funcid-learned": Row(lambda features: fb.funcid(fb.learned_adjoint(ADJOINT_OPTIMIZER, 5))),
    "funcid-pointwise": Row(lambda features: fb.funcid(fb.pointwise_adjoint())),
    "aid-cg": Row(lambda features: fb.aid(fb.cg(5, damping=1.0))),
    "aid-normal-cg": Row(lambda features: fb.aid(fb.normal_cg(5, damping=1.0)), stateful=False),
    "aid-gmres": Row(lambda features: fb.aid(fb.gmres(5, damping=1.0)), stateful=False),
    "aid-neumann": Row(lambda features: fb.aid(fb.neumann(5, 0.1)), stateful=False),
    "aid-gradient-descent": Row(lambda features: fb.aid(fb.gradient_descent(5, 0.1)), stateful=False),
    "aid-identity": Row(lambda features: fb.aid(fb.identity())),
    "itd-reverse": Row(lambda features: fb.itd(3), eval_only=False, stateful=False),
    "itd-forward": Row(lambda features: fb.itd(3, mode="forward"), eval_only=False, stateful=False),
    "itd-remat": Row(lambda features: fb.itd(3, remat=True), eval_only=False, stateful=False),
    "alternating": Row(lambda features: fb.alternating()),
    "penalty-value": Row(lambda features: fb.value_penalty(optax.sgd(0.1), 3, 10.0)),
    "penalty-gradient": Row(lambda features: fb.gradient_penalty(optax.sgd(0.1), 3, 10.0), stateful=False),
}


def hypergradients(name: str, adapted: Adapted, seeds: tuple[int, ...]) -> list[fb.Hypergradient]:
    """The estimator at the common weights, once per random key; a learned adjoint starts from these weights too."""
    inner_batch, outer_batch = batches()
    state = None
    if name == "funcid-learned":
        state = fb.FitState(adapted.params, ADJOINT_OPTIMIZER.init(adapted.params), adapted.model_state)

    @jax.jit
    def compiled(omega: Any, params: Any, model_state: Any, state: Any, key: jax.Array) -> fb.Hypergradient:
        return fb.hypergradient(
            PROBLEM,
            adapted.model,
            ESTIMATORS[name].make(adapted.features),
            omega,
            params,
            inner_batch,
            outer_batch,
            inner_optimizer=optax.adam(1e-2),
            model_state=model_state,
            state=state,
            key=key,
        )

    start = (adapted.params, adapted.model_state, state)
    return [compiled(OMEGA, *start, jax.random.key(seed)) for seed in seeds]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_same_network_gives_the_same_hypergradient_through_every_adapter(name: str) -> None:
    eval_only = ESTIMATORS[name].eval_only
    networks = adapters(ESTIMATORS[name].stateful)
    results = {adapter: hypergradients(name, network, (0, 1)) for adapter, network in networks.items()}
    expected, _ = results["function"]
    assert expected.metrics["adjoint_finite"]
    assert name == "alternating" or all(abs(x) > 1e-6 for x in jax.tree.leaves(expected.implicit))
    for adapter in ("linen", "nnx"):
        got, other_key = results[adapter]
        for part in ("gradient", "explicit", "implicit", "outer_value"):
            chex.assert_trees_all_close(getattr(got, part), getattr(expected, part), rtol=1e-9, atol=1e-12)
        if eval_only:  # the key, and so dropout, has no part in it
            chex.assert_trees_all_equal(got.gradient, other_key.gradient)


# When the model is in train mode, and with which key.

INNER_STEPS = 4


@pytest.mark.filterwarnings("ignore:hypergradient. the inner solution is not a stationary point")
@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("estimator", [fb.itd(2), fb.aid(fb.cg(2))], ids=["itd", "aid"])
def test_a_model_without_state_needs_none_for_a_hypergradient(x64: None, kind: str, estimator: fb.Estimator) -> None:
    module = adapters(stateful=False)[kind]
    inner, outer = jax.tree.map(lambda x: x.astype(jnp.float64), batches())

    def gradient(**state: Any) -> Any:
        return fb.hypergradient(
            PROBLEM,
            module.model,
            estimator,
            OMEGA,
            module.params,
            inner,
            outer,
            inner_optimizer=optax.sgd(0.1),
            **state,
        ).gradient

    chex.assert_trees_all_equal(gradient(), gradient(model_state=module.model_state))


def witness() -> fb.Model:
    """A linear model whose state counts the train-mode calls and remembers what each one's key drew.

    In evaluation mode it misbehaves: the state that it returns is spoilt and must be thrown away.
    """

    def init(key: jax.Array, x: jax.Array) -> Any:
        del key
        return jnp.zeros(x.shape[1]), {"calls": jnp.zeros((), jnp.int32), "draws": jnp.zeros(4 * INNER_STEPS)}

    def apply(params: Any, state: Any, x: jax.Array, *, train: bool = False, key: Any = None) -> Any:
        prediction = jnp.einsum("np,p->n", x, params)[:, None] * (1.0 + state["calls"])
        if not train:
            return prediction, jax.tree.map(lambda s: s - 100, state)
        draw = jax.random.uniform(key)
        state = {"calls": state["calls"] + 1, "draws": state["draws"].at[state["calls"]].set(draw)}
        return prediction + draw, state

    return fb.Model(init, apply)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_train_mode_belongs_to_the_inner_fit(name: str) -> None:
    model = witness()
    estimator = ESTIMATORS[name].make(lambda params, x: x)
    solver = fb.bilevel(
        PROBLEM,
        model,
        estimator,
        inner_optimizer=optax.sgd(1e-3),
        outer_optimizer=optax.sgd(1e-3),
        inner_steps=INNER_STEPS,
    )
    inner_batch, outer_batch = batches()
    state = solver.init(jax.random.key(0), OMEGA, inner_batch)
    step = jax.jit(solver.step)
    for calls in (INNER_STEPS, 2 * INNER_STEPS):
        omega = state.outer_params
        state, metrics = step(state, inner_batch, outer_batch)
        assert state.model_state["calls"] == calls
        draws = np.asarray(state.model_state["draws"])
        assert len(np.unique(draws[:calls])) == calls, "each inner step needs a key of its own"
        assert not draws[calls:].any()
        # The outer objective saw the model in evaluation mode, with the state that the inner fit left.
        v, _ = model.apply(state.inner_params, state.model_state, outer_batch[0])
        np.testing.assert_allclose(metrics["outer_objective"], outer_objective(omega, v, outer_batch), rtol=1e-5)


def test_the_estimator_leaves_the_model_state_alone() -> None:
    """A step with and a step without an adjoint, which evaluates the network: the same statistics."""
    inner_batch, outer_batch = batches()
    model = fb.from_linen(LinenNet())
    features = fb.from_linen(LinenNet(), method="features")
    states = {}
    for name in ("alternating", "funcid-linear"):
        solver = fb.bilevel(
            PROBLEM,
            model,
            ESTIMATORS[name].make(features),
            inner_optimizer=optax.sgd(1e-2),
            outer_optimizer=optax.sgd(1e-2),
            inner_steps=2,
        )
        state = solver.init(jax.random.key(0), OMEGA, inner_batch)
        after, _ = jax.jit(solver.step)(state, inner_batch, outer_batch)
        for before, now in zip(*map(jax.tree.leaves, (state.model_state, after.model_state)), strict=True):
            assert jnp.max(jnp.abs(before - now)) > 1e-4  # the inner fit did move every one of them
        states[name] = (after.inner_params, after.model_state)
    chex.assert_trees_all_close(states["funcid-linear"], states["alternating"], rtol=1e-5, atol=1e-6)


# Training.

MODULES: dict[str, Callable[[], tuple[fb.Model, fb.Model]]] = {
    "linen": lambda: (fb.from_linen(LinenNet()), fb.from_linen(LinenNet(), method="features")),
    "nnx": lambda: (fb.from_nnx(NnxNet), fb.from_nnx(NnxNet, method="features")),
    "nnx-instance": lambda: (
        fb.from_nnx(NnxNet(nnx.Rngs(0))),
        fb.from_nnx(NnxNet(nnx.Rngs(0)), method="features"),
    ),
}


@pytest.mark.parametrize("kind", MODULES)
def test_batch_norm_dropout_and_spectral_norm_train(kind: str) -> None:
    model, features = MODULES[kind]()
    solver = fb.bilevel(
        PROBLEM,
        model,
        fb.funcid(fb.linear_adjoint(features, ridge=1e-3)),
        inner_optimizer=optax.adam(3e-3),
        outer_optimizer=optax.sgd(1e-3),
        inner_steps=10,
    )
    inner_batch, outer_batch = batches()
    outer_steps = 60
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (outer_steps, *x.shape)), (inner_batch, outer_batch))
    start = solver.init(jax.random.key(1), OMEGA, inner_batch)
    end, metrics = jax.jit(solver.run)(start, *repeated)

    assert metrics["inner_finite"].all()
    assert metrics["adjoint_finite"].all()
    assert metrics["outer_finite"].all()
    noisy = metrics["inner_objective"]  # under dropout
    assert jnp.mean(noisy[-5:]) < 0.5 * noisy[0]

    def evaluated(state: fb.BilevelState) -> float:
        v, _ = model.apply(state.inner_params, state.model_state, inner_batch[0])
        return float(inner_objective(end.outer_params, v, inner_batch))

    assert evaluated(end) < 0.3 * evaluated(start)

    # Leaves in the order bias, kernel of the layers head, hidden, norm, spectral; mean, var, sigma, u of the state.
    _, _, bias, kernel, _, _, _, weights = jax.tree.leaves(end.inner_params)
    mean, var, sigma, u = jax.tree.leaves(end.model_state)
    hidden = jnp.tanh(dense({"kernel": kernel, "bias": bias}, inner_batch[0]))
    np.testing.assert_allclose(mean, jnp.mean(hidden, axis=0), atol=0.05)
    np.testing.assert_allclose(var, jnp.var(hidden, axis=0), atol=0.05)

    # Spectral norm iterates: sigma and u are those of a singular value decomposition, which they were not at first.
    def spectral_error(sigma: Any, weights: Any) -> float:
        return float(abs(sigma / jnp.linalg.norm(weights, 2) - 1))

    assert spectral_error(jax.tree.leaves(start.model_state)[2], jax.tree.leaves(start.inner_params)[-1]) > 0.1
    assert spectral_error(sigma, weights) < 0.01
    leading = jnp.linalg.svd(weights)[2][0]
    assert abs(leading @ u[0]) > 0.99


# What is a parameter and what is not.


@pytest.mark.parametrize("kind", MODULES)
def test_parameters_and_other_state_are_apart(kind: str) -> None:
    model, _ = MODULES[kind]()
    x = batches()[0][0]
    params, state = model.init(jax.random.key(0), x)
    shapes = [x.shape for x in jax.tree.leaves(params)]
    assert shapes == [(1,), (WIDTH, 1), (WIDTH,), (3, WIDTH), (WIDTH,), (WIDTH,), (WIDTH,), (WIDTH, WIDTH)]
    assert [x.shape for x in jax.tree.leaves(state)] == [(WIDTH,), (WIDTH,), (), (1, WIDTH)]

    params = jax.tree.map(lambda p: 2 * p, params)  # Linen's spectral norm starts with a layer of norm 1
    v, trained = model.apply(params, state, x, train=True, key=jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(trained, state)
    assert all(jnp.any(a != b) for a, b in zip(*map(jax.tree.leaves, (state, trained)), strict=True))
    same, _ = model.apply(params, state, x, train=True, key=jax.random.key(0))
    other, _ = model.apply(params, state, x, train=True, key=jax.random.key(1))
    chex.assert_trees_all_equal(v, same)
    assert jnp.any(v != other)

    v, evaluated = model.apply(params, state, x)
    chex.assert_trees_all_equal(evaluated, state)
    chex.assert_trees_all_equal(v, model.apply(params, state, x, key=jax.random.key(7))[0])


def test_a_function_model_has_no_state() -> None:
    model = fb.from_function(lambda key, x: jnp.zeros(x.shape[1]), lambda params, x: jnp.dot(x, params))
    x = batches()[0][0]
    params, state = model.init(jax.random.key(0), x)
    assert state == ()
    for kwargs in ({}, {"train": True, "key": jax.random.key(0)}):
        v, state = model.apply(params, state, x, **kwargs)
        assert (v.shape, state) == ((N,), ())


@pytest.mark.parametrize("kind", ["function", *MODULES])
@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_init_maps_over_keys(kind: str, make_key: Callable[[int], jax.Array]) -> None:
    if kind == "function":
        model = fb.from_function(lambda key, x: jax.random.normal(key, (3, 1)), lambda p, x: jnp.dot(x, p))
    else:
        model, _ = MODULES[kind]()
    x = batches()[0][0]
    keys = jax.random.split(make_key(0), 3)
    together = jax.vmap(model.init, (0, None))(keys, x)
    alone = [model.init(key, x) for key in keys]
    chex.assert_trees_all_close(together, jax.tree.map(lambda *xs: jnp.stack(xs), *alone), rtol=1e-6)
    weights = np.asarray(jax.tree.leaves(together[0])[-1])
    assert len(np.unique(weights.reshape(3, -1), axis=0)) == (1 if kind == "nnx-instance" else 3)
    v, _ = model.apply(*alone[0], x, train=True, key=keys[0])
    assert v.shape == (N, 1)


# How a module is told the mode.


def tells(train: bool) -> float:
    return 1.0 if train else -1.0


def linen_module(keyword: str) -> linen.Module:
    namespace: dict[str, Any] = {"linen": linen, "__name__": __name__}
    exec(
        "class Told(linen.Module):\n"
        f"    def __call__(self, x, {keyword}): return self.value(x, {keyword})\n"
        "    @linen.compact\n"
        "    def value(self, x, told): return self.param('w', lambda key: x[0] * 0) + x * (1.0 if told else -1.0)\n",
        namespace,
    )
    return namespace["Told"]()


def nnx_module(keyword: str) -> nnx.Module:
    namespace: dict[str, Any] = {"nnx": nnx, "__name__": __name__}
    exec(
        "class Told(nnx.Module):\n"
        "    def __init__(self): self.w = nnx.Param(0.0)\n"
        f"    def __call__(self, x, *, {keyword}): return self.w + x * (1.0 if {keyword} else -1.0)\n",
        namespace,
    )
    return namespace["Told"]()


TOLD_IN_TRAIN_MODE = {
    "train": True,
    "training": True,
    "is_training": True,
    "update_stats": True,
    "deterministic": False,
    "use_running_average": False,
}


@pytest.mark.parametrize(("keyword", "told"), TOLD_IN_TRAIN_MODE.items())
@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_the_usual_keywords_are_recognised(flavour: str, keyword: str, told: bool) -> None:
    model = fb.from_linen(linen_module(keyword)) if flavour == "linen" else fb.from_nnx(nnx_module(keyword))
    x = jnp.ones(4)
    params, state = model.init(jax.random.key(0), x)
    for train in (True, False):
        v, _ = model.apply(params, state, x, train=train, key=jax.random.key(0))
        chex.assert_trees_all_equal(v, x * tells(told == train))


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_mode_overrides_them(flavour: str) -> None:
    def mode(train: bool) -> dict[str, Any]:
        return {"phase": train}

    if flavour == "linen":
        model = fb.from_linen(linen_module("phase"), mode=mode)
    else:
        model = fb.from_nnx(nnx_module("phase"), mode=mode)
    x = jnp.ones(4)
    params, state = model.init(jax.random.key(0), x)
    for train in (True, False):
        v, _ = model.apply(params, state, x, train=train, key=jax.random.key(0))
        chex.assert_trees_all_equal(v, x * tells(train))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_methods_share_parameters_and_state(kind: str) -> None:
    model, features = MODULES[kind]()
    x = batches()[0][0]
    params, state = model.init(jax.random.key(0), x)
    v, _ = model.apply(params, state, x)
    phi, _ = features.apply(params, state, x)
    assert phi.shape == (N, WIDTH)
    bias, kernel = jax.tree.leaves(params)[:2]
    chex.assert_trees_all_close(v, dense({"kernel": kernel, "bias": bias}, phi), rtol=1e-5)


# Modules that sow, or draw random numbers of their own.


class NnxSower(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 1, rngs=rngs)
        self.rngs = rngs

    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow(nnx.Intermediate, "input", x)
        x = self.perturb("probe", x)
        return self.dense(x) + 0.1 * jax.random.normal(self.rngs.noise())


class LinenQuiet(linen.Module):
    """The noise in train mode only."""

    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        self.sow("intermediates", "input", x)
        self.sow("losses", "input", jnp.sum(x**2))
        noise = jax.random.normal(self.make_rng("noise")) if train else 0.0
        return linen.Dense(1)(x) + 0.1 * noise


NOISY: dict[str, Callable[[], fb.Model]] = {
    "linen": lambda: fb.from_linen(LinenQuiet(), rngs=("dropout", "noise")),
    "nnx": lambda: fb.from_nnx(NnxSower),
    "nnx-streams": lambda: fb.from_nnx(lambda rngs: NnxSower(nnx.Rngs(params=rngs.params(), noise=1))),
    "nnx-instance": lambda: fb.from_nnx(NnxSower(nnx.Rngs(params=0, noise=1))),
}


@pytest.mark.parametrize("kind", NOISY)
def test_sown_values_are_dropped_and_random_streams_are_fresh(kind: str) -> None:
    model = NOISY[kind]()
    inner_batch, outer_batch = batches()
    solver = fb.bilevel(
        PROBLEM, model, fb.alternating(), inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1), inner_steps=3
    )
    state = solver.init(jax.random.key(0), OMEGA, inner_batch)
    assert len(jax.tree.leaves(state.model_state)) <= 1  # of Linen's, the value sown while it was initialised
    after, _ = jax.jit(solver.step)(state, inner_batch, outer_batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)

    first, again, second = (
        model.apply(state.inner_params, state.model_state, inner_batch[0], train=True, key=jax.random.key(i))[0]
        for i in (0, 0, 1)
    )
    chex.assert_trees_all_equal(first, again)
    assert jnp.all(first != second)
    quiet = [model.apply(state.inner_params, state.model_state, inner_batch[0])[0] for _ in range(2)]
    chex.assert_trees_all_equal(*quiet)


# An NNX module handed in is only read.


def test_a_module_is_not_touched_and_takes_the_result_back() -> None:
    module = NnxNet(nnx.Rngs(0))
    module.eval()
    snapshot = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))))
    structure = nnx.graphdef(module)
    model = fb.from_nnx(module)
    inner_batch, outer_batch = batches()
    solver = fb.bilevel(
        PROBLEM, model, fb.aid(fb.cg(2, damping=1.0)), inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1)
    )
    start = solver.init(jax.random.key(0), OMEGA, inner_batch)
    chex.assert_trees_all_equal(nnx.to_pure_dict(start.inner_params), nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    end, _ = jax.jit(solver.step, donate_argnums=0)(start, inner_batch, outer_batch)  # start's buffers are gone

    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))), snapshot)
    assert nnx.graphdef(module) == structure

    expected, _ = model.apply(end.inner_params, end.model_state, inner_batch[0])
    nnx.update(module, end.inner_params, end.model_state)
    chex.assert_trees_all_close(module(inner_batch[0]), expected, rtol=1e-6)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "from_function: init": (lambda: fb.from_function(None, jnp.dot), TypeError, "init must be callable, got NoneType"),
    "from_function: apply": (lambda: fb.from_function(jnp.zeros, 1), TypeError, "apply must be callable, got int"),
    "from_linen: a class": (lambda: fb.from_linen(LinenNet), TypeError, r"from_linen: module must be .*got .*LinenNet"),
    "from_linen: an NNX module": (
        lambda: fb.from_linen(NnxNet(nnx.Rngs(0))),
        TypeError,
        "from_linen: module must be a flax.linen.Module",
    ),
    "from_nnx: a Linen module": (lambda: fb.from_nnx(LinenNet()), TypeError, r"(?s)from_nnx: module .*from_linen"),
    "from_nnx: a number": (lambda: fb.from_nnx(3), TypeError, "from_nnx: module must be an nnx.Module or a function"),
    "from_nnx: a function of something else": (
        lambda: fb.from_nnx(lambda rngs: 3),
        TypeError,
        "from_nnx: the function must return an nnx.Module",
    ),
    "from_linen: no such method": (
        lambda: fb.from_linen(LinenNet(), method="feature"),
        ValueError,
        "from_linen: .*method 'feature'",
    ),
    "from_nnx: no such method": (
        lambda: fb.from_nnx(NnxNet, method="feature"),
        ValueError,
        "from_nnx: .*method 'feature'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_module_is_refused(case: str) -> None:
    misuse, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        misuse()
