"""Networks: a row of layers, each the leader's or the follower's."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen

import funcbilevel as fb
from funcbilevel.tasks.data.dataset import Graph

Layers: TypeAlias = tuple[tuple[str, int], ...]
"""(name, width) of each layer, the last as wide as there are logits: 1 for two classes, else one of each class."""
ATTENTION = "_attention"
"""Ends the name of a layer that is self-attention over the columns."""


def layers(
    accuracy_widths: Sequence[int],
    fairness_widths: Sequence[int],
    position: int,
    num_classes: int = 2,
    attention: str | None = None,
) -> Layers:
    """The layers with the follower's put at a position, 1 being before all of the leader's, as in the article.

    The last layer of the row is the output, whose ever it is, one logit for two classes and else one for each: with
    widths (64, 64), (1,) and position 3 the output layer is the follower's. The layer that `attention` names, such as
    fairness_0, is self-attention over the columns.

    Raises:
        ValueError: a width is below 1, the position is not from 1 to one after the leader's layers, one of the players
            has no layer, the last layer has another width, or `attention` names no layer, the output, or a layer of
            odd width.
    """
    if not accuracy_widths or not fairness_widths or min(*accuracy_widths, *fairness_widths) < 1:
        raise ValueError(
            "accuracy_widths and fairness_widths must hold at least one width each, all of them at least 1, got "
            f"{tuple(accuracy_widths)} and {tuple(fairness_widths)}."
        )
    if not 1 <= position <= len(accuracy_widths) + 1:
        raise ValueError(
            f"position must be from 1 (before the accuracy layers) to {len(accuracy_widths) + 1} (after them), got "
            f"{position}."
        )
    leader = [(f"accuracy_{i}", width) for i, width in enumerate(accuracy_widths)]
    follower = [(f"fairness_{i}", width) for i, width in enumerate(fairness_widths)]
    row = (*leader[: position - 1], *follower, *leader[position - 1 :])
    outputs = 1 if num_classes == 2 else num_classes
    if row[-1][1] != outputs:
        raise ValueError(
            f"the last layer is the output and must be {outputs} wide, got widths {[width for _, width in row]}; the "
            "accuracy widths include the output, unless the fairness layers stand last."
        )
    if attention is not None and attention not in (known := [name for name, width in row[:-1] if width % 2 == 0]):
        raise ValueError(
            f"attention must name a layer before the output that is of even width (it has two heads), here one of "
            f"{', '.join(known) or '(none)'}, got {attention!r}."
        )
    return tuple((name + ATTENTION if name == attention else name, width) for name, width in row)


def is_followers(path: str, leaf: Any) -> bool:
    """The label of a parameter, for `fb.partition`."""
    del leaf
    return "fairness_" in path


def follower_of(path: str, num_followers: int) -> int:
    """Whose a parameter of the fairness layers is: layer i belongs to follower i, the last one takes the rest."""
    found = re.search(r"fairness_(\d+)", path)
    assert found is not None
    return min(int(found[1]), num_followers - 1)


def followers_of(theta: Any, num_followers: int) -> Any:
    """A tree like theta with each parameter's follower, a label for `optax.partition`."""
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, _: follower_of(name(path), num_followers), theta)


def seen_by(theta: Any, follower: int, num_followers: int) -> Any:
    """theta, whose derivative is that in one follower's layers: those of the others are held fixed."""
    owners = followers_of(theta, num_followers)
    return jax.tree.map(lambda p, owner: p if owner == follower else jax.lax.stop_gradient(p), theta, owners)


_dense = partial(linen.Dense, kernel_init=linen.initializers.variance_scaling(1 / 3, "fan_in", "uniform"))
_convolution = partial(linen.Conv, kernel_size=(3, 3), strides=2)


def _logits(z: jax.Array) -> jax.Array:
    """[n] for two classes, which have one output, else [n, k]."""
    return z[:, 0] if z.shape[1] == 1 else z


class ColumnAttention(linen.Module):
    """Columns [n, d] -> [n, width]: each column a token, one layer of self-attention with two heads, their mean.

    Column j with value x_j becomes the token x_j u_j + v_j, as in the FT-Transformer (Gorishniy et al. 2021); u and v
    are learnt. It takes memory for 2 n d^2 attention weights. What the theory says of it stands at the module's head.
    """

    width: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, width]."""
        shape = (x.shape[1], self.width)
        u, v = (self.param(name, linen.initializers.normal(1.0), shape, x.dtype) for name in ("scales", "offsets"))
        tokens = x[:, :, None] * u[None] + v[None]
        return jnp.mean(linen.MultiHeadDotProductAttention(num_heads=2)(tokens), axis=1)


class MLP(linen.Module):
    """Features [n, d] -> logits. Weights start uniform in +-1/sqrt(fan-in), as in the published code."""

    layers: Layers

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits, [n] or [n, k]."""
        for name, width in self.layers[:-1]:
            layer = ColumnAttention if name.endswith(ATTENTION) else _dense
            x = linen.relu(layer(width, name=name)(x))
        name, width = self.layers[-1]
        return _logits(_dense(width, name=name)(x))


class CNN(linen.Module):
    """Pictures [n, h, w, c] -> logits: convolutions of stride 2, the mean over the picture, a linear output."""

    layers: Layers

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits, [n] or [n, k]."""
        for name, width in self.layers[:-1]:
            x = linen.relu(_convolution(width, name=name)(x))
        name, width = self.layers[-1]
        return _logits(_dense(width, name=name)(jnp.mean(x, axis=(1, 2))))


class GCN(linen.Module):
    """A graph of n nodes -> logits (Kipf and Welling 2017); the first two layers mix each node with its neighbours.

    Layers after those see one node each, as FairBiNN's do: each further mixing would smooth the nodes' differences out.
    """

    layers: Layers

    @linen.compact
    def __call__(self, graph: Graph) -> jax.Array:
        """The logits, [n] or [n, k]."""
        x = graph.features
        for i, (name, width) in enumerate(self.layers):
            x = _dense(width, name=name)(x)
            x = graph.adjacency @ x if i < 2 and i < len(self.layers) - 1 else x
            x = linen.relu(x) if i < len(self.layers) - 1 else x
        return _logits(x)


def network(x: Any, of_layers: Layers) -> linen.Module:
    """The network for such inputs: a graph, pictures or features.

    Raises:
        ValueError: a layer is attention over columns, and the inputs are not features.
    """
    if any(name.endswith(ATTENTION) for name, _ in of_layers) and (isinstance(x, Graph) or x.ndim != 2):
        raise ValueError(f"attention is over the columns of features [n, d], got inputs {jax.tree.map(jnp.shape, x)}.")
    if isinstance(x, Graph):
        return GCN(of_layers)
    return CNN(of_layers) if x.ndim == 4 else MLP(of_layers)


def logits_of(row: Layers, x: Any) -> Callable[[Any, Any, Any], jax.Array]:
    """(omega, theta, inputs) -> logits of the network for inputs like x."""
    module: Any = network(x, row)
    merge = fb.partition(jax.eval_shape(module.init, jax.random.key(0), x), is_followers).merge
    return lambda omega, theta, x: module.apply(merge(omega, theta), x)
