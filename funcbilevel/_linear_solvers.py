"""Solvers of linear systems A u = b, A given by its products: AID's, A = d^2_theta L_in + damping * I, and others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg as sparse
from jax.flatten_util import ravel_pytree

from funcbilevel._arguments import (
    check_at_least,
    check_callable,
    check_like,
    check_number,
    check_positive,
    check_shapes,
)
from funcbilevel._described import describe, described
from funcbilevel._fit import FitState
from funcbilevel._tree import (
    tree_add_scaled,
    tree_cast,
    tree_norm,
    tree_scaled,
    tree_size,
    tree_vdot,
    tree_where,
    working_dtype,
)
from funcbilevel._typing import LinearMap, Metrics, PyTree

if TYPE_CHECKING:
    import lineax


Preconditioner: TypeAlias = Callable[[LinearMap, PyTree], LinearMap]
"""`(matvec, rhs) -> (r -> z)`: a map near the inverse of the matrix, made once per solve."""


class LinearSolver(NamedTuple):
    """An approximate solver of A u = b for a symmetric A; for any square A, if it has `solve_general`.

    Attributes:
        solve: `(matvec, rhs, initial) -> solution`; all but `matvec` (A as a function) are pytrees like inner_params
            (None in place of leaves that the inner objective does not see), or `initial` is None: a start at zero,
            where A need not be applied. Their leaves have one dtype, the widest of those of inner_params and float32
            at least, and `rhs` is scaled to a size near one, so that no inner product under- or overflows.
        damping: delta >= 0, added to the diagonal before `solve` sees the matrix.
        description: the call that made it, for `repr`.
        solve_general: `(matvec, rhs) -> solution` for an A that need not be symmetric, from zero; None: the solver is
            for symmetric A alone.
    """

    solve: Callable[[LinearMap, PyTree, PyTree | None], PyTree]
    damping: float = 0.0
    description: str = ""
    solve_general: Callable[[LinearMap, PyTree], PyTree] | None = None

    def __repr__(self) -> str:
        return describe(self)


@described
def cg(
    num_steps: int, damping: float = 0.0, rtol: float = 0.0, preconditioner: Preconditioner | None = None
) -> LinearSolver:
    """Conjugate gradients: one Hessian product per step; for a positive definite Hessian.

    Where the curvature along a step's direction is negative, or zero to rounding, there is nothing to minimise, and the
    solver stops. Then, and where its last iterate is worse than zero, as on batches of fewer samples than parameters,
    it gives the least residual of the directions that are not flatter than a tenth of the steepest, as damping would:
    `linear_residual` is at most 1, and `linear_converged` in the metrics is false.

    Arguments:
        num_steps: largest number of steps K >= 1.
        damping: delta >= 0, added to the Hessian's diagonal.
        rtol: stops before `num_steps` once the relative residual is at most this (or is rounding error).
        preconditioner: `(matvec, rhs) -> (r -> z)`, called once per solve: from the products with A = H + delta I and
            the right-hand side it makes a symmetric positive definite linear map near the inverse of A, on pytrees like
            inner_params: a diagonal, a Kronecker-factored one, or that of `nystrom_cg`. What it closes over is held
            fixed from one outer step to the next; what depends on the current point it must find by products.

    Raises:
        ValueError: an argument is out of range; (at trace time) z is not like r.
        TypeError: `preconditioner` is not callable.

    Example:
        >>> estimator = fb.aid(fb.cg(20, damping=1e-3))
        >>> scale = jnp.array([1.0, 1e-4])  # about the inverse of the Hessian's diagonal
        >>> estimator = fb.aid(fb.cg(20, preconditioner=lambda matvec, rhs: lambda r: scale * r))

    References:
        Lorraine, Vicol, Duvenaud, AISTATS 2020, https://arxiv.org/abs/1911.02590 (implicit differentiation);
        Hestenes and Stiefel, 1952 (the method).
    """
    _check("cg", num_steps, damping, rtol)
    if preconditioner is not None:
        check_callable("cg", "preconditioner", preconditioner, "matvec, rhs")

    def solve(matvec: LinearMap, rhs: PyTree, initial: PyTree | None) -> PyTree:
        M = None if preconditioner is None else preconditioner(matvec, rhs)
        return conjugate_gradients(matvec, rhs, initial, num_steps, rtol, preconditioner=M)

    return LinearSolver(solve, damping)


@described
def nystrom_cg(num_steps: int, rank: int, damping: float, rtol: float = 0.0) -> LinearSolver:
    r"""Conjugate gradients on (H + delta I) u = b, preconditioned by a randomised low-rank approximation of H.

    With :math:`\Omega` an orthonormal basis of `rank` random directions, the Nystroem approximation and the
    preconditioner are

    .. math::
        \hat H = (H\Omega)(\Omega^\top H\Omega)^+(H\Omega)^\top = U \Lambda U^\top, \qquad
        P^{-1} = (\lambda_r + \delta)\, U (\Lambda + \delta I)^{-1} U^\top + (I - U U^\top),

    with :math:`\lambda_r` the smallest of the eigenvalues kept. The large eigenvalues of H are gone from the condition
    number: about :math:`(\lambda_r + \delta) / (\lambda_{min} + \delta)` is left. It pays where the spectrum of H falls
    over several decades and delta is small beside it; where few steps of `cg` do, it does not.

    One solve costs `rank` Hessian products made together (one batched product, `rank` vectors in memory), and one for
    each step. The directions are the same at every call (a fixed random key): the solver is deterministic, and warm
    starts see one preconditioner drift slowly. Directions in which H is negative are left to the conjugate gradients,
    which stop there as those of `cg`.

    Arguments:
        num_steps: largest number of steps K >= 1 after the sketch.
        rank: r >= 1, the number of directions; at most the number of inner parameters is used.
        damping: delta >= 0, added to the Hessian's diagonal.
        rtol: stops before `num_steps` once the relative residual is at most this (or is rounding error).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> estimator = fb.aid(fb.nystrom_cg(10, rank=20, damping=1e-4))

    References:
        Frangella, Tropp, Udell, *Randomized Nystroem preconditioning*, SIMAX 2023, https://arxiv.org/abs/2110.02820,
        algorithm 2.1 and eq. 5.3; Hataya and Yamada, *Nystroem method for accurate and scalable implicit
        differentiation*, AISTATS 2023, https://arxiv.org/abs/2302.09726 (for hypergradients).
    """
    _check("nystrom_cg", num_steps, damping, rtol)
    check_number("nystrom_cg", "rank", rank)

    def solve(matvec: LinearMap, rhs: PyTree, initial: PyTree | None) -> PyTree:
        M = _nystrom_preconditioner(matvec, rhs, rank, damping)
        return conjugate_gradients(matvec, rhs, initial, num_steps, rtol, preconditioner=M)

    return LinearSolver(solve, damping)


def _nystrom_preconditioner(matvec: LinearMap, like: PyTree, rank: int, damping: float) -> LinearMap:
    """P^-1 of `nystrom_cg` for the damped matrix; held fixed by differentiation."""
    zero, unravel = ravel_pytree(like)
    size, eps = zero.size, jnp.finfo(zero.dtype).eps
    directions = jax.random.normal(jax.random.key(0), (size, min(rank, size)), zero.dtype)
    Omega, _ = jnp.linalg.qr(directions)  # [m, r]
    products = jax.vmap(lambda t: ravel_pytree(matvec(unravel(t)))[0], in_axes=1, out_axes=1)(Omega)
    H_Omega = jax.lax.stop_gradient(products) - damping * Omega
    # H + shift I instead of H, so that what rounding makes of its zero eigenvalues stays positive.
    shift = eps * jnp.linalg.norm(H_Omega)
    Y = H_Omega + shift * Omega
    core, V = jnp.linalg.eigh(0.5 * (Omega.T @ Y + Y.T @ Omega))
    kept = core > 0.5 * shift
    B = Y @ (V * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, core, 1.0)), 0.0)[None])  # H_hat = B B'
    Q, R = jnp.linalg.qr(B)
    left, singular, _ = jnp.linalg.svd(R)
    U, eigenvalues = Q @ left, singular**2 - shift
    # What is zero to rounding is no direction to know about.
    kept = eigenvalues > 2.0 * shift
    least = jnp.min(jnp.where(kept, eigenvalues, jnp.inf))
    scale = jnp.where(kept, (least + damping) / jnp.where(kept, eigenvalues + damping, 1.0) - 1.0, 0.0)

    def precondition(r: PyTree) -> PyTree:
        flat, _ = ravel_pytree(r)
        return unravel(flat + U @ (scale * (U.T @ flat)))

    return precondition


@described
def normal_cg(num_steps: int, damping: float = 0.0, rtol: float = 0.0) -> LinearSolver:
    """Conjugate gradients on the normal equations A' A u = A' b: two Hessian products per step.

    For an indefinite Hessian, where `cg` may break down, and for an A that is not symmetric. The condition number is
    squared.

    Arguments:
        num_steps: largest number of steps K >= 1.
        damping: delta >= 0, added to the Hessian's diagonal (before the squaring).
        rtol: stops before `num_steps` once the relative residual of the normal equations is at most this.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> estimator = fb.aid(fb.normal_cg(20))
    """
    _check("normal_cg", num_steps, damping, rtol)

    def solve(matvec: LinearMap, rhs: PyTree, initial: PyTree | None) -> PyTree:
        return conjugate_gradients(lambda u: matvec(matvec(u)), matvec(rhs), initial, num_steps, rtol, power=2)

    def solve_general(matvec: LinearMap, rhs: PyTree) -> PyTree:
        transpose = jax.linear_transpose(matvec, rhs)
        normal, b = lambda u: transpose(matvec(u))[0], transpose(rhs)[0]
        return conjugate_gradients(normal, b, None, num_steps, rtol, 2, consistent=True)

    return LinearSolver(solve, damping, solve_general=solve_general)


@described
def gmres(num_steps: int, damping: float = 0.0, rtol: float = 0.0, max_restarts: int = 0) -> LinearSolver:
    """GMRES: one Hessian product per step, and a Krylov basis of `num_steps` vectors in memory.

    For systems that have a solution. Where there is none, as on minibatches of fewer samples than parameters, its
    answer fits the noise, the more so the more steps it makes (`linear_converged` is false); use damping, or `cg`.

    Arguments:
        num_steps: size K >= 1 of the Krylov space.
        damping: delta >= 0, added to the Hessian's diagonal.
        rtol: stops before `num_steps` once the relative residual is at most this (or is rounding error).
        max_restarts: how often it may begin anew from what it has, where K steps were not enough.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> estimator = fb.aid(fb.gmres(10, damping=1e-3))

    References:
        Saad and Schultz, 1986. The loop is `jax.scipy.sparse.linalg.gmres`.
    """
    _check("gmres", num_steps, damping, rtol)
    check_number("gmres", "max_restarts", max_restarts, 0)

    def solve(matvec: LinearMap, rhs: PyTree, initial: PyTree | None = None) -> PyTree:
        tol, runs = max(rtol, _rounding(rhs)), 1 + max_restarts
        solution, _ = sparse.gmres(
            matvec, rhs, initial, tol=tol, restart=num_steps, maxiter=runs, solve_method="incremental"
        )
        return solution

    return LinearSolver(solve, damping, solve_general=solve)


@described
def neumann(num_steps: int, step_size: float, damping: float = 0.0) -> LinearSolver:
    """The truncated Neumann series u = step_size * sum_{k<=K} (I - step_size A)^k b, from zero every time.

    It converges for 0 < step_size < 2 / largest eigenvalue of A; beyond that it diverges, which
    `linear_residual` > 1 and `linear_converged` in the metrics show.

    Arguments:
        num_steps: number K >= 1 of Hessian products.
        step_size: > 0.
        damping: delta >= 0, added to the Hessian's diagonal.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> estimator = fb.aid(fb.neumann(20, step_size=0.1))

    References:
        Lorraine, Vicol, Duvenaud, AISTATS 2020, https://arxiv.org/abs/1911.02590, section 3.
    """
    _check("neumann", num_steps, damping)
    check_positive("neumann", "step_size", step_size)

    def solve(matvec: LinearMap, rhs: PyTree, initial: PyTree | None) -> PyTree:
        del initial
        return _richardson(matvec, rhs, _scaled(rhs, step_size), num_steps, step_size)

    return LinearSolver(solve, damping, solve_general=lambda matvec, rhs: solve(matvec, rhs, None))


@described
def gradient_descent(num_steps: int, step_size: float, damping: float = 0.0) -> LinearSolver:
    """Gradient descent on 1/2 <u, A u> - <b, u>, from the previous outer step's solution when warm-started.

    Arguments:
        num_steps: number K >= 1 of steps, one Hessian product each.
        step_size: > 0; converges below 2 / largest eigenvalue of A.
        damping: delta >= 0, added to the Hessian's diagonal.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> estimator = fb.aid(fb.gradient_descent(20, step_size=0.1))

    References:
        Arbel and Mairal, *Amortized Implicit Differentiation for Stochastic Bilevel Optimization*, ICLR 2022,
        https://arxiv.org/abs/2111.14580
    """
    _check("gradient_descent", num_steps, damping)
    check_positive("gradient_descent", "step_size", step_size)

    def solve(matvec: LinearMap, rhs: PyTree, initial: PyTree | None) -> PyTree:
        if initial is None:
            return _richardson(matvec, rhs, _scaled(rhs, step_size), num_steps - 1, step_size)
        return _richardson(matvec, rhs, initial, num_steps, step_size)

    return LinearSolver(solve, damping, solve_general=lambda matvec, rhs: solve(matvec, rhs, None))


@described
def identity() -> LinearSolver:
    """u = b: the inverse Hessian replaced by the identity (T1-T2 of Luketina et al. 2016; often cheap and often wrong).

    Example:
        >>> estimator = fb.aid(fb.identity())

    References:
        Luketina, Berglund, Greff, Raiko, ICML 2016, https://arxiv.org/abs/1511.06727
    """
    return LinearSolver(lambda matvec, rhs, initial: rhs, solve_general=lambda matvec, rhs: rhs)


@described
def from_lineax(solver: lineax.AbstractLinearSolver[Any], damping: float = 0.0) -> LinearSolver:
    """Any lineax solver, for example `lineax.GMRES(rtol, atol)`.

    AID's operator is tagged positive semidefinite. An implicit layer's is only for the solvers that demand it,
    `lineax.CG` and `lineax.Cholesky`: with those its matrix must be symmetric.

    Arguments:
        solver: the lineax solver object. `fb.aid` accepts it bare, too; this function adds damping.
        damping: delta >= 0, added to the Hessian's diagonal.

    Raises:
        ValueError: `damping` is negative.
        TypeError: `solver` is not a lineax solver.

    Example:
        >>> import lineax
        >>> estimator = fb.aid(fb.from_lineax(lineax.GMRES(rtol=1e-5, atol=1e-5), damping=1e-3))
    """
    import lineax  # noqa: PLC0415

    check_at_least("from_lineax", "damping", damping, 0.0)
    if not isinstance(solver, lineax.AbstractLinearSolver):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"from_lineax: solver must be a lineax solver object, got {type(solver).__name__} {solver!r}.")

    def solve_tagged(tags: Any, matvec: LinearMap, rhs: PyTree, initial: PyTree | None = None) -> PyTree:
        operator = lineax.FunctionLinearOperator(matvec, jax.eval_shape(lambda: rhs), tags=tags)
        # throw=False: a failed solve shows in the metrics and cannot stop a compiled loop.
        options = {} if initial is None else {"y0": initial}
        return lineax.linear_solve(operator, rhs, solver, options=options, throw=False).value

    solve = partial(solve_tagged, lineax.positive_semidefinite_tag)
    demands_tag = isinstance(solver, (lineax.CG, lineax.Cholesky))
    return LinearSolver(solve, damping, solve_general=None if demands_tag else partial(solve_tagged, ()))


def as_linear_solver(solver: Any, function: str = "aid") -> LinearSolver:
    """`solver`, or a bare lineax solver made into a `LinearSolver`."""
    if isinstance(solver, LinearSolver):
        check_callable(function, "linear_solver.solve", solver.solve, "matvec, rhs, initial")
        if solver.solve_general is not None:
            check_callable(function, "linear_solver.solve_general", solver.solve_general, "matvec, rhs")
        check_at_least(function, "linear_solver.damping", solver.damping, 0.0)
        return solver
    if any(cls.__module__.partition(".")[0] == "lineax" for cls in type(solver).__mro__):
        return from_lineax(solver)
    raise TypeError(
        f"{function}: linear_solver must be one of fb.cg, fb.normal_cg, fb.gmres, fb.neumann, fb.gradient_descent, "
        f"fb.identity (called with their arguments) or a lineax solver object, got {solver!r}."
    )


def solution_start(_key: Any, _problem: Any, _model: Any, inner: FitState, _batch: Any, /) -> PyTree:
    """`init` of an estimator that carries a linear system's solution, like inner_params: zero, in `working_dtype`."""
    dtype = working_dtype(inner.params)
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype), inner.params)


