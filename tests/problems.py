"""Bilevel problems whose hypergradient is known without any of the library's formulas. One row of PROBLEMS each.

Every problem says what F(omega) = L_out(omega, h*_omega) is, and the exact hypergradient is plain `jax.grad` of
that. The inner solution h*_omega is written out in one of three ways:

- the model interpolates and the minimiser at each input is known: h*_omega(x_i) = t_i(omega);
- the model is linear and the objective quadratic: the normal equations, solved densely;
- otherwise Newton's method with the dense Hessian, and one more Newton step to differentiate through:
  d theta* = -H^-1 d(d_theta L_in), the implicit function theorem.

`finite_differences` of F checks the oracle itself.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import funcbilevel as fb


class Parts(NamedTuple):
    """A hypergradient and its two parts, each a pytree like outer_params."""

    gradient: Any
    explicit: Any
    implicit: Any


class System(NamedTuple):
    """H = d^2_theta L_in [p, p], g = d_theta L_out [p], B = d_omega d_theta L_in [p, q] and g_exp."""

    H: jax.Array
    g: jax.Array
    B: jax.Array
    explicit: Any


class Case(NamedTuple):
    """A problem, a point, and what is true there.

    Attributes:
        problem, model, outer_params, inner_params, inner_batch, outer_batch: what `fb.hypergradient` takes;
            inner_params are at the exact inner solution.
        features: (inner_params, inputs) -> [n, p], in whose span the exact adjoint lies; None if parametric.
        value: (explicit, implicit) -> L_out(explicit, h*_implicit): F by omega's two ways into it.
        outer_value, exact: `value` at outer_params, and its derivatives there.
        system: the dense parametric system at the inner solution.
    """

    problem: fb.FunctionalProblem | fb.ParametricProblem
    model: fb.Model | None
    outer_params: Any
    inner_params: Any
    inner_batch: Any
    outer_batch: Any
    features: Callable[[Any, Any], jax.Array] | None
    value: Callable[[Any, Any], jax.Array]
    outer_value: jax.Array
    exact: Parts
    system: System


# Oracles.


def derivatives(value: Callable[[Any, Any], jax.Array], outer_params: Any) -> tuple[jax.Array, Parts]:
    """omega -> value(omega, omega) and its derivatives, by `jax.grad`."""
    F, (explicit, implicit) = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(outer_params, outer_params)
    return F, Parts(jax.tree.map(np.add, explicit, implicit), explicit, implicit)


def finite_differences(value: Callable[[Any, Any], jax.Array], outer_params: Any, step: float = 1e-5) -> Parts:
    """The same by central differences, one coordinate of omega at a time."""
    flat, unravel = ravel_pytree(outer_params)

    @jax.jit
    def differences(flat: jax.Array) -> jax.Array:
        moved = flat[None, None, :] + step * jnp.stack([jnp.eye(flat.size), -jnp.eye(flat.size)])  # [2, q, q]
        still = jnp.broadcast_to(flat, moved.shape)
        explicit, implicit = jnp.stack([moved, moved, still]), jnp.stack([moved, still, moved])  # [3, 2, q, q]
        f = lambda explicit, implicit: value(unravel(explicit), unravel(implicit))
        values = jax.vmap(f)(explicit.reshape(-1, flat.size), implicit.reshape(-1, flat.size)).reshape(3, 2, -1)
        return (values[:, 0] - values[:, 1]) / (2 * step)

    return Parts(*(unravel(row) for row in differences(flat)))


def newton(inner: Callable[[Any, Any], jax.Array], start: Any, num_steps: int = 12) -> Callable[[Any], Any]:
    """omega -> argmin_theta inner(omega, theta), with the derivative that the implicit function theorem gives it."""
    flat_start, unravel = ravel_pytree(start)

    def solution(omega: Any) -> Any:
        gradient = jax.grad(lambda omega, flat: inner(omega, unravel(flat)), argnums=1)
        hessian = jax.hessian(lambda flat: inner(omega, unravel(flat)))

        def step(_: int, flat: jax.Array) -> jax.Array:
            return flat - jnp.linalg.solve(hessian(flat), gradient(omega, flat))

        flat = jax.lax.stop_gradient(jax.lax.fori_loop(0, num_steps, step, flat_start))
        return unravel(flat - jnp.linalg.solve(jax.lax.stop_gradient(hessian(flat)), gradient(omega, flat)))

    return solution


def of_parameters(case: Case) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """The inner and the outer objective as functions of (omega, theta, batch)."""
    problem, model = case.problem, case.model
    if isinstance(problem, fb.ParametricProblem):
        return problem.inner_objective, problem.outer_objective

    def compose(objective: Callable[..., Any]) -> Callable[..., jax.Array]:
        return lambda omega, theta, batch: objective(omega, model.apply(theta, (), problem.inputs(batch))[0], batch)

    return compose(problem.inner_objective), compose(problem.outer_objective)


def dense_system(case: Case) -> System:
    """All of it dense, from Jacobians of flat functions."""
    inner, outer = of_parameters(case)
    theta, unravel = ravel_pytree(case.inner_params)
    omega, unravel_omega = ravel_pytree(case.outer_params)

    def flat_inner(theta: jax.Array, omega: jax.Array) -> jax.Array:
        return inner(unravel_omega(omega), unravel(theta), case.inner_batch)

    def flat_outer(theta: jax.Array, omega: jax.Array) -> jax.Array:
        return outer(unravel_omega(omega), unravel(theta), case.outer_batch)

    @jax.jit
    def system(theta: jax.Array, omega: jax.Array) -> System:
        H, B = jax.jacfwd(jax.grad(flat_inner), argnums=(0, 1))(theta, omega)
        g, explicit = jax.grad(flat_outer, argnums=(0, 1))(theta, omega)
        return System(H, g, B, unravel_omega(explicit))

    return system(theta, omega)


def dense_hypergradient(case: Case, inverse: Callable[[jax.Array, jax.Array], jax.Array]) -> Parts:
    """g_exp - B' u with u = inverse(H, g): what AID gives for an inverse of one's choice."""
    H, g, B, explicit = case.system
    _, unravel = ravel_pytree(case.outer_params)
    implicit = unravel(-B.T @ inverse(H, g))
    return Parts(jax.tree.map(np.add, explicit, implicit), explicit, implicit)


# Models and data.


def linear_model(outputs: Any) -> fb.Model:
    """v = x theta for a pytree of outputs, each given by an array of its shape without the batch axis."""

    def init(key: jax.Array, x: jax.Array) -> Any:
        return jax.tree.map(lambda o: 0.1 * jax.random.normal(key, (x.shape[1], *o.shape), x.dtype), outputs)

    return fb.from_function(init, lambda theta, x: jax.tree.map(lambda W: jnp.tensordot(x, W, 1), theta))


def mlp(width: int) -> fb.Model:
    """v = tanh(x hidden + bias) head, v of shape [n]."""

    def init(key: jax.Array, x: jax.Array) -> Any:
        keys = jax.random.split(key, 3)
        return {
            "hidden": jax.random.normal(keys[0], (x.shape[1], width), x.dtype),
            "bias": jax.random.normal(keys[1], (width,), x.dtype),
            "head": jax.random.normal(keys[2], (width,), x.dtype) / width**0.5,
        }

    return fb.from_function(init, lambda theta, x: mlp_features(theta, x) @ theta["head"])


def mlp_features(theta: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ theta["hidden"] + theta["bias"][None, :])


def identity_features(theta: Any, x: jax.Array) -> jax.Array:
    del theta
    return x


def design(rng: np.random.Generator, n: int, p: int) -> np.ndarray:
    """A well-conditioned [n, p] matrix with entries of order one."""
    q, _ = np.linalg.qr(rng.normal(size=(max(n, p), min(n, p))))
    return np.sqrt(n) * (q if n >= p else q.T) + 0.2 * rng.normal(size=(n, p))


# Written out plainly: the arguments are small, and JAX's guarded versions take several times as long to compile.


def log_cosh(r: jax.Array) -> jax.Array:
    return jnp.log(jnp.cosh(r))


def softplus(r: jax.Array) -> jax.Array:
    return jnp.log(1.0 + jnp.exp(r))


def log_softmax(v: jax.Array) -> jax.Array:
    return v - jnp.log(jnp.sum(jnp.exp(v), axis=1, keepdims=True))


def completed(case: Case) -> Case:
    """`case` with its exact hypergradient and its dense system filled in."""
    outer_value, exact = derivatives(case.value, case.outer_params)
    return case._replace(outer_value=outer_value, exact=exact, system=dense_system(case))


def interpolating(
    problem: fb.FunctionalProblem,
    model: fb.Model,
    omega: Any,
    target: Callable[[Any, Any], Any],
    fit: Callable[[Any], Any],
    batches: tuple[Any, Any],
    features: Callable[[Any, Any], jax.Array] = identity_features,
) -> Case:
    """h*_omega(x) = target(omega, x) on the inputs x of both batches; fit(values) are parameters that take them."""

    def value(explicit: Any, implicit: Any) -> jax.Array:
        return problem.outer_objective(explicit, target(implicit, problem.inputs(batches[1])), batches[1])

    theta = fit(target(omega, problem.inputs(batches[0])))
    return completed(Case(problem, model, omega, theta, *batches, features, value, None, None, None))


def solved(problem: Any, model: fb.Model | None, omega: Any, solution: Callable[[Any], Any], batches: Any) -> Case:
    """theta*_omega = solution(omega)."""
    features = None if model is None else identity_features
    case = Case(problem, model, omega, None, *batches, features, None, None, None, None)
    _, outer = of_parameters(case)

    def value(explicit: Any, implicit: Any) -> jax.Array:
        return outer(explicit, solution(implicit), case.outer_batch)

    return completed(case._replace(inner_params=jax.jit(solution)(omega), value=value))


# The problems.


def cosh() -> Case:
    """design.md's oracle: mean_i w_i sum_j cosh(v_ij - t_ij(omega)) with unequal weights, interpolated."""
    rng = np.random.default_rng(0)
    n, k = 6, 2
    x = jnp.asarray(design(rng, n, n))
    w, y = jnp.asarray(rng.uniform(0.3, 3.0, n)), jnp.asarray(rng.normal(size=(n, k)))
    omega = {"slope": jnp.asarray(0.3 * rng.normal(size=(n, k))), "shift": jnp.asarray(rng.normal(size=k))}

    def target(omega: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ omega["slope"]) + omega["shift"][None, :]

    problem = fb.FunctionalProblem(
        lambda omega, v, batch: jnp.mean(batch[1] * jnp.sum(jnp.cosh(v - target(omega, batch[0])), axis=1)),
        lambda omega, v, batch: jnp.mean(jnp.sum(jnp.cosh(v - batch[1]), axis=1)),
    )
    model = linear_model(np.zeros(k))
    return interpolating(problem, model, omega, target, lambda t: jnp.linalg.solve(x, t), ((x, w), (x, y)))


