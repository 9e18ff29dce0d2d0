"""Kernels on inputs, and the features that stand for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_positive
from funcbilevel._described import describe, described
from funcbilevel._typing import Inputs, Key


class Kernel(NamedTuple):
    """A positive semidefinite kernel.

    Attributes:
        matrix: `(x, z) -> [n, m]`, the kernel of every input in x with every one in z.
        frequencies: `(key, num, dim) -> [num, dim]`, draws from its spectral measure, if it is a function of x - z with
            k(0) = 1 on arrays of dim numbers per input; None otherwise.
        description: the call that made it, for `repr`.
    """

    matrix: Callable[[Inputs, Inputs], jax.Array]
    frequencies: Callable[[Key, int, int], jax.Array] | None = None
    description: str = ""

    def __repr__(self) -> str:
        return describe(self)


@described
def gaussian_kernel(scale: float) -> Kernel:
    r"""The Gaussian kernel :math:`k(x, z) = \exp(-\|x - z\|^2 / (2\, scale^2))`.

    Inputs are arrays [n, ...], or pytrees of them, all numbers of one sample taken together.

    Arguments:
        scale: > 0, in the unit of the inputs.

    Raises:
        ValueError: `scale` is not positive.

    Example:
        >>> fb.gaussian_kernel(1.0).matrix(jnp.zeros((1, 2)), jnp.ones((1, 2)))
        Array([[0.36787945]], dtype=float32)
    """
    check_positive("gaussian_kernel", "scale", scale)

    def matrix(x: Inputs, z: Inputs) -> jax.Array:
        return jnp.exp(-0.5 * _squared_distances(x, z) / scale**2)

    def frequencies(key: Key, num: int, dim: int) -> jax.Array:
        return jax.random.normal(key, (num, dim)) / scale

    return Kernel(matrix, frequencies)


@described
def matern_kernel(scale: float, smoothness: float = 1.5) -> Kernel:
    r"""The Matern kernel, whose functions are as smooth as `smoothness` says.

    With r = |x - z| / scale: :math:`e^{-r}` for 1/2, :math:`(1 + \sqrt3 r)\, e^{-\sqrt3 r}` for 3/2 and
    :math:`(1 + \sqrt5 r + \tfrac53 r^2)\, e^{-\sqrt5 r}` for 5/2. Inputs as for `gaussian_kernel`.

    Arguments:
        scale: > 0, in the unit of the inputs.
        smoothness: 0.5, 1.5 or 2.5.

    Raises:
        ValueError: `scale` is not positive, or `smoothness` is another number.

    Example:
        >>> fb.matern_kernel(1.0, smoothness=0.5).matrix(jnp.zeros((1, 1)), jnp.ones((1, 1)))
        Array([[0.36787945]], dtype=float32)

    References:
        Rasmussen and Williams, *Gaussian Processes for Machine Learning*, 2006, section 4.2.
    """
    check_positive("matern_kernel", "scale", scale)
    polynomials: dict[float, Callable[[jax.Array], jax.Array]] = {
        0.5: jnp.ones_like,
        1.5: lambda s: 1.0 + s,
        2.5: lambda s: 1.0 + s + s**2 / 3.0,
    }
    if smoothness not in polynomials:
        raise ValueError(
            f"matern_kernel: smoothness must be 0.5, 1.5 or 2.5, got {smoothness!r}; the Gaussian kernel is the limit "
            "of large ones."
        )

    def matrix(x: Inputs, z: Inputs) -> jax.Array:
        squared = _squared_distances(x, z)
        r = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)  # with a derivative at zero
        s = (2.0 * smoothness) ** 0.5 * r / scale
        return polynomials[smoothness](s) * jnp.exp(-s)

    def frequencies(key: Key, num: int, dim: int) -> jax.Array:
        """Student's t with 2 smoothness degrees of freedom."""
        normal_key, gamma_key = jax.random.split(key)
        spread = jax.random.gamma(gamma_key, smoothness, (num, 1)) / smoothness
        return jax.random.normal(normal_key, (num, dim)) / (scale * jnp.sqrt(spread))

    return Kernel(matrix, frequencies)


