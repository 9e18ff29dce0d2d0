"""FuncID: functional implicit differentiation."""

from functools import partial

import jax
import jax.numpy as jnp

from funcbilevel._check import check_prediction, problem_inputs
from funcbilevel._described import described
from funcbilevel._estimator import Adjoint, AdjointSystem, Call, Estimator, Hypergradient, InnerSolution, by_call
from funcbilevel._linear_solvers import rescaled
from funcbilevel._predictor import predictor
from funcbilevel._problem import (
    inner_cross_derivative,
    inner_derivatives,
    mean_over_devices,
    outer_derivatives,
    stationarity,
)
from funcbilevel._tree import (
    all_finite,
    evaluated_after,
    stays_finite,
    tree_add_scaled,
    tree_cast,
    tree_norm,
    tree_vdot,
    working_dtype,
)

BATCHES = ("inner_batch", "outer_batch")


@described
def funcid(adjoint: Adjoint) -> Estimator:
    r"""Functional implicit differentiation (FuncID).

    With v_P, v_Q the predictions on the inner and the outer batch,

    .. math::
        d &= \partial_v L_{out}(\omega, v_Q), \qquad C = \partial^2_v L_{in}(\omega, v_P), \\
        a &\in \arg\min_a \tfrac12 \langle a(x_P), C\,a(x_P)\rangle + \langle a(x_Q), d\rangle, \\
        \nabla F(\omega) &= \partial_\omega L_{out}(\omega, v_Q)
            + \partial_\omega \langle \partial_v L_{in}(\omega, v_P), a(x_P)\rangle .

    C acts on predictions, so no Hessian in parameter space appears; v_P, v_Q, d and C are computed once per call. The
    formula holds at the inner solution: `inner_gradient_relative` says how far the inner level is from it.

    With `fb.Minibatches` or `fb.Sampler` as inner batch, P is one batch: the draw after those of the inner steps.

    Arguments:
        adjoint: how the adjoint function a is represented and fitted: `learned_adjoint`, `linear_adjoint` or
            `pointwise_adjoint`.

    Returns:
        An `Estimator` for `FunctionalProblem`. Metrics: `adjoint_finite`; those of the adjoint; `inner_gradient_norm`,
        |d_theta L_in|, in a loop that of the last inner step; and, with g = d_v L_in at v_P, `inner_gradient_relative`:
        |<g, a>| / (|<g, a>| + |a| |C v_P|), the gradient along a beside the size of its terms. (g itself need not
        vanish where the model cannot fit every sample, its part in the span of the adjoint function has to.)

    Raises:
        TypeError: `adjoint` is not an `Adjoint`.

    Example:
        >>> estimator = fb.funcid(fb.learned_adjoint(optax.adam(1e-3), num_steps=10))

    References:
        Petrulionyte, Mairal, Arbel, NeurIPS 2024, https://arxiv.org/abs/2403.20233, section 3 and algorithm 1.
    """
    if not isinstance(adjoint, Adjoint):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"funcid: adjoint must be an fb.Adjoint, got {adjoint!r}; make one with fb.learned_adjoint(...), "
            "fb.linear_adjoint(...) or fb.pointwise_adjoint()."
        )

    def estimate(call: Call) -> tuple[InnerSolution, Hypergradient]:
        problem, model, solve, outer_params, inner_batch, outer_batch, state, key = call
        inner = solve(outer_params)
        x_P, x_Q = (problem_inputs("funcid", problem, b, n) for b, n in zip((inner_batch, outer_batch), BATCHES))
        h = predictor(problem, model, outer_params, inner.fit.params, inner_batch, inner.fit.model_state)
        v_P, v_Q = h(x_P), h(x_Q)
        for v, x, name in zip((v_P, v_Q), (x_P, x_Q), BATCHES):
            check_prediction("funcid", "prediction", v, x, name)

        value, aux, g_exp, d = outer_derivatives(problem, outer_params, v_Q, outer_batch)
        gradient, C = inner_derivatives(problem, outer_params, v_P, inner_batch)
        mean = partial(mean_over_devices, problem)
        system = AdjointSystem(C, d, v_P, x_P, x_Q, mean)
        a_P, new_state, metrics = adjoint.fit(system, model, inner.fit, state, key)
        cross = rescaled(lambda a: inner_cross_derivative(problem, outer_params, v_P, inner_batch, a), v_P)(
            tree_cast(a_P, working_dtype(v_P))
        )
        g_imp = tree_cast(cross, outer_params)

        norm = inner.metrics.get("inner_gradient_norm")  # of the last inner step, if there was one: it costs nothing
        if norm is None:
            # After the adjoint, so that the activations are not in memory beside it.
            x = evaluated_after(tree_vdot(a_P, a_P), x_P)
            _, pull = jax.vjp(lambda theta: model.apply(theta, inner.fit.model_state, x)[0], inner.fit.params)
            norm = tree_norm(mean(pull(gradient if h.head is None else gradient @ h.head.T)[0]))
        along_a, squares = mean((tree_vdot(gradient, a_P), jnp.stack([tree_vdot(t, t) for t in (a_P, C(v_P))])))
        metrics = metrics | stationarity(norm, jnp.abs(along_a), jnp.prod(jnp.sqrt(squares))) | aux
        sound = all_finite(value, d)
        finite = all_finite(a_P, metrics) & stays_finite(state, new_state)
        metrics |= {"adjoint_finite": finite | ~sound, "outer_finite": sound}
        return inner, Hypergradient(tree_add_scaled(g_exp, 1.0, g_imp), g_exp, g_imp, value, new_state, metrics)

    return Estimator(adjoint.init, by_call(estimate), functional=True)
