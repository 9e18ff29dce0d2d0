"""Random problems, shapes and dtypes against formulas written out in NumPy.

Hypothesis draws the numbers freely; array shapes come from the short lists below, so that few programs are compiled.
Draws are the same in every run; HYPOTHESIS_PROFILE=random makes them new ones.
"""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import funcbilevel as fb

Q = 3  # outer parameters: {"u": [2], "s": []}
UNROLLED = 3


class Shape(NamedTuple):
    """Sample sizes of the two batches, number of features, and the prediction's leaves without their batch axis."""

    n_P: int
    n_Q: int
    p: int
    leaves: Any


SHAPES: dict[str, Shape] = {
    "scalar": Shape(9, 7, 3, np.zeros(())),
    "vector": Shape(9, 9, 2, np.zeros(3)),
    "dict": Shape(8, 5, 3, {"a": np.zeros(2), "b": [np.zeros(())]}),
    "matrices": Shape(12, 12, 4, (np.zeros(1), np.zeros((2, 2)))),
    "wide": Shape(3, 4, 6, np.zeros(2)),
    "wide-dict": Shape(4, 4, 5, {"a": np.zeros(()), "b": np.zeros(1)}),
}
WIDE = ["wide", "wide-dict"]  # fewer samples than features
TALL = [name for name in SHAPES if name not in WIDE]


class Problem(NamedTuple):
    """The free numbers of a problem.

    With V [n, k] the prediction flattened, T = tanh(A omega) its target and r = V - T,

        L_in  = mean_i w_i (sum_j (alpha r_ij^2 / 2 + beta log cosh r_ij) + kappa (sum_j r_ij)^2 / 2) - <tilt_i, V_i>
        L_out = mean_i q_i sum_j log cosh(V_ij - y_ij) + sum c omega^2 .

    The tilt makes `theta` an exact inner solution at omega, whatever it is; so what follows is the exact gradient
    of F over the linear class (linear adjoint, AID) and over all functions (pointwise adjoint, where P = Q).
    """

    phi_P: np.ndarray  # [n_P, p]
    phi_Q: np.ndarray  # [n_Q, p]
    A: np.ndarray  # [n_P, k, q]
    w: np.ndarray  # [n_P]
    tilt: np.ndarray  # [n_P, k]
    curvature: np.ndarray  # [3]: alpha, beta, kappa
    q: np.ndarray  # [n_Q]
    y: np.ndarray  # [n_Q, k]
    c: np.ndarray  # [q]
    omega: np.ndarray  # [q]
    theta: np.ndarray  # [p, k]
    xi: np.ndarray  # [p, k], where the learned adjoint starts
    ridge: np.ndarray  # []
    rate: np.ndarray  # [], of the gradient steps on theta and xi


def draw(
    seed: int, shape: str, dtype: Any, same_inputs: bool, scale: float, curvature: tuple[float, ...], ridge: float
) -> tuple[str, Problem]:
    """The shape's name and a problem in `dtype`, its tilt included."""
    rng = np.random.default_rng(seed)
    n_P, n_Q, p, leaves = SHAPES[shape]
    k = sum(leaf.size for leaf in jax.tree.leaves(leaves))
    phi_P = scale * rng.normal(size=(n_P, p))
    problem = Problem(
        phi_P=phi_P,
        phi_Q=phi_P if same_inputs and n_P == n_Q else scale * (rng.normal(size=(n_Q, p)) + 0.5),
        A=rng.normal(size=(n_P, k, Q)),
        w=rng.uniform(0.2, 3.0, n_P),
        tilt=np.zeros((n_P, k)),
        curvature=np.asarray(curvature),
        q=rng.uniform(0.2, 3.0, n_Q),
        y=rng.normal(size=(n_Q, k)),
        c=rng.normal(size=Q),
        omega=0.5 * rng.normal(size=Q),
        theta=rng.normal(size=(p, k)) / scale,
        xi=rng.normal(size=(p, k)) / scale,
        ridge=np.asarray(ridge * scale**2),
        rate=np.asarray(0.02 / scale**2),
    )
    problem = Problem(*(x.astype(dtype) for x in problem))
    exact = widened(problem)
    return shape, problem._replace(tilt=(n_P * inner_gradient(exact, exact.theta)).astype(dtype))


