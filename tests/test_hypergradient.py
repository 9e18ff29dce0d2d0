"""Every estimator against the exact hypergradient, on every problem it is for. One row of METHODS per method."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems import (
    PROBLEMS,
    Case,
    Parts,
    Row,
    build,
    dense_hypergradient,
    design,
    finite_differences,
    identity_features,
    linear_model,
    mlp,
    of_parameters,
)

import funcbilevel as fb

KEY = 11
DAMPING = 0.3
UNROLLED = 3
PENALTY = 1e6


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(tree))))


def minus(a: Any, b: Any) -> Any:
    """a - b in NumPy's float64: nothing to compile."""
    return jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b)


def relative_error(got: Any, expected: Any) -> float:
    """||got - expected|| / ||expected||, and ||got|| where zero is expected (or the rounding of differences)."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    size = norm(expected)
    return norm(minus(got, expected)) / (size if size > 1e-8 else 1.0)


def assert_close(got: Any, expected: Any, tolerance: float) -> None:
    error = relative_error(got, expected)
    assert error <= tolerance, f"relative error {error:.1e} > {tolerance:.0e}"


def estimate(case: Case, estimator: fb.Estimator, **kwargs: Any) -> fb.Hypergradient:
    """`fb.hypergradient` of the case, compiled."""
    start = kwargs.pop("inner_params", case.inner_params)
    kwargs = {"key": jax.random.key(KEY)} | kwargs

    @jax.jit
    def compiled(outer_params: Any, inner_params: Any, inner_batch: Any, outer_batch: Any) -> fb.Hypergradient:
        return fb.hypergradient(
            case.problem, case.model, estimator, outer_params, inner_params, inner_batch, outer_batch, **kwargs
        )

    return compiled(case.outer_params, start, case.inner_batch, case.outer_batch)


def parts(h: fb.Hypergradient) -> Parts:
    return Parts(h.gradient, h.explicit, h.implicit)


# What a method's answer is compared with.


def exact(name: str) -> Parts:
    return build(name).exact


def damped(name: str) -> Parts:
    """(H + delta I) u = g solved densely. With a = -Phi u and delta = ridge it is the linear adjoint's answer, too."""
    return dense_hypergradient(build(name), lambda H, g: np.linalg.solve(H + DAMPING * np.eye(len(g)), g))


def without_inverse(name: str) -> Parts:
    return dense_hypergradient(build(name), lambda H, g: g)


def explicit_only(name: str) -> Parts:
    explicit = build(name).exact.explicit
    return Parts(explicit, explicit, jax.tree.map(np.zeros_like, explicit))


@functools.cache
def truncated(name: str) -> Parts:
    case = build(name)
    return truncated_map(case, inner_optimizer(case), UNROLLED)


def truncated_map(case: Case, optimizer: optax.GradientTransformation, num_steps: int, head: int = 0) -> Parts:
    """Central differences of omega -> L_out(omega, theta_T(omega)), after `head` steps that omega does not reach."""
    _, outer = of_parameters(case)
    start = off_solution(case)
    reached = jax.jit(inner_loop(case, optimizer, head))(case.outer_params, start, optimizer.init(start))
    loop = inner_loop(case, optimizer, num_steps)

    def value(explicit: Any, implicit: Any) -> jax.Array:
        theta, _ = loop(implicit, *reached)
        return outer(explicit, theta, case.outer_batch)

    return finite_differences(value, case.outer_params)


def inner_loop(case: Case, optimizer: optax.GradientTransformation, num_steps: int) -> Callable[..., Any]:
    """`num_steps` steps of optax by hand: (omega, theta, opt_state) -> (theta, opt_state)."""
    inner, _ = of_parameters(case)

    def loop(omega: Any, theta: Any, opt_state: Any) -> Any:
        for _ in range(num_steps):
            gradient = jax.grad(inner, argnums=1)(omega, theta, case.inner_batch)
            updates, opt_state = optimizer.update(gradient, opt_state, theta)
            theta = optax.apply_updates(theta, updates)
        return theta, opt_state

    return loop


def off_solution(case: Case) -> Any:
    """Where ITD starts: at the solution itself its steps would stand still."""
    return jax.tree.map(lambda theta: jnp.asarray(np.asarray(theta) + 0.1), case.inner_params)


def largest_eigenvalue(case: Case) -> float:
    return float(np.linalg.eigvalsh(case.system.H)[-1])


def inner_optimizer(case: Case) -> optax.GradientTransformation:
    return optax.sgd(0.5 / largest_eigenvalue(case), momentum=0.5)


# The methods.


def always(problem: Row) -> bool:
    return True


def functional(problem: Row) -> bool:
    return problem.functional


def interpolated(problem: Row) -> bool:
    return problem.interpolates


def invertible(problem: Row) -> bool:
    return not problem.singular


def linear_class(problem: Row) -> bool:
    """The features span the model's own class, so that ridge on the adjoint is damping of the model's Hessian."""
    return problem.functional and not problem.singular


class Method(NamedTuple):
    """A row: an estimator, how near it must come, to what, and on which problems."""

    estimator: Callable[[Case], fb.Estimator]
    tolerance: float
    reference: Callable[[str], Parts] = exact
    applies: Callable[[Row], bool] = always
    converges: bool = True  # its linear solve, if it has one, reaches the solution


def linear(case: Case, ridge: float = 0.0) -> fb.Estimator:
    return fb.funcid(fb.linear_adjoint(case.features, ridge))


def corrected(case: Case) -> fb.Estimator:
    return fb.funcid(fb.linear_adjoint(case.features), correction=1.0)  # see test_correction.py for off the solution


def kernel(kernel: fb.Kernel, ridge: float = 0.0) -> fb.Estimator:
    return fb.funcid(fb.kernel_adjoint(kernel, ridge))


def learned(num_steps: int, warm_start: bool = True) -> fb.Estimator:
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, num_steps))
    return fb.funcid(fb.learned_adjoint(optimizer, num_steps, warm_start=warm_start))


def neumann(case: Case) -> fb.Estimator:
    return fb.aid(fb.neumann(4000, 1.0 / largest_eigenvalue(case)))


def gradient_descent(case: Case) -> fb.Estimator:
    return fb.aid(fb.gradient_descent(4000, 1.0 / largest_eigenvalue(case)))


def chord(case: Case, power: int) -> optax.GradientTransformation:
    """Newton's method with the inner solution's Hessian (or its square): a penalty's y, to rounding, in few steps."""
    M = np.linalg.pinv(np.linalg.matrix_power(np.asarray(case.system.H), power), rcond=1e-10, hermitian=True)

    def step(gradient: Any, _: Any) -> Any:
        flat, unravel = ravel_pytree(gradient)
        return unravel(-jnp.asarray(M, flat.dtype) @ flat)

    return optax.stateless(step)