def shifted() -> Case:
    """The same inner objective on other inputs than the outer one's, P != Q, with a target in the linear class."""
    rng = np.random.default_rng(1)
    n_P, n_Q, p, k = 9, 7, 4, 2
    x_P, x_Q = jnp.asarray(design(rng, n_P, p)), jnp.asarray(2.0 * design(rng, n_Q, p) + 0.5)
    w, y = jnp.asarray(rng.uniform(0.3, 3.0, n_P)), jnp.asarray(rng.normal(size=(n_Q, k)))
    omega = jnp.asarray(0.5 * rng.normal(size=(p, k)))

    def solution(omega: jax.Array) -> jax.Array:
        return omega + 0.3 * jnp.sin(omega[::-1])

    def inner(omega: jax.Array, v: jax.Array, batch: Any) -> jax.Array:
        x, w = batch
        return jnp.mean(w * jnp.sum(jnp.cosh(v - x @ solution(omega)), axis=1))

    def outer(omega: jax.Array, v: jax.Array, batch: Any) -> jax.Array:
        return jnp.mean(jnp.sum(log_cosh(v - batch[1]), axis=1))

    problem = fb.FunctionalProblem(inner, outer)
    return solved(problem, linear_model(np.zeros(k)), omega, solution, ((x_P, w), (x_Q, y)))


