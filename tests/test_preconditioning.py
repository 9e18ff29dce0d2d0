"""Preconditioned conjugate gradients: right answers, fewer products, and what may go wrong."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcbilevel as fb
from funcbilevel._linear_solvers import solve_linear


class Matrix(NamedTuple):
    H: np.ndarray
    b: np.ndarray
    condition: tuple[float, float]  # the range in which its condition number lies
    rank: int
    steps: int  # after the sketch


@functools.cache
def data_cleaning() -> Matrix:
    """Weighted softmax regression on samples near a subspace, with the small penalty that data cleaning has."""
    rng = np.random.default_rng(0)
    n, p, k = 300, 40, 3
    X = rng.normal(size=(n, p)) * np.arange(1, p + 1.0)[None] ** -1.5
    s = np.exp(rng.normal(size=(n, k)))
    s, w = s / s.sum(1, keepdims=True), rng.uniform(0.1, 1.0, n)
    C = w[:, None, None] * (np.eye(k) * s[:, :, None] - s[:, :, None] * s[:, None, :]) / n
    H = np.einsum("np,nkl,nq->pkql", X, C, X).reshape(p * k, p * k)
    return Matrix(H + 1e-6 * np.eye(p * k), rng.normal(size=p * k) @ H, (1e5, 1e6), 40, 60)


@functools.cache
def penalties() -> Matrix:
    """Logistic regression with a log-penalty for each feature."""
    rng = np.random.default_rng(1)
    n, p = 500, 100
    X = rng.normal(size=(n, p)) @ np.linalg.qr(rng.normal(size=(p, p)))[0] / np.arange(1, p + 1.0)
    s = 1 / (1 + np.exp(rng.normal(size=n)))
    H = X.T @ ((s * (1 - s))[:, None] * X) / n + np.diag(np.exp(rng.uniform(-14, 0, p)))
    return Matrix(H, rng.normal(size=p), (1e4, 1e5), 40, 60)


def error(solver: fb.LinearSolver, matrix: Matrix, dtype: Any) -> float:
    H, b = jnp.asarray(matrix.H, dtype), jnp.asarray(matrix.b, dtype)
    got = np.asarray(jax.jit(lambda b: solver.solve(lambda t: H @ t, b, None))(b), np.float64)
    exact = np.linalg.solve(matrix.H, matrix.b)
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("build", [data_cleaning, penalties])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_half_the_products_of_plain_conjugate_gradients(x64, build, dtype):
    matrix = build()
    eigenvalues = np.linalg.eigvalsh(matrix.H)
    low, high = matrix.condition
    assert low < eigenvalues[-1] / eigenvalues[0] < high
    products = matrix.rank + matrix.steps
    ours = error(fb.nystrom_cg(matrix.steps, matrix.rank, 0.0), matrix, dtype)
    plain = error(fb.cg(2 * products), matrix, dtype)
    print(build.__name__, dtype.__name__, eigenvalues[-1] / eigenvalues[0], products, ours, plain)
    # The condition number times the machine epsilon is what float32 leaves of a solution.
    assert ours < (1e-3 if dtype == jnp.float64 else 2e-2)
    assert ours < plain


def test_diagonal(x64):
    """A user's own preconditioner, where the diagonal is what is ill-conditioned."""
    matrix = penalties()
    scale = jnp.asarray(1 / np.diag(matrix.H))
    ours = error(fb.cg(60, preconditioner=lambda matvec, b: lambda r: scale * r), matrix, jnp.float64)
    assert ours < 1e-3
    assert ours < error(fb.cg(120), matrix, jnp.float64)


def ridge(omega: Any, theta: Any, batch: Any) -> jax.Array:
    x, y = batch
    values = x @ theta["w"] + theta["b"]
    return jnp.mean(jnp.cosh(values - y)) + jnp.sum(jnp.exp(omega["w"]) * theta["w"] ** 2) + theta["b"] ** 2


PROBLEM = fb.ParametricProblem(
    ridge, lambda omega, theta, batch: jnp.mean((batch[0] @ theta["w"] + theta["b"] - batch[1]) ** 2)
)
SOLVERS = {
    "nystrom": fb.nystrom_cg(5, 3, 1e-3),
    "nystrom-full": fb.nystrom_cg(2, 99, 1e-3),
    "diagonal": fb.cg(5, 1e-3, preconditioner=lambda matvec, b: lambda r: jax.tree.map(lambda r: 0.3 * r, r)),
}


