"""What a function does, found out by tracing it: nothing is computed."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from funcbilevel._typing import PyTree


def dependence(f: Callable[..., jax.Array], *args: PyTree) -> tuple[list[PyTree], Any]:
    """For each argument a tree of bools: whether the derivative of f by that leaf is more than a structural zero.

    And the jaxpr of the derivatives. Each leaf passes through an identity whose backward rule leaves a mark: JAX calls
    the rule while tracing exactly where a derivative path exists.
    """
    leaves, structure = jax.tree.flatten(args)
    found = [False] * len(leaves)

    def marked(i: int, leaf: Any) -> Any:
        def backward(_: None, cotangent: Any) -> tuple[Any]:
            found[i] = True
            return (cotangent,)

        identity = jax.custom_vjp(lambda x: x)
        identity.defvjp(lambda x: (x, None), backward)
        return identity(leaf)

    def of_marked(leaves: list[Any]) -> jax.Array:
        return f(*jax.tree.unflatten(structure, [marked(i, leaf) for i, leaf in enumerate(leaves)]))

    jaxpr = jax.make_jaxpr(jax.grad(of_marked))(leaves)
    return list(jax.tree.unflatten(structure, found)), jaxpr


def reverse_only(f: Callable[..., Any], *args: PyTree) -> bool:
    """Whether f calls a `jax.custom_vjp` function: such a function has no forward derivative."""
    equations = (equation for program in programs(jax.make_jaxpr(f)(*args)) for equation in program.eqns)
    return any(equation.primitive.name.startswith("custom_vjp_call") for equation in equations)


def programs(jaxpr: Any) -> Iterator[Any]:
    """A program and all inside it: of loops, branches and jitted functions, closed or not."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from programs(inner)


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns")
