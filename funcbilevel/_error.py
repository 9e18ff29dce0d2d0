"""How wrong a hypergradient is, without a reference."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from funcbilevel._bilevel import hypergradient
from funcbilevel._check import check_setup
from funcbilevel._described import fields_that_differ
from funcbilevel._estimator import Call, Estimator, Hypergradient, InnerSolution, by_call
from funcbilevel._model import Model
from funcbilevel._problem import Problem, mean_over_devices
from funcbilevel._tree import tree_add_scaled, tree_norm
from funcbilevel._typing import Batch, InnerParams, Key, ModelState, OuterParams, PyTree


class HypergradientError(NamedTuple):
    """What `hypergradient_error` estimates; scalars, but for `refined`.

    Attributes:
        error: |g - dF|, g the estimator's hypergradient.
        relative_error: `error` over the norm of `refined`.
        inner_error: the part of `error` that the inner level is to blame for: it is not at its solution.
        adjoint_error: the part of the adjoint or the linear solve: too few steps, damping.
        refined: the best hypergradient that came up, like outer_params; its error is smaller than `error`.
    """

    error: jax.Array
    relative_error: jax.Array
    inner_error: jax.Array
    adjoint_error: jax.Array
    refined: OuterParams

    def __repr__(self) -> str:
        return fields_that_differ(self)


def hypergradient_error(
    problem: Problem,
    model: Model | None,
    estimator: Estimator,
    outer_params: OuterParams,
    inner_params: InnerParams,
    inner_batch: Batch,
    outer_batch: Batch,
    *,
    model_state: ModelState = None,
    state: PyTree = None,
    key: Key | None = None,
) -> HypergradientError:
    r"""An a-posteriori estimate of a hypergradient's error.

    With g_0 the estimator's hypergradient, g_1 and g_2 are made from it by one and two rounds of refinement. A round
    is a Newton step of the inner problem (in function space for `funcid`, in parameter space for `aid`, both with the
    estimator's own means) and one of the adjoint (`funcid` goes on fitting it; `aid` solves for the residual d - H u,
    without the damping, and adds). Their errors are taken for a geometric series of ratio q:

    .. math::
        |g_0 - \nabla F| \approx \frac{|g_2 - g_0|}{1 - q^2}, \qquad q = \min(|g_2 - g_1| / |g_1 - g_0|,\ 0.9) .

    It sees an inner level that is not at its solution, linear solves and adjoint fits that have not ended, and damping.
    It does not see what no round changes: a class of adjoint functions (with its `ridge`) that does not hold the
    adjoint, a batch that is not the population, and, for `aid`, a Hessian that is singular where the outer derivative
    is not zero. Where q is 0.9 the rounds do not converge, and the estimate is only an order of magnitude: for `aid` on
    an over-parametrised network, whose Hessian's eigenvalues fall over many decades, 0.3 to 2 times the error.

    It costs about eight hypergradients. Call it now and then, at the state of a solver, not in the loop.

    Arguments:
        problem, model, outer_params, inner_params, inner_batch, outer_batch, model_state, key: as in `hypergradient`.
        estimator: `funcid(...)` or `aid(...)`, corrected or not.
        state: `Hypergradient.state` or `BilevelState.estimator_state`: the warm start of g_0; None: a fresh start.

    Returns:
        A `HypergradientError`. Pure and jit-able.

    Raises:
        ValueError, TypeError: as `hypergradient`; the estimator has no `refine`.

    Example: an inner level that has stopped a tenth short.
        >>> problem = fb.FunctionalProblem(
        ...     lambda w, v, batch: jnp.mean((v - w) ** 2), lambda w, v, batch: jnp.mean((v - batch[1]) ** 2)
        ... )
        >>> model = fb.from_function(lambda key, x: jnp.zeros(()), lambda params, x: params * jnp.ones(len(x)))
        >>> batch, estimator = (jnp.zeros(4), 2.0 * jnp.ones(4)), fb.funcid(fb.pointwise_adjoint())
        >>> e = fb.hypergradient_error(problem, model, estimator, 1.0, 0.9, batch, batch)
        >>> [round(float(x), 3) for x in (e.error, e.relative_error, e.inner_error, e.adjoint_error)]
        [0.2, 0.1, 0.2, 0.0]
    """
    name = "hypergradient_error"
    check_setup(name, problem, model, estimator)
    refine = estimator.refine
    if refine is None:
        raise ValueError(
            f"{name}: {estimator!r} has no way to refine its hypergradient; use fb.funcid or fb.aid, or compare with a "
            "reference by fb.check_hypergradient."
        )

    def estimate(call: Call) -> tuple[InnerSolution, Hypergradient]:
        first, *rest = refine(call)
        # Only the numbers that are asked for: no warnings of what this function is to find out.
        metrics = {"adjoint_finite": first.metrics["adjoint_finite"]}
        parts = [(h.explicit, h.implicit) for h in rest]
        return call.solve(call.outer_params), first._replace(state=parts, metrics=metrics)

    h = hypergradient(
        problem,
        model,
        estimator._replace(estimate=by_call(estimate)),
        outer_params,
        inner_params,
        inner_batch,
        outer_batch,
        model_state=model_state,
        state=state,
        key=key,
    )
    g_0 = h.gradient
    again, g_1, g_2 = (
        tree_add_scaled(explicit, 1.0, implicit) for explicit, implicit in mean_over_devices(problem, h.state)
    )

    def distance(a: OuterParams, b: OuterParams) -> jax.Array:
        return tree_norm(tree_add_scaled(a, -1.0, b))

    step, next_step = distance(g_1, g_0), distance(g_2, g_1)
    q = jnp.minimum(next_step / jnp.where(step > 0, step, 1.0), 0.9)
    error, size = distance(g_2, g_0) / (1.0 - q**2), tree_norm(g_2)
    relative = error / jnp.where(size > 0, size, 1.0)
    return HypergradientError(error, relative, distance(g_2, again), distance(again, g_0), g_2)
