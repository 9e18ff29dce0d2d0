"""How each method is trained, and between which hyper-parameters validation decides."""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, TypeAlias

from flax import linen

import funcbilevel as fb
from funcbilevel.tasks._experiment.methods import Method, choices, table
from funcbilevel.tasks._instrumental.formulas import adam
from funcbilevel.tasks._instrumental.methods import AID_CG, DFIV, FUNCID_LEARNED, FUNCID_LINEAR
from funcbilevel.tasks.data import dsprites_floors
from funcbilevel.tasks.iv.problem import INNER_RIDGE, InstrumentNet, Norm, TreatmentNet, problem


class Setting(NamedTuple):
    """What all methods have in common.

    Attributes:
        n: sample size; half of it is the inner level's.
        widths: of the treatment network.
        norm: layer or batch normalisation.
        inner_steps: Adam steps on theta per outer step.
        inner_learning_rate, outer_learning_rate, weight_decay: of Adam with an L2 penalty, on theta and omega.
    """

    n: int = 5000
    widths: tuple[int, int, int, int] = (1024, 512, 128, 32)
    norm: Norm = "layer"
    inner_steps: int = 20
    inner_learning_rate: float = 1e-3
    outer_learning_rate: float = 3e-3
    weight_decay: float = 0.1


Hyper: TypeAlias = Mapping[str, float]


def _funcid_linear(features: fb.Model, k: int, ridge: float) -> fb.Estimator:
    return fb.funcid(fb.linear_adjoint(features, ridge=ridge))


def _funcid_learned(features: fb.Model, k: int, learning_rate: float, ridge: float = 2 * INNER_RIDGE) -> fb.Estimator:
    head = fb.from_linen(linen.Dense(k, use_bias=False, kernel_init=linen.initializers.zeros))
    return fb.funcid(fb.learned_adjoint(adam(learning_rate, ridge), 20, head, features=features))


def _dfiv(features: fb.Model, k: int) -> fb.Estimator:
    return fb.alternating()


def _aid(features: fb.Model, k: int, num_steps: int, damping: float) -> fb.Estimator:
    return fb.aid(fb.cg(num_steps, damping))


def _itd(features: fb.Model, k: int, num_steps: int) -> fb.Estimator:
    return fb.itd(num_steps)


def _value_penalty(features: fb.Model, k: int, penalty: float) -> fb.Estimator:
    return fb.value_penalty(adam(1e-3, 0.0), 20, penalty)


def _gradient_penalty(features: fb.Model, k: int, penalty: float) -> fb.Estimator:
    return fb.gradient_penalty(adam(1e-3, 0.0), 20, penalty)


def _trials(name: str, *values: float, **common: float) -> tuple[Hyper, ...]:
    return tuple({**common, name: value} for value in values)


PENALTIES = _trials("penalty", 100.0, 10.0, 1000.0)
METHODS = table(
    FUNCID_LINEAR._replace(build=_funcid_linear, trials=_trials("ridge", 0.2, 2.0, 20.0), chosen=1),
    FUNCID_LEARNED._replace(build=_funcid_learned, trials=_trials("learning_rate", 1e-2, 1e-3, 1e-1), chosen=2),
    DFIV._replace(build=_dfiv, trials=_trials("outer_learning_rate", 3e-3, 1e-3, 2e-3)),
    # The committed selection has two trials more, damping 0.1 and two steps with damping 1: both are worse.
    AID_CG._replace(build=_aid, trials=_trials("damping", 1.0, 10.0, 100.0, num_steps=10), chosen=2),
    Method("itd", "the last inner steps differentiated", _itd, _trials("num_steps", 2, 5, 10), chosen=1, colour="C4"),
    Method("penalty-value", "first derivatives at two inner solutions", _value_penalty, PENALTIES, colour="C5"),
    Method(
        "penalty-gradient", "a penalty on the norm of the inner gradient", _gradient_penalty, PENALTIES, colour="C6"
    ),
    Method("kernel-iv", "kernel instrumental regression", dsprites_floors.kernel_iv, always=True, colour="0.4"),
    Method("two-stage", "two-stage least squares, linear", dsprites_floors.two_stage_floor, always=True, colour="0.6"),
    Method(
        "least-squares", "ridge regression on pixels", dsprites_floors.least_squares_floor, always=True, colour="0.75"
    ),
)
"""`build(features of h, number of h's outputs, **hyper) -> estimator`; of references `build(data, test) -> test MSE`.

Every method has three trials. Those chosen are the best by the validation loss of the committed selection
(benchmarks/results/iv/selection.jsonl), at n = 2,000, for funcid-linear at n = 5,000; but for dfiv, whose best, 1e-3,
was worse than the common rate at n = 5,000.
"""
REFERENCES = tuple(name for name, method in METHODS.items() if method.always)


class Solver(NamedTuple):
    """A method made ready.

    Attributes:
        bilevel: the solver; the treatment network is its outer model.
        h: the model of h, a network with a head in closed form.
        f: the treatment network.
    """

    bilevel: fb.BilevelSolver
    h: fb.Model
    f: fb.Model


def solver(method: str, setting: Setting, hyper: Hyper) -> Solver:
    """The solver of a method; the same arguments give the same object, whose programs are then compiled once.

    Raises:
        ValueError: there is no such method.
    """
    if method not in choices(METHODS):
        raise ValueError(f"method must be one of {', '.join(choices(METHODS))}, got {method!r}.")
    return _solver(method, setting, tuple(sorted(hyper.items())))


@cache
def _solver(method: str, setting: Setting, hyper: tuple[tuple[str, float], ...]) -> Solver:
    own: dict[str, Any] = dict(hyper)
    build: Any = METHODS[method].build
    outer_learning_rate = own.pop("outer_learning_rate", setting.outer_learning_rate)
    k = setting.widths[-1]
    features = fb.from_linen(InstrumentNet(setting.norm))
    h = fb.variable_projection(features, num_outputs=k, ridge=2 * INNER_RIDGE)
    f = fb.from_linen(TreatmentNet(setting.widths, setting.norm))
    l2 = setting.weight_decay / (setting.n // 2)
    bilevel = fb.bilevel(
        problem,
        h,
        build(features, k, **own),
        inner_optimizer=adam(setting.inner_learning_rate, l2),
        outer_optimizer=adam(outer_learning_rate, l2),
        inner_steps=setting.inner_steps,
        outer_model=f,
        outer_inputs=lambda batch: batch.x,
    )
    return Solver(bilevel, h, f)
