"""Proximal operators that optax lacks, optimizers with a proximal step, and the derivative of their fixed point."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from funcbilevel._arguments import check_callable, check_optimizer, check_positive
from funcbilevel._implicit import directional, explicit, linearized, with_tangent
from funcbilevel._linear_solvers import LinearSolver, solve_implicit
from funcbilevel._tree import tree_add_scaled
from funcbilevel._typing import InnerParams, LinearMap, OuterParams, PyTree

Prox: TypeAlias = Callable[[InnerParams, OuterParams, Any], InnerParams]
"""`(inner_params, outer_params, step_size) -> inner_params`: argmin over t of g(omega, t) + |t - theta|^2 / (2 s).

For a constraint, the projection, whatever the step size is.
"""


def prox_l1(tree: PyTree, scale: Any) -> PyTree:
    r"""The proximal operator of scale * |x|_1: soft thresholding, sign(x) max(|x| - scale, 0), element by element.

    Arguments:
        tree: pytree of arrays of floats.
        scale: >= 0; a scalar, or a pytree like `tree` whose leaves broadcast.

    Example: as the `prox` of a lasso whose penalty is the outer parameter.
        >>> import jax.numpy as jnp, funcbilevel as fb
        >>> prox = lambda w, penalty, step_size: fb.prox_l1(w, step_size * penalty)
        >>> prox(jnp.array([3.0, -0.5, -2.0]), 2.0, 0.5).tolist()
        [2.0, 0.0, -1.0]
    """
    # Not by signs: the derivative of the branch that is taken, and zero at the kink.
    return _with_scale(tree, scale, lambda x, t: jnp.where(x > t, x - t, jnp.where(x < -t, x + t, jnp.zeros_like(x))))


def prox_group_lasso(tree: PyTree, scale: Any) -> PyTree:
    r"""The proximal operator of scale * sum of the groups' Euclidean norms: x max(1 - scale / |x|, 0), group by group.

    Arguments:
        tree: pytree of arrays of floats, in which each vector along the last axis is a group: [..., size of a group].
        scale: >= 0; a scalar, or a pytree like `tree` whose leaves broadcast, one number for each group: [..., 1].

    Example:
        >>> import jax.numpy as jnp, funcbilevel as fb
        >>> fb.prox_group_lasso(jnp.array([[3.0, 4.0], [0.3, 0.4]]), 2.5).tolist()
        [[1.5, 2.0], [0.0, 0.0]]
    """

    def shrunk(x: jax.Array, t: Any) -> jax.Array:
        squares = jnp.sum(x**2, axis=-1, keepdims=True)
        kept = squares > t**2
        return jnp.where(kept, x * (1.0 - t / jnp.sqrt(jnp.where(kept, squares, 1.0))), 0.0)

    return _with_scale(tree, scale, shrunk)


def projection_affine(x: jax.Array, A: jax.Array, b: jax.Array) -> jax.Array:
    """The projection onto {x : A x = b}: x - A' (A A')^-1 (A x - b).

    Arguments:
        x: [n].
        A: [m, n], of full row rank.
        b: [m].

    Example:
        >>> import jax.numpy as jnp, funcbilevel as fb
        >>> fb.projection_affine(jnp.array([1.0, 2.0]), jnp.array([[1.0, 1.0]]), jnp.array([1.0])).tolist()
        [0.0, 1.0]
    """
    return x - A.T @ jnp.linalg.solve(A @ A.T, A @ x - b)


def _with_scale(tree: PyTree, scale: Any, prox: Callable[[jax.Array, Any], jax.Array]) -> PyTree:
    """Leaf by leaf, by one scale or each by its own."""
    if jax.tree.structure(scale) == jax.tree.structure(tree):
        return jax.tree.map(prox, tree, scale)
    return jax.tree.map(lambda x: prox(x, scale), tree)


def proximal(optimizer: optax.GradientTransformation, prox: Prox, step_size: float) -> optax.GradientTransformation:
    r"""`optimizer` with a proximal step after each of its own: theta <- prox(theta + update, omega, step_size).

    With gradient descent, with momentum or without, and `step_size` its learning rate s, a fixed point minimises
    L_in + g, where `prox` is the proximal operator of s g. With a projection `step_size` does not matter, and an
    optimizer that scales each coordinate by itself (Adam) has other fixed points than the minimiser.

    In `fb.bilevel`, as the outermost transformation, it gets omega, and `fb.itd` differentiates through its steps. It
    is an outer optimizer, too, for a constraint on outer_params.

    Arguments:
        optimizer: any optax optimizer.
        prox: `(inner_params, outer_params, step_size) -> inner_params`: `lambda w, omega, s: fb.prox_l1(w, s * omega)`,
            or a projection of `optax.projections`. outer_params are None where the optimizer is used without omega: as
            outer optimizer, or in a loop of one's own that does not give `update(..., outer_params=omega)`.
        step_size: > 0.

    Returns:
        An `optax.GradientTransformation`.

    Raises:
        TypeError, ValueError: an argument is not what it should be; (at trace time) `update` gets no parameters.

    Example: a lasso by proximal gradient descent.
        >>> import jax, jax.numpy as jnp, optax, funcbilevel as fb
        >>> prox = lambda w, penalty, s: fb.prox_l1(w, s * penalty)
        >>> optimizer = fb.proximal(optax.sgd(0.5), prox, step_size=0.5)
        >>> w = jnp.zeros(2)
        >>> state = optimizer.init(w)
        >>> for _ in range(40):
        ...     gradient = w - jnp.array([3.0, 0.5])  # of |w - (3, 0.5)|^2 / 2
        ...     updates, state = optimizer.update(gradient, state, w, outer_params=1.0)
        ...     w = optax.apply_updates(w, updates)
        >>> w.round(3).tolist()
        [2.0, 0.0]
    """
    check_optimizer("proximal", "optimizer", optimizer)
    check_callable("proximal", "prox", prox, "inner_params, outer_params, step_size")
    check_positive("proximal", "step_size", step_size)
    update = optax.with_extra_args_support(optimizer).update

    def proximal_update(
        updates: PyTree, state: Any, params: PyTree = None, *, outer_params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("proximal: update needs the parameters; call update(gradient, state, params).")
        updates, state = update(updates, state, params, **extra)
        moved = prox(optax.apply_updates(params, updates), outer_params, step_size)
        return jax.tree.map(lambda new, old: new - old, moved, params), state

    return optax.GradientTransformationExtraArgs(optimizer.init, proximal_update)


# The fixed point theta = T(theta) = prox(theta - s d_theta L_in(omega, theta), omega, s). With D the derivative of the
# prox, which is symmetric with eigenvalues between 0 and 1, and M = I - s H,
#
#     d theta = D M d theta + d_omega T .
#
# The matrix I - D M is not symmetric. But d theta = b + D u solves d theta = D M d theta + b for any u with
#
#     (D - D M D) u = D M b ,
#
# whose matrix is symmetric, positive semidefinite if H is positive semidefinite on the range of D, and maps into that
# range, where conjugate gradients stay: on the support of a lasso, on the face of a simplex.


def reduced(D: LinearMap, H: LinearMap, step_size: float) -> LinearMap:
    """u -> (D - D M D) u."""

    def product(u: PyTree) -> PyTree:
        t = D(u)
        return tree_add_scaled(t, -1.0, D(tree_add_scaled(t, -step_size, H(t))))

    return product


def prox_root(
    gradient: LinearMap, prox: LinearMap, theta: InnerParams, step_size: float, solver: LinearSolver
) -> InnerParams:
    """theta with the derivative of the fixed point, by whatever `gradient` and `prox` close over."""
    G, of_gradient = explicit(gradient, theta)
    P, of_prox = explicit(prox, theta)

    def step(operands: tuple[Any, Any], theta: InnerParams) -> InnerParams:
        return tree_add_scaled(theta, -step_size, G(operands[0], theta))

    def push(theta: InnerParams, operands: tuple[Any, Any], tangents: tuple[Any, Any]) -> InnerParams:
        leaves, structure = jax.tree.flatten(operands)

        def T(leaves: list[Any]) -> InnerParams:
            operands = jax.tree.unflatten(structure, leaves)
            return P(operands[1], step(operands, theta))

        b = directional(T, leaves, jax.tree.leaves(tangents))
        H = linearized(lambda theta: G(operands[0], theta), theta)
        D = linearized(lambda z: P(operands[1], z), step(operands, theta))

        def M(t: PyTree) -> PyTree:
            return tree_add_scaled(t, -step_size, H(t))

        def inverse(rhs: PyTree) -> PyTree:
            return solve_implicit(solver, reduced(D, H, step_size), rhs)

        return jax.lax.custom_linear_solve(
            lambda t: tree_add_scaled(t, -1.0, D(M(t))),
            b,
            lambda _, b: tree_add_scaled(b, 1.0, D(inverse(D(M(b))))),
            lambda _, c: tree_add_scaled(c, 1.0, M(D(inverse(D(c))))),
        )

    return with_tangent(theta, (of_gradient, of_prox), push)