def widened(problem: Problem) -> Problem:
    return Problem(*(x.astype(np.float64) for x in problem))


# The same derivatives as the library's, in NumPy: residuals are [n, k], J = d T / d omega is [n, k, q].


def residual(x: Problem, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    T = np.tanh(x.A @ x.omega)
    return x.phi_P @ theta - T, (1.0 - T**2)[:, :, None] * x.A


def inner_gradient(x: Problem, theta: np.ndarray) -> np.ndarray:
    """d_v L_in [n, k]."""
    alpha, beta, kappa = x.curvature
    r, _ = residual(x, theta)
    slope = alpha * r + beta * np.tanh(r) + kappa * r.sum(axis=1, keepdims=True)
    return (x.w[:, None] * slope - x.tilt) / len(x.w)


def blocks(x: Problem, theta: np.ndarray) -> np.ndarray:
    """C [n, k, k]; also -d_T d_v L_in."""
    alpha, beta, kappa = x.curvature
    r, _ = residual(x, theta)
    k = r.shape[1]
    own = (alpha + beta / np.cosh(r) ** 2)[:, :, None] * np.eye(k)
    return (x.w / len(x.w))[:, None, None] * (own + kappa * np.ones((k, k)))


def outer_derivative(x: Problem, theta: np.ndarray) -> np.ndarray:
    """d [n, k]."""
    return (x.q / len(x.q))[:, None] * np.tanh(x.phi_Q @ theta - x.y)


def explicit_part(x: Problem) -> np.ndarray:
    return 2.0 * x.c * x.omega


def implicit_part(x: Problem, a: np.ndarray) -> tuple[np.ndarray, float]:
    """d_omega <d_v L_in, a> for a [n, k], and the size of the terms that it is the sum of."""
    _, J = residual(x, x.theta)
    C = blocks(x, x.theta)
    size = np.linalg.norm(np.einsum("nij,nj,niq->q", abs(C), abs(a), abs(J)))
    return -np.einsum("nij,nj,niq->q", C, a, J), float(size)


def dense_hessian(x: Problem) -> np.ndarray:
    """d^2_theta L_in + ridge, [p k, p k]."""
    H = np.einsum("np,nij,nr->pirj", x.phi_P, blocks(x, x.theta), x.phi_P)
    size = x.theta.size
    return H.reshape(size, size) + x.ridge * np.eye(size)


def class_adjoint(x: Problem) -> np.ndarray:
    """a on the inner batch in the span of the features: W = -(H + ridge)^+ Phi_Q' d."""
    g = x.phi_Q.T @ outer_derivative(x, x.theta)
    W = -np.linalg.pinv(dense_hessian(x), rcond=1e-9, hermitian=True) @ g.ravel()
    return x.phi_P @ W.reshape(g.shape)


def pointwise_adjoint(x: Problem) -> np.ndarray:
    return -np.linalg.solve(blocks(x, x.theta), outer_derivative(x, x.theta)[:, :, None])[:, :, 0]


def adjoint_objective(x: Problem) -> tuple[float, np.ndarray]:
    """L_adj(xi), with its 1/2, and its gradient [p, k]."""
    a_P, a_Q, d = x.phi_P @ x.xi, x.phi_Q @ x.xi, outer_derivative(x, x.theta)
    Ca = np.einsum("nij,nj->ni", blocks(x, x.theta), a_P)
    return 0.5 * np.sum(a_P * Ca) + np.sum(a_Q * d), x.phi_P.T @ Ca + x.phi_Q.T @ d


def unrolled(x: Problem) -> tuple[np.ndarray, np.ndarray]:
    """theta after gradient steps from xi, and the implicit part d L_out / d omega through them by forward tangents."""
    theta, tangent = x.xi, np.zeros((*x.xi.shape, Q))
    _, J = residual(x, theta)
    for _ in range(UNROLLED):
        C = blocks(x, theta)
        moved = np.einsum("nij,njq->niq", C, np.einsum("np,pjq->njq", x.phi_P, tangent) - J)
        theta = theta - x.rate * x.phi_P.T @ inner_gradient(x, theta)
        tangent = tangent - x.rate * np.einsum("np,niq->piq", x.phi_P, moved)
    return theta, np.einsum("pi,piq->q", x.phi_Q.T @ outer_derivative(x, theta), tangent)


# The library's side.


def as_prediction(rows: jax.Array, leaves: Any) -> Any:
    """[n, k] as a pytree with those leaves."""
    sizes = [leaf.size for leaf in jax.tree.leaves(leaves)]
    parts = jnp.split(rows, np.cumsum(sizes)[:-1], axis=1)
    tree = jax.tree.unflatten(jax.tree.structure(leaves), parts)
    return jax.tree.map(lambda part, leaf: part.reshape(len(rows), *leaf.shape), tree, leaves)


def as_rows(prediction: Any) -> jax.Array:
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(prediction)], axis=1)


