"""Evolution strategies: a hypergradient from values of the outer objective alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_number, check_positive
from funcbilevel._described import described
from funcbilevel._estimator import Call, Estimator, Hypergradient, InnerSolution, by_call, no_state
from funcbilevel._estimators._directions import mean_over_directions
from funcbilevel._predictor import as_parametric
from funcbilevel._problem import outer_value
from funcbilevel._tree import all_finite, tree_add_scaled
from funcbilevel._typing import InnerParams, OuterParams


@described
def evolution_strategy(num_steps: int, num_directions: int, radius: float) -> Estimator:
    r"""The gradient of F smoothed by a Gaussian, for objectives that cannot be differentiated by omega.

    With :math:`F_T(\omega) = L_{out}(\omega, \theta_T(\omega))`, where :math:`\theta_T(\omega)` is the result of the
    last T inner steps, and standard normal u,

    .. math::
        \nabla F(\omega) \approx \frac1Q \sum_{q=1}^Q
            \frac{F_T(\omega + \sigma u_q) - F_T(\omega - \sigma u_q)}{2 \sigma}\, u_q ,

    unbiased for the gradient of :math:`E_u F_T(\omega + \sigma u)`, which exists whatever F is: an accuracy, a count, a
    simulator. The inner objective needs a derivative by theta, unless the inner optimizer does without, too. The
    explicit part is the same with theta held fixed, the implicit one the rest.

    Order: zeroth. Per outer step: 2 Q times T inner steps. Memory: none, whatever T.

    Arguments:
        num_steps: T >= 1, at most `inner_steps`.
        num_directions: Q >= 1.
        radius: sigma > 0: the scale on which F is smoothed.

    Returns:
        An `Estimator` for either kind of problem; `hypergradient` needs `inner_optimizer` and `key`.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.

    Example:
        >>> estimator = fb.evolution_strategy(num_steps=5, num_directions=50, radius=0.1)

    References:
        Nesterov and Spokoiny, *Random gradient-free minimization of convex functions*, 2017; Salimans, Ho, Chen, Sidor,
        Sutskever, *Evolution strategies as a scalable alternative to reinforcement learning*, 2017,
        https://arxiv.org/abs/1703.03864 (antithetic pairs).
    """
    check_number("evolution_strategy", "num_steps", num_steps)
    check_number("evolution_strategy", "num_directions", num_directions)
    check_positive("evolution_strategy", "radius", radius)

    def estimate(call: Call) -> tuple[InnerSolution, Hypergradient]:
        problem, model, solve, outer_params, inner_batch, outer_batch, state, key = call
        inner = solve(outer_params)
        theta, parametric = inner.fit.params, as_parametric(problem, model, inner.fit.model_state, inner_batch)

        def L_out(omega: OuterParams, theta: InnerParams) -> jax.Array:
            return outer_value(parametric, omega, theta, outer_batch)[0]

        def smoothed(f: Callable[[OuterParams], jax.Array]) -> OuterParams:
            def slope(u: OuterParams) -> jax.Array:
                ends = [f(tree_add_scaled(outer_params, sign * radius, u)) for sign in (1.0, -1.0)]
                return (ends[0] - ends[1]) / (2.0 * radius)

            return mean_over_directions("evolution_strategy", slope, key, outer_params, num_directions)

        total = smoothed(lambda omega: L_out(omega, solve(omega).fit.params))
        g_exp = smoothed(lambda omega: L_out(omega, theta))
        value, aux = outer_value(parametric, outer_params, theta, outer_batch)
        sound = all_finite(value)
        metrics = aux | {"adjoint_finite": all_finite(total) | ~sound, "outer_finite": sound}
        g_imp = jax.tree.map(jnp.subtract, total, g_exp)
        return inner, Hypergradient(total, g_exp, g_imp, value, state, metrics)

    return Estimator(no_state, by_call(estimate), unroll=num_steps, by_values=True)
