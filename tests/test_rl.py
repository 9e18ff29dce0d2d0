"""Model-based reinforcement learning: the Bellman problem's derivatives, environment, buffer, training, commands."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcbilevel as fb
from funcbilevel import cli
from funcbilevel.tasks import rl
from funcbilevel.tasks._experiment import select, store
from funcbilevel.tasks._experiment.store import Result
from funcbilevel.tasks.rl import environments, methods, pictures, programs, report, train
from funcbilevel.tasks.rl.problem import (
    Batch,
    Bellman,
    Transition,
    bellman_problem,
    init_ensemble,
    init_q,
    init_world_model,
    mlp,
)

SETTING = methods.Setting(
    steps=110, q_width=8, batch_size=16, random_steps=20, evaluation_interval=30, evaluation_episodes=3
)

MODEL_FREE = SETTING._replace(tau=0.02)
LONG = MODEL_FREE._replace(steps=40_000)
FUNCID = SETTING._replace(**methods.METHODS["funcid-pointwise"].hyper)


@pytest.fixture(scope="module")
def cartpole():
    return environments.cartpole()._replace(horizon=15)


@pytest.fixture
def small(cartpole, monkeypatch):
    """The commands on short episodes and small networks, with the programs of the other tests."""
    monkeypatch.setitem(environments.ENVIRONMENTS, "cartpole", lambda: cartpole)
    monkeypatch.setattr(rl, "Setting", SETTING._replace)
    monkeypatch.setattr(rl, "RANDOM_STEPS", SETTING.random_steps)
    return ("--steps", "110", "--evaluation-interval", "30", "--seeds", "2")


def some_transitions(rng, n, k=4, num_actions=2, dtype=np.float64):
    return Transition(
        jnp.asarray(rng.normal(size=(n, k)), dtype),
        jnp.asarray(rng.integers(num_actions, size=n), jnp.int32),
        jnp.asarray(rng.normal(size=n), dtype),
        jnp.asarray(rng.normal(size=(n, k)), dtype),
        jnp.asarray(rng.integers(2, size=n), dtype),
    )


# The problem.


def test_targets_by_hand(x64):
    rng = np.random.default_rng(0)
    transition = some_transitions(rng, 5)
    q = rng.normal(size=(2, 5, 2))
    bellman = Bellman(lambda params, observation: jnp.asarray(q) * params, None, discount=0.9, alpha=0.3)
    smaller = np.minimum(q[0], q[1])
    V = 0.3 * np.log(np.exp(smaller[:, 0] / 0.3) + np.exp(smaller[:, 1] / 0.3))
    expected = np.asarray(transition.reward) + 0.9 * (1 - np.asarray(transition.terminal)) * V
    batch = Batch(transition, 1.0)
    np.testing.assert_allclose(bellman.true_target(batch), expected, rtol=1e-12)
    v = rng.normal(size=(5, 2))
    error = np.mean(0.5 * (v[:, 0] - expected) ** 2 + 0.5 * (v[:, 1] - expected) ** 2)
    np.testing.assert_allclose(bellman.true_error(None, jnp.asarray(v), batch), error, rtol=1e-12)


@pytest.fixture
def networks(x64, cartpole):
    """(Bellman, omega, theta, batch) of random networks in float64."""

    def double(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float64) + 0.1 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), tree)

    @jax.jit
    def init(keys):
        omega, ensemble = double(init_world_model(keys[0], cartpole, 5)), double(init_ensemble(keys[0], cartpole, 8, 3))
        return omega, ensemble, *(double(init_q(key, cartpole, 8)) for key in keys[1:])

    omega, ensemble, theta, target = init(jax.random.split(jax.random.key(0), 3))
    target = jax.tree.map(lambda x: 1.1 * x, target)
    batch = Batch(some_transitions(np.random.default_rng(1), 30), target, ensemble)
    return methods.bellman_of(cartpole, SETTING._replace(alpha=0.2)), omega, theta, batch


def built(method, bellman, setting=SETTING):
    """(problem, estimator) of a method."""
    return methods.METHODS[method].build(bellman, setting)


def hypergradient(problem, bellman, estimator, omega, theta, batch):
    @jax.jit
    def gradient(omega, theta, batch):
        model = bellman.model(lambda key, inputs: theta)
        return fb.hypergradient(problem, model, estimator, omega, theta, batch, batch).gradient

    return jax.flatten_util.ravel_pytree(gradient(omega, theta, batch))[0]


def assert_close(got, expected, tolerance):
    assert jax.dtypes.result_type(got) == jnp.float64
    assert np.linalg.norm(expected) > 1e-6
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


def flat_grad(function, omega):
    return jax.flatten_util.ravel_pytree(jax.jit(jax.grad(function))(omega))[0]


def taken_values(bellman, theta, batch):
    q = bellman.q_values(theta, batch.transition.observation)
    return jnp.stack([q[j, jnp.arange(q.shape[1]), batch.transition.action] for j in range(2)], axis=1)


def test_funcid_is_the_pointwise_formula(networks):
    """C = I/n and d = (v - y)/n, so that a = -(v - y): dF = mean_i sum_j (v_ij - y_i) d_omega y_omega,i."""
    bellman, omega, theta, batch = networks
    v, y = taken_values(bellman, theta, batch), bellman.true_target(batch)
    weights = jnp.sum(v - y[:, None], axis=1)
    expected = flat_grad(lambda omega: jnp.mean(weights * bellman.model_target(omega, batch)), omega)
    problem, estimator = built("funcid-pointwise", bellman)
    assert_close(hypergradient(problem, bellman, estimator, omega, theta, batch), expected, tolerance=1e-8)


def test_omd_is_implicit_differentiation_by_parameters(networks):
    """By dense matrices; `omd-identity` leaves the inverse out, and `omd-cg` approaches it as its steps grow."""
    bellman, omega, theta, batch = networks
    flat, unflat = jax.flatten_util.ravel_pytree(theta)
    value = taken_values
    inner = lambda omega, t: bellman.model_error(omega, value(bellman, unflat(t), batch), batch)
    rhs = jax.grad(lambda t: bellman.true_error(None, value(bellman, unflat(t), batch), batch))(flat)
    H = jax.jit(jax.hessian(inner, 1))(omega, flat) + 5.0 * jnp.eye(len(flat))
    assert np.linalg.eigvalsh(H)[0] > 0.5  # positive definite with this damping
    expected, identity = (
        -flat_grad(lambda omega, u=u: jnp.vdot(jax.grad(inner, 1)(omega, flat), u), omega)
        for u in (jnp.linalg.solve(H, rhs), rhs)
    )
    problem, estimator = built("omd-identity", bellman)
    got = hypergradient(problem, bellman, estimator, omega, theta, batch)
    assert_close(got, identity, tolerance=1e-10)
    problem, estimator = built("omd-cg", bellman, SETTING._replace(cg_steps=60, damping=5.0))
    got = hypergradient(problem, bellman, estimator, omega, theta, batch)
    assert_close(got, expected, tolerance=1e-6)
    assert np.linalg.norm(identity - expected) > 0.1 * np.linalg.norm(expected)


def test_the_public_code_trains_the_reward_alone(networks):
    bellman, omega, theta, batch = networks
    whole, public = (
        hypergradient(*(built(name, bellman)[0], bellman, built(name, bellman)[1]), omega, theta, batch)
        for name in ("funcid-pointwise", "funcid-public")
    )
    size = len(jax.flatten_util.ravel_pytree(omega.dynamics)[0])
    np.testing.assert_array_equal(public[:size], 0.0)
    assert np.linalg.norm(whole[:size]) > 1e-6
    assert_close(public[size:], whole[size:], tolerance=1e-12)


def test_after_a_newton_step_funcid_is_value_equivalence(networks):
    """v_1 is the target under the model, so that dF = d_omega of 1/2 |y_omega - y|^2 for each of the two networks."""
    bellman, omega, theta, batch = networks
    got, expected = (
        hypergradient(*(built(name, bellman)[0], bellman, built(name, bellman)[1]), omega, theta, batch)
        for name in ("funcid-corrected", "value-equivalence")
    )
    assert_close(got, 2.0 * expected, tolerance=1e-10)


@pytest.mark.parametrize("name", ["mle", "vep", "value-equivalence"])
def test_explicit_methods(networks, name):
    bellman, omega, theta, batch = networks
    s, a, r, after, _ = batch.transition

    def mle(omega):
        predicted, reward = bellman.predict(omega, s, a)
        return 0.5 * jnp.mean(jnp.sum((predicted - after) ** 2, axis=1) + (reward - r) ** 2)

    def vep(omega):
        predicted, reward = bellman.predict(omega, s, a)
        total = jnp.mean((reward - r) ** 2)
        for i in range(3):
            network = jax.tree.map(lambda x, i=i: x[i], batch.ensemble)
            total += jnp.mean((mlp(network, predicted) - mlp(network, after))[:, 0] ** 2)
        return 0.5 * total

    def value_equivalence(omega):
        return 0.5 * jnp.mean((bellman.model_target(omega, batch) - bellman.true_target(batch)) ** 2)

    objective = {"mle": mle, "vep": vep, "value-equivalence": value_equivalence}[name]
    problem, estimator = built(name, bellman)
    got = hypergradient(problem, bellman, estimator, omega, theta, batch)
    assert_close(got, flat_grad(objective, omega), tolerance=1e-12)


def test_finite_differences_of_a_tabular_problem(x64):
    """Three states, two actions: F(omega) is the true Bellman error at the exact solution under the model.

    Pairs (s, a) come several times, with different outcomes, and have one value each. Whether an episode ends is
    decided by the pair.
    """
    rng = np.random.default_rng(0)
    S, A, n = 3, 2, 40
    states, after = rng.integers(S, size=(2, n))
    one_hot = jnp.eye(S)
    transition = some_transitions(rng, n)._replace(observation=one_hot[states], next_observation=one_hot[after])
    action = np.asarray(transition.action)
    transition = transition._replace(terminal=jnp.array([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])[states, action])
    assert len({*zip(states, action)}) == S * A < n

    def predict(omega, observation, action):
        logits, reward = omega
        index = jnp.argmax(observation, axis=1)
        return jax.nn.softmax(logits[index, action]), reward[index, action]

    bellman = Bellman(lambda Q, observation: jnp.einsum("ns,jsa->jna", observation, Q), predict, 0.9, 0.5)
    batch = Batch(transition, jnp.asarray(rng.normal(size=(2, S, A))))
    omega = (jnp.asarray(rng.normal(size=(S, A, S))), jnp.asarray(rng.normal(size=(S, A))))

    def solution(omega):  # the target under the model depends on the pair alone
        Q = jnp.zeros((S, A)).at[states, action].set(bellman.model_target(omega, batch))
        return jnp.stack([Q, Q])

    def F(omega):
        return bellman.true_error(omega, taken_values(bellman, solution(omega), batch), batch)

    flat, unflat = jax.flatten_util.ravel_pytree(omega)
    F = jax.jit(F)
    differences = [(F(unflat(flat + e)) - F(unflat(flat - e))) / 2e-5 for e in 1e-5 * np.eye(len(flat))]
    theta = solution(omega)
    for estimator in (fb.funcid(fb.pointwise_adjoint()), fb.aid(fb.cg(20))):
        got = hypergradient(bellman_problem(bellman), bellman, estimator, omega, theta, batch)
        assert_close(got, np.array(differences), tolerance=1e-7)


def test_learned_adjoint_kept_warm_approaches_the_pointwise_one(x64, cartpole, networks):
    bellman, omega, theta, batch = networks
    model = bellman.model(lambda key, _: jax.tree.map(lambda x: x.astype(float), init_q(key, cartpole, 32)))
    problem = bellman_problem(bellman)
    exact = hypergradient(problem, bellman, fb.funcid(fb.pointwise_adjoint()), omega, theta, batch)
    learned = fb.funcid(fb.learned_adjoint(optax.adam(3e-3), num_steps=5, model=model))

    @jax.jit
    def step(state):
        result = fb.hypergradient(
            problem, bellman.model(lambda key, inputs: theta), learned, omega, theta, batch, batch, state=state,
            key=jax.random.key(0),
        )  # fmt: skip
        return result.state, jax.flatten_util.ravel_pytree(result.gradient)[0]

    state, errors = None, []
    for _ in range(80):
        state, got = step(state)
        errors.append(np.linalg.norm(got - exact) / np.linalg.norm(exact))
    assert errors[0] > 0.3
    assert errors[-1] < 0.05


# Environments.


@pytest.mark.parametrize("name", ["cartpole", "pendulum"])
def test_environment_is_gymnasiums(name):
    """CartPole is the registered one, in float64, whose pole has another `polemass_length` than the functional one."""
    import gymnasium

    environment = environments.ENVIRONMENTS[name]()
    spec = {"cartpole": "CartPole-v1", "pendulum": "phys2d/Pendulum-v0"}[name]
    theirs = gymnasium.make(spec).unwrapped
    assert environment.horizon == gymnasium.spec(spec).max_episode_steps
    observation, _ = theirs.reset(seed=3)
    world, rng, ends = jnp.asarray(theirs.state, jnp.float32), np.random.default_rng(0), 0
    step = jax.jit(
        lambda world, action: programs.interact(environment, world, jnp.int32(0), action, jnp.zeros_like(world))
    )
    for _ in range(60):
        action = int(rng.integers(environment.num_actions))
        control = action if name == "cartpole" else np.array([environments.TORQUES[action]])
        after, reward, terminal, _, _ = theirs.step(control)
        transition, next_world, _ = step(world, action)
        np.testing.assert_allclose(transition.observation, observation, atol=1e-5)
        np.testing.assert_allclose(transition.next_observation, after, atol=1e-5)
        np.testing.assert_allclose(transition.reward, reward, rtol=1e-5)
        assert transition.terminal == terminal
        if terminal:
            ends += 1
            np.testing.assert_array_equal(next_world, np.zeros(4))
            after, _ = theirs.reset(seed=ends)
            next_world = jnp.asarray(theirs.state, jnp.float32)
        observation, world = after, next_world
    assert ends > 0 or name == "pendulum"


def test_an_episode_that_is_cut_off_is_not_terminal(cartpole):
    world, fresh = jnp.zeros(4), jnp.full(4, 0.01)
    for episode_step, reset in [(cartpole.horizon - 2, False), (cartpole.horizon - 1, True)]:
        transition, after, step = programs.interact(cartpole, world, jnp.int32(episode_step), jnp.int32(1), fresh)
        assert not transition.terminal
        assert np.array_equal(after, fresh) == reset
        assert step == (0 if reset else episode_step + 1)


# Buffer and policy.


def test_buffer_keeps_the_latest_and_draws_all_of_them():
    transition = some_transitions(np.random.default_rng(0), 7, dtype=np.float32)
    rows = programs.to_row(transition)
    jax.tree.map(np.testing.assert_array_equal, programs.from_row(rows), transition)
    assert programs.from_row(rows).action.dtype == jnp.int32

    buffer = jnp.zeros((5, rows.shape[1]))
    uniform = jnp.linspace(0.0, 1.0 - 1e-7, 40)
    for step in range(7):
        buffer = programs.write(buffer, jnp.int32(step), rows[step])
        drawn = np.unique(np.asarray(programs.to_row(programs.draw(buffer, jnp.int32(step), uniform))), axis=0)
        kept = np.unique(np.asarray(rows[max(0, step - 4) : step + 1]), axis=0)
        np.testing.assert_array_equal(drawn, kept)


def test_policy_is_soft():
    q = jnp.array([[[0.0, 0.02]], [[0.01, 0.01]]])  # both networks' mean counts
    params = [(jnp.zeros((2, 1, 2)), q[:, 0])]
    gumbel = jax.random.gumbel(jax.random.key(0), (20_000, 2))
    actions = programs.soft_action(params, jnp.zeros((20_000, 1)), gumbel, alpha=0.01)
    expected = np.exp(0.015 / 0.01) / (np.exp(0.015 / 0.01) + np.exp(0.005 / 0.01))
    assert np.mean(np.asarray(actions)) == pytest.approx(expected, abs=0.015)


def test_evaluation_counts_the_steps_of_episodes():
    environment = environments.cartpole()
    right = [(jnp.zeros((2, 4, 2)), jnp.array([[0.0, 1.0]] * 2))]  # always pushes to the right
    key = jax.random.key(5)
    returns = jax.jit(lambda key: programs.evaluate(environment, SETTING, right, key))(key)
    worlds = jax.vmap(environment.initial)(jax.random.split(jax.random.split(key)[0], 3))
    step = jax.jit(environment.transition)
    for start, got in zip(worlds, returns, strict=True):
        world, steps = start, 0
        while not environment.terminal(world):
            world, steps = step(world, 1), steps + 1
        assert got == steps
        assert 5 < steps < 15
    worlds, length = programs.rollout(environment, SETTING.alpha, right, key)
    assert worlds.shape == (500, 4)
    assert not environment.terminal(worlds[length - 1])
    assert environment.terminal(environment.transition(worlds[length - 1], 1))


# Training.


def test_transitions_in_the_buffer_are_the_environments(cartpole):
    state, steps, curves, _ = train.train_seeds(cartpole, "funcid-pointwise", FUNCID, [0, 1])
    np.testing.assert_array_equal(steps, [50, 80, 110])
    for buffer in state.buffer:
        transition = programs.from_row(buffer)
        after = jax.vmap(cartpole.transition)(transition.observation, transition.action)
        np.testing.assert_allclose(transition.next_observation, after, atol=1e-5)
        np.testing.assert_array_equal(transition.terminal, jax.vmap(cartpole.terminal)(after))
        # To a rounding: programs may compute the state twice, with and without fused multiplications.
        goes_on = np.all(np.isclose(transition.observation[1:], transition.next_observation[:-1], atol=1e-6), axis=1)
        ends = np.flatnonzero(~goes_on) + 1
        lengths = np.diff([0, *ends])
        assert 0 < max(lengths) <= cartpole.horizon
        cut = lengths == cartpole.horizon
        assert np.all(np.asarray(transition.terminal)[ends - 1][~cut] == 1.0)
        assert np.all(np.asarray(transition.terminal)[:-1][goes_on] == 0.0)
    assert len(np.unique(state.buffer[:, 5, 0])) == 2  # each seed has its own
    assert all(np.all(curves[name]) for name in ("inner_finite", "adjoint_finite", "outer_finite"))
    assert np.all(curves["adjoint_inputs_match"])
    kept = ("linear_residual", "linear_converged", "linear_curvature", "adjoint_inputs_match", "adjoint_finite")
    kept = (*kept, "inner_objective", "outer_objective", "hypergradient_norm", "explicit_norm", "implicit_norm")
    assert curves.keys() == {*kept, "inner_finite", "outer_finite", "evaluation_return"}  # no more is computed


def test_one_compilation_and_the_target_follows(cartpole, caplog):
    """The same programs serve all chunks, the resumed ones, other seeds and other rates."""
    with jax.log_compiles():  # the first test of these programs
        state, *_ = train.train_seeds(cartpole, "model-free", MODEL_FREE, [0, 1])
        others = MODEL_FREE._replace(inner_learning_rate=1e-4, outer_learning_rate=0.1, warm_adam=False)
        slow, *_ = train.train_seeds(cartpole, "model-free", others, [0, 1])
    finished = [r.getMessage().split()[4] for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert [finished.count(name) for name in ("jit(initial)", "jit(all_seeds)")] == [1, 2]  # explore and chunk
    compiled = programs.programs(cartpole, "model-free", MODEL_FREE, programs.spread_over(2))
    theta, target = (jax.tree.leaves(x)[0] for x in (state.learner.inner_params, state.target_params))
    slow_theta = jax.tree.leaves(slow.learner.inner_params)[0]
    start = jax.tree.leaves(compiled.init(train.keys([0, 1])).target_params)[0]
    assert theta.shape == target.shape == start.shape
    assert 0 < np.linalg.norm(target - theta) < np.linalg.norm(theta)
    moved, moved_slowly = (np.max(np.abs(x - start)) for x in (theta, slow_theta))
    assert 0 < moved_slowly <= 90 * 1e-4 * 1.001 < moved  # 90 steps of sign descent at most


def test_seeds_are_spread_over_the_devices(cartpole):
    assert [programs.spread_over(n) for n in (1, 2, 3, 9, 10, 11, 16)] == [1, 2, 3, 3, 5, 1, 8]
    spread, _, curves, _ = train.train_seeds(cartpole, "model-free", MODEL_FREE, [0, 1])
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(spread)} == {2}
    one = programs.programs(cartpole, "model-free", LONG)
    state = one.explore(one.init(jax.vmap(jax.random.key)(jnp.arange(2))))
    state, metrics = one.chunk(state, np.int32(20))
    assert len(state.buffer.sharding.device_set) == 1
    np.testing.assert_allclose(state.buffer[:, :50], spread.buffer[:, :50], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["inner_objective"], curves["inner_objective"][:, 0], rtol=1e-3)


def test_every_core_is_a_device_unless_told_otherwise():
    code = (
        "import os, jax\nfrom funcbilevel.tasks._experiment.machine import every_core_a_device\n"
        "for _ in range(2): every_core_a_device(); print(len(jax.devices()))\n"
        "print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())"
    )
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}

    def devices(**told):
        run = subprocess.run([sys.executable, "-c", code], env=env | told, check=True, capture_output=True, text=True)
        return [int(line) for line in run.stdout.split()]

    first, second, cores = devices()
    assert first == second == cores
    assert devices(JAX_NUM_CPU_DEVICES="3")[:2] == [3, 3]
    assert devices(XLA_FLAGS="--xla_force_host_platform_device_count=4")[:2] == [4, 4]


class Interrupted(Exception):
    pass


def test_training_goes_on_from_its_checkpoint(cartpole, tmp_path):
    checkpoint = tmp_path / "state.npz"
    expected, _, curves, _ = train.train_seeds(cartpole, "funcid-pointwise", FUNCID, [0, 1])
    again, _, curves_again, _ = train.train_seeds(cartpole, "funcid-pointwise", FUNCID, [0, 1])
    for name, values in curves.items():
        np.testing.assert_array_equal(values, curves_again[name])

    seen = []

    def stop(steps, metrics):
        seen.append(steps)
        if len(seen) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        train.train_seeds(
            cartpole, "funcid-pointwise", FUNCID, [0, 1], callback=stop, checkpoint=checkpoint, checkpoint_interval=0
        )
    assert checkpoint.exists()
    seen.clear()
    resumed, _, resumed_curves, _ = train.train_seeds(
        cartpole,
        "funcid-pointwise",
        FUNCID,
        [0, 1],
        callback=lambda steps, _: seen.append(steps),
        checkpoint=checkpoint,
    )
    assert seen == [30, 30, 30]  # the steps already made are reported at once
    for name, values in curves.items():
        np.testing.assert_array_equal(values, resumed_curves[name])
    for got in (again, resumed):
        jax.tree.map(np.testing.assert_array_equal, got._replace(key=0, learner=got.learner._replace(key=0)),
                     expected._replace(key=0, learner=expected.learner._replace(key=0)))  # fmt: skip
        np.testing.assert_array_equal(jax.random.key_data(got.key), jax.random.key_data(expected.key))


def test_buffer_is_written_in_place_and_a_model_free_agent_leaves_the_model_alone(cartpole):
    """A buffer far larger than all else: its bytes are donated, and appear neither as temporaries nor as a copy."""
    compiled = programs.programs(cartpole, "model-free", LONG)
    state = compiled.explore(compiled.init(jax.random.split(jax.random.key(0), 2)))
    chunk = compiled.chunk.lower(state, np.int32(20)).compile()
    size, memory = state.buffer.nbytes, chunk.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 0.1 * size
    shape = f"f32[{','.join(map(str, state.buffer.shape))}]"
    written = [line for line in chunk.as_text().splitlines() if f"= {shape}" in line]
    assert written
    assert not [line for line in written if " copy(" in line]

    before = jax.tree.map(np.asarray, (state.learner.outer_params, state.learner.inner_params))
    state, metrics = chunk(state, np.int32(20))
    jax.tree.map(np.testing.assert_array_equal, before[0], state.learner.outer_params)
    assert not np.array_equal(jax.tree.leaves(before[1])[0], jax.tree.leaves(state.learner.inner_params)[0])
    np.testing.assert_array_equal(metrics["hypergradient_norm"], [0.0, 0.0])


def test_networks_are_the_same_for_every_method(cartpole):
    first, *others = (programs.init(cartpole, name, SETTING, jax.random.key(1)) for name in methods.METHODS)
    for other in others:
        for get in (lambda s: s.target_params, lambda s: s.learner.outer_params, lambda s: s.learner.inner_params):
            jax.tree.map(np.testing.assert_array_equal, get(first), get(other))
    assert len(jax.tree.leaves(first.learner.outer_params)) == 12
    W = np.asarray(first.learner.outer_params.dynamics[1][0])
    np.testing.assert_allclose(W @ W.T, 2 * np.eye(3), atol=1e-5)


def test_restarted_adam_is_sign_descent(cartpole):
    """Adam's first step has the length of the learning rate in every coordinate, and here every step is a first one."""
    solver = methods.agent(cartpole, "model-free", SETTING._replace(warm_adam=False))
    transition = some_transitions(np.random.default_rng(0), 16, dtype=np.float32)
    target_params = init_q(jax.random.key(1), cartpole, 8)
    omega = init_world_model(jax.random.key(2), cartpole, 3)
    step = jax.jit(solver.step)
    state = solver.init(jax.random.key(0), omega, Batch(transition, target_params))
    for reward in (100.0, -100.0):  # the gradient turns round: moments from the first step would shorten the second
        batch = Batch(transition._replace(reward=jnp.full(16, reward)), target_params)
        before, state = state, step(state, batch, batch)[0]
        for old, new in zip(*map(jax.tree.leaves, (before.inner_params, state.inner_params)), strict=True):
            moved = np.abs(new - old) / SETTING.inner_learning_rate
            assert np.mean(np.abs(moved - 1.0) < 0.02) > 0.6
            assert np.all(moved < 1.02)


