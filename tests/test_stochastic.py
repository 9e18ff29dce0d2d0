"""The stochastic methods against transcriptions of their published updates, in NumPy, on quadratic finite sums."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcbilevel as fb

STEPS = 50
P, Q = 3, 2  # inner and outer parameters
N, M = 4, 3  # blocks of the inner and the outer sum
RHO, RHO_U, ETA, ALPHA = 0.2, 0.15, 0.6, 0.05


def gamma(t: Any) -> Any:
    return 0.1 / (1.0 + t) ** 0.5


def penalty(t: Any) -> Any:
    return 2.0 + 0.1 * t


SIZES: dict[str, Any] = {"inner_optimizer": RHO, "outer_optimizer": gamma}
LINEAR: dict[str, Any] = SIZES | {"linear_optimizer": RHO_U}
SERIES: dict[str, Any] = SIZES | {"neumann_step_size": 0.3}
PENALTY: dict[str, Any] = SIZES | {"penalty_optimizer": ALPHA, "penalty": penalty}
MOMENTA: dict[str, Any] = {"inner_momentum": ETA, "outer_momentum": lambda t: 0.9 / (1.0 + t) ** 0.3}


# The problem: quadratics, one for each sample; two samples in each block.


@functools.cache
def terms() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)

    def spd(n: int, k: int) -> np.ndarray:
        X = rng.normal(size=(n, k, k))
        return 0.3 * np.einsum("nij,nkj->nik", X, X) + 0.5 * np.eye(k)

    normal = lambda *shape: rng.normal(size=shape)
    inner = {"A": spd(2 * N, P), "B": 0.5 * normal(2 * N, Q, P), "a": normal(2 * N, P)}
    outer = {"P": spd(2 * M, P), "Q": spd(2 * M, Q), "R": 0.3 * normal(2 * M, Q, P), "p": normal(2 * M, P)}
    return inner, outer | {"q": normal(2 * M, Q)}


def flat(theta: Any) -> jax.Array:
    return jnp.concatenate([theta["first"], theta["last"][None]])


def inner_objective(omega: jax.Array, theta: Any, batch: Any) -> jax.Array:
    th = flat(theta)
    return jnp.mean(0.5 * (batch["A"] @ th) @ th + (batch["B"] @ th) @ omega + batch["a"] @ th)


def outer_objective(omega: jax.Array, theta: Any, batch: Any) -> jax.Array:
    th = flat(theta)
    quadratic = 0.5 * (batch["P"] @ th) @ th + 0.5 * (batch["Q"] @ omega) @ omega + (batch["R"] @ th) @ omega
    return jnp.mean(quadratic + batch["p"] @ th + batch["q"] @ omega)


PROBLEM = fb.ParametricProblem(inner_objective, outer_objective)
FIRST_ORDER = ("f2sa", "f3sa", "pbgd", "pbgd_free", "bome", "meha", "gaffa")
OMEGA, THETA = np.array([0.5, -1.0]), {"first": np.array([0.3, -0.2]), "last": np.array(0.7)}


def sources(replace: bool) -> tuple[fb.FiniteSum, fb.FiniteSum]:
    keys = jax.random.split(jax.random.key(3))
    return tuple(fb.finite_sum(t, 2, key=k, replace=replace) for t, k in zip(terms(), keys, strict=True))


# Its derivatives, by hand, of one block; or of the mean of all of them for index None.


class Hand(NamedTuple):
    """Derivatives of G_i and F_j, with w for omega and t for theta as flat arrays."""

    inner: dict[str, np.ndarray]
    outer: dict[str, np.ndarray]

    def of(self, level: str, name: str, i: Any) -> np.ndarray:
        x = getattr(self, level)[name]
        return x.mean(axis=0) if i is None else x[2 * i : 2 * i + 2].mean(axis=0)

    def g(self, i: Any, w: np.ndarray, t: np.ndarray) -> np.ndarray:
        return self.of("inner", "A", i) @ t + self.of("inner", "B", i).T @ w + self.of("inner", "a", i)

    def H(self, i: Any, u: np.ndarray) -> np.ndarray:
        return self.of("inner", "A", i) @ u

    def cross(self, i: Any, u: np.ndarray) -> np.ndarray:
        return self.of("inner", "B", i) @ u

    def f_t(self, j: Any, w: np.ndarray, t: np.ndarray) -> np.ndarray:
        return self.of("outer", "P", j) @ t + self.of("outer", "R", j).T @ w + self.of("outer", "p", j)

    def f_w(self, j: Any, w: np.ndarray, t: np.ndarray) -> np.ndarray:
        return self.of("outer", "Q", j) @ w + self.of("outer", "R", j) @ t + self.of("outer", "q", j)


# The published updates: `i(k)` and `j(k)` are the k-th inner and outer index of the step, `p` a Neumann series' length.
# Each is a generator: it is sent (step, i, j, p) and yields (omega, theta) after that step.

START = (OMEGA, np.array([0.3, -0.2, 0.7]))


def soba(D: Hand) -> Any:
    (w, t), u, k = START, np.zeros(P), (yield)
    while True:
        step, i, j, _ = k
        d_t, d_u, d_w = (
            D.g(i(0), w, t),
            D.H(i(0), u) - D.f_t(j(0), w, t),
            D.f_w(j(0), w, t) - D.cross(i(0), u),
        )
        t, u, w = t - RHO * d_t, u - RHO_U * d_u, w - gamma(step) * d_w
        k = yield w, t


def ma_soba(D: Hand) -> Any:
    (w, t), u, h, k = START, np.zeros(P), np.zeros(Q), (yield)
    while True:
        step, i, j, _ = k
        d_t, d_u, d_w = D.g(i(0), w, t), D.H(i(0), u) - D.f_t(j(0), w, t), D.f_w(j(0), w, t) - D.cross(i(0), u)
        t, u, w = t - RHO * d_t, u - RHO_U * d_u, w - gamma(step) * h
        h = (1 - ETA) * h + ETA * d_w
        k = yield w, t


def saba(D: Hand) -> Any:
    (w, t), u, k = START, np.zeros(P), (yield)
    # What was seen last: the point (w, t, u) of each term, from which its values are computed anew.
    seen_i, seen_j = [(w, t, u)] * N, [(w, t, u)] * M

    def saga(value: Callable[..., np.ndarray], seen: list[Any], index: int) -> np.ndarray:
        mean = np.mean([value(k, *z) for k, z in enumerate(seen)], axis=0)
        return value(index, w, t, u) - value(index, *seen[index]) + mean

    while True:
        step, i, j, _ = k
        a, b = i(0), j(0)
        d_t = saga(lambda k, w, t, u: D.g(k, w, t), seen_i, a)
        d_u = saga(lambda k, w, t, u: D.H(k, u), seen_i, a) - saga(lambda k, w, t, u: D.f_t(k, w, t), seen_j, b)
        d_w = saga(lambda k, w, t, u: D.f_w(k, w, t), seen_j, b) - saga(lambda k, w, t, u: D.cross(k, u), seen_i, a)
        seen_i[a], seen_j[b] = (w, t, u), (w, t, u)
        t, u, w = t - RHO * d_t, u - RHO_U * d_u, w - gamma(step) * d_w
        k = yield w, t


PERIOD, RADIUS = 7, 1.5


def srba(D: Hand) -> Any:
    (w, t), u, k = START, np.zeros(P), (yield)
    old, estimate = (w, t, u), None

    def directions(a: Any, b: Any, w: np.ndarray, t: np.ndarray, u: np.ndarray) -> list[np.ndarray]:
        return [D.g(a, w, t), D.H(a, u) - D.f_t(b, w, t), D.f_w(b, w, t) - D.cross(a, u)]

    while True:
        step, i, j, _ = k
        if step % PERIOD == 0:
            estimate = directions(None, None, w, t, u)
        else:
            new, before = directions(i(0), j(0), w, t, u), directions(i(0), j(0), *old)
            estimate = [x - y + e for x, y, e in zip(new, before, estimate)]
        old = (w, t, u)
        t, u, w = t - RHO * estimate[0], u - RHO_U * estimate[1], w - gamma(step) * estimate[2]
        u = u * min(1.0, RADIUS / np.linalg.norm(u))
        k = yield w, t


def fsla(D: Hand) -> Any:
    (w, t), u, k = START, np.zeros(P), (yield)
    w_old, h = w, None
    while True:
        step, i, j, _ = k
        t_old, u_old = t, u
        t = t - RHO * D.g(i(0), w, t)
        u = u - RHO_U * (D.H(i(1), u) - D.f_t(j(0), w, t))
        new = D.f_w(j(1), w, t) - D.cross(i(2), u)
        old = D.f_w(j(1), w_old, t_old) - D.cross(i(2), u_old)
        h = new if step == 0 else new + (1 - ETA) * (h - old)
        w_old, w = w, w - gamma(step) * h
        k = yield w, t


def random_series(D: Hand, w: np.ndarray, t: np.ndarray, i: Any, j: int, p: int, first: int, terms: int) -> np.ndarray:
    u = D.f_t(j, w, t)
    for k in range(p):
        u = u - 0.3 * D.H(i(first + 1 + k), u)
    return D.f_w(j, w, t) - D.cross(i(first), terms * 0.3 * u)


def fixed_series(D: Hand, w: np.ndarray, t: np.ndarray, i: Any, j: Any, first: int, steps: int) -> np.ndarray:
    term = D.f_t(j, w, t)
    total = term.copy()
    for k in range(steps):
        term = term - 0.3 * D.H(i(first + 1 + k), term)
        total += term
    return D.f_w(j, w, t) - D.cross(i(first), 0.3 * total)


def momentum(D: Hand, hypergradient: Callable[..., np.ndarray]) -> Any:
    (w, t), k = START, (yield)
    w_old, t_old, h_g, h_f = w, t, None, None
    while True:
        step, i, j, p = k
        f = lambda w, t: hypergradient(D, w, t, i, j(0), p)
        if step == 0:
            h_g, h_f = D.g(i(0), w, t), f(w, t)
        else:
            eta_f = MOMENTA["outer_momentum"](step)
            h_g = ETA * D.g(i(0), w, t) + (1 - ETA) * (h_g + D.g(i(0), w, t) - D.g(i(0), w_old, t_old))
            h_f = eta_f * f(w, t) + (1 - eta_f) * (h_f + f(w, t) - f(w_old, t_old))
        w_old, t_old = w, t
        w, t = w - gamma(step) * h_f, t - RHO * h_g
        k = yield w, t


def sustain(D: Hand) -> Any:
    return momentum(D, lambda D, w, t, i, j, p: random_series(D, w, t, i, j, p, first=1, terms=5))


def mrbo(D: Hand) -> Any:
    return momentum(D, lambda D, w, t, i, j, p: fixed_series(D, w, t, i, j, first=1, steps=4))


def vrbo(D: Hand) -> Any:
    (w, t), k = START, (yield)
    h_g, h_f = None, None
    while True:
        step, i, j, _ = k
        if step % PERIOD == 0:
            h_g, h_f = D.g(None, w, t), fixed_series(D, w, t, lambda _: None, None, first=0, steps=4)
        old = (w, t)
        w = w - gamma(step) * h_f
        for turn in range(3):
            h_g = h_g + D.g(i(6 * turn), w, t) - D.g(i(6 * turn), *old)
            f = lambda w, t, turn=turn: fixed_series(D, w, t, i, j(turn), first=6 * turn + 1, steps=4)
            h_f = h_f + f(w, t) - f(*old)
            old = (w, t)
            t = t - RHO * h_g
        k = yield w, t


def double_loop(D: Hand, inner_steps: int, hypergradient: Callable[..., np.ndarray]) -> Any:
    (w, t), k = START, (yield)
    while True:
        step, i, j, p = k
        for n in range(inner_steps):
            t = t - RHO * D.g(i(n), w, t)
        w = w - gamma(step) * hypergradient(w, t, i, j(0), p)
        k = yield w, t


def ttsa(D: Hand) -> Any:
    return double_loop(D, 1, lambda w, t, i, j, p: random_series(D, w, t, i, j, p, first=1, terms=5))


def bsa(D: Hand) -> Any:
    return double_loop(D, 3, lambda w, t, i, j, p: random_series(D, w, t, i, j, p, first=3, terms=5))


def stocbio(D: Hand) -> Any:
    return double_loop(D, 3, lambda w, t, i, j, p: fixed_series(D, w, t, i, j, first=3, steps=4))


def amigo(D: Hand) -> Any:
    u = np.zeros(P)

    def hypergradient(w: np.ndarray, t: np.ndarray, i: Any, j: int, _: int) -> np.ndarray:
        nonlocal u
        for k in range(4):
            u = u - RHO_U * (D.H(i(3 + k), u) - D.f_t(j, w, t))
        return D.f_w(j, w, t) - D.cross(i(7), u)

    return double_loop(D, 3, hypergradient)


def g_w(D: Hand, i: Any, w: np.ndarray, t: np.ndarray) -> np.ndarray:
    return D.cross(i, t)  # G is linear in omega


def f2sa(D: Hand) -> Any:
    (w, z), k = START, (yield)
    y = z
    while True:
        step, i, j, _ = k
        lam = penalty(step)
        for n in range(2):
            z_new = z - RHO * D.g(i(2 * n), w, z)
            y = y - ALPHA * (D.f_t(j(n), w, y) + lam * D.g(i(2 * n + 1), w, y))
            z = z_new
        w = w - gamma(step) * (D.f_w(j(2), w, y) + lam * (g_w(D, i(4), w, y) - g_w(D, i(5), w, z)))
        k = yield w, z


def f3sa(D: Hand) -> Any:
    (w, z), k = START, (yield)
    y, h, old = z, [None] * 6, (w, z, z)

    def storm(n: int, step: int, new: np.ndarray, before: np.ndarray) -> np.ndarray:
        h[n] = new if step == 0 else new + (1 - ETA) * (h[n] - before)
        return h[n]

    while True:
        step, i, j, _ = k
        lam, (w_o, z_o, y_o) = penalty(step), old
        hz = storm(0, step, D.g(i(0), w, z), D.g(i(0), w_o, z_o))
        hfy = storm(1, step, D.f_t(j(0), w, y), D.f_t(j(0), w_o, y_o))
        hgy = storm(2, step, D.g(i(1), w, y), D.g(i(1), w_o, y_o))
        z_new, y_new = z - RHO * hz, y - ALPHA * (hfy + lam * hgy)
        hfx = storm(3, step, D.f_w(j(1), w, y_new), D.f_w(j(1), w_o, y))
        hgxy = storm(4, step, g_w(D, i(2), w, y_new), g_w(D, i(2), w_o, y))
        hgxz = storm(5, step, g_w(D, i(3), w, z_new), g_w(D, i(3), w_o, z))
        old = (w, z, y)
        w, z, y = w - gamma(step) * (hfx + lam * (hgxy - hgxz)), z_new, y_new
        k = yield w, z


def pbgd(D: Hand) -> Any:
    (w, z), k = START, (yield)
    y = z
    while True:
        step, i, j, _ = k
        lam = penalty(step)
        for n in range(3):
            z = z - RHO * D.g(i(n), w, z)
        d_w = D.f_w(j(0), w, y) + lam * (g_w(D, i(3), w, y) - g_w(D, i(3), w, z))
        y = y - ALPHA * (D.f_t(j(0), w, y) + lam * D.g(i(3), w, y))
        w = w - gamma(step) * d_w
        k = yield w, z


def pbgd_free(D: Hand) -> Any:
    (w, y), k = START, (yield)
    while True:
        step, i, j, _ = k
        for n in range(2):
            y = y - RHO * (D.g(i(n), w, y) + D.f_t(j(n), w, y) / penalty(step))
        w = w - gamma(step) * D.f_w(j(2), w, y)
        k = yield w, y


def bome(D: Hand) -> Any:
    (w, t), k = START, (yield)
    while True:
        step, i, j, _ = k
        s = t
        for n in range(3):
            s = s - RHO_U * D.g(i(n), w, s)
        q = np.concatenate([g_w(D, i(3), w, t) - g_w(D, i(3), w, s), D.g(i(3), w, t)])
        F = np.concatenate([D.f_w(j(0), w, t), D.f_t(j(0), w, t)])
        lam = max((0.7 * q @ q - F @ q) / (q @ q), 0.0)
        d = F + lam * q
        w, t = w - gamma(step) * d[:Q], t - RHO * d[Q:]
        k = yield w, t


def meha(D: Hand) -> Any:
    (w, t), k = START, (yield)
    y = t
    while True:
        step, i, j, _ = k
        c = penalty(step)
        y = y - ALPHA * (D.g(i(0), w, y) + (y - t) / 1.3)
        w = w - gamma(step) * (D.f_w(j(0), w, t) / c + g_w(D, i(1), w, t) - g_w(D, i(1), w, y))
        t = t - RHO * (D.f_t(j(1), w, t) / c + D.g(i(2), w, t) - (t - y) / 1.3)
        k = yield w, t


# Two constraints on the inner solution, of which the first binds: g = T theta + S omega - e.
T, S, E = np.array([[1.0, -1.0, 0.5], [0.2, 0.4, -0.3]]), np.array([[0.3, 0.1], [-0.2, 0.4]]), np.array([0.1, 2.0])


def constraint(omega: jax.Array, theta: Any) -> jax.Array:
    dtype = omega.dtype
    return jnp.asarray(T, dtype) @ flat(theta) + jnp.asarray(S, dtype) @ omega - jnp.asarray(E, dtype)


def gaffa(D: Hand) -> Any:
    (w, t), k = START, (yield)
    y, z, g = t, np.zeros(2), lambda w, t: T @ t + S @ w - E
    while True:
        step, i, j, _ = k
        c = penalty(step)
        y = y - ALPHA * (D.g(i(0), w, y) + T.T @ z + (y - t) / 1.3)
        lam = np.maximum(z + 0.8 * g(w, t), 0.0)
        d_w = D.f_w(j(0), w, t) / c + g_w(D, i(1), w, t) + S.T @ lam - g_w(D, i(1), w, y) - S.T @ z
        d_t = D.f_t(j(0), w, t) / c + D.g(i(1), w, t) + T.T @ lam - (t - y) / 1.3
        d_z = -(z - lam) / 0.8 - g(w, y)
        w, t, z = w - gamma(step) * d_w, t - RHO * d_t, np.clip(z - 0.1 * d_z, 0.0, 0.5)
        k = yield w, t


GAP: dict[str, Any] = SIZES | {"proximal_optimizer": ALPHA, "penalty": penalty, "proximal_weight": 1.3}
GAP |= {"constraint": constraint, "multiplier_step_size": 0.1, "multiplier_weight": 0.8, "multiplier_bound": 0.5}


class Row(NamedTuple):
    """A method's settings, its published update, and its draws per step of the inner and the outer samples."""

    settings: dict[str, Any]
    by_hand: Callable[[Hand], Any]
    draws: tuple[int, int]


