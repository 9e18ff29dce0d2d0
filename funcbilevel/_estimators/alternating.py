"""Alternating gradient steps: the explicit part alone."""

import jax
import jax.numpy as jnp

from funcbilevel._described import described
from funcbilevel._estimator import Call, Estimator, Hypergradient, InnerSolution, by_call, no_state
from funcbilevel._predictor import as_parametric
from funcbilevel._problem import outer_value


@described
def alternating() -> Estimator:
    r"""Alternating gradient steps: :math:`\nabla F(\omega) \approx \partial_\omega L_{out}(\omega, h)`.

    How the follower responds to the leader is left out, so there is no implicit part (`implicit` is zero). Where
    the outer objective reaches omega only through the inner solution, this gradient is zero and nothing moves.

    Order: first. Memory: none.

    Returns:
        An `Estimator` for either kind of problem. It has no adjoint, so `adjoint_finite` is always true.

    Example:
        >>> estimator = fb.alternating()

    References:
        Yazdani-Jahromi et al., *Fair Bilevel Neural Network (FairBiNN)*, NeurIPS 2024,
        https://arxiv.org/abs/2410.16432.
    """

    def estimate(call: Call) -> tuple[InnerSolution, Hypergradient]:
        problem, model, solve, outer_params, inner_batch, outer_batch, state, _ = call
        inner = solve(outer_params)
        parametric = as_parametric(problem, model, inner.fit.model_state, inner_batch)
        (value, aux), g_exp = jax.value_and_grad(
            lambda omega: outer_value(parametric, omega, inner.fit.params, outer_batch), has_aux=True
        )(outer_params)
        zero = jax.tree.map(jnp.zeros_like, g_exp)
        return inner, Hypergradient(g_exp, g_exp, zero, value, state, aux | {"adjoint_finite": jnp.array(True)})

    return Estimator(no_state, by_call(estimate), implicit=False)