def test_inner_steps_are_made_on_one_batch(cartpole):
    """Of model-free learning, whose outer level does nothing, three at a time are three steps."""
    transition = some_transitions(np.random.default_rng(0), 16, dtype=np.float32)
    target_params = init_q(jax.random.key(1), cartpole, 8)
    omega = init_world_model(jax.random.key(2), cartpole, 3)
    batch = Batch(transition, target_params)
    moved = {}
    for inner_steps, calls in ((1, 3), (3, 1), (3, 2)):
        solver = methods.agent(cartpole, "model-free", SETTING._replace(inner_steps=inner_steps))
        state = solver.init(jax.random.key(0), omega, batch)
        for _ in range(calls):
            state, _ = jax.jit(solver.step)(state, batch, batch)
        moved[inner_steps, calls] = state.inner_params
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), moved[1, 3], moved[3, 1])
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (moved[3, 1], moved[3, 2])), strict=True))


def test_bad_arguments(cartpole):
    with pytest.raises(ValueError, match=r"method must be one of funcid-corrected, .*got 'sarsa'"):
        methods.agent(cartpole, "sarsa", SETTING)
    with pytest.raises(ValueError, match=r"steps must be random_steps=20 and a multiple .*got 100"):
        train.train_seeds(cartpole, "mle", SETTING._replace(steps=100), [0])


