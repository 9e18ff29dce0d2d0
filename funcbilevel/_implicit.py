"""Implicit layers: what any solver found, with the derivative that the implicit function theorem gives it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_jaxpr
from jax.custom_derivatives import SymbolicZero

from funcbilevel._arguments import check_callable
from funcbilevel._described import show
from funcbilevel._linear_solvers import LinearSolver, as_linear_solver, gmres, solve_implicit
from funcbilevel._tracing import reverse_only
from funcbilevel._typing import LinearMap, PyTree

if TYPE_CHECKING:
    import lineax

Solver = Callable[..., Any]

GENERAL = gmres(50, max_restarts=20)


def custom_root(
    optimality: Callable[..., PyTree],
    *,
    linear_solver: LinearSolver | lineax.AbstractLinearSolver[Any] = GENERAL,
    has_aux: bool = False,
) -> Callable[[Solver], Solver]:
    r"""A decorator that gives the result x of any solver the derivative of a root of `optimality`.

    Where G(x, args) = 0, and A = d_x G is invertible,

    .. math:: \partial x = -A^{-1}\, \partial_{args} G ,

    in forward and in reverse mode (with the transpose of A), any number of times, under `jit`, `vmap`, `jacobian` and
    `hessian`; by the solver's arguments and by whatever `optimality` closes over. The solver itself is never
    differentiated: it may be a loop of optax steps, optimistix, SciPy behind `jax.pure_callback`, a closed form, and
    outside of `jit` and `vmap` plain Python. No derivative flows to its `init`.

    Arguments:
        optimality: G, `(solution, *args, **kwargs) -> residual`, a pytree like the solution, zero there; for a minimum
            of f, `jax.grad(f)`.
        linear_solver: for the systems with A. Where A is not symmetric: `gmres`, `normal_cg`, or a lineax solver such
            as `lineax.AutoLinearSolver(well_posed=True)`. Where it is, as with a gradient, and definite of either sign,
            `cg` is faster. The default is GMRES to rounding error, with 50 vectors and as many as 20 restarts.
        has_aux: whether the solver returns a tuple `(solution, ...)`, of which the rest has no derivative.

    Returns:
        A decorator of `solver(init, *args, **kwargs) -> solution`. Arguments, and solutions, are pytrees; leaves
        that are not floats (integers, strings, None, functions) are passed on as they are. A keyword argument that
        `optimality` does not take is the solver's own option.

    Raises:
        TypeError: `optimality` is not callable, `linear_solver` is not one; when called, `has_aux` without a tuple, or
            a traced keyword argument that `optimality` does not take.
        ValueError: when called, the residual is not like the solution, or the solution holds no floats.

    Example: the ridge regression's weights, and their derivative by the penalty.
        >>> import jax, jax.numpy as jnp, funcbilevel as fb
        >>> x, y = jnp.array([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]]), jnp.array([1.0, 2.0, 3.0])
        >>> loss = lambda w, penalty: jnp.sum((x @ w - y) ** 2) / 2 + penalty * jnp.sum(w**2) / 2
        >>> @fb.custom_root(jax.grad(loss), linear_solver=fb.cg(2))
        ... def ridge(init, penalty):
        ...     return jnp.linalg.solve(x.T @ x + penalty * jnp.eye(2), x.T @ y)
        >>> w = ridge(None, 1.0)
        >>> bool(jnp.allclose(jax.jacobian(ridge, argnums=1)(None, 1.0), -jnp.linalg.solve(x.T @ x + jnp.eye(2), w)))
        True

    References:
        Blondel et al., *Efficient and Modular Implicit Differentiation*, NeurIPS 2022,
        https://arxiv.org/abs/2105.15183, equation 2.
    """
    check_callable("custom_root", "optimality", optimality)
    return _decorator("custom_root", optimality, optimality, linear_solver, has_aux)


def custom_fixed_point(
    fixed_point: Callable[..., PyTree],
    *,
    linear_solver: LinearSolver | lineax.AbstractLinearSolver[Any] = GENERAL,
    has_aux: bool = False,
) -> Callable[[Solver], Solver]:
    r"""A decorator that gives the result x of any solver the derivative of a fixed point, x = T(x, args).

    `custom_root` of G(x, args) = x - T(x, args), so that A = I - d_x T:

    .. math:: \partial x = (I - \partial_x T)^{-1}\, \partial_{args} T .

    With `linear_solver=fb.neumann(K, 1.0)` the inverse is the series of K + 1 powers of d_x T, and with `fb.identity()`
    its first term.

    Arguments:
        fixed_point: T, `(solution, *args, **kwargs) -> a pytree like the solution`.
        linear_solver, has_aux: as in `custom_root`. `cg` only where d_x T is symmetric: a step of gradient descent is,
            one followed by a projection is not.

    Returns:
        A decorator of `solver(init, *args, **kwargs) -> solution`, as `custom_root` returns.

    Raises:
        TypeError, ValueError: as `custom_root`.

    Example: the square root of a as the fixed point of x = (x + a / x) / 2.
        >>> import jax, jax.numpy as jnp, funcbilevel as fb
        >>> heron = lambda x, a: (x + a / x) / 2
        >>> @fb.custom_fixed_point(heron)
        ... def root(init, a):
        ...     return jax.lax.fori_loop(0, 10, lambda _, x: heron(x, a), init)
        >>> round(float(jax.grad(root, argnums=1)(1.0, 4.0)), 4)  # 1 / (2 sqrt(4))
        0.25

    References:
        Blondel et al., NeurIPS 2022, https://arxiv.org/abs/2105.15183, equation 3.
    """
    check_callable("custom_fixed_point", "fixed_point", fixed_point)

    def residual(x: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        image = fixed_point(x, *args, **kwargs)
        if jax.tree.structure(image) != jax.tree.structure(x):
            return image  # which `_decorator` refuses
        return jax.tree.map(lambda x, y: x - y if _is_float(x) else x, x, image)

    return _decorator("custom_fixed_point", fixed_point, residual, linear_solver, has_aux)


def kkt_conditions(
    objective: Callable[..., jax.Array],
    equality: Callable[..., PyTree] | None = None,
    inequality: Callable[..., PyTree] | None = None,
) -> Callable[..., PyTree]:
    r"""The conditions of Karush, Kuhn and Tucker, as the `optimality` of `custom_root`: quadratic and other programs.

    For min f(x) with e(x) = 0 and g(x) <= 0, and multipliers nu and lambda,

    .. math::
        \partial_x f + (\partial_x e)^\top \nu + (\partial_x g)^\top \lambda = 0, \qquad
        e = 0, \qquad \min(\lambda, -g) = 0 ,

    so that the derivative is that of the problem in which the active inequalities are equalities and the others
    absent. It exists where the gradients of the active constraints are linearly independent and, for each, lambda > 0.

    Arguments:
        objective: f, `(x, *args) -> scalar`.
        equality: e, `(x, *args)` -> pytree of arrays, or None.
        inequality: g, the same.

    Returns:
        `(solution, *args) -> residual`; the solution is `(x, nu, lambda)`, the multipliers pytrees like the values of e
        and g, and None where there are none. The system is symmetric only without inequalities, and indefinite:
        `gmres` or a direct solver, `lineax.AutoLinearSolver(well_posed=True)`.

    Raises:
        TypeError: an argument is not callable.

    Example: the projection of y onto the half-plane x_1 + x_2 <= 1.
        >>> import jax, jax.numpy as jnp, funcbilevel as fb
        >>> conditions = fb.kkt_conditions(
        ...     lambda x, y: jnp.sum((x - y) ** 2) / 2, inequality=lambda x, y: jnp.sum(x, keepdims=True) - 1
        ... )
        >>> @fb.custom_root(conditions)
        ... def project(init, y):
        ...     multiplier = jnp.maximum((jnp.sum(y, keepdims=True) - 1) / 2, 0)
        ...     return y - multiplier, None, multiplier
        >>> jax.jacobian(lambda y: project(None, y)[0])(jnp.array([1.0, 2.0])).round(3).tolist()
        [[0.5, -0.5], [-0.5, 0.5]]

    References:
        Amos and Kolter, *OptNet*, ICML 2017, https://arxiv.org/abs/1703.00443 (quadratic programs).
    """
    check_callable("kkt_conditions", "objective", objective)
    for name, value in {"equality": equality, "inequality": inequality}.items():
        if value is not None:
            check_callable("kkt_conditions", name, value)

    def optimality(solution: tuple[PyTree, PyTree, PyTree], *args: Any) -> PyTree:
        x, nu, multipliers = solution

        def constraints(x: PyTree) -> tuple[PyTree, PyTree]:
            return None if equality is None else equality(x, *args), None if inequality is None else inequality(
                x, *args
            )

        (e, g), pull = jax.vjp(constraints, x)
        forces = pull((nu, multipliers))[0]
        stationary = jax.tree.map(jnp.add, jax.grad(objective)(x, *args), forces)
        return stationary, e, jax.tree.map(lambda m, g: jnp.minimum(m, -g), multipliers, g)

    return optimality


def _decorator(
    function: str, given: Callable[..., Any], optimality: Callable[..., Any], linear_solver: Any, has_aux: bool
) -> Callable[[Solver], Solver]:
    """The decorator; `given` is what the user wrote, whose signature says which keyword arguments it takes."""
    by_solver = as_linear_solver(linear_solver, function)

    def decorator(solver: Solver) -> Solver:
        check_callable(function, "the decorated solver", solver)

        @functools.wraps(solver)
        def layer(init: Any, *args: Any, **kwargs: Any) -> Any:
            found = without_derivative(solver, init, *args, **kwargs)
            if has_aux and not (isinstance(found, tuple) and found):
                raise TypeError(
                    f"{function}: with has_aux=True the solver must return a tuple (solution, ...), got {show(found)}."
                )
            taken = _taken(function, given, kwargs)
            solution = root(
                function, lambda x: optimality(x, *args, **taken), found[0] if has_aux else found, by_solver
            )
            if not has_aux:
                return solution
            whole = (solution, *found[1:])
            return type(found)(*whole) if hasattr(found, "_fields") else whole

        return layer

    return decorator


def _taken(function: str, given: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that `given` takes, too."""
    parameters = inspect.signature(given).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return kwargs
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for name in kwargs.keys() - names:
        if any(isinstance(x, Tracer) and _is_float(x) for x in jax.tree.leaves(kwargs[name])):
            raise TypeError(
                f"{function}: {name} is traced, and {show(given)} does not take it, so that its derivative would be "
                f"lost; give {show(given)} an argument of that name, or pass jax.lax.stop_gradient({name})."
            )
    return {name: value for name, value in kwargs.items() if name in names}


