"""SABA: SOBA with SAGA's variance reduction, by a memory of every term of the two finite sums."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcbilevel._bilevel import BilevelSolver, BilevelState
from funcbilevel._described import described
from funcbilevel._draws import FiniteSum
from funcbilevel._problem import ParametricProblem
from funcbilevel._stochastic._loop import (
    Draws,
    LinearState,
    StepSize,
    inner_step,
    linear_start,
    linear_step,
    optimizers,
    outer_step,
    solver,
)
from funcbilevel._stochastic._oracles import Outer, Report, joined, outer_gradients, products, report
from funcbilevel._tree import all_finite, tree_where
from funcbilevel._typing import InnerParams, Key, OuterParams, PyTree


class Memory(NamedTuple):
    """Values at the last visit of each block: leaves [n, ...]; and their mean over the blocks."""

    table: PyTree
    mean: PyTree


class SabaState(NamedTuple):
    """u with its optimizer's state, and the memories.

    Attributes:
        linear: u.
        inner: of (d_theta G_i, d^2_theta G_i u, d^2_omega_theta G_i u).
        outer: of (d_theta F_j, d_omega F_j).
    """

    linear: LinearState
    inner: Memory
    outer: Memory


def remembered(source: FiniteSum, f: Any) -> Memory:
    """f(block) of every block."""
    table = jax.lax.map(f, source.data)
    return Memory(table, jax.tree.map(lambda x: jnp.mean(x, axis=0), table))


def corrected(memory: Memory, index: jax.Array, new: PyTree) -> tuple[PyTree, Memory]:
    """SAGA's estimate of the mean, new - old + mean; and the memory with `new`, if it is finite, at `index`."""
    table, mean = memory
    old = jax.tree.map(lambda t: t[index], table)
    n = jax.tree.leaves(table)[0].shape[0]
    kept = tree_where(all_finite(new), new, old)
    table = jax.tree.map(lambda t, x: t.at[index].set(x), table, kept)
    new_mean = jax.tree.map(lambda m, x, o: m + (x - o) / n, mean, kept, old)
    return jax.tree.map(lambda x, o, m: x - o + m, new, old, mean), Memory(table, new_mean)


@described
def saba(
    problem: ParametricProblem, *, inner_optimizer: StepSize, linear_optimizer: StepSize, outer_optimizer: StepSize
) -> BilevelSolver:
    r"""SABA: SOBA on two finite sums, with SAGA's estimates, which converges with constant step sizes.

    With :math:`S[\phi]_i = \phi_i - \phi_i^{mem} + \frac1n \sum_k \phi_k^{mem}` for each of the five quantities, where
    mem is the value at the last visit of the term, and all derivatives at (omega, theta, u) of before,

    .. math::
        \theta &\leftarrow \theta - \rho\, S[\partial_\theta G]_i, \\
        u &\leftarrow u - \rho_u (S[\partial^2_\theta G\, u]_i - S[\partial_\theta F]_j), \\
        \omega &\leftarrow \omega - \gamma (S[\partial_\omega F]_j - S[\partial^2_{\omega\theta} G\, u]_i) .

    The memory is filled by one pass over the data at `init`.

    Order: second. Draws per step: one block of the inner and one of the outer `FiniteSum`, number 0 of each. Memory:
    with n and m blocks, 2 n + m vectors like theta and n + m like omega. (The terms of the sums are blocks here:
    `batch_size=1` is the published method; larger ones need less memory.)

    Arguments:
        problem, inner_optimizer, linear_optimizer, outer_optimizer: as for `soba`.

    Returns:
        A `BilevelSolver`, whose batches are `FiniteSum`s, at `init` too: `solver.init(key, outer_params, inner_batch,
        inner_params, outer_batch)`.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind; a source is not a `FiniteSum`.

    Example:
        >>> problem = fb.ParametricProblem(
        ...     lambda w, u, x: jnp.mean((u - w * x) ** 2), lambda w, u, x: jnp.mean((u - 2.0 * x) ** 2)
        ... )
        >>> solver = fb.saba(problem, inner_optimizer=0.2, linear_optimizer=0.2, outer_optimizer=0.1)
        >>> data = fb.finite_sum(jnp.linspace(0.5, 1.5, 8), batch_size=2)
        >>> state = solver.init(jax.random.key(0), 0.0, data, 0.0, data)
        >>> state, metrics = jax.jit(solver.run, static_argnums=3)(state, data, data, 400)
        >>> bool(abs(state.outer_params - 2.0) < 1e-3)
        True

    References:
        Dagreou, Ablin, Vaiter, Moreau, NeurIPS 2022, https://arxiv.org/abs/2201.13409, section 3.2.
    """
    levels = optimizers("saba", inner_optimizer, outer_optimizer, linear_optimizer)

    def own(omega: OuterParams, theta: InnerParams, inner: FiniteSum, outer: FiniteSum, /) -> SabaState:
        linear = linear_start(levels, theta)
        return SabaState(
            linear,
            remembered(inner, lambda batch: tuple(products(problem, omega, theta, batch, linear.u)[1:])),
            remembered(outer, lambda batch: _outer(outer_gradients(problem, omega, theta, batch))),
        )

    def update(state: BilevelState, draws: Draws, key: Key, /) -> tuple[BilevelState, Report]:
        del key
        omega, theta, (linear, inner, outer) = state.outer_params, state.inner_params, state.estimator_state
        G, *inner_now = products(problem, omega, theta, draws.inner(0), linear.u)
        F = outer_gradients(problem, omega, theta, draws.outer(0))
        (gradient, Hu, cross), inner = corrected(inner, draws.inner.source.index(0), tuple(inner_now))
        (d, g_exp), outer = corrected(outer, draws.outer.source.index(0), _outer(F))
        D = joined(gradient, Hu, cross, F._replace(d=d, g_exp=g_exp), G)
        after = outer_step(levels, D.omega, inner_step(levels, D.theta, state))
        linear = linear_step(levels, D.u, linear, state.step)
        return after._replace(estimator_state=SabaState(linear, inner, outer)), report(D, D.omega)

    return solver(
        "saba", problem, levels, own, update, inner_draws=1, outer_draws=1, finite_sums=True, guarded="linear"
    )


def _outer(F: Outer) -> tuple[InnerParams, OuterParams]:
    return F.d, F.g_exp