METHODS: dict[str, Row] = {
    "soba": Row(LINEAR, soba, (1, 1)),
    "ma_soba": Row(LINEAR | {"momentum": ETA}, ma_soba, (1, 1)),
    "saba": Row(LINEAR, saba, (1, 1)),
    "srba": Row(LINEAR | {"period": PERIOD, "radius": RADIUS}, srba, (1, 1)),
    "fsla": Row(LINEAR | {"momentum": ETA}, fsla, (3, 2)),
    "sustain": Row(SERIES | MOMENTA | {"neumann_terms": 5}, sustain, (6, 1)),
    "mrbo": Row(SERIES | MOMENTA | {"neumann_steps": 4}, mrbo, (6, 1)),
    "vrbo": Row(SERIES | {"inner_steps": 3, "period": PERIOD, "neumann_steps": 4}, vrbo, (18, 3)),
    "ttsa": Row(SERIES | {"neumann_terms": 5}, ttsa, (6, 1)),
    "bsa": Row(SERIES | {"inner_steps": 3, "neumann_terms": 5}, bsa, (8, 1)),
    "stocbio": Row(SERIES | {"inner_steps": 3, "neumann_steps": 4}, stocbio, (8, 1)),
    "amigo": Row(LINEAR | {"inner_steps": 3, "linear_steps": 4}, amigo, (8, 1)),
    "f2sa": Row(PENALTY | {"inner_steps": 2}, f2sa, (6, 3)),
    "f3sa": Row(PENALTY | {"momentum": ETA}, f3sa, (4, 2)),
    "pbgd": Row(PENALTY | {"inner_steps": 3}, pbgd, (4, 1)),
    "pbgd_free": Row(SIZES | {"penalty": penalty, "inner_steps": 2}, pbgd_free, (2, 3)),
    "bome": Row(SIZES | {"solution_optimizer": RHO_U, "solution_steps": 3, "barrier": 0.7}, bome, (4, 1)),
    "meha": Row(SIZES | {"proximal_optimizer": ALPHA, "penalty": penalty, "proximal_weight": 1.3}, meha, (3, 2)),
    "gaffa": Row(GAP, gaffa, (2, 1)),
}


