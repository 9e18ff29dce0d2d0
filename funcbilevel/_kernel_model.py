"""A prediction model in an RKHS, solved for exactly: kernel ridge regression as the inner level."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_at_least, check_number
from funcbilevel._described import described
from funcbilevel._kernels import Kernel, as_kernel, centred_features
from funcbilevel._model import Model, from_function
from funcbilevel._typing import Inputs
from funcbilevel._variable_projection import variable_projection


@described
def kernel_model(
    kernel: Kernel | Callable[[Inputs, Inputs], jax.Array],
    centres: Inputs,
    num_outputs: int,
    ridge: float,
    num_steps: int = 20,
) -> Model:
    r"""Functions :math:`h(x) = \sum_c k(x, c)\, \alpha_c` that solve the inner level exactly,

    .. math:: h^*_\omega = \arg\min_h L_{in}(\omega, h(x_P)) + \tfrac{ridge}2 \|h\|_H^2 ,

    for inner objectives that are quadratic in the prediction. With the inputs of the inner batch as centres that is the
    minimiser over the whole RKHS H of the kernel (kernel ridge regression); with fewer, over the span of theirs. There
    is
    nothing to train: `inner_params` are one number that plays no part, and one inner step is enough. With
    `fb.funcid(fb.kernel_adjoint(kernel, ridge))` and the same ridge the hypergradient is the exact derivative of
    :math:`L_{out}(\omega, h^*_\omega)`.

    Arguments:
        kernel: as for `kernel_adjoint`.
        centres: inputs, leaves [n, ...]; their Gram matrix is diagonalised once, here.
        num_outputs: k; the prediction is [n, k].
        ridge: >= 0, in the RKHS norm, in the scale of the inner objective, a mean over the batch.
        num_steps: most conjugate-gradient steps of a solve; the first is exact if the objective weighs all samples and
            outputs alike.

    Returns:
        A `Model` with a head. `predictor` makes a function of it.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind; the kernel's matrix is not [n, n].

    Example:
        >>> x = jnp.linspace(-1.0, 1.0, 20)[:, None]
        >>> model = fb.kernel_model(fb.gaussian_kernel(0.5), x, num_outputs=1, ridge=1e-3)

    References:
        El Khoury, Pauwels, Vaiter, Arbel, *Learning theory for kernel bilevel optimization*, 2025,
        https://arxiv.org/abs/2502.08457.
    """
    name = "kernel_model"
    check_number(name, "num_outputs", num_outputs)
    check_at_least(name, "ridge", ridge, 0.0)
    features, _ = centred_features(name, as_kernel(name, kernel), centres)
    constant = from_function(lambda key, x: jnp.zeros(1), lambda theta, x: features(x))
    return variable_projection(constant, num_outputs, ridge, num_steps)
