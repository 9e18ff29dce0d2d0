"""The derivatives on one batch that the methods are made of. Of a mapped axis, they are means over it."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from funcbilevel._problem import (
    ParametricProblem,
    inner_cross_derivative,
    inner_derivatives,
    inner_value,
    mean_over_devices,
    outer_derivatives,
)
from funcbilevel._tracing import reverse_only
from funcbilevel._tree import all_finite, tree_add_scaled, tree_norm
from funcbilevel._typing import Batch, InnerParams, Key, Metrics, OuterParams, PyTree


class Outer(NamedTuple):
    """F, its aux, g_exp = d_omega F and d = d_theta F."""

    value: jax.Array
    aux: Metrics
    g_exp: OuterParams
    d: InnerParams


class Directions(NamedTuple):
    """All that a single-loop step needs, at one point and on one batch of each level.

    Attributes:
        theta: d_theta G.
        u: H u - d_theta F.
        omega: the hypergradient, explicit + implicit.
        explicit, implicit: d_omega F and - d^2_omega_theta G u.
        inner_value, outer_value: G and F.
        metrics: the outer aux, and `linear_residual`, |H u - d| / |d| on these samples.
    """

    theta: InnerParams
    u: InnerParams
    omega: OuterParams
    explicit: OuterParams
    implicit: OuterParams
    inner_value: jax.Array
    outer_value: jax.Array
    metrics: Metrics


class Report(NamedTuple):
    """What an outer step tells beside the new state.

    Attributes:
        inner_value, outer_value: the objectives as last seen, on samples.
        explicit, implicit: the two parts of the hypergradient's estimate.
        direction: what went into the outer optimizer.
        metrics: more, and the aux of the outer objective.
    """

    inner_value: jax.Array
    outer_value: jax.Array
    explicit: OuterParams
    implicit: OuterParams
    direction: OuterParams
    metrics: Metrics


class Products(NamedTuple):
    """G, d_theta G, H u and d^2_omega_theta G u."""

    value: jax.Array
    gradient: InnerParams
    Hu: InnerParams
    cross: OuterParams


def outer_gradients(problem: ParametricProblem, omega: OuterParams, theta: InnerParams, batch: Batch) -> Outer:
    value, aux, g_exp, d = outer_derivatives(problem, omega, theta, batch)
    value, g_exp = mean_over_devices(problem, (value, g_exp))
    return Outer(value, aux, g_exp, d)


def inner_gradient(
    problem: ParametricProblem, omega: OuterParams, theta: InnerParams, batch: Batch
) -> tuple[jax.Array, InnerParams]:
    """G and d_theta G."""
    value, gradient = jax.value_and_grad(lambda theta: inner_value(problem, omega, theta, batch)[0])(theta)
    return mean_over_devices(problem, (value, gradient))


def inner_gradients(
    problem: ParametricProblem, omega: OuterParams, theta: InnerParams, batch: Batch
) -> tuple[jax.Array, OuterParams, InnerParams]:
    """G, d_omega G and d_theta G."""
    value, (g_omega, g_theta) = jax.value_and_grad(
        lambda omega, theta: inner_value(problem, omega, theta, batch)[0], argnums=(0, 1)
    )(omega, theta)
    return mean_over_devices(problem, (value, g_omega, g_theta))


def hessian_product(
    problem: ParametricProblem, omega: OuterParams, theta: InnerParams, batch: Batch, u: InnerParams
) -> InnerParams:
    """H u with H = d^2_theta G."""
    return inner_derivatives(problem, omega, theta, batch)[1](u)


def cross_product(
    problem: ParametricProblem, omega: OuterParams, theta: InnerParams, batch: Batch, u: InnerParams
) -> OuterParams:
    """d^2_omega_theta G u."""
    return mean_over_devices(problem, inner_cross_derivative(problem, omega, theta, batch, u))


def products(
    problem: ParametricProblem, omega: OuterParams, theta: InnerParams, batch: Batch, u: InnerParams
) -> Products:
    """Gradient and both products by one pass: the derivative of (d_omega G, d_theta G) along u in theta."""

    def value(omega: OuterParams, theta: InnerParams) -> jax.Array:
        return inner_value(problem, omega, theta, batch)[0]

    def gradients(omega: OuterParams, theta: InnerParams) -> Any:
        return jax.value_and_grad(value, argnums=(0, 1))(omega, theta)

    if reverse_only(value, omega, theta):
        (at, (_, gradient)), pull = jax.vjp(gradients, omega, theta)
        cross, Hu = pull((jnp.zeros_like(at), (jax.tree.map(jnp.zeros_like, omega), u)))
        return Products(*mean_over_devices(problem, (at, gradient, Hu, cross)))
    (at, (_, gradient)), (_, (cross, Hu)) = jax.jvp(lambda theta: gradients(omega, theta), (theta,), (u,))
    return Products(*mean_over_devices(problem, (at, gradient, Hu, cross)))


def directions(
    problem: ParametricProblem,
    omega: OuterParams,
    theta: InnerParams,
    u: InnerParams,
    inner_batch: Batch,
    outer_batch: Batch,
) -> Directions:
    G, gradient, Hu, cross = products(problem, omega, theta, inner_batch, u)
    return joined(gradient, Hu, cross, outer_gradients(problem, omega, theta, outer_batch), G)


def joined(gradient: InnerParams, Hu: InnerParams, cross: OuterParams, outer: Outer, G: jax.Array) -> Directions:
    """The directions from their five parts."""
    g_imp = jax.tree.map(jnp.negative, cross)
    residual = tree_add_scaled(Hu, -1.0, outer.d)
    norm = tree_norm(outer.d)
    metrics = outer.aux | {
        "linear_residual": tree_norm(residual) / jnp.where(norm > 0, norm, 1.0),
        "outer_finite": all_finite(outer.value, outer.d),
    }
    total = tree_add_scaled(outer.g_exp, 1.0, g_imp)
    return Directions(gradient, residual, total, outer.g_exp, g_imp, G, outer.value, metrics)


def report(D: Directions, direction: OuterParams) -> Report:
    """`direction` is what moved omega."""
    return Report(D.inner_value, D.outer_value, D.explicit, D.implicit, direction, D.metrics)


def penalty_report(F: Outer, at_y: OuterParams, at_theta: OuterParams, weight: Any, inner_value: jax.Array) -> Report:
    """Of a penalty method: d_omega F + weight (d_omega G(y) - d_omega G(theta))."""
    g_imp = jax.tree.map(lambda a, b: jnp.asarray(weight, a.dtype) * (a - b), at_y, at_theta)
    metrics = F.aux | {"outer_finite": all_finite(F.value, F.d), "penalty": jnp.asarray(weight, F.value.dtype)}
    return Report(inner_value, F.value, F.g_exp, g_imp, tree_add_scaled(F.g_exp, 1.0, g_imp), metrics)


def recursive_momentum(
    estimate: Callable[[Any], tuple[PyTree, Any]],
    point: PyTree,
    before: PyTree,
    momentum: PyTree,
    weight: Any,
    step: jax.Array,
) -> tuple[PyTree, Any]:
    """STORM: h_t = f(z_t) + (1 - weight) (h_{t-1} - f(z_{t-1})), both f on the same samples; h = f(z_0) at step 0.

    `estimate` is z -> (f(z), more); the result is h_t and what more there is at z_t.
    """
    # Of both points at once, so that they are one program.
    both, more = jax.vmap(estimate)(jax.tree.map(lambda *x: jnp.stack(x), point, before))
    new, old = (jax.tree.map(lambda x, k=k: x[k], both) for k in (0, 1))
    kept = jnp.where(step == 0, 0.0, 1.0 - jnp.asarray(weight))
    h = tree_add_scaled(new, kept, tree_add_scaled(momentum, -1.0, old))
    return h, jax.tree.map(lambda x: x[0], more)


# Hypergradients by a series for the inverse.


class Inverse(Protocol):
    """(omega, theta, d) -> u ~ H^-1 d, on the samples of this outer step."""

    def __call__(self, omega: OuterParams, theta: InnerParams, d: InnerParams, /) -> InnerParams: ...


class Series(NamedTuple):
    """A way to apply H^-1 on samples.

    Attributes:
        num_draws: how many inner draws one application takes.
        at: `(problem, batch, key, step) -> (Inverse, metrics)`, where batch(i), i < num_draws, are its samples.
    """

    num_draws: int
    at: Callable[[ParametricProblem, Callable[[Any], Batch], Key, jax.Array], tuple[Inverse, Metrics]]


def fixed_series(num_steps: int, step_size: Callable[[jax.Array], Any]) -> Series:
    """step_size * sum_{k=0}^K prod_{i=1}^k (I - step_size H_i), with K = num_steps."""

    def at(
        problem: ParametricProblem, batch: Callable[[Any], Batch], key: Key, step: jax.Array
    ) -> tuple[Inverse, Metrics]:
        del key
        size = step_size(step)

        def inverse(omega: OuterParams, theta: InnerParams, d: InnerParams, /) -> InnerParams:
            def add(carry: tuple[PyTree, PyTree], i: jax.Array) -> tuple[tuple[PyTree, PyTree], None]:
                term, total = carry
                term = tree_add_scaled(term, -size, hessian_product(problem, omega, theta, batch(i), term))
                return (term, tree_add_scaled(total, 1.0, term)), None

            (_, total), _ = jax.lax.scan(add, (d, d), jnp.arange(num_steps))
            return _scaled(total, size)

        return inverse, {}

    return Series(num_steps, at)


def random_series(max_length: int, step_size: Callable[[jax.Array], Any]) -> Series:
    """K step_size prod_{i=1}^p (I - step_size H_i), with K = max_length and p uniform on 0, ..., K - 1.

    In expectation it is the fixed series with K terms.
    """

    def at(
        problem: ParametricProblem, batch: Callable[[Any], Batch], key: Key, step: jax.Array
    ) -> tuple[Inverse, Metrics]:
        size, length = step_size(step), jax.random.randint(key, (), 0, max_length)

        def inverse(omega: OuterParams, theta: InnerParams, d: InnerParams, /) -> InnerParams:
            def multiply(i: jax.Array, term: PyTree) -> PyTree:
                return tree_add_scaled(term, -size, hessian_product(problem, omega, theta, batch(i), term))

            return _scaled(jax.lax.fori_loop(0, length, multiply, d), max_length * size)

        return inverse, {"neumann_length": length}

    return Series(max_length - 1, at)


class Estimate(NamedTuple):
    """A hypergradient: what the outer objective gave, and the two parts."""

    outer: Outer
    explicit: OuterParams
    implicit: OuterParams


def by_inverse(
    problem: ParametricProblem,
    omega: OuterParams,
    theta: InnerParams,
    inner_batch: Batch,
    outer_batch: Batch,
    inverse: Inverse,
) -> tuple[OuterParams, Estimate]:
    """d_omega F - d^2_omega_theta G u with u = inverse(d_theta F): the sum, and its parts."""
    F = outer_gradients(problem, omega, theta, outer_batch)
    u = inverse(omega, theta, F.d)
    g_imp = jax.tree.map(jnp.negative, cross_product(problem, omega, theta, inner_batch, u))
    return tree_add_scaled(F.g_exp, 1.0, g_imp), Estimate(F, F.g_exp, g_imp)


def report_of(estimate: Estimate, direction: OuterParams, inner_value: jax.Array, metrics: Metrics) -> Report:
    F, g_exp, g_imp = estimate
    metrics = metrics | F.aux | {"outer_finite": all_finite(F.value, F.d)}
    return Report(inner_value, F.value, g_exp, g_imp, direction, metrics)


def _scaled(tree: PyTree, scale: Any) -> PyTree:
    return jax.tree.map(lambda x: jnp.asarray(scale, x.dtype) * x, tree)
