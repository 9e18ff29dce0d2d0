"""The families side by side: functional, implicit and iterative differentiation, stochastic and first-order solvers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax

import funcbilevel as fb
from funcbilevel.tasks._experiment.methods import Method, table
from funcbilevel.tasks.cleaning.problem import DECAY, FUNCTIONAL, PARAMETRIC, features, model


@dataclass(frozen=True)
class Setting:
    """What decides the compiled program.

    Attributes:
        network: "linear", or "mlp" with 300 hidden units.
        num_steps: outer steps of the methods with an inner loop; those without make `inner_steps` times as many, so
            that all make as many inner steps.
        inner_steps: of the inner loop.
        batch_size: training samples per draw.
        inner_rate: of gradient descent on the network.
        outer_rate: of Adam on the weights' logits, of methods with an inner loop; a fifth of it for those without.
    """

    network: str = "linear"
    num_steps: int = 400
    inner_steps: int = 10
    batch_size: int = 125
    inner_rate: float = 0.3
    outer_rate: float = 0.1


Build = Callable[[Setting], tuple[fb.BilevelSolver, int]]
"""The solver, and how many outer steps it makes."""


def _estimator(estimator: Callable[[Setting], fb.Estimator]) -> Build:
    def build(setting: Setting) -> tuple[fb.BilevelSolver, int]:
        sizes = _sizes(setting, 1)
        return fb.bilevel(
            *(PARAMETRIC, None, estimator(setting)),
            inner_optimizer=optax.sgd(setting.inner_rate),
            outer_optimizer=sizes["outer_optimizer"],
            inner_steps=setting.inner_steps,
        ), setting.num_steps

    return build


def _funcid(adjoint: Callable[[], fb.Adjoint]) -> Build:
    def build(setting: Setting) -> tuple[fb.BilevelSolver, int]:
        decaying = optax.chain(optax.add_decayed_weights(2 * DECAY), optax.sgd(setting.inner_rate))
        return fb.bilevel(
            *(FUNCTIONAL, model(setting.network), fb.funcid(adjoint())),
            inner_optimizer=decaying,
            outer_optimizer=optax.adam(setting.outer_rate),
            inner_steps=setting.inner_steps,
        ), setting.num_steps

    return build


def _double(function: Callable[..., fb.BilevelSolver], **more: Any) -> Build:
    def build(setting: Setting) -> tuple[fb.BilevelSolver, int]:
        rate = {"linear_optimizer": setting.inner_rate} if more.pop("linear", False) else {}
        steps = {"inner_steps": setting.inner_steps} if "solution_steps" not in more else {}
        return function(PARAMETRIC, **_sizes(setting, 1), **rate, **steps, **more), setting.num_steps

    return build


def _single(function: Callable[..., fb.BilevelSolver]) -> Build:
    def build(setting: Setting) -> tuple[fb.BilevelSolver, int]:
        sizes = _sizes(setting, 5) | {"linear_optimizer": setting.inner_rate}
        return function(PARAMETRIC, **sizes), setting.num_steps * setting.inner_steps

    return build


def _sizes(setting: Setting, slower: float) -> dict[str, Any]:
    return {"inner_optimizer": setting.inner_rate, "outer_optimizer": optax.adam(setting.outer_rate / slower)}


def _stocbio(setting: Setting) -> tuple[fb.BilevelSolver, int]:
    return _double(fb.stocbio, neumann_steps=10, neumann_step_size=setting.inner_rate)(setting)


def _amigo(setting: Setting) -> tuple[fb.BilevelSolver, int]:
    return _double(fb.amigo, linear_steps=10, linear_optimizer=setting.inner_rate)(setting)


def _f2sa(setting: Setting) -> tuple[fb.BilevelSolver, int]:
    growing = {"penalty": lambda t: 1.0 + 0.02 * t, "penalty_optimizer": lambda t: 0.3 / (1.0 + 0.02 * t)}
    return _double(fb.f2sa, **growing)(setting)


def _bome(setting: Setting) -> tuple[fb.BilevelSolver, int]:
    return _double(fb.bome, solution_steps=10, solution_optimizer=setting.inner_rate)(setting)


def _learned() -> fb.Adjoint:
    return fb.learned_adjoint(optax.adam(1e-2), 10)


ALONE, ALL = "validation-only", "all-samples"
METHODS = table(
    Method(ALONE, "the network trained on the clean validation samples alone", colour="0.35", always=True),
    Method(ALL, "the network trained on all samples, with equal weights", colour="0.6", always=True),
    Method(
        "funcid-linear",
        "functional, its adjoint linear in the last layer's inputs",
        _funcid(lambda: fb.linear_adjoint(features, ridge=2 * DECAY)),
        colour="C0",
    ),
    Method("funcid-learned", "functional, its adjoint a network like the classifier", _funcid(_learned), colour="C9"),
    Method("aid-cg", "implicit differentiation", _estimator(lambda _: fb.aid(fb.cg(10))), colour="C3"),
    Method("itd", "inner steps differentiated", _estimator(lambda s: fb.itd(s.inner_steps)), colour="C4"),
    Method("darts", "finite differences", _estimator(lambda s: fb.darts(s.inner_rate)), colour="C5"),
    Method("soba", "single loop", _single(fb.soba), colour="C1"),
    Method("saba", "single loop, with a memory", _single(fb.saba), colour="C8"),
    Method("stocbio", "double loop, Neumann series", _stocbio, colour="C6"),
    Method("amigo", "double loop, warm-started linear system", _amigo, colour="C2"),
    Method("f2sa", "first order, growing penalty", _f2sa, colour="navy"),
    Method("bome", "first order, dynamic barrier", _bome, colour="C7"),
)
