"""FuncID: functional implicit differentiation."""

from functools import partial
from typing import Any

from funcbilevel._check import check_prediction, problem_inputs
from funcbilevel._described import described
from funcbilevel._estimator import Adjoint, AdjointSystem, Estimator, Hypergradient, InnerSolution, InnerSolve
from funcbilevel._problem import (
    FunctionalProblem,
    inner_cross_derivative,
    inner_curvature,
    mean_over_devices,
    outer_derivatives,
    predictor,
)
from funcbilevel._tree import all_finite, stays_finite, tree_add_scaled
from funcbilevel._typing import Batch, Key, OuterParams, PyTree

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

    C acts on predictions, so no Hessian in parameter space appears; v_P, v_Q, d and C are computed once per call.

    Arguments:
        adjoint: how the adjoint function a is represented and fitted: `learned_adjoint`, `linear_adjoint` or
            `pointwise_adjoint`.

    Returns:
        An `Estimator` for `FunctionalProblem`. Metrics: `adjoint_finite`, and those of the adjoint.

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

    def estimate(
        problem: FunctionalProblem,
        model: Any,
        solve: InnerSolve,
        outer_params: OuterParams,
        inner_batch: Batch,
        outer_batch: Batch,
        state: PyTree,
        key: Key | None,
        /,
    ) -> tuple[InnerSolution, Hypergradient]:
        inner = solve(outer_params)
        x_P, x_Q = (problem_inputs("funcid", problem, b, n) for b, n in zip((inner_batch, outer_batch), BATCHES))
        h = predictor(problem, model, outer_params, inner.fit.params, inner_batch, inner.fit.model_state)
        v_P, v_Q = h(x_P), h(x_Q)
        for v, x, name in zip((v_P, v_Q), (x_P, x_Q), BATCHES):
            check_prediction("funcid", "prediction", v, x, name)

        value, aux, g_exp, d = outer_derivatives(problem, outer_params, v_Q, outer_batch)
        C = inner_curvature(problem, outer_params, v_P, inner_batch)
        system = AdjointSystem(C, d, v_P, x_P, x_Q, partial(mean_over_devices, problem))
        a_P, new_state, metrics = adjoint.fit(system, model, inner.fit, state, key)
        g_imp = inner_cross_derivative(problem, outer_params, v_P, inner_batch, a_P)

        finite = all_finite(a_P, metrics) & stays_finite(state, new_state)
        metrics = metrics | aux | {"adjoint_finite": finite | ~all_finite(d)}
        return inner, Hypergradient(tree_add_scaled(g_exp, 1.0, g_imp), g_exp, g_imp, value, new_state, metrics)

    return Estimator(adjoint.init, estimate, functional=True)
