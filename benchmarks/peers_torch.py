"""The hypergradient by torchopt, betty, boat and hypergrad, and what is stated here: hypertorch's, torch.func's."""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from peers_problems import Array, Case, Theta
from torch.nn import functional

TORCH = SimpleNamespace(
    exp=torch.exp,
    mean=torch.mean,
    sum=torch.sum,
    relu=functional.relu,
    sigmoid=torch.sigmoid,
    softplus=functional.softplus,
    log_softmax=functional.log_softmax,
)

Builder = Callable[[Case], Callable[[], Any]]


def tensors(case: Case) -> tuple[Array, Theta, Any, Any]:
    """omega, theta, inner batch, outer batch."""
    groups = (case.theta, case.inner_batch, case.outer_batch)
    theta, inner, outer = (tuple(torch.as_tensor(x) for x in group) for group in groups)
    return torch.as_tensor(case.omega), theta, inner, outer


def objectives(case: Case) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """L_in and L_out of (omega, theta) on their batches."""
    _, _, inner, outer = tensors(case)
    return (
        lambda omega, theta: case.inner(TORCH, omega, tuple(theta), inner),
        lambda omega, theta: case.outer(TORCH, omega, tuple(theta), outer),
    )


class Parameters(torch.nn.Module):
    """Arrays as a module, for libraries that want one."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        super().__init__()
        self.arrays = torch.nn.ParameterList([torch.nn.Parameter(a.clone()) for a in arrays])

    def forward(self) -> list[Array]:
        """The arrays."""
        return list(self.arrays)


# torchopt: implicit differentiation of a root; its functional SGD, unrolled.


def torchopt_root(solve: Callable[..., Any]) -> Builder:
    def build(case: Case) -> Callable[[], Any]:
        import torchopt  # noqa: PLC0415

        L_in, L_out = objectives(case)
        omega, theta, _, _ = tensors(case)

        def stationarity(theta: Theta, omega: Array) -> Theta:
            return torch.func.grad(L_in, argnums=1)(omega, theta)

        @torchopt.diff.implicit.custom_root(stationarity, argnums=1, solve=solve(torchopt.linear_solve, case))
        def solver(theta: Theta, omega: Array) -> Theta:
            del omega
            return theta

        def gradient() -> Array:
            w = omega.clone().requires_grad_()
            return torch.autograd.grad(L_out(w, solver(theta, w)), w)[0]

        return gradient

    return build


def torchopt_itd(case: Case) -> Callable[[], Any]:
    import torchopt  # noqa: PLC0415

    L_in, L_out = objectives(case)
    omega, theta, _, _ = tensors(case)
    optimizer = torchopt.sgd(case.step_size)

    def gradient() -> Array:
        w, params = omega.clone().requires_grad_(), tuple(t.clone().requires_grad_() for t in theta)
        state = optimizer.init(params)
        for _ in range(case.steps):
            grads = torch.autograd.grad(L_in(w, params), params, create_graph=True)
            updates, state = optimizer.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return torch.autograd.grad(L_out(w, params), w)[0]

    return gradient


# betty: its implicit problems, and the direct and the indirect part of `Problem.backward`. It has no ITD.


def betty(kind: str) -> Builder:
    def build(case: Case) -> Callable[[], Any]:
        from betty.configs import Config  # noqa: PLC0415
        from betty.problems import ImplicitProblem  # noqa: PLC0415

        L_in, L_out = objectives(case)
        omega, theta, _, _ = tensors(case)
        config = Config(
            type=kind,
            first_order=True,
            retain_graph=True,
            cg_iterations=case.steps,
            neumann_iterations=case.steps,
            neumann_alpha=case.step_size,
        )

        class Lower(ImplicitProblem):
            def training_step(self, batch: Any) -> Array:
                return L_in(upper.module()[0], self.module())

        class Upper(ImplicitProblem):
            def training_step(self, batch: Any) -> Array:
                return L_out(self.module()[0], lower.module())

        lower, upper = Lower("lower", config, Parameters(theta)), Upper("upper", config, Parameters([omega]))

        def gradient() -> Array:
            upper.zero_grad()
            loss = upper.training_step(None)
            upper.backward(loss, upper.trainable_parameters(), [[upper, lower, upper]])
            return upper.module()[0].grad

        return gradient

    return build


# boat: its operators, called as its Problem calls them.


def boat(case: Case) -> tuple[Any, Any, dict[str, Any]]:
    """The two modules, and what an operator is made from."""
    L_in, L_out = objectives(case)
    omega, theta, _, _ = tensors(case)
    lower, upper = Parameters(theta), Parameters([omega])

    def arrays(model: Any, params: Any) -> Any:
        return list(model.parameters()) if params is None else params

    config = {
        "gm_op": ["NGD"],
        "na_op": [],
        "lower_level_opt": torch.optim.SGD(lower.parameters(), lr=case.step_size),
        "lower_iters": case.steps,
        "CG": {"tolerance": 0.0, "k": case.steps},
        "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0},
        "RGT": {"truncate_iter": 0},
    }
    operator = {
        "ll_objective": lambda data, ul, ll, params=None: L_in(ul.arrays[0], arrays(ll, params)),
        "ul_objective": lambda data, ul, ll, params=None: L_out(ul.arrays[0], arrays(ll, params)),
        "ll_model": lower,
        "ul_model": upper,
        "solver_config": config,
    }
    return lower, upper, operator


def boat_aid(kind: str) -> Builder:
    def build(case: Case) -> Callable[[], Any]:
        from boat_torch.na_ol import cg, ns  # noqa: PLC0415

        lower, upper, operator = boat(case)
        variables = {"ll_var": list(lower.parameters()), "ul_var": list(upper.parameters())}
        solver = {"cg": cg.CG, "ns": ns.NS}[kind](**operator, **variables)

        def gradient() -> Array:
            upper.zero_grad(set_to_none=True)
            solver.compute_gradients({}, {}, lower)
            return upper.arrays[0].grad

        return gradient

    return build


def boat_itd(case: Case) -> Callable[[], Any]:
    import higher  # noqa: PLC0415
    from boat_torch.gm_ol import ngd  # noqa: PLC0415
    from boat_torch.na_ol import rad  # noqa: PLC0415

    lower, upper, operator = boat(case)
    variables = {"ll_var": list(lower.parameters()), "ul_var": list(upper.parameters())}
    system = ngd.NGD(**operator, lower_loop=case.steps)
    solver = rad.RAD(**operator, **variables)
    optimizer = operator["solver_config"]["lower_level_opt"]

    def gradient() -> Array:
        upper.zero_grad(set_to_none=True)
        with higher.innerloop_ctx(lower, optimizer, copy_initial_weights=False, track_higher_grads=True) as (
            model,
            opt,
        ):
            system.optimize({}, {}, model, opt, 0)
            solver.compute_gradients({}, {}, model)
        return upper.arrays[0].grad

    return gradient


# hypergrad (PyPI): functional implicit gradients; its differentiable SGD, unrolled.


def hypergrad_aid(name: str, step_size: Callable[[Case], float]) -> Builder:
    def build(case: Case) -> Callable[[], Any]:
        from hypergrad import approx_hypergrad  # noqa: PLC0415

        L_in, L_out = objectives(case)
        omega, theta, _, _ = tensors(case)
        approximate = getattr(approx_hypergrad, name)

        def gradient() -> Array:
            return approximate(
                lambda inner, outer: L_in(outer[0], inner),
                lambda inner, outer: L_out(outer[0], inner),
                theta,
                (omega,),
                case.steps,
                step_size(case),
            )[0]

        return gradient

    return build


def hypergrad_itd(case: Case) -> Callable[[], Any]:
    from hypergrad.optimizers import diff_sgd  # noqa: PLC0415

    L_in, L_out = objectives(case)
    omega, theta, _, _ = tensors(case)

    def gradient() -> Array:
        w, params, state = omega.clone().requires_grad_(), [t.clone().requires_grad_() for t in theta], None
        for _ in range(case.steps):
            grads = torch.autograd.grad(L_in(w, params), params, create_graph=True)
            params, state = diff_sgd(list(params), list(grads), state, 0.0, 0.0, case.step_size)
        return torch.autograd.grad(L_out(w, params), w)[0]

    return gradient


# hypertorch (prolearner; not on PyPI): reverse-mode products with the Jacobian of a fixed-point map, here a gradient
# step, by `torch.autograd`: conjugate gradients on I - J, the fixed-point iteration, and unrolling.


def hypertorch(method: str) -> Builder:
    def build(case: Case) -> Callable[[], Any]:
        L_in, L_out = objectives(case)
        omega, theta, _, _ = tensors(case)

        def step(w: Array, params: Any) -> tuple[Array, ...]:
            grads = torch.autograd.grad(L_in(w, params), params, create_graph=True)
            return tuple(p - case.step_size * g for p, g in zip(params, grads))

        def unrolled() -> Array:
            w, params = omega.clone().requires_grad_(), tuple(t.clone().requires_grad_() for t in theta)
            for _ in range(case.steps):
                params = step(w, params)
            return torch.autograd.grad(L_out(w, params), w)[0]

        def implicit() -> Array:
            w, params = omega.clone().requires_grad_(), tuple(t.clone().requires_grad_() for t in theta)
            explicit, *rhs = torch.autograd.grad(L_out(w, params), (w, *params))
            mapped = step(w, params)
            J = partial(torch.autograd.grad, mapped, params, retain_graph=True)
            if method == "cg":
                v = conjugate_gradients(lambda v: [x - j for x, j in zip(v, J(v))], rhs, case.steps, case.rtol)
            else:
                v = rhs
                for _ in range(case.steps):
                    v = [b + j for b, j in zip(rhs, J(v))]
            return explicit + torch.autograd.grad(mapped, w, v)[0]

        return unrolled if method == "reverse" else implicit

    return build


def conjugate_gradients(matvec: Callable[[Any], Any], rhs: Any, steps: int, rtol: float = 0.0) -> Any:
    """`steps` iterations from zero, or fewer with a tolerance (without one there is nothing to decide at run time)."""

    def dot(a: Any, b: Any) -> Array:
        return sum(torch.sum(x * y) for x, y in zip(a, b))

    x, r, p, rr = [torch.zeros_like(b) for b in rhs], rhs, rhs, dot(rhs, rhs)
    least = rtol**2 * rr
    for _ in range(steps):
        if rtol and rr <= least:
            break
        Ap = matvec(p)
        alpha = rr / dot(p, Ap)
        x = [a + alpha * b for a, b in zip(x, p)]
        r = [a - alpha * b for a, b in zip(r, Ap)]
        rr, old = dot(r, r), rr
        p = [a + rr / old * b for a, b in zip(r, p)]
    return x


# torch.func under torch.compile, which refuses the `create_graph` of those above: Hessian-vector products forward over
# reverse, the whole hypergradient one graph.


def compiled(method: str) -> Builder:
    def build(case: Case) -> Callable[[], Any]:
        torch.compiler.reset()  # or the ninth problem is refused as a recompilation of the first
        L_in, L_out = objectives(case)
        omega, theta, _, _ = tensors(case)
        stationarity = torch.func.grad(L_in, argnums=1)

        def solve(w: Array, params: Theta, rhs: Sequence[Array]) -> Sequence[Array]:
            def H(v: Sequence[Array]) -> Sequence[Array]:
                return torch.func.jvp(lambda p: stationarity(w, p), (params,), (tuple(v),))[1]

            if method == "aid-cg":
                return conjugate_gradients(H, rhs, case.steps)
            v = rhs
            for _ in range(case.steps):
                v = [b + x - case.step_size * h for b, x, h in zip(rhs, v, H(v))]
            return [case.step_size * x for x in v]

        def implicit(w: Array, params: Theta) -> Array:
            explicit, rhs = torch.func.grad(L_out, argnums=(0, 1))(w, params)
            _, transposed = torch.func.vjp(lambda w: stationarity(w, params), w)
            return explicit - transposed(tuple(solve(w, params, rhs)))[0]

        def unrolled(w: Array, params: Theta) -> Array:
            for _ in range(case.steps):
                params = tuple(p - case.step_size * g for p, g in zip(params, stationarity(w, params)))
            return L_out(w, params)

        gradient = torch.func.grad(unrolled) if method == "itd" else implicit
        return partial(torch.compile(gradient, fullgraph=True), omega, theta)

    return build


PEERS: dict[str, dict[str, Builder]] = {
    "torchopt": {
        "aid-cg": torchopt_root(lambda s, case: s.solve_cg(maxiter=case.steps, rtol=case.rtol)),
        "aid-neumann": torchopt_root(lambda s, case: s.solve_inv(ns=True, maxiter=case.steps, alpha=case.step_size)),
        "itd": torchopt_itd,
    },
    "betty-ml": {"aid-cg": betty("cg"), "aid-neumann": betty("neumann")},
    "boat-torch": {"aid-cg": boat_aid("cg"), "aid-neumann": boat_aid("ns"), "itd": boat_itd},
    "hypergrad": {
        "aid-cg": hypergrad_aid("conjugate_gradient", lambda case: 1.0),
        "aid-neumann": hypergrad_aid("neumann", lambda case: case.step_size),
        "itd": hypergrad_itd,
    },
    "hypertorch": {
        "aid-cg": hypertorch("cg"),
        "aid-neumann": hypertorch("fixed-point"),
        "itd": hypertorch("reverse"),
    },
    "torch.compile": {method: compiled(method) for method in ("aid-cg", "aid-neumann", "itd")},
}