def build(method: str, problem: fb.ParametricProblem = PROBLEM) -> fb.BilevelSolver:
    return getattr(fb, method)(problem, **METHODS[method].settings)


@pytest.mark.parametrize("method", METHODS)
def test_iterates_are_those_of_the_published_update(x64, method):
    row = METHODS[method]
    solver = build(method)

    @jax.jit
    def run(inner: fb.FiniteSum, outer: fb.FiniteSum) -> Any:
        def step(state: Any, _: None) -> Any:
            state, metrics = solver.step(state, inner, outer)
            return state, (state.outer_params, flat(state.inner_params), metrics)

        start = solver.init(jax.random.key(1), OMEGA, inner, THETA, outer)
        state, trace = jax.lax.scan(step, start, None, length=STEPS)
        drawn = [
            jax.lax.map(source.index, jnp.arange(STEPS * n)).reshape(STEPS, n)
            for source, n in zip((inner, outer), row.draws, strict=True)
        ]
        return state.step, trace, drawn

    taken, (omegas, thetas, metrics), drawn = jax.device_get(run(*sources(replace=False)))
    lengths = metrics.get("neumann_length", np.zeros(STEPS, int))
    by_hand = row.by_hand(Hand(*terms()))
    next(by_hand)
    for t in range(STEPS):
        omega, theta = by_hand.send((t, lambda k, t=t: drawn[0][t, k], lambda k, t=t: drawn[1][t, k], int(lengths[t])))
        np.testing.assert_allclose(omegas[t], omega, rtol=0, atol=1e-10)
        np.testing.assert_allclose(thetas[t], theta, rtol=0, atol=1e-10)
    assert np.linalg.norm(omegas[-1] - OMEGA) > 0.1  # it went somewhere
    assert taken == STEPS
    for level in ("inner", "adjoint", "outer"):
        assert np.all(metrics[f"{level}_finite"])
    if "neumann_length" in metrics:
        assert set(lengths) == {0, 1, 2, 3, 4}


