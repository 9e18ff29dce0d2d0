"""Ways to learn the world model, and what decides a run's numbers."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import optax

import funcbilevel as fb
from funcbilevel.tasks._experiment.methods import Method, find, table
from funcbilevel.tasks.rl.environments import Environment
from funcbilevel.tasks.rl.problem import (
    Bellman,
    bellman_problem,
    ensemble_problem,
    init_q,
    likelihood_problem,
    model_free_problem,
    predict,
    q_values,
    reward_alone,
    value_equivalence_problem,
)


class Setting(NamedTuple):
    """What decides a run's numbers.

    Attributes:
        model_width: of the hidden layers of the world model.
        steps: of the environment, the first random ones included.
        inner_steps: of Adam on theta per step of the environment, all on one batch; one outer step follows.
        inner_learning_rate, outer_learning_rate: of Adam on theta and omega.
        warm_adam: whether Adam's moments on theta are kept from step to step. The published code restarts them for
            FuncID and OMD, and keeps them for MLE and VEP. The first step of Adam is learning rate times sign.
        tau: the target networks move by tau (theta - target) per step.
        adjoint_learning_rate: of Adam on the learned adjoint, one step per step of the environment.
        cg_steps, damping: of OMD's linear system.
        q_width: of the hidden layers of the Q-networks, and of the random value functions of VEP.
        ensemble_size: number of those.
        batch_size: transitions drawn from the buffer, with replacement.
        alpha, epsilon: the policy is softmax(mean_j Q_j / alpha), and with probability epsilon uniform.
        discount: gamma.
        value_bound: the soft value in all targets is clipped to it; None as published. A reward of at most 1 gives
            values of at most 1 / (1 - gamma), and without a bound some long runs of every kind diverge.
        random_steps: steps with uniform actions and without learning, at the beginning.
        capacity: transitions that the replay buffer keeps; 0: all.
        evaluation_interval: steps between evaluations.
        evaluation_episodes: of an evaluation; they follow the soft policy, without epsilon.
    """

    model_width: int = 3
    steps: int = 50_000
    inner_steps: int = 1
    inner_learning_rate: float = 3e-3
    outer_learning_rate: float = 1e-3
    warm_adam: bool = True
    tau: float = 0.01
    adjoint_learning_rate: float = 3e-3
    cg_steps: int = 5
    damping: float = 10.0
    q_width: int = 32
    ensemble_size: int = 5
    batch_size: int = 256
    alpha: float = 0.01
    epsilon: float = 0.1
    discount: float = 0.99
    value_bound: float | None = None
    random_steps: int = 1000
    capacity: int = 0
    evaluation_interval: int = 1000
    evaluation_episodes: int = 10


# The methods.

Build: TypeAlias = Callable[[Bellman, Setting], tuple[fb.FunctionalProblem, fb.Estimator]]


def _alternating(problem: Callable[[Bellman], fb.FunctionalProblem]) -> Build:
    """The outer objective itself depends on the world model, or nothing does: the explicit part is all there is."""
    return lambda bellman, setting: (problem(bellman), fb.alternating())


def _pointwise(bellman: Bellman, setting: Setting) -> tuple[fb.FunctionalProblem, fb.Estimator]:
    return bellman_problem(bellman), fb.funcid(fb.pointwise_adjoint())


def _corrected(bellman: Bellman, setting: Setting) -> tuple[fb.FunctionalProblem, fb.Estimator]:
    return bellman_problem(bellman), fb.funcid(fb.pointwise_adjoint(), correction=1.0)


def _public(bellman: Bellman, setting: Setting) -> tuple[fb.FunctionalProblem, fb.Estimator]:
    return _pointwise(reward_alone(bellman), setting)


def _learned(bellman: Bellman, setting: Setting) -> tuple[fb.FunctionalProblem, fb.Estimator]:
    adjoint = fb.learned_adjoint(optax.adam(setting.adjoint_learning_rate), num_steps=1)
    return bellman_problem(bellman), fb.funcid(adjoint)


def _omd_cg(bellman: Bellman, setting: Setting) -> tuple[fb.FunctionalProblem, fb.Estimator]:
    return bellman_problem(bellman), fb.aid(fb.cg(setting.cg_steps, setting.damping))


def _omd_identity(bellman: Bellman, setting: Setting) -> tuple[fb.FunctionalProblem, fb.Estimator]:
    return bellman_problem(bellman), fb.aid(fb.identity(), warm_start=False)


def _product(**values: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values()))


MODEL_FREE = "model-free"
RATES = _product(inner_learning_rate=(3e-4, 3e-3), warm_adam=(True, False))
METHODS = table(
    Method(
        "funcid-corrected",
        "functional implicit differentiation after a Newton step, which is value equivalence with the current targets",
        _corrected,
        RATES,
        chosen=2,
        colour="C3",
    ),
    Method(
        "funcid-pointwise",
        "the same without the step, as published: its adjoint exact at each sample",
        _pointwise,
        RATES,
        chosen=3,
        colour="C1",
        aliases=("funcid",),
    ),
    Method(
        "funcid-public",
        "the same as its public code has it: the reward alone learns, the dynamics network does not",
        _public,
        RATES,
        chosen=3,
        colour="C5",
    ),
    Method(
        "funcid-learned",
        "functional implicit differentiation, its adjoint a network",
        _learned,
        _product(inner_learning_rate=(1e-3, 3e-3), adjoint_learning_rate=(3e-3, 1e-2), warm_adam=(False,)),
        chosen=2,
        colour="C8",
    ),
    Method(
        "omd-cg",
        "implicit differentiation by parameters, its linear system by conjugate gradients",
        _omd_cg,
        _product(inner_learning_rate=(3e-4, 1e-3), damping=(1000.0, 10_000.0), warm_adam=(False,), cg_steps=(5,)),
        colour="C0",
        aliases=("omd",),
        published={"inner_learning_rate": 3e-4, "damping": 10.0, "warm_adam": False, "cg_steps": 5},
    ),
    Method(
        "omd-identity",
        "the same with the identity for the inverse, as its publication",
        _omd_identity,
        RATES,
        chosen=1,
        colour="C9",
    ),
    Method("mle", "a model of maximum likelihood", _alternating(likelihood_problem), RATES, chosen=2, colour="C2"),
    Method(
        "vep",
        "a model that five random value functions cannot tell from the truth",
        _alternating(ensemble_problem),
        RATES,
        chosen=2,
        colour="C4",
    ),
    Method(
        "value-equivalence",
        "a model that gives the targets of the current value function",
        _alternating(value_equivalence_problem),
        RATES,
        chosen=2,
        colour="C6",
    ),
    Method(
        MODEL_FREE,
        "soft double Q-learning, the model unused",
        _alternating(model_free_problem),
        RATES,
        chosen=2,
        colour="0.4",
    ),
)
"""Their default hyper-parameters are those of their publications."""


TRACED = ("inner_learning_rate", "outer_learning_rate", "warm_adam")
"""The settings that are arguments of the compiled programs: one program serves all trials of them."""
CURVES = ("evaluation_return", "outer_objective", "inner_objective")
"""The metrics that are recorded by environment step, beside the records."""


def settings_of(method: str, setting: Setting) -> dict[str, Any]:
    """What a record says of a run: all but other methods' own settings, and a bound that is not there."""
    others = {"adjoint_learning_rate", "cg_steps", "damping"} - METHODS[method].hyper.keys()
    others |= set() if method == "vep" else {"ensemble_size"}
    return {name: value for name, value in setting._asdict().items() if name not in others and value is not None}