# Checkpoints.


@pytest.fixture
def saved(tmp_path):
    """(path, checkpoint, shapes of its state and of its metrics)."""
    state = {"theta": jnp.arange(6.0).reshape(2, 3), "key": jax.random.split(jax.random.key(1), 2)}
    rows = [{"loss": np.array([0.5, 0.25]), "finite": np.array([True, False])} for _ in range(3)]
    path, checkpoint = tmp_path / "state.npz", train.Checkpoint(state, 80, rows, 1.5)
    train.save(path, checkpoint)
    shapes = jax.eval_shape(lambda: (state, jax.tree.map(jnp.asarray, rows[0])))
    return path, checkpoint, shapes


def test_checkpoint_comes_back_bit_by_bit(saved):
    path, checkpoint, shapes = saved
    loaded = train.load(path, *shapes)
    assert [name.name for name in path.parent.iterdir()] == [path.name]
    assert loaded[1::2] == checkpoint[1::2]
    jax.tree.map(np.testing.assert_array_equal, loaded.rows, checkpoint.rows)
    assert loaded.state["key"].dtype == checkpoint.state["key"].dtype
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(train._data(a), train._data(b)), loaded.state, checkpoint.state
    )


@pytest.mark.parametrize(
    "damage", ["empty", "text", "cut off", "other shapes", "other metrics", "more leaves", "fewer leaves"]
)
def test_checkpoint_that_does_not_fit_is_left_out_with_a_warning(saved, damage):
    path, _, (state, metrics) = saved
    if damage in ("empty", "text"):
        path.write_bytes(b"" if damage == "empty" else b"no checkpoint")
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:200])
    state |= {
        "other shapes": {"theta": jax.ShapeDtypeStruct((2, 4), jnp.float32)},
        "fewer leaves": {"zeta": state["theta"]},
    }.get(damage, {})
    if damage == "more leaves":
        del state["theta"]
    metrics |= {"more": metrics["loss"]} if damage == "other metrics" else {}
    with pytest.warns(store.StoreWarning, match=r"state.npz is damaged or of another version .* start anew"):
        assert train.load(path, state, metrics) is None


