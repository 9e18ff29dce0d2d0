"""Estimators against a reference: central differences of the problem, solved anew."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from funcbilevel._arguments import as_float_tree, check_like, check_number, check_optimizer
from funcbilevel._bilevel import BilevelSolver, BilevelState, bilevel, hypergradient
from funcbilevel._check import check_setup
from funcbilevel._draws import Minibatches
from funcbilevel._estimator import Call, Estimator, Hypergradient, InnerSolution, by_call, no_state
from funcbilevel._model import Model
from funcbilevel._predictor import as_parametric
from funcbilevel._problem import Problem, outer_value
from funcbilevel._typing import Batch, InnerParams, Key, ModelState, OuterParams, PyTree

CONVERGED = 1e-2  # the largest relative error of a reference that is said to have converged


class CheckedEstimator(NamedTuple):
    """One estimator beside the reference; plain numbers.

    Attributes:
        name: as given.
        relative_error: |g - reference| / |reference|, g the hypergradient at the inner solution.
        cosine: of the angle between g and the reference.
        norm_ratio: |g| / |reference|.
        explicit_share, implicit_share: |g_exp| and |g_imp| over their sum.
        error_as_given: the relative error at inner_params as they were given, before the inner steps.
        seconds: median run time of the compiled hypergradient, inner steps apart.
        temp_bytes: XLA's temporary buffers in it (`memory_analysis`).
    """

    name: str
    relative_error: float
    cosine: float
    norm_ratio: float
    explicit_share: float
    implicit_share: float
    error_as_given: float
    seconds: float
    temp_bytes: int


class HypergradientCheck(NamedTuple):
    """What `check_hypergradient` found; printed, it is a table.

    Attributes:
        rows: one `CheckedEstimator` for each estimator.
        reference: the derivatives that the estimators were compared with, [K]: by every coordinate of outer_params
            (flattened as `jax.flatten_util.ravel_pytree` does), or along `directions`.
        directions: [K, q], or None: every coordinate.
        step_error: relative difference of the reference at two step widths; None if the reference was given.
        solve_error: relative difference of the reference after half of the inner steps and after all; None likewise.
        converged: whether the two together are at most 0.01; true of a reference that was given.
    """

    rows: tuple[CheckedEstimator, ...]
    reference: np.ndarray
    directions: np.ndarray | None
    step_error: float | None
    solve_error: float | None
    converged: bool

    def __str__(self) -> str:
        return _table(self)

    def __repr__(self) -> str:
        return _table(self)


def check_hypergradient(
    problem: Problem,
    model: Model | None,
    estimators: Mapping[str, Estimator],
    outer_params: OuterParams,
    inner_params: InnerParams,
    inner_batch: Batch,
    outer_batch: Batch,
    *,
    inner_optimizer: optax.GradientTransformation,
    inner_steps: int,
    reference: OuterParams | None = None,
    model_state: ModelState = None,
    key: Key | None = None,
    num_directions: int = 16,
) -> HypergradientCheck:
    r"""Compares estimators with central differences of the problem solved anew, or with a reference.

    With :math:`\theta_M(\omega)` what M inner steps from inner_params reach, the reference is, along directions z,

    .. math::
        D_h = \frac{F_M(\omega + h z) - F_M(\omega - h z)}{2h}, \qquad
        \partial_z F \approx \tfrac13 (4 D_{h/2} - D_h), \qquad F_M(\omega) = L_{out}(\omega, \theta_M(\omega)) .

    z are the coordinates of omega if there are at most `num_directions`, else that many Gaussian directions: the
    errors, cosines and ratios are then estimates of those of the whole vectors, with a relative standard deviation of
    about sqrt(2 / num_directions). The two step widths tell the error of the differences, half of the inner steps that
    of the inner solution; where they disagree, the table says that the reference itself has not converged.

    Every estimator is evaluated twice: at :math:`\theta_M(\omega)`, where what is wrong is the estimator (its class of
    adjoints, its damping, the steps of its solver, the order of truncation), and at inner_params as they were given,
    where the error of an unfinished inner level is added to that. Warm starts begin afresh.

    Arguments:
        problem, model: as in `hypergradient`.
        estimators: name -> estimator.
        outer_params, inner_params: the point; inner_params are where the inner steps start.
        inner_batch, outer_batch: as in `bilevel`: the inner ones may be `Minibatches` of M or a `Sampler`. All
            solutions make the same draws.
        inner_optimizer, inner_steps: M >= 1 steps of this optimizer solve the inner problem; take many. `itd` makes
            its own steps with it.
        reference: the hypergradient, like outer_params, where it is known; no differences are then made.
        model_state: the model's non-trainable state, for models that have one.
        key: random key of everything that draws; default `jax.random.key(0)`.
        num_directions: the most directions, each of which costs 6 M inner steps.

    Returns:
        A `HypergradientCheck`; print it.

    Raises:
        ValueError, TypeError: as `bilevel` and `hypergradient`; `estimators` is empty; `reference` is not like
            outer_params.

    Example: the mean of inner and outer targets; only one of two estimators is right.
        >>> problem = fb.FunctionalProblem(
        ...     lambda w, v, batch: jnp.mean((v - w) ** 2), lambda w, v, batch: jnp.mean((v - batch[1]) ** 2) + w
        ... )
        >>> model = fb.from_function(lambda key, x: jnp.zeros(()), lambda params, x: params * jnp.ones(len(x)))
        >>> batch = (jnp.zeros(4), 2.0 * jnp.ones(4))
        >>> estimators = {"funcid": fb.funcid(fb.pointwise_adjoint()), "alternating": fb.alternating()}
        >>> check = fb.check_hypergradient(
        ...     problem, model, estimators, 1.0, 0.0, batch, batch, inner_optimizer=optax.sgd(0.3), inner_steps=30
        ... )
        >>> [row.relative_error < 1e-3 for row in check.rows], check.converged
        ([True, False], True)
    """
    name = "check_hypergradient"
    if not isinstance(estimators, Mapping) or not estimators:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"{name}: estimators must be a dict of at least one name -> estimator, got {estimators!r}.")
    for estimator in estimators.values():
        check_setup(name, problem, model, estimator)
    check_optimizer(name, "inner_optimizer", inner_optimizer)
    check_number(name, "inner_steps", inner_steps)
    check_number(name, "num_directions", num_directions)
    outer_params = as_float_tree(name, "outer_params", outer_params)
    inner_params = as_float_tree(name, "inner_params", inner_params)
    if reference is not None:
        reference = as_float_tree(name, "reference", reference)
        check_like(name, "reference", reference, outer_params, "pass a hypergradient, a pytree like outer_params.")
    solve_key, estimate_key, direction_key = jax.random.split(jax.random.key(0) if key is None else key, 3)

    def solver(steps: int) -> tuple[BilevelSolver, BilevelState, Batch]:
        """Of `steps` inner steps, and its state at the given point."""
        made = bilevel(
            problem,
            model,
            Estimator(no_state, by_call(_value_alone), description="the reference"),
            inner_optimizer=inner_optimizer,
            outer_optimizer=optax.set_to_zero(),
            inner_steps=steps,
        )
        batch = _of_steps(inner_batch, steps) if steps != inner_steps else inner_batch
        state = jax.jit(made.init)(solve_key, outer_params, batch, inner_params)
        return made, state if model_state is None else state._replace(model_state=model_state), batch

    full, state, _ = solver(inner_steps)
    solved: BilevelState = jax.jit(lambda *args: full.step(*args)[0])(state, inner_batch, outer_batch)

    flat, unravel = ravel_pytree(outer_params)
    directions, step_error, solve_error = None, None, None
    if reference is not None:
        expected = _array(ravel_pytree(reference)[0])
    else:
        spread = jnp.sqrt(jnp.mean(flat**2))
        spread = jnp.where(spread > 0, spread, 1.0)
        if flat.size <= num_directions:
            moves = jnp.diag(jnp.maximum(jnp.abs(flat), spread))
        else:
            moves = spread * jax.random.normal(direction_key, (num_directions, flat.size), flat.dtype)
            directions = _array(moves / spread)
        half = solver(inner_steps // 2 or 2)
        derivatives = jax.jit(_differences, static_argnums=(0, 1))

        def along(made: BilevelSolver, state: BilevelState, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
            """The derivatives by h, and by Richardson's rule."""
            at_h, at_half_h = _array(derivatives(made.step, unravel, state, flat, moves, batch, outer_batch))
            by_unit = _array(jnp.diag(moves) if directions is None else jnp.broadcast_to(spread, len(moves)))
            return at_half_h / by_unit, (4 * at_half_h - at_h) / 3 / by_unit

        coarse, expected = along(full, state, inner_batch)
        _, before = along(*half)
        step_error, solve_error = _relative(coarse, expected), _relative(before, expected)
    converged = reference is not None or _sum(step_error, solve_error) <= CONVERGED

    points = {"solved": solved, "given": state}

    def row(name: str, estimator: Estimator) -> CheckedEstimator:
        def estimate(theta: InnerParams, model_state: ModelState, inner_batch: Any, outer_batch: Any) -> Hypergradient:
            return hypergradient(
                problem,
                model,
                estimator,
                outer_params,
                theta,
                inner_batch,
                outer_batch,
                inner_optimizer=inner_optimizer,
                model_state=model_state,
                key=estimate_key,
            )

        def seen(tree: PyTree) -> np.ndarray:
            return _array(ravel_pytree(tree)[0]) if directions is None else directions @ _array(ravel_pytree(tree)[0])

        at = {n: (s.inner_params, s.model_state, inner_batch, outer_batch) for n, s in points.items()}
        executable: Any = jax.jit(estimate).lower(*at["solved"]).compile()
        results = {n: jax.block_until_ready(executable(*arguments)) for n, arguments in at.items()}
        times: list[float] = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(executable(*at["solved"]))
            times.append(time.perf_counter() - start)
        g, *parts = (seen(part) for part in results["solved"][:3])
        explicit, implicit = (float(np.linalg.norm(part)) for part in parts)
        norm, size = float(np.linalg.norm(g)), float(np.linalg.norm(expected))
        return CheckedEstimator(
            name=name,
            relative_error=_relative(g, expected),
            cosine=float(g @ expected) / ((norm * size) or 1.0),
            norm_ratio=norm / (size or 1.0),
            explicit_share=explicit / ((explicit + implicit) or 1.0),
            implicit_share=implicit / ((explicit + implicit) or 1.0),
            error_as_given=_relative(seen(results["given"].gradient), expected),
            seconds=float(np.median(times)),
            temp_bytes=executable.memory_analysis().temp_size_in_bytes,
        )

    rows = tuple(row(name, estimator) for name, estimator in estimators.items())
    return HypergradientCheck(rows, expected, directions, step_error, solve_error, converged)


