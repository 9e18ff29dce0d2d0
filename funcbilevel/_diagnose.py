"""What is the matter with a bilevel solver at a state: numbers, and a sentence of advice to each."""

import math
import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from funcbilevel._bilevel import BilevelSolver, BilevelState, Setup, check_state
from funcbilevel._draws import draw
from funcbilevel._error import hypergradient_error
from funcbilevel._linear_solvers import conjugate_gradients, in_working_dtype
from funcbilevel._model import Model
from funcbilevel._predictor import as_parametric, predictor
from funcbilevel._problem import FunctionalProblem, inner_derivatives, outer_derivatives
from funcbilevel._tree import tree_add_scaled, tree_cast, tree_norm, working_dtype
from funcbilevel._typing import Batch, LinearMap, PyTree

STEPS = 30  # of Lanczos and of conjugate gradients
ORDER = (
    *("inner_gradient_relative", "inner_error_relative", "adjoint_error_relative"),
    *("prediction_curvature_min", "prediction_curvature_max", "parameter_curvature_min", "parameter_curvature_max"),
    *("outer_uncovered", "effective_samples"),
)


class Finding(NamedTuple):
    """One row of a diagnosis.

    Attributes:
        name: what was measured.
        value: the number.
        advice: a sentence on what it means, and what to do.
    """

    name: str
    value: float
    advice: str


class Diagnosis(NamedTuple):
    """What `diagnose` found; printed, it is a table.

    Attributes:
        rows: one `Finding` each, in the order of the documentation.
    """

    rows: tuple[Finding, ...]

    @property
    def values(self) -> dict[str, float]:
        """name -> value."""
        return {row.name: row.value for row in self.rows}

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        indent = " " * (width + 13)
        return "\n".join(
            textwrap.fill(f"{row.name:{width}}  {row.value:>9.2e}  {row.advice}", 120, subsequent_indent=indent)
            for row in self.rows
        )

    def __repr__(self) -> str:
        return str(self)


def diagnose(solver: BilevelSolver, state: BilevelState, inner_batch: Batch, outer_batch: Batch) -> Diagnosis:
    r"""Measures what the hypergradient rests on at a state, and says what to do about it.

    With H the Hessian of the inner objective by inner_params, C that by the prediction (times the number of samples:
    the curvature at one sample), and J_P, J_Q the Jacobians of the predictions:

    - `inner_gradient_relative`: |g| / (|g| + |H theta|), g = d_theta L_in.
    - `prediction_curvature_min`, `prediction_curvature_max`: extreme eigenvalues of C (functional problems).
    - `parameter_curvature_min`, `parameter_curvature_max`: extreme eigenvalues of H.
    - `outer_uncovered` (functional problems): :math:`\min_t |J_Q^\top d - J_P^\top t| / |J_Q^\top d|`, the share of
      what the outer objective asks of the model that no inner sample determines: where P and Q do not overlap.
    - `effective_samples`: (sum_i |t_i|)^2 / (n sum_i |t_i|^2) of the same t, the share of inner samples that carry it.
    - `inner_error_relative`, `adjoint_error_relative` (funcid, aid): the two parts of `hypergradient_error`, over the
      norm of the hypergradient: which level is starved.

    Eigenvalues are those of 30 Lanczos steps: an extreme one in a cluster may be farther out. The cost is that of about
    a hundred products with J, H and C, and of `hypergradient_error`.

    Arguments:
        solver: of `bilevel`.
        state: as it stands after a step, or after `init`.
        inner_batch, outer_batch: as in `step`; of `Minibatches` the last batch is used, of a `Sampler` one draw.

    Returns:
        A `Diagnosis`; print it. Not for use under `jit`.

    Raises:
        ValueError: the solver was not made by `bilevel`, or runs under `jax.pmap`.

    Example: an inner level of one slow step.
        >>> problem = fb.FunctionalProblem(
        ...     lambda w, v, batch: jnp.mean((v - w) ** 2), lambda w, v, batch: jnp.mean((v - batch[1]) ** 2)
        ... )
        >>> model = fb.from_function(lambda key, x: jnp.zeros(()), lambda params, x: params * jnp.ones(len(x)))
        >>> solver = fb.bilevel(
        ...     problem, model, fb.funcid(fb.pointwise_adjoint()),
        ...     inner_optimizer=optax.sgd(0.01), outer_optimizer=optax.sgd(0.5),
        ... )
        >>> batch = (jnp.zeros(4), 2.0 * jnp.ones(4))
        >>> diagnosis = fb.diagnose(solver, solver.init(jax.random.key(0), 1.0, batch), batch, batch)
        >>> diagnosis.values["inner_error_relative"] > 0.1, diagnosis.values["adjoint_error_relative"]
        (True, 0.0)

    References:
        Lanczos, 1950 (extreme eigenvalues from products).
    """
    setup: Setup | None = getattr(solver.init, "setup", None)
    if setup is None:
        raise ValueError(f"diagnose: solver must be one of fb.bilevel, got {solver!r}, which does not say its problem.")
    if setup.problem.axis_name is not None:
        raise ValueError(
            f"diagnose: problem.axis_name is {setup.problem.axis_name!r}, and one device's part of the batch is not "
            "the whole; diagnose a solver of the same problem without axis_name, on the whole batch."
        )
    check_state("diagnose", state)
    batch = draw("diagnose", inner_batch, state.key, _LAST)
    measured = jax.jit(lambda *arguments: _measure(setup, *arguments))(state, batch, outer_batch)
    found = {name: float(measured[name]) for name in ORDER if name in measured}
    return Diagnosis(tuple(Finding(name, value, _advice(name, value, found)) for name, value in found.items()))


