"""How instrumental regression with covariates is trained: what the methods have in common, and what each tries."""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from flax import linen

import funcbilevel as fb
from funcbilevel.tasks._experiment.methods import Method, table
from funcbilevel.tasks._instrumental.formulas import adam


class Setting(NamedTuple):
    """What all methods have in common.

    Attributes:
        num_outer_steps: outer steps, over which the outer learning rate falls to zero along a cosine.
        treatment_widths, covariate_widths, instrument_widths: of the three networks.
        linear_part: whether their features hold their inputs too, so that two-stage least squares is a special case.
        inner_steps: Adam steps on theta per outer step.
        inner_learning_rate, outer_learning_rate: of Adam.
        inner_ridge, outer_ridge: on the heads of the two levels, which are solved for.
    """

    num_outer_steps: int = 200
    treatment_widths: tuple[int, ...] = (16, 8)
    covariate_widths: tuple[int, ...] = (64, 16)
    instrument_widths: tuple[int, ...] = (64, 32)
    linear_part: bool = False
    inner_steps: int = 10
    inner_learning_rate: float = 3e-3
    outer_learning_rate: float = 3e-3
    inner_ridge: float = 1e-3
    outer_ridge: float = 1e-3

    def treatment_features(self, num_treatments: int = 1) -> int:
        """Number of features of the treatment: what h predicts."""
        return self.treatment_widths[-1] + 1 + num_treatments * self.linear_part


Hyper: TypeAlias = Mapping[str, float]


def _funcid_linear(features: fb.Model, setting: Setting, k: int, ridge_ratio: float) -> fb.Estimator:
    return fb.funcid(fb.linear_adjoint(features, ridge=2 * setting.inner_ridge * ridge_ratio))


def _funcid_learned(features: fb.Model, setting: Setting, k: int, learning_rate: float) -> fb.Estimator:
    head = fb.from_linen(linen.Dense(k, use_bias=False, kernel_init=linen.initializers.zeros))
    optimizer = adam(learning_rate, 2 * setting.inner_ridge)
    return fb.funcid(fb.learned_adjoint(optimizer, setting.inner_steps, head, features=features))


def _alternating(features: fb.Model, setting: Setting, k: int) -> fb.Estimator:
    return fb.alternating()  # with a head in closed form the explicit part is DFIV's derivative, through the head


def _aid(features: fb.Model, setting: Setting, k: int, damping: float) -> fb.Estimator:
    return fb.aid(fb.cg(10, damping))


REGRESSION, TWO_STAGE, LEAST_SQUARES = "single-objective", "iv2sls", "ols"
FUNCID_LINEAR = Method("funcid-linear", "FuncID, the adjoint linear in the features of h", colour="C3")
FUNCID_LEARNED = Method("funcid-learned", "FuncID, the adjoint's head trained by Adam", colour="C1")
DFIV = Method("dfiv", "deep feature IV, the derivative through the head of h alone", colour="C0")
AID_CG = Method("aid-cg", "implicit differentiation by conjugate gradients", colour="C2")
METHODS = table(
    FUNCID_LINEAR._replace(build=_funcid_linear, trials=({"ridge_ratio": 1.0}, {"ridge_ratio": 10.0})),
    FUNCID_LEARNED._replace(build=_funcid_learned, trials=({"learning_rate": 1e-2}, {"learning_rate": 1e-3})),
    # multiples of the setting's
    DFIV._replace(build=_alternating, trials=({"inner_ridge": 1.0}, {"inner_ridge": 10.0})),
    AID_CG._replace(build=_aid, trials=({"damping": 1e-1}, {"damping": 10.0})),
    Method(
        REGRESSION,
        "no instruments: regression on treatment and covariates",
        _alternating,
        ({"num_outer_steps": 200}, {"num_outer_steps": 600}),
        colour="0.45",
    ),
    Method(TWO_STAGE, "two-stage least squares, linear", always=True, colour="0.7"),
    Method(LEAST_SQUARES, "ordinary least squares, linear", always=True, colour="0.3"),
)
"""`build(features of h, setting, number of h's outputs, **hyper) -> estimator`.

The trials are the hyper-parameters of a method's own; `trials` has all."""


def trials(method: str, setting: Setting) -> tuple[Hyper, ...]:
    """The hyper-parameters between which the validation loss decides: six of every method."""
    common = ((1e-3, 1.0), (3e-3, 1.0), (3e-3, 10.0))  # outer learning rate, multiple of the outer ridge
    return tuple(
        {"outer_learning_rate": rate, "outer_ridge": factor * setting.outer_ridge}
        | {name: value * setting.inner_ridge if name == "inner_ridge" else value for name, value in own.items()}
        for own in METHODS[method].trials
        for rate, factor in common
    )