# What layers are made of.


def without_derivative(f: Callable[..., PyTree], *args: Any, **kwargs: Any) -> PyTree:
    """f(*args, **kwargs), through which no differentiation goes, neither by its arguments nor by its closure."""
    static: list[Any] = []

    def traced() -> list[Any]:
        leaves, structure = jax.tree.flatten(f(*args, **kwargs))
        static[:] = [structure, [None if _is_array(x) else x for x in leaves]]
        return [x for x in leaves if _is_array(x)]

    try:
        program, consts = explicit(traced)
        arrays = iter(program(jax.lax.stop_gradient(consts)))
        structure, others = static
        return jax.tree.unflatten(structure, [next(arrays) if x is None else x for x in others])
    except _NOT_TRACEABLE:
        # Plain Python, which needs values: it can have them outside of jit and vmap.
        stopped = jax.tree.map(lambda x: jax.lax.stop_gradient(x) if _is_array(x) else x, (args, kwargs))
        found = f(*stopped[0], **stopped[1])
        return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if _is_array(x) else x, found)


_NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def root(function: str, residual: LinearMap, x: PyTree, solver: LinearSolver) -> PyTree:
    """x with the derivative of a root of `residual`, by whatever that closes over."""
    leaves, structure = jax.tree.flatten(x)
    leaves = [jnp.asarray(leaf) if _is_float(leaf) else leaf for leaf in leaves]
    floats = [leaf for leaf in leaves if _is_float(leaf)]
    if not floats:
        raise ValueError(f"{function}: the solution must hold an array of floats, got {show(x)}.")

    def whole(floats: Sequence[Any]) -> PyTree:
        moving = iter(floats)
        return jax.tree.unflatten(structure, [next(moving) if _is_float(leaf) else leaf for leaf in leaves])

    def of_floats(floats: list[Any]) -> list[Any]:
        values, got = jax.tree.flatten(residual(whole(floats)))
        if got != structure or any(np.shape(r) != np.shape(x) for r, x in zip(values, leaves) if _is_float(x)):
            raise ValueError(
                f"{function}: at a solution {show(whole(floats))} the residual is "
                f"{show(jax.tree.unflatten(got, values))}; it must be a pytree of the same structure and shapes, one "
                "equation for each unknown."
            )
        return [jnp.asarray(r, x.dtype) for r, x in zip(values, leaves) if _is_float(x)]

    G, consts = explicit(of_floats, floats)

    def push(x: list[Any], consts: list[Any], tangents: list[Any]) -> list[Any]:
        A = linearized(lambda x: G(consts, x), x)
        rhs = directional(lambda consts: G(consts, x), consts, tangents)
        return jax.tree.map(jnp.negative, solve_implicit(solver, A, rhs))

    return whole(with_tangent(floats, consts, push))


