"""Ways to solve the linear problem: those that give two-stage least squares, and two that teach a lesson."""

import optax

import funcbilevel as fb
from funcbilevel.tasks._experiment.methods import Method, table
from funcbilevel.tasks.schooling.problem import free_h, linear_h

# With whitened z the inner objective's Hessian in theta, and the adjoint's, is 2 I: this one step is exact.
EXACT_STEP = optax.sgd(0.5)

OLS, TWO_STAGE, ALTERNATING, POINTWISE = "ols", "iv2sls", "alternating", "funcid-pointwise"
METHODS = table(
    Method(OLS, "ordinary least squares by linearmodels", always=True),
    Method(TWO_STAGE, "two-stage least squares by linearmodels", always=True),
    Method(
        "funcid-linear",
        "FuncID, the adjoint linear in the instruments",
        lambda: (fb.funcid(fb.linear_adjoint(lambda theta, z: z)), linear_h),
    ),
    Method(
        "funcid-learned",
        "FuncID, the adjoint trained by one exact step",
        lambda: (fb.funcid(fb.learned_adjoint(EXACT_STEP, num_steps=1)), linear_h),
    ),
    Method("aid-cg", "implicit differentiation by conjugate gradients", lambda: (fb.aid(fb.cg(num_steps=1)), linear_h)),
    Method("itd", "the inner step differentiated", lambda: (fb.itd(num_steps=1), linear_h)),
    Method(ALTERNATING, "a lesson: the explicit part alone", lambda: (fb.alternating(), linear_h)),
    Method(
        POINTWISE,
        "a lesson: h and the adjoint free at each person",
        lambda: (fb.funcid(fb.pointwise_adjoint()), free_h),
    ),
)
"""`build() -> (estimator, model of h)`."""
LESSONS = (ALTERNATING, POINTWISE)