def value_penalty(case: Case, penalty: float = PENALTY) -> fb.Estimator:
    return fb.value_penalty(chord(case, 1), 20, penalty)


def gradient_penalty(case: Case, penalty: float = PENALTY) -> fb.Estimator:
    return fb.gradient_penalty(chord(case, 2), 20, penalty)


METHODS: dict[str, Method] = {
    "funcid-linear": Method(linear, 1e-8, applies=functional),
    "funcid-linear-ridge": Method(lambda c: linear(c, DAMPING), 1e-8, damped, linear_class),
    "funcid-pointwise": Method(lambda c: fb.funcid(fb.pointwise_adjoint()), 1e-8, applies=interpolated),
    "funcid-linear-corrected": Method(corrected, 1e-8, applies=functional),
    "funcid-kernel": Method(lambda c: kernel(fb.gaussian_kernel(2.0)), 1e-6, applies=interpolated),
    "funcid-kernel-linear": Method(lambda c: kernel(fb.linear_kernel()), 1e-8, applies=linear_class),
    "funcid-kernel-ridge": Method(lambda c: kernel(fb.linear_kernel(), DAMPING), 1e-8, damped, linear_class),
    "funcid-learned": Method(lambda c: learned(1000), 2e-2, applies=functional),
    "aid-cg": Method(lambda c: fb.aid(fb.cg(100)), 1e-6),
    "aid-nystrom-cg": Method(lambda c: fb.aid(fb.nystrom_cg(100, rank=3, damping=0.0)), 1e-6),
    "aid-normal-cg": Method(lambda c: fb.aid(fb.normal_cg(200)), 1e-6),
    "aid-gmres": Method(lambda c: fb.aid(fb.gmres(30)), 1e-6),
    "aid-neumann": Method(neumann, 1e-6),
    "aid-gradient-descent": Method(gradient_descent, 1e-6),
    "aid-identity": Method(lambda c: fb.aid(fb.identity()), 1e-12, without_inverse, converges=False),
    "aid-lineax-cg": Method(lambda c: fb.aid(lineax.CG(1e-10, 1e-10)), 1e-6),
    "aid-lineax-gmres": Method(lambda c: fb.aid(lineax.GMRES(1e-10, 1e-10, restart=30)), 1e-6),
    "aid-lineax-lu": Method(lambda c: fb.aid(lineax.LU()), 1e-8, applies=invertible),
    "aid-lineax-cholesky": Method(lambda c: fb.aid(lineax.Cholesky()), 1e-8, applies=invertible),
    "aid-lineax-damped": Method(lambda c: fb.aid(fb.from_lineax(lineax.Cholesky(), DAMPING)), 1e-8, damped),
    "prox-aid": Method(lambda c: fb.prox_aid(fb.cg(100), lambda theta, omega, step_size: theta), 1e-6),
    "itd": Method(lambda c: fb.itd(UNROLLED), 1e-6, truncated),
    "itd-forward": Method(lambda c: fb.itd(UNROLLED, mode="forward"), 1e-6, truncated),
    "itd-remat": Method(lambda c: fb.itd(UNROLLED, remat=True), 1e-6, truncated),
    "alternating": Method(lambda c: fb.alternating(), 1e-12, explicit_only),
    "penalty-value": Method(value_penalty, 1e-3),
    "penalty-gradient": Method(gradient_penalty, 1e-3),
}

# One of each kind, where a test is not about the numbers.
KINDS = ["funcid-linear", "funcid-pointwise", "funcid-learned", "aid-cg", "aid-lineax-lu", "itd", "alternating"]
PENALTIES = ["penalty-value", "penalty-gradient"]  # apart, because rounding is multiplied by the penalty


def setting(case: Case, method: str) -> dict[str, Any]:
    """What ITD needs beyond the others."""
    unrolls = METHODS[method].estimator(case).unroll > 0
    return {"inner_params": off_solution(case), "inner_optimizer": inner_optimizer(case)} if unrolls else {}


TABLE = [(method, name) for method in METHODS for name in PROBLEMS if METHODS[method].applies(PROBLEMS[name])]


# The oracle itself.


# In most problems the outer objective does not see omega: alternating's gradient is zero there, and says so.
STANDS_STILL = pytest.mark.filterwarnings("ignore:.*alternating.* nothing will move")


@pytest.mark.parametrize("name", PROBLEMS)
def test_oracle_agrees_with_finite_differences(x64, name):
    case = build(name)
    expected = finite_differences(case.value, case.outer_params)
    for got, difference in zip(case.exact, expected, strict=True):
        assert norm(minus(got, difference)) <= 1e-8 * norm(case.exact.gradient)


@pytest.mark.parametrize("name", PROBLEMS)
def test_inner_params_are_the_inner_solution(x64, name):
    case = build(name)
    inner, outer = of_parameters(case)

    @jax.jit
    def at(omega: Any, theta: Any) -> Any:
        gradient = jax.grad(inner, argnums=1)(omega, theta, case.inner_batch)
        return gradient, outer(omega, theta, case.outer_batch)

    gradient, value = at(case.outer_params, case.inner_params)
    assert norm(gradient) <= 1e-13 * norm(case.system.H)
    np.testing.assert_allclose(value, case.outer_value, rtol=1e-12)


def test_the_problems_differ_where_it_matters(x64):
    """Each of the estimator's terms is seen by some problem: a table of easy rows would prove nothing."""
    cases = [build(name) for name in PROBLEMS]
    assert all(norm(c.exact.implicit) > 0.05 for c in cases)
    assert sum(norm(c.exact.explicit) > 0.01 for c in cases) >= 3
    for name, c in zip(PROBLEMS, cases, strict=True):  # the inverse Hessian matters
        assert norm(minus(without_inverse(name).implicit, c.exact.implicit)) > 0.1 * norm(c.exact.implicit)


# Every method on every problem.


@STANDS_STILL
@pytest.mark.parametrize(("method", "name"), TABLE)
def test_hypergradient(x64, method, name):
    row, case = METHODS[method], build(name)
    h = estimate(case, row.estimator(case), **setting(case, method))
    expected = row.reference(name)

    assert_close(h.explicit, expected.explicit, row.tolerance)
    assert_close(h.implicit, expected.implicit, row.tolerance)
    assert_close(h.gradient, expected.gradient, row.tolerance)
    assert_close(h.gradient, jax.tree.map(np.add, h.explicit, h.implicit), 1e-14)
    assert bool(h.metrics["adjoint_finite"])
    if "linear_residual" in h.metrics:
        assert bool(h.metrics["linear_converged"]) == row.converges
        assert (float(h.metrics["linear_residual"]) <= 1e-6) == row.converges
        assert float(h.metrics["linear_curvature"]) > 0
    if not setting(case, method):
        np.testing.assert_allclose(h.outer_value, case.outer_value, rtol=1e-12)


