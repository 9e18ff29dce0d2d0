"""The protocol that every estimator follows: types only."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

from funcbilevel._described import describe, fields_that_differ
from funcbilevel._fit import FitState
from funcbilevel._model import Model
from funcbilevel._problem import FunctionalProblem
from funcbilevel._typing import (
    Batch,
    InnerParams,
    Inputs,
    Key,
    LinearMap,
    Metrics,
    ModelState,
    OuterParams,
    Prediction,
    PyTree,
)


class Hypergradient(NamedTuple):
    """An estimate of the total gradient of F(omega) = L_out(omega, h*_omega).

    Attributes:
        gradient: explicit + implicit, a pytree like outer_params.
        explicit: g_exp = d_omega L_out, like outer_params.
        implicit: g_imp, what reaches the outer objective through the inner solution; like outer_params.
        outer_value: L_out, a scalar.
        state: the estimator's state for the next call (the warm start).
        metrics: flat dict of scalars. Always there: `adjoint_finite` (bool: the estimator's own adjoint or
            linear solution is finite, or it is not the adjoint's fault) and, of `hypergradient`, `inner_finite` and
            `outer_finite`, the same of the inner solution and of the outer level. Estimators that assume a stationary
            inner point add `inner_gradient_norm` and `inner_gradient_relative`; linear solves `linear_residual`,
            `linear_converged` and `linear_curvature`, the learned adjoint `adjoint_objective`; aux of the outer
            objective is under `outer/<path>`.
    """

    gradient: OuterParams
    explicit: OuterParams
    implicit: OuterParams
    outer_value: jax.Array
    state: PyTree
    metrics: Metrics

    def __repr__(self) -> str:
        return fields_that_differ(self)


class InnerSolution(NamedTuple):
    """The inner level after its steps.

    Attributes:
        fit: inner_params, optimizer state and model state.
        metrics: `inner_objective`, `inner_gradient_norm` (of the gradient that the optimizer was given) and the inner
            aux at the last step, before its update; empty if no step was taken.
        diverged: whether the objective and the parameters grew without limit in these steps, finite as they may be.
    """

    fit: FitState
    metrics: Metrics
    diverged: jax.Array

    def __repr__(self) -> str:
        return fields_that_differ(self)


class InnerSolve(Protocol):
    """The pure function omega -> inner solution, by the last `Estimator.unroll` inner steps."""

    def __call__(self, outer_params: OuterParams, *, remat: bool = False) -> InnerSolution: ...


class EstimatorInit(Protocol):
    def __call__(
        self, key: Key | None, problem: Any, model: Model | None, inner: FitState, inner_batch: Batch, /
    ) -> PyTree: ...


class Estimate(Protocol):
    def __call__(
        self,
        problem: Any,
        model: Model | None,
        solve: InnerSolve,
        outer_params: OuterParams,
        inner_batch: Batch,
        outer_batch: Batch,
        state: PyTree,
        key: Key | None,
        /,
    ) -> tuple[InnerSolution, Hypergradient]: ...


class Layer(Protocol):
    def __call__(
        self,
        problem: Any,
        model: Model | None,
        outer_params: OuterParams,
        inner_params: InnerParams,
        model_state: ModelState,
        inner_batch: Batch,
        /,
    ) -> Any: ...


class Call(NamedTuple):
    """The arguments of `Estimate`, in their order."""

    problem: Any
    model: Any
    solve: InnerSolve
    outer_params: OuterParams
    inner_batch: Batch
    outer_batch: Batch
    state: PyTree
    key: Key | None


def by_call(estimate: Callable[[Call], tuple[InnerSolution, Hypergradient]]) -> Estimate:
    """`estimate`, written on one `Call`, as the protocol calls it."""
    return lambda *arguments: estimate(Call(*arguments))


Refine: TypeAlias = Callable[[Call], tuple[Hypergradient, Hypergradient, Hypergradient, Hypergradient]]


class Estimator(NamedTuple):
    """A way to turn an inner solution into a hypergradient, as pure functions.

    Attributes:
        init: `(key, problem, model, inner, inner_batch) -> state`.
        estimate: `(problem, model, solve, outer_params, inner_batch, outer_batch, state, key)
            -> (inner solution, Hypergradient)`; `solve(outer_params)` gives the inner solution.
        unroll: how many of the last inner steps `solve` makes anew from `outer_params`, to be differentiated
            through. With 0 the inner fit is over before `estimate` is called, and `solve` only returns it.
        functional: whether it needs a `FunctionalProblem`.
        implicit: whether it estimates the implicit part, so that inner_objective has to depend on outer_params.
        by_values: whether it goes by values of the objectives, whose derivatives by outer_params may be zero.
        description: the call that made it, for `repr`.
        refine: of a `Call`, for `hypergradient_error`: the estimate; that with its adjoint refined twice;
            and two, each after one more Newton step of the inner level and refinement of the adjoint. None: without.
        reaches: whether outer_params may reach the inner solution otherwise than through inner_objective.
        layer: `(problem, model, outer_params, inner_params, model_state, inner_batch)` -> inner_params, or a
            `Predictor` where there is a model, with their derivative: what `argmin` gives. None: it has none.
    """

    init: EstimatorInit
    estimate: Estimate
    unroll: int = 0
    functional: bool = False
    implicit: bool = True
    by_values: bool = False
    description: str = ""
    refine: Refine | None = None
    reaches: bool = False
    layer: Layer | None = None

    def __repr__(self) -> str:
        return describe(self)


class AdjointSystem(NamedTuple):
    """What an adjoint is fitted to: the quadratic L_adj(a) = 1/2 <a(x_P), C[a(x_P)]> + <a(x_Q), d>.

    Attributes:
        curvature: C = d^2_v L_in at v_P, a linear map on pytrees like v_P.
        d: d_v L_out at v_Q, like v_Q.
        v_P: predictions on the inner batch, leaves [n, ...].
        x_P: inputs of the inner batch.
        x_Q: inputs of the outer batch.
        mean: the mean of a pytree over the problem's mapped axis; the identity where it has none.
    """

    curvature: LinearMap
    d: Prediction
    v_P: Prediction
    x_P: Inputs
    x_Q: Inputs
    mean: LinearMap

    def __repr__(self) -> str:
        return fields_that_differ(self)


class AdjointInit(Protocol):
    def __call__(
        self, key: Key | None, problem: FunctionalProblem, model: Any, inner: FitState, inner_batch: Batch, /
    ) -> PyTree: ...


class AdjointFit(Protocol):
    def __call__(
        self, system: AdjointSystem, model: Model, inner: FitState, state: PyTree, key: Key | None, /
    ) -> tuple[Prediction, PyTree, Metrics]: ...


class AdjointNewton(Protocol):
    def __call__(
        self, system: AdjointSystem, model: Model, inner: FitState, state: PyTree, key: Key | None, /
    ) -> tuple[Prediction, Prediction, PyTree, Metrics]: ...


class Adjoint(NamedTuple):
    """A way to represent and fit the adjoint function of FuncID, as pure functions.

    Attributes:
        init: `(key, problem, model, inner, inner_batch) -> state`.
        fit: `(system, model, inner, state, key) -> (a(x_P), state, metrics)`.
        description: the call that made it, for `repr`.
        newton: the Newton step N of the inner problem in the same class of functions, for `funcid`'s correction:
            `(system, model, inner, state, key) -> (N(x_P), N(x_Q), state, metrics)`, with system.d = d_v L_in at v_P. N
            minimises 1/2 <N(x_P), C[N(x_P)]> - <N(x_P), system.d>; state is a second one made by `init`. None: no
            correction.
        coefficients: `(system, inner) -> W`, of an a that is linear in W, and W in d; differentiable by JAX in all of
            the system, as an exact solution is. None: the adjoint is of another kind.
        evaluate: `(W, inner, x_P, x) -> a(x)`, if there are coefficients.
    """

    init: AdjointInit
    fit: AdjointFit
    description: str = ""
    newton: AdjointNewton | None = None
    coefficients: Callable[[AdjointSystem, FitState], PyTree] | None = None
    evaluate: Callable[[PyTree, FitState, Inputs, Inputs], Prediction] | None = None

    def __repr__(self) -> str:
        return describe(self)


def no_state(*_: Any) -> PyTree:
    """`init` of an estimator or adjoint that carries nothing from one outer step to the next."""
    return ()
