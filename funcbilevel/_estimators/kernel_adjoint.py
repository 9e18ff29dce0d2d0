"""The adjoint of FuncID in a reproducing kernel Hilbert space, fitted exactly."""

from collections.abc import Callable
from typing import Any

import jax

from funcbilevel._arguments import check_at_least, check_number
from funcbilevel._described import described
from funcbilevel._estimator import Adjoint
from funcbilevel._estimators._span import adjoint_in_span
from funcbilevel._fit import FitState
from funcbilevel._kernels import Kernel, as_kernel, centred_features, fourier_features
from funcbilevel._problem import FunctionalProblem
from funcbilevel._typing import Batch, Inputs, Key, PyTree


@described
def kernel_adjoint(
    kernel: Kernel | Callable[[Inputs, Inputs], jax.Array],
    ridge: float,
    num_features: int | None = None,
    *,
    num_steps: int = 500,
    seed: int = 0,
) -> Adjoint:
    r"""a in the RKHS H of a kernel, one function for each output, as the exact minimiser of

    .. math::
        \tfrac12 \langle a(x_P), C[a(x_P)]\rangle + \langle a(x_Q), d\rangle + \tfrac{ridge}2 \|a\|_H^2 .

    What the hypergradient needs of it are its values a(x_P), and these depend on its projection onto the span of k(.,
    x), x in P, alone: a function of n coefficients per output. With the Gram matrix :math:`K_{PP} = U \Lambda U^\top`
    it is linear in the features :math:`\varphi(x) = \Lambda^{-1/2} U^\top k(x_P, x)`, in which the RKHS norm is the
    Euclidean one, and so the solution is that of `linear_adjoint`: conjugate gradients preconditioned by Lambda, one
    iteration when C is a multiple of the identity,

    .. math::
        a(x_P) = -(ridge\, I + c\, K_{PP})^{-1} K_{PQ}\, d \quad\text{for } C = c I .

    That takes the order of n^3 operations and an n-by-n matrix per call, up to some thousands of inner samples. Beyond
    that, `num_features` approximates the kernel: by random Fourier features where the kernel has a spectral measure
    (Gaussian, Matern), by as many random inner samples as centres (Nystrom) where it has none. Memory: n times p
    numbers, with p the number of features, or n.

    Where C is singular, the ridge decides; without it, directions that C does not see are left out, and where d has a
    part in them `linear_converged` is false.

    Arguments:
        kernel: `gaussian_kernel`, `matern_kernel`, `linear_kernel`, or a function `(x, z) -> [n, m]` on inputs of the
            model.
        ridge: >= 0, in the RKHS norm. (Objectives are batch means, so that it does not change with n.)
        num_features: >= 1; None: the exact kernel.
        num_steps: most conjugate-gradient steps; they stop as soon as the residual is rounding error.
        seed: of the random features.

    Returns:
        An `Adjoint` for `funcid`. Its metrics: `linear_residual`, `linear_converged` and `linear_curvature` of the
        preconditioned system.

    Raises:
        ValueError: `ridge` < 0, `num_features` or `num_steps` < 1; (at trace time) the kernel's matrix is not [n, m];
            the problem has an `axis_name`, and features are not Fourier's, since centres would differ from device to
            device.
        TypeError: `kernel` is not callable.

    Example:
        >>> estimator = fb.funcid(fb.kernel_adjoint(fb.gaussian_kernel(1.0), ridge=1e-3))

    References:
        Petrulionyte, Mairal, Arbel, NeurIPS 2024, https://arxiv.org/abs/2403.20233 (the adjoint);
        El Khoury, Pauwels, Vaiter, Arbel, 2025, https://arxiv.org/abs/2502.08457 (kernel bilevel optimization);
        Rahimi and Recht, NeurIPS 2007 (Fourier features); Williams and Seeger, NeurIPS 2000 (Nystrom).
    """
    name = "kernel_adjoint"
    k = as_kernel(name, kernel)
    check_at_least(name, "ridge", ridge, 0.0)
    check_number(name, "num_steps", num_steps)
    check_number(name, "seed", seed, low=0)
    if num_features is not None:
        check_number(name, "num_features", num_features)
    by_fourier = num_features is not None and k.frequencies is not None

    def init(key: Key | None, problem: FunctionalProblem, model: Any, inner: FitState, inner_batch: Batch, /) -> PyTree:
        del key, model, inner, inner_batch
        if problem.axis_name is not None and not by_fourier:
            raise ValueError(
                f"{name}: problem.axis_name is {problem.axis_name!r}, but the kernel's centres are the samples of one "
                "device; pass num_features, with a kernel that has Fourier features, or shard batches under jit."
            )
        return ()

    def features_on(inner: FitState, x_P: Inputs) -> tuple[Callable[[Inputs], jax.Array], jax.Array | None]:
        del inner
        if by_fourier:
            assert num_features is not None
            return fourier_features(k, jax.random.key(seed), num_features, x_P), None
        if num_features is None:
            return centred_features(name, k, x_P)
        size = jax.tree.leaves(x_P)[0].shape[0]
        chosen = jax.random.permutation(jax.random.key(seed), size)[:num_features]
        return centred_features(name, k, jax.tree.map(lambda x: x[chosen], x_P))[0], None

    return adjoint_in_span(init, features_on, ridge, num_steps)
