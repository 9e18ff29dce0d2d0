"""The two-link arm: its dynamics against the Lagrangian, references, costs, methods, fronts, and commands."""

import json

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import solve_ivp

import funcbilevel as fb
from funcbilevel import cli
from funcbilevel.tasks import _records, arm, arm_commands
from funcbilevel.tasks.arm import Arm, Hyper, Setting

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
        d_potential = jax.grad(lambda q: arm.potential_energy(LOADED, q))(q)
        potential = -lagrangian(LOADED, q, jnp.zeros(2))
        ours = arm.acceleration(LOADED, q, dq, torque), arm.mass_matrix(LOADED, q), arm.gravity(LOADED, q)
        return (*ours, arm.potential_energy(LOADED, q)), (expected, d_dq_dq, d_potential, potential)

    for got, expected in zip(*both(states()), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9)


def energies(of, dt, torque=lambda q: jnp.zeros(2)):
    """Total energy along one second of free motion."""

    def step(state, _):
        state = arm.advance(of, *state, torque(state[0]), dt)
        q, dq = state
        return state, 0.5 * dq @ arm.mass_matrix(of, q) @ dq + arm.potential_energy(of, q)

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
    return arm.init_players(jax.random.key(key), "aid-cg", SMALL._replace(width=width))


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
    of = arm.problem(Hyper(2.0, payload=0.5))

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
        jax.eval_shape(lambda key, m=m: arm.init_players(key, m, Setting()), jax.random.key(0)) for m in arm.METHODS
    ]
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in trees]
    assert sizes[0] - sizes[1] == 2  # the biases of one output layer
    assert set(sizes) == {sizes[0], sizes[1]}
    counted = {m: arm.num_steps(m, SMALL, 120) for m in arm.METHODS}
    assert counted == {"lagrangian": 120, "leader-only": 120, "alternating": 60, "aid-cg": 60, "itd": 60}


def norm_of_difference(a, b):
    return max(float(np.max(np.abs(x - y))) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_sweep_is_the_runs_by_themselves_and_rate_zero_keeps_a_player():
    hypers = [Hyper(0.1, 0.01, 0.02), Hyper(3.0, 0.02, 0.01, 1.0), Hyper(3.0, 0.02, 0.01)]
    together = arm.sweep("lagrangian", SMALL, hypers, [3], 7, chunk=3)
    assert [cell[:2] for cell in together.cells] == [(hyper, 3) for hyper in hypers]
    metrics = together.cells[1][2]
    other = arm.sweep("lagrangian", SMALL, [hypers[1]], [3, 4, 5], 7, chunk=7)  # beside other cells, in one chunk
    assert other.cells[0][2] == pytest.approx(metrics, rel=1e-3)
    assert len({cell[2]["energy"] for cell in (*together.cells, *other.cells[1:])}) == 5
    names = arm.Costs._fields
    assert set(metrics) == {*names, *(f"validation_{name}" for name in names), "alone"}
    # From where it stopped: a player with rate 0 stays.
    rates = [Hyper(0.1, 0.0, 0.02), Hyper(0.1, 0.0, 0.0), Hyper(0.1, 0.02, 0.0)]
    again = arm.sweep("lagrangian", SMALL, rates, [3], 7, start=together.players)
    for player, i, moved in [(0, 0, False), (1, 0, True), (0, 1, False), (1, 1, False), (0, 2, True), (1, 2, False)]:
        pair = jax.tree.map(lambda x: x[i], (again.players[player], together.players[player]))
        assert (norm_of_difference(*pair) > 1e-3) == moved
    assert arm.program("lagrangian", SMALL).advance._cache_size() == 1


def test_the_weighted_reward_learns():
    hypers = [Hyper(0.1, 0.02, 0.02), Hyper(0.1, 0.0, 0.0), Hyper(0.1, 0.01, 0.01)]
    cells = arm.sweep("lagrangian", SMALL, hypers, [0], 80).cells
    costs = [m["tracking"] + 0.1 * (m["energy"] + m["intrusion"]) for _, _, m in cells]
    assert costs[0] < costs[2] < costs[1]
    assert costs[0] < 0.7 * costs[1]


def test_leader_only_traces():
    """Shapes and structures only; its training is the weighted reward's."""
    method = "leader-only"
    compiled, key = arm.program(method, SMALL), jax.random.key(0)
    cell = jax.tree.map(lambda x: jnp.array([x]), (Hyper(), arm.init_players(key, method, SMALL)))
    state = jax.eval_shape(compiled.init, key[None], cell[1], cell[0], 4)
    after, metrics = jax.eval_shape(compiled.advance, state, cell[0], key[None], 4, 2)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert {"outer_objective", "inner_objective"} <= metrics.keys()
    assert state.inner_params is None


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("dfiv", SMALL, "method must be one of lagrangian, leader-only.*got 'dfiv'"),
        ("itd", SMALL._replace(width=0), "width must be at least 1, got 0"),
    ],
)
def test_bad_setting(method, setting, message):
    with pytest.raises(ValueError, match=message):
        arm.program(method, setting)


