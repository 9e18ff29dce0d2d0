"""A three-level problem as a bilevel problem whose inner problem is one, against the exact gradient on a quadratic."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcbilevel as fb

TOP, MIDDLE, BOTTOM = 2, 3, 4  # how many parameters each level has


def quadratics() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)

    def spd(k: int) -> np.ndarray:
        X = rng.normal(size=(k, k))
        return X @ X.T / k + np.eye(k)

    normal = lambda *shape: rng.normal(size=shape)
    arrays = {
        "A": spd(BOTTOM), "to_top": normal(TOP, BOTTOM), "to_middle": normal(MIDDLE, BOTTOM), "a": normal(BOTTOM),
        "B": spd(MIDDLE), "b": normal(MIDDLE), "pull": normal(MIDDLE, BOTTOM), "link": normal(TOP, MIDDLE),
        "c": normal(BOTTOM), "d": normal(MIDDLE),
    }  # fmt: skip
    return jax.tree.map(jnp.asarray, arrays)


def bottom(upper: tuple[jax.Array, jax.Array], theta: jax.Array, q: dict[str, jax.Array]) -> jax.Array:
    x, y = upper
    return 0.5 * theta @ q["A"] @ theta + (x @ q["to_top"] + y @ q["to_middle"] + q["a"]) @ theta


def middle(x: jax.Array, y: jax.Array, theta: jax.Array, q: dict[str, jax.Array]) -> jax.Array:
    return 0.5 * y @ q["B"] @ y + (x @ q["link"] + q["b"]) @ y + 0.5 * jnp.sum((y @ q["pull"] + theta) ** 2)


def top(x: jax.Array, y: jax.Array, theta: jax.Array, q: dict[str, jax.Array]) -> jax.Array:
    return jnp.sum((theta - q["c"]) ** 2) + jnp.sum((y - q["d"]) ** 2) + 0.1 * jnp.sum(x**2) + x[0] * y[0]


LAYER = fb.argmin(fb.ParametricProblem(bottom, bottom), None, fb.aid(fb.cg(BOTTOM)))


def lowest(x: jax.Array, y: jax.Array, q: dict[str, jax.Array]) -> jax.Array:
    """theta*, found by Newton's method from zero, with its derivatives by x and y from the layer."""
    found = jnp.linalg.solve(q["A"], -jax.grad(bottom, argnums=1)((x, y), jnp.zeros(BOTTOM), q))
    return LAYER((x, y), found, q)


PROBLEM = fb.ParametricProblem(
    lambda x, y, q: middle(x, y, lowest(x, y, q), q), lambda x, y, q: top(x, y, lowest(x, y, q), q)
)


def exact(x: jax.Array, q: dict[str, jax.Array]) -> Any:
    """The value of the top level and the middle's solution, by dense linear algebra alone."""

    def theta(y: jax.Array) -> jax.Array:
        return jnp.linalg.solve(q["A"], -(x @ q["to_top"] + y @ q["to_middle"] + q["a"]))

    objective = lambda y: middle(x, y, theta(y), q)
    zero = jnp.zeros(MIDDLE)
    y = jnp.linalg.solve(jax.hessian(objective)(zero), -jax.grad(objective)(zero))
    return top(x, y, theta(y), q), y


def test_the_hypergradient_of_three_levels_is_exact(x64):
    q, x = quadratics(), jnp.array([0.3, -0.8])

    @jax.jit
    def compiled(x: jax.Array, q: Any) -> Any:
        (value, y), gradient = jax.value_and_grad(exact, has_aux=True)(x, q)
        return value, gradient, fb.hypergradient(PROBLEM, None, fb.aid(fb.cg(MIDDLE)), x, y, q, q)

    value, gradient, h = compiled(x, q)
    np.testing.assert_allclose(h.outer_value, value, rtol=1e-12)
    np.testing.assert_allclose(h.gradient, gradient, rtol=1e-9)
    assert np.linalg.norm(h.implicit) > 0.1
    assert float(h.metrics["inner_gradient_relative"]) < 1e-12  # the middle level is at its solution
    for i, e in enumerate(np.eye(TOP)):
        ends = [exact(x + sign * 1e-5 * jnp.asarray(e), q)[0] for sign in (1, -1)]
        np.testing.assert_allclose(gradient[i], (ends[0] - ends[1]) / 2e-5, rtol=1e-7)


def test_the_three_level_problem_is_solved(x64):
    """By the usual solver, whose inner steps are those of the middle level."""
    q = quadratics()
    solver = fb.bilevel(
        *(PROBLEM, None, fb.aid(fb.cg(MIDDLE))),
        inner_optimizer=optax.sgd(0.1),
        outer_optimizer=optax.sgd(0.05),
        inner_steps=10,
    )

    @jax.jit
    def run(q: Any) -> Any:
        state = solver.init(jax.random.key(0), jnp.zeros(TOP), q, jnp.zeros(MIDDLE))
        state, _ = jax.lax.scan(lambda s, _: solver.step(s, q, q), state, None, length=300)
        return state.outer_params, jax.grad(lambda x: exact(x, q)[0])(state.outer_params)

    x, gradient = run(q)
    assert np.linalg.norm(gradient) < 1e-5
    assert np.linalg.norm(x) > 0.1