def point(dtype: Any) -> tuple[Any, ...]:
    rng = np.random.default_rng(2)
    x, y = (jnp.asarray(rng.normal(size=s), dtype) for s in ((6, 4), 6))
    omega = {"w": jnp.asarray(rng.normal(size=4), dtype)}
    theta = {"b": jnp.asarray(0.2, dtype), "unseen": jnp.ones(2, dtype), "w": jnp.asarray(rng.normal(size=4), dtype)}
    return omega, theta, (x, y)


@pytest.mark.filterwarnings("ignore:.*unseen")
@pytest.mark.parametrize("name", SOLVERS)
def test_pytrees_second_derivatives_and_vmap(x64, name):
    """Second derivatives in forward mode."""
    omega, theta, batch = point(jnp.float64)

    def size(solver: fb.LinearSolver, omega: Any) -> jax.Array:
        h = fb.hypergradient(PROBLEM, None, fb.aid(solver, False), omega, theta, batch, batch)
        return jnp.sum(h.gradient["w"] ** 3)

    def all_of(solver: fb.LinearSolver) -> Any:
        both = {"w": jnp.stack([omega["w"], -omega["w"]])}
        along = functools.partial(jax.jvp, functools.partial(size, solver))
        return jax.jit(lambda: jax.vmap(lambda omega: along((omega,), (omega,)))(both))()

    for got, expected in zip(
        jax.tree.leaves(all_of(SOLVERS[name])), jax.tree.leaves(all_of(fb.cg(50, 1e-3))), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_stays_finite(dtype):
    omega, theta, batch = point(dtype)
    del theta["unseen"]
    h = jax.jit(
        lambda: fb.hypergradient(PROBLEM, None, fb.aid(fb.nystrom_cg(5, 3, 1e-3)), omega, theta, batch, batch)
    )()
    assert h.gradient["w"].dtype == dtype
    assert bool(h.metrics["linear_converged"])


@pytest.mark.parametrize(
    "eigenvalues", [np.zeros(4), np.array([1.0, 1e-30, 0.0, 0.0]), np.array([2.0, 1.0, 0.5, -1.0]), np.full(4, 1e-30)]
)
def test_singular_indefinite_and_tiny_matrices(eigenvalues):
    """Nothing that is not finite; and what `cg` would have found in the range of the matrix."""
    A = jnp.asarray(np.diag(eigenvalues), jnp.float32)
    rhs = jnp.where(jnp.diag(A) > 0, 1.0, 0.0)
    u = jax.jit(lambda b: fb.nystrom_cg(8, 3, 0.0).solve(lambda t: A @ t, b, None))(rhs)
    assert bool(jnp.all(jnp.isfinite(u)))
    if np.all(eigenvalues == 1e-30):
        np.testing.assert_allclose(u, 1e30, rtol=1e-3)


def test_bad_input():
    with pytest.raises(ValueError, match="rank"):
        fb.nystrom_cg(5, 0, 0.1)
    with pytest.raises(ValueError, match="damping"):
        fb.nystrom_cg(5, 2, -0.1)
    with pytest.raises(TypeError, match="preconditioner"):
        fb.cg(5, preconditioner=3.0)
    with pytest.raises(ValueError, match="preconditioner's result has shape"):
        fb.cg(5, preconditioner=lambda A, b: lambda r: r[:2]).solve(lambda t: t, jnp.ones(3), None)


@pytest.mark.parametrize("steps", [3, 10, 30])
@pytest.mark.parametrize("name", ["cg", "nystrom_cg", "normal_cg"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_warm_starts_over_rank_deficient_batches_stay_bounded(x64, name, steps, dtype):
    """What one batch's solution holds in the null space of its matrix is large for the next batch's matrix."""
    solver = {
        "cg": fb.cg(steps),
        "nystrom_cg": fb.nystrom_cg(steps, rank=2, damping=1e-3),
        "normal_cg": fb.normal_cg(steps),
    }[name]
    rng = np.random.default_rng(0)
    batches = jnp.asarray(rng.normal(size=(16, 4, 20)), dtype)  # matrices of rank 4 in 20 dimensions
    sides = jnp.asarray(rng.normal(size=(16, 20)), dtype)

    def sizes(warm: bool) -> Any:
        def solve(u: Any, i: Any) -> tuple[Any, Any]:
            X, b = batches[i % 16], sides[(7 * i) % 16]
            u, metrics, _ = solve_linear(solver, lambda t: X.T @ (X @ t) / 4, b, u if warm else None)
            return u, (jnp.linalg.norm(u), metrics["linear_residual"])

        return jax.lax.scan(solve, jnp.zeros(20, dtype), jnp.arange(400))[1]

    (cold, _), (warm, residual) = sizes(False), sizes(True)
    assert jnp.max(warm) < 30 * jnp.max(cold)
    assert jnp.median(warm[-16:]) < 3 * jnp.median(cold[-16:])  # nothing has grown
    assert jnp.max(residual) <= 1.0 + 1e-5


@pytest.mark.parametrize("steps", [10, 30, 100])
@pytest.mark.parametrize("warm", [False, True])
def test_a_batch_with_fewer_samples_than_parameters_gives_a_damped_solution(steps, warm):
    """What is not in the batch's range stays of the size of the population's solution, whatever the number of steps."""
    rng = np.random.default_rng(0)
    scale = np.sqrt(np.geomspace(0.1, 1.0, 100))
    b = rng.normal(size=100)
    X = jnp.asarray(rng.normal(size=(64, 100)) * scale, jnp.float32)
    start = jnp.asarray(0.3 * b, jnp.float32) if warm else None
    u, metrics, _ = jax.jit(lambda b: solve_linear(fb.cg(steps), lambda t: X.T @ (X @ t) / 64, b, start))(
        jnp.asarray(b, jnp.float32)
    )
    population = b / scale**2
    size = np.linalg.norm(population)
    assert np.linalg.norm(u) < 2.5 * size
    assert np.dot(u, population) > 0.7 * size * np.linalg.norm(u)
    assert metrics["linear_residual"] <= 1
    assert not metrics["linear_converged"]


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_the_damped_solution_is_that_of_the_damped_matrix(x64, preconditioned, warm):
    """Of a singular A with b outside of its range; against a dense solve of A + sigma P."""
    rng = np.random.default_rng(1)
    X, b = rng.normal(size=(5, 8)), rng.normal(size=8)
    A, P = X.T @ X / 5, np.diag(rng.uniform(0.5, 2.0, 8)) if preconditioned else np.eye(8)
    start = 0.1 * b if warm else np.zeros(8)
    r0 = b - A @ start
    z = np.linalg.solve(P, r0)
    sigma = 0.25 * (z @ A @ z) / (z @ r0)
    if warm and not preconditioned:
        sigma = max(sigma, 0.25 * (b @ A @ b) / (b @ b))
    exact = start + np.linalg.solve(A + sigma * P, r0)
    solver = fb.cg(60, preconditioner=(lambda matvec, b: lambda r: r / jnp.diag(P)) if preconditioned else None)
    u = jax.jit(lambda b: solver.solve(lambda t: A @ t, b, jnp.asarray(start) if warm else None))(jnp.asarray(b))
    # The steps end where those of the undamped system do.
    assert np.linalg.norm(u - exact) < 0.1 * np.linalg.norm(exact)


def test_a_warm_start_is_kept_only_where_it_is_better_than_zero():
    A, b = jnp.diag(jnp.array([1.0, 2.0, 5.0])), jnp.ones(3)
    exact = b / jnp.diag(A)

    def residual(start: Any) -> float:
        u, metrics, _ = solve_linear(fb.cg(1), lambda t: A @ t, b, start)
        assert jnp.isfinite(u).all()
        return float(metrics["linear_residual"])

    cold = residual(None)
    assert residual(1.1 * exact) < 0.2 * cold
    for start in (5.0 * exact, -exact, jnp.full(3, jnp.nan), jnp.array([1e30, 0.0, 0.0])):
        assert residual(start) == pytest.approx(cold, rel=1e-5)