# Fronts.


def test_energy_at_equal_tracking():
    front = lambda scale, xs: np.array([(x, scale / x) for x in xs])
    ratio = arm.energy_ratio(front(0.8, [0.1, 0.5, 2.0]), front(1.0, [0.3, 1.0, 3.0]))
    assert ratio == pytest.approx(0.8)  # energy 1/x is a straight line in the logarithms
    assert np.isnan(arm.energy_ratio(front(1.0, [0.1, 0.2]), front(1.0, [0.3, 1.0])))
    assert np.isnan(arm.energy_ratio(front(1.0, [0.1]), front(1.0, [0.1, 1.0])))
    # A ratio of 1 at the left and of 4 at the right end, geometrically between: 2 in the mean.
    assert arm.energy_ratio(np.array([[0.1, 1.0], [1.0, 0.4]]), front(0.1, [0.1, 1.0])) == pytest.approx(2.0)


def test_fronts_are_selected_on_validation():
    def cell(t, e, vt, ve):
        return {"tracking": t, "energy": e, "validation_tracking": vt, "validation_energy": ve}

    good, best_on_test, other = cell(1.0, 2.0, 1.0, 2.0), cell(0.1, 0.1, 3.0, 3.0), cell(0.5, 4.0, 0.5, 4.0)
    assert arm.selected([good, best_on_test, cell(*4 * [np.nan]), other]) == [other, good]
    assert arm.selected([cell(*4 * [np.nan])]) == []
    assert arm.at_tracking([other, good], "energy", np.sqrt(0.5)) == pytest.approx(3.0)
    assert np.isnan(arm.at_tracking([other, good], "energy", 2.0))
    assert np.isnan(arm.at_tracking([], "energy", 2.0))


# Commands.


FEW = ["--updates", "8", "--inner-steps", "1", "--width", "3"]


@pytest.fixture
def three_weights(monkeypatch):
    monkeypatch.setattr(arm_commands, "WEIGHTS", (arm_commands.MIDDLE, 3.0, 30.0))
    monkeypatch.setattr(arm_commands, "TRIALS", dict.fromkeys(arm.METHODS, ((0.02, 0.02),)))


@pytest.mark.slow
def test_run(tmp_path, capsys, three_weights):
    directory = tmp_path / "run"
    args = ["run", "arm", *FEW, "--output-dir", str(directory)]
    cli.main(args)
    output = capsys.readouterr()
    assert "aid-cg            4 outer steps, outer objective" in output.err
    names = ["arm.png", "config.json", "paths.jsonl", "runs.jsonl", "table.md"]
    assert sorted(path.name for path in directory.iterdir()) == names
    assert (directory / "arm.png").stat().st_size > 20_000
    records = list(_records.read(directory / "runs.jsonl"))
    assert [r["method"] for r in records] == 3 * ["lagrangian"] + 3 * ["aid-cg"]
    assert {r["settings"]["updates"] for r in records} == {8}
    assert all(r["metrics"]["tracking"] > 0 for r in records)
    cli.main(args)
    assert len(list(_records.read(directory / "runs.jsonl"))) == 6  # all were there


