"""The problems on which funcbilevel and its peers are compared.

Each is stated once, over the few array functions that JAX and PyTorch have in common, and solved once, in float64; the
inner solution, the step size and the data that every library gets are that solution's, rounded to the dtype.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = Any
Theta = tuple[Array, ...]
Objective = Callable[[SimpleNamespace, Array, Theta, tuple[Array, ...]], Array]
"""`(functions, omega, theta, batch) -> scalar`; `functions` are those of JAX or of PyTorch."""

JAX = SimpleNamespace(
    exp=jnp.exp,
    mean=jnp.mean,
    sum=jnp.sum,
    relu=jax.nn.relu,
    sigmoid=jax.nn.sigmoid,
    softplus=jax.nn.softplus,
    log_softmax=jax.nn.log_softmax,
)

DAMPING = 0.05
"""Of the problems with a network: (c / 2) |theta - theta_0|^2 is part of their inner objective, with theta_0 the inner
solution and c this share of the largest curvature there. It leaves the solution alone and makes the Hessian positive
definite and well conditioned, without any library's having to have an option for it."""


class Statement(NamedTuple):
    """A bilevel problem.

    Attributes:
        inner, outer: objectives.
        omega: the outer parameters, one array.
        start: where the inner solver starts.
        inner_batch, outer_batch: tuples of arrays.
        proximal: whether the inner objective gets the term of `DAMPING`.
    """

    inner: Objective
    outer: Objective
    omega: np.ndarray
    start: tuple[np.ndarray, ...]
    inner_batch: tuple[np.ndarray, ...]
    outer_batch: tuple[np.ndarray, ...]
    proximal: bool = False


class Case(NamedTuple):
    """A problem with its inner solution, in one dtype: what every library gets.

    Attributes:
        inner, outer: objectives.
        omega, theta, inner_batch, outer_batch: NumPy arrays of the dtype.
        step_size: 1 / largest eigenvalue of the inner Hessian at theta, of the Neumann series and of the inner steps.
        steps: products of the linear solver, or unrolled gradient steps from theta.
        rtol: relative residual at which conjugate gradients may stop before: rounding error, where ours stop.
    """

    inner: Objective
    outer: Objective
    omega: np.ndarray
    theta: tuple[np.ndarray, ...]
    inner_batch: tuple[np.ndarray, ...]
    outer_batch: tuple[np.ndarray, ...]
    step_size: float
    steps: int
    rtol: float = 8 * float(np.finfo(np.float32).eps)


# Objectives.


def ridge_inner(xp: SimpleNamespace, omega: Array, theta: Theta, batch: tuple[Array, ...]) -> Array:
    """Least squares with penalty exp(omega), one number."""
    x, y = batch
    (w,) = theta
    return 0.5 * xp.mean((x @ w - y) ** 2) + 0.5 * xp.exp(omega) * xp.sum(w**2)


def ridge_outer(xp: SimpleNamespace, omega: Array, theta: Theta, batch: tuple[Array, ...]) -> Array:
    """Squared error on the validation sample."""
    x, y = batch
    return 0.5 * xp.mean((x @ theta[0] - y) ** 2) + 0.0 * omega


def logistic_inner(xp: SimpleNamespace, omega: Array, theta: Theta, batch: tuple[Array, ...]) -> Array:
    """Logistic regression, y in {-1, 1}, with one penalty exp(omega_j) per feature."""
    x, y = batch
    (w,) = theta
    return xp.mean(xp.softplus(-y * (x @ w))) + 0.5 * xp.sum(xp.exp(omega) * w**2)


def logistic_outer(xp: SimpleNamespace, omega: Array, theta: Theta, batch: tuple[Array, ...]) -> Array:
    """Logistic loss on the validation sample."""
    x, y = batch
    return xp.mean(xp.softplus(-y * (x @ theta[0]))) + 0.0 * xp.sum(omega)


def network(xp: SimpleNamespace, theta: Theta, x: Array) -> Array:
    """A ReLU network; theta is kernel, bias, kernel, bias, ..."""
    for kernel, bias in zip(theta[:-2:2], theta[1:-2:2]):
        x = xp.relu(x @ kernel + bias[None])
    return x @ theta[-2] + theta[-1][None]


def cleaning_inner(xp: SimpleNamespace, omega: Array, theta: Theta, batch: tuple[Array, ...]) -> Array:
    """Cross entropy of which sample i has weight sigmoid(omega_i), and weight decay; labels are one-hot."""
    x, y = batch
    losses = -xp.sum(y * xp.log_softmax(network(xp, theta, x), 1), 1)
    return xp.mean(xp.sigmoid(omega) * losses) + 5e-3 * sum(xp.sum(t**2) for t in theta)


def cleaning_outer(xp: SimpleNamespace, omega: Array, theta: Theta, batch: tuple[Array, ...]) -> Array:
    """Cross entropy on clean samples."""
    x, y = batch
    return -xp.mean(xp.sum(y * xp.log_softmax(network(xp, theta, x), 1), 1)) + 0.0 * xp.sum(omega)


def regression_inner(xp: SimpleNamespace, omega: Array, theta: Theta, batch: tuple[Array, ...]) -> Array:
    """Functional regression: the network's values are fitted to x omega."""
    (x,) = batch
    return 0.5 * xp.mean((network(xp, theta, x) - x @ omega) ** 2)


def regression_outer(xp: SimpleNamespace, omega: Array, theta: Theta, batch: tuple[Array, ...]) -> Array:
    """Its values against data."""
    x, y = batch
    return 0.5 * xp.mean((network(xp, theta, x) - y) ** 2) + 1e-3 * xp.sum(omega**2)


# Statements, with their data.