# The other promises.


def once(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """f, with a derivative that has none: what makes a second derivative fails when it is traced."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("a second derivative was taken")

    @jax.custom_vjp
    def gradient(*args: Any) -> Any:
        return jax.grad(f, argnums=(0, 1))(*args)

    gradient.defvjp(lambda *args: (gradient(*args), args), refuse)
    value = jax.custom_vjp(f)

    def backward(args: Any, t: jax.Array) -> Any:
        return (*jax.tree.map(lambda x: t * x, gradient(*args)), jax.tree.map(jnp.zeros_like, args[2]))

    value.defvjp(lambda *args: (f(*args), args), backward)
    return value


@pytest.mark.parametrize("method", ["soba", *FIRST_ORDER])
def test_first_order_methods_take_no_second_derivative(method):
    solver = build(method, fb.ParametricProblem(once(inner_objective), once(outer_objective)))
    inner, outer = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), terms())
    theta = jax.tree.map(jnp.float32, THETA)
    state = jax.eval_shape(lambda: solver.init(jax.random.key(0), jnp.float32(OMEGA), inner, theta, outer))
    trace = lambda: jax.make_jaxpr(solver.step)(state, inner, outer)
    if method in FIRST_ORDER:
        trace()
    else:
        with pytest.raises(Exception, match=r"second derivative|forward-mode"):
            trace()


# Draws.


def test_shuffled_epochs_and_draws_with_replacement():
    source = fb.finite_sum((jnp.arange(12.0), jnp.arange(24).reshape(12, 2)), 3, key=jax.random.key(5))
    order = np.asarray(jax.lax.map(source.index, jnp.arange(12))).reshape(3, 4)
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in order)
    assert len({tuple(epoch) for epoch in order}) > 1
    np.testing.assert_array_equal(source.block(1)[0], [3.0, 4.0, 5.0])
    np.testing.assert_array_equal(source.mean(lambda b: jnp.sum(b[0])), 66.0 / 4)
    drawn = jax.lax.map(fb.finite_sum(jnp.arange(12), 3, replace=True).index, jnp.arange(400))
    assert np.all(np.bincount(drawn, minlength=4) > 60)
    assert sorted(np.asarray(drawn[:4])) != [0, 1, 2, 3] or sorted(np.asarray(drawn[4:8])) != [0, 1, 2, 3]
    with pytest.raises(ValueError, match="batch_size must divide the number of samples, got batch_size=5 for 12"):
        fb.finite_sum(jnp.arange(12), 5)


def test_every_kind_of_source_serves_every_draw():
    """AmIGO's eight inner draws: fresh ones from a sampler, those of a stack in their order, one batch for all."""
    solver = build("amigo")
    inner, outer = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), terms())
    theta = jax.tree.map(jnp.float32, THETA)
    sample = lambda data, key: jax.tree.map(lambda x: x[jax.random.randint(key, (2,), 0, len(x))], data)
    stacked = jax.tree.map(lambda x: jnp.stack([x[:2]] * 8), inner)
    whole = jax.tree.map(lambda x: x[:2], inner)
    ends = {}
    for name, source in {
        "sampler": fb.Sampler(jax.tree_util.Partial(sample, inner)),
        "stack": fb.Minibatches(stacked),
        "batch": whole,
        "sum": fb.finite_sum(whole, 2),
    }.items():
        state = solver.init(jax.random.key(0), jnp.float32(OMEGA), source, theta)
        ends[name] = np.asarray(jax.jit(solver.step)(state, source, outer)[0].outer_params)
    np.testing.assert_array_equal(ends["stack"], ends["batch"])  # a stack of one batch is that batch
    np.testing.assert_array_equal(ends["sum"], ends["batch"])  # so is a sum of one block
    assert np.any(ends["sampler"] != ends["batch"])
    with pytest.raises(ValueError, match=r"inner_batch is fb.Minibatches of 3 batches, expected 8, as many as"):
        solver.step(state, fb.Minibatches(jax.tree.map(lambda x: x[:3], stacked)), outer)