_LAST = 2**31 - 1  # of stacked batches the last


def _measure(setup: Setup, state: BilevelState, inner_batch: Batch, outer_batch: Batch) -> dict[str, jax.Array]:
    problem, model, estimator, seen, *_ = setup
    theta, model_state = state.inner_params, state.model_state
    omega, _, _ = seen(state.outer_params, state.outer_model_state, inner_batch, state.key)
    parametric = as_parametric(problem, model, model_state, inner_batch)
    g, H = inner_derivatives(parametric, omega, theta, inner_batch)
    norm, terms = tree_norm(g), tree_norm(g) + tree_norm(H(theta))
    found = {"inner_gradient_relative": norm / jnp.where(terms > 0, terms, 1.0)}
    low, high = _extreme_eigenvalues(H, theta)
    found |= {"parameter_curvature_min": low, "parameter_curvature_max": high}
    if isinstance(problem, FunctionalProblem):
        assert model is not None
        h = predictor(problem, model, omega, theta, inner_batch, model_state)
        v_P, v_Q = (h(problem.inputs(batch)) for batch in (inner_batch, outer_batch))
        _, C = inner_derivatives(problem, omega, v_P, inner_batch)
        low, high = _extreme_eigenvalues(C, v_P)
        n = jax.tree.leaves(v_P)[0].shape[0]
        found |= {"prediction_curvature_min": n * low, "prediction_curvature_max": n * high}
        _, _, _, d = outer_derivatives(problem, omega, v_Q, outer_batch)
        params = (theta, h.head)

        def values(params: Any, batch: Batch) -> PyTree:
            return _apply(model, params, model_state, problem.inputs(batch))

        uncovered, effective = _coverage(
            lambda params: values(params, inner_batch), lambda params: values(params, outer_batch), params, d
        )
        found |= {"outer_uncovered": uncovered, "effective_samples": effective}
    if estimator.refine is not None and not (estimator.functional and model is not None and model.head is not None):
        error = hypergradient_error(
            problem,
            model,
            estimator,
            omega,
            theta,
            inner_batch,
            outer_batch,
            model_state=model_state,
            state=state.estimator_state,
            key=state.key,
        )
        size = tree_norm(error.refined)
        size = jnp.where(size > 0, size, 1.0)
        found |= {
            "inner_error_relative": error.inner_error / size,
            "adjoint_error_relative": error.adjoint_error / size,
        }
    return found


def _apply(model: Model, params: Any, model_state: Any, x: Any) -> PyTree:
    """The prediction as a function of all that the inner level fits: theta, and the head where there is one."""
    theta, head = params
    v, _ = model.apply(theta, model_state, x)
    return v if head is None else v @ head