@described
def linear_kernel() -> Kernel:
    r"""The linear kernel :math:`k(x, z) = \langle x, z\rangle`: functions that are linear in the inputs.

    Inputs as for `gaussian_kernel`.

    Example:
        >>> fb.linear_kernel().matrix(jnp.ones((1, 2)), jnp.ones((1, 2)))
        Array([[2.]], dtype=float32)
    """
    return Kernel(lambda x, z: rows(x) @ rows(z).T)


def as_kernel(function: str, kernel: Any) -> Kernel:
    """A `Kernel`, or one made of a function `(x, z) -> [n, m]`."""
    if isinstance(kernel, Kernel):
        return kernel
    if not callable(kernel):
        raise TypeError(
            f"{function}: kernel must be an fb.Kernel or a function (x, z) -> [n, m], got {kernel!r}; make one with "
            "fb.gaussian_kernel(scale), fb.matern_kernel(scale) or fb.linear_kernel()."
        )
    function_of_inputs: Any = kernel
    return Kernel(function_of_inputs)


def rows(inputs: Inputs) -> jax.Array:
    """All numbers of each sample: [n, dim]."""
    leaves = [x.reshape(x.shape[0], -1) for x in jax.tree.leaves(inputs)]
    return leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves, axis=1)


def kernel_matrix(function: str, kernel: Kernel, x: Inputs, z: Inputs) -> jax.Array:
    """The matrix [n, m], checked."""
    K = kernel.matrix(x, z)
    shape = tuple(next(iter(jax.tree.leaves(t))).shape[0] for t in (x, z))
    if getattr(K, "shape", None) != shape:
        got = f"shape {K.shape}" if hasattr(K, "shape") else type(K).__name__
        raise ValueError(
            f"{function}: kernel must return a matrix [n, m], here {list(shape)}, got {got}; compare every input in "
            "its first argument with every one in its second."
        )
    if not jnp.issubdtype(K.dtype, jnp.floating):
        raise TypeError(f"{function}: kernel must return floating-point numbers, got dtype {K.dtype}.")
    return K


def centred_features(function: str, kernel: Kernel, centres: Inputs) -> tuple[Callable[[Inputs], jax.Array], jax.Array]:
    r"""x -> [n, p], features whose linear functions are the span of k(., c) over the centres, with the RKHS norm |W|.

    With the kernel matrix of the centres :math:`U \Lambda U^\top`, they are :math:`\Lambda^{-1/2} U^\top k(c, x)`, and
    zero where an eigenvalue vanishes to rounding. And Lambda itself, the diagonal of their Gram matrix on the centres.
    """
    K = kernel_matrix(function, kernel, centres, centres)
    lam, U = jnp.linalg.eigh(K.astype(jnp.promote_types(K.dtype, jnp.float32)))
    kept = lam > lam.shape[0] * jnp.finfo(lam.dtype).eps * lam[-1]
    scale = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, lam, 1.0)), 0.0)

    def features(x: Inputs) -> jax.Array:
        return kernel_matrix(function, kernel, x, centres) @ (U * scale[None, :])

    return features, jnp.where(kept, lam, 0.0)


def fourier_features(kernel: Kernel, key: Key, num_features: int, like: Inputs) -> Callable[[Inputs], jax.Array]:
    r"""x -> [n, num_features], random Fourier features sqrt(2 / num_features) cos(x w + b) (Rahimi and Recht, 2007)."""
    assert kernel.frequencies is not None
    x = rows(like)
    frequency_key, phase_key = jax.random.split(key)
    w = kernel.frequencies(frequency_key, num_features, x.shape[1]).astype(x.dtype)
    b = jax.random.uniform(phase_key, (num_features,), x.dtype, 0.0, 2.0 * jnp.pi)
    return lambda x: (2.0 / num_features) ** 0.5 * jnp.cos(rows(x) @ w.T + b[None, :])


def _squared_distances(x: Inputs, z: Inputs) -> jax.Array:
    """[n, m]; relative to the mean of z, far from which there would be little left of the numbers' digits."""
    a, b = rows(x), rows(z)
    centre = jnp.mean(b, axis=0, keepdims=True)
    a, b = a - centre, b - centre
    squares = jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1)[None, :]
    return jnp.maximum(squares - 2.0 * a @ b.T, 0.0)
