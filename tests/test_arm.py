"""The two-link arm: its dynamics against the Lagrangian, references, costs, methods, fronts, and commands."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import solve_ivp

import funcbilevel as fb
from funcbilevel import cli
from funcbilevel.tasks._experiment import select, store
from funcbilevel.tasks._experiment.store import Store
from funcbilevel.tasks.arm import methods, report, train
from funcbilevel.tasks.arm import problem as arm
from funcbilevel.tasks.arm.methods import METHODS, Hyper, Setting
from funcbilevel.tasks.arm.problem import Arm

RESULTS = Path(__file__).parents[1] / "benchmarks/results/arm"
SMALL = Setting(width=3, inner_steps=1)  # the commands' too: three cells of it are compiled once for all
LOADED = Arm(lengths=(0.4, 0.6), masses=(1.5, 0.7), payload=0.8, friction=0.3, gravity=9.81)


# The arm.


def lagrangian(of, q, dq):
    """Kinetic less potential energy, from the velocities of points on the rods: three Gauss points are exact."""
    nodes, weights = np.polynomial.legendre.leggauss(3)

    def point(q, upper, fore):
        directions = [jnp.array([jnp.cos(a), jnp.sin(a)]) for a in (q[0], q[0] + q[1])]
        return upper * of.lengths[0] * directions[0] + fore * of.lengths[1] * directions[1]

    masses = [(w / 2 * of.masses[0], ((x + 1) / 2, 0.0)) for x, w in zip(nodes, weights)]
    masses += [(w / 2 * of.masses[1], (1.0, (x + 1) / 2)) for x, w in zip(nodes, weights)]
    masses += [(of.payload, (1.0, 1.0))]
    total = 0.0
    for m, where in masses:
        p, v = jax.jvp(lambda q, where=where: point(q, *where), (q,), (dq,))
        total += m * (0.5 * v @ v - of.gravity * p[1])
    return total


def states(n=5):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(n, 3, 2)) * np.array([2.0, 3.0, 4.0])[:, None])


def test_dynamics_are_those_of_the_lagrangian(x64):
    @jax.jit
    @jax.vmap
    def both(state):
        q, dq, torque = state
        d_q = jax.grad(lagrangian, 1)(LOADED, q, dq)
        d_dq_q, d_dq_dq = jax.jacfwd(jax.grad(lagrangian, 2), (1, 2))(LOADED, q, dq)
        expected = jnp.linalg.solve(d_dq_dq, torque - LOADED.friction * dq + d_q - d_dq_q @ dq)
        d_potential = -jax.grad(lagrangian, 1)(LOADED, q, jnp.zeros(2))
        ours = arm.acceleration(LOADED, q, dq, torque), arm.mass_matrix(LOADED, q), arm.gravity(LOADED, q)
        return ours, (expected, d_dq_dq, d_potential)

    for got, expected in zip(*both(states()), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9)


def energies(of, dt, torque=lambda q: jnp.zeros(2)):
    """Total energy along one second of free motion."""

    def step(state, _):
        state = arm.advance(of, *state, torque(state[0]), dt)
        q, dq = state
        return state, 0.5 * dq @ arm.mass_matrix(of, q) @ dq - lagrangian(of, q, jnp.zeros(2))

    return jax.lax.scan(step, (jnp.array([0.3, 0.8]), jnp.array([1.0, -2.0])), length=round(1 / dt))[1]


def test_energy_is_conserved_without_torque_and_friction(x64):
    free = LOADED._replace(friction=0.0)
    drift = {dt: float(np.ptp(energies(free, dt))) for dt in (2e-3, 1e-3, 1e-4)}
    assert drift[1e-4] < 0.05  # J, where friction takes 8
    # A method of order one.
    assert drift[2e-3] / drift[1e-3] == pytest.approx(2.0, rel=0.1)
    assert drift[1e-3] / drift[1e-4] == pytest.approx(10.0, rel=0.2)
    lost = energies(LOADED, 1e-4)
    assert lost[-1] < lost[0] - 5.0  # friction
    # The torque that `gravity` says holds the arm at rest.
    q = jnp.array([0.3, 0.8])
    np.testing.assert_allclose(arm.acceleration(LOADED, q, jnp.zeros(2), arm.gravity(LOADED, q)), 0.0, atol=1e-12)


def test_steps_converge_to_the_solution_by_scipy(x64):
    torque = jnp.array([2.0, -1.0])
    slope = jax.jit(lambda t, y: jnp.concatenate([y[2:], arm.acceleration(LOADED, y[:2], y[2:], torque)]))

    exact = solve_ivp(slope, (0.0, 0.1), [0.3, 0.8, 1.0, -2.0], rtol=1e-8, atol=1e-10).y[:, -1]

    def error(n):
        step = lambda state, _: (arm.advance(LOADED, *state, torque, 0.1 / n), None)
        state, _ = jax.lax.scan(step, (jnp.array([0.3, 0.8]), jnp.array([1.0, -2.0])), length=n)
        return np.max(np.abs(np.concatenate(state) - exact))

    assert error(4000) < 1e-3
    assert error(1000) / error(4000) == pytest.approx(4.0, rel=0.05)


def test_kinematics(x64):
    q = states()[:, 0]
    expected = jax.vmap(jax.jacfwd(lambda q: arm.end_point(LOADED, q)))(q)
    np.testing.assert_allclose(jax.vmap(lambda q: arm.jacobian(LOADED, q))(q), expected, atol=1e-12)
    q = jnp.array([[0.3, 0.8], [-1.0, 2.5], [2.0, 0.1]])
    round_trip = jax.vmap(lambda q: arm.inverse_kinematics(LOADED, arm.end_point(LOADED, q)))
    np.testing.assert_allclose(round_trip(q), q, rtol=1e-9)


# What is to be done.


def test_references_run_from_rest_to_rest_within_reach(x64):
    episodes = arm.draw_episodes(jax.random.key(0), 200)
    episodes = jax.tree.map(np.asarray, episodes)
    assert episodes.position.shape == (200, arm.STEPS + 1, 2)
    np.testing.assert_array_equal(episodes.velocity[:, [0, -1]], 0.0)
    # The velocity is the position's derivative: the mean of two neighbours is nearly the difference.
    moved = np.diff(episodes.position, axis=1) / arm.DT
    mean = 0.5 * (episodes.velocity[:, 1:] + episodes.velocity[:, :-1])
    assert np.max(np.abs(moved - mean)) < 0.03 * np.max(np.abs(mean))
    r = np.linalg.norm(episodes.position, axis=-1)
    assert r.min() > 0.2
    assert r.max() < 0.95
    closed = np.linalg.norm(episodes.position[:, -1] - episodes.position[:, 0], axis=-1) < 1e-9
    assert 70 < closed.sum() < 130  # ellipses
    straight = episodes.position[~closed][0]
    along, across = straight[-1] - straight[0], straight - straight[0]
    np.testing.assert_allclose(along[0] * across[:, 1] - along[1] * across[:, 0], 0.0, atol=1e-12)
    test, validation = (np.asarray(arm.held_out(of).position[:, 0]) for of in (arm.TEST, arm.VALIDATION))
    assert np.min(np.linalg.norm(test[:, None] - validation, axis=-1)) > 0.0


def players(width=3, key=0):
    return methods.init_players(jax.random.key(key), "aid-cg", replace(SMALL, width=width))


def test_costs_by_hand(x64):
    """The same episodes by plain loops over episodes and steps."""
    omega, theta = players()
    theta = {name: 5.0 * value for name, value in theta.items()}
    episodes, heavy = arm.draw_episodes(jax.random.key(3), 12), Arm(payload=0.5)
    sums = np.zeros(4)
    jacobian, end_point = (jax.jit(lambda q, f=f: f(heavy, q)) for f in (arm.jacobian, arm.end_point))
    acceleration = jax.jit(lambda *args: arm.acceleration(heavy, *args))

    def net(params, x):
        return 3.0 * (np.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"])

    for p, v in zip(np.asarray(episodes.position), np.asarray(episodes.velocity)):
        q, dq = np.asarray(arm.inverse_kinematics(heavy, p[0])), np.zeros(2)
        for t in range(arm.STEPS):
            J = np.asarray(jacobian(q))
            error = p[t + 1] - np.asarray(end_point(q))
            d_error = v[t + 1] - J @ dq
            later = v[min(t + 5, arm.STEPS)]
            x = np.concatenate([10 * error, d_error, np.cos(q), np.sin(q), dq / 5, v[t + 1], later])
            torque = J.T @ (60 * error + 6 * d_error) + net(omega["network"], x) + net(theta, x)
            dq = dq + arm.DT * np.asarray(acceleration(q, dq, torque))
            q = q + arm.DT * dq
            end = np.asarray(end_point(q))
            sums += (
                100 * np.sum((end - p[t + 1]) ** 2),
                np.sum(torque**2) / 9,
                100 * max(end[0] - 0.7, 0) ** 2,
                end[0] <= 0.7,
            )
    of = arm.problem(2.0, payload=0.5)

    @jax.jit
    def everything(theta):
        got, objectives = arm.costs(heavy, omega, theta, episodes), (of.outer_objective, of.inner_objective)
        off = [arm.costs(heavy, omega, t, episodes) for t in (None, jax.tree.map(jnp.zeros_like, theta))]
        return got, [f(omega, theta, episodes) for f in objectives], off

    got, (outer, inner), off = everything(theta)
    np.testing.assert_allclose(got, sums / (12 * arm.STEPS), rtol=1e-7)
    assert 0 < got.inside < 1
    assert outer == pytest.approx(float(got.tracking))
    assert inner == pytest.approx(float(got.tracking + 2 * got.energy + 2 * got.intrusion))
    np.testing.assert_allclose(*off, rtol=1e-12)  # a follower that is off is one whose torque is zero


def test_gradient_of_a_rollout_by_differences(x64):
    omega, theta = players()
    episodes = arm.draw_episodes(jax.random.key(3), 2)
    flat, unflatten = jax.flatten_util.ravel_pytree((omega, theta))
    direction = jnp.asarray(np.random.default_rng(0).normal(size=flat.shape))
    value = jax.jit(lambda t: arm.weighted(arm.costs(Arm(), *unflatten(flat + t * direction), episodes), 1.0))
    assert jax.jit(jax.grad(value))(0.0) == pytest.approx(float(value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-6)


# Methods.


def test_one_network_has_as_many_weights_as_two():
    trees = [
        jax.eval_shape(lambda key, m=m: methods.init_players(key, m, Setting()), jax.random.key(0)) for m in METHODS
    ]
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in trees]
    assert sizes[0] - sizes[1] == 2  # the biases of one output layer
    assert set(sizes) == {sizes[0], sizes[1]}
    counted = {m: methods.num_steps(m, SMALL, 120) for m in METHODS}
    assert counted == {"lagrangian": 120, "leader-only": 120, "alternating": 60, "aid-cg": 60, "itd": 60}


def norm_of_difference(a, b):
    return max(float(np.max(np.abs(x - y))) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def at(outcome, i):
    return {name: float(values[i]) for name, values in outcome.metrics.items()}


def test_a_sweep_is_the_runs_by_themselves_and_rate_zero_keeps_a_player():
    hypers = [Hyper(0.1, 0.01, 0.02), Hyper(3.0, 0.02, 0.01, 1.0), Hyper(3.0, 0.02, 0.01)]
    together = train.sweep("lagrangian", SMALL, hypers, [3], 7, chunk=3)
    other = train.sweep("lagrangian", SMALL, [hypers[1]], [3, 4, 5], 7, chunk=7)  # beside other seeds, in one chunk
    assert at(other, 0) == pytest.approx(at(together, 1), rel=1e-3)
    assert len({*together.metrics["energy"].tolist(), *other.metrics["energy"][1:].tolist()}) == 5
    names = arm.Costs._fields
    assert set(together.metrics) == {*names, *(f"validation_{name}" for name in names), "alone"}
    # From where it stopped: a player with rate 0 stays.
    rates = [Hyper(0.1, 0.0, 0.02), Hyper(0.1, 0.0, 0.0), Hyper(0.1, 0.02, 0.0)]
    again = train.sweep("lagrangian", SMALL, rates, [3], 7, start=together.players)
    for player, i, moved in [(0, 0, False), (1, 0, True), (0, 1, False), (1, 1, False), (0, 2, True), (1, 2, False)]:
        pair = jax.tree.map(lambda x: x[i], (again.players[player], together.players[player]))
        assert (norm_of_difference(*pair) > 1e-3) == moved
    assert train.program("lagrangian", SMALL).advance._cache_size() == 1


def test_the_weighted_reward_learns():
    hypers = [Hyper(0.1, 0.02, 0.02), Hyper(0.1, 0.0, 0.0), Hyper(0.1, 0.01, 0.01)]
    m = train.sweep("lagrangian", SMALL, hypers, [0], 80).metrics
    costs = m["tracking"] + 0.1 * (m["energy"] + m["intrusion"])
    assert costs[0] < costs[2] < costs[1]
    assert costs[0] < 0.7 * costs[1]


def test_leader_only_traces():
    """Shapes and structures only; its training is the weighted reward's."""
    method = "leader-only"
    compiled, key = train.program(method, SMALL), jax.random.key(0)
    cell = jax.tree.map(lambda x: jnp.array([x]), (Hyper(), methods.init_players(key, method, SMALL)))
    state = jax.eval_shape(compiled.init, key[None], cell[1], cell[0], 4)
    after, metrics = jax.eval_shape(compiled.advance, state, cell[0], key[None], 4, 2)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert {"outer_objective", "inner_objective"} <= metrics.keys()
    assert state.inner_params is None


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("dfiv", SMALL, "method must be one of lagrangian, leader-only.*got 'dfiv'"),
        ("itd", replace(SMALL, width=0), "width must be at least 1, got 0"),
    ],
)
def test_bad_setting(method, setting, message):
    with pytest.raises(ValueError, match=message):
        train.program(method, setting)