def solve_linear(
    solver: LinearSolver, matvec: LinearMap, rhs: PyTree, initial: PyTree | None
) -> tuple[PyTree, Metrics, jax.Array]:
    """The solution of (A + damping) u = b in `working_dtype`, its `linear_metrics`, and |A u| / |u| (0 where u is).

    NaN, where A or b holds NaN.
    The solver gets b scaled to a size near one, by a power of two, which changes no digit of the result.
    """
    dtype, size = working_dtype(rhs), tree_size(rhs)

    def damped(u: PyTree) -> PyTree:
        return tree_add_scaled(in_working_dtype(matvec, rhs)(u), solver.damping, u)

    b = tree_scaled(tree_cast(rhs, dtype), 1.0 / size)
    start = None if initial is None else tree_scaled(tree_cast(initial, dtype), 1.0 / size)
    u = _solution_like(b, solver.solve(damped, b, start))
    Au = rescaled(matvec, rhs)(u)
    norm = tree_norm(u)
    curvature = tree_norm(Au) / jnp.where(norm > 0, norm, 1.0)
    metrics = linear_metrics(tree_add_scaled(Au, solver.damping, u), b, u, rhs)
    u = nan_unless(~jnp.isnan(metrics["linear_residual"]), tree_scaled(u, size))
    return u, metrics, curvature


