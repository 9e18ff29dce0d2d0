"""How the two players of the network are trained, and the control that has one objective for both."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import funcbilevel as fb
from funcbilevel.tasks._experiment.methods import Method, table
from funcbilevel.tasks._experiment.players import cosine
from funcbilevel.tasks.pathways.problem import Params, Rows, follower_objective, is_followers, problem


class Setting(NamedTuple):
    """What decides the compiled program.

    Attributes:
        width: of both hidden layers.
        batch_size: rows per step, drawn with replacement; both players see the same.
        num_steps: of the leader; rates fall to zero by half a cosine over them.
        inner_steps: the follower's steps per step of the leader.
        solver_steps, damping: of conjugate gradients in `aid-cg`.
    """

    width: int = 8
    batch_size: int = 32
    num_steps: int = 400
    inner_steps: int = 1
    solver_steps: int = 3
    damping: float = 1.0


class Hyper(NamedTuple):
    """What may differ between the cells of one program.

    Attributes:
        eta: weight of the attributions outside the known pathways.
        rate: of Adam, for both players.
        known_only: 1 if the network gets the known genes only, else 0.
    """

    eta: Any = 0.0
    rate: Any = 0.01
    known_only: Any = 0.0


class Learner(NamedTuple):
    """A way to train: `init(params) -> state`, `step(state, rows) -> (state, objective)`, `params(state)`."""

    init: Callable[[Params], Any]
    step: Callable[[Any, Rows], tuple[Any, jax.Array]]
    params: Callable[[Any], Params]


def _adam(rate: Any, num_steps: int) -> optax.GradientTransformation:
    return optax.adam(lambda count: rate * cosine(count, num_steps), eps_root=1e-16)


def _played(estimator: Callable[[Setting], fb.Estimator]) -> Callable[..., Learner]:
    """The follower moves, then the leader, by the estimator's hypergradient."""

    def learner(setting: Setting, shapes: Params, known: jax.Array, hyper: Hyper) -> Learner:
        merge = fb.partition(shapes, is_followers).merge
        solver = fb.bilevel(
            problem(merge, known, hyper.eta),
            None,
            estimator(setting),
            inner_optimizer=_adam(hyper.rate, setting.num_steps * setting.inner_steps),
            outer_optimizer=_adam(hyper.rate, setting.num_steps),
            inner_steps=setting.inner_steps,
        )

        def init(params: Params) -> fb.BilevelState:
            leader, follower, _ = fb.partition(params, is_followers)
            return solver.init(jax.random.key(0), leader, None, follower)

        def step(state: fb.BilevelState, rows: Rows) -> tuple[fb.BilevelState, jax.Array]:
            state, metrics = solver.step(state, rows, rows)
            return state, metrics["outer_objective"]

        return Learner(init, step, lambda state: merge(state.outer_params, state.inner_params))

    return learner


def _lagrangian(setting: Setting, shapes: Params, known: jax.Array, hyper: Hyper) -> Learner:
    """The follower's objective for all layers."""
    del shapes
    optimizer = _adam(hyper.rate, setting.num_steps)

    def step(state: tuple[Params, Any], rows: Rows) -> tuple[Any, jax.Array]:
        params, opt_state = state
        value, gradient = jax.value_and_grad(follower_objective)(params, rows, known, hyper.eta)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return Learner(lambda params: (params, optimizer.init(params)), step, lambda state: state[0])


ALONE, KNOWN, LAGRANGIAN = "single-objective", "known-genes", "lagrangian"
RATES = ({"rate": 0.01}, {"rate": 0.02})
METHODS = table(
    Method(ALONE, "cross entropy alone", _lagrangian, RATES, colour="0.35", always=True),
    Method(
        KNOWN, "the same, on a network that gets the known genes only", _lagrangian, RATES, colour="C2", always=True
    ),
    Method(LAGRANGIAN, "the follower's objective for both players", _lagrangian, RATES, colour="C0", always=True),
    Method(
        "aid-cg",
        "implicit differentiation, its linear system by conjugate gradients",
        _played(lambda setting: fb.aid(fb.cg(setting.solver_steps, setting.damping))),
        RATES,
        colour="C3",
    ),
    Method(
        "alternating",
        "each player by its own gradient",
        _played(lambda setting: fb.alternating()),
        RATES,
        colour="C1",
    ),
    Method(
        "itd",
        "the follower's steps differentiated",
        _played(lambda setting: fb.itd(setting.inner_steps)),
        RATES,
        colour="C4",
    ),
)
ETAS = (0.1, 0.3, 1.0, 1.7, 3.0, 6.0)


def hypers(method: str) -> list[Hyper]:
    """The settings of a method: of those that trade, every eta with every rate."""
    etas = (0.0,) if method in (ALONE, KNOWN) else ETAS
    return [Hyper(eta, known_only=float(method == KNOWN), **trial) for trial in METHODS[method].trials for eta in etas]