# The commands.

TINY = ("--steps", "1040", "--evaluation-interval", "20")


def lines(directory, name="runs"):
    """The records of a directory by method and seed, in the order of the file."""
    return {(r["method"], r["seed"]): r for r in store.read(directory / f"{name}.jsonl")}


def test_run_command_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch, small):
    args = ("run", "cartpole", *small, "--output-dir")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    cli.main([*args, str(whole), "--method", "funcid"])
    output = capsys.readouterr()
    assert "steps/s" in output.err
    assert "return" in output.err
    assert max(map(len, output.out.splitlines())) <= max(80, len(str(whole)) + 30)
    files = ("config.json", "runs.jsonl", "runs-curves.jsonl", "runs-episodes.jsonl", "table.md", "cartpole.png")
    assert {path.name for path in whole.glob("[!.]*")} == {*files, "cartpole.gif"}
    records = lines(whole)
    assert list(records) == [("funcid-pointwise", 0), ("funcid-pointwise", 1)]
    curves = store.beside(store.Store(whole, "cartpole"), "curves")
    for record in records.values():
        returns = curves[store.key_of(record)]["evaluation_return"]
        assert record["metrics"]["return_auc"] == pytest.approx(np.mean(returns), rel=1e-3)
        assert record["metrics"]["final_return"] == pytest.approx(returns[-1], rel=1e-3)
        assert (
            record["settings"].items()
            >= {"model_width": 3, "steps": 110, "inner_learning_rate": 3e-3, "warm_adam": False}.items()
        )
        assert "damping" not in record["settings"]
    from PIL import Image

    with Image.open(whole / "cartpole.gif") as animation:
        assert animation.n_frames > 1
        assert len(np.unique(np.asarray(animation))) == 4

    save, load, loaded = train.save, train.load, []

    def save_and_stop(*args):
        save(*args)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(train, "CHECKPOINT_INTERVAL", 0.0)
        patch.setattr(train, "save", save_and_stop)
        with pytest.raises(Interrupted):
            cli.main([*args, str(broken), "--method", "funcid"])
    assert not lines(broken)
    assert len(list(broken.glob("funcid-pointwise-*.checkpoint.npz"))) == 1
    monkeypatch.setattr(train, "load", lambda *args: loaded.append(load(*args)) or loaded[-1])
    cli.main([*args, str(broken), "--method", "funcid-pointwise"])
    assert [checkpoint.step for checkpoint in loaded] == [50]
    assert {path.name for path in broken.glob("[!.]*")} == {path.name for path in whole.glob("[!.]*")}
    assert {key: record["metrics"] for key, record in lines(broken).items()} == {
        key: record["metrics"] for key, record in records.items()
    }
    for kind in ("curves", "episodes"):
        name = f"runs-{kind}.jsonl"
        assert (broken / name).read_text() == (whole / name).read_text()
    monkeypatch.setattr(train, "train_seeds", None)  # nothing is left to do
    cli.main([*args, str(broken), "--method", "funcid"])
    with pytest.raises(SystemExit, match="other settings"):
        cli.main([*args, str(broken), "--tau", "0.005"])