def with_tangent(x: PyTree, operands: Any, push: Callable[[PyTree, Any, Any], PyTree]) -> PyTree:
    """x as a function of `operands`, whose tangent is push(x, operands, tangents of operands).

    The tangent must be linear in those of operands, made of what JAX can transpose, and differentiable in x and
    operands; that is all there is to reverse mode and to higher derivatives. Tangents that are zero whatever the
    numbers are come as `SymbolicZero`.
    """
    solution = jax.custom_jvp(lambda x, operands: x)

    def rule(primals: tuple[PyTree, Any], tangents: tuple[PyTree, Any]) -> tuple[PyTree, PyTree]:
        x, operands = primals
        x = solution(x, operands)  # in the tangent, too, x moves with operands: for the derivatives of higher order
        if all(isinstance(t, SymbolicZero) for t in jax.tree.leaves(tangents[1])):
            return x, jax.tree.map(jnp.zeros_like, x)
        return x, push(x, operands, tangents[1])

    solution.defjvp(rule, symbolic_zeros=True)
    return solution(jax.lax.stop_gradient(x), operands)


def not_differentiated(message: str, tree: PyTree) -> PyTree:
    """`tree`; whoever differentiates it gets a TypeError with this message."""
    identity = jax.custom_jvp(lambda tree: tree)

    def rule(primals: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[PyTree, PyTree]:
        if all(isinstance(t, SymbolicZero) for t in jax.tree.leaves(tangents)):
            return primals[0], jax.tree.map(jnp.zeros_like, primals[0])
        raise TypeError(message)

    identity.defjvp(rule, symbolic_zeros=True)
    return identity(tree)


def explicit(f: Callable[..., PyTree], *example: PyTree) -> tuple[Callable[..., PyTree], list[Any]]:
    """g and consts with g(consts, *args) = f(*args): the arrays that f closes over, made into an argument.

    JAX's custom derivatives know of nothing else. (`jax.closure_convert` leaves integers behind.)
    """
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(*example)
    structure = jax.tree.structure(shapes)

    def g(consts: list[Any], *args: PyTree) -> PyTree:
        values = eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(structure, values)

    return g, list(closed.consts)


def linearized(f: Callable[[PyTree], PyTree], x: PyTree) -> LinearMap:
    """The derivative of f at x as a linear map; by transposing twice, where f has no forward derivative."""
    if not reverse_only(f, x):
        return jax.linearize(f, x)[1]
    y, pull = jax.vjp(f, x)
    transpose = jax.linear_transpose(lambda c: pull(c)[0], y)
    return lambda t: transpose(t)[0]


def directional(f: Callable[[list[Any]], PyTree], xs: list[Any], tangents: list[Any]) -> PyTree:
    """The derivative of f at xs along `tangents`, of which some are `SymbolicZero`: those cost nothing."""
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]

    def of_moving(some: list[Any]) -> PyTree:
        moved = dict(zip(moving, some))
        return f([moved.get(i, x) for i, x in enumerate(xs)])

    derivative = linearized(of_moving, [xs[i] for i in moving])([tangents[i] for i in moving])
    # JAX transposes a linear solve only if no leaf of its right-hand side is a plain zero beside others that move.
    nothing = sum(jnp.sum(0.0 * t).astype(jnp.float32) for t in jax.tree.leaves(derivative))
    return jax.tree.map(lambda t: t + jnp.asarray(nothing, t.dtype), derivative)


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic, bool, int, float, complex))


def _is_float(x: Any) -> bool:
    return _is_array(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