@STANDS_STILL
@pytest.mark.parametrize("method", KINDS + PENALTIES)
def test_without_jit(x64, method):
    case = build("cosh")
    estimator = METHODS[method].estimator(case)
    start = setting(case, method) | {"key": jax.random.key(KEY)}
    theta = start.pop("inner_params", case.inner_params)
    h = fb.hypergradient(
        case.problem, case.model, estimator, case.outer_params, theta, case.inner_batch, case.outer_batch, **start
    )
    tolerance = 1e-8 if method in PENALTIES else 1e-12
    assert_close(parts(h), parts(estimate(case, estimator, **setting(case, method))), tolerance)


# The learned adjoint: its objective with the 1/2 and the sign, its convergence, its warm start.


class DenseAdjoint(NamedTuple):
    """C and d of design.md with predictions flattened; L_adj and its gradient at xi, written out."""

    C: jax.Array
    d: jax.Array
    value: jax.Array
    gradient: Any


def dense_adjoint(case: Case, xi: Any) -> DenseAdjoint:
    problem, model, omega = case.problem, case.model, case.outer_params
    x_P, x_Q = problem.inputs(case.inner_batch), problem.inputs(case.outer_batch)

    @jax.jit
    def dense(theta: Any, xi: Any) -> DenseAdjoint:
        (v_P, unravel_P), (v_Q, unravel_Q) = (ravel_pytree(model.apply(theta, (), x)[0]) for x in (x_P, x_Q))
        C = jax.hessian(lambda v: problem.inner_objective(omega, unravel_P(v), case.inner_batch))(v_P)
        d = jax.grad(lambda v: problem.outer_objective(omega, unravel_Q(v), case.outer_batch))(v_Q)

        def adjoint_objective(xi: Any) -> jax.Array:
            a_P, a_Q = (ravel_pytree(model.apply(xi, (), x)[0])[0] for x in (x_P, x_Q))
            return 0.5 * a_P @ C @ a_P + a_Q @ d

        return DenseAdjoint(C, d, *jax.value_and_grad(adjoint_objective)(xi))

    return dense(case.inner_params, xi)


@pytest.mark.parametrize("name", ["cosh", "pytree"])
def test_learned_adjoint_is_minus_the_inverse_curvature_times_d(x64, name):
    """At its minimum a = -C^-1 d and L_adj = -1/2 <d, C^-1 d>: neither holds without the 1/2, or with another sign."""
    case = build(name)
    h = estimate(case, learned(2000))
    C, d, value, _ = dense_adjoint(case, h.state.params)
    a, _ = ravel_pytree(case.model.apply(h.state.params, (), case.problem.inputs(case.inner_batch))[0])
    expected = -np.linalg.solve(C, d)
    assert_close(a, expected, 1e-6)
    np.testing.assert_allclose(h.metrics["adjoint_objective"], 0.5 * expected @ d, rtol=1e-8)
    np.testing.assert_allclose(value, 0.5 * expected @ d, rtol=1e-8)


@pytest.mark.parametrize("name", ["shifted", "pytree", "network", "softmax"])
def test_one_step_of_the_learned_adjoint(x64, name):
    """The reported objective is L_adj at the step's start, and the step goes down its gradient."""
    case, rate = build(name), 0.1
    xi = jax.tree.map(lambda theta: 0.5 * theta + 0.1, case.inner_params)
    state = fb.FitState(xi, optax.sgd(rate).init(xi), ())
    h = estimate(case, fb.funcid(fb.learned_adjoint(optax.sgd(rate), 1)), state=state)
    _, _, value, gradient = dense_adjoint(case, xi)
    np.testing.assert_allclose(h.metrics["adjoint_objective"], value, rtol=1e-12)
    assert_close(h.state.params, jax.tree.map(lambda x, g: x - rate * g, xi, gradient), 1e-12)