@pytest.fixture
def drawn_returns(monkeypatch):
    """Training that computes nothing: returns drawn from settings and seed; gives the units that it was asked for."""
    asked = []

    def stub(task, directory, track, unit):
        (cell,), made = unit.cells, []
        asked.append((cell.how.label, unit.seeds))
        bar = track(cell.how.label, 2)
        for run in unit.runs:
            rng = np.random.default_rng([run.seed, *store.settings_key(run.settings).encode()])
            metrics = {name: float(rng.uniform(9, 500)) for name in ("return_auc", "final_return", "evaluation_return")}
            curves = {name: rng.uniform(1, 9, 3).tolist() for name in methods.CURVES} | {"step": [1020, 1040, 1060]}
            made.append(Result(metrics, {"curves": curves}))
        bar(None, dict.fromkeys(("outer_objective", "evaluation_return", "steps_per_second"), np.ones(2)))
        return made

    monkeypatch.setattr(train, "train", stub)
    return asked


def test_compare_command(tmp_path, drawn_returns):
    args = ("compare", "cartpole", *TINY, "--model-widths", "3", "--output-dir", str(tmp_path))
    cli.main([*args, "--seeds", "1", "--methods", "mle"])
    first = (tmp_path / "runs.jsonl").read_text()
    cli.main([*args, "--seeds", "2", "--methods", "mle", "funcid"])
    assert (tmp_path / "runs.jsonl").read_text().startswith(first)
    assert drawn_returns == [("mle 3", (0,)), ("mle 3", (1,)), ("funcid-pointwise 3", (0, 1))]  # seeds together
    many, several = rl.TOGETHER * len(jax.devices()) + 2, rl.TOGETHER * len(jax.devices())
    drawn_returns.clear()
    cli.main([*args, "--seeds", str(many), "--methods", "vep"])
    assert drawn_returns == [("vep 3", tuple(range(several))), ("vep 3", (several, several + 1))]
    cli.main([*args, "--steps", "1060", "--seeds", "1", "--methods", "mle"])  # the directory holds several lengths
    table = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[:4] for line in table] == [
        ["| funcid-pointwise", "3, 1.04k", "0.003*", "2"],
        ["| mle", "3, 1.04k", "0.003", "2"],
        ["| vep", "3, 1.04k", "0.003", str(many)],
        ["| mle", "3, 1.06k", "0.003", "1"],
    ]
    paired = (tmp_path / "paired.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[:3] for line in paired] == [
        ["| funcid-pointwise", "3, 1.04k", "2"],
        ["| vep", "3, 1.04k", "2"],
    ]
    assert (tmp_path / "cartpole.png").stat().st_size > 20_000
    assert not (tmp_path / "cartpole.gif").exists()  # these runs have no episodes


