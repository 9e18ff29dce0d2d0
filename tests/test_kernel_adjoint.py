"""The adjoint in an RKHS against dense solutions over representer coefficients at all samples of both batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import build, finite_differences

import funcbilevel as fb

RIDGE = 0.02


def gaussian(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * np.sum((x[:, None] - z[None]) ** 2, axis=2) / 1.5**2)


def matern(x: np.ndarray, z: np.ndarray, smoothness: float) -> np.ndarray:
    r = np.sqrt(np.sum((x[:, None] - z[None]) ** 2, axis=2)) / 1.5
    s = np.sqrt(2 * smoothness) * r
    return np.exp(-s) * {0.5: 1.0, 1.5: 1 + s, 2.5: 1 + s + s**2 / 3}[smoothness]


def polynomial(x: Any, z: Any) -> Any:
    return (1.0 + x @ z.T) ** 2


KERNELS: dict[str, tuple[Any, Callable[..., np.ndarray]]] = {
    "gaussian": (fb.gaussian_kernel(1.5), gaussian),
    "matern-1/2": (fb.matern_kernel(1.5, 0.5), lambda x, z: matern(x, z, 0.5)),
    "matern-3/2": (fb.matern_kernel(1.5), lambda x, z: matern(x, z, 1.5)),
    "matern-5/2": (fb.matern_kernel(1.5, 2.5), lambda x, z: matern(x, z, 2.5)),
    "linear": (fb.linear_kernel(), lambda x, z: x @ z.T),
    "user": (polynomial, polynomial),
}


def by_representer(case: Any, kernel: Callable[..., np.ndarray], ridge: float) -> Any:
    """g_imp with alpha at the samples of P and Q together: (S' C S K + ridge) alpha = -T' d, a_P = S K alpha."""
    problem, model = case.problem, case.model
    x_P, x_Q = (np.asarray(problem.inputs(b)) for b in (case.inner_batch, case.outer_batch))
    v_P, v_Q = (model.apply(case.inner_params, (), x)[0] for x in (x_P, x_Q))
    k = int(np.prod(v_P.shape[1:]))
    omega = case.outer_params
    C = jax.hessian(lambda v: problem.inner_objective(omega, v.reshape(v_P.shape), case.inner_batch))(v_P.ravel())
    d = jax.grad(lambda v: problem.outer_objective(omega, v, case.outer_batch))(v_Q)
    x = np.concatenate([x_P, x_Q])
    K = np.kron(kernel(x, x), np.eye(k))
    cut = v_P.size
    system = ridge * np.eye(len(K))
    system[:cut] += np.asarray(C) @ K[:cut]
    alpha = np.linalg.solve(system, np.concatenate([np.zeros(cut), -np.asarray(d).ravel()]))
    a_P = jnp.asarray((K @ alpha)[:cut].reshape(v_P.shape))

    def paired(omega: Any) -> jax.Array:
        gradient = jax.grad(lambda v: problem.inner_objective(omega, v, case.inner_batch))(v_P)
        return jnp.sum(gradient * a_P)

    return jax.grad(paired)(omega)


def implicit(case: Any, adjoint: fb.Adjoint) -> fb.Hypergradient:
    @jax.jit
    def compiled() -> fb.Hypergradient:
        return fb.hypergradient(
            *(case.problem, case.model, fb.funcid(adjoint), case.outer_params, case.inner_params),
            *(case.inner_batch, case.outer_batch),
        )

    return compiled()


def assert_close(got: Any, expected: Any, tolerance: float) -> None:
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    assert np.linalg.norm(flat(got) - flat(expected)) <= tolerance * np.linalg.norm(flat(expected))


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_their_formulas(x64, name):
    rng = np.random.default_rng(0)
    x, z = 10.0 + rng.normal(size=(4, 3)), 10.0 + rng.normal(size=(5, 3))
    x[0] = z[0]
    kernel, by_hand = KERNELS[name]
    matrix = getattr(kernel, "matrix", kernel)
    np.testing.assert_allclose(matrix(jnp.asarray(x), jnp.asarray(z)), by_hand(x, z), rtol=1e-12)
    if name != "user":  # of a pytree, all numbers of a sample together
        split = lambda t: {"a": jnp.asarray(t[:, 0]), "b": jnp.asarray(t[:, 1:].reshape(-1, 2, 1))}
        np.testing.assert_allclose(matrix(split(x), split(z)), by_hand(x, z), rtol=1e-12)
    if getattr(kernel, "frequencies", None):  # E cos(w (x - z)) = k(x, z)
        w = kernel.frequencies(jax.random.key(0), 100_000, 3)
        by_draws = np.mean(np.cos((x[1] - z[:, None]) @ np.asarray(w).T), axis=(1, 2))
        np.testing.assert_allclose(by_draws, by_hand(x[1:2], z)[0], atol=0.02)


@pytest.mark.parametrize("name", ["gaussian", "matern-3/2", "user"])
def test_equals_the_representer_solution_with_coupled_outputs_and_two_distributions(x64, name):
    kernel, by_hand = KERNELS[name]
    case = build("softmax")
    h = implicit(case, fb.kernel_adjoint(kernel, RIDGE))
    assert_close(h.implicit, by_representer(case, by_hand, RIDGE), 1e-8)
    assert bool(h.metrics["linear_converged"])


def test_closed_form_where_the_curvature_is_a_multiple_of_the_identity(x64):
    case = build("instrument")
    x_P, x_Q = (np.asarray(b[0]) for b in (case.inner_batch, case.outer_batch))
    h = implicit(case, fb.kernel_adjoint(fb.gaussian_kernel(1.5), RIDGE, num_steps=1))  # one iteration
    v_Q = case.model.apply(case.inner_params, (), x_Q)[0]
    d = jax.grad(lambda v: case.problem.outer_objective(case.outer_params, v, case.outer_batch))(v_Q)
    c = 2.0 / len(x_P)
    a_P = -np.linalg.solve(RIDGE * np.eye(len(x_P)) + c * gaussian(x_P, x_P), gaussian(x_P, x_Q) @ np.asarray(d))

    def paired(omega: Any) -> jax.Array:
        v = case.model.apply(case.inner_params, (), x_P)[0]
        gradient = jax.grad(lambda v: case.problem.inner_objective(omega, v, case.inner_batch))(v)
        return jnp.sum(gradient * a_P)

    assert_close(h.implicit, jax.grad(paired)(case.outer_params), 1e-10)


def test_a_small_ridge_loses_no_digits():
    """In float32, where the naive form of the solution is a difference of numbers of the size of 1 / ridge."""
    with jax.enable_x64(True):
        case = build("instrument")
        expected = by_representer(case, KERNELS["linear"][1], 1e-6)
    parts = (case.outer_params, case.inner_params, case.inner_batch, case.outer_batch)
    omega, theta, *batches = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parts)
    case = case._replace(outer_params=omega, inner_params=theta, inner_batch=batches[0], outer_batch=batches[1])
    h = implicit(case, fb.kernel_adjoint(fb.linear_kernel(), 1e-6))
    assert_close(h.implicit, expected, 1e-4)


def test_linear_kernel_is_the_linear_adjoint_on_a_pytree_of_outputs(x64):
    case = build("pytree")
    for ridge in (0.0, RIDGE):
        h = implicit(case, fb.kernel_adjoint(fb.linear_kernel(), ridge))
        linear = implicit(case, fb.linear_adjoint(case.features, ridge))
        assert_close(h.implicit, linear.implicit, 1e-9)


def test_random_features_approach_the_exact_kernel(x64):
    case = build("softmax")
    gaussian = KERNELS["gaussian"][0]
    expected = implicit(case, fb.kernel_adjoint(gaussian, 0.1)).implicit
    assert_close(implicit(case, fb.kernel_adjoint(gaussian, 0.1, 300)).implicit, expected, 0.15)
    n = case.inner_batch[0].shape[0]
    exact = implicit(case, fb.kernel_adjoint(polynomial, RIDGE)).implicit
    assert_close(implicit(case, fb.kernel_adjoint(polynomial, RIDGE, num_features=n)).implicit, exact, 1e-8)
    few = implicit(case, fb.kernel_adjoint(polynomial, RIDGE, num_features=n - 3))
    assert bool(few.metrics["linear_converged"])  # an approximation, but the exact solution in its own features


def softmax_problem() -> Any:
    """Cross-entropy alone, which does not see a shift of all logits."""
    x, y = jnp.linspace(-1.0, 1.0, 6)[:, None], jnp.eye(3)[jnp.arange(6) % 3]
    inner = lambda omega, v, b: -jnp.mean(jnp.sum(b[1] * jax.nn.log_softmax(v + omega[None]), axis=1))
    return x, y, inner


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_singular_blocks_give_numbers_and_a_flag(x64, ridge):
    x, y, inner = softmax_problem()
    seen = lambda omega, v, b: -jnp.mean(jnp.sum(b[1] * jax.nn.log_softmax(2.0 * v), axis=1))
    unseen = lambda omega, v, b: jnp.mean(v**2)  # sees the shift, too: without ridge there is no solution
    model = fb.from_function(lambda key, x: jnp.ones((1, 3)), lambda theta, x: x @ theta)
    for outer, solvable in ((seen, True), (unseen, ridge > 0)):
        problem = fb.FunctionalProblem(inner, outer)
        h = jax.jit(
            lambda omega, problem=problem: fb.hypergradient(
                *(problem, model, fb.funcid(fb.kernel_adjoint(fb.gaussian_kernel(0.3), ridge)), omega),
                *(jnp.array([[0.5, -1.0, 0.2]]), (x, y), (x, y)),
            )
        )(jnp.array([0.1, 0.2, -0.3]))
        assert np.all(np.isfinite(h.gradient))
        assert bool(h.metrics["linear_converged"]) == solvable


def test_the_derivative_of_a_kernel_bilevel_problem(x64):
    """Inner kernel ridge with a weight for each sample: the adjoint in the same RKHS gives the derivative of F."""
    rng = np.random.default_rng(0)
    x, z = jnp.asarray(rng.normal(size=(7, 2))), jnp.asarray(rng.normal(size=(5, 2)))
    y, t = jnp.asarray(rng.normal(size=7)), jnp.asarray(rng.normal(size=5))
    kernel = fb.gaussian_kernel(1.5)
    K, K_Q = kernel.matrix(x, x), kernel.matrix(z, x)

    def value(explicit: jax.Array, implicit: jax.Array) -> jax.Array:
        w = jnp.exp(implicit) / 7  # alpha of argmin_h sum w (h - y)^2 / 2 + ridge/2 |h|^2
        alpha = jnp.linalg.solve(w[:, None] * K + RIDGE * jnp.eye(7), w * y)
        return jnp.mean((K_Q @ alpha - t) ** 2)

    model = fb.kernel_model(kernel, x, num_outputs=1, ridge=RIDGE)
    problem = fb.FunctionalProblem(
        lambda omega, v, b: 0.5 * jnp.mean(jnp.exp(omega) * (v[:, 0] - b[1]) ** 2),
        lambda omega, v, b: jnp.mean((v[:, 0] - b[1]) ** 2),
    )
    omega = jnp.asarray(0.3 * rng.normal(size=7))
    estimator = fb.funcid(fb.kernel_adjoint(kernel, RIDGE))
    h = jax.jit(lambda omega: fb.hypergradient(problem, model, estimator, omega, jnp.zeros(1), (x, y), (z, t)))(omega)
    expected = jax.grad(lambda omega: value(omega, omega))(omega)
    np.testing.assert_allclose(h.outer_value, value(omega, omega), rtol=1e-9)
    assert_close(h.gradient, expected, 1e-8)
    assert_close(finite_differences(value, omega).gradient, expected, 1e-7)

    def loss(omega: jax.Array) -> jax.Array:  # and as a layer, by the same adjoint
        predict = fb.argmin(problem, model, estimator)(omega, jnp.zeros(1), (x, y))
        return problem.outer_objective(omega, predict(z), (z, t))

    assert_close(jax.jit(jax.grad(loss))(omega), expected, 1e-8)
    solver = fb.bilevel(problem, model, estimator, inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(1.0))
    state = solver.init(jax.random.key(0), omega, (x, y))
    state, _ = jax.jit(solver.step)(state, (x, y), (z, t))
    assert_close(state.outer_params, omega - expected, 1e-8)


def test_bad_input():
    with pytest.raises(TypeError, match=r"kernel must be an fb\.Kernel or a function"):
        fb.kernel_adjoint(1.0, 0.1)
    with pytest.raises(ValueError, match="ridge must be a finite number >= 0"):
        fb.kernel_adjoint(fb.linear_kernel(), -1.0)
    with pytest.raises(ValueError, match=r"smoothness must be 0\.5, 1\.5 or 2\.5"):
        fb.matern_kernel(1.0, 2.0)
    with pytest.raises(ValueError, match="scale must be a finite number > 0"):
        fb.gaussian_kernel(0.0)
    model = fb.from_function(lambda key, x: jnp.ones((1,)), lambda theta, x: x @ theta)
    loss = lambda omega, v, b: jnp.mean((v - omega * b[1]) ** 2)
    batch = (jnp.ones((4, 1)), jnp.ones(4))
    wrong = fb.funcid(fb.kernel_adjoint(lambda x, z: jnp.sum(x * z, axis=1), 0.1))
    with pytest.raises(ValueError, match=r"kernel must return a matrix \[n, m\], here \[4, 4\], got shape \(4,\)"):
        fb.hypergradient(fb.FunctionalProblem(loss, loss), model, wrong, 1.0, jnp.ones(1), batch, batch)
    mapped = fb.FunctionalProblem(loss, loss, axis_name="devices")
    exact = fb.funcid(fb.kernel_adjoint(fb.linear_kernel(), 0.1))
    with pytest.raises(ValueError, match="centres are the samples of one device"):
        jax.vmap(
            lambda b: fb.hypergradient(mapped, model, exact, 1.0, jnp.ones(1), b, b).gradient, axis_name="devices"
        )(jax.tree.map(lambda x: x[None], batch))
