"""The parameters of one network divided between a leader and a follower."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from funcbilevel._arguments import check_callable
from funcbilevel._described import fields_that_differ
from funcbilevel._tree import path_name
from funcbilevel._typing import InnerParams, OuterParams, PyTree


class Partition(NamedTuple):
    """One pytree in two disjoint parts.

    Attributes:
        leader: `params` with None in place of the follower's leaves: outer_params.
        follower: `params` with None in place of the leader's leaves: inner_params.
        merge: the pure function `(leader, follower) -> params` that puts two such parts together again.
    """

    leader: OuterParams
    follower: InnerParams
    merge: Callable[[OuterParams, InnerParams], PyTree]

    def __repr__(self) -> str:
        return fields_that_differ(self)


def partition(params: PyTree, labels: Callable[[str, Any], Any] | PyTree) -> Partition:
    """Divides the parameters of one network between leader and follower, each leaf to exactly one of them.

    In a `ParametricProblem` with objectives of `merge(outer_params, inner_params)` the two players then own disjoint
    parts of the network: the inner gradient is by the follower's part alone, with the leader's held fixed, and each
    part has an optimizer of its own.

    Arguments:
        params: a pytree of arrays, as Flax Linen (a dict), NNX (an `nnx.State`) or any other library has it.
        labels: `(path, leaf) -> label`, where path is a text like "params/Dense_0/kernel"; or a pytree of labels, of
            the structure of `params` or a prefix of it. A label is "leader", "follower", or a bool: whether the leaf
            is the follower's.

    Returns:
        A `Partition`: leader, follower, merge. `merge` raises a ValueError for parts of another structure.

    Raises:
        ValueError: a label is none of those, the tree of labels does not fit, or one of the two parts is empty.

    Example:
        >>> params = {"body": jnp.ones((2, 3)), "head": jnp.zeros(3)}
        >>> leader, follower, merge = fb.partition(params, lambda path, leaf: path.startswith("head"))
        >>> leader["head"], follower["head"].shape
        (None, (3,))
        >>> problem = fb.ParametricProblem(
        ...     inner_objective=lambda w, theta, x: jnp.mean((x @ merge(w, theta)["body"]) ** 2),
        ...     outer_objective=lambda w, theta, x: jnp.mean(x @ merge(w, theta)["body"] @ merge(w, theta)["head"]),
        ... )

    References:
        Yazdani-Jahromi et al., *Fair Bilevel Neural Network (FairBiNN)*, NeurIPS 2024,
        https://arxiv.org/abs/2410.16432 (accuracy layers and fairness layers of one network).
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [path_name(path) for path, _ in leaves]
    if callable(labels):
        check_callable("partition", "labels", labels, "path, leaf")
        of_leaves = [labels(name, leaf) for name, (_, leaf) in zip(names, leaves, strict=True)]
    else:
        try:
            of_leaves = jax.tree.leaves(jax.tree.broadcast(labels, params))
        except ValueError as error:
            raise ValueError(
                "partition: labels must be a function (path, leaf) -> label, or a pytree of labels with the structure "
                f"of params or a prefix of it: {structure}; got {jax.tree.structure(labels)}."
            ) from error
    follows = [_follows(name, label) for name, label in zip(names, of_leaves, strict=True)]
    for player, empty in (("follower", not any(follows)), ("leader", all(follows))):
        if empty:
            raise ValueError(
                f"partition: no leaf is the {player}'s, and each player must own at least one; the paths are "
                f"{', '.join(names) or '(none)'}."
            )

    def part(of_follower: bool) -> PyTree:
        owned = zip(leaves, follows, strict=True)
        return jax.tree.unflatten(structure, [leaf if f == of_follower else None for (_, leaf), f in owned])

    leader, follower = part(False), part(True)
    structures = {"leader": jax.tree.structure(leader), "follower": jax.tree.structure(follower)}

    def merge(leader: OuterParams, follower: InnerParams) -> PyTree:
        for name, tree in (("leader", leader), ("follower", follower)):
            if (got := jax.tree.structure(tree)) != structures[name]:
                raise ValueError(f"merge: {name} must have the structure {structures[name]}, got {got}.")
        of_leader, of_follower = iter(jax.tree.leaves(leader)), iter(jax.tree.leaves(follower))
        return jax.tree.unflatten(structure, [next(of_follower if f else of_leader) for f in follows])

    return Partition(leader, follower, merge)


def _follows(name: str, label: Any) -> bool:
    if isinstance(label, str) and label in ("leader", "follower"):
        return label == "follower"
    if isinstance(label, (bool, np.bool_)):
        return bool(label)
    raise ValueError(f'partition: the label of {name!r} must be "leader", "follower" or a bool, got {label!r}.')