def solve_implicit(solver: LinearSolver, matvec: LinearMap, rhs: PyTree) -> PyTree:
    """The solution of (A + damping) u = b, differentiable in A and b in both modes and as often as one likes.

    As of the exact solution: each derivative is another solve, in reverse mode with the transpose of A. A solver for
    symmetric A gets -A where A is negative along b. NaN, where A or b holds NaN.
    """

    def solve(matvec: LinearMap, rhs: PyTree) -> PyTree:
        size = tree_size(rhs)
        A = in_working_dtype(matvec, rhs)
        b = tree_scaled(tree_cast(rhs, working_dtype(rhs)), 1.0 / size)
        product = tree_vdot(b, A(b))
        sign = jnp.where(product < 0, -1.0, 1.0) if solver.solve_general is None else 1.0

        def damped(u: PyTree) -> PyTree:
            return tree_add_scaled(_scaled(A(u), sign), solver.damping, u)

        if solver.solve_general is None:
            u = solver.solve(damped, _scaled(b, sign), None)
        else:
            u = solver.solve_general(damped, b)
        u = _solution_like(b, u)
        return tree_cast(nan_unless(~jnp.isnan(product), tree_scaled(u, size)), rhs)

    return jax.lax.custom_linear_solve(matvec, rhs, solve, solve, symmetric=solver.solve_general is None)