# Fronts.


def test_energy_at_equal_tracking():
    front = lambda scale, xs: np.array([(x, scale / x) for x in xs])
    ratio = report.energy_ratio(front(0.8, [0.1, 0.5, 2.0]), front(1.0, [0.3, 1.0, 3.0]))
    assert ratio == pytest.approx(0.8)  # energy 1/x is a straight line in the logarithms
    assert np.isnan(report.energy_ratio(front(1.0, [0.1, 0.2]), front(1.0, [0.3, 1.0])))
    assert np.isnan(report.energy_ratio(front(1.0, [0.1]), front(1.0, [0.1, 1.0])))
    # A ratio of 1 at the left and of 4 at the right end, geometrically between: 2 in the mean.
    assert report.energy_ratio(np.array([[0.1, 1.0], [1.0, 0.4]]), front(0.1, [0.1, 1.0])) == pytest.approx(2.0)


def test_fronts_are_selected_on_validation():
    def cell(t, e, vt, ve):
        return {"tracking": t, "energy": e, "validation_tracking": vt, "validation_energy": ve}

    good, best_on_test, other = cell(1.0, 2.0, 1.0, 2.0), cell(0.1, 0.1, 3.0, 3.0), cell(0.5, 4.0, 0.5, 4.0)
    assert report.selected([good, best_on_test, cell(*4 * [np.nan]), other]) == [other, good]
    assert report.selected([cell(*4 * [np.nan])]) == []
    assert report.at_tracking([other, good], "energy", np.sqrt(0.5)) == pytest.approx(3.0)
    assert np.isnan(report.at_tracking([other, good], "energy", 2.0))
    assert np.isnan(report.at_tracking([], "energy", 2.0))