def pytree() -> Case:
    """Predictions {"mean": [n, 2], "rest": ([n],)} that the inner objective couples; batches are dicts with extras."""
    rng = np.random.default_rng(2)
    n = 5
    x = jnp.asarray(design(rng, n, n))
    inner_batch = {"x": x, "w": jnp.asarray(rng.uniform(0.3, 3.0, n)), "step": jnp.asarray(3)}
    outer_batch = {"x": x, "y": jnp.asarray(rng.normal(size=(n, 2)))}
    omega = (jnp.asarray(rng.normal(size=n)), {"b": jnp.asarray(rng.normal(size=2)), "c": jnp.asarray(0.7)})

    def target(omega: Any, x: jax.Array) -> Any:
        a, other = omega
        return {"mean": jnp.outer(jnp.sin(a), other["b"]), "rest": (other["c"] * a**2,)}

    def inner(omega: Any, v: Any, batch: Any) -> jax.Array:
        r = jax.tree.map(jnp.subtract, v, target(omega, batch["x"]))
        mean, rest = r["mean"], r["rest"][0]
        return jnp.mean(batch["w"] * (jnp.sum(jnp.cosh(mean), 1) + 2.0 * jnp.cosh(rest) + 0.7 * mean[:, 0] * rest))

    def outer(omega: Any, v: Any, batch: Any) -> jax.Array:
        fit = jnp.sum((v["mean"] - batch["y"]) ** 2, axis=1)
        return jnp.mean(fit * jnp.exp(-0.3 * v["rest"][0]) + 0.5 * v["rest"][0] ** 2)

    def fit(t: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.linalg.solve(x, leaf), t)

    problem = fb.FunctionalProblem(inner, outer, inputs=lambda batch: batch["x"])
    model = linear_model({"mean": np.zeros(2), "rest": (np.zeros(()),)})
    return interpolating(problem, model, omega, target, fit, (inner_batch, outer_batch))