def ridge(d: int) -> Statement:
    rng = np.random.default_rng(0)
    n, w = 2 * d, rng.normal(size=d) / np.sqrt(d)
    scales = np.logspace(0, -1, d)

    def sample() -> tuple[np.ndarray, ...]:
        x = rng.normal(size=(n, d)) * scales
        return x, x @ w + 0.5 * rng.normal(size=n)

    return Statement(ridge_inner, ridge_outer, np.array(-3.0), (np.zeros(d),), sample(), sample())


def logistic(d: int, n: int) -> Statement:
    rng = np.random.default_rng(1)
    w = rng.normal(size=d) * (rng.uniform(size=d) < 0.2) / np.sqrt(0.2 * d)

    def sample() -> tuple[np.ndarray, ...]:
        x = rng.normal(size=(n, d))
        return x, np.sign(x @ w + 0.3 * rng.normal(size=n))

    return Statement(logistic_inner, logistic_outer, np.full(d, -4.0), (np.zeros(d),), sample(), sample())


def initial_network(sizes: Sequence[int]) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(2)
    layers = [(rng.normal(size=(m, n)) * np.sqrt(2 / m), np.zeros(n)) for m, n in pairwise(sizes)]
    return tuple(array for layer in layers for array in layer)


def cleaning(hidden: Sequence[int]) -> Statement:
    """Data hyper-cleaning of scikit-learn's digits, of which half of the training labels are drawn at random."""
    from sklearn.datasets import load_digits  # noqa: PLC0415

    digits: Any = load_digits()
    rng = np.random.default_rng(3)
    order = rng.permutation(len(digits.data))
    x, labels = digits.data[order] / 16.0, digits.target[order]
    half = len(x) // 2
    corrupted = np.where(rng.uniform(size=half) < 0.5, rng.integers(10, size=half), labels[:half])
    one_hot = np.eye(10)
    return Statement(
        cleaning_inner,
        cleaning_outer,
        np.zeros(half),
        initial_network([64, *hidden, 10]),
        (x[:half], one_hot[corrupted]),
        (x[half:], one_hot[labels[half:]]),
        proximal=bool(hidden),
    )


def regression(depth: int, width: int = 256, n: int = 512) -> Statement:
    rng = np.random.default_rng(4)
    x_P, x_Q = rng.normal(size=(2, n, 10))
    y = np.sin(x_Q[:, :1]) + 0.1 * rng.normal(size=(n, 1))
    start = initial_network([10, *[width] * depth, 1])
    omega = rng.normal(size=(10, 1)) / np.sqrt(10)
    return Statement(regression_inner, regression_outer, omega, start, (x_P,), (x_Q, y), proximal=True)


STATEMENTS: dict[str, Callable[[], Statement]] = {
    "ridge-100": lambda: ridge(100),
    "ridge-2000": lambda: ridge(2000),
    "logistic-1000": lambda: logistic(1000, 10_000),
    "cleaning-linear": lambda: cleaning([]),
    "cleaning-mlp": lambda: cleaning([128, 128]),
    "regression-1": lambda: regression(1),
    "regression-8": lambda: regression(8),
}


# Solutions.


@cache
def solved(name: str) -> tuple[Statement, tuple[np.ndarray, ...], float]:
    """The statement, its inner solution and the largest curvature there, in float64."""
    from scipy import optimize  # noqa: PLC0415

    with jax.enable_x64(True):
        statement = STATEMENTS[name]()
        shapes = [t.shape for t in statement.start]
        ends = np.cumsum([t.size for t in statement.start])[:-1]

        def tree(vector: Array) -> Theta:
            return tuple(part.reshape(shape) for part, shape in zip(jnp.split(vector, ends), shapes))

        batch = jax.tree.map(jnp.asarray, statement.inner_batch)
        omega = jnp.asarray(statement.omega)

        def objective(vector: Array) -> Array:
            return statement.inner(JAX, omega, tree(vector), batch)

        value_and_grad = jax.jit(jax.value_and_grad(objective))
        start = np.concatenate([t.reshape(-1) for t in statement.start])
        options: Any = {"maxiter": 100 if statement.proximal else 300, "gtol": 1e-8, "ftol": 0.0}
        result: Any = optimize.minimize(
            lambda v: jax.tree.map(np.asarray, value_and_grad(v)), start, jac=True, method="L-BFGS-B", options=options
        )

        @jax.jit
        def largest_curvature(v: Array) -> Array:
            _, hvp = jax.linearize(jax.grad(objective), v)

            def power_step(u: Array, _: None) -> tuple[Array, Array]:
                product = hvp(u)
                norm = jnp.linalg.norm(product)
                return product / norm, norm

            return jax.lax.scan(power_step, v + 1.0, None, length=100)[1][-1]

        curvature = float(largest_curvature(jnp.asarray(result.x)))
        return statement, jax.tree.map(np.asarray, tree(result.x)), curvature


def case(name: str, steps: int, dtype: Any = np.float32) -> Case:
    """The problem `name` with its inner solution, in a dtype."""
    statement, theta, curvature = solved(name)

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: np.asarray(x, dtype), tree)

    inner, batch, center = statement.inner, cast(statement.inner_batch), cast(theta)
    if statement.proximal:
        size, strength = len(batch), DAMPING * curvature
        curvature += strength

        def inner(xp: SimpleNamespace, omega: Array, theta: Theta, batch: tuple[Array, ...]) -> Array:
            distance = sum(xp.sum((t - c) ** 2) for t, c in zip(theta, batch[size:]))
            return statement.inner(xp, omega, theta, batch[:size]) + 0.5 * strength * distance

        batch = (*batch, *center)
    return Case(
        inner,
        statement.outer,
        cast(statement.omega),
        center,
        batch,
        cast(statement.outer_batch),
        1.0 / curvature,
        steps,
    )