def test_bilevel_draws_from_finite_sums(x64):
    """Each inner step and the hypergradient see the blocks whose indices the sum tells."""
    inner, outer = sources(replace=False)
    make = lambda: fb.bilevel(
        *(PROBLEM, None, fb.aid(fb.cg(P))),
        inner_optimizer=optax.sgd(RHO),
        outer_optimizer=optax.sgd(0.1),
        inner_steps=2,
    )

    @jax.jit
    def run(inner: fb.FiniteSum, outer: fb.FiniteSum) -> Any:
        solver = make()
        state = solver.init(jax.random.key(0), OMEGA, inner, THETA)
        return solver.run(state, inner, outer, 4)[0], jax.lax.map(inner.index, jnp.arange(12)), outer.index(3)

    state, i, j = run(inner, outer)
    D, (w, t) = Hand(*terms()), START
    drawn = np.asarray(jax.lax.map(outer.index, jnp.arange(4)))
    for step in range(4):
        for n in range(2):
            t = t - RHO * D.g(int(i[3 * step + n]), w, t)
        a, b = int(i[3 * step + 2]), int(drawn[step])
        u = np.linalg.solve(D.of("inner", "A", a), D.f_t(b, w, t))
        w = w - 0.1 * (D.f_w(b, w, t) - D.cross(a, u))
    np.testing.assert_allclose(state.outer_params, w, atol=1e-9)
    assert drawn[3] == j