@pytest.mark.slow
def test_compare(tmp_path, monkeypatch, three_weights):
    monkeypatch.setattr(arm_commands, "RATES", (0.01,))
    monkeypatch.setattr(arm_commands, "RETRAINING", (2, 4))
    few = [*FEW, "--methods", "lagrangian", "aid-cg", "--seeds", "1"]
    cli.main(["compare", "arm", *few, "--output-dir", str(tmp_path)])
    runs = list(_records.read(tmp_path / "runs.jsonl"))
    assert len(runs) == 2 * 3
    table, changes = (tmp_path / "table.md").read_text().split("\n\n")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[:4] for row in cells] == [[m, "1", "3", "0"] for m in ("lagrangian", "aid-cg")]

    # The ratio of the table, from the records.
    def front(method):
        return arm.points(arm.selected([r["metrics"] for r in runs if r["method"] == method]))

    ratio = arm.energy_ratio(front("aid-cg"), front("lagrangian"))
    assert cells[1][4].split(" ")[0] == (f"{ratio:.3f}" if np.isfinite(ratio) else "")

    again = list(_records.read(tmp_path / "changes.jsonl"))
    assert len(again) == 2 * 2 * 2 * 3  # methods, changes, numbers of steps, ways
    again = [r for r in again if r["method"] == "lagrangian"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in changes.splitlines()[2:]]
    ways = [[c, m, n] for m in ("lagrangian", "aid-cg") for c in ("payload", "weight") for n in ("2", "4")]
    assert [row[:3] for row in rows] == ways

    def cost(change, updates, *rates):
        (of,) = (
            r
            for r in again
            if (r["settings"]["change"], r["settings"]["updates"]) == (change, updates)
            and (r["settings"]["leader_rate"], r["settings"]["follower_rate"]) == rates
        )
        assert of["settings"]["payload"] == {"payload": 1.0, "weight": 0.0}[change]
        m = of["metrics"]
        return f"{m['tracking'] + of['settings']['weight'] * (m['energy'] + m['intrusion']):.3f}"

    assert rows[0][3:6] == [cost("payload", 2, *rates) for rates in ((0.0, 0.0), (0.0, 0.01), (0.01, 0.01))]
    assert rows[3][3:6] == [cost("weight", 4, *rates) for rates in ((0.0, 0.0), (0.0, 0.01), (0.01, 0.01))]
    # Untrained, with the old payload: the records before the change at the other weight.
    old = next(r["metrics"] for r in runs if r["method"] == "lagrangian" and r["settings"]["weight"] < 1)
    expected = old["tracking"] + 3.0 * (old["energy"] + old["intrusion"])
    assert float(rows[3][3]) == pytest.approx(expected, abs=1e-3)
    assert json.loads((tmp_path / "config.json").read_text())["updates"] == 8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "arm", "--methods", "dfiv"], "--methods must be among lagrangian.*got dfiv"),
        (["run", "arm", "--updates", "0"], "--updates must be at least 1, got 0"),
        (["compare", "arm", "--seeds", "0"], "--seeds must be at least 1, got 0"),
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
    game = arm.Game(
        fb.ParametricProblem(lambda w, t, batch: jnp.sum((w + t - 1 + shift) ** 2), lambda w, t, batch: jnp.sum(w**2)),
        arm.Setting(),
        optax.sgd(0.1),
        optax.sgd(0.2),
    )
    solver = arm.weighted_reward(game)
    before = solver.init(jax.random.key(0), jnp.zeros(2), None, jnp.zeros(2))
    after, metrics = jax.jit(solver.step)(before, None, None)
    assert bool(metrics["outer_finite"]) is (broken == 0)
    moved = 0.2 if broken == 0 else 0.0
    np.testing.assert_allclose(after.outer_params, [moved, moved], rtol=1e-6)
    np.testing.assert_allclose(after.inner_params, [2 * moved, 2 * moved], rtol=1e-6)
    assert after.step == 1