def test_compare_selects_by_the_mean_return_of_other_seeds(tmp_path, drawn_returns):
    args = ("compare", "pendulum", *TINY, "--model-widths", "3", "32", "--methods", "mle", "omd", "--seeds", "2")
    args = (*args, "--value-bound", "100", "--inner-steps", "2", "--selection-steps", "1060", "--select")
    cli.main([*args, "--output-dir", str(tmp_path)])
    tried = store.read(tmp_path / "selection.jsonl")
    assert len(tried) == len({store.key_of(record) for record in tried}) == 2 * 2 * 4 * 5
    for method, own in (("mle", "warm_adam"), ("omd-cg", "damping")):
        for width in (3, 32):
            names, means = ("inner_learning_rate", own), {}
            for record in tried:
                settings = record["settings"]
                assert (record["seed"] in range(1000, 1005), settings["steps"]) == (True, 1060)
                if (record["method"], settings["model_width"]) == (method, width):
                    key = tuple(settings[name] for name in names)
                    means.setdefault(key, []).append(record["metrics"]["return_auc"])
            assert list(map(len, means.values())) == [5] * 4
            best = max(means, key=lambda key: np.mean(means[key]))
            chosen = [
                record
                for record in store.read(tmp_path / "runs.jsonl")
                if (record["method"], record["settings"]["model_width"]) == (method, width)
            ]
            assert [record["seed"] for record in chosen] == [0, 1]
            for record in chosen:
                wanted = dict(zip(names, best, strict=True)) | {
                    "value_bound": 100.0,
                    "inner_steps": 2,
                    "steps": 1040,
                    "capacity": 0,
                }
                assert record["settings"].items() >= wanted.items()
    assert list(json.loads((tmp_path / "selection.json").read_text())["methods"]) == [
        "mle 3",
        "omd-cg 3",
        "mle 32",
        "omd-cg 32",
    ]


