"""Implicit layers of funcbilevel beside those of JAXopt and optimistix: same solutions, same conditions, same solvers.

    pip install -c constraints.txt -e ".[peers]"
    python benchmarks/implicit_layers.py --output runs.jsonl
    python benchmarks/implicit_layers.py --report runs.jsonl

(The committed ones are benchmarks/results/implicit/runs.jsonl and table.md there.)

Each problem states a solution and the condition that it satisfies; a library gets both, and gives the gradient of a
loss of the solution by omega. What is compiled and timed is that gradient: solver, linear system and cross derivative,
in the processor's time. All use conjugate gradients, or those of the normal equations where the system is not
symmetric, with the same tolerance, in float64, and at most 100 steps (optimistix raises an error where it meets its
limit: it has its own). optimistix has no decorator: its fixed-point iteration starts at the solution, where it stops at
its first step, and its own implicit derivative does the rest; so it enters for fixed points and gradients.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from turns import times_in_turns

import funcbilevel as fb
from funcbilevel.tasks._experiment import store

OURS = "funcbilevel"
STEPS, TOLERANCE = 100, 1e-12
Array = jax.Array


class Layer(NamedTuple):
    """A solution as a function of omega, and its condition.

    Attributes:
        about: one line.
        condition: `(x, omega, data)`: a fixed-point map, or the residual of a root, which is a gradient if `symmetric`.
        solve: `(omega, data) -> x`, any way.
        loss: `(x, data) -> scalar`.
        omega, data: pytrees.
    """

    about: str
    condition: Callable[..., Any]
    solve: Callable[..., Any]
    loss: Callable[..., Array]
    omega: Any
    data: Any
    fixed_point: bool = False
    symmetric: bool = False


def _normal(seed: int, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def _repeated(step: Callable[[Any], Any], start: Any, number: int) -> Any:
    return jax.lax.fori_loop(0, number, lambda _, x: step(x), start)


def _squares(x: Any, data: Any) -> Array:
    return jnp.mean((data["outer_inputs"] @ x - data["outer_targets"]) ** 2)


def _regression(n: int, p: int) -> dict[str, Array]:
    truth = _normal(0, p) * (jnp.arange(p) < p // 4)
    inputs, outer = _normal(1, n, p), _normal(2, n, p)
    return {
        "inputs": inputs,
        "targets": inputs @ truth + 0.5 * _normal(3, n),
        "outer_inputs": outer,
        "outer_targets": outer @ truth + 0.5 * _normal(4, n),
    }


def ridge(n: int = 400, p: int = 100) -> Layer:
    """A penalty for each weight."""

    def objective(x: Array, omega: Array, data: Any) -> Array:
        return jnp.sum((data["inputs"] @ x - data["targets"]) ** 2) / 2 + jnp.sum(jnp.exp(omega) * x**2) / 2

    def solve(omega: Array, data: Any) -> Array:
        A = data["inputs"]
        return jnp.linalg.solve(A.T @ A + jnp.diag(jnp.exp(omega)), A.T @ data["targets"])

    data = _regression(n, p)
    return Layer("ridge regression", jax.grad(objective), solve, _squares, jnp.zeros(p), data, symmetric=True)


def _proximal(about: str, prox: Callable[[Array, Any, float], Array], omega: Any, n: int, p: int) -> Layer:
    """Least squares with a prox: the map of a proximal gradient step."""
    data = _regression(n, p)
    step_size = float(1.0 / jnp.linalg.norm(data["inputs"], ord=2) ** 2)

    def image(x: Array, omega: Any, data: Any) -> Array:
        return prox(x - step_size * data["inputs"].T @ (data["inputs"] @ x - data["targets"]), omega, step_size)

    def solve(omega: Any, data: Any) -> Array:
        return _repeated(lambda x: image(x, omega, data), jnp.full(p, 1.0 / p), 400)

    return Layer(about, image, solve, _squares, omega, data, fixed_point=True)


def lasso(n: int = 400, p: int = 100) -> Layer:
    """The penalty of the lasso."""
    return _proximal("lasso", lambda x, w, s: fb.prox_l1(x, s * jnp.exp(w)), jnp.log(20.0), n, p)


def non_negative(n: int = 400, p: int = 100) -> Layer:
    """Non-negative least squares with a penalty."""
    project = optax.projections.projection_non_negative
    return _proximal(
        "non-negative least squares", lambda x, w, s: project(x / (1 + s * jnp.exp(w))), jnp.log(5.0), n, p
    )


def simplex(n: int = 400, p: int = 100) -> Layer:
    """Weights on the simplex, with linear costs."""
    project = optax.projections.projection_simplex
    return _proximal("least squares on the simplex", lambda x, w, s: project(x - s * w), jnp.zeros(p), n, p)


def support_vectors(n: int = 100, p: int = 20, classes: int = 3) -> Layer:
    """The dual of Crammer and Singer's machine: each sample's variables on a simplex."""
    inputs, outer = _normal(5, n, p), _normal(6, n, p)
    weights = _normal(7, p, classes)
    labels, outer_labels = (jax.nn.one_hot(jnp.argmax(x @ weights, axis=1), classes) for x in (inputs, outer))
    data = {"inputs": inputs, "labels": labels, "outer_inputs": outer, "outer_labels": outer_labels}
    step_size = float(50.0 / jnp.linalg.norm(inputs, ord=2) ** 2)

    def primal(x: Array, omega: Array, data: Any) -> Array:
        return data["inputs"].T @ (data["labels"] - x) / jnp.exp(omega)

    def dual(x: Array, omega: Array, data: Any) -> Array:
        return jnp.exp(omega) * jnp.sum(primal(x, omega, data) ** 2) / 2 - jnp.vdot(x, 1.0 - data["labels"])

    def image(x: Array, omega: Array, data: Any) -> Array:
        return jax.vmap(optax.projections.projection_simplex)(x - step_size * jax.grad(dual)(x, omega, data))

    def solve(omega: Array, data: Any) -> Array:
        return _repeated(lambda x: image(x, omega, data), jnp.full((n, classes), 1.0 / classes), 2000)

    def loss(x: Array, data: Any) -> Array:
        scores = data["outer_inputs"] @ (data["inputs"].T @ (data["labels"] - x))
        return jnp.mean(optax.softmax_cross_entropy(scores / 50.0, data["outer_labels"]))

    return Layer("dual of a multiclass SVM", image, solve, loss, jnp.log(50.0), data, fixed_point=True)


def sparse_coding(n: int = 50, p: int = 16, atoms: int = 24) -> Layer:
    """Codes of n samples by one dictionary, which is omega."""
    dictionary = _normal(8, atoms, p)
    dictionary /= jnp.linalg.norm(dictionary, axis=1, keepdims=True)
    codes = _normal(9, n, atoms) * (jnp.asarray(np.random.default_rng(10).uniform(size=(n, atoms))) < 0.15)
    data = {"samples": codes @ dictionary + 0.05 * _normal(11, n, p)}
    step_size = float(0.5 / jnp.linalg.norm(dictionary, ord=2) ** 2)

    def objective(x: Array, omega: Array, data: Any) -> Array:
        return jnp.sum((x @ omega - data["samples"]) ** 2) / 2 + 0.2 * jnp.sum(x**2)

    def image(x: Array, omega: Array, data: Any) -> Array:
        return fb.prox_l1(x - step_size * jax.grad(objective)(x, omega, data), step_size * 0.1)

    def solve(omega: Array, data: Any) -> Array:
        return _repeated(lambda x: image(x, omega, data), jnp.zeros((n, atoms)), 4000)

    def loss(x: Array, data: Any) -> Array:
        return jnp.mean((x @ dictionary - data["samples"]) ** 2) + 0.1 * jnp.mean(jnp.sin(x))

    return Layer("sparse coding", image, solve, loss, dictionary, data, fixed_point=True)


def distillation(p: int = 64, classes: int = 10) -> Layer:
    """A classifier trained on one picture of each class, which are omega."""
    outer = _normal(12, 500, p)
    data = {"outer_inputs": outer, "outer_labels": jnp.argmax(outer @ _normal(13, p, classes), axis=1)}

    def cross_entropy(x: Array, inputs: Array, labels: Array) -> Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(inputs @ x, labels))

    def objective(x: Array, omega: Array, data: Any) -> Array:
        return cross_entropy(x, omega, jnp.arange(classes)) + 0.05 * jnp.sum(x**2)

    def solve(omega: Array, data: Any) -> Array:
        return _repeated(lambda x: x - 0.1 * jax.grad(objective)(x, omega, data), jnp.zeros((p, classes)), 4000)

    def loss(x: Array, data: Any) -> Array:
        return cross_entropy(x, data["outer_inputs"], data["outer_labels"])

    return Layer(
        "data set distillation", jax.grad(objective), solve, loss, _normal(14, classes, p), data, symmetric=True
    )


def equilibrium(p: int = 100) -> Layer:
    """A layer that feeds itself."""
    weights = _normal(15, p, p) * 0.5 / p**0.5
    data = {"inputs": _normal(16, p), "targets": _normal(17, p)}

    def image(x: Array, omega: Any, data: Any) -> Array:
        return jnp.tanh(omega @ x + data["inputs"])

    def solve(omega: Any, data: Any) -> Array:
        return _repeated(lambda x: image(x, omega, data), jnp.zeros(p), 100)

    def loss(x: Array, data: Any) -> Array:
        return jnp.mean((x - data["targets"]) ** 2)

    return Layer("deep equilibrium", image, solve, loss, weights, data, fixed_point=True)


def quadratic_program(p: int = 30, equations: int = 5) -> Layer:
    """By its KKT conditions: equality constraints, whose right-hand side is omega."""
    factor, rows = _normal(18, 2 * p, p), _normal(19, equations, p)
    data = {"V": factor.T @ factor / p, "E": rows, "c": _normal(20, p), "targets": _normal(21, p)}

    def residual(x: tuple[Array, Array], omega: Array, data: Any) -> tuple[Array, Array]:
        primal, dual = x
        return data["V"] @ primal + data["c"] + data["E"].T @ dual, data["E"] @ primal - omega

    def solve(omega: Array, data: Any) -> tuple[Array, Array]:
        E = data["E"]
        system = jnp.block([[data["V"], E.T], [E, jnp.zeros((equations, equations))]])
        x = jnp.linalg.solve(system, jnp.concatenate([-data["c"], omega]))
        return x[:p], x[p:]

    def loss(x: tuple[Array, Array], data: Any) -> Array:
        return jnp.mean((x[0] - data["targets"]) ** 2) + jnp.mean(jnp.sin(x[1]))

    return Layer("quadratic program, KKT", residual, solve, loss, jnp.ones(equations), data)


LAYERS: dict[str, Callable[[], Layer]] = {
    f.__name__.replace("_", "-"): f
    for f in (ridge, lasso, non_negative, simplex, support_vectors, sparse_coding, distillation, equilibrium)
} | {"quadratic-program": quadratic_program}


# The libraries: the gradient of the loss by omega, `(omega, data) -> gradient`.


def ours(layer: Layer) -> Callable[[Any, Any], Any]:
    solver = fb.cg(STEPS, rtol=TOLERANCE) if layer.symmetric else fb.normal_cg(STEPS, rtol=TOLERANCE)
    decorator = fb.custom_fixed_point if layer.fixed_point else fb.custom_root
    found = decorator(layer.condition, linear_solver=solver)(lambda _, omega, data: layer.solve(omega, data))
    return jax.grad(lambda omega, data: layer.loss(found(None, omega, data), data))


def jaxopt(layer: Layer) -> Callable[[Any, Any], Any]:
    from jaxopt import implicit_diff, linear_solve  # noqa: PLC0415

    by = linear_solve.solve_cg if layer.symmetric else linear_solve.solve_normal_cg

    def solve(matvec: Any, b: Any) -> Any:
        return by(matvec, b, tol=TOLERANCE, maxiter=STEPS)

    decorator = implicit_diff.custom_fixed_point if layer.fixed_point else implicit_diff.custom_root
    found = decorator(layer.condition, solve=solve)(lambda _, omega, data: layer.solve(omega, data))
    return jax.grad(lambda omega, data: layer.loss(found(None, omega, data), data))


def optimistix(layer: Layer) -> Callable[[Any, Any], Any]:
    import lineax  # noqa: PLC0415
    import optimistix as optx  # noqa: PLC0415

    if layer.symmetric:
        linear, tags = lineax.CG(TOLERANCE, TOLERANCE), frozenset({lineax.negative_semidefinite_tag})
    else:
        linear = lineax.Normal(lineax.CG(TOLERANCE, TOLERANCE))
        tags = frozenset[object]()
    adjoint = optx.ImplicitAdjoint(linear)
    solver = optx.FixedPointIteration(1e-6, 1e-6)

    def image(x: Any, args: Any) -> Any:
        value = layer.condition(x, *args)
        return value if layer.fixed_point else jax.tree.map(lambda a, b: a - 0.1 * b, x, value)

    def gradient(omega: Any, data: Any) -> Any:
        x = layer.solve(omega, data)

        def loss(omega: Any) -> Array:
            found = optx.fixed_point(image, solver, jax.lax.stop_gradient(x), (omega, data), tags=tags, adjoint=adjoint)
            return layer.loss(found.value, data)

        return jax.grad(loss)(omega)

    return gradient


PEERS = {"jaxopt": jaxopt, "optimistix": optimistix}


def offers(peer: str, layer: Layer) -> bool:
    """Whether the peer has this kind of layer."""
    return peer == "jaxopt" or layer.fixed_point or layer.symmetric


def compiled(gradient: Callable[[Any, Any], Any], layer: Layer) -> tuple[Callable[[], Any], float]:
    """A call without arguments, and the seconds that compiling it took."""
    omega, data = jax.tree.map(jnp.asarray, (layer.omega, layer.data))
    start = time.perf_counter()
    program = jax.jit(gradient).lower(omega, data).compile()
    return lambda: program(omega, data), time.perf_counter() - start


def error(got: Any, expected: Any) -> float:
    """Relative, in the maximum norm."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True))
    return float(max(jnp.max(jnp.abs(x - y)) for x, y in pairs) / max(jnp.max(jnp.abs(y)) for _, y in pairs))