# Commands, on a stub of the training.


FEW = ["--updates", "8", "--inner-steps", "1", "--width", "3"]


@pytest.fixture
def swept(monkeypatch):
    """Numbers drawn by method, hyper-parameters and seed instead of training; the list of what was asked for."""
    asked = []

    def metrics(*run):
        hyper, draw = run[1], np.random.default_rng(list(str(run).encode())).uniform(0.8, 1.2, 9)
        names = arm.Costs._fields
        values = dict(zip([*names, *(f"validation_{name}" for name in names), "alone"], draw, strict=True))
        for prefix in ("", "validation_"):
            values[f"{prefix}tracking"] *= 0.1 * hyper.weight**0.5  # a front, from 0.02 to 0.3
            values[f"{prefix}energy"] /= values[f"{prefix}tracking"]
        return values

    def sweep(method, setting, cells, seeds, updates, *, start=None, callback=None):
        asked.append((method, len(cells), tuple(seeds), updates, start))
        runs = [metrics(method, hyper, seed, updates) for seed in seeds for hyper in cells]
        callback(None, {"outer_objective": np.ones(methods.num_steps(method, setting, updates))})
        players = np.array([[seed, cells.index(hyper)] for seed in seeds for hyper in cells], float)
        return train.Sweep({name: np.array([run[name] for run in runs]) for name in runs[0]}, (players, None), 2.0)

    monkeypatch.setattr(train, "sweep", sweep)
    monkeypatch.setattr(train, "paths", lambda players: np.zeros((len(players[0]), 4, 25, 2)) + 0.12345)
    return asked