def _value_alone(call: Call) -> tuple[InnerSolution, Hypergradient]:
    """`estimate` of an estimator that solves, and says what L_out is."""
    inner = call.solve(call.outer_params)
    parametric = as_parametric(call.problem, call.model, inner.fit.model_state, call.inner_batch)
    value, _ = outer_value(parametric, call.outer_params, inner.fit.params, call.outer_batch)
    zero = jax.tree.map(jnp.zeros_like, call.outer_params)
    return inner, Hypergradient(zero, zero, zero, value, (), {"adjoint_finite": jnp.array(True)})


def _differences(
    step: Any,
    unravel: Any,
    state: BilevelState,
    flat: jax.Array,
    moves: jax.Array,
    inner_batch: Batch,
    outer_batch: Any,
) -> jax.Array:
    """Central differences of F along the moves, at h and at h / 2: [2, K]; one solution at a time."""
    # With Richardson's rule truncation is of order h^4, and rounding of order eps / h.
    h = float(jnp.finfo(flat.dtype).eps) ** 0.2

    def F(flat: jax.Array) -> jax.Array:
        return step(state._replace(outer_params=unravel(flat)), inner_batch, outer_batch)[1]["outer_objective"]

    def along(move: jax.Array) -> jax.Array:
        steps = jnp.array([h, -h, 0.5 * h, -0.5 * h], flat.dtype)
        values = jax.lax.map(lambda s: F(flat + s * move), steps)
        return jnp.stack([(values[0] - values[1]) / (2 * h), (values[2] - values[3]) / h])

    return jax.lax.map(along, moves).T


