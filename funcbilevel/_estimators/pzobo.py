"""PZOBO: the derivative of the inner solution from solutions at perturbed outer variables."""

import jax

from funcbilevel._arguments import check_number, check_positive
from funcbilevel._described import described
from funcbilevel._estimator import Call, Estimator, Hypergradient, InnerSolution, by_call, no_state
from funcbilevel._estimators._directions import mean_over_directions
from funcbilevel._predictor import as_parametric
from funcbilevel._problem import outer_derivatives
from funcbilevel._tree import all_finite, tree_add_scaled, tree_vdot
from funcbilevel._typing import OuterParams


@described
def pzobo(num_steps: int, num_directions: int, radius: float = 1e-2) -> Estimator:
    r"""PZOBO, the partial zeroth-order-like bilevel optimizer: first derivatives of the objectives and no other.

    With :math:`\theta_T(\omega)` the result of the last T inner steps, whatever their optimizer, and standard normal u,

    .. math::
        \nabla F(\omega) \approx \partial_\omega L_{out}(\omega, \theta_T)
            + \frac1Q \sum_{q=1}^Q \Bigl\langle \frac{\theta_T(\omega + \mu u_q) - \theta_T(\omega)}{\mu},\,
              \partial_\theta L_{out}(\omega, \theta_T)\Bigr\rangle\, u_q .

    All Q + 1 inner solutions start at the same point and see the same samples. In expectation this is the gradient of
    `itd(T)`, smoothed by mu; its variance is that of one direction, about dim(omega) times the squared norm of the
    implicit part, over Q.

    Order: first. Per outer step: Q times T inner steps more than `alternating`. Memory: none, whatever T.

    Arguments:
        num_steps: T >= 1, at most `inner_steps`.
        num_directions: Q >= 1.
        radius: mu > 0; in float32 one far below 0.01 loses the difference's digits.

    Returns:
        An `Estimator` for either kind of problem; `hypergradient` needs `inner_optimizer` and `key`.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> estimator = fb.pzobo(num_steps=5, num_directions=10)

    References:
        Sow, Ji, Liang, *On the convergence theory for Hessian-free bilevel algorithms*, NeurIPS 2022,
        https://arxiv.org/abs/2110.07004, algorithm 1.
    """
    check_number("pzobo", "num_steps", num_steps)
    check_number("pzobo", "num_directions", num_directions)
    check_positive("pzobo", "radius", radius)

    def estimate(call: Call) -> tuple[InnerSolution, Hypergradient]:
        problem, model, solve, outer_params, inner_batch, outer_batch, state, key = call
        inner = solve(outer_params)
        theta, parametric = inner.fit.params, as_parametric(problem, model, inner.fit.model_state, inner_batch)
        value, aux, g_exp, d = outer_derivatives(parametric, outer_params, theta, outer_batch)

        def slope(u: OuterParams) -> jax.Array:
            there = solve(tree_add_scaled(outer_params, radius, u)).fit.params
            return tree_vdot(jax.tree.map(lambda a, b: a - b, there, theta), d) / radius

        g_imp = mean_over_directions("pzobo", slope, key, outer_params, num_directions)
        sound = all_finite(value, d)
        metrics = aux | {"adjoint_finite": all_finite(g_imp) | ~sound, "outer_finite": sound}
        return inner, Hypergradient(tree_add_scaled(g_exp, 1.0, g_imp), g_exp, g_imp, value, state, metrics)

    return Estimator(no_state, by_call(estimate), unroll=num_steps)