@pytest.mark.parametrize("name", ["network", "softmax"])
def test_learned_adjoint_error_falls_with_the_number_of_steps(x64, name):
    case = build(name)
    steps = (10, 40, 160, 640)
    errors = [relative_error(estimate(case, learned(K)).gradient, case.exact.gradient) for K in steps]
    assert all(later < 0.8 * earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 2e-2


def test_learned_adjoint_with_a_model_of_its_own(x64):
    """A network of another architecture than the prediction model, wide enough for the six samples."""
    case = build("cosh")
    net = mlp(32)
    columns = fb.from_function(
        lambda key, x: [net.init(k, x)[0] for k in jax.random.split(key, 2)],
        lambda xi, x: jnp.stack([net.apply(params, (), x)[0] for params in xi], axis=1),
    )
    errors = [
        relative_error(
            estimate(case, fb.funcid(fb.learned_adjoint(optax.adam(1e-2), K, model=columns))).gradient,
            case.exact.gradient,
        )
        for K in (20, 1000)
    ]
    assert errors[1] < 2e-2 < errors[0]


def test_learned_adjoint_goes_on_from_its_state(x64):
    case = build("softmax")

    def adjoint(num_steps: int, warm_start: bool = True) -> fb.Estimator:
        return fb.funcid(fb.learned_adjoint(optax.adam(1e-2), num_steps, warm_start=warm_start))

    first = estimate(case, adjoint(20))
    second = estimate(case, adjoint(20), state=first.state, key=jax.random.key(KEY + 1))  # a key it has no use for
    without_key = estimate(case, adjoint(20), state=first.state, key=None)
    chex.assert_trees_all_equal(parts(second), parts(without_key))
    assert_close(parts(second), parts(estimate(case, adjoint(40))), 1e-12)
    assert norm(minus(first.gradient, second.gradient)) > 1e-3

    cold = estimate(case, adjoint(20, warm_start=False))
    again = estimate(case, adjoint(20, warm_start=False), state=cold.state)
    assert cold.state == ()
    chex.assert_trees_all_equal(parts(cold), parts(again))


# The linear adjoint on features of any rank, with any curvature.


class Quadratic(NamedTuple):
    """mean_i sum_j w_ij/2 (v_ij - omega_ij)^2 in, 1/2 mean |v - y|^2 out, at v = 0: g_imp = -(w/n) a shows all of a."""

    phi_P: np.ndarray  # [n_P, p]
    phi_Q: np.ndarray  # [n_Q, p]
    w: np.ndarray  # [n_P, k]
    y: np.ndarray  # [n_Q, k]

    def estimate(self, estimator: fb.Estimator) -> tuple[jax.Array, fb.Hypergradient]:
        """The adjoint's values on the inner batch, and the hypergradient that they were read from."""
        (n, k), dtype = self.w.shape, self.w.dtype
        problem = fb.FunctionalProblem(
            lambda omega, v, batch: 0.5 * jnp.mean(jnp.sum(batch[1] * (v - omega) ** 2, axis=1)),
            lambda omega, v, batch: 0.5 * jnp.mean(jnp.sum((v - batch[1]) ** 2, axis=1)),
        )
        theta = jnp.zeros((self.phi_P.shape[1], k), dtype)
        batches = (self.phi_P, self.w), (self.phi_Q, self.y)
        h = jax.jit(
            lambda: fb.hypergradient(problem, linear_model(theta[0]), estimator, 0.0 * self.w, theta, *batches)
        )()
        return -n * h.implicit / self.w, h

    def adjoint(self, ridge: float = 0.0) -> np.ndarray:
        """-Phi_P (Phi_P' C Phi_P + ridge)^+ Phi_Q' d, one dense solve in float64 for each output."""
        phi_P, phi_Q, w, y = (np.asarray(x, np.float64) for x in self)
        W = [
            np.linalg.pinv(phi_P.T @ (w_j[:, None] * phi_P) / len(w) + ridge * np.eye(phi_P.shape[1]), rcond=1e-10)
            @ phi_Q.T @ y_j / len(y)
            for w_j, y_j in zip(w.T, y.T, strict=True)
        ]  # fmt: skip
        return phi_P @ np.stack(W, axis=1)


def quadratic(n_P: int, n_Q: int, p: int, k: int = 2, seed: int = 0, dtype: Any = np.float64) -> Quadratic:
    rng = np.random.default_rng(seed)
    arrays = design(rng, n_P, p), design(rng, n_Q, p), rng.uniform(0.3, 3.0, (n_P, k)), rng.normal(size=(n_Q, k))
    return Quadratic(*(x.astype(dtype) for x in arrays))


def spoiled(q: Quadratic, spoil: Callable[[np.ndarray], np.ndarray]) -> Quadratic:
    return q._replace(phi_P=spoil(q.phi_P), phi_Q=spoil(q.phi_Q))


def shared(q: Quadratic) -> Quadratic:
    return q._replace(phi_Q=q.phi_P)


def duplicate(phi: np.ndarray) -> np.ndarray:
    return np.concatenate([phi, phi[:, :2], phi[:, :1] - phi[:, 1:2]], axis=1)


def zero_column(phi: np.ndarray) -> np.ndarray:
    return phi * (np.arange(phi.shape[1]) != 1)


FEATURES: dict[str, Callable[[Any], Quadratic]] = {
    "full-rank": lambda dtype: quadratic(9, 7, 4, dtype=dtype),
    "duplicate-columns": lambda dtype: spoiled(quadratic(9, 7, 4, dtype=dtype), duplicate),
    "zero-column": lambda dtype: spoiled(quadratic(9, 7, 4, dtype=dtype), zero_column),
    "all-zero": lambda dtype: spoiled(quadratic(9, 7, 4, dtype=dtype), np.zeros_like),
    "fewer-samples-than-features": lambda dtype: shared(quadratic(4, 4, 7, dtype=dtype)),
    "fewer-samples-than-features-shifted": lambda dtype: quadratic(4, 3, 7, dtype=dtype),
    "many-samples-of-rank-one": lambda dtype: spoiled(quadratic(2000, 2000, 3, dtype=dtype), lambda x: x[:, [0, 0, 0]]),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FEATURES)
def test_linear_adjoint_on_features_of_any_rank(x64, name, dtype):
    q = FEATURES[name](dtype)
    a, h = q.estimate(fb.funcid(fb.linear_adjoint(identity_features)))
    assert_close(a, jnp.asarray(q.adjoint(), dtype), 1e-8 if dtype == np.float64 else 1e-4)
    assert bool(h.metrics["linear_converged"])
    assert bool(h.metrics["adjoint_finite"])


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 10.0])
@pytest.mark.parametrize("name", ["duplicate-columns", "fewer-samples-than-features-shifted"])
def test_linear_adjoint_with_ridge_on_features_of_any_rank(x64, name, ridge):
    q = FEATURES[name](np.float64)
    a, _ = q.estimate(fb.funcid(fb.linear_adjoint(identity_features, ridge)))
    assert_close(a, jnp.asarray(q.adjoint(ridge)), 1e-8)


@pytest.mark.parametrize("ridge", [0.0, 0.7])
@pytest.mark.parametrize("weights", ["equal", "per-output"])
def test_linear_adjoint_needs_one_step_if_the_curvature_is_constant(x64, weights, ridge):
    q = quadratic(9, 7, 4)
    q = q._replace(w=np.broadcast_to([2.0, 2.0] if weights == "equal" else [0.1, 5.0], q.w.shape))
    a, h = q.estimate(fb.funcid(fb.linear_adjoint(identity_features, ridge, num_steps=1)))
    assert_close(a, jnp.asarray(q.adjoint(ridge)), 1e-12)
    assert bool(h.metrics["linear_converged"])


def test_linear_adjoint_needs_more_steps_if_it_is_not(x64):
    q = quadratic(9, 7, 4)
    a, h = q.estimate(fb.funcid(fb.linear_adjoint(identity_features, num_steps=1)))
    assert relative_error(a, jnp.asarray(q.adjoint())) > 1e-3
    assert float(h.metrics["linear_residual"]) > 1e-3
    assert not bool(h.metrics["linear_converged"])


def test_features_as_a_model(x64):
    case = build("network")
    hidden = fb.from_function(lambda key, x: None, case.features)
    by_model = estimate(case, fb.funcid(fb.linear_adjoint(hidden)))
    by_function = estimate(case, fb.funcid(fb.linear_adjoint(case.features)))
    chex.assert_trees_all_equal(parts(by_model), parts(by_function))