def bellman_of(environment: Environment, setting: Setting) -> Bellman:
    """The networks and constants of a setting."""
    return Bellman(
        q_values, partial(predict, environment.num_actions), setting.discount, setting.alpha, setting.value_bound
    )


def agent(environment: Environment, method: str, setting: Setting) -> fb.BilevelSolver:
    """The solver of a method; those of the settings that are `TRACED` may be arrays.

    Raises:
        ValueError: there is no such method.
    """
    build: Any = find(METHODS, method).build
    bellman = bellman_of(environment, setting)
    problem, estimator = build(bellman, setting)
    b1, b2 = (jnp.where(setting.warm_adam, b, 0.0) for b in (0.9, 0.999))  # without memory every step is a first one
    solver = fb.bilevel(
        problem,
        bellman.model(lambda key, inputs: init_q(key, environment, setting.q_width)),
        estimator,
        inner_optimizer=optax.adam(setting.inner_learning_rate, b1, b2),
        outer_optimizer=optax.adam(setting.outer_learning_rate),
        inner_steps=setting.inner_steps,
    )
    return _standing_still(solver) if method == MODEL_FREE else solver


def _standing_still(solver: fb.BilevelSolver) -> fb.BilevelSolver:
    """The solver without its warning that the outer level does not move, where it is not to move."""

    def step(*args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "step: outer_objective does not depend on outer_params")
            return solver.step(*args)

    return solver._replace(step=step)
