"""How the two players are trained: the table of methods, and their steps."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

import funcbilevel as fb
from funcbilevel.tasks._experiment.methods import Method, find, table
from funcbilevel.tasks._experiment.players import finite, move, solver_of_step
from funcbilevel.tasks.data.dataset import Batch
from funcbilevel.tasks.fairness.losses import LOSSES, accuracy_loss
from funcbilevel.tasks.fairness.problem import Game, Setting, problem


def _sequential(game: Game, estimator: fb.Estimator) -> fb.BilevelSolver:
    """The follower moves, or all followers do, then the leader, by the estimator's hypergradient."""
    m = game.setting.num_followers
    return fb.bilevel(
        problem(game),
        None,
        estimator,
        inner_optimizer=game.follower_optimizer,
        outer_optimizer=game.leader_optimizer,
        inner_steps=game.setting.inner_steps * (m if game.setting.followers == "round-robin" else 1),
    )


def leaky_alternating() -> fb.Estimator:
    r"""FairBiNN as its public code has it: the follower's gradient leaks into the leader's.

    One `zero_grad` before two backward passes adds, at the follower's parameters theta before and theta' after its
    step,

    .. math:: \partial_\omega L_{in}(\omega, \theta) + \partial_\omega L_{out}(\omega, \theta') .

    For comparison; with one follower step. The leak stands in `implicit`, though it is no implicit gradient.
    """

    def init(key: Any, problem: fb.ParametricProblem, model: Any, inner: fb.FitState, inner_batch: Any, /) -> Any:
        return jax.tree.map(jnp.copy, inner.params)

    def estimate(
        problem: fb.ParametricProblem,
        model: Any,
        solve: Any,
        outer_params: Any,
        inner_batch: Any,
        outer_batch: Any,
        state: Any,
        key: Any,
        /,
    ) -> tuple[fb.InnerSolution, fb.Hypergradient]:
        inner = solve(outer_params)
        value, g_exp = jax.value_and_grad(problem.outer_objective)(outer_params, inner.fit.params, outer_batch)
        leak = jax.grad(problem.inner_objective)(outer_params, state, inner_batch)
        gradient = jax.tree.map(jnp.add, g_exp, leak)
        metrics = {"adjoint_finite": jnp.array(True)}
        return inner, fb.Hypergradient(gradient, g_exp, leak, value, inner.fit.params, metrics)

    return fb.Estimator(init, estimate)


Weights: TypeAlias = tuple[Any, Any]
"""Of cross entropy and unfairness in a player's objective."""


def simultaneous(game: Game, leader: Weights, follower: Weights | None) -> fb.BilevelSolver:
    """Both players move at once, each by the gradient of its own objective in its own parameters.

    Both gradients come from one forward pass, and from one backward pass if `follower is leader`: gradient descent on
    one objective. The follower sees the leader's batch. With None it stays where it is. NaN and inf are kept out and
    reported as `fb.bilevel` does: a level that breaks does not move, and the leader moves only if both levels are well.
    """

    def step(
        state: fb.BilevelState, inner_batch: Batch, outer_batch: Batch
    ) -> tuple[fb.BilevelState, dict[str, jax.Array]]:
        del inner_batch
        omega, theta = state.outer_params, state.inner_params
        logits, pull = jax.vjp(lambda omega, theta: game.logits(omega, theta, outer_batch.x), omega, theta)
        accuracy, d_accuracy = jax.value_and_grad(accuracy_loss)(logits, outer_batch)
        unfairness, d_unfairness = jax.value_and_grad(game.fairness)(logits, outer_batch)

        def gradients(weights: Weights) -> tuple[Any, Any]:
            return pull(weights[0] * d_accuracy + weights[1] * d_unfairness)

        outer_value = leader[0] * accuracy + leader[1] * unfairness
        inner_value = unfairness if follower is None else follower[0] * accuracy + follower[1] * unfairness
        g_leader, g_follower = gradients(leader)
        if follower is not None and follower is not leader:
            g_follower = gradients(follower)[1]
        inner_finite = jnp.isfinite(inner_value) if follower is None else finite(inner_value, g_follower)
        outer_finite = finite(outer_value, g_leader)
        new_omega, outer_opt_state = move(
            game.leader_optimizer, g_leader, state.outer_opt_state, omega, inner_finite & outer_finite
        )
        new_theta, inner_opt_state = theta, state.inner_opt_state
        if follower is not None:
            new_theta, inner_opt_state = move(game.follower_optimizer, g_follower, inner_opt_state, theta, inner_finite)
        norm = optax.tree.norm(g_leader)
        metrics = {
            "outer_objective": outer_value,
            "inner_objective": inner_value,
            "hypergradient_norm": norm,
            "explicit_norm": norm,
            "implicit_norm": jnp.zeros_like(norm),
            "inner_finite": inner_finite,
            "adjoint_finite": jnp.array(True),
            "outer_finite": outer_finite,
        }
        new = state._replace(
            step=state.step + 1,
            outer_params=new_omega,
            inner_params=new_theta,
            inner_opt_state=inner_opt_state,
            outer_opt_state=outer_opt_state,
        )
        return new, metrics

    return solver_of_step(game.leader_optimizer, game.follower_optimizer, step)