def test_pointwise_adjoint_says_when_it_is_not_for_these_batches(x64):
    """Other inputs, and an inner objective that ties samples together: both show in the metrics."""
    pointwise = fb.funcid(fb.pointwise_adjoint())
    q = quadratic(6, 6, 6)
    a, h = shared(q).estimate(pointwise)
    assert_close(a, -(0.0 - q.y) / jnp.asarray(q.w), 1e-12)
    assert bool(h.metrics["adjoint_inputs_match"])
    _, h = q.estimate(pointwise)
    assert not bool(h.metrics["adjoint_inputs_match"])

    tied = fb.FunctionalProblem(
        lambda omega, v, batch: jnp.mean((v - omega) ** 2) + jnp.mean(v) ** 2,
        lambda omega, v, batch: jnp.mean((v - batch[1]) ** 2),
    )
    x, y = jnp.eye(3), jnp.arange(3.0)
    h = fb.hypergradient(tied, linear_model(np.zeros(())), pointwise, jnp.zeros(3), jnp.zeros(3), (x, y), (x, y))
    assert float(h.metrics["linear_residual"]) > 0.1
    assert not bool(h.metrics["linear_converged"])


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_pointwise_adjoint_solves_the_block_of_every_sample(x64, outputs):
    """Symmetric blocks of either sign; g_imp is a_i / n, since the inner objective holds v_i' omega_i."""
    rng = np.random.default_rng(outputs)
    n, k = 5, outputs
    B, c = rng.normal(size=(n, k, k)), jnp.asarray(rng.normal(size=(n, k)))
    B = jnp.asarray(B + np.moveaxis(B, 1, 2))
    problem = fb.FunctionalProblem(
        lambda omega, v, batch: jnp.mean(0.5 * jnp.einsum("ni,nij,nj->n", v, B, v) + jnp.sum(v * omega, axis=1)),
        lambda omega, v, batch: jnp.mean(jnp.sum(v * c, axis=1)),
    )
    model = fb.from_function(lambda key, x: jnp.zeros((n, k)), lambda params, x: params + 0.0 * x)
    x = (jnp.zeros((n, k)),)
    h = fb.hypergradient(problem, model, fb.funcid(fb.pointwise_adjoint()), jnp.zeros((n, k)), jnp.zeros((n, k)), x, x)
    assert_close(h.implicit * n, -np.linalg.solve(B, np.asarray(c)[..., None])[..., 0], 1e-10)
    assert bool(h.metrics["linear_converged"])


# The linear solvers of AID.


SOLVERS: dict[str, Callable[[float, float], fb.LinearSolver]] = {
    "cg": lambda delta, step: fb.cg(30, damping=delta),
    "normal-cg": lambda delta, step: fb.normal_cg(30, damping=delta),
    "gmres": lambda delta, step: fb.gmres(10, damping=delta),
    "neumann": lambda delta, step: fb.neumann(1000, step, damping=delta),
    "gradient-descent": lambda delta, step: fb.gradient_descent(1000, step, damping=delta),
    "lineax-cg": lambda delta, step: fb.from_lineax(lineax.CG(1e-12, 1e-12), damping=delta),
    "lineax-lu": lambda delta, step: fb.from_lineax(lineax.LU(), damping=delta),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_damping(x64, name):
    case = build("ridge")
    step = 1.0 / (largest_eigenvalue(case) + DAMPING)
    h = estimate(case, fb.aid(SOLVERS[name](DAMPING, step)))
    assert_close(parts(h), damped("ridge"), 1e-8)
    assert norm(minus(h.gradient, case.exact.gradient)) > 1e-2 * norm(h.gradient)
    assert bool(h.metrics["linear_converged"])  # of the damped system, the one that is solved


@pytest.mark.parametrize(
    "solver",
    [fb.normal_cg(30), fb.gmres(6), lineax.GMRES(1e-12, 1e-12), lineax.LU()],
    ids=["normal-cg", "gmres", "lineax-gmres", "lineax-lu"],
)
def test_indefinite_hessian(x64, solver):
    """At a saddle of the inner objective the formula still has a meaning, and these solvers an answer."""
    rng = np.random.default_rng(0)
    eigenvalues = np.array([-2.0, -0.5, 0.7, 1.0, 3.0])
    U, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    A, B, y = jnp.asarray(U * eigenvalues @ U.T), jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=5))
    problem = fb.ParametricProblem(
        lambda omega, theta, batch: 0.5 * theta @ A @ theta - theta @ B @ omega,
        lambda omega, theta, batch: 0.5 * jnp.sum((theta - y) ** 2),
    )
    omega = jnp.ones(3)
    theta = jnp.linalg.solve(A, B @ omega)
    h = jax.jit(lambda: fb.hypergradient(problem, None, fb.aid(solver), omega, theta, None, None))()
    assert_close(h.gradient, B.T @ jnp.linalg.solve(A, theta - y), 1e-8)
    assert bool(h.metrics["linear_converged"])


def test_negative_curvature_shows_in_the_metrics(x64):
    problem = fb.ParametricProblem(
        lambda omega, theta, batch: 0.5 * (theta[0] ** 2 - 3.0 * theta[1] ** 2) + omega * theta[0],
        lambda omega, theta, batch: jnp.sum(theta),
    )
    stationary = jnp.array([-1.0, 0.0])
    h = fb.hypergradient(problem, None, fb.aid(fb.identity()), 1.0, stationary, None, None)
    np.testing.assert_allclose(h.metrics["linear_curvature"], (1.0 - 3.0) / 2.0)
    np.testing.assert_allclose(h.metrics["linear_residual"], np.sqrt(0.0 + 4.0**2) / np.sqrt(2.0))


def test_too_large_a_step_shows_in_the_metrics(x64):
    case = build("ridge")
    step = 3.0 / largest_eigenvalue(case)
    for solver in (fb.neumann, fb.gradient_descent):
        h = estimate(case, fb.aid(solver(30, step)))
        assert float(h.metrics["linear_residual"]) > 1
        assert not bool(h.metrics["linear_converged"])
        assert bool(h.metrics["adjoint_finite"])
        h = estimate(case, fb.aid(solver(3000, step)))
        assert not bool(h.metrics["linear_converged"])
        assert not bool(h.metrics["adjoint_finite"])


@pytest.mark.parametrize("num_steps", [1, 2])
def test_truncated_cg_reports_its_residual(x64, num_steps):
    case = build("ridge")
    h = estimate(case, fb.aid(fb.cg(num_steps)))
    H, g, *_ = case.system
    residual = jnp.linalg.norm(g - H @ h.state) / jnp.linalg.norm(g)
    np.testing.assert_allclose(h.metrics["linear_residual"], residual, rtol=1e-10)
    np.testing.assert_allclose(h.metrics["linear_curvature"], h.state @ H @ h.state / (h.state @ h.state), rtol=1e-10)
    assert float(residual) > 1e-3
    assert not bool(h.metrics["linear_converged"])


@pytest.mark.parametrize("solver", [fb.cg, fb.gmres, fb.normal_cg])
def test_rtol_stops_early(x64, solver):
    case = build("ridge")
    H, g, *_ = case.system
    M = H if solver is fb.normal_cg else jnp.eye(len(g))  # the normal equations have a residual of their own
    residuals = []
    for rtol in (0.3, 0.0):
        u = estimate(case, fb.aid(solver(10, rtol=rtol))).state
        residuals.append(float(jnp.linalg.norm(M @ (g - H @ u)) / jnp.linalg.norm(M @ g)))
    assert 1e-6 < residuals[0] <= 0.3
    assert residuals[1] < 1e-10


