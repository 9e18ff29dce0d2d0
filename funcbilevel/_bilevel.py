"""One hypergradient, and the alternating loop around it."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from funcbilevel._arguments import (
    as_float_tree,
    check_callable,
    check_key,
    check_number,
    check_optimizer,
    signature_of,
)
from funcbilevel._check import (
    check_estimator_state,
    check_inner,
    check_objectives,
    check_outer_inputs,
    check_outer_model,
    check_parameters,
    check_setup,
    check_uses_parameters,
    initial,
    problem_inputs,
    shapes_key,
    warn_of_assumptions,
)
from funcbilevel._data import Form, batch_form
from funcbilevel._described import describe, described, fields_that_differ, show
from funcbilevel._draws import FiniteSum, Minibatches, Sampler, check_draws, draw, placed, run_steps
from funcbilevel._estimator import Estimator, Hypergradient, InnerSolution, InnerSolve
from funcbilevel._fit import FitState, fit
from funcbilevel._model import Model
from funcbilevel._predictor import training_value_and_grad
from funcbilevel._problem import FunctionalProblem, Problem, mean_over_devices, reduce_over_devices
from funcbilevel._returned import check_estimate, check_next_state
from funcbilevel._tree import all_finite, own_buffer, stays_finite, tree_add_scaled, tree_norm, tree_where
from funcbilevel._typing import Batch, InnerParams, Key, Metrics, ModelState, OuterParams, PyTree


def hypergradient(
    problem: Problem,
    model: Model | None,
    estimator: Estimator,
    outer_params: OuterParams,
    inner_params: InnerParams,
    inner_batch: Batch,
    outer_batch: Batch,
    *,
    inner_optimizer: optax.GradientTransformation | None = None,
    model_state: ModelState = None,
    state: PyTree = None,
    key: Key | None = None,
) -> Hypergradient:
    r"""One estimate of :math:`\nabla F(\omega)` at a given inner solution.

    Arguments:
        problem: `FunctionalProblem` or `ParametricProblem`.
        model: the prediction model; None with a `ParametricProblem`.
        estimator: what turns the inner solution into a hypergradient: any `fb.Estimator`.
        outer_params: omega, any pytree of floats.
        inner_params: theta, the inner solution; with `itd` the point from which its T steps start.
        inner_batch, outer_batch: samples of the two distributions. The inner ones may be `Minibatches` or a `Sampler`:
            see `bilevel`, with T for M and none for the other estimators.
        inner_optimizer: the optax optimizer that `itd` differentiates through; the others do not use it.
        model_state: the model's non-trainable state, for models that have one.
        state: `Hypergradient.state` of an earlier call, for a warm start; None: a fresh start.
        key: for estimators that draw random numbers (the learned adjoint's initial parameters, dropout in `itd`).

    Returns:
        A `Hypergradient`; gradient, explicit and implicit have the structure, shapes and dtypes of outer_params.

    Raises:
        ValueError, TypeError: at trace time, naming the argument, what was got and what was expected.

    Warns:
        UserWarning: outside of jit, where the metrics show that an assumption of the estimator fails: the inner
            solution is not stationary (`inner_gradient_relative` > 0.001), or the batches of `pointwise_adjoint`
            differ. At trace time: the inner objective does not see some leaf of inner_params; the hypergradient, or its
            implicit part, is zero whatever the numbers are; in an objective a prediction [n, 1] meets an array [n], so
            that all pairs of samples are compared.

    Example: the derivative of a ridge regression's validation loss by its log-penalty.
        >>> import jax, jax.numpy as jnp, funcbilevel as fb
        >>> x, y = jnp.eye(3), jnp.arange(3.0)
        >>> def inner(log_penalty, w, batch):
        ...     return jnp.mean((batch[0] @ w - batch[1]) ** 2) + jnp.exp(log_penalty) * jnp.sum(w**2)
        >>> problem = fb.ParametricProblem(inner, lambda _, w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2))
        >>> w = y / (1 + 3 * jnp.exp(-1.0))  # the inner solution at log_penalty = -1
        >>> h = fb.hypergradient(problem, None, fb.aid(fb.cg(3)), -1.0, w, (x, y), (x, y))
        >>> f = lambda log_penalty: jnp.mean((y / (1 + 3 * jnp.exp(log_penalty)) - y) ** 2)
        >>> bool(jnp.allclose(h.gradient, jax.grad(f)(-1.0)))
        True
    """
    name = "hypergradient"
    check_setup(name, problem, model, estimator)
    if inner_optimizer is not None:
        check_optimizer(name, "inner_optimizer", inner_optimizer)
    elif estimator.unroll:
        raise ValueError(
            f"{name}: inner_optimizer is None, but fb.{estimator!r} differentiates through its steps; pass the optax "
            "optimizer of the inner level, for example inner_optimizer=optax.sgd(0.1)."
        )
    outer_params = as_float_tree(name, "outer_params", outer_params)
    inner_params = as_float_tree(name, "inner_params", inner_params)
    model_state = () if model_state is None else model_state
    if key is not None:
        check_key(name, key)
    inner_key, init_key, estimator_key = (None, None, None) if key is None else jax.random.split(key, 3)
    if estimator.unroll:
        check_draws(name, inner_batch, estimator.unroll)
    batch = draw(name, inner_batch, _draw_key(inner_key), estimator.unroll)
    lower = (inner_params, model_state)
    check_parameters(name, problem, model, *lower, batch)
    check_objectives(
        *(name, problem, model, estimator, outer_params, *lower, batch, outer_batch, set()),
        reached=_takes_outer_params(inner_optimizer),
    )
    check_uses_parameters(name, problem, model, *lower, batch)

    opt_state = () if inner_optimizer is None else inner_optimizer.init(inner_params)
    start = FitState(inner_params, opt_state, model_state)
    if state is None:
        state = estimator.init(init_key, problem, model, start, batch)
    else:
        check_estimator_state(name, "state", estimator, problem, model, start, batch, state, {})
    solve = _inner_solve(problem, model, inner_optimizer, estimator.unroll, lambda _: start, inner_batch, inner_key)
    returned = estimator.estimate(problem, model, solve, outer_params, batch, outer_batch, state, estimator_key)
    inner, result = check_estimate(name, returned, outer_params)
    result = _averaged(problem, result)
    metrics = result.metrics | {
        "inner_finite": all_finite(inner.fit.params, inner.fit.model_state) & ~inner.diverged,
        "outer_finite": _outer_finite(result, outer_params, result.gradient),
    }
    metrics = reduce_over_devices(problem, metrics)
    warn_of_assumptions(name, metrics)
    return result._replace(metrics=metrics)


class BilevelState(NamedTuple):
    """The state of a bilevel solver: a pytree to jit, vmap, shard and checkpoint.

    Attributes:
        step: outer steps taken, int32 scalar.
        outer_params: omega.
        inner_params: theta.
        model_state: the prediction model's non-trainable state.
        inner_opt_state, outer_opt_state: the optax states.
        estimator_state: the estimator's warm start.
        key: the random key of the next step.
        outer_model_state: the outer model's non-trainable state.
        batch_form: what the inner batch that `init` saw looked like, by which `train` tells batches that are not the
            solver's; static: the keys of a dict without leaves. Empty: not known.
    """

    step: jax.Array
    outer_params: OuterParams
    inner_params: InnerParams
    model_state: ModelState
    inner_opt_state: optax.OptState
    outer_opt_state: optax.OptState
    estimator_state: PyTree
    key: Key
    outer_model_state: ModelState = ()
    batch_form: Form = ()

    def __repr__(self) -> str:
        return fields_that_differ(self)


class Setup(NamedTuple):
    """What a solver was made of: the attribute `setup` of its `init`.

    Attributes:
        problem, model, estimator: as given.
        seen: `(outer_params, outer_model_state, inner_batch, key)` -> what the objectives get for omega, and more.
        step: the solver's own, by which it is told from one that was wrapped.
        scaled: scale -> the same solver, with the updates of both optimizers multiplied by it.
    """

    problem: Problem
    model: Model | None
    estimator: Estimator
    seen: Callable[[OuterParams, ModelState, Batch, Key], tuple[PyTree, ModelState, Any]]
    step: Callable[..., Any]
    scaled: Callable[[float], "BilevelSolver"]


class _Init(Protocol):
    def __call__(
        self,
        key: Key,
        outer_params: OuterParams,
        inner_batch: Batch,
        inner_params: InnerParams | None = None,
        outer_batch: Batch = None,
    ) -> BilevelState: ...


class InnerInit(Protocol):
    """Where the inner level starts: a pure function."""

    def __call__(self, outer_params: OuterParams, key: Key, inner_batch: Batch, /) -> InnerParams: ...


class BilevelSolver(NamedTuple):
    """A bilevel solver as pure functions, in the manner of `optax.GradientTransformation`.

    Attributes:
        init: `(key, outer_params, inner_batch, inner_params=None, outer_batch=None) -> state`. inner_params default to
            the model's initial ones; with a `ParametricProblem` they must be given, and inner_batch may be None.
            outer_params may be None with an `outer_model`: its initial ones. Only solvers that keep a memory of the
            outer samples look at outer_batch.
        step: `(state, inner_batch, outer_batch) -> (state, metrics)`, one outer step. Jit it.
        run: `(state, inner_batches, outer_batches) -> (state, metrics)`, one scan over the leading axis of the batches;
            metrics have that leading axis too. (A `Sampler` or a `FiniteSum` is one for all steps; where both are, pass
            `num_steps=`.)

    Metrics are a flat dict of scalars: `outer_objective`; `inner_objective` (at the last inner step, before its
    update, in train mode); `hypergradient_norm`, `explicit_norm`, `implicit_norm`; `inner_finite`,
    `adjoint_finite`, `outer_finite`; those of the estimator; aux under `inner/<path>` and `outer/<path>`.

    Where NaN or inf appears in a level, outer_params, their optimizer state and the estimator's state keep their
    last finite values, and the flag of the level that broke is false (levels above it may be false in
    consequence); inner_params are kept back as well if it was the inner level. An inner fit whose objective grows by a
    factor of a million and its parameters by a thousand within one outer step has broken, finite as it may be.
    """

    init: _Init
    step: Callable[[BilevelState, Batch, Batch], tuple[BilevelState, Metrics]]
    run: Callable[..., tuple[BilevelState, Metrics]]

    def __repr__(self) -> str:
        return describe(self)


@described
def bilevel(
    problem: Problem,
    model: Model | None,
    estimator: Estimator,
    *,
    inner_optimizer: optax.GradientTransformation,
    outer_optimizer: optax.GradientTransformation,
    inner_steps: int = 1,
    inner_init: InnerInit | None = None,
    outer_model: Model | None = None,
    outer_inputs: Callable[[Batch], Any] | None = None,
) -> BilevelSolver:
    """A solver that alternates `inner_steps` inner steps, one hypergradient and one outer step.

    Inner parameters, adjoint or linear-system solution and both optimizers' states are carried from one outer step
    to the next (warm starts). The random key in the state gives each inner step its own dropout key.

    Arguments:
        problem: `FunctionalProblem` or `ParametricProblem`.
        model: the prediction model; None with a `ParametricProblem`.
        estimator: any `fb.Estimator`; swapping it changes nothing else.
        inner_optimizer, outer_optimizer: any optax optimizers (schedules, clipping, weight decay, `MultiSteps`, line
            searches such as `optax.lbfgs()`). The outer one is given `value`, `grad` and `value_fn` too, for those that
            use them: `value_fn` is omega -> L_out after M inner steps at that omega, from this outer step's start, and
            its derivative the estimator's hypergradient. Each evaluation costs a whole outer step. The inner one
            is given `outer_params`, for `proximal`.
        inner_steps: M >= 1. All M see `inner_batch`, and so does the hypergradient, unless `inner_batch` is
            `Minibatches` (a batch for each), a `Sampler` or a `FiniteSum` (a fresh draw for each); the outer batch may
            be one of the last two as well, of which each outer step draws once. ITD differentiates through each step at
            its own batch.
        inner_init: `(outer_params, key, inner_batch) -> inner_params`: where the inner level starts at every outer
            step, with a fresh optimizer state, instead of where the step before ended. For meta-learning, where every
            outer step brings new tasks. ITD with T = M differentiates through it, too (MAML: the start is omega).
        outer_model: for problems that see omega only through f_omega on the inner batch (the treatment features of
            an instrumental regression): the model f, of which outer_params are the parameters. It is evaluated once
            per outer step, in train mode, and differentiated once; the objectives, and so the estimator, get its
            output on the inner batch where they would get outer_params. Its batch statistics, spectral norms and the
            like are carried in the state. `explicit_norm` and `implicit_norm` are then those of the derivatives by
            that output.
        outer_inputs: `inner_batch -> what outer_model is called on`; None: the whole inner batch.

    Returns:
        A `BilevelSolver`: `init`, `step`, `run`.

    Raises:
        ValueError, TypeError: here or, where shapes decide, when `init` or `step` is traced; each names the argument.

    Warns:
        UserWarning: as `hypergradient`, once, when `init` or `step` is traced.

    Example:
        >>> import jax, optax, jax.numpy as jnp, funcbilevel as fb
        >>> problem = fb.FunctionalProblem(
        ...     lambda w, v, batch: jnp.mean((v - w) ** 2), lambda w, v, batch: jnp.mean((v - batch[1]) ** 2)
        ... )
        >>> model = fb.from_function(lambda key, x: jnp.zeros(()), lambda params, x: params * jnp.ones(len(x)))
        >>> solver = fb.bilevel(
        ...     problem, model, fb.funcid(fb.pointwise_adjoint()),
        ...     inner_optimizer=optax.sgd(0.5), outer_optimizer=optax.sgd(0.5),
        ... )
        >>> batch = (jnp.zeros(4), 2.0 * jnp.ones(4))
        >>> state = solver.init(jax.random.key(0), 0.0, batch)
        >>> for _ in range(50):
        ...     state, metrics = jax.jit(solver.step)(state, batch, batch)
        >>> round(float(state.outer_params), 3)
        2.0
    """
    name = "bilevel"
    check_setup(name, problem, model, estimator)
    check_optimizer(name, "inner_optimizer", inner_optimizer)
    check_optimizer(name, "outer_optimizer", outer_optimizer)
    check_number(name, "inner_steps", inner_steps)
    if estimator.unroll > inner_steps:
        raise ValueError(
            f"{name}: inner_steps={inner_steps}, but fb.{estimator!r} differentiates through {estimator.unroll} of "
            "them; it can only go back through steps that are made. Raise inner_steps, or lower that number."
        )
    if inner_init is not None:
        check_callable(name, "inner_init", inner_init)
    outer_update = optax.with_extra_args_support(outer_optimizer).update
    if outer_model is not None:
        check_outer_model(name, outer_model, problem)
    called_on = check_outer_inputs(name, outer_inputs)
    told: set[str] = set()
    known: dict[str, PyTree] = {}

    def seen(
        outer_params: OuterParams, outer_model_state: ModelState, inner_batch: Batch, key: Key
    ) -> tuple[PyTree, ModelState, Callable[[PyTree], OuterParams]]:
        """What the objectives get for omega, and the map from derivatives by it to derivatives by omega."""
        if outer_model is None:
            return outer_params, outer_model_state, lambda gradient: gradient
        inputs, apply = called_on(inner_batch), outer_model.apply
        features, pull, outer_model_state = jax.vjp(
            lambda omega: apply(omega, outer_model_state, inputs, train=True, key=key), outer_params, has_aux=True
        )
        return features, outer_model_state, lambda gradient: pull(gradient)[0]

    def start_at(f: OuterParams, key: Key, inner_batch: Batch) -> FitState:
        """A fresh start of the inner level, without model state, where the objectives get f for omega."""
        assert inner_init is not None
        first = draw(name, inner_batch, _draw_key(key), 0)
        theta = as_float_tree("inner_init", "inner_params", inner_init(f, jax.random.fold_in(key, _INIT_STREAM), first))
        return FitState(theta, inner_optimizer.init(theta), ())

    def init(
        key: Key,
        outer_params: OuterParams,
        inner_batch: Batch,
        inner_params: InnerParams | None = None,
        outer_batch: Batch = None,
    ) -> BilevelState:
        del outer_batch
        check_key("init", key, outer_params)
        key, model_key, estimator_key = jax.random.split(key, 3)
        check_draws("init", inner_batch, inner_steps)
        batch = draw("init", inner_batch, key, 0)
        outer_model_state: ModelState = ()
        if outer_model is not None:
            outer_key = jax.random.fold_in(key, 1)
            drawn, outer_model_state = initial("init", outer_model, outer_key, called_on(batch))
            outer_params = drawn if outer_params is None else outer_params
        outer_params = as_float_tree("init", "outer_params", outer_params)
        objectives_get = jax.eval_shape(lambda: seen(outer_params, outer_model_state, batch, key)[0])
        model_state: ModelState = ()
        given = inner_params is not None
        if isinstance(problem, FunctionalProblem):
            assert model is not None
            inputs = problem_inputs("init", problem, batch, "inner_batch")
            drawn, model_state = initial("init", model, model_key, inputs)
            inner_params = drawn if inner_params is None else inner_params
        if inner_params is None and inner_init is not None:
            f, _, _ = seen(outer_params, outer_model_state, batch, key)
            inner_params = start_at(f, model_key, inner_batch).params
        if inner_params is None:
            raise ValueError(
                "init: inner_params is None, but a ParametricProblem has no model to draw them from; pass "
                "inner_params=<the starting point of the inner level>."
            )
        theta: InnerParams = as_float_tree("init", "inner_params", inner_params)
        if given:
            check_parameters("init", problem, model, theta, model_state, batch)
        if isinstance(problem, FunctionalProblem) or inner_batch is not None:
            check_inner("init", problem, model, objectives_get, theta, model_state, batch, told)
        check_uses_parameters("init", problem, model, theta, model_state, batch)
        inner = FitState(theta, inner_optimizer.init(theta), model_state)
        estimator_state = estimator.init(estimator_key, problem, model, inner, batch)
        known[shapes_key(inner, batch)] = jax.eval_shape(lambda: estimator_state)
        state = BilevelState(
            step=jnp.zeros((), jnp.int32),
            outer_params=outer_params,
            inner_params=theta,
            model_state=model_state,
            inner_opt_state=inner.opt_state,
            outer_opt_state=outer_optimizer.init(outer_params),
            estimator_state=estimator_state,
            key=key,
            outer_model_state=outer_model_state,
            batch_form=batch_form(batch),
        )
        return jax.tree.map(own_buffer, state)

    def step(state: BilevelState, inner_batch: Batch, outer_batch: Batch) -> tuple[BilevelState, Metrics]:
        check_state("step", state)
        omega = state.outer_params
        key, inner_key, estimator_key, outer_key = jax.random.split(state.key, 4)
        check_draws("step", inner_batch, inner_steps)
        inner_batch = placed(inner_batch, state.step * (inner_steps + 1))
        batch = draw("step", inner_batch, _draw_key(inner_key), inner_steps)
        if isinstance(outer_batch, Minibatches):
            raise TypeError("step: outer_batch is fb.Minibatches, but an outer step draws one alone; pass one batch.")
        outer_batch = draw("step", placed(outer_batch, state.step), _draw_key(outer_key), 0, "outer_batch")
        if outer_model is not None and isinstance(inner_batch, (Minibatches, Sampler, FiniteSum)):
            raise ValueError(
                f"step: inner_batch is fb.{type(inner_batch).__name__}, but outer_model is evaluated once per outer "
                "step, on one batch; pass one batch, or call the outer network in the objectives."
            )
        before = FitState(state.inner_params, state.inner_opt_state, state.model_state)
        warm_start = state.estimator_state
        check_estimator_state("step", "estimator_state", estimator, problem, model, before, batch, warm_start, known)

        def start(f: OuterParams) -> FitState:
            if inner_init is None:
                return before
            return start_at(f, inner_key, inner_batch)._replace(model_state=before.model_state)

        def evaluate(omega: OuterParams) -> tuple[InnerSolution, Hypergradient, OuterParams, ModelState]:
            """The inner solution at omega, the hypergradient as the objectives see omega, and by omega itself."""
            f, outer_model_state, pull_back = seen(omega, state.outer_model_state, batch, outer_key)
            lower = (before.params, before.model_state)
            reached = inner_init is not None or _takes_outer_params(inner_optimizer)
            check_objectives("step", problem, model, estimator, f, *lower, batch, outer_batch, told, reached=reached)
            solve = _inner_solve(
                problem, model, inner_optimizer, estimator.unroll, start, inner_batch, inner_key, inner_steps, f
            )
            returned = estimator.estimate(problem, model, solve, f, batch, outer_batch, warm_start, estimator_key)
            inner, hyper = check_estimate("step", returned, f)
            check_next_state("step", "estimator.estimate", hyper.state, warm_start)
            hyper = _averaged(problem, hyper)
            return inner, hyper, pull_back(hyper.gradient), outer_model_state

        def F(omega: OuterParams) -> jax.Array:
            return evaluate(omega)[1].outer_value

        def F_and_gradient(omega: OuterParams) -> tuple[jax.Array, OuterParams]:
            _, hyper, gradient, _ = evaluate(omega)
            return hyper.outer_value, gradient

        value_fn = jax.custom_vjp(F)
        value_fn.defvjp(
            F_and_gradient, lambda gradient, t: (jax.tree.map(lambda g: (t * g).astype(g.dtype), gradient),)
        )

        inner, hyper, gradient, outer_model_state = evaluate(omega)
        updates, outer_opt_state = outer_update(
            gradient, state.outer_opt_state, omega, value=hyper.outer_value, grad=gradient, value_fn=value_fn
        )
        new_omega = optax.apply_updates(omega, updates)

        inner_finite = (
            all_finite(inner.fit.params, inner.fit.model_state, inner.metrics["inner_objective"])
            & stays_finite(before.opt_state, inner.fit.opt_state)
            & ~inner.diverged
        )
        metrics = inner.metrics | hyper.metrics
        metrics |= {
            "outer_objective": hyper.outer_value,
            "hypergradient_norm": tree_norm(gradient),
            "explicit_norm": tree_norm(hyper.explicit),
            "implicit_norm": tree_norm(hyper.implicit),
            "inner_finite": inner_finite | ~all_finite(omega),  # NaN that came from above is not the inner level's
            "outer_finite": _outer_finite(hyper, omega, gradient, new_omega, outer_model_state)
            & stays_finite(state.outer_opt_state, outer_opt_state),
        }
        inner_finite, metrics = (
            reduce_over_devices(problem, {"": inner_finite})[""],
            reduce_over_devices(problem, metrics),
        )
        all_levels = inner_finite & metrics["adjoint_finite"] & metrics["outer_finite"]
        after = tree_where(inner_finite, inner.fit, before)
        new_omega, outer_opt_state, outer_model_state, estimator_state = tree_where(
            all_levels,
            (new_omega, outer_opt_state, outer_model_state, hyper.state),
            (omega, state.outer_opt_state, state.outer_model_state, state.estimator_state),
        )
        new_state = BilevelState(
            step=state.step + 1,
            outer_params=new_omega,
            inner_params=after.params,
            model_state=after.model_state,
            inner_opt_state=after.opt_state,
            outer_opt_state=outer_opt_state,
            estimator_state=estimator_state,
            key=key,
            outer_model_state=outer_model_state,
            batch_form=state.batch_form,
        )
        return new_state, metrics

    def run(
        state: BilevelState, inner_batches: Batch, outer_batches: Batch, num_steps: int | None = None
    ) -> tuple[BilevelState, Metrics]:
        return run_steps(step, state, inner_batches, outer_batches, num_steps)

    def scaled(scale: float) -> BilevelSolver:
        return bilevel(
            problem,
            model,
            estimator,
            inner_optimizer=_times(inner_optimizer, scale),
            outer_optimizer=_times(outer_optimizer, scale),
            inner_steps=inner_steps,
            inner_init=inner_init,
            outer_model=outer_model,
            outer_inputs=outer_inputs,
        )

    solver: Any = BilevelSolver(init, step, run)
    # For `diagnose` and `Rollback`, as its description is for `repr`.
    solver.init.setup = Setup(problem, model, estimator, seen, step, scaled)
    return solver


_DRAW_STREAM, _INIT_STREAM = 0xD7A, 0x1217  # keep these keys apart from those of the inner steps


def _times(optimizer: optax.GradientTransformation, scale: float) -> optax.GradientTransformation:
    """The optimizer with its updates multiplied by `scale`, and the same state and signature."""

    def update(*args: Any, **kwargs: Any) -> Any:
        updates, state = optimizer.update(*args, **kwargs)
        return jax.tree.map(lambda x: jnp.asarray(scale, x.dtype) * x, updates), state

    signature = signature_of(optimizer.update)
    if signature is not None:
        update.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    takes_more = isinstance(optimizer, optax.GradientTransformationExtraArgs)
    kind = optax.GradientTransformationExtraArgs if takes_more else optax.GradientTransformation
    return kind(optimizer.init, update)


def _takes_outer_params(optimizer: optax.GradientTransformation | None) -> bool:
    """Whether omega reaches the inner level through the optimizer's steps, as in `proximal`."""
    signature = None if optimizer is None else signature_of(optimizer.update)
    return signature is not None and "outer_params" in signature.parameters


