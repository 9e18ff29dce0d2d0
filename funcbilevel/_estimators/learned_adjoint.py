"""The adjoint of FuncID as a network trained by an optax optimizer."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from funcbilevel._arguments import check_like, check_number, check_optimizer
from funcbilevel._described import described
from funcbilevel._estimator import Adjoint, AdjointSystem
from funcbilevel._features import Features, check_is_features, evaluate_features
from funcbilevel._fit import FitState, fit
from funcbilevel._model import Model, with_frozen_of, without_frozen
from funcbilevel._problem import FunctionalProblem
from funcbilevel._tree import evaluated_after, num_bytes, tree_vdot
from funcbilevel._typing import Batch, Inputs, Key, Metrics, ModelState, Prediction, PyTree

Apply: TypeAlias = Callable[[PyTree, ModelState, Inputs], Prediction]


@described
def learned_adjoint(
    optimizer: optax.GradientTransformation,
    num_steps: int,
    model: Model | None = None,
    warm_start: bool = True,
    features: Features | None = None,
) -> Adjoint:
    r"""A network a_xi, trained for `num_steps` steps per outer step on

    .. math:: L_{adj}(\xi) = \tfrac12 \langle a_\xi(x_P), C\,a_\xi(x_P)\rangle + \langle a_\xi(x_Q), d\rangle .

    One step costs what a training step of the network on both batches costs. The network is evaluated with
    `train=False` and its own initial model state: the fit is deterministic, and the prediction model's batch
    statistics are not touched.

    Arguments:
        optimizer: any optax optimizer.
        num_steps: K >= 1.
        model: the adjoint's model; its output must look like the prediction. None: the prediction model's
            architecture, with its own parameters (where some are frozen, on the prediction model's frozen ones).
        warm_start: whether parameters and optimizer state go on from the previous outer step; if not, they are
            drawn anew from each call's key.
        features: `(inner_params, inputs) -> [n, p]`, or a `Model` that shares the prediction model's parameters and
            state: what the adjoint's model is called on instead of the inputs, evaluated once per outer step. With a
            small `model` (a linear layer, say) this is a learned adjoint that cannot overfit as a whole network can.

    With `funcid(..., correction)` a second network of the same kind is fitted to the Newton step before the adjoint, by
    as many steps, each of which goes through the inner batch alone; a `model` on `features` makes both cheap.

    Returns:
        An `Adjoint` for `funcid`. Its metrics: `adjoint_objective`, L_adj at the last step, before its update.

    Raises:
        TypeError: `optimizer` or `model` is not one; (at trace time) the adjoint's dtype is not the prediction's.
        ValueError: `num_steps` < 1; no key was given where one is needed; (at trace time) the adjoint's output has
            another structure or shape than the prediction; `features` without `model`, or a prediction model of
            `variable_projection` without `model`.

    Example:
        >>> estimator = fb.funcid(fb.learned_adjoint(optax.adam(1e-3), num_steps=10))

    References:
        Petrulionyte, Mairal, Arbel, NeurIPS 2024, https://arxiv.org/abs/2403.20233, algorithm 1 (AdjointOpt).
    """
    name = "learned_adjoint"
    check_optimizer(name, "optimizer", optimizer)
    check_number(name, "num_steps", num_steps)
    if not (model is None or isinstance(model, Model)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"learned_adjoint: model must be an fb.Model or None, got {type(model).__name__}; wrap it with "
            "fb.from_linen, fb.from_nnx or fb.from_function."
        )

    if features is not None:
        check_is_features(name, features)
        if model is None:
            raise ValueError(
                f"{name}: model is None, but features are given; pass the model that turns them into the adjoint, "
                "for example model=fb.from_linen(flax.linen.Dense(<outputs>))."
            )

    def network(prediction_model: Model) -> Model:
        if model is None and prediction_model.head is not None:
            raise ValueError(
                f"{name}: model is None, but the prediction model's linear head is solved for and not trained; pass "
                "model=<the adjoint's model>."
            )
        return model or prediction_model

    def adjoint_inputs(inner: FitState, inputs: Inputs) -> Inputs:
        return inputs if features is None else evaluate_features(name, features, inner, inputs)

    def check_output(output: Prediction, like: Prediction) -> None:
        mend = "give learned_adjoint a model whose output is like the prediction model's."
        check_like(name, "the adjoint model's output", output, like, mend)

    def start(key: Key | None, prediction_model: Model, x_P: PyTree) -> FitState:
        if key is None:
            raise ValueError(
                "learned_adjoint: key is None, but the adjoint network has to be initialised; pass "
                "key=jax.random.key(seed), or the state of an earlier call (with warm_start=True)."
            )
        params, model_state = network(prediction_model).init(key, x_P)
        # An adjoint of the prediction model's architecture stands on its frozen parameters, and need not carry them.
        model_state = without_frozen(model_state) if model is None else model_state
        return FitState(params, optimizer.init(params), model_state)

    def init(
        key: Key | None, problem: FunctionalProblem, prediction_model: Model, inner: FitState, inner_batch: Batch, /
    ) -> PyTree:
        if not warm_start:
            return ()
        return start(key, prediction_model, adjoint_inputs(inner, problem.inputs(inner_batch)))

    def applied(prediction_model: Model, inner: FitState) -> Apply:
        """The network as a function of its parameters, its model state and x."""
        network_apply = network(prediction_model).apply

        def apply(xi: PyTree, model_state: ModelState, x: Inputs) -> Prediction:
            shared = with_frozen_of(model_state, inner.model_state) if model is None else model_state
            return network_apply(xi, shared, x)[0]

        return apply

    def fit_adjoint(
        system: AdjointSystem, prediction_model: Model, inner: FitState, state: PyTree, key: Key | None, /
    ) -> tuple[Prediction, PyTree, Metrics]:
        C, d, _, x_P, x_Q, mean = system
        x_P, x_Q = adjoint_inputs(inner, x_P), adjoint_inputs(inner, x_Q)
        apply, state = applied(prediction_model, inner), state if warm_start else start(key, prediction_model, x_P)

        def value_and_grad(params: PyTree, model_state: ModelState, *_: Any) -> Any:
            a_Q, pull_Q = jax.vjp(lambda xi: apply(xi, model_state, x_Q), params)
            check_output(a_Q, d)
            (grad_Q,) = pull_Q(d)
            # One batch after the other, so that only the activations of one are in memory.
            xi, x = params, x_P
            if num_bytes(x_P) < num_bytes(params):
                x = evaluated_after(grad_Q, x_P)
            else:
                xi = evaluated_after(grad_Q, params)
            a_P, pull_P = jax.vjp(lambda xi: apply(xi, model_state, x), xi)
            Ca = C(a_P)
            value = 0.5 * tree_vdot(a_P, Ca) + tree_vdot(a_Q, d)
            # C is symmetric, so the gradient of the quadratic term at a_P is C a_P: one product, not two.
            (grad_P,) = pull_P(Ca)
            return (value, ({}, model_state)), mean(jax.tree.map(lambda p, q: p + q, grad_P, grad_Q))

        state, _, value, _ = fit(value_and_grad, optimizer, num_steps, state, None)
        a_P = apply(state.params, state.model_state, x_P)
        return a_P, state if warm_start else (), {"adjoint_objective": value}

    def fit_newton(
        system: AdjointSystem, prediction_model: Model, inner: FitState, state: PyTree, key: Key | None, /
    ) -> tuple[Prediction, Prediction, PyTree, Metrics]:
        C, g, _, x_P, x_Q, mean = system
        x_P, x_Q = adjoint_inputs(inner, x_P), adjoint_inputs(inner, x_Q)
        apply, state = applied(prediction_model, inner), state if warm_start else start(key, prediction_model, x_P)

        def value_and_grad(params: PyTree, model_state: ModelState, *_: Any) -> Any:
            N_P, pull = jax.vjp(lambda xi: apply(xi, model_state, x_P), params)
            check_output(N_P, g)
            CN = C(N_P)
            (grad,) = pull(jax.tree.map(jnp.subtract, CN, g))
            return (0.5 * tree_vdot(N_P, CN) - tree_vdot(N_P, g), ({}, model_state)), mean(grad)

        state, _, value, _ = fit(value_and_grad, optimizer, num_steps, state, None)
        on_P, on_Q = (apply(state.params, state.model_state, x) for x in (x_P, x_Q))
        # The best multiple: a network that knows nothing yet is no step, and none leads uphill.
        along, curved = mean((tree_vdot(on_P, g), tree_vdot(on_P, C(on_P))))
        best = jnp.where(curved > 0, along / jnp.where(curved > 0, curved, 1.0), 0.0)
        N_P, N_Q = (jax.tree.map(lambda x: best.astype(x.dtype) * x, N) for N in (on_P, on_Q))
        return N_P, N_Q, state if warm_start else (), {"newton_objective": value}

    return Adjoint(init, fit_adjoint, newton=fit_newton)