@pytest.mark.parametrize("num_steps", [5, 10, 30])
def test_aid_stays_bounded_on_batches_of_fewer_samples_than_parameters(num_steps):
    """Rank-one Hessians, twelve of them for twenty parameters: no batch has a solution of the linear system."""
    rng = np.random.default_rng(0)
    n, d = 96, 20
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    data = {"x": draw(n, d) * jnp.logspace(-0.5, 0.0, d)[None], "a": draw(n, d), "y": draw(n, d)}
    cross = 0.05 * draw(d, d)

    def inner(w: jax.Array, t: jax.Array, b: Any) -> jax.Array:
        return jnp.mean(0.5 * (b["x"] @ t) ** 2 + b["a"] @ t) + w @ cross @ t

    def outer(w: jax.Array, t: jax.Array, b: Any) -> jax.Array:
        return jnp.mean(0.5 * (b["x"] @ t) ** 2 + b["y"] @ t) + 0.5 * w @ w

    solver = fb.bilevel(
        *(fb.ParametricProblem(inner, outer), None, fb.aid(fb.cg(num_steps))),
        inner_optimizer=optax.sgd(0.1),
        outer_optimizer=optax.sgd(0.05),
        inner_steps=5,
    )
    source = fb.finite_sum(data, 12)
    state = solver.init(jax.random.key(0), jnp.ones(d), source, jnp.zeros(d))
    state, metrics = jax.jit(solver.run, static_argnums=3)(state, source, source, 200)
    assert float(jnp.max(jnp.abs(state.outer_params))) < 10.0
    assert float(jnp.max(metrics["linear_residual"])) <= 1.0 + 1e-5
    assert not np.any(metrics["linear_converged"])  # and it says so


