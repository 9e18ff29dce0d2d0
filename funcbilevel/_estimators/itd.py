"""ITD: iterative differentiation through the inner optimizer's steps."""

from typing import Literal

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_number
from funcbilevel._described import described
from funcbilevel._estimator import Call, Estimator, Hypergradient, InnerSolution, by_call, no_state
from funcbilevel._predictor import as_parametric
from funcbilevel._problem import outer_value
from funcbilevel._tracing import reverse_only
from funcbilevel._tree import tree_add_scaled
from funcbilevel._typing import Metrics, OuterParams


@described
def itd(num_steps: int, mode: Literal["reverse", "forward"] = "reverse", remat: bool = False) -> Estimator:
    r"""Iterative differentiation (ITD) through the last T = `num_steps` of the M inner steps.

    With :math:`\theta_T(\omega)` the map that the last T optimizer steps make, their start held fixed,

    .. math:: \nabla F(\omega) \approx \frac{d}{d\omega} L_{out}(\omega, \theta_T(\omega)) .

    The derivative goes through any optax optimizer, its state and the model's state included. T < M is truncated
    ITD. In `fb.hypergradient` the T steps of `inner_optimizer` are taken from `inner_params`.

    Order: second. Memory: theta and the optimizer's state at each of the T steps in reverse mode.

    Arguments:
        num_steps: T >= 1, at most the solver's `inner_steps`.
        mode: "reverse" keeps the T steps' intermediate values: memory grows in proportion to T. "forward" carries
            one tangent per outer parameter: time and memory grow with their number, memory not with T.
        remat: with "reverse", keep only the state at each step and compute its inside anew on the way back: less
            memory for about a third more time.

    Returns:
        An `Estimator` for either kind of problem. It has no adjoint, so `adjoint_finite` is always true.

    Raises:
        ValueError: `num_steps` < 1 or above the solver's `inner_steps`; `mode` is neither of the two; (at trace time)
            "reverse" through a loop of unknown length, such as the line search of `optax.lbfgs`, or "forward" through a
            `jax.custom_vjp` function.

    Adam and its kin divide by a root of the second moment, whose derivative is infinite where a gradient has been
    exactly zero (dead ReLU units): give `optax.adam` an `eps_root`, or `outer_finite` will show NaN.

    Example:
        >>> estimator = fb.itd(num_steps=10)

    References:
        Franceschi, Donini, Frasconi, Pontil, ICML 2017, https://arxiv.org/abs/1703.01785 (reverse and forward);
        Shaban, Cheng, Hatch, Boots, AISTATS 2019, https://arxiv.org/abs/1810.10667 (truncation).
    """
    check_number("itd", "num_steps", num_steps)
    if mode not in ("reverse", "forward"):
        raise ValueError(f'itd: mode must be "reverse" or "forward", got {mode!r}.')

    def estimate(call: Call) -> tuple[InnerSolution, Hypergradient]:
        problem, model, solve, outer_params, inner_batch, outer_batch, state, _ = call

        def unrolled(
            explicit: OuterParams, implicit: OuterParams
        ) -> tuple[jax.Array, tuple[jax.Array, Metrics, InnerSolution]]:
            """L_out(explicit, theta_T(implicit)): the same omega by its two ways into the outer objective."""
            inner = solve(implicit, remat=remat)
            parametric = as_parametric(problem, model, inner.fit.model_state, inner_batch)
            value, aux = outer_value(parametric, explicit, inner.fit.params, outer_batch)
            return value, (value, aux, inner)

        if mode == "forward" and reverse_only(unrolled, outer_params, outer_params):
            raise ValueError(
                'itd: mode is "forward", but an objective (or the model) calls a jax.custom_vjp function, which has no '
                'forward derivative; use mode="reverse".'
            )
        differentiate = jax.grad if mode == "reverse" else jax.jacfwd
        try:
            (g_exp, g_imp), (value, aux, inner) = differentiate(unrolled, argnums=(0, 1), has_aux=True)(
                outer_params, outer_params
            )
        except ValueError as error:
            if "while_loop" not in str(error):
                raise
            raise ValueError(
                'itd: mode is "reverse", but an inner step holds a loop of unknown length (the line search of an inner '
                "optimizer such as optax.lbfgs, or a jax.lax.while_loop in the inner objective or the model), which "
                'has no reverse derivative; use mode="forward", another inner optimizer, or fb.aid, which needs no '
                "derivative of the inner steps."
            ) from error
        # Forward mode returns the objective's dtype, which may be wider than that of outer_params.
        g_exp, g_imp = (jax.tree.map(lambda g, w: g.astype(w.dtype), g, outer_params) for g in (g_exp, g_imp))
        metrics = aux | {"adjoint_finite": jnp.array(True)}
        return inner, Hypergradient(tree_add_scaled(g_exp, 1.0, g_imp), g_exp, g_imp, value, state, metrics)

    return Estimator(no_state, by_call(estimate), unroll=num_steps)
