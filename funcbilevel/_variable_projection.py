"""Variable projection: a linear head solved for at every inner step instead of trained."""

import jax

from funcbilevel._arguments import check_at_least, check_number
from funcbilevel._check import check_is_model
from funcbilevel._described import described
from funcbilevel._model import LinearHead, Model
from funcbilevel._ridge import ridge_solution
from funcbilevel._typing import LinearMap


@described
def variable_projection(features: Model, num_outputs: int, ridge: float = 0.0, num_steps: int = 20) -> Model:
    r"""A prediction model :math:`h_\theta(x) = \varphi_\theta(x) V` whose linear head V is always at its optimum,

    .. math::
        V^*(\omega, \theta) = \arg\min_V L_{in}(\omega, \varphi_\theta(x_P) V) + \tfrac{ridge}2 \|V\|^2 ,

    for inner objectives that are quadratic in the prediction (squared errors, weighted or not). Only theta is trained,
    by the inner optimizer, on the objective that remains when V is put in; V is solved for on the inner batch at each
    inner step and once more for the hypergradient. FuncID takes the resulting predictions as they are. `aid`, `itd`
    and `alternating` differentiate through V as a function of omega and theta; `alternating`, which then differentiates
    through V and not through theta, is the gradient of deep feature instrumental variables (DFIV), and equals
    FuncID with `linear_adjoint` of the same features and ridge.

    Arguments:
        features: the model of phi_theta, output [n, p]; used as given (no column is added).
        num_outputs: k; the prediction is [n, k].
        ridge: >= 0, in the scale of the inner objective, a mean over the batch.
        num_steps: most conjugate-gradient steps of the solve, preconditioned by the features' Gram matrix: the first
            is exact if the objective weighs all samples and outputs alike.

    Returns:
        A `Model` with a head, whose parameters are those of `features`. `predictor` makes a function of it.

    Raises:
        TypeError: `features` is not a `Model`.
        ValueError: `num_outputs` or `num_steps` < 1, `ridge` < 0; `features` has a head already.

    Example:
        >>> import jax, jax.numpy as jnp, funcbilevel as fb
        >>> features = fb.from_function(
        ...     init=lambda key, x: jax.random.normal(key, (1, 16)), apply=lambda theta, x: jnp.tanh(x @ theta)
        ... )
        >>> model = fb.variable_projection(features, num_outputs=1, ridge=1e-3)

    References:
        Golub and Pereyra, *Separable nonlinear least squares: the variable projection method*, Inverse Problems 2003;
        Xu et al., *Learning deep features in instrumental variable regression*, ICLR 2021,
        https://arxiv.org/abs/2010.07154 (DFIV).
    """
    name = "variable_projection"
    check_is_model(name, "features", features)
    if features.head is not None:
        raise ValueError(f"{name}: features has a linear head already; pass the model that was given to it.")
    check_number(name, "num_outputs", num_outputs)
    check_number(name, "num_steps", num_steps)
    check_at_least(name, "ridge", ridge, 0.0)

    def fit(C: LinearMap, rhs: jax.Array, phi: jax.Array, v: jax.Array, mean: LinearMap) -> jax.Array:
        return ridge_solution(C, rhs, phi, v, ridge, num_steps, mean)[0]

    return Model(features.init, features.apply, LinearHead(fit, num_outputs, ridge))