def _of_steps(source: Any, steps: int) -> Any:
    """`source` for another number of inner steps; the draw after them stays."""
    if not isinstance(source, Minibatches):
        return source
    return Minibatches(jax.tree.map(lambda x: jnp.concatenate([x[:steps], x[-1:]]), source.batches))


def _array(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    """|got - expected| / |expected|, or |got| where that is zero."""
    return float(np.linalg.norm(got - expected)) / (float(np.linalg.norm(expected)) or 1.0)


def _sum(*errors: float | None) -> float:
    return sum(e or 0.0 for e in errors)


def _table(check: HypergradientCheck) -> str:
    width = max(len(row.name) for row in check.rows)
    head = ("error", "cosine", "norm ratio", "explicit", "implicit", "error as given", "ms", "temp MiB")
    lines = [f"{'':{width}}  " + "  ".join(f"{h:>{max(len(h), 9)}}" for h in head)]
    for row in check.rows:
        cells = (
            *(f"{row.relative_error:.1e}", f"{row.cosine:.4f}", f"{row.norm_ratio:.4f}"),
            *(f"{row.explicit_share:.0%}", f"{row.implicit_share:.0%}", f"{row.error_as_given:.1e}"),
            *(f"{1e3 * row.seconds:.2f}", f"{row.temp_bytes / 2**20:.2f}"),
        )
        lines.append(
            f"{row.name:{width}}  " + "  ".join(f"{c:>{max(len(h), 9)}}" for c, h in zip(cells, head, strict=True))
        )
    if check.step_error is None or check.solve_error is None:
        return "\n".join([*lines, "Reference: as given."])
    where = "all coordinates" if check.directions is None else f"{len(check.directions)} random directions"
    errors = f"{check.step_error:.0e} by step width, {check.solve_error:.0e} by inner steps"
    lines.append(f"Reference: central differences along {where} of outer_params; its relative error: {errors}.")
    if not check.converged:
        inner = check.solve_error >= check.step_error or not np.isfinite(check.solve_error)
        mend = (
            "take more inner_steps, or an inner_optimizer that converges"
            if inner
            else "compute in float64 (jax_enable_x64), or pass reference=; the outer objective may not be smooth here"
        )
        lines.append(f"THE REFERENCE HAS NOT CONVERGED, and the errors above say little: {mend}.")
    return "\n".join(lines)