def keys(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({store.key_of(line) for line in lines}) == len(lines)
    return {store.key_of(line): line.get("metrics", line.get("angles")) for line in lines}


def test_run_stub(tmp_path, capsys, swept):
    args = ["run", "arm", *FEW, "--output-dir", str(tmp_path)]
    cli.main([*args, "--seeds", "2"])
    output = capsys.readouterr()
    assert "aid-cg            4 outer steps, outer objective" in output.err
    names = ["arm.png", "config.json", "runs-paths.jsonl", "runs.jsonl", "table.md"]
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == names
    assert (tmp_path / "arm.png").stat().st_size > 20_000
    records = store.read(tmp_path / "runs.jsonl")
    assert [(r["method"], r["seed"]) for r in records] == [
        (m, s) for m in ("lagrangian", "aid-cg") for s in (0, 1) for _ in range(12)
    ]
    assert {r["settings"]["updates"] for r in records} == {8}
    assert {r["metrics"]["sweep_cells"] for r in records} == {24}
    assert {key.seed for key in store.beside(Store(tmp_path, "arm"), "paths")} == {0}
    assert len(keys(tmp_path / "runs-paths.jsonl")) == 24
    assert set(np.ravel([*keys(tmp_path / "runs-paths.jsonl").values()])) == {0.123}
    cli.main([*args, "--seeds", "2"])
    assert len(swept) == 2  # all were there


@pytest.mark.parametrize("cut", [5, 59])
def test_a_seed_is_done_only_when_all_of_its_settings_are(tmp_path, swept, cut):
    """Interrupted after some of the records, the next run makes those that are missing and no others."""
    args = ["compare", "arm", *FEW, "--methods", "lagrangian", "alternating", "aid-cg", "--seeds", "2", "--output-dir"]
    cli.main([*args, str(tmp_path / "whole")])
    cli.main([*args, str(tmp_path / "cut")])
    for name in ("runs.jsonl", "runs-paths.jsonl", "changes.jsonl"):
        path = tmp_path / "cut" / name
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:cut]))
    cli.main([*args, str(tmp_path / "cut")])
    for name, number in (("runs.jsonl", 72), ("runs-paths.jsonl", 36), ("changes.jsonl", 120)):
        whole, after = (keys(tmp_path / directory / name) for directory in ("whole", "cut"))
        assert len(whole) == number
        assert after.keys() == whole.keys()
        if name == "runs-paths.jsonl":
            continue
        numbers = [{key: m["tracking"] for key, m in of.items()} for of in (whole, after)]
        assert numbers[0] == numbers[1]
    first, second = ((tmp_path / directory / "table.md").read_text().splitlines() for directory in ("whole", "cut"))
    assert [line.split(" | ")[:-1] for line in first] == [line.split(" | ")[:-1] for line in second]  # but for seconds