@pytest.mark.parametrize("level", ["inner", "outer"])
@pytest.mark.parametrize("method", ["soba", "saba"])
def test_numbers_that_are_not_finite_stop_at_their_level(method, level):
    """In one step: NaN in a level's samples is flagged there, and omega and the memory stay."""
    solver = build(method)
    inner, outer = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), terms())
    theta = jax.tree.map(jnp.float32, THETA)
    bad = {"inner": (inner | {"a": inner["a"] * jnp.nan}, outer), "outer": (inner, outer | {"p": outer["p"] * jnp.nan})}
    if method == "saba":
        inner, outer = fb.finite_sum(inner, 2), fb.finite_sum(outer, 2)
        bad = {k: tuple(fb.finite_sum(x, 2) for x in pair) for k, pair in bad.items()}
    state = solver.init(jax.random.key(0), jnp.float32(OMEGA), inner, theta, outer)
    after, metrics = jax.jit(solver.step)(state, *bad[level])
    assert not bool(metrics[f"{level}_finite"])
    assert bool(metrics["adjoint_finite"])
    assert level == "inner" or bool(metrics["inner_finite"])
    np.testing.assert_array_equal(after.outer_params, state.outer_params)
    assert np.all(np.isfinite(flat(after.inner_params)))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after.estimator_state))


@pytest.mark.parametrize("method", ["soba", "mrbo", "f2sa"])
def test_devices_with_parts_of_the_batches_take_the_step_of_the_whole(x64, method):
    whole = tuple(jax.tree.map(lambda x: jnp.asarray(x[:6]), t) for t in terms())
    parts = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), whole)
    mapped = build(method, dataclasses.replace(PROBLEM, axis_name="devices"))

    @jax.jit
    def both() -> Any:
        alone = build(method)
        start = alone.init(jax.random.key(0), OMEGA, whole[0], THETA)
        step = jax.vmap(mapped.step, in_axes=(None, 0, 0), axis_name="devices")
        return alone.step(start, *whole), step(start, *parts)

    (state, metrics), (states, each) = both()
    for device in range(2):
        got = (states.outer_params[device], jax.tree.map(lambda x, d=device: x[d], states.inner_params))
        np.testing.assert_allclose(flat(got[1]), flat(state.inner_params), rtol=1e-12)
        np.testing.assert_allclose(got[0], state.outer_params, rtol=1e-12)
        for metric in metrics:
            np.testing.assert_allclose(each[metric][device], metrics[metric], rtol=1e-10)