def _extreme_eigenvalues(matvec: LinearMap, like: PyTree) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest Ritz value after Lanczos steps with full orthogonalisation."""
    zero, unravel = ravel_pytree(tree_cast(like, working_dtype(like)))
    wide = in_working_dtype(matvec, like)
    steps = min(STEPS, zero.size)
    q = jax.random.normal(jax.random.key(0), zero.shape, zero.dtype)

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        basis, products, q = carry
        basis = basis.at[i].set(q)
        Aq, _ = ravel_pytree(wide(unravel(q)))
        products = products.at[i].set(Aq)
        r = Aq
        for _ in range(2):  # once leaves rounding errors that twice does not
            r = r - basis.T @ (basis @ r)
        size = jnp.linalg.norm(r)
        # An invariant subspace is found: what follows are zero vectors, which must not count.
        small = size <= 10 * jnp.finfo(r.dtype).eps * jnp.linalg.norm(Aq)
        return (basis, products, jnp.where(small, 0.0, r / jnp.where(small, 1.0, size))), None

    empty = jnp.zeros((steps, zero.size), zero.dtype)
    (basis, products, _), _ = jax.lax.scan(step, (empty, empty, q / jnp.linalg.norm(q)), jnp.arange(steps))
    projected = products @ basis.T
    used = jnp.sum(basis**2, axis=1) > 0.5
    unused = jnp.diag(jnp.full(steps, projected[0, 0]))  # between the extremes, for the rows that are not used
    symmetric = 0.5 * (projected + projected.T)
    ritz = jnp.linalg.eigvalsh(jnp.where(used[:, None] & used[None, :], symmetric, unused))
    return ritz[0], ritz[-1]


def _coverage(inner: Any, outer: Any, params: PyTree, d: PyTree) -> tuple[jax.Array, jax.Array]:
    """`outer_uncovered` and `effective_samples`."""
    _, pull_Q = jax.vjp(outer, params)
    (asked,) = pull_Q(d)
    v_P, pull_P = jax.vjp(inner, params)
    _, push_P = jax.linearize(inner, params)
    wide = in_working_dtype(lambda t: push_P(pull_P(t)[0]), v_P)
    rhs = tree_cast(push_P(asked), working_dtype(v_P))
    t = conjugate_gradients(wide, rhs, None, STEPS)
    (carried,) = pull_P(tree_cast(t, v_P))
    size = tree_norm(asked)
    uncovered = tree_norm(tree_add_scaled(asked, -1.0, carried)) / jnp.where(size > 0, size, 1.0)
    rows = sum(jnp.sum(leaf.reshape(leaf.shape[0], -1) ** 2, axis=1) for leaf in jax.tree.leaves(t))
    weights = jnp.sqrt(rows)
    squares = jnp.sum(weights**2)
    return uncovered, jnp.sum(weights) ** 2 / (jnp.where(squares > 0, squares, 1.0) * weights.size)


def _advice(name: str, value: float, found: dict[str, float]) -> str:
    """One sentence."""
    if math.isnan(value):
        return "Not a number: a level has broken; look at inner_finite, adjoint_finite and outer_finite in the metrics."
    if name == "inner_gradient_relative":
        if value <= 1e-3:
            return "The inner level is at its solution."
        return "The inner level is not at its solution: raise inner_steps or its rate, or use a correction."
    if name.startswith("prediction_curvature"):
        low, high = found["prediction_curvature_min"], found["prediction_curvature_max"]
        if name.endswith("max"):
            return f"The weights of samples and outputs differ by a factor of {_factor(low, high)}."
        if low < -1e-5 * abs(high):
            return (
                "L_in is not convex in the prediction here, so that FuncID's adjoint is no minimum: mend the objective."
            )
        if low <= 1e-5 * high:
            return "C is singular, as of softmax: FuncID takes the least adjoint, right if the outer objective agrees."
        return "L_in is strongly convex in the prediction: FuncID's adjoint is well defined."
    if name.startswith("parameter_curvature"):
        low, high = found["parameter_curvature_min"], found["parameter_curvature_max"]
        if name.endswith("max"):
            steps = max(1, round((high / low) ** 0.5)) if low > 0 else None
            if steps is None or steps > 200:
                return (
                    f"Condition number {_factor(low, high)}: use fb.nystrom_cg, damping, or FuncID, which needs no H."
                )
            return f"Condition number {_factor(low, high)}: about {steps} steps of fb.cg gain a digit."
        if low < -1e-5 * abs(high):
            return f"H is indefinite here: fb.cg stops early; use damping above {-low:.1e}, fb.normal_cg, or FuncID."
        if low <= 1e-5 * high:
            return "H is singular to rounding: undamped AID is arbitrary, damped AID is biased; FuncID does not use H."
        return "H is positive definite: AID is well defined."
    if name == "outer_uncovered":
        if value > 0.1:
            return (
                "P and Q do not overlap: this share of the outer derivative is extrapolated; draw P nearer to Q, or "
                "give the adjoint fewer features (fb.linear_adjoint)."
            )
        return "The inner samples determine what the outer objective asks for."
    if name == "effective_samples":
        if value < 0.1:
            return (
                "A few inner samples carry the outer derivative: take a larger inner batch, or a ridge on the adjoint."
            )
        return "Many inner samples carry the outer derivative."
    return _starved(name, found)


def _starved(name: str, found: dict[str, float]) -> str:
    inner, adjoint = found["inner_error_relative"], found["adjoint_error_relative"]
    value = found[name]
    if value <= 0.01:
        return "This level has what it needs."
    if name == "inner_error_relative":
        starved = " It is the starved one." if inner > 3 * adjoint else ""
        return f"The inner level makes this part of the error: raise inner_steps, or use correction=1.0.{starved}"
    starved = " It is the starved one." if adjoint > 3 * inner else ""
    return f"The adjoint makes this part of the error: give it more steps, or less damping.{starved}"


def _factor(low: float, high: float) -> str:
    return f"{high / low:.0e}" if low > 0 else "infinity"