def network() -> Case:
    """A network with more parameters than samples, and an outer objective with omega in it."""
    rng = np.random.default_rng(3)
    n, width = 5, 5
    x = jnp.asarray(rng.normal(size=(n, 3)))
    w, y = jnp.asarray(rng.uniform(0.3, 3.0, n)), jnp.asarray(rng.normal(size=n))
    omega = {"a": jnp.asarray(rng.normal(size=3)), "b": jnp.asarray(0.4)}
    hidden = {"hidden": jnp.asarray(2.0 * rng.normal(size=(3, width))), "bias": jnp.asarray(rng.normal(size=width))}

    def target(omega: Any, x: jax.Array) -> jax.Array:
        return jnp.sin(x @ omega["a"]) + omega["b"] ** 2

    def outer(omega: Any, v: jax.Array, batch: Any) -> jax.Array:
        x, y = batch
        return jnp.exp(omega["b"]) * jnp.mean((v - y) ** 2 * (x @ omega["a"])) + jnp.sum(omega["a"] ** 2)

    problem = fb.FunctionalProblem(
        lambda omega, v, batch: jnp.mean(batch[1] * jnp.exp(omega["b"]) * jnp.cosh(v - target(omega, batch[0]))), outer
    )

    def fit(t: jax.Array) -> Any:
        return hidden | {"head": jnp.linalg.solve(mlp_features(hidden, x), t)}

    batches = ((x, w), (x, y))
    return interpolating(problem, mlp(width), omega, target, fit, batches, features=mlp_features)


def least_squares() -> Case:
    """Vector-valued least squares, P != Q, that no linear model fits: omega weighs samples and mixes targets."""
    rng = np.random.default_rng(4)
    n_P, n_Q, p, k = 8, 6, 3, 2
    x_P, x_Q = jnp.asarray(design(rng, n_P, p)), jnp.asarray(design(rng, n_Q, p) + 0.5)
    y_P, y_Q = jnp.asarray(rng.normal(size=(n_P, k))), jnp.asarray(rng.normal(size=(n_Q, k)))
    omega = {"log_weight": jnp.asarray(0.5 * rng.normal(size=n_P)), "mix": jnp.asarray(np.eye(k) + 0.3)}

    def inner(omega: Any, v: jax.Array, batch: Any) -> jax.Array:
        return jnp.mean(jnp.exp(omega["log_weight"]) * jnp.sum((v - batch[1] @ omega["mix"]) ** 2, axis=1))

    def outer(omega: Any, v: jax.Array, batch: Any) -> jax.Array:
        return 0.5 * jnp.mean(jnp.sum((v - batch[1]) ** 2, axis=1)) + 0.1 * jnp.sum(omega["mix"] ** 3)

    def solution(omega: Any) -> jax.Array:
        weighted = x_P.T * jnp.exp(omega["log_weight"])[None, :]
        return jnp.linalg.solve(weighted @ x_P, weighted @ y_P @ omega["mix"])

    problem = fb.FunctionalProblem(inner, outer)
    return solved(problem, linear_model(np.zeros(k)), omega, solution, ((x_P, y_P), (x_Q, y_Q)))


