"""The hypergradient by funcbilevel, jaxopt and optimistix."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from peers_problems import JAX, Array, Case, Theta

import funcbilevel as fb


def arrays(case: Case) -> tuple[Array, Theta, Any, Any]:
    """omega, theta, inner batch, outer batch."""
    return jax.tree.map(jnp.asarray, (case.omega, case.theta, case.inner_batch, case.outer_batch))


def bind(gradient: Callable[..., Any], case: Case) -> Callable[[], Any]:
    """A compiled call without arguments; the data stay arguments of the program, so that nothing is folded."""
    compiled, args = jax.jit(gradient), arrays(case)
    return lambda: compiled(*args)


def inner(case: Case) -> Callable[..., Array]:
    return lambda omega, theta, batch: case.inner(JAX, omega, theta, batch)


def outer(case: Case) -> Callable[..., Array]:
    return lambda omega, theta, batch: case.outer(JAX, omega, theta, batch)


# funcbilevel


def ours(case: Case, estimator: fb.Estimator, with_metrics: bool = False) -> Callable[[], Any]:
    problem = fb.ParametricProblem(inner(case), outer(case))

    def gradient(omega: Array, theta: Theta, inner_batch: Any, outer_batch: Any) -> Any:
        result = fb.hypergradient(
            problem, None, estimator, omega, theta, inner_batch, outer_batch, inner_optimizer=optax.sgd(case.step_size)
        )
        return result if with_metrics else result.gradient

    return bind(gradient, case)


OURS: dict[str, Callable[[Case], Callable[[], Any]]] = {
    "aid-cg": lambda case: ours(case, fb.aid(fb.cg(case.steps), warm_start=False)),
    "aid-neumann": lambda case: ours(case, fb.aid(fb.neumann(case.steps, case.step_size), warm_start=False)),
    "itd": lambda case: ours(case, fb.itd(case.steps, remat=True)),  # on CPUs a step anew is faster than its memory
}


# jaxopt: implicit differentiation of a root, with its own CG; unrolled gradient descent.


def jaxopt_cg(case: Case) -> Callable[[], Any]:
    import jaxopt  # noqa: PLC0415

    L_in, L_out = inner(case), outer(case)

    def solve(matvec: Any, b: Any) -> Any:
        return jaxopt.linear_solve.solve_cg(matvec, b, tol=case.rtol, maxiter=case.steps)

    def gradient(omega: Array, theta: Theta, inner_batch: Any, outer_batch: Any) -> Any:
        def stationarity(theta: Theta, omega: Array, batch: Any) -> Theta:
            return jax.grad(L_in, argnums=1)(omega, theta, batch)

        @jaxopt.implicit_diff.custom_root(stationarity, solve=solve)
        def solver(theta: Theta, omega: Array, batch: Any) -> Theta:
            del omega, batch
            return theta

        return jax.grad(lambda w: L_out(w, solver(theta, w, inner_batch), outer_batch))(omega)

    return bind(gradient, case)


def jaxopt_itd(case: Case) -> Callable[[], Any]:
    import jaxopt  # noqa: PLC0415

    L_in, L_out = inner(case), outer(case)

    def gradient(omega: Array, theta: Theta, inner_batch: Any, outer_batch: Any) -> Any:
        solver = jaxopt.GradientDescent(
            lambda theta, w, batch: L_in(w, theta, batch),
            stepsize=case.step_size,
            maxiter=case.steps,
            tol=0.0,
            acceleration=False,
            implicit_diff=False,
            unroll=True,  # by a scan
        )
        return jax.grad(lambda w: L_out(w, solver.run(theta, w, inner_batch).params, outer_batch))(omega)

    return bind(gradient, case)


# optimistix: implicit differentiation with a lineax solver; backpropagation through the iterates.


def optimistix_cg(case: Case) -> Callable[[], Any]:
    import lineax  # noqa: PLC0415
    from optimistix.internal import implicit_jvp  # noqa: PLC0415

    class FixedCG(lineax.CG):
        """Its own raises once `max_steps` are made; this one returns what it has."""

        def compute(self, state: Any, vector: Any, options: Any) -> Any:
            """The solution after `max_steps`."""
            solution, _, statistics = super().compute(state, vector, options)
            return solution, lineax.RESULTS.successful, statistics

    L_in, L_out = inner(case), outer(case)
    linear_solver = FixedCG(rtol=0.0, atol=0.0, max_steps=case.steps)
    tags = frozenset({lineax.positive_semidefinite_tag})

    def gradient(omega: Array, theta: Theta, inner_batch: Any, outer_batch: Any) -> Any:
        def solver(w: Array) -> Theta:
            return implicit_jvp(_given, _stationarity, (theta, w, inner_batch, L_in), tags, linear_solver)[0]

        return jax.grad(lambda w: L_out(w, solver(w), outer_batch))(omega)

    return bind(gradient, case)


def _given(inputs: Any) -> Any:
    return inputs[0], None


def _stationarity(theta: Theta, _: Any, inputs: Any) -> Theta:
    _, omega, batch, L_in = inputs
    return jax.grad(L_in, argnums=1)(omega, theta, batch)


def optimistix_itd(case: Case) -> Callable[[], Any]:
    import optimistix  # noqa: PLC0415

    L_in, L_out = inner(case), outer(case)

    def gradient(omega: Array, theta: Theta, inner_batch: Any, outer_batch: Any) -> Any:
        def solver(w: Array) -> Theta:
            return optimistix.minimise(
                lambda theta, args: L_in(args[0], theta, args[1]),
                optimistix.OptaxMinimiser(optax.sgd(case.step_size), rtol=0.0, atol=0.0),
                theta,
                (w, inner_batch),
                adjoint=optimistix.RecursiveCheckpointAdjoint(checkpoints=case.steps),
                max_steps=case.steps,
                throw=False,
            ).value

        return jax.grad(lambda w: L_out(w, solver(w), outer_batch))(omega)

    return bind(gradient, case)


PEERS: dict[str, dict[str, Callable[[Case], Callable[[], Any]]]] = {
    "jaxopt": {"aid-cg": jaxopt_cg, "itd": jaxopt_itd},
    "optimistix": {"aid-cg": optimistix_cg, "itd": optimistix_itd},
}