def test_optimizers_schedules_seeds_and_train():
    """Optax at every level, one trace, several seeds at once, and `train` on sources."""
    solver = fb.soba(
        PROBLEM, inner_optimizer=optax.adam(0.05), linear_optimizer=optax.sgd(0.1), outer_optimizer=optax.adam(0.05)
    )
    data = [fb.finite_sum(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t), 2) for t in terms()]
    theta = jax.tree.map(jnp.float32, THETA)
    start = lambda key: solver.init(key, jnp.float32(OMEGA), data[0], theta)
    pair = jax.tree_util.Partial(lambda sources, key, step: sources, tuple(data))
    state, metrics = fb.train(solver, start(jax.random.key(0)), pair, 30, chunk=10, progress=False)
    by_run, _ = jax.jit(solver.run, static_argnums=3)(start(jax.random.key(0)), *data, 30)
    np.testing.assert_allclose(state.outer_params, by_run.outer_params, rtol=1e-5)
    assert metrics["linear_residual"].shape == (30,)
    states = jax.vmap(start)(jax.random.split(jax.random.key(0), 2))
    seeds = fb.finite_sum(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), terms()[0]), 2)
    seeds = dataclasses.replace(seeds, key=jax.random.split(jax.random.key(1), 2))
    axes = dataclasses.replace(seeds, data=None, key=0, first=None)
    after, _ = jax.vmap(solver.step, in_axes=(0, axes, None))(states, seeds, data[1])
    assert after.outer_params.shape == (2, Q)


def test_bad_input():
    whole = {"inner_optimizer": 0.1, "linear_optimizer": 0.1, "outer_optimizer": 0.1}
    model = fb.from_function(lambda key, x: jnp.ones(1), lambda theta, x: x * theta)
    functional = fb.FunctionalProblem(lambda w, v, b: jnp.mean(v**2), lambda w, v, b: jnp.mean(v**2))
    with pytest.raises(TypeError, match=r"must be an fb.ParametricProblem, got a FunctionalProblem; make one of it"):
        fb.soba(functional, **whole)
    assert isinstance(fb.soba(fb.parametrize(functional, model), **whole), fb.BilevelSolver)
    with pytest.raises(ValueError, match=r"inner_optimizer must be a finite number > 0, got -1"):
        fb.soba(PROBLEM, **whole | {"inner_optimizer": -1.0})
    with pytest.raises(TypeError, match=r"inner_optimizer must be a number > 0, got 'adam'"):
        fb.soba(PROBLEM, **whole | {"inner_optimizer": "adam"})
    inner, outer = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), terms())
    theta = jax.tree.map(jnp.float32, THETA)
    saba = fb.saba(PROBLEM, **whole)
    with pytest.raises(TypeError, match=r"init: inner_batch must be an fb.FiniteSum, because fb.saba"):
        saba.init(jax.random.key(0), jnp.float32(OMEGA), inner, theta, outer)
    with pytest.raises(TypeError, match=r"init: outer_batch must be an fb.FiniteSum, .* and pass both at init"):
        saba.init(jax.random.key(0), jnp.float32(OMEGA), fb.finite_sum(inner, 2), theta)
    soba = fb.soba(PROBLEM, **whole)
    with pytest.raises(ValueError, match=r"init: inner_params is None"):
        soba.init(jax.random.key(0), jnp.float32(OMEGA), inner)
    source = fb.finite_sum(inner, 2)
    state = soba.init(jax.random.key(0), jnp.float32(OMEGA), source, theta)
    with pytest.raises(ValueError, match=r"run: num_steps is None, but the sources give samples"):
        soba.run(state, source, fb.finite_sum(outer, 2))
    assert "soba(" in repr(soba)


def test_the_table_of_methods_has_a_row_for_each():
    table = fb.methods()
    rows = {row.name: row for row in table.rows}
    assert set(METHODS) == {name for name, row in rows.items() if row.kind == "solver"}
    assert {name for name, row in rows.items() if row.kind == "solver" and row.order == "first"} == set(FIRST_ORDER)
    assert rows["soba"].memory == "one vector like theta"
    assert rows["amigo"].draws.endswith("outer 0")
    assert all(rows[name].draws for name in METHODS)
    assert len(str(table).splitlines()) == len(table.rows) + 2
    assert "| `saba` | solver | second |" in str(table)