def flat(omega: Any) -> jax.Array:
    return jnp.concatenate([omega["u"], omega["s"][None]])


def log_cosh(r: jax.Array) -> jax.Array:
    return jnp.logaddexp(r, -r) - float(np.log(2.0))


def inner_objective(omega: Any, v: Any, batch: Any) -> jax.Array:
    _, x = batch
    V = as_rows(v)
    r = V - jnp.tanh(jnp.tensordot(x.A, flat(omega), 1))
    alpha, beta, kappa = x.curvature
    terms = jnp.sum(0.5 * alpha * r**2 + beta * log_cosh(r), axis=1) + 0.5 * kappa * jnp.sum(r, axis=1) ** 2
    return jnp.mean(x.w * terms) - jnp.mean(jnp.sum(x.tilt * V, axis=1))


def outer_objective(omega: Any, v: Any, batch: Any) -> jax.Array:
    _, x = batch
    fit = jnp.sum(log_cosh(as_rows(v) - x.y), axis=1)
    return jnp.mean(x.q * fit) + jnp.sum(x.c * flat(omega) ** 2)


@functools.cache
def library(shape: str) -> Any:
    """problem -> name -> hypergradient by the library; compiled once for each shape and dtype."""
    n_P, n_Q, _, leaves = SHAPES[shape]
    problem = fb.FunctionalProblem(inner_objective, outer_objective)

    @jax.jit
    def hypergradients(x: Problem) -> dict[str, fb.Hypergradient]:
        descent = optax.sgd(x.rate)
        model = fb.from_function(
            lambda key, phi: jnp.zeros_like(x.theta), lambda theta, phi: as_prediction(phi @ theta, leaves)
        )

        def by(estimator: fb.Estimator, theta: jax.Array = x.theta, state: Any = None) -> fb.Hypergradient:
            omega = {"u": x.omega[:2], "s": x.omega[2]}
            batches = (x.phi_P, x), (x.phi_Q, x)
            return fb.hypergradient(
                problem, model, estimator, omega, theta, *batches, inner_optimizer=descent, state=state
            )

        started = fb.FitState(x.xi, descent.init(x.xi), ())
        found = {
            "linear": by(fb.funcid(fb.linear_adjoint(lambda theta, phi: phi, x.ridge))),
            "learned": by(fb.funcid(fb.learned_adjoint(descent, 1)), state=started),
            "aid": by(fb.aid(fb.cg(200, damping=x.ridge))),
            "itd": by(fb.itd(UNROLLED), theta=x.xi),
            "itd-forward": by(fb.itd(UNROLLED, mode="forward"), theta=x.xi),
        }
        return found | ({"pointwise": by(fb.funcid(fb.pointwise_adjoint()))} if n_P == n_Q else {})

    return hypergradients


