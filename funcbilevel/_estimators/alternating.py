"""Alternating gradient steps: the explicit part alone."""

import jax
import jax.numpy as jnp

from funcbilevel._described import described
from funcbilevel._estimator import Estimator, Hypergradient, InnerSolution, InnerSolve, no_state
from funcbilevel._model import Model
from funcbilevel._problem import Problem, as_parametric, outer_value
from funcbilevel._typing import Batch, Key, OuterParams, PyTree


@described
def alternating() -> Estimator:
    r"""Alternating gradient steps: :math:`\nabla F(\omega) \approx \partial_\omega L_{out}(\omega, h)`.

    How the follower responds to the leader is left out, so there is no implicit part (`implicit` is zero). Where
    the outer objective reaches omega only through the inner solution, this gradient is zero and nothing moves.

    Returns:
        An `Estimator` for either kind of problem. It has no adjoint, so `adjoint_finite` is always true.

    Example:
        >>> estimator = fb.alternating()

    References:
        Yazdani-Jahromi et al., *Fair Bilevel Neural Network (FairBiNN)*, NeurIPS 2024,
        https://arxiv.org/abs/2410.16432.
    """

    def estimate(
        problem: Problem,
        model: Model | None,
        solve: InnerSolve,
        outer_params: OuterParams,
        inner_batch: Batch,
        outer_batch: Batch,
        state: PyTree,
        key: Key | None,
        /,
    ) -> tuple[InnerSolution, Hypergradient]:
        del key
        inner = solve(outer_params)
        parametric = as_parametric(problem, model, inner.fit.model_state, inner_batch)
        (value, aux), g_exp = jax.value_and_grad(
            lambda omega: outer_value(parametric, omega, inner.fit.params, outer_batch), has_aux=True
        )(outer_params)
        zero = jax.tree.map(jnp.zeros_like, g_exp)
        return inner, Hypergradient(g_exp, g_exp, zero, value, state, aux | {"adjoint_finite": jnp.array(True)})

    return Estimator(no_state, estimate, implicit=False)