def _alternating(game: Game) -> fb.BilevelSolver:
    if game.setting.update == "sequential":
        return _sequential(game, fb.alternating())
    eta, _, _, alpha, beta = game.hyper
    return simultaneous(game, leader=(1.0, beta * eta), follower=(alpha, eta))


def _aid_cg(game: Game) -> fb.BilevelSolver:
    return _sequential(game, fb.aid(fb.cg(game.setting.solver_steps, game.setting.damping)))


def _aid_neumann(game: Game) -> fb.BilevelSolver:
    of = game.setting
    return _sequential(game, fb.aid(fb.neumann(of.solver_steps, of.step_size, of.damping)))


def _itd(game: Game) -> fb.BilevelSolver:
    return _sequential(game, fb.itd(game.setting.inner_steps))


def _value_penalty(game: Game) -> fb.BilevelSolver:
    of = game.setting
    return _sequential(game, fb.value_penalty(game.follower_optimizer, of.inner_steps, of.penalty))


def _lagrangian(game: Game) -> fb.BilevelSolver:
    weights = (1.0, game.hyper.eta)
    return simultaneous(game._replace(follower_optimizer=game.leader_optimizer), weights, weights)


def _single_objective(game: Game) -> fb.BilevelSolver:
    weights = (1.0, 0.0)
    return simultaneous(game._replace(follower_optimizer=game.leader_optimizer), weights, weights)


def _frozen_follower(game: Game) -> fb.BilevelSolver:
    return simultaneous(game, leader=(1.0, game.hyper.eta), follower=None)


METHODS = table(
    Method("single-objective", "accuracy alone", _single_objective, colour="0.35"),
    Method("lagrangian", "cross entropy and unfairness as one objective for all layers", _lagrangian, colour="C0"),
    Method("alternating", "each player by its own gradient", _alternating, colour="C1"),
    Method(
        "leaky-alternating",
        "the same with the follower's gradient leaking into the leader's, FairBiNN's public code",
        lambda game: _sequential(game, leaky_alternating()),
        colour="C5",
    ),
    Method(
        "frozen-follower",
        "the Lagrangian's gradient for the leader, the follower as initialised",
        _frozen_follower,
        colour="0.6",
    ),
    Method("aid-cg", "implicit differentiation, its linear system by conjugate gradients", _aid_cg, colour="C3"),
    Method("aid-neumann", "implicit differentiation, its linear system by a Neumann series", _aid_neumann, colour="C6"),
    Method("itd", "the follower's steps differentiated", _itd, colour="C4"),
    Method("penalty-value", "a penalty on the follower's suboptimality", _value_penalty, colour="C2"),
)
SINGLE, LAGRANGIAN = "single-objective", "lagrangian"


def label_of(method: str, settings: Mapping[str, Any]) -> str:
    """The name in tables and figures of a method with one of the updates, and with one follower or several."""
    if (followers := settings.get("followers", "one")) != "one":
        return f"{method}, {followers}"
    return f"{method}, simultaneous" if settings.get("update") == "simultaneous" else method


ROWS = table(
    *(METHODS[name] for name in (SINGLE, LAGRANGIAN, "alternating")),
    Method("alternating, simultaneous", colour="C8"),
    Method("alternating, together", colour="C3"),
    Method("alternating, round-robin", colour="C4"),
    *(method for name, method in METHODS.items() if name not in (SINGLE, LAGRANGIAN, "alternating")),
)
"""What a row of a table may be, in their order."""


def check(method: str, setting: Setting) -> None:
    """Whether a method can be run with a setting.

    Raises:
        ValueError: there is no such method or loss, the layers do not fit, or there cannot be such followers.
    """
    find(METHODS, method)
    for name, _ in setting.terms:
        if name not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}.")
    if setting.update not in ("sequential", "simultaneous"):
        raise ValueError(f"update must be 'sequential' or 'simultaneous', got {setting.update!r}.")
    if setting.num_classes > 2 and any(loss.name == "published-parity" for loss in setting.terms):
        raise ValueError(f"loss: published-parity is defined for two classes, got {setting.num_classes}.")
    if setting.followers not in (kinds := ("one", "together", "round-robin")):
        raise ValueError(f"followers must be one of {', '.join(kinds)}, got {setting.followers!r}.")
    if setting.followers != "one" and (method != "alternating" or setting.update != "sequential"):
        raise ValueError(
            f"followers: {setting.followers} is for method alternating with the sequential update, got {method} with "
            f"the {setting.update} one."
        )
    if setting.followers != "one" and not 2 <= len(setting.losses) <= len(setting.fairness_widths):
        raise ValueError(
            f"followers: {setting.followers} takes at least two losses and a fairness layer for each of them, got "
            f"{len(setting.losses)} losses and fairness_widths {setting.fairness_widths}."
        )
    _ = setting.row