RESULTS = Path(__file__).parents[1] / "benchmarks/results"


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("cartpole-fresh", (
            *("compare", "cartpole", "--value-bound", "100", "--select", "--selection-steps", "15000", "--seeds", "20"),
            *("--methods", "funcid-corrected", "mle"),
        )),
        ("pendulum", (
            *("run", "pendulum", "--seeds", "5", "--steps", "31000", "--value-bound", "1630", "--model-width", "32"),
        )),
    ],
)  # fmt: skip
def test_committed_runs_are_found_and_the_committed_selection_chooses_them(
    tmp_path, drawn_returns, monkeypatch, name, args
):
    for path in (*RESULTS.joinpath(name).glob("*.jsonl"), *RESULTS.joinpath(name).glob("*.json")):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(report, "draw", lambda rows, task, path: path.write_bytes(b"drawn elsewhere"))
    cli.main([*args, "--output-dir", str(tmp_path)])
    assert drawn_returns == []
    assert (tmp_path / "table.md").read_text() == RESULTS.joinpath(name, "table.md").read_text()


def test_every_method_has_as_many_trials():
    trials = {name: method.trials for name, method in methods.METHODS.items()}
    select.check_budgets({name: len(of_method) for name, of_method in trials.items()})
    for name, of_method in trials.items():
        settings = {store.settings_key(methods.settings_of(name, SETTING._replace(**trial))) for trial in of_method}
        assert len(settings) == 4  # what a trial changes is recorded
    published = {name: method.hyper["inner_learning_rate"] for name, method in methods.METHODS.items()}
    assert published == {name: 3e-4 if name.startswith("omd") else 3e-3 for name in methods.METHODS}
    warm = {name for name, method in methods.METHODS.items() if method.hyper["warm_adam"]}
    assert warm == {"funcid-corrected", "mle", "vep", "value-equivalence", "model-free"}
    assert methods.METHODS["omd-cg"].hyper["damping"] == 10.0


def test_value_bound_clips_the_soft_value_of_both_targets():
    transition = Transition(jnp.zeros((2, 4)), jnp.zeros(2, int), jnp.ones(2), jnp.ones((2, 4)), jnp.array([0.0, 1.0]))
    batch = Batch(transition, None)
    bellman = Bellman(
        lambda params, s: 500.0 * jnp.stack([s[:, :2]] * 2),
        lambda w, s, a: (w * (s + 1), w * jnp.ones(2)),
        0.9,
        0.01,
        100.0,
    )
    np.testing.assert_allclose(bellman.true_target(batch), [1.0 + 0.9 * 100.0, 1.0])
    np.testing.assert_allclose(bellman.model_target(-1.0, batch), [-1.0 - 0.9 * 100.0, -1.0])
    np.testing.assert_allclose(bellman._replace(value_bound=None).true_target(batch), [1 + 0.9 * 500.007, 1], rtol=1e-4)


def test_pendulum_by_the_same_agents(tmp_path):
    args = ("--steps", "1040", "--evaluation-interval", "40", "--seeds", "1", "--method", "funcid-learned")
    cli.main(["run", "pendulum", *args, "--output-dir", str(tmp_path)])
    (record,) = store.read(tmp_path / "runs.jsonl")
    assert record["task"] == "pendulum"
    assert -200 * 16.3 < record["metrics"]["final_return"] < -500
    assert record["metrics"]["inner_finite"] == record["metrics"]["adjoint_finite"] == 1.0
    assert (tmp_path / "pendulum.gif").exists()


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        ("run", ("--method", "sarsa"), r"--method must be among funcid-corrected, .*got sarsa"),
        ("compare", ("--methods", "mle", "dqn"), r"--methods must be among .*got dqn"),
        ("run", ("--steps", "1000"), r"--steps must be more than the 1000 random ones .*got 1000"),
        ("run", ("--seeds", "0"), r"--seeds must be at least 1, got 0"),
        ("run", ("--inner-steps", "0"), r"--inner-steps must be at least 1, got 0"),
        ("run", ("--model-width", "0"), r"--model-width must be at least 1, got 0"),
        ("compare", ("--model-widths", "3", "0"), r"--model-widths must be at least 1, got 3, 0"),
        ("run", ("--value-bound", "-1"), r"--value-bound must be positive, got -1"),
        ("compare", ("--select", "--selection-steps", "1500"), r"--selection-steps less the 1000 .*=1000, got 1500"),
        ("compare", ("--select", "--seed", "995"), r"--seeds must leave out the seeds of --select, got 1000 among"),
        ("compare", ("--select", "--warm-adam", "True"), r"--warm-adam must not be given with --select, which chooses"),
        ("compare", ("--select", "--inner-learning-rate", "1"), r"--inner-learning-rate must not be given with --sel"),
        ("run", ("--tau", "1.5"), r"--tau must be in \(0, 1\], got 1.5"),
        ("run", ("--inner-learning-rate", "0"), r"--inner-learning-rate must be positive, got 0"),
        ("run", ("--evaluation-interval", "0"), r"--evaluation-interval must be at least 1, got 0"),
        ("run", ("--steps", "2500"), r"--evaluation-interval must divide the 1500 steps after .*got 1000"),
    ],
)
def test_bad_options(tmp_path, command, args, message):
    directory = tmp_path / "run"
    with pytest.raises(SystemExit, match=message):
        cli.main([command, "cartpole", *args, "--output-dir", str(directory)])
    assert not directory.exists()