def _draw_key(inner_key: Key | None) -> Key | None:
    """The key of a `Sampler`'s draws in one outer step."""
    return None if inner_key is None else jax.random.fold_in(inner_key, _DRAW_STREAM)


def _inner_solve(
    problem: Problem,
    model: Model | None,
    optimizer: optax.GradientTransformation | None,
    unroll: int,
    start: Callable[[OuterParams], FitState],
    inner_batch: Batch,
    key: Key | None,
    inner_steps: int | None = None,
    outer_params: OuterParams = None,
) -> InnerSolve:
    """The inner solution as a function of omega through its last `unroll` steps; and its start, if those are all.

    The `inner_steps - unroll` steps before those are taken here and now, at `outer_params`.
    """
    draw_key = _draw_key(key)

    def advance(
        outer_params: OuterParams, reached: InnerSolution, first_step: int, num_steps: int, remat: bool
    ) -> InnerSolution:
        if optimizer is None or num_steps == 0:
            return reached

        def value_and_grad(theta: InnerParams, model_state: ModelState, key: Key | None, i: jax.Array) -> Any:
            batch = draw("step", inner_batch, draw_key, i)
            (value, (aux, model_state)), grad = training_value_and_grad(problem, model, outer_params, batch)(
                theta, model_state, key
            )
            aux = aux | {"inner_gradient_norm": tree_norm(jax.lax.stop_gradient(grad))}
            return (value, (aux, model_state)), grad

        before = reached.fit
        result = fit(
            *(value_and_grad, optimizer, num_steps, before, key),
            first_step=first_step,
            remat=remat,
            # Not to others: the line searches of optax refuse what they do not know.
            **({"outer_params": outer_params} if _takes_outer_params(optimizer) else {}),
        )
        size_before, size = (tree_norm(jax.lax.stop_gradient(x.params)) for x in (before, result.state))
        diverged = (jnp.abs(result.value) > 1e6 * jnp.abs(result.first)) & (size > 1e3 * (1.0 + size_before))
        return InnerSolution(
            result.state, {"inner_objective": result.value} | result.metrics, reached.diverged | diverged
        )

    head = 0 if inner_steps is None else inner_steps - unroll
    not_moved = InnerSolution(start(outer_params), {}, jnp.array(False))
    reached = advance(outer_params, not_moved, 0, head, remat=False)

    def solve(outer_params: OuterParams, *, remat: bool = False) -> InnerSolution:
        if not unroll:
            return reached
        before = reached if head else InnerSolution(start(outer_params), {}, jnp.array(False))
        return advance(outer_params, before, head, unroll, remat)

    return solve


def check_state(function: str, state: Any) -> None:
    """That it is the state of a solver."""
    if not isinstance(state, BilevelState):
        raise TypeError(
            f"{function}: state must be an fb.BilevelState, got {show(state)}; make one by solver.init, or take what "
            "the last step returned."
        )


def _averaged(problem: Problem, hyper: Hypergradient) -> Hypergradient:
    """`hyper` of all devices of the problem's mapped axis."""
    if problem.axis_name is None:
        return hyper
    explicit, implicit, value = mean_over_devices(problem, (hyper.explicit, hyper.implicit, hyper.outer_value))
    return hyper._replace(
        gradient=tree_add_scaled(explicit, 1.0, implicit), explicit=explicit, implicit=implicit, outer_value=value
    )


def _outer_finite(hyper: Hypergradient, *others: PyTree) -> jax.Array:
    """That the outer level's numbers are finite: what the estimator says of d, the value, and `others`."""
    return all_finite(hyper.outer_value, *others) & hyper.metrics.get("outer_finite", True)
