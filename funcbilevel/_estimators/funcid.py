"""FuncID: functional implicit differentiation."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from funcbilevel._argmin import function_layer
from funcbilevel._arguments import check_callable, check_correction
from funcbilevel._check import check_prediction, problem_inputs
from funcbilevel._described import described
from funcbilevel._estimator import Adjoint, AdjointSystem, Call, Estimator, Hypergradient, InnerSolution, by_call
from funcbilevel._fit import FitState
from funcbilevel._linear_solvers import rescaled
from funcbilevel._predictor import predictor
from funcbilevel._problem import (
    inner_cross_derivative,
    inner_derivatives,
    mean_over_devices,
    outer_derivatives,
    stationarity,
)
from funcbilevel._returned import check_fitted
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
from funcbilevel._typing import Batch, Inputs, Key, Metrics, Prediction, PyTree

BATCHES = ("inner_batch", "outer_batch")


@described
def funcid(adjoint: Adjoint, correction: float = 0.0) -> Estimator:
    r"""Functional implicit differentiation (FuncID).

    With v_P, v_Q the predictions on the inner and the outer batch,

    .. math::
        d &= \partial_v L_{out}(\omega, v_Q), \qquad C = \partial^2_v L_{in}(\omega, v_P), \\
        a &\in \arg\min_a \tfrac12 \langle a(x_P), C\,a(x_P)\rangle + \langle a(x_Q), d\rangle, \\
        \nabla F(\omega) &= \partial_\omega L_{out}(\omega, v_Q)
            + \partial_\omega \langle \partial_v L_{in}(\omega, v_P), a(x_P)\rangle .

    C acts on predictions, so no Hessian in parameter space appears; v_P, v_Q, d and C are computed once per call. The
    formula holds at the inner solution: `inner_gradient_relative` says how far the inner level is from it.

    With `fb.Minibatches`, `fb.Sampler` or `fb.FiniteSum` as inner batch, P is one batch: the draw after those of the
    inner steps.

    Order: second in the prediction (products with C, and one cross derivative), first in theta. Memory: that of the
    adjoint.

    **Newton-corrected FuncID.** At v that is off the inner solution by e, the hypergradient is off by a multiple of e.
    With a correction beta, all of the above is taken at

    .. math::
        v_\beta &= v - \beta N, \\
        N &\in \arg\min_N \tfrac12 \langle N(x_P), C\,N(x_P)\rangle
            - \langle N(x_P), \partial_v L_{in}(\omega, v_P)\rangle ,

    on both batches: N is the Newton step of the inner problem in function space, in the class of the adjoint (one
    value for each sample, the same features, a second network). With beta = 1 the error is of the order of e^2, and
    for an objective that is quadratic in the prediction there is none: the inner level may lag. The difference from
    beta = 0 is then an estimate of that one's error. Between 0 and 1 it damps the loop of omega and h. beta = 0 is the
    method as published, and costs nothing.

    Only what the class holds of the inner error is corrected: with a `ridge`, an unfinished fit or features that do
    not span e, the rest stays of first order; noise in the inner targets that the class can follow is followed. N is
    to be trusted where L_in is strongly convex in v, near its minimum. Some corrected methods have other names. With
    beta = 1, squared error and `pointwise_adjoint`, v_beta is the inner target itself, whatever the model has learned
    of it, which for a deterministic model of an environment is value equivalence; with `linear_adjoint`, squared error
    and features that span the prediction, it is the least-squares solution in the features, and the gradient that of
    DFIV.

    Arguments:
        adjoint: how the adjoint function a is represented and fitted: `learned_adjoint`, `linear_adjoint` or
            `pointwise_adjoint`.
        correction: beta >= 0, 0 or 1 as a rule. Not for models of `variable_projection`, whose head is solved for.

    Returns:
        An `Estimator` for `FunctionalProblem`. Metrics: `adjoint_finite`; those of the adjoint; `inner_gradient_norm`,
        |d_theta L_in|, in a loop that of the last inner step; and, with g = d_v L_in at v_P, `inner_gradient_relative`:
        |<g, a>| / (|<g, a>| + |a| |C v_P|), the gradient along a beside the size of its terms. (g itself need not
        vanish where the model cannot fit every sample, its part in the span of the adjoint function has to.)
        With a correction `inner_gradient_relative` and `outer_value` are those at v_beta; `newton_residual` or
        `newton_objective` say how well N was found.

    Raises:
        TypeError: `adjoint` is not an `Adjoint`.
        ValueError: `correction` is negative or not finite, or `adjoint` has no Newton step; (at trace time) a
            correction with a model of `variable_projection`.

    Example:
        >>> estimator = fb.funcid(fb.learned_adjoint(optax.adam(1e-3), num_steps=10))
        >>> corrected = fb.funcid(fb.pointwise_adjoint(), correction=1.0)

    References:
        Petrulionyte, Mairal, Arbel, NeurIPS 2024, https://arxiv.org/abs/2403.20233, section 3 and algorithm 1.
    """
    if not isinstance(adjoint, Adjoint):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"funcid: adjoint must be an fb.Adjoint, got {adjoint!r}; make one with fb.learned_adjoint(...), "
            "fb.linear_adjoint(...) or fb.pointwise_adjoint()."
        )
    check_callable("funcid", "adjoint.init", adjoint.init, "key, problem, model, inner, inner_batch")
    check_callable("funcid", "adjoint.fit", adjoint.fit, "system, model, inner, state, key")
    corrected, find_newton = check_correction("funcid", correction), adjoint.newton
    if corrected and find_newton is None:
        raise ValueError(
            f"funcid: correction is {correction}, but {adjoint!r} has no Newton step; give the fb.Adjoint a `newton`, "
            "or use correction=0."
        )

    def init(key: Key | None, problem: Any, model: Any, inner: FitState, inner_batch: Batch, /) -> PyTree:
        """The adjoint's state, and that of the Newton step."""
        if model.head is not None:
            raise ValueError(
                "funcid: a Newton step is asked for, by correction > 0 or hypergradient_error, but the model's linear "
                "head (variable_projection) is solved for: in its features no step is left. Use correction=0, or a "
                "model without such a head."
            )
        keys = (None, None) if key is None else jax.random.split(key)
        return tuple(adjoint.init(k, problem, model, inner, inner_batch) for k in keys)

    def newton_step(
        call: Call, inner: FitState, beta: float, vs: tuple[Prediction, Prediction], xs: tuple[Inputs, Inputs]
    ) -> tuple[tuple[Prediction, Prediction], Prediction, PyTree, Metrics]:
        """v_beta on both batches, d_v L_in at v_P, and the state and the metrics of N."""
        assert find_newton is not None
        problem, model, _, outer_params, inner_batch, _, state, key = call
        (v_P, v_Q), (x_P, x_Q) = vs, xs
        gradient, C = inner_derivatives(problem, outer_params, v_P, inner_batch)
        system = AdjointSystem(C, gradient, v_P, x_P, x_Q, partial(mean_over_devices, problem))
        key = None if key is None else jax.random.fold_in(key, 1)
        names = ("N(x_P)", "N(x_Q)")
        returned = find_newton(system, model, inner, state, key)
        *steps, state, metrics = check_fitted("adjoint.newton", returned, names, vs, state)
        v_P, v_Q = (tree_add_scaled(v, -beta, tree_cast(N, v)) for v, N in zip((v_P, v_Q), steps, strict=True))
        return (v_P, v_Q), gradient, state, metrics

    def at(call: Call, lengths: tuple[float, ...]) -> tuple[InnerSolution, Hypergradient]:
        """The estimate after Newton steps of these lengths; with any, the state is a pair."""
        problem, model, solve, outer_params, inner_batch, outer_batch, state, key = call
        inner = solve(outer_params)
        x_P, x_Q = (problem_inputs("funcid", problem, b, n) for b, n in zip((inner_batch, outer_batch), BATCHES))
        h = predictor(problem, model, outer_params, inner.fit.params, inner_batch, inner.fit.model_state)
        v_P, v_Q = h(x_P), h(x_Q)
        for v, x, name in zip((v_P, v_Q), (x_P, x_Q), BATCHES):
            check_prediction("funcid", "prediction", v, x, name)

        slope, newton_state, newton_metrics, broken = None, (), {}, False
        if lengths:
            state, newton_state = state
        for beta in lengths:
            before, call_for_N = (v_P, v_Q), call._replace(state=newton_state)
            (v_P, v_Q), gradient, newton_state, newton_metrics = newton_step(
                call_for_N, inner.fit, beta, before, (x_P, x_Q)
            )
            slope = gradient if slope is None else slope
            broken = broken | all_finite(before) & ~all_finite(v_P, v_Q)
        value, aux, g_exp, d = outer_derivatives(problem, outer_params, v_Q, outer_batch)
        gradient, C = inner_derivatives(problem, outer_params, v_P, inner_batch)
        slope = gradient if slope is None else slope
        mean = partial(mean_over_devices, problem)
        system = AdjointSystem(C, d, v_P, x_P, x_Q, mean)
        returned = adjoint.fit(system, model, inner.fit, state, key)
        a_P, new_state, metrics = check_fitted("adjoint.fit", returned, ("a(x_P)",), (v_P,), state)
        cross = rescaled(lambda a: inner_cross_derivative(problem, outer_params, v_P, inner_batch, a), v_P)(
            tree_cast(a_P, working_dtype(v_P))
        )
        g_imp = tree_cast(cross, outer_params)

        norm = inner.metrics.get("inner_gradient_norm")  # of the last inner step, if there was one: it costs nothing
        if norm is None:
            # After the adjoint, so that the activations are not in memory beside it.
            x = evaluated_after(tree_vdot(a_P, a_P), x_P)
            _, pull = jax.vjp(lambda theta: model.apply(theta, inner.fit.model_state, x)[0], inner.fit.params)
            norm = tree_norm(mean(pull(slope if h.head is None else slope @ h.head.T)[0]))
        along_a, squares = mean((tree_vdot(gradient, a_P), jnp.stack([tree_vdot(t, t) for t in (a_P, C(v_P))])))
        metrics = metrics | stationarity(norm, jnp.abs(along_a), jnp.prod(jnp.sqrt(squares))) | aux | newton_metrics
        new_state = (new_state, newton_state) if lengths else new_state
        sound = all_finite(value, d) | broken  # what N has broken is not the outer level's fault
        finite = all_finite(a_P, metrics) & stays_finite(call.state, new_state)
        metrics |= {"adjoint_finite": finite | ~sound, "outer_finite": sound}
        return inner, Hypergradient(tree_add_scaled(g_exp, 1.0, g_imp), g_exp, g_imp, value, new_state, metrics)

    own = (correction,) if corrected else ()

    def estimate(call: Call) -> tuple[InnerSolution, Hypergradient]:
        return at(call, own)

    def refine(call: Call) -> tuple[Hypergradient, Hypergradient, Hypergradient, Hypergradient]:

        def on(state: PyTree, lengths: tuple[float, ...], i: int) -> Hypergradient:
            """With a key of its own: fits that start anew at every call then differ by as much as they are wrong."""
            return at(call._replace(state=state, key=None if call.key is None else keys[i]), lengths)[1]

        keys = () if call.key is None else jax.random.split(call.key, 4)
        inner, first = at(call, own)
        state = first.state
        if not corrected:
            _, newton_state = init(call.key, call.problem, call.model, inner.fit, call.inner_batch)
            state = state, newton_state
        again = on(on(first.state, own, 0).state, own, 1)
        second = on(state, (*own, 1.0), 2)
        third = on(second.state, (*own, 1.0, 1.0), 3)
        return first, again, second, third

    return Estimator(
        init if corrected else adjoint.init,
        by_call(estimate),
        functional=True,
        refine=None if find_newton is None else refine,
        layer=None if corrected else function_layer(adjoint),
    )