def test_interquartile_mean_and_its_interval():
    from scipy import stats

    x = np.random.default_rng(0).lognormal(size=(10, 3))
    np.testing.assert_allclose(report.interquartile_mean(x), stats.trim_mean(x, 0.25, axis=0))
    low, high = report.interval(x)
    assert low.shape == (3,)
    assert np.all((low < report.interquartile_mean(x)) & (report.interquartile_mean(x) < high))
    np.testing.assert_allclose(report.interval(np.ones(10)), 1.0)


def test_curves_are_smoothed_by_the_evaluations_around():
    x = np.random.default_rng(0).normal(size=(3, 9))
    expected = [np.mean(x[:, max(0, i - 2) : i + 3], axis=1) for i in range(9)]
    np.testing.assert_allclose(report.smoothed(x), np.stack(expected, axis=1))


def test_report_shows_what_the_records_hold(tmp_path):
    """A method that the table does not know, runs without curves, and one that diverged."""
    where = store.Store(tmp_path, "cartpole")
    setting = methods.settings_of("mle", SETTING)

    def add(method, seed, auc, beside):
        returns = dict.fromkeys(("return_auc", "final_return", "evaluation_return"), auc)
        result = Result(returns | {"outer_finite": np.isfinite(auc)}, beside)
        store.add(where, [(store.Run(method, seed, setting), result)])

    curves = {"curves": {"step": [50, 80], **{name: [1.0, 2.0] for name in methods.CURVES}}}
    states = [[0.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.1, 0.0]]
    add("dreamer", 0, 30.0, {})
    add("mle", 1, np.nan, curves | {"episodes": {"states": states[:1]}})
    add("mle", 0, 20.0, curves | {"episodes": {"states": states}})
    made = report.report("cartpole", tmp_path)
    cells = [line.split(" | ") for line in made.texts["table.md"].splitlines()[2:]]
    assert [(row[0], row[3], row[4], row[5]) for row in cells] == [
        ("| mle", "2", "1", "nan"),
        ("| dreamer", "1", "0", "30"),
    ]
    for name, draw in made.figures.items():
        draw(tmp_path / name)
    from PIL import Image

    with Image.open(tmp_path / "cartpole.gif") as animation:
        assert animation.n_frames == 2  # of the run that did not diverge


def test_seeds_are_paired_with_those_of_maximum_likelihood():
    from scipy import stats

    rng = np.random.default_rng(0)
    setting = methods.settings_of("mle", SETTING)

    def row(method, seeds, auc, **settings):
        return report.Row(method, setting | settings, tuple(seeds), 0, auc, auc, np.array([]), {})

    x, y = rng.uniform(50, 300, size=(2, 12))
    shifted = row("vep", range(2, 14), 1.5 * np.append(y[2:], [1e6, 1e6]))
    rows = [row("mle", range(12), y), row("vep", range(12), x), shifted, row("vep", range(12), x, model_width=32)]
    plain, scaled = report.compare(rows)  # at width 32 there is no maximum likelihood
    mean, low, high = plain.difference
    assert mean == pytest.approx(np.mean(x - y))
    assert low < mean < high
    assert plain.p_value == pytest.approx(stats.wilcoxon(x - y).pvalue)
    assert plain.ratio[1] < plain.ratio[0] < plain.ratio[2]
    assert scaled.seeds == 10  # those that both have, and the same in every resample
    np.testing.assert_allclose(scaled.ratio, 1.5)
    twice = [*rows, row("mle", range(12), y, tau=0.5)]
    assert report.compare(twice) == []


def test_report_without_finished_runs(tmp_path):
    store.add(
        store.Store(tmp_path, "cartpole", "selection"), [(store.Run("mle", 1000, {}), Result({"return_auc": 1.0}))]
    )
    with pytest.raises(SystemExit, match=r"runs.jsonl holds no finished runs yet; run the same command again"):
        cli.main(["report", str(tmp_path)])


@pytest.mark.parametrize("task", ["cartpole", "pendulum"])
def test_picture_shows_the_state(task):
    size = {"cartpole": 4, "pendulum": 2}[task]
    upright, leaning = (
        pictures.PICTURES[task]([angle if i == {"cartpole": 2, "pendulum": 0}[task] else 0.0 for i in range(size)])
        for angle in (0.0, 0.5)
    )
    pole = [np.mean(np.nonzero(np.asarray(image) == 2)[1]) for image in (upright, leaning)]
    assert pole[0] == pytest.approx(upright.width / 2, abs=1)
    assert abs(pole[1] - pole[0]) > 5


@pytest.mark.slow
def test_smoke_run_learns(tmp_path):
    """Two seeds, 3,000 steps: a random policy's return is about 22."""
    cli.main(["run", "cartpole", "--seeds", "2", "--steps", "3000", "--output-dir", str(tmp_path)])
    records = store.read(tmp_path / "runs.jsonl")
    assert np.mean([record["metrics"]["final_return"] for record in records]) > 35
    assert all(record["metrics"]["outer_finite"] == 1.0 for record in records)