def _solution_like(rhs: PyTree, solution: PyTree) -> PyTree:
    """`solution`, if it is like `rhs`: a solver may be the user's own."""
    check_shapes("LinearSolver", "the solution", solution, rhs, "return u of A u = rhs, a pytree like rhs.")
    return tree_cast(jax.tree.map(jnp.asarray, solution), rhs)


def in_working_dtype(f: LinearMap, like: PyTree) -> LinearMap:
    """f, which takes leaves of the dtypes of `like`, as a map on trees in `working_dtype`, with results that wide."""
    dtype = working_dtype(like)
    if not _is_narrow(like):
        return f

    def wide(t: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, dtype)), f(tree_cast(t, like)))

    return wide


def rescaled(f: LinearMap, like: PyTree) -> LinearMap:
    """`in_working_dtype` with an argument brought near one before and the result back after.

    Leaves of `like` in half precision neither under- nor overflow so. (JAX cannot transpose this map.)
    """
    wide = in_working_dtype(f, like)
    if not _is_narrow(like):
        return wide

    def near_one(t: PyTree) -> PyTree:
        size = tree_size(t)
        return tree_scaled(wide(tree_scaled(t, 1.0 / size)), size)

    return near_one


def _is_narrow(tree: PyTree) -> bool:
    return any(x.dtype != working_dtype(tree) for x in jax.tree.leaves(tree))


