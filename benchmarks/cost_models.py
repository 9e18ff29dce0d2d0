"""The problem and the prediction models of the cost benchmark.

A functional regression: the inner level fits the model's values to a target z'ω that the outer parameters make, the
outer level fits the model's values to data. Every model comes with its last hidden layer as features, for the linear
adjoint.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen

import funcbilevel as fb

INPUTS = 10
"""Of the multilayer perceptron."""
IMAGE = (16, 16, 1)
TOKENS, TOKEN_SIZE = 16, 16


def inner_objective(outer_params: Any, v: jax.Array, batch: Any) -> jax.Array:
    return 0.5 * jnp.mean((v - batch[-1] @ outer_params) ** 2)


def outer_objective(outer_params: Any, v: jax.Array, batch: Any) -> jax.Array:
    return 0.5 * jnp.mean((v - batch[1]) ** 2) + 1e-3 * jnp.sum(outer_params**2)


PROBLEM = fb.FunctionalProblem(inner_objective, outer_objective)


class Network(NamedTuple):
    """A prediction model.

    Attributes:
        model: parameters and application.
        features: its last hidden layer, [n, p], for `fb.linear_adjoint`.
        inputs: `(key, n) -> inputs`, leaves [n, ...].
    """

    model: fb.Model
    features: Any
    inputs: Callable[[jax.Array, int], jax.Array]


def perceptron(
    depth: int, width: int, outputs: int = 1, remat: bool = False
) -> tuple[fb.Model, Callable[[Any, jax.Array], jax.Array]]:
    """A ReLU network with `depth` hidden layers of `width` units, and its last hidden layer as features.

    With `remat` derivatives compute every hidden layer anew from its input.
    """

    def init(key: jax.Array, x: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        sizes = [x.shape[-1], *([width] * depth), outputs]
        keys = jax.random.split(key, depth + 1)
        return [
            (jax.random.normal(k, (m, n)) * jnp.sqrt(2 / m), jnp.zeros(n)) for k, m, n in zip(keys, sizes, sizes[1:])
        ]

    def layer(kernel: jax.Array, bias: jax.Array, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ kernel + bias[None])

    if remat:
        layer = jax.checkpoint(layer)

    def features(params: Any, x: jax.Array) -> jax.Array:
        for kernel, bias in params[:-1]:
            x = layer(kernel, bias, x)
        return x

    def apply(params: Any, x: jax.Array) -> jax.Array:
        kernel, bias = params[-1]
        return features(params, x) @ kernel + bias[None]

    return fb.from_function(init, apply), features


def patch_convolution(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **dimensions: Any
) -> jax.Array:
    """The convolution of [n, height, width, c] with [k, l, c, d] as one product of its patches with the kernel.

    XLA makes the gradients of its own convolution a hundred times slower on CPUs inside a loop than outside
    (https://github.com/jax-ml/jax/issues/12868), and every method here is a loop.
    """
    del dimensions  # linen.Conv's defaults
    pads = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = (
        [slice(i, i + size - span + 1, stride) for i in range(span)]
        for size, span, stride in zip(x.shape[1:3], kernel.shape[:2], strides, strict=True)
    )
    patches = jnp.concatenate([x[:, row, column] for row in rows for column in columns], axis=-1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


class ConvolutionalNetwork(linen.Module):
    """`depth` convolutions 3×3 of `width` / 8 channels, the first with stride 2, their mean, and a linear layer."""

    depth: int
    width: int
    outputs: int

    def setup(self) -> None:
        """The layers."""
        channels = self.width // 8
        self.convolutions = [
            linen.Conv(channels, (3, 3), 2 if i == 0 else 1, conv_general_dilated=patch_convolution)
            for i in range(self.depth)
        ]
        self.head = linen.Dense(self.outputs)

    def features(self, x: jax.Array) -> jax.Array:
        """[n, channels] of images [n, height, width, 1]."""
        for convolution in self.convolutions:
            x = linen.relu(convolution(x))
        return jnp.mean(x, axis=(1, 2))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, outputs]."""
        return self.head(self.features(x))


class Encoder(linen.Module):
    """A Transformer encoder: `depth` blocks of attention and perceptron on tokens of `width` / 4 numbers."""

    depth: int
    width: int
    outputs: int

    def setup(self) -> None:
        """The layers; norms come first in a block."""
        size = self.width // 4
        self.embedding = linen.Dense(size)
        self.position = self.param("position", linen.initializers.normal(0.02), (1, TOKENS, size))
        self.attentions = [linen.MultiHeadDotProductAttention(4) for _ in range(self.depth)]
        self.expansions = [linen.Dense(4 * size) for _ in range(self.depth)]
        self.contractions = [linen.Dense(size) for _ in range(self.depth)]
        self.norms = [linen.LayerNorm() for _ in range(2 * self.depth + 1)]
        self.head = linen.Dense(self.outputs)

    def features(self, x: jax.Array) -> jax.Array:
        """[n, size] of sequences [n, tokens, token size]."""
        x = self.embedding(x) + self.position
        for i in range(self.depth):
            x = x + self.attentions[i](self.norms[2 * i](x))
            x = x + self.contractions[i](linen.gelu(self.expansions[i](self.norms[2 * i + 1](x))))
        return jnp.mean(self.norms[-1](x), axis=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, outputs]."""
        return self.head(self.features(x))


def network(kind: str, depth: int, width: int, outputs: int) -> Network:
    """The prediction model `kind`: "mlp" (or with "-remat" or "-bf16"), "cnn" or "transformer"."""
    if kind.startswith("mlp"):
        model, features = perceptron(depth, width, outputs, remat=kind == "mlp-remat")
        model = fb.mixed_precision(model) if kind == "mlp-bf16" else model
        return Network(model, features, lambda key, n: jax.random.normal(key, (n, INPUTS)))
    if kind == "cnn":
        module, shape = ConvolutionalNetwork(depth, width, outputs), IMAGE
    elif kind == "transformer":
        module, shape = Encoder(depth, width, outputs), (TOKENS, TOKEN_SIZE)
    else:
        raise ValueError(f'network: kind must be "mlp", "mlp-remat", "mlp-bf16", "cnn" or "transformer", got {kind!r}.')
    return Network(
        fb.from_linen(module),
        fb.from_linen(module, method="features"),
        lambda key, n: jax.random.normal(key, (n, *shape)),
    )


def batches(
    size: int,
    inputs: Callable[[jax.Array, int], jax.Array] = lambda key, n: jax.random.normal(key, (n, INPUTS)),
    num_outer: int = INPUTS,
    outputs: int = 1,
) -> tuple[Any, Any]:
    """Inner batch (x_P, z) and outer batch (x_Q, y); z [n, num_outer] is what the outer parameters act on."""
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    x_P, x_Q = inputs(k1, size), inputs(k2, size)
    z = x_P.reshape(size, -1)[:, :num_outer]
    extra = jax.random.normal(jax.random.fold_in(k1, 1), (size, num_outer - z.shape[1])) / jnp.sqrt(num_outer)
    y = jnp.sin(x_Q.reshape(size, -1)[:, :1]) + 0.1 * jax.random.normal(k3, (size, outputs))
    return (x_P, jnp.concatenate([z, extra], axis=1)), (x_Q, y)
