"""Several followers of one leader, each with problem, model, optimizer and estimator of its own."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from funcbilevel._arguments import as_float_tree, check_at_least, check_callable, check_key, check_optimizer
from funcbilevel._bilevel import BilevelSolver, BilevelState, check_state
from funcbilevel._described import described
from funcbilevel._draws import run_steps
from funcbilevel._tree import all_finite, stays_finite, tree_add_scaled, tree_norm, tree_where
from funcbilevel._typing import Batch, InnerParams, Key, Metrics, OuterParams, PyTree

FLAGS = ("inner_finite", "adjoint_finite", "outer_finite")
OWN = ("inner_params", "model_state", "inner_opt_state", "estimator_state", "outer_model_state")


@described
def followers(
    makers: Mapping[str, Callable[..., BilevelSolver]],
    *,
    outer_optimizer: optax.GradientTransformation,
    order: Literal["together", "round-robin"] = "together",
    weights: Mapping[str, float] | None = None,
) -> BilevelSolver:
    r"""One leader and several followers: :math:`\min_\omega \sum_k w_k F_k(\omega)`.

    Each :math:`F_k(\omega) = L_{out,k}(\omega, h^*_{k,\omega})` has a follower of its own, with problem, model,
    parameters, optimizer and estimator; followers do not see one another. Whatever makes a `BilevelSolver` makes a
    follower, `fb.bilevel` or a stochastic method such as `fb.soba`; the leader takes its hypergradient.

    Arguments:
        makers: name -> a function that makes the follower's solver when it is called with `outer_optimizer=`, such as
            `functools.partial(fb.bilevel, problem, model, estimator, inner_optimizer=...)`.
        outer_optimizer: the leader's, any optax optimizer that needs no more than gradients and values (no line
            search).
        order: "together": in each outer step all followers move, and the leader by the sum of their hypergradients;
            "round-robin": step t is that of follower number t modulo their number (in the order of `makers`), and the
            leader moves by its hypergradient alone.
        weights: name -> w_k >= 0; None: all 1.

    Returns:
        A `BilevelSolver`. Inner and outer batches are dicts name -> what that follower takes, and so are `inner_params`
        of `init` (None: all at their models' initial ones) and of the state. Metrics: those of each follower under
        `<name>/<metric>` (NaN, and true, of followers that rest); `outer_objective`, the weighted sum over those that
        move; `inner_objective`, their sum; `hypergradient_norm`; and the three flags, true if they are for all.

    Raises:
        ValueError, TypeError: no maker, an unknown order, weights or batches of other names.

    Example: one penalty for two regressions.
        >>> import functools
        >>> inner = lambda w, u, b: jnp.mean((b[0] * u - b[1]) ** 2) + jnp.exp(w) * u**2
        >>> problem = fb.ParametricProblem(inner, lambda w, u, b: jnp.mean((b[0] * u - b[1]) ** 2))
        >>> make = functools.partial(
        ...     fb.bilevel, problem, None, fb.aid(fb.cg(1)), inner_optimizer=optax.sgd(0.1), inner_steps=5
        ... )
        >>> solver = fb.followers({"a": make, "b": make}, outer_optimizer=optax.sgd(0.1))
        >>> data = {"a": (jnp.ones(3), jnp.arange(3.0)), "b": (jnp.ones(3), -jnp.arange(3.0))}
        >>> state = solver.init(jax.random.key(0), 0.0, data, {"a": 0.0, "b": 0.0})
        >>> state, metrics = jax.jit(solver.step)(state, data, data)
        >>> sorted(state.inner_params)
        ['a', 'b']
    """
    name = "followers"
    if not isinstance(makers, Mapping) or not makers:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"{name}: makers must be a dict name -> function that makes a solver, got {makers!r}; such a function is "
            "functools.partial(fb.bilevel, problem, model, estimator, inner_optimizer=...)."
        )
    check_optimizer(name, "outer_optimizer", outer_optimizer)
    if order not in ("together", "round-robin"):
        raise ValueError(f'{name}: order must be "together" or "round-robin", got {order!r}.')
    share = dict.fromkeys(makers, 1.0) if weights is None else dict(weights)
    _check_names(name, "weights", share, makers)
    for follower, weight in share.items():
        check_at_least(name, f"weights[{follower!r}]", weight, 0.0)
    solvers: dict[str, BilevelSolver] = {}
    for follower, make in makers.items():
        check_callable(name, f"makers[{follower!r}]", make)
        solvers[follower] = make(outer_optimizer=_keeps_gradient())
    outer_update = optax.with_extra_args_support(outer_optimizer).update

    def init(
        key: Key,
        outer_params: OuterParams,
        inner_batch: Batch,
        inner_params: InnerParams | None = None,
        outer_batch: Batch = None,
    ) -> BilevelState:
        check_key("init", key, outer_params)
        omega = as_float_tree("init", "outer_params", outer_params)
        start: Any = dict.fromkeys(solvers) if inner_params is None else inner_params
        above: Any = dict.fromkeys(solvers) if outer_batch is None else outer_batch
        for argument, value in (("inner_batch", inner_batch), ("inner_params", start), ("outer_batch", above)):
            _check_names("init", argument, value, solvers)
        key, *keys = jax.random.split(key, 1 + len(solvers))
        states = {
            k: solver.init(own, omega, inner_batch[k], start[k], above[k])
            for own, (k, solver) in zip(keys, solvers.items(), strict=True)
        }
        return BilevelState(
            step=jnp.zeros((), jnp.int32),
            outer_params=jax.tree.map(jnp.copy, omega),
            outer_opt_state=jax.tree.map(jnp.copy, outer_optimizer.init(omega)),
            key=jnp.copy(key),
            batch_form=(),
            **{field: {k: getattr(s, field) for k, s in states.items()} for field in OWN},
        )

    def step(state: BilevelState, inner_batch: Batch, outer_batch: Batch) -> tuple[BilevelState, Metrics]:
        check_state("step", state)
        for argument, value in (("inner_batch", inner_batch), ("outer_batch", outer_batch)):
            _check_names("step", argument, value, solvers)
        omega = state.outer_params
        key, *keys = jax.random.split(state.key, 1 + len(solvers))
        own_keys = dict(zip(solvers, keys, strict=True))

        def move(k: str) -> tuple[BilevelState, Metrics]:
            own = {field: getattr(state, field)[k] for field in OWN}
            before = state._replace(**own, outer_opt_state=jax.tree.map(jnp.zeros_like, omega), key=own_keys[k])
            return solvers[k].step(before, inner_batch[k], outer_batch[k])

        def turn(*moving: str) -> tuple[dict[str, dict[str, PyTree]], OuterParams, Metrics]:
            """What is new, the gradient and all metrics when these followers move."""
            moved = {k: move(k) for k in moving}
            new = {f: getattr(state, f) | {k: getattr(s, f) for k, (s, _) in moved.items()} for f in OWN}
            gradient = jax.tree.map(jnp.zeros_like, omega)
            for k, (after, _) in moved.items():
                gradient = tree_add_scaled(gradient, share[k], after.outer_opt_state)
            seen = [(share[k], m) for k, (_, m) in moved.items()]
            metrics: Metrics = {
                "outer_objective": jnp.sum(jnp.stack([w * m["outer_objective"] for w, m in seen])),
                "inner_objective": jnp.sum(jnp.stack([m["inner_objective"] for _, m in seen])),
                **{flag: jnp.all(jnp.stack([m[flag] for _, m in seen])) for flag in FLAGS},
            }
            for k in solvers:
                of_k = moved[k][1] if k in moved else jax.tree.map(_resting, jax.eval_shape(lambda k=k: move(k)[1]))
                metrics |= {f"{k}/{metric}": value for metric, value in of_k.items()}
            return new, gradient, metrics

        if order == "together":
            new, gradient, metrics = turn(*solvers)
        else:
            turns = [lambda _, k=k: turn(k) for k in solvers]
            new, gradient, metrics = jax.lax.switch(state.step % len(solvers), turns, None)
        updates, outer_opt_state = outer_update(
            gradient, state.outer_opt_state, omega, value=metrics["outer_objective"], grad=gradient
        )
        new_omega = optax.apply_updates(omega, updates)
        finite = all_finite(new_omega) & stays_finite(state.outer_opt_state, outer_opt_state)
        metrics |= {
            "hypergradient_norm": tree_norm(gradient),
            "outer_finite": metrics["outer_finite"] & (finite | ~metrics["inner_finite"] | ~metrics["adjoint_finite"]),
        }
        sound = finite & metrics["inner_finite"] & metrics["adjoint_finite"] & metrics["outer_finite"]
        new_omega, outer_opt_state = tree_where(sound, (new_omega, outer_opt_state), (omega, state.outer_opt_state))
        state = state._replace(step=state.step + 1, outer_params=new_omega, outer_opt_state=outer_opt_state, key=key)
        return state._replace(**new), metrics

    def run(
        state: BilevelState, inner_batches: Batch, outer_batches: Batch, num_steps: int | None = None
    ) -> tuple[BilevelState, Metrics]:
        return run_steps(step, state, inner_batches, outer_batches, num_steps)

    return BilevelSolver(init, step, run)


def _keeps_gradient() -> optax.GradientTransformation:
    """An optimizer that moves nothing, and whose state is the gradient that it was given."""

    def init(params: PyTree) -> PyTree:
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        del state, params
        return jax.tree.map(jnp.zeros_like, updates), updates

    return optax.GradientTransformation(init, update)


def _resting(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """What stands for the metric of a follower that does not move."""
    return jnp.full(shape.shape, jnp.nan if jnp.issubdtype(shape.dtype, jnp.floating) else True, shape.dtype)


def _check_names(function: str, argument: str, value: Any, makers: Mapping[str, Any]) -> None:
    if not isinstance(value, Mapping) or set(value) != set(makers):
        got = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(
            f"{function}: {argument} must be a dict with one entry for each follower, {sorted(makers)}, got {got}."
        )