def measure(name: str, peers: Sequence[str], repeats: int) -> Iterator[store.Record]:
    """A record for us and for each peer."""
    layer = LAYERS[name]()
    makes = {OURS: ours} | {peer: PEERS[peer] for peer in peers if offers(peer, layer)}
    calls, seconds = {}, {}
    for library, make in makes.items():
        calls[library], seconds[library] = compiled(make(layer), layer)
    ours_is = calls[OURS]()
    times = times_in_turns(calls, repeats, time.process_time)
    for library, call in calls.items():
        metrics = {
            "seconds": float(np.median(times[library])),
            "compile_seconds": seconds[library],
            "difference": error(call(), ours_is),
        }
        yield store.record("implicit", library, 0, {"layer": name, "version": version(library)}, metrics, 0.0)


def report(records: Sequence[store.Record]) -> str:
    """A row for each layer and peer."""
    of = {(r["settings"]["layer"], r["method"]): r["metrics"] for r in records}
    lines = [
        "| Layer | peer | its gradient minus ours, relative | its time over ours | its compile time over ours |",
        "|---|---|---|---|---|",
    ]
    ratios: dict[str, list[float]] = {}
    for (name, peer), metrics in sorted(of.items()):
        if peer == OURS:
            continue
        us = of[name, OURS]
        ratio = metrics["seconds"] / us["seconds"]
        ratios.setdefault(peer, []).append(ratio)
        lines.append(
            f"| {name} | {peer} | {metrics['difference']:.1e} | {ratio:.2f} | "
            f"{metrics['compile_seconds'] / us['compile_seconds']:.2f} |"
        )
    lines.append("")
    lines += [
        f"{peer}: median time over ours {np.median(x):.2f}, from {min(x):.2f} to {max(x):.2f}, {len(x)} layers."
        for peer, x in sorted(ratios.items())
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, or reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file of records to write")
    parser.add_argument("--report", type=Path, help="file of records to print as a table")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args(argv)
    if args.report:
        print(report(store.read(args.report)))
        return
    jax.config.update("jax_enable_x64", True)
    for name in LAYERS:
        print(name, file=sys.stderr, flush=True)
        for record in measure(name, tuple(PEERS), args.repeats):
            if args.output:
                store.append(args.output, [record])
            else:
                print(record["method"], record["metrics"])


if __name__ == "__main__":
    main()
