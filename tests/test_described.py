"""What objects say of themselves: `repr` in the words of the call that made them, and no address anywhere."""

import functools
import inspect
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest
from flax import linen, nnx

import funcbilevel as fb

KEY = jax.random.key(0)
ADAM = optax.adam(1e-3)


class Net(linen.Module):
    width: int = 8

    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.Dense(1)(linen.relu(linen.Dense(self.width)(x)))


def inner(omega: Any, v: Any, batch: Any) -> Any:
    return jnp.mean((v - omega * batch[1]) ** 2)


def outer(omega: Any, v: Any, batch: Any) -> Any:
    return jnp.mean((v - batch[1]) ** 2)


def features(theta: Any, x: Any) -> Any:
    return x


def scaled(factor: float, omega: Any, v: Any, batch: Any) -> Any:
    return factor * inner(omega, v, batch)


PROBLEM = fb.FunctionalProblem(inner, outer)
LINEAR = fb.from_function(lambda key, x: jnp.zeros((3, 1)), lambda theta, x: x @ theta)
BATCH = (jnp.ones((4, 3)), jnp.ones((4, 1)))


def solver(estimator: fb.Estimator, **kwargs: Any) -> fb.BilevelSolver:
    return fb.bilevel(PROBLEM, LINEAR, estimator, inner_optimizer=optax.sgd(0.1), outer_optimizer=ADAM, **kwargs)


def inputs(batch: Any) -> Any:
    return batch[0]


REPRS: dict[str, Any] = {
    "FunctionalProblem(inner_objective=inner, outer_objective=outer)": PROBLEM,
    "ParametricProblem(inner_objective=inner, outer_objective=<lambda>, has_aux=True)": fb.ParametricProblem(
        inner, lambda omega, theta, batch: (0.0, {}), has_aux=True
    ),
    "FunctionalProblem(inner_objective=partial(scaled, 2.0), outer_objective=outer, inputs=inputs)": (
        fb.FunctionalProblem(functools.partial(scaled, 2.0), jax.jit(outer), inputs)
    ),
    "from_function(<lambda>, <lambda>)": LINEAR,
    "from_function(features, apply=dot)": fb.from_function(features, apply=jnp.dot),
    "from_linen(Net)": fb.from_linen(Net()),
    "from_linen(Net(width=3), rngs=())": fb.from_linen(Net(3), rngs=()),
    "from_linen(Dense(features=2, kernel_init=zeros))": fb.from_linen(linen.Dense(2, kernel_init=jnp.zeros)),
    "from_linen(Net, variables={'params': float32[2, 3]})": fb.from_linen(
        Net(), variables={"params": jnp.ones((2, 3))}
    ),
    "from_nnx(Linear)": fb.from_nnx(nnx.Linear(3, 1, rngs=nnx.Rngs(0))),
    "from_nnx(<lambda>, trainable=LoRAParam)": fb.from_nnx(
        lambda rngs: nnx.LoRA(3, 1, 2, rngs=rngs), trainable=nnx.LoRAParam
    ),
    "mixed_precision(from_linen(Net))": fb.mixed_precision(fb.from_linen(Net())),
    "mixed_precision(from_linen(Net), float16)": fb.mixed_precision(fb.from_linen(Net()), jnp.float16),
    "variable_projection(from_linen(Net), 1, ridge=0.1)": fb.variable_projection(fb.from_linen(Net()), 1, ridge=0.1),
    "funcid(learned_adjoint(adam, num_steps=10))": fb.funcid(fb.learned_adjoint(ADAM, num_steps=10)),
    "funcid(linear_adjoint(features, ridge=0.001))": fb.funcid(fb.linear_adjoint(features, ridge=np.float64(1e-3))),
    "funcid(linear_adjoint(from_linen(Net)))": fb.funcid(fb.linear_adjoint(fb.from_linen(Net()), 0.0)),
    "funcid(pointwise_adjoint())": fb.funcid(fb.pointwise_adjoint()),
    "aid(cg(20, damping=0.001))": fb.aid(fb.cg(20, damping=0.001)),
    "aid(normal_cg(num_steps=20), warm_start=False)": fb.aid(fb.normal_cg(num_steps=20, damping=0.0), warm_start=False),
    "aid(gmres(5))": fb.aid(fb.gmres(5)),
    "aid(neumann(5, float32[]))": fb.aid(fb.neumann(5, jnp.float32(0.5))),
    "aid(gradient_descent(5, step_size=0.5))": fb.aid(fb.gradient_descent(5, step_size=0.5)),
    "aid(identity())": fb.aid(fb.identity()),
    "itd(5, remat=True)": fb.itd(5, "reverse", remat=True),
    "itd(5, 'forward')": fb.itd(5, "forward"),
    "alternating()": fb.alternating(),
    "value_penalty(sgd, 5, 10.0)": fb.value_penalty(optax.sgd(0.1), 5, 10.0),
    "gradient_penalty(chain(clip, adam), num_steps=5, penalty=10.0)": fb.gradient_penalty(
        optax.chain(optax.clip(1.0), ADAM), num_steps=5, penalty=10.0
    ),
    # Put together by hand.
    "Estimator(init=inner, estimate=outer)": fb.Estimator(inner, outer),
    "Adjoint(init=inner, fit=outer)": fb.Adjoint(inner, outer),
    "LinearSolver(solve=inner, damping=0.1)": fb.LinearSolver(inner, 0.1),
    "Model(init=inner, apply=outer)": fb.Model(inner, outer),
    # On several lines, where one is too short.
    """bilevel(
    FunctionalProblem(inner_objective=inner, outer_objective=outer),
    from_function(<lambda>, <lambda>),
    aid(cg(3)),
    inner_optimizer=sgd,
    outer_optimizer=adam,
    inner_steps=2,
)""": solver(fb.aid(fb.cg(3)), inner_steps=2),
    # States: shapes and dtypes.
    """BilevelState(
    step=int32[],
    outer_params=float32[],
    inner_params=float32[3, 1],
    model_state=(),
    inner_opt_state=(EmptyState(), EmptyState()),
    outer_opt_state=(ScaleByAdamState(count=int32[], mu=float32[], nu=float32[]), EmptyState()),
    estimator_state=float32[3, 1],
    key=key<fry>[],
    batch_form={'[0] float[n, 3]': None, '[1] float[n, 1]': None},
)""": solver(fb.aid(fb.cg(3))).init(KEY, 1.0, BATCH),
    "FitState(params={'w': float32[3]}, opt_state=(float32[2],), model_state=[])": fb.FitState(
        {"w": jnp.ones(3)}, (np.ones(2, np.float32),), []
    ),
    "Partition(leader={'a': None, 'b': float32[2]}, follower={'a': float32[3], 'b': None}, merge=merge)": fb.partition(
        {"a": jnp.ones(3), "b": jnp.ones(2)}, {"a": True, "b": False}
    ),
    "Predictor(head=float32[3, 1])": fb.predictor(PROBLEM, fb.variable_projection(LINEAR, 1), 1.0, jnp.eye(3), BATCH),
}