def nan_unless(condition: jax.Array, tree: PyTree) -> PyTree:
    """`tree`, or NaN everywhere: a solver that met NaN must not answer with the number it started from."""
    return jax.tree.map(lambda x: jnp.where(condition, x, jnp.nan), tree)


def linear_metrics(product: PyTree, rhs: PyTree, solution: PyTree, like: PyTree = None) -> Metrics:
    """How good a solution u of A u = b is, from the product A u.

    `linear_residual` is |b - A u| / |b|; `linear_converged` whether it is at most the square root of the machine
    epsilon of the narrowest dtype of `like` (or of b), in which A is computed; `linear_curvature` is <u, A u> / <u, u>,
    negative only if A is not positive semidefinite.
    """
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(rhs if like is None else like))
    norm, norm_squared = tree_norm(rhs), tree_vdot(solution, solution)
    residual = tree_norm(tree_add_scaled(rhs, -1.0, product)) / jnp.where(norm > 0, norm, 1.0)
    return {
        "linear_residual": residual,
        "linear_converged": residual <= eps**0.5,
        "linear_curvature": tree_vdot(solution, product) / jnp.where(norm_squared > 0, norm_squared, 1.0),
    }


class CGState(NamedTuple):
    """Of conjugate gradients, after `steps` steps.

    Attributes:
        u: the solution so far.
        r: its residual b - A u.
        p: the next direction.
        rr: <r, r>.
        rz: <r, z>, z the preconditioned residual.
        smooth, s: an average of the solutions as long as they were `steep`, and its residual.
        weight: 1 / (the sum of 1 / rz over the solutions in the average).
        largest: the largest curvature <p, A p> / <p, p> along a direction so far.
        positive: whether the last direction's was positive; if not, its step was not made.
        steep: whether every direction's was a tenth of the largest at least.
        safe: whether every direction's was well above rounding error.
    """

    steps: jax.Array
    u: PyTree
    r: PyTree
    p: PyTree
    rr: jax.Array
    rz: jax.Array
    smooth: PyTree
    s: PyTree
    weight: jax.Array
    largest: jax.Array
    positive: jax.Array
    steep: jax.Array
    safe: jax.Array