@pytest.mark.parametrize("solver", [fb.cg(2), fb.gmres(2), fb.normal_cg(2)], ids=["cg", "gmres", "normal-cg"])
def test_warm_start_improves_a_truncated_solve(x64, solver):
    case = build("logistic-ridge")

    @jax.jit
    def call(state: Any) -> fb.Hypergradient:
        batches = case.inner_batch, case.outer_batch
        estimator = fb.aid(solver)
        return fb.hypergradient(
            case.problem, None, estimator, case.outer_params, case.inner_params, *batches, state=state
        )

    state, errors = jax.tree.map(jnp.zeros_like, case.inner_params), []
    for _ in range(4):
        h = call(state)
        state = h.state
        errors.append(relative_error(h.gradient, case.exact.gradient))
    assert all(later < 0.7 * earlier for earlier, later in itertools.pairwise(errors)), errors


def test_cold_start_begins_anew(x64):
    case = build("logistic-ridge")
    cold = fb.aid(fb.cg(2), warm_start=False)
    first = estimate(case, cold)
    assert first.state == ()
    chex.assert_trees_all_equal(parts(first), parts(estimate(case, cold, state=first.state)))


@pytest.mark.parametrize("name", [*SOLVERS, "gradient-descent-1", "gradient-descent-3"])
def test_a_cold_start_is_a_start_at_zero(x64, name):
    """Solvers may save the product with a start at zero, and do as many steps."""
    case = build("logistic-ridge")
    step = 0.5 / largest_eigenvalue(case)
    few = {
        "cg": fb.cg(2),
        "normal-cg": fb.normal_cg(2),
        "gmres": fb.gmres(2),
        "neumann": fb.neumann(3, step),
        "gradient-descent-1": fb.gradient_descent(1, step),
        "gradient-descent-3": fb.gradient_descent(3, step),
    }
    solver = few.get(name) or SOLVERS[name](0.0, step)
    cold, zero = (estimate(case, fb.aid(solver, warm_start=warm)) for warm in (False, True))
    assert cold.state == ()
    assert_close(parts(cold), parts(zero), 1e-12)


def test_gradient_descent_goes_on_and_neumann_does_not(x64):
    case = build("logistic-ridge")
    step = 0.5 / largest_eigenvalue(case)
    half, whole = (fb.aid(fb.gradient_descent(K, step)) for K in (5, 10))
    first = estimate(case, half)
    assert_close(parts(estimate(case, half, state=first.state)), parts(estimate(case, whole)), 1e-12)

    series = fb.aid(fb.neumann(5, step))
    first = estimate(case, series)
    chex.assert_trees_all_equal(parts(first), parts(estimate(case, series, state=first.state)))
    H, g, B, _ = case.system
    A = np.eye(len(g)) - step * np.asarray(H)
    u = step * sum(np.linalg.matrix_power(A, k) @ g for k in range(6))
    np.testing.assert_allclose(ravel_pytree(first.implicit)[0], -B.T @ u, rtol=1e-10)


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].converges])
def test_outer_objective_without_the_inner_level(x64, method):
    """d = 0: no implicit part, and no 0/0 on the way."""
    case = build("ridge") if method.startswith("aid") else build("cosh")
    explicit = lambda omega, u, batch: sum(jnp.sum(w**2) for w in jax.tree.leaves(omega))
    case = case._replace(problem=dataclasses.replace(case.problem, outer_objective=explicit))
    h = estimate(case, METHODS[method].estimator(case), **setting(case, method))
    # A learned adjoint starts at random values; a penalty multiplies rounding.
    rest = 2e-2 if method == "funcid-learned" else 1e-8 if method in PENALTIES else 0.0
    assert norm(h.implicit) <= rest
    assert_close(h.gradient, jax.tree.map(lambda w: 2 * w, case.outer_params), rest or 1e-15)
    assert bool(h.metrics["adjoint_finite"])
    assert bool(h.metrics.get("linear_converged", True))


# The penalties: their bias, the step of y, its warm start.


@pytest.mark.parametrize("name", ["shifted", "pytree", "softmax", "logistic-ridge"])
@pytest.mark.parametrize("method", [value_penalty, gradient_penalty])
def test_the_bias_of_a_penalty_falls_like_its_inverse(x64, method, name):
    case = build(name)
    penalties = (1e2, 1e3, 1e4)
    errors = [relative_error(estimate(case, method(case, p)).gradient, case.exact.gradient) for p in penalties]
    assert all(8 < earlier / later < 12.5 for earlier, later in itertools.pairwise(errors)), errors
    assert errors[0] < 0.1


@pytest.mark.parametrize("method", ["value", "gradient"])
@pytest.mark.parametrize("name", ["network", "ridge"])
def test_one_step_of_a_penalty(x64, method, name):
    """y goes down the gradient of p + L_out / lambda, and the two parts are taken at that y."""
    case, rate, penalty = build(name), 0.1, 7.0
    inner, outer = of_parameters(case)
    theta, start = case.inner_params, off_solution(case)

    def p(omega: Any, y: Any) -> jax.Array:
        if method == "value":
            return inner(omega, y, case.inner_batch) - inner(omega, theta, case.inner_batch)
        gradient, _ = ravel_pytree(jax.grad(inner, argnums=1)(omega, y, case.inner_batch))
        return 0.5 * gradient @ gradient

    def objective(y: Any) -> jax.Array:
        return p(case.outer_params, y) + outer(case.outer_params, y, case.outer_batch) / penalty

    make = fb.value_penalty if method == "value" else fb.gradient_penalty
    optimizer = optax.sgd(rate)
    h = estimate(case, make(optimizer, 1, penalty), state=fb.FitState(start, optimizer.init(start), ()))
    value, gradient = jax.jit(jax.value_and_grad(objective))(start)
    y = jax.tree.map(lambda y, g: y - rate * g, start, gradient)
    assert_close(h.state.params, y, 1e-12)
    np.testing.assert_allclose(h.metrics["penalty_objective"], value, rtol=1e-12)
    explicit = jax.jit(jax.grad(outer))(case.outer_params, y, case.outer_batch)
    implicit = jax.jit(jax.grad(lambda omega: penalty * p(omega, y)))(case.outer_params)
    assert_close(parts(h), Parts(jax.tree.map(np.add, explicit, implicit), explicit, implicit), 1e-10)
    np.testing.assert_allclose(h.outer_value, case.outer_value, rtol=1e-12)  # at theta

    cold = make(optimizer, 1, penalty, warm_start=False)
    h = estimate(case, cold)
    assert h.state == ()
    warm = estimate(case, make(optimizer, 1, penalty))  # which starts at theta, too
    chex.assert_trees_all_equal(parts(h), parts(warm))
    second = estimate(case, make(optimizer, 1, penalty), state=warm.state)
    assert_close(parts(second), parts(estimate(case, make(optimizer, 2, penalty))), 1e-12)
    chex.assert_trees_all_equal(parts(h), parts(estimate(case, cold, state=h.state)))