# The comparison.


SETTINGS = settings(
    deadline=None,
    database=None,
    derandomize=os.environ.get("HYPOTHESIS_PROFILE") != "random",
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([np.float64, np.float32])


def problems(shapes: list[str], ridges: list[float]) -> st.SearchStrategy:
    return st.builds(
        draw,
        SEEDS,
        st.sampled_from(shapes),
        DTYPES,
        same_inputs=st.booleans(),
        scale=st.sampled_from([0.01, 1.0, 30.0]),
        curvature=st.sampled_from([(1.0, 0.0, 0.0), (0.2, 1.0, 0.0), (0.5, 0.0, 1.0), (0.3, 0.6, 0.4)]),
        ridge=st.sampled_from(ridges),
    )


def flat_parts(h: fb.Hypergradient) -> list[np.ndarray]:
    return [np.asarray(flat(part), np.float64) for part in (h.gradient, h.explicit, h.implicit)]


def assert_adjoint(h: fb.Hypergradient, x: Problem, a: np.ndarray, tolerance: float) -> None:
    """`h` is the hypergradient that the adjoint a makes, with explicit and implicit parts apart."""
    gradient, explicit, implicit = flat_parts(h)
    expected, size = implicit_part(x, a)
    np.testing.assert_allclose(explicit, explicit_part(x), rtol=1e-6 if h.outer_value.dtype == np.float32 else 1e-12)
    np.testing.assert_allclose(implicit, expected, rtol=0, atol=tolerance * size)
    np.testing.assert_allclose(
        gradient, explicit + expected, rtol=0, atol=tolerance * (size + np.linalg.norm(explicit))
    )


def accuracy(dtype: Any, condition: float) -> float:
    """1e-8 in float64; in float32 what the system's condition number leaves."""
    return 1e-8 if dtype == np.float64 else 50 * np.finfo(dtype).eps * condition


def assert_kept(found: dict[str, fb.Hypergradient], dtype: Any) -> None:
    for name, h in found.items():
        kinds = {leaf.dtype for leaf in jax.tree.leaves((h.gradient, h.explicit, h.implicit, h.outer_value))}
        assert kinds == {np.dtype(dtype)}, name
        assert bool(h.metrics["adjoint_finite"]), name


@settings(SETTINGS, max_examples=120)
@given(problems(TALL, [0.0, 1e-3, 0.1, 1.0]))
def test_random_functional_problem(x64, drawn):
    shape, problem = drawn
    dtype, x = problem.w.dtype, widened(problem)
    found = library(shape)(problem)
    assert_kept(found, dtype)

    tolerance = accuracy(dtype, np.linalg.cond(dense_hessian(x)))
    assert_adjoint(found["linear"], x, class_adjoint(x), tolerance)
    assert_adjoint(found["aid"], x, class_adjoint(x), tolerance)
    if "pointwise" in found:
        condition = np.linalg.cond(blocks(x, x.theta)).max()
        assert_adjoint(found["pointwise"], x, pointwise_adjoint(x), accuracy(dtype, condition))

    value, slope = adjoint_objective(x)
    xi = x.xi - x.rate * slope
    rounding = 1e-12 if dtype == np.float64 else 1e-4
    np.testing.assert_allclose(found["learned"].metrics["adjoint_objective"], value, rtol=rounding, atol=rounding)
    np.testing.assert_allclose(found["learned"].state.params, xi, rtol=rounding, atol=rounding * abs(xi).max())
    assert_adjoint(found["learned"], x, x.phi_P @ xi, rounding)

    _, implicit = unrolled(x)
    for name in ("itd", "itd-forward"):
        got = flat_parts(found[name])
        np.testing.assert_allclose(got[2], implicit, rtol=0, atol=rounding * (1.0 + np.linalg.norm(implicit)))
        np.testing.assert_allclose(got[0], got[1] + got[2], rtol=1e-5, atol=1e-5 * abs(got[2]).max())


@settings(SETTINGS, max_examples=60)
@given(problems(WIDE, [0.0, 0.0, 0.01, 1.0]))
def test_random_functional_problem_with_fewer_samples_than_features(x64, drawn):
    """Without ridge the solution of least norm, and never NaN; with ridge AID's damping says the same."""
    shape, problem = drawn
    dtype, x = problem.w.dtype, widened(problem)
    found = library(shape)(problem)
    assert_kept({"linear": found["linear"]}, dtype)

    eigenvalues = np.linalg.eigvalsh(dense_hessian(x))
    condition = eigenvalues[-1] / eigenvalues[eigenvalues > 1e-9 * eigenvalues[-1]][0]
    tolerance = accuracy(dtype, condition)
    assert_adjoint(found["linear"], x, class_adjoint(x), tolerance)
    if x.ridge > 0:
        assert_adjoint(found["aid"], x, class_adjoint(x), tolerance)


@functools.cache
def linear_systems(size: int) -> Any:
    """L_in = <theta, H theta> / 2 - <theta, B omega> and L_out = |theta - y|^2 / 2 by each solver."""
    solvers = {
        "cg": fb.cg(4 * size),
        "normal-cg": fb.normal_cg(8 * size),
        "gmres": fb.gmres(size),
        "lineax-lu": lineax.LU(),
    }

    @jax.jit
    def hypergradients(H: jax.Array, B: jax.Array, y: jax.Array, omega: jax.Array, theta: jax.Array) -> Any:
        problem = fb.ParametricProblem(
            lambda omega, theta, batch: 0.5 * theta @ H @ theta - theta @ B @ omega,
            lambda omega, theta, batch: 0.5 * jnp.sum((theta - y) ** 2),
        )
        return {
            name: fb.hypergradient(problem, None, fb.aid(solver), omega, theta, None, None)
            for name, solver in solvers.items()
        }

    return hypergradients


@settings(SETTINGS, max_examples=60)
@given(SEEDS, DTYPES, st.sampled_from([1, 3, 6]), st.sampled_from([1e-3, 1.0, 1e3]), st.booleans())
def test_random_linear_system(x64, seed, dtype, size, scale, indefinite):
    """Every solver of AID on a dense Hessian of condition at most 30; the indefinite ones without plain CG."""
    rng = np.random.default_rng(seed)
    U, _ = np.linalg.qr(rng.normal(size=(size, size)))
    eigenvalues = (
        scale * np.exp(rng.uniform(0.0, np.log(30.0), size)) * (rng.choice([-1, 1], size) if indefinite else 1)
    )
    H = (U * eigenvalues) @ U.T
    B, y, omega = rng.normal(size=(size, 2)), rng.normal(size=size), rng.normal(size=2)
    H, B, y, omega = ((x + x.T) / 2 if x is H else x for x in (H, B, y, omega))
    arrays = [x.astype(dtype) for x in (H, B, y, omega, np.linalg.solve(H, B @ omega))]
    H, B, y, omega, theta = (x.astype(np.float64) for x in arrays)
    expected = B.T @ np.linalg.solve(H, theta - y)
    found = linear_systems(size)(*arrays)
    for name, h in found.items():
        if name == "cg" and indefinite:
            continue
        power = 2 if name == "normal-cg" else 1
        tolerance = accuracy(dtype, np.linalg.cond(H) ** power)
        size_of_terms = np.linalg.norm(B) * np.linalg.norm(np.linalg.solve(H, theta - y))
        np.testing.assert_allclose(h.gradient, expected, rtol=0, atol=tolerance * size_of_terms, err_msg=name)
        assert h.gradient.dtype == dtype
        assert bool(h.metrics["linear_converged"]), name