def test_compare(tmp_path, swept):
    cli.main(
        ["compare", "arm", *FEW, "--methods", "lagrangian", "aid-cg", "--seeds", "2", "--output-dir", str(tmp_path)]
    )
    runs = store.read(tmp_path / "runs.jsonl")
    assert len(runs) == 2 * 2 * 12
    table, changes = (tmp_path / "table.md").read_text().split("\n\n")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[:4] for row in cells] == [[m, "2", "12", "0"] for m in ("lagrangian", "aid-cg")]

    # The ratio of the table, from the records.
    def front(method, seed):
        of = [r["metrics"] for r in runs if (r["method"], r["seed"]) == (method, seed)]
        return report.points(report.selected(of))

    ratios = [report.energy_ratio(front("aid-cg", seed), front("lagrangian", seed)) for seed in (0, 1)]
    assert cells[1][4].split(" ")[0] == f"{np.mean(ratios):.3f}"

    again = store.read(tmp_path / "changes.jsonl")
    assert len(again) == 2 * 2 * 3 * 2 * 5  # methods, changes, numbers of steps, seeds, ways
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in changes.splitlines()[2:]]
    ways = [[c, m, n] for m in ("lagrangian", "aid-cg") for c in ("payload", "weight") for n in ("25", "100", "400")]
    assert [row[:3] for row in rows] == ways

    def cost(record, prefix=""):
        m = record["metrics"]
        penalty = m[f"{prefix}energy"] + m[f"{prefix}intrusion"]
        return m[f"{prefix}tracking"] + record["settings"]["weight"] * penalty

    def mean(method, change, updates, leader, follower):
        """At the rates that are best on validation."""
        of_rates = {}
        for r in again:
            s = r["settings"]
            if (r["method"], s["change"], s["updates"]) == (method, change, int(updates)):
                assert s["payload"] == {"payload": 1.0, "weight": 0.0}[change]
                if (s["leader_rate"] > 0, s["follower_rate"] > 0) == (leader, follower):
                    of_rates.setdefault(s["follower_rate"], []).append((cost(r, "validation_"), cost(r)))
        return f"{min(np.mean(pairs, axis=0).tolist() for pairs in of_rates.values())[1]:.3f}"

    for change, method, updates, *costs, _ in rows:
        expected = [mean(method, change, updates, *way) for way in ((False, False), (False, True), (True, True))]
        assert costs == expected
    assert json.loads((tmp_path / "config.json").read_text())["updates"] == 8
    # The controllers that are trained again are those of the middle weight and the chosen rates, once per method, and
    # each way to go on starts from those of its own seed.
    assert [of[:4] for of in swept if of[1] == 1] == [(m, 1, (0, 1), 8) for m in ("lagrangian", "aid-cg")]
    starts = [of for of in swept if of[4] is not None]
    assert [of[:4] for of in starts] == 2 * 2 * [("lagrangian", 5, (0, 1), n) for n in (25, 100, 400)]
    for *_, start in starts:
        assert start[0][:, 0].tolist() == 5 * [0] + 5 * [1]