@pytest.mark.parametrize("method", [fb.value_penalty, fb.gradient_penalty])
def test_penalties_in_float32(x64, method):
    case = build("cosh")
    estimator = method(optax.sgd(0.1), 50, 10.0)
    expected = estimate(case, estimator).gradient
    point = jax.tree.map(np.asarray, (case.outer_params, case.inner_params, case.inner_batch, case.outer_batch))
    with jax.enable_x64(False):
        h = jax.jit(lambda *point: fb.hypergradient(case.problem, case.model, estimator, *point))(
            *cast(point, np.float32)
        )
        assert float_dtypes((parts(h), h.outer_value, h.metrics, h.state)) == {jnp.dtype(np.float32)}
        assert_close(h.gradient, cast(jax.tree.map(np.asarray, expected), np.float32), 1e-4)


# ITD through optax.


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.1, eps_root=1e-6),
    "adamw-schedule": lambda: optax.adamw(optax.cosine_decay_schedule(0.1, 6), weight_decay=0.1, eps_root=1e-6),
    "clipping": lambda: optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.5, momentum=0.9)),
    # Its accumulator is float32 unless told, which finite differences of a float64 map would see.
    "multi-steps": lambda: optax.MultiSteps(
        optax.sgd(0.3, momentum=0.5), every_k_schedule=2, accumulator_dtype=jnp.float64
    ).gradient_transformation(),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_itd_through_any_optimizer(x64, name):
    """Reverse, forward and rematerialised agree, and equal finite differences of the truncated map."""
    case, optimizer = build("least-squares"), OPTIMIZERS[name]()
    args = case.outer_params, off_solution(case), case.inner_batch, case.outer_batch
    modes = [fb.itd(5), fb.itd(5, mode="forward"), fb.itd(5, remat=True)]
    reverse, forward, remat = jax.jit(
        lambda *args: [
            parts(fb.hypergradient(case.problem, case.model, itd, *args, inner_optimizer=optimizer)) for itd in modes
        ]
    )(*args)
    assert_close(reverse, truncated_map(case, optimizer, 5), 1e-6)
    assert_close(forward, reverse, 1e-12)
    assert_close(remat, reverse, 1e-12)
    assert norm(reverse.implicit) > 1e-3


@functools.cache
def truncated_step(M: int, T: int) -> tuple[optax.GradientTransformation, Any, Parts]:
    """An inner optimizer, theta after M of its steps, and the hypergradient through the last T of them."""
    case, optimizer = build("logistic-ridge"), optax.sgd(0.3, momentum=0.9)
    start = off_solution(case)
    theta, _ = jax.jit(inner_loop(case, optimizer, M))(case.outer_params, start, optimizer.init(start))
    return optimizer, theta, truncated_map(case, optimizer, T, head=M - T)


@pytest.mark.parametrize("T", [2, 5])
@pytest.mark.parametrize("mode", ["reverse", "forward", "remat"])
def test_truncated_itd_in_the_loop(x64, mode, T):
    """M = 5 steps of which T are differentiated: the state that the first M - T leave is held fixed."""
    case, M = build("logistic-ridge"), 5
    optimizer, theta, expected = truncated_step(M, T)
    estimator = fb.itd(T, mode="forward") if mode == "forward" else fb.itd(T, remat=mode == "remat")
    solver = fb.bilevel(
        case.problem, None, estimator, inner_optimizer=optimizer, outer_optimizer=optax.sgd(1.0), inner_steps=M
    )
    state = solver.init(jax.random.key(KEY), case.outer_params, None, off_solution(case))
    state, metrics = jax.jit(solver.step)(state, case.inner_batch, case.outer_batch)
    assert_close(state.inner_params, theta, 1e-12)
    assert_close(minus(case.outer_params, state.outer_params), expected.gradient, 1e-6)
    np.testing.assert_allclose(metrics["hypergradient_norm"], norm(expected.gradient), rtol=1e-6)
    np.testing.assert_allclose(metrics["implicit_norm"], norm(expected.implicit), rtol=1e-6)
    whole = truncated_step(M, M)[2]
    assert T == M or relative_error(expected.gradient, whole.gradient) > 1e-2  # it matters where one stops