@pytest.mark.parametrize("text", REPRS)
def test_objects_say_how_they_were_made(text: str) -> None:
    assert repr(REPRS[text]) == text


@pytest.mark.filterwarnings("ignore:hypergradient. the inner solution is not a stationary point")
def test_a_hypergradient_shows_shapes() -> None:
    text = repr(fb.hypergradient(PROBLEM, LINEAR, fb.aid(fb.cg(3)), 1.0, jnp.ones((3, 1)), BATCH, BATCH))
    assert text.startswith("Hypergradient(\n    gradient=float32[],\n    explicit=float32[],\n")
    assert "state=float32[3, 1]" in text
    assert "'linear_converged': bool[]" in text


def test_a_solver_says_so_after_its_step_was_replaced() -> None:
    made = solver(fb.alternating())
    assert repr(made._replace(step=jax.vmap(made.step))) == repr(made)
    made_init, made_step, run = made  # still unpacked as three functions
    assert (made_init, made_step, run) == tuple(made)


OTHERS = [
    fb.aid(lineax.CG(1e-3, 1e-3)),
    fb.from_lineax(lineax.GMRES(1e-3, 1e-3), damping=0.1),
    fb.from_nnx(lambda rngs: nnx.Linear(3, 1, rngs=rngs)),
    fb.from_linen(Net(), mode=lambda train: {}),
    fb.variable_projection(LINEAR, 1).head,
    fb.from_nnx(nnx.Linear(3, 1, rngs=nnx.Rngs(0))).init(KEY, None),
    fb.learned_adjoint(optax.GradientTransformation(inner, lambda g, s, p=None: (g, s)), 3),
    fb.linear_adjoint(operator.attrgetter("x")),
    fb.parametrize(PROBLEM, LINEAR),
]


@pytest.mark.parametrize("made", OTHERS, ids=lambda made: type(made).__name__)
def test_no_address_is_shown(made: Any) -> None:
    assert not re.search(r"0x[0-9a-f]{4}", repr(made))


class Custom(NamedTuple):
    init: Callable[..., Any]
    update: Callable[..., Any]


OPTIMIZERS: dict[str, Any] = {
    "adam": optax.adam(optax.cosine_decay_schedule(0.1, 100), b1=0.8),
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(0.1),
    "nadam": optax.nadam(0.1),
    "rmsprop": optax.rmsprop(0.1),
    "lion": optax.lion(0.1),
    "chain(clip_by_global_norm, adam)": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    "chain(scale_by_lbfgs, scale, scale_by_zoom_linesearch)": optax.lbfgs(),
    "masked(adam)": optax.masked(optax.adam(0.1), {"w": True}),
    "inject_hyperparams(adam)": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "MultiSteps(adam)": optax.MultiSteps(optax.adam(0.1), 4),
    "apply_if_finite(sgd)": optax.apply_if_finite(optax.sgd(0.1), 5),
    "partition(adam, set_to_zero)": optax.partition({"a": optax.adam(0.1), "b": optax.set_to_zero()}, {"w": "a"}),
    "inner": Custom(outer, inner),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_named(name: str) -> None:
    assert repr(fb.learned_adjoint(OPTIMIZERS[name], 1)) == f"learned_adjoint({name}, 1)"


# Built-in exceptions have no signature, nor has a plain subclass of them.
WITHOUT_SIGNATURE = ("StopTraining", "CheckpointError", "ProcessError")


@pytest.mark.parametrize("name", [name for name in fb.__all__ if name not in WITHOUT_SIGNATURE])
def test_signatures_have_no_addresses(name: str) -> None:
    assert "0x" not in str(inspect.signature(getattr(fb, name))) + (getattr(fb, name).__doc__ or "")


def test_all_public_names_are_listed() -> None:
    public = {name for name in vars(fb) if not name.startswith("_") and not inspect.ismodule(getattr(fb, name))}
    assert sorted(fb.__all__) == list(fb.__all__) == sorted(public)