def test_unknown_methods_and_records_without_paths_are_shown(tmp_path, swept):
    cli.main(["run", "arm", *FEW, "--output-dir", str(tmp_path)])
    lines = store.read(tmp_path / "runs.jsonl")
    store.append(tmp_path / "runs.jsonl", [line | {"method": "ghost"} for line in lines if line["method"] == "aid-cg"])
    (tmp_path / "runs-paths.jsonl").unlink()
    made = report.report(tmp_path)
    rows = [line.split(" | ") for line in made.texts["table.md"].splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == ["lagrangian", "aid-cg", "ghost"]
    assert rows[1][4:8] == rows[2][4:8]
    made.figures["arm.png"](tmp_path / "arm.png")
    assert (tmp_path / "arm.png").stat().st_size > 20_000


def test_chosen_rates_are_those_of_the_committed_records():
    runs = store.records(Store(RESULTS, "arm"))
    for name, method in METHODS.items():
        middle = [r for r in runs if r["method"] == name and r["settings"]["weight"] == methods.MIDDLE]
        scores = select.by_settings(middle, report.validation_cost)
        (chosen,) = {
            (r["settings"]["leader_rate"], r["settings"]["follower_rate"])
            for r in middle
            if store.settings_key(r["settings"]) == select.best(scores)
        }
        assert chosen == (method.hyper["leader_rate"], method.hyper["follower_rate"])
    select.check_budgets({name: len(method.trials) for name, method in METHODS.items()})


@pytest.mark.slow
def test_compare_without_a_stub(tmp_path, monkeypatch):
    """With one cell everywhere, which is compiled once for each method."""
    chosen = {name: method._replace(trials=(method.hyper,), chosen=0) for name, method in METHODS.items()}
    for module, name, value in [
        (methods, "METHODS", chosen),
        (methods, "WEIGHTS", (methods.MIDDLE,)),
        (train, "RATES", ()),
        (train, "RETRAINING", (2,)),
    ]:
        monkeypatch.setattr(module, name, value)
    few = [*FEW, "--methods", "lagrangian", "aid-cg", "--seeds", "1"]
    cli.main(["compare", "arm", *few, "--output-dir", str(tmp_path)])
    runs, paths, changes = (keys(tmp_path / f"{name}.jsonl") for name in ("runs", "runs-paths", "changes"))
    assert len(runs) == 2
    assert paths.keys() == runs.keys()
    assert all(np.shape(angles) == (train.SHOWN, arm.STEPS, 2) for angles in paths.values())
    trained = {key.method: metrics for key, metrics in runs.items()}
    assert trained["lagrangian"]["tracking"] != trained["aid-cg"]["tracking"]
    # Untrained after a change: with the old payload the controllers cost what their records say, with the new more.
    assert len(changes) == 4
    for key, metrics in changes.items():
        ratio = metrics["tracking"] / trained[key.method]["tracking"]
        assert ratio > 2 if '"change": "payload"' in key.settings else ratio == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "arm", "--methods", "dfiv"], "--methods must be among lagrangian.*got dfiv"),
        (["run", "arm", "--updates", "0"], "--updates must be at least 1, got 0"),
        (["compare", "arm", "--inner-steps", "0"], "--inner-steps must be at least 1, got 0"),
        (["compare", "arm", "--width", "-2"], "--width must be at least 1, got -2"),
    ],
)
def test_bad_options(tmp_path, args, message):
    with pytest.raises(SystemExit, match=message):
        cli.main([*args, "--output-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("broken", [0.0, jnp.nan])
def test_a_weighted_reward_that_is_not_finite_moves_nobody(broken):
    shift = broken * jnp.ones(2)
    game = methods.Game(
        fb.ParametricProblem(lambda w, t, batch: jnp.sum((w + t - 1 + shift) ** 2), lambda w, t, batch: jnp.sum(w**2)),
        methods.Setting(),
        optax.sgd(0.1),
        optax.sgd(0.2),
    )
    solver = methods.weighted_reward(game)
    before = solver.init(jax.random.key(0), jnp.zeros(2), None, jnp.zeros(2))
    after, metrics = jax.jit(solver.step)(before, None, None)
    assert bool(metrics["outer_finite"]) is (broken == 0)
    moved = 0.2 if broken == 0 else 0.0
    np.testing.assert_allclose(after.outer_params, [moved, moved], rtol=1e-6)
    np.testing.assert_allclose(after.inner_params, [2 * moved, 2 * moved], rtol=1e-6)
    assert after.step == 1