def test_itd_approaches_the_exact_hypergradient(x64):
    case = build("least-squares")
    optimizer = optax.sgd(1.0 / largest_eigenvalue(case))
    errors = [
        relative_error(estimate(case, fb.itd(T), inner_optimizer=optimizer).gradient, case.exact.gradient)
        for T in (1, 5, 25, 100)
    ]
    assert all(later < 0.3 * earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 1e-10


# What the objectives may be.


@STANDS_STILL
@pytest.mark.parametrize("method", KINDS + PENALTIES)
def test_aux_reaches_the_metrics(x64, method):
    case = build("cosh")
    estimator = METHODS[method].estimator(case)
    plain = case.problem
    problem = fb.FunctionalProblem(
        lambda omega, v, batch: (plain.inner_objective(omega, v, batch), {"spread": {"v": jnp.max(v) - jnp.min(v)}}),
        lambda omega, v, batch: (plain.outer_objective(omega, v, batch), (jnp.sum(omega["shift"]), v[:, 0])),
        has_aux=True,
    )
    h = estimate(case._replace(problem=problem), estimator, **setting(case, method))
    assert_close(parts(h), METHODS[method].reference("cosh"), METHODS[method].tolerance)
    np.testing.assert_allclose(h.metrics["outer/0"], np.sum(case.outer_params["shift"]))
    chex.assert_rank(h.metrics["outer/1"], 0)

    solver = fb.bilevel(
        problem,
        case.model,
        estimator,
        inner_optimizer=inner_optimizer(case),
        outer_optimizer=optax.sgd(0.1),
        inner_steps=UNROLLED,
    )
    state = solver.init(jax.random.key(KEY), case.outer_params, case.inner_batch, off_solution(case))
    state, metrics = jax.jit(solver.step)(state, case.inner_batch, case.outer_batch)
    chex.assert_rank(list(metrics.values()), 0)
    x, _ = case.inner_batch
    last = x @ one_step_before("cosh", UNROLLED)  # the inner aux is that of the last step, before its update
    np.testing.assert_allclose(metrics["inner/spread/v"], np.max(last) - np.min(last), rtol=1e-12)
    np.testing.assert_allclose(metrics["outer/1"], np.mean((x @ state.inner_params)[:, 0]), rtol=1e-12)


@functools.cache
def one_step_before(name: str, num_steps: int) -> Any:
    case = build(name)
    optimizer, start = inner_optimizer(case), off_solution(case)
    theta, _ = jax.jit(inner_loop(case, optimizer, num_steps - 1))(case.outer_params, start, optimizer.init(start))
    return theta


@STANDS_STILL
@pytest.mark.parametrize("method", ["aid-cg", "itd", "itd-forward", "alternating"])
def test_aux_of_a_parametric_problem(x64, method):
    case = build("ridge")
    estimator = METHODS[method].estimator(case)
    plain = case.problem
    problem = fb.ParametricProblem(
        lambda omega, theta, batch: (plain.inner_objective(omega, theta, batch), jnp.sum(theta**2)),
        lambda omega, theta, batch: (plain.outer_objective(omega, theta, batch), {"theta": theta}),
        has_aux=True,
    )
    solver = fb.bilevel(
        problem, None, estimator, inner_optimizer=optax.sgd(0.01), outer_optimizer=optax.sgd(0.1), inner_steps=UNROLLED
    )
    state = solver.init(jax.random.key(KEY), case.outer_params, None, case.inner_params)
    state, metrics = jax.jit(solver.step)(state, case.inner_batch, case.outer_batch)
    np.testing.assert_allclose(metrics["outer/theta"], jnp.mean(state.inner_params), rtol=1e-12)
    np.testing.assert_allclose(metrics["inner/aux"], jnp.sum(case.inner_params**2), rtol=1e-6)


@STANDS_STILL
@pytest.mark.parametrize("method", KINDS)
def test_objectives_that_close_over_tracers(x64, method):
    """Problem, model and solver are built inside a transformed function, out of its tracers."""
    case = build("cosh")
    estimator, optimizer = METHODS[method].estimator(case), inner_optimizer(case)
    (x, w), (_, y) = case.inner_batch, case.outer_batch

    def closed(w: jax.Array, y: jax.Array, omega: Any, theta: Any) -> tuple[Any, Any]:
        """The hypergradient, and the one that an outer step makes from the same point."""
        problem = fb.FunctionalProblem(
            lambda omega, v, x: case.problem.inner_objective(omega, v, (x, w)),
            lambda omega, v, x: case.problem.outer_objective(omega, v, (x, y)),
            inputs=lambda x: x,
        )
        model = fb.from_function(lambda key, x: 0.1 * theta, lambda params, x: x @ params)
        h = fb.hypergradient(
            problem, model, estimator, omega, theta, x, x, inner_optimizer=optimizer, key=jax.random.key(KEY)
        )
        solver = fb.bilevel(
            problem,
            model,
            estimator,
            inner_optimizer=optimizer,
            outer_optimizer=optax.sgd(jnp.ones(())),
            inner_steps=UNROLLED,
        )
        state, _ = solver.step(solver.init(jax.random.key(KEY), omega, x, theta), x, x)
        return h.gradient, jax.tree.map(jnp.subtract, omega, state.outer_params)

    compiled = jax.jit(closed)
    point = case.outer_params, case.inner_params
    expected = estimate(case, estimator, inner_optimizer=optimizer).gradient
    of_step = 2e-2 if method == "funcid-learned" else 1e-10  # another random start of the adjoint
    gradient, step = compiled(w, y, *point)
    assert_close(gradient, expected, 1e-10)
    assert_close(step, expected, of_step)  # the inner steps stand still at the solution

    rows = jax.jit(jax.vmap(closed, (0, 0, None, None)))(jnp.stack([w, w[::-1]]), jnp.stack([y, -y]), *point)
    first, second = (jax.tree.map(lambda leaf: leaf[i], rows) for i in range(2))
    assert_close(first, (gradient, step), 1e-10)
    assert_close(second, compiled(w[::-1], -y, *point), 1e-10)


# Dtypes.


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def float_dtypes(tree: Any) -> set[Any]:
    return {x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


@STANDS_STILL
@pytest.mark.parametrize("name", ["pytree", "ridge"])
@pytest.mark.parametrize("outer_dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtypes_are_kept(x64, outer_dtype, name):
    """With float64 on: the hypergradient has the dtype of outer_params, and float32 data makes nothing wider."""
    case = build(name)
    dtype = jnp.promote_types(outer_dtype, jnp.float32)
    methods = [method for method, problem in TABLE if problem == name]
    for method in methods:
        h = jax.eval_shape(
            lambda *args: fb.hypergradient(
                case.problem,
                case.model,
                METHODS[method].estimator(case),
                *args,
                inner_optimizer=inner_optimizer(case),
                key=jax.random.key(KEY),
            ),
            cast(case.outer_params, outer_dtype),
            *cast((case.inner_params, case.inner_batch, case.outer_batch), dtype),
        )
        assert float_dtypes(parts(h)) == {jnp.dtype(outer_dtype)}, method
        assert float_dtypes((h.outer_value, h.metrics, h.state)) <= {dtype}, method


def start_of(case: Case, method: str) -> Any:
    return setting(case, method).get("inner_params", case.inner_params)


@STANDS_STILL
@pytest.mark.parametrize("method", KINDS)
def test_float32(x64, method):
    """The same numbers to single precision, with float64 off."""
    case = build("cosh")
    estimator, optimizer = METHODS[method].estimator(case), inner_optimizer(case)
    expected = METHODS[method].reference("cosh").gradient
    point = jax.tree.map(np.asarray, (case.outer_params, start_of(case, method), case.inner_batch, case.outer_batch))
    with jax.enable_x64(False):
        h = jax.jit(
            lambda *point: fb.hypergradient(
                case.problem, case.model, estimator, *point, inner_optimizer=optimizer, key=jax.random.key(KEY)
            )
        )(*cast(point, np.float32))
        assert float_dtypes((parts(h), h.outer_value, h.metrics)) == {jnp.dtype(np.float32)}
        assert_close(h.gradient, cast(jax.tree.map(np.asarray, expected), np.float32), 1e-4)


@STANDS_STILL
@pytest.mark.parametrize("method", KINDS)
def test_bfloat16_outer_params(x64, method):
    """outer_params in bfloat16 over float32 data: the hypergradient in bfloat16, right to its eight bits."""
    case = build("cosh")
    estimator, optimizer = METHODS[method].estimator(case), inner_optimizer(case)
    inner_batch, outer_batch, start = cast((case.inner_batch, case.outer_batch, start_of(case, method)), np.float32)
    omega = cast(case.outer_params, jnp.bfloat16)
    narrow = case._replace(outer_params=omega, inner_batch=inner_batch, outer_batch=outer_batch)
    h = estimate(narrow, estimator, inner_params=start, inner_optimizer=optimizer)
    assert float_dtypes(parts(h)) == {jnp.dtype(jnp.bfloat16)}
    expected = METHODS[method].reference("cosh").gradient
    assert_close(h.gradient, cast(expected, jnp.bfloat16), 1e-2)