def instrument() -> Case:
    """Instrumental regression: the inner level regresses a network f_omega(x) on instruments z; C = (2/n) I."""
    rng = np.random.default_rng(5)
    n_P, n_Q, p = 10, 8, 3
    inner_batch = jnp.asarray(design(rng, n_P, p)), jnp.asarray(rng.normal(size=(n_P, 2)))
    outer_batch = jnp.asarray(design(rng, n_Q, p)), jnp.asarray(rng.normal(size=n_Q))
    omega = mlp(3).init(jax.random.key(0), jnp.zeros((1, 2)))[0]

    def outcome(omega: Any, x: jax.Array) -> jax.Array:
        return mlp(3).apply(omega, (), x)[0]

    def solution(omega: Any) -> jax.Array:
        z, x = inner_batch
        return jnp.linalg.solve(z.T @ z, z.T @ outcome(omega, x))

    problem = fb.FunctionalProblem(
        lambda omega, v, batch: jnp.mean((v - outcome(omega, batch[1])) ** 2),
        lambda omega, v, batch: jnp.mean((v - batch[1]) ** 2),
    )
    return solved(problem, linear_model(np.zeros(())), omega, solution, (inner_batch, outer_batch))


def softmax() -> Case:
    """Cross-entropy with soft labels from omega: C couples the three outputs of each sample. P != Q."""
    rng = np.random.default_rng(6)
    n_P, n_Q, p, k = 8, 7, 3, 3
    x_P, x_Q = jnp.asarray(design(rng, n_P, p)), jnp.asarray(design(rng, n_Q, p) + 0.3)
    y_P, y_Q = (jnp.asarray(np.eye(k)[rng.integers(0, k, n)]) for n in (n_P, n_Q))
    omega = {"confusion": jnp.asarray(rng.normal(size=(k, k))), "log_weight": jnp.asarray(rng.normal(size=n_P))}

    def inner(omega: Any, v: jax.Array, batch: Any) -> jax.Array:
        labels = batch[1] @ jax.nn.softmax(omega["confusion"])
        cross_entropy = -jnp.sum(labels * log_softmax(v), axis=1)
        return jnp.mean(jnp.exp(omega["log_weight"]) * cross_entropy) + 0.05 * jnp.mean(jnp.sum(v**2, axis=1))

    def outer(omega: Any, v: jax.Array, batch: Any) -> jax.Array:
        return -jnp.mean(jnp.sum(batch[1] * log_softmax(v), axis=1))

    solution = newton(lambda omega, theta: inner(omega, x_P @ theta, (x_P, y_P)), jnp.zeros((p, k)))
    problem = fb.FunctionalProblem(inner, outer)
    return solved(problem, linear_model(np.zeros(k)), omega, solution, ((x_P, y_P), (x_Q, y_Q)))


def logistic() -> Case:
    """Logistic inner objective: omega weighs the samples and shifts the logits. P != Q."""
    rng = np.random.default_rng(7)
    n_P, n_Q, p = 12, 7, 3
    x_P, x_Q = jnp.asarray(design(rng, n_P, p)), jnp.asarray(design(rng, n_Q, p) + 0.3)
    y_P, y_Q = jnp.asarray(rng.choice([-1.0, 1.0], n_P)), jnp.asarray(rng.choice([-1.0, 1.0], n_Q))
    omega = {"log_weight": jnp.asarray(rng.normal(size=n_P)), "shift": jnp.asarray(0.3)}

    def inner(omega: Any, v: jax.Array, batch: Any) -> jax.Array:
        return jnp.mean(jnp.exp(omega["log_weight"]) * softplus(-batch[1] * (v + omega["shift"])))

    def outer(omega: Any, v: jax.Array, batch: Any) -> jax.Array:
        return jnp.mean(softplus(-batch[1] * v)) + omega["shift"] ** 2

    solution = newton(lambda omega, theta: inner(omega, x_P @ theta, (x_P, y_P)), jnp.zeros(p), num_steps=25)
    problem = fb.FunctionalProblem(inner, outer)
    return solved(problem, linear_model(np.zeros(())), omega, solution, ((x_P, y_P), (x_Q, y_Q)))