_STEEP = 0.1
"""Of the largest curvature: what is flatter has no part in the answer where there is no solution."""


def conjugate_gradients(
    matvec: LinearMap,
    rhs: PyTree,
    initial: PyTree | None,
    num_steps: int,
    rtol: float = 0.0,
    power: int = 1,
    preconditioner: LinearMap | None = None,
    consistent: bool = False,
) -> PyTree:
    """At most `num_steps` steps; stops where the residual is rounding error, so that nothing divides by zero.

    It also stops at a direction of negative curvature, or of one that is rounding error beside the largest so far (to
    the power of `power`, for an A that is one of a matrix): there A is not positive definite, and what the last
    iterates minimise has no minimum. Then, and where the last residual is larger than |b| (than |b| / 10, after a
    direction whose curvature was nearly rounding error), the iterates grow without limit: A is singular and b not in
    its range, as for the Hessian of a batch with fewer samples than parameters. The answer is then the average of the
    first iterates with weights 1 / <r, z> (Zhou and Walker, SIAM J. Sci. Comput. 1994), up to the first direction that
    is flatter than a tenth of the steepest so far. As the residuals are orthogonal, it has the least residual of all
    averages, that of MINRES, which falls in every step and never exceeds that of zero or of the start; and the end
    before flat directions does what damping would: on noisy batches their large steps are noise.

    Where the system is known to be `consistent`, the last iterate is the answer in any case: its error falls in every
    step, whatever its residual does.

    A start with a larger residual than zero's is dropped. What one batch's solution holds in the null space of its
    matrix is large for the next batch's, and would grow from batch to batch without limit.

    A product per step, and one more for the residual of a start that is not zero. (`jax.scipy.sparse.linalg.cg` makes
    that one always, which is a tenth of the time with ten steps.) The derivative is that of the exact solution.
    """
    tol = max(rtol, _rounding(rhs))
    negligible = float(jnp.finfo(working_dtype(rhs)).eps) ** power

    def preconditioned(r: PyTree, rr: jax.Array) -> tuple[PyTree, jax.Array]:
        """z, and <r, z>."""
        if preconditioner is None:
            return r, rr
        z = preconditioner(r)
        check_like("cg", "the preconditioner's result", z, r, "it must map pytrees like inner_params to such.")
        return z, tree_vdot(r, z)

    def loop(matvec: LinearMap, b: PyTree) -> PyTree:
        zero = jax.tree.map(jnp.zeros_like, b)
        bb = tree_vdot(b, b)
        least = tol**2 * bb

        # A start that is not zero is reached from zero by a step of length one along it: the same loop makes its
        # product, and the compiled program holds A once.
        def running(state: CGState) -> jax.Array:
            worthwhile = state.rr > least if initial is None else (state.rr > least) | (state.steps < 0)
            return (state.steps < num_steps) & worthwhile & state.positive

        def step(state: CGState) -> CGState:
            steps, u, r, p, _, rz, smooth, s, weight, largest, _, steep, safe = state
            to_start = jnp.asarray(False) if initial is None else steps < 0
            Ap = matvec(p)
            pAp, pp = tree_vdot(p, Ap), tree_vdot(p, p)
            largest = jnp.maximum(largest, pAp / pp)
            positive = pAp > negligible * largest * pp
            # A step along which A is nearly rounding error goes far, and what it gains is an accident.
            safe = safe & (to_start | (pAp > negligible**0.5 * largest * pp))
            steep = steep & (to_start | (pAp > _STEEP * largest * pp))
            alpha = jnp.where(positive, rz / jnp.where(positive, pAp, 1.0), 0.0)
            positive, alpha, largest = (
                positive | to_start,
                jnp.where(to_start, 1.0, alpha),
                jnp.where(to_start, 0.0, largest),
            )
            there = tree_add_scaled(u, alpha, p), tree_add_scaled(r, -alpha, Ap)
            rr = tree_vdot(there[1], there[1])
            worse = to_start & ~(rr <= bb)
            (u, r), rr = tree_where(worse, (u, r), there), jnp.where(worse, bb, rr)
            z, after = preconditioned(r, rr)
            p = tree_where(to_start, z, tree_add_scaled(z, after / rz, p))
            joint = jnp.where(to_start, after, weight * (after / (weight + after)))
            eta = jnp.where(to_start, 1.0, jnp.where(steep & (after > 0), joint / after, 0.0))
            smooth, s = (
                tree_add_scaled(old, eta, tree_add_scaled(new, -1.0, old)) for old, new in ((smooth, u), (s, r))
            )
            weight = jnp.where(eta > 0, joint, weight)
            return CGState(
                steps + 1, u, r, p, rr, after, smooth, s, weight, largest, positive & jnp.isfinite(after), steep, safe
            )

        z, rz = preconditioned(b, bb)
        first, p = (0, z) if initial is None else (-1, initial)
        start = CGState(
            jnp.asarray(first),
            zero,
            b,
            p,
            bb,
            rz,
            zero,
            b,
            rz,
            jnp.zeros_like(bb),
            jnp.isfinite(rz),
            jnp.asarray(True),
            jnp.asarray(True),
        )
        end = jax.lax.while_loop(running, step, start)
        if consistent:
            return end.u
        average = tree_where(tree_vdot(end.s, end.s) <= bb, end.smooth, zero)  # rounding, or a preconditioner
        sound = end.positive & (end.rr <= jnp.where(end.safe, 1.0, 0.01) * bb)
        return tree_where(sound, end.u, average)

    return jax.lax.custom_linear_solve(matvec, rhs, loop, symmetric=True)


def _rounding(tree: PyTree) -> float:
    """A relative residual that is attainable: asked for less, conjugate gradients go on and may blow up."""
    return 8.0 * float(jnp.finfo(working_dtype(tree)).eps)


def _scaled(tree: PyTree, scale: Any) -> PyTree:
    return jax.tree.map(lambda x: jnp.asarray(scale, x.dtype) * x, tree)


def _richardson(matvec: LinearMap, rhs: PyTree, start: PyTree, num_steps: int, step_size: float) -> PyTree:
    """u <- u + step_size * (b - A u), `num_steps` times."""

    def step(u: PyTree, _: None) -> tuple[PyTree, None]:
        return tree_add_scaled(u, step_size, tree_add_scaled(rhs, -1.0, matvec(u))), None

    solution, _ = jax.lax.scan(step, start, None, length=num_steps)
    return solution


def _check(function: str, num_steps: int, damping: float, rtol: float = 0.0) -> None:
    check_number(function, "num_steps", num_steps)
    check_at_least(function, "damping", damping, 0.0)
    check_at_least(function, "rtol", rtol, 0.0)