def ridge() -> Case:
    """Ridge regression with a log-penalty for each coefficient: a parametric problem."""
    rng = np.random.default_rng(8)
    n, p = 9, 4
    x_P, x_Q = jnp.asarray(design(rng, n, p)), jnp.asarray(design(rng, n, p))
    y_P, y_Q = jnp.asarray(rng.normal(size=n)), jnp.asarray(rng.normal(size=n))
    omega = jnp.asarray(rng.normal(size=p))

    def inner(omega: jax.Array, theta: jax.Array, batch: Any) -> jax.Array:
        x, y = batch
        return jnp.mean((x @ theta - y) ** 2) + jnp.sum(jnp.exp(omega) * theta**2)

    def outer(omega: jax.Array, theta: jax.Array, batch: Any) -> jax.Array:
        x, y = batch
        return jnp.mean((x @ theta - y) ** 2)

    def solution(omega: jax.Array) -> jax.Array:
        return jnp.linalg.solve(x_P.T @ x_P / n + jnp.diag(jnp.exp(omega)), x_P.T @ y_P / n)

    return solved(fb.ParametricProblem(inner, outer), None, omega, solution, ((x_P, y_P), (x_Q, y_Q)))


def logistic_ridge() -> Case:
    """Logistic regression with a log-penalty, parameters in a dict, the penalty's own cost in the outer objective."""
    rng = np.random.default_rng(9)
    n, p = 12, 3
    x_P, x_Q = jnp.asarray(design(rng, n, p)), jnp.asarray(design(rng, n, p))
    y_P, y_Q = jnp.asarray(rng.choice([-1.0, 1.0], n)), jnp.asarray(rng.choice([-1.0, 1.0], n))
    omega = {"log_penalty": jnp.asarray(-1.0), "log_weight": jnp.asarray(rng.normal(size=n))}

    def inner(omega: Any, theta: Any, batch: Any) -> jax.Array:
        x, y = batch
        losses = softplus(-y * (x @ theta["w"] + theta["b"]))
        return jnp.mean(jnp.exp(omega["log_weight"]) * losses) + jnp.exp(omega["log_penalty"]) * (
            jnp.sum(theta["w"] ** 2) + 0.1 * theta["b"] ** 2
        )

    def outer(omega: Any, theta: Any, batch: Any) -> jax.Array:
        x, y = batch
        return jnp.mean(softplus(-y * (x @ theta["w"] + theta["b"]))) + 0.01 * omega["log_penalty"] ** 2

    start = {"w": jnp.zeros(p), "b": jnp.zeros(())}
    solution = newton(lambda omega, theta: inner(omega, theta, (x_P, y_P)), start)
    return solved(fb.ParametricProblem(inner, outer), None, omega, solution, ((x_P, y_P), (x_Q, y_Q)))


class Row(NamedTuple):
    """A row of PROBLEMS.

    Attributes:
        build: makes the case.
        functional: a `FunctionalProblem`, or a `ParametricProblem`.
        interpolates: both batches hold the same inputs and the model can take any values there.
        singular: more inner parameters than the batch determines, so the parametric Hessian is not invertible.
    """

    build: Callable[[], Case]
    functional: bool = True
    interpolates: bool = False
    singular: bool = False


PROBLEMS: dict[str, Row] = {
    "cosh": Row(cosh, interpolates=True),
    "shifted": Row(shifted),
    "pytree": Row(pytree, interpolates=True),
    "network": Row(network, interpolates=True, singular=True),
    "least-squares": Row(least_squares),
    "instrument": Row(instrument),
    "softmax": Row(softmax),
    "logistic": Row(logistic),
    "ridge": Row(ridge, functional=False),
    "logistic-ridge": Row(logistic_ridge, functional=False),
}


@functools.cache
def build(name: str) -> Case:
    """The problem of that name, in float64: call it under the `x64` fixture."""
    assert jax.config.jax_enable_x64, "problems are built in float64; use the x64 fixture"
    return PROBLEMS[name].build()
