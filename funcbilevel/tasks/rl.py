r"""Model-based reinforcement learning as a functional bilevel problem, for any environment with few actions.

The outer level learns a world model omega: the next observation s'_omega(s, a) and the reward r_omega(s, a). The inner
level is the action-value function h that solves the soft Bellman equation *under the model*; the outer objective is the
Bellman error of that h at the *true* transitions,

.. math::
    L_{in}(\omega, h) &= E\,\tfrac12 |h(s, a) - r_\omega(s, a) - \gamma (1 - done) V(s'_\omega(s, a))|^2, \\
    L_{out}(\omega, h) &= E\,\tfrac12 |h(s, a) - r - \gamma (1 - done) V(s')|^2, \qquad
    V(s) = \alpha \log \sum_a \exp(\min_j Q_j(s, a) / \alpha),

with Q the two target networks, whose parameters are part of the batch. h has two outputs, one per network of double
Q-learning, and is a function of the pair (s, a): its derivative C = d^2_h L_in is then 1/n times the identity, where it
would be singular at the actions that were not taken if h were a function of s alone. The pointwise adjoint is then
a_i = -(h(s_i, a_i) - y_i), y_i the true target. It is unbiased for random transitions too, as long as `done`, which
both levels take from the data, is decided by (s, a): the cross derivative of the inner objective holds it.

Every agent here is one `fb.bilevel` solver that makes one inner and one outer step per step of the environment.
Training is one compiled scan over environment steps, evaluation included, vmapped over seeds and spread over devices.

References:
    Petrulionyte, Mairal, Arbel, NeurIPS 2024, https://arxiv.org/abs/2403.20233, section 4.2;
    Nikishin, Abachi, Agarwal, Bacon, *Control-Oriented Model-Based Reinforcement Learning with Implicit
    Differentiation*, AAAI 2022, https://arxiv.org/abs/2106.03273 (OMD).
"""

import itertools
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

import funcbilevel as fb

# Environments.


class Environment(NamedTuple):
    """An environment with finitely many actions, as pure functions of one state.

    Attributes:
        name: of the task.
        observation_size: of the vector that an agent sees.
        num_actions: actions are 0, ..., num_actions - 1.
        horizon: steps after which an episode is cut off.
        initial: `key -> state`.
        transition: `(state, action) -> next state`.
        observation: `state -> [observation_size]`.
        reward: `(state, action, next state) -> scalar`.
        terminal: `state -> bool`; being cut off is not being terminal.
    """

    name: str
    observation_size: int
    num_actions: int
    horizon: int
    initial: Callable[[Any], Any]
    transition: Callable[[Any, jax.Array], Any]
    observation: Callable[[Any], jax.Array]
    reward: Callable[[Any, jax.Array, Any], jax.Array]
    terminal: Callable[[Any], jax.Array]


def from_gymnasium(
    name: str, functional: Any, num_actions: int, horizon: int, control: Callable[[jax.Array], jax.Array]
) -> Environment:
    """The environment of a `gymnasium.experimental.functional.FuncEnv`; `control` makes its action of ours."""
    return Environment(
        name=name,
        observation_size=functional.observation_space.shape[0],
        num_actions=num_actions,
        horizon=horizon,
        initial=functional.initial,
        transition=lambda state, action: functional.transition(state, control(action), None),
        observation=lambda state: functional.observation(state, None),
        reward=lambda state, action, after: jnp.asarray(functional.reward(state, control(action), after, None)),
        terminal=lambda state: jnp.asarray(functional.terminal(state, None)),
    )


# Networks: plain functions on lists of (matrix, bias).

Layers: TypeAlias = list[tuple[jax.Array, jax.Array]]


def init_mlp(key: Any, sizes: Sequence[int]) -> Layers:
    """Orthogonal matrices, of norm sqrt(2) and in the last layer of norm 0.01, as in the published code."""
    keys = jax.random.split(key, len(sizes) - 1)
    scales = [np.sqrt(2.0)] * (len(sizes) - 2) + [0.01]
    return [
        (jax.nn.initializers.orthogonal(scale)(key, (p, q), jnp.float32), jnp.zeros(q, jnp.float32))
        for key, scale, p, q in zip(keys, scales, sizes[:-1], sizes[1:], strict=True)
    ]


def mlp(layers: Layers, x: jax.Array) -> jax.Array:
    """[n, p] -> [n, q] with rectified hidden layers; inside the batch comes last, which is faster on CPUs."""
    z = x.T
    *hidden, last = layers
    for W, b in hidden:
        z = jax.nn.relu(W.T @ z + b[:, None])
    return (last[0].T @ z + last[1][:, None]).T


def init_q(key: Any, environment: Environment, width: int) -> Layers:
    """Two Q-networks: every array has a leading axis of 2."""
    sizes = (environment.observation_size, width, width, environment.num_actions)
    return jax.lax.map(lambda key: init_mlp(key, sizes), jax.random.split(key))


def q_values(params: Layers, observation: jax.Array) -> jax.Array:
    """Q_j(s, .) of both networks: [n, k] -> [2, n, A]."""
    return jax.vmap(mlp, (0, None))(params, observation)


class WorldModel(NamedTuple):
    """omega: the parameters of the two networks of the world model.

    Attributes:
        dynamics: of (s, a) -> s'.
        reward: of (s, a) -> r.
    """

    dynamics: Layers
    reward: Layers


def init_world_model(key: Any, environment: Environment, width: int) -> WorldModel:
    """Two networks of two hidden layers each."""
    k, A = environment.observation_size, environment.num_actions
    dynamics_key, reward_key = jax.random.split(key)
    return WorldModel(init_mlp(dynamics_key, (k + A, width, width, k)), init_mlp(reward_key, (k + A, width, width, 1)))


def predict(num_actions: int, omega: WorldModel, observation: jax.Array, action: jax.Array) -> Any:
    """(s'_omega, r_omega) at observations [n, k] and actions [n]: [n, k] and [n]."""
    x = jnp.hstack([observation, jax.nn.one_hot(action, num_actions, dtype=observation.dtype)])
    return mlp(omega.dynamics, x), mlp(omega.reward, x)[:, 0]


# The problem.


class Transition(NamedTuple):
    """Transitions of the environment.

    Attributes:
        observation: s, [n, k].
        action: a, [n], int32.
        reward: r, [n].
        next_observation: s', [n, k].
        terminal: whether s' is terminal, [n], 0.0 or 1.0. An episode that is cut off does not end in a terminal state.
    """

    observation: jax.Array
    action: jax.Array
    reward: jax.Array
    next_observation: jax.Array
    terminal: jax.Array


class Batch(NamedTuple):
    """A batch of either level; both get the same one, so that the pointwise adjoint is exact.

    Attributes:
        transition: transitions drawn from the replay buffer.
        target_params: of the target networks, as they stand at this step.
    """

    transition: Transition
    target_params: Any


QValues: TypeAlias = Callable[[Any, jax.Array], jax.Array]  # (params, [n, k]) -> [2, n, A]
Predict: TypeAlias = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def soft_value(q: jax.Array, alpha: float) -> jax.Array:
    """V = alpha log sum_a exp(min_j Q_j / alpha): [2, n, A] -> [n]."""
    return alpha * jax.nn.logsumexp(jnp.min(q, axis=0) / alpha, axis=-1)


class Bellman(NamedTuple):
    """What the objectives are made of.

    Attributes:
        q_values: the Q-networks, `(params, observation) -> [2, n, A]`.
        predict: the world model, `(omega, observation, action) -> (next observation, reward)`.
        discount: gamma.
        alpha: the temperature of the soft value.
        value_bound: V is clipped to it, if it is given.
    """

    q_values: QValues
    predict: Predict
    discount: float
    alpha: float
    value_bound: float | None = None

    def target(self, reward: jax.Array, next_observation: jax.Array, batch: Batch) -> jax.Array:
        """y = r + gamma (1 - done) V(s') with the target networks, [n]."""
        V = soft_value(self.q_values(batch.target_params, next_observation), self.alpha)
        bounded = V if self.value_bound is None else jnp.clip(V, -self.value_bound, self.value_bound)
        return reward + self.discount * (1.0 - batch.transition.terminal) * bounded

    def true_target(self, batch: Batch) -> jax.Array:
        """The target at the true transitions, [n]."""
        return self.target(batch.transition.reward, batch.transition.next_observation, batch)

    def model_target(self, omega: Any, batch: Batch) -> jax.Array:
        """The target under the world model, [n]."""
        next_observation, reward = self.predict(omega, batch.transition.observation, batch.transition.action)
        return self.target(reward, next_observation, batch)

    def model_error(self, omega: Any, v: jax.Array, batch: Batch) -> jax.Array:
        """The Bellman error of v, [n, 2], under the world model."""
        return squared_error(v, self.model_target(omega, batch))

    def true_error(self, omega: Any, v: jax.Array, batch: Batch) -> jax.Array:
        """The Bellman error of v, [n, 2], at the true transitions."""
        return squared_error(v, self.true_target(batch))

    def prediction_error(self, omega: Any, v: jax.Array, batch: Batch) -> jax.Array:
        """The squared error of the world model: maximum likelihood under Gaussian noise."""
        transition = batch.transition
        next_observation, reward = self.predict(omega, transition.observation, transition.action)
        errors = jnp.sum((next_observation - transition.next_observation) ** 2, axis=-1)
        return 0.5 * jnp.mean(errors + (reward - transition.reward) ** 2)

    def value_error(self, omega: Any, v: jax.Array, batch: Batch) -> jax.Array:
        """The squared difference of both targets: value equivalence at the current value function."""
        return 0.5 * jnp.mean((self.model_target(omega, batch) - self.true_target(batch)) ** 2)

    def model(self, init: Callable[[Any, Any], Any]) -> fb.Model:
        """h: (s, a) -> the values of both networks, [n, 2]; `init(key, (s, a)) -> params`."""

        def apply(params: Any, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            observation, action = inputs
            q = self.q_values(params, observation)
            taken = jax.nn.one_hot(action, q.shape[-1], dtype=q.dtype)  # a gather's derivative would be a scatter
            return jnp.einsum("jna,na->nj", q, taken)

        return fb.from_function(init, apply)


def squared_error(v: jax.Array, target: jax.Array) -> jax.Array:
    """mean_i 1/2 |v_i - y_i|^2 for v [n, 2] and y [n]."""
    return 0.5 * jnp.mean(jnp.sum((v - target[:, None]) ** 2, axis=-1))


def _inputs(batch: Batch) -> tuple[jax.Array, jax.Array]:
    return batch.transition.observation, batch.transition.action


def bellman_problem(bellman: Bellman) -> fb.FunctionalProblem:
    """The bilevel problem of this page: inner level under the model, outer level at the true transitions."""
    return fb.FunctionalProblem(bellman.model_error, bellman.true_error, _inputs)


def likelihood_problem(bellman: Bellman) -> fb.FunctionalProblem:
    """MLE: the model is fitted to the transitions, whatever the value function."""
    return fb.FunctionalProblem(bellman.model_error, bellman.prediction_error, _inputs)


def value_equivalence_problem(bellman: Bellman) -> fb.FunctionalProblem:
    """VEP: the model is fitted to the targets of the current value function (Grimm et al. 2020)."""
    return fb.FunctionalProblem(bellman.model_error, bellman.value_error, _inputs)


def model_free_problem(bellman: Bellman) -> fb.FunctionalProblem:
    """Soft double Q-learning: both levels at the true transitions, so that there is nothing for a model to do."""
    return fb.FunctionalProblem(bellman.true_error, bellman.true_error, _inputs)


# Agents.


class Setting(NamedTuple):
    """What decides a run's numbers.

    Attributes:
        model_width: of the hidden layers of the world model.
        steps: of the environment, the first random ones included.
        inner_steps: of Adam on theta per step of the environment, all on one batch; one outer step follows.
        inner_learning_rate, outer_learning_rate: of Adam on theta and omega.
        warm_adam: whether Adam's moments on theta are kept from step to step. The published code restarts them for
            FuncID and OMD, and keeps them for MLE and VEP. The first step of Adam is learning rate times sign.
        tau: the target networks move by tau (theta - target) per step.
        adjoint_learning_rate: of Adam on the learned adjoint, one step per step of the environment.
        cg_steps, damping: of OMD's linear system.
        q_width: of the hidden layers of the Q-networks.
        batch_size: transitions drawn from the buffer, with replacement.
        alpha, epsilon: the policy is softmax(mean_j Q_j / alpha), and with probability epsilon uniform.
        discount: gamma.
        value_bound: the soft value in all targets is clipped to it; None as published. A reward of at most 1 gives
            values of at most 1 / (1 - gamma), and without a bound some long runs of every kind diverge.
        random_steps: steps with uniform actions and without learning, at the beginning.
        capacity: transitions that the replay buffer keeps; 0: all.
        evaluation_interval: steps between evaluations.
        evaluation_episodes: of an evaluation; they follow the soft policy, without epsilon.
    """

    model_width: int = 3
    steps: int = 50_000
    inner_steps: int = 1
    inner_learning_rate: float = 3e-3
    outer_learning_rate: float = 1e-3
    warm_adam: bool = True
    tau: float = 0.01
    adjoint_learning_rate: float = 3e-3
    cg_steps: int = 5
    damping: float = 10.0
    q_width: int = 32
    batch_size: int = 256
    alpha: float = 0.01
    epsilon: float = 0.1
    discount: float = 0.99
    value_bound: float | None = None
    random_steps: int = 1000
    capacity: int = 0
    evaluation_interval: int = 1000
    evaluation_episodes: int = 10


def _product(**values: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


class Method(NamedTuple):
    """A way to learn the world model.

    Attributes:
        problem: which outer objective.
        estimator: how it is differentiated.
        chosen: the settings in which it differs from the others.
        trials: the settings among which it may choose, as many for every method.
    """

    problem: Callable[[Bellman], fb.FunctionalProblem]
    estimator: Callable[[Setting], fb.Estimator]
    chosen: dict[str, Any]
    trials: Sequence[dict[str, Any]] = _product(inner_learning_rate=(3e-4, 1e-3, 3e-3), warm_adam=(True, False))


def _alternating(setting: Setting) -> fb.Estimator:
    return fb.alternating()


def _pointwise(setting: Setting) -> fb.Estimator:
    return fb.funcid(fb.pointwise_adjoint())


def _learned(setting: Setting) -> fb.Estimator:
    return fb.funcid(fb.learned_adjoint(optax.adam(setting.adjoint_learning_rate), num_steps=1))


def _omd_cg(setting: Setting) -> fb.Estimator:
    return fb.aid(fb.cg(setting.cg_steps, setting.damping))


def _omd_identity(setting: Setting) -> fb.Estimator:
    return fb.aid(fb.identity(), warm_start=False)


METHODS: dict[str, Method] = {
    "funcid-pointwise": Method(bellman_problem, _pointwise, {"inner_learning_rate": 3e-3, "warm_adam": False}),
    "funcid-learned": Method(
        bellman_problem,
        _learned,
        {"inner_learning_rate": 3e-3, "warm_adam": False, "adjoint_learning_rate": 3e-3},
        _product(inner_learning_rate=(1e-3, 3e-3), adjoint_learning_rate=(1e-3, 3e-3, 1e-2)),
    ),
    "omd-cg": Method(
        bellman_problem,
        _omd_cg,
        {"inner_learning_rate": 3e-4, "warm_adam": False, "cg_steps": 5, "damping": 10.0},
        _product(inner_learning_rate=(3e-4, 1e-3), damping=(100.0, 1000.0, 10_000.0)),
    ),
    "omd-identity": Method(bellman_problem, _omd_identity, {"inner_learning_rate": 3e-4, "warm_adam": False}),
    "mle": Method(likelihood_problem, _alternating, {"inner_learning_rate": 3e-3}),
    "vep": Method(value_equivalence_problem, _alternating, {"inner_learning_rate": 3e-3}),
    "model-free": Method(model_free_problem, _alternating, {"inner_learning_rate": 3e-3}),
}


def bellman_of(environment: Environment, setting: Setting) -> Bellman:
    """The networks and constants of a setting."""
    return Bellman(
        q_values, partial(predict, environment.num_actions), setting.discount, setting.alpha, setting.value_bound
    )


def agent(environment: Environment, method: str, setting: Setting) -> fb.BilevelSolver:
    """The solver of a method.

    Raises:
        ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    bellman = bellman_of(environment, setting)
    b1, b2 = (0.9, 0.999) if setting.warm_adam else (0.0, 0.0)  # without memory every step is a first one
    return fb.bilevel(
        METHODS[method].problem(bellman),
        bellman.model(lambda key, inputs: init_q(key, environment, setting.q_width)),
        METHODS[method].estimator(setting),
        inner_optimizer=optax.adam(setting.inner_learning_rate, b1, b2),
        outer_optimizer=optax.adam(setting.outer_learning_rate),
        inner_steps=setting.inner_steps,
    )


# Replay buffer: one row per transition, so that writing and drawing are one operation each.


def row_size(environment: Environment) -> int:
    """Numbers per transition."""
    return 2 * environment.observation_size + 3


def to_row(transition: Transition) -> jax.Array:
    """[..., row_size], of transitions with any leading axes."""
    scalars = [transition.action, transition.reward, transition.terminal]
    scalars = [jnp.asarray(x, jnp.float32)[..., None] for x in scalars]
    return jnp.concatenate([transition.observation, transition.next_observation, *scalars], axis=-1)


def from_row(row: jax.Array) -> Transition:
    """The inverse of `to_row`."""
    k = (row.shape[-1] - 3) // 2
    action, reward, terminal = (row[..., 2 * k + i] for i in range(3))
    return Transition(row[..., :k], action.astype(jnp.int32), reward, row[..., k : 2 * k], terminal)


def write(buffer: jax.Array, step: jax.Array, row: jax.Array) -> jax.Array:
    """The buffer, [capacity, row_size], with the row of this step, over the oldest one if it is full."""
    return jax.lax.dynamic_update_slice(buffer, row[None], (step % buffer.shape[0], 0))


def draw(buffer: jax.Array, step: jax.Array, uniform: jax.Array) -> Transition:
    """Transitions of steps up to this one, uniformly with replacement; `uniform` is in [0, 1)."""
    size = jnp.minimum(step + 1, buffer.shape[0])
    index = jnp.minimum((uniform * size.astype(uniform.dtype)).astype(jnp.int32), size - 1)
    return from_row(buffer[index])


# Training.


class State(NamedTuple):
    """What training carries from step to step.

    Attributes:
        learner: the solver's state: world model, Q-networks, optimizers, adjoint.
        target_params: of the target networks.
        world: the environment's state.
        episode_step: steps since the episode's beginning.
        buffer: [capacity, row_size].
        key: the random key of the next chunk.
    """

    learner: fb.BilevelState
    target_params: Any
    world: Any
    episode_step: jax.Array
    buffer: jax.Array
    key: Any


class Draws(NamedTuple):
    """The random numbers of one step, drawn for a whole chunk at once.

    Attributes:
        fresh: an initial state, in case that the episode ends.
        gumbel: [A], with which the soft policy draws its action.
        explore: whether to take the random action.
        random_action: uniform.
        uniform: [batch_size], to draw from the replay buffer.
    """

    fresh: Any
    gumbel: jax.Array
    explore: jax.Array
    random_action: jax.Array
    uniform: jax.Array


def init(environment: Environment, method: str, setting: Setting, key: Any) -> State:
    """The state before the first step; its networks are the same for every method."""
    learner_key, model_key, world_key, key = jax.random.split(key, 4)
    k = environment.observation_size
    some = Transition(jnp.zeros((1, k)), jnp.zeros(1, jnp.int32), jnp.zeros(1), jnp.zeros((1, k)), jnp.zeros(1))
    q_key, learner_key = jax.random.split(learner_key)
    q_params = init_q(q_key, environment, setting.q_width)
    target_params = jax.tree.map(jnp.copy, q_params)  # its own buffers, to be donated
    omega = init_world_model(model_key, environment, setting.model_width)
    return State(
        learner=agent(environment, method, setting).init(learner_key, omega, Batch(some, target_params), q_params),
        target_params=target_params,
        world=environment.initial(world_key),
        episode_step=jnp.zeros((), jnp.int32),
        buffer=jnp.zeros((setting.capacity or setting.steps, row_size(environment)), jnp.float32),
        key=key,
    )


def draws(environment: Environment, setting: Setting, key: Any, num_steps: int) -> Draws:
    """The random numbers of `num_steps` steps, on a leading axis."""
    keys = jax.random.split(key, 5)
    A = environment.num_actions
    return Draws(
        jax.vmap(environment.initial)(jax.random.split(keys[0], num_steps)),
        jax.random.gumbel(keys[1], (num_steps, A)),
        jax.random.bernoulli(keys[2], setting.epsilon, (num_steps,)),
        jax.random.randint(keys[3], (num_steps,), 0, A),
        jax.random.uniform(keys[4], (num_steps, setting.batch_size)),
    )


def soft_action(q_params: Any, observation: jax.Array, gumbel: jax.Array, alpha: float) -> jax.Array:
    """An action from softmax(mean_j Q_j / alpha) at observations [n, k], by gumbel noise [n, A]: [n]."""
    return jnp.argmax(jnp.mean(q_values(q_params, observation), axis=0) / alpha + gumbel, axis=-1)


def interact(
    environment: Environment, world: Any, episode_step: jax.Array, action: jax.Array, fresh: Any
) -> tuple[Transition, Any, jax.Array]:
    """One step of the environment: the transition, and the state and its episode's step after it.

    At the end of an episode that is the state `fresh`.
    """
    after = environment.transition(world, action)
    terminal = environment.terminal(after)
    over = terminal | (episode_step + 1 >= environment.horizon)
    transition = Transition(
        environment.observation(world),
        action,
        environment.reward(world, action, after),
        environment.observation(after),
        terminal,
    )
    world = jax.tree.map(lambda new, old: jnp.where(over, new, old), fresh, after)
    return transition, world, jnp.where(over, 0, episode_step + 1)


def explore(environment: Environment, setting: Setting, state: State) -> State:
    """The first `random_steps` steps: uniform actions, no learning."""
    key, draws_key = jax.random.split(state.key)
    steps = jnp.arange(setting.random_steps)
    noise = draws(environment, setting._replace(batch_size=1), draws_key, setting.random_steps)

    def step(carry: Any, x: tuple[jax.Array, Draws]) -> tuple[Any, None]:
        world, episode_step, buffer = carry
        i, noise = x
        transition, world, episode_step = interact(environment, world, episode_step, noise.random_action, noise.fresh)
        return (world, episode_step, write(buffer, i, to_row(transition))), None

    carry = (state.world, state.episode_step, state.buffer)
    (world, episode_step, buffer), _ = jax.lax.scan(step, carry, (steps, noise))
    return state._replace(world=world, episode_step=episode_step, buffer=buffer, key=key)


def learn(
    environment: Environment,
    solver: fb.BilevelSolver,
    setting: Setting,
    num_steps: int,
    state: State,
    first_step: jax.Array,
) -> tuple[State, dict[str, jax.Array]]:
    """`num_steps` steps of acting and learning in one scan; metrics are means over them, of flags whether all are true.

    `first_step` counts from the environment's first step and is the same for all seeds: the buffer is then written in
    one place for all of them.
    """
    key, draws_key = jax.random.split(state.key)
    noise = draws(environment, setting, draws_key, num_steps)

    def step(state: State, x: tuple[jax.Array, Draws]) -> tuple[State, dict[str, jax.Array]]:
        i, noise = x
        theta = state.learner.inner_params
        observation = environment.observation(state.world)
        action = soft_action(theta, observation[None], noise.gumbel[None], setting.alpha)[0]
        action = jnp.where(noise.explore, noise.random_action, action)
        transition, world, episode_step = interact(environment, state.world, state.episode_step, action, noise.fresh)
        buffer = write(state.buffer, i, to_row(transition))
        batch = Batch(draw(buffer, i, noise.uniform), state.target_params)
        learner, metrics = solver.step(state.learner, batch, batch)
        target_params = jax.tree.map(
            lambda theta, target: target + setting.tau * (theta - target), learner.inner_params, state.target_params
        )
        return State(learner, target_params, world, episode_step, buffer, state.key), metrics

    state, metrics = jax.lax.scan(step, state, (first_step + jnp.arange(num_steps), noise))
    return state._replace(key=key), jax.tree.map(lambda x: jnp.all(x) if x.dtype == bool else jnp.mean(x), metrics)


def evaluate(environment: Environment, setting: Setting, q_params: Any, key: Any) -> jax.Array:
    """Returns, without discount, of `evaluation_episodes` episodes of the soft policy; ends with the longest."""
    initial_key, key = jax.random.split(key)
    n = setting.evaluation_episodes
    worlds = jax.vmap(environment.initial)(jax.random.split(initial_key, n))

    def running(carry: Any) -> jax.Array:
        i, _, alive, _ = carry
        return (i < environment.horizon) & jnp.any(alive)

    def step(carry: Any) -> Any:
        i, worlds, alive, returns = carry
        gumbel = jax.random.gumbel(jax.random.fold_in(key, i), (n, environment.num_actions))
        actions = soft_action(q_params, jax.vmap(environment.observation)(worlds), gumbel, setting.alpha)
        after = jax.vmap(environment.transition)(worlds, actions)
        rewards = jax.vmap(environment.reward)(worlds, actions, after)
        returns = returns + jnp.where(alive, rewards, 0.0)
        return i + 1, after, alive & ~jax.vmap(environment.terminal)(after), returns

    start = (jnp.zeros((), jnp.int32), worlds, jnp.ones(n, bool), jnp.zeros(n, jnp.float32))
    return jax.lax.while_loop(running, step, start)[3]


def rollout(environment: Environment, setting: Setting, q_params: Any, key: Any) -> tuple[Any, jax.Array]:
    """The states of one episode of the soft policy, on a leading axis of `horizon`, and its length."""
    initial_key, key = jax.random.split(key)
    gumbels = jax.random.gumbel(key, (environment.horizon, environment.num_actions))

    def step(carry: Any, gumbel: jax.Array) -> tuple[Any, Any]:
        world, alive = carry
        action = soft_action(q_params, environment.observation(world)[None], gumbel[None], setting.alpha)[0]
        after = environment.transition(world, action)
        return (after, alive & ~environment.terminal(after)), (world, alive)

    _, (worlds, alive) = jax.lax.scan(step, (environment.initial(initial_key), jnp.array(True)), gumbels)
    return worlds, jnp.sum(alive)


class Programs(NamedTuple):
    """The compiled programs of a run; all take and give a leading axis of seeds.

    Attributes:
        init: `keys -> state`.
        explore: `state -> state`, the random steps.
        chunk: `(state, first step) -> (state, metrics)`, one evaluation interval of steps and the evaluation after it.
            The state is donated.
    """

    init: Callable[[Any], State]
    explore: Callable[[State], State]
    chunk: Callable[[State, Any], tuple[State, dict[str, jax.Array]]]


@cache
def programs(environment: Environment, method: str, setting: Setting, num_devices: int = 1) -> Programs:
    """The programs of a method; the same arguments give the same ones, compiled once."""
    solver = agent(environment, method, setting)

    def chunk(state: State, first_step: Any) -> tuple[State, dict[str, jax.Array]]:
        state, metrics = learn(environment, solver, setting, setting.evaluation_interval, state, first_step)
        key, evaluation_key = jax.random.split(state.key)
        returns = evaluate(environment, setting, state.learner.inner_params, evaluation_key)
        return state._replace(key=key), metrics | {"evaluation_return": jnp.mean(returns)}

    @jax.jit
    def initial(keys: Any) -> State:
        # Not vmapped: jaxlib 0.10 can deadlock in several batched factorisations at a time.
        return jax.lax.map(partial(init, environment, method, setting), keys)

    return Programs(
        initial,
        spread(partial(explore, environment, setting), num_devices, donate_argnums=0),
        spread(chunk, num_devices, donate_argnums=0),
    )


def spread(f: Callable[..., Any], num_devices: int, **options: Any) -> Callable[..., Any]:
    """`f` compiled for a leading axis of seeds in its first argument and its results; each device has its share."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("seeds",))
    seeds, same = PartitionSpec("seeds"), PartitionSpec()

    def share(first: Any, *others: Any) -> Any:
        return jax.vmap(f, (0, *[None] * len(others)))(first, *others)

    def all_seeds(first: Any, *others: Any) -> Any:
        in_specs = (seeds, *[same] * len(others))
        return jax.shard_map(share, mesh=mesh, in_specs=in_specs, out_specs=seeds, check_vma=False)(first, *others)

    return jax.jit(all_seeds, **options)


def spread_over(num_seeds: int) -> int:
    """The largest number of devices that the seeds can be spread over evenly."""
    return max(n for n in range(1, len(jax.devices()) + 1) if num_seeds % n == 0)


class Curves(NamedTuple):
    """A run's course.

    Attributes:
        step: of the environment, at the end of each evaluation interval, [points].
        values: name -> [seeds, points]: `evaluation_return` at that step, and of the solver's metrics the mean over the
            interval (of flags, whether all are true).
    """

    step: np.ndarray[Any, Any]
    values: dict[str, np.ndarray[Any, Any]]


Callback: TypeAlias = Callable[[int, dict[str, np.ndarray[Any, Any]]], Any]


def train(
    environment: Environment,
    method: str,
    setting: Setting,
    seeds: Sequence[int],
    *,
    callback: Callback | None = None,
    checkpoint: Path | None = None,
    checkpoint_interval: float = 60.0,
) -> tuple[State, Curves]:
    """Trains all seeds together, spread over the devices; the host comes in between evaluation intervals.

    Arguments:
        environment, method, setting: what to train.
        seeds: of the random numbers, one run each.
        callback: called after each interval with the number of its steps and the metrics, name -> [seeds]; and once
            at the beginning, if the checkpoint holds steps made before.
        checkpoint: a file from which to go on, if it exists, and to which the state is saved.
        checkpoint_interval: seconds between saves.

    Returns:
        The state, with a leading axis of seeds, and the curves.

    Raises:
        ValueError: there is no such method, or the steps after the random ones are not whole evaluation intervals.
    """
    if (after := setting.steps - setting.random_steps) <= 0 or after % setting.evaluation_interval:
        raise ValueError(
            f"train: steps must be random_steps={setting.random_steps} and a multiple of "
            f"evaluation_interval={setting.evaluation_interval}, got {setting.steps}."
        )
    compiled = programs(environment, method, setting, spread_over(len(seeds)))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    rows: list[dict[str, np.ndarray[Any, Any]]] = []
    step, saved = setting.random_steps, time.monotonic()
    if checkpoint is not None and checkpoint.exists():
        state, step, rows = _load(checkpoint, jax.eval_shape(compiled.init, keys))
        if callback is not None and rows:
            callback(step - setting.random_steps, rows[-1])
    else:
        state = compiled.explore(compiled.init(keys))
    while step < setting.steps:
        state, metrics = compiled.chunk(state, np.int32(step))
        step += setting.evaluation_interval
        rows.append(jax.tree.map(np.asarray, metrics))
        if callback is not None:
            callback(setting.evaluation_interval, rows[-1])
        if checkpoint is not None and step < setting.steps and time.monotonic() - saved >= checkpoint_interval:
            _save(checkpoint, state, step, rows)
            saved = time.monotonic()
    steps = setting.random_steps + setting.evaluation_interval * np.arange(1, len(rows) + 1)
    return state, Curves(steps, {name: np.stack([row[name] for row in rows], axis=1) for name in rows[-1]})


def _save(path: Path, state: State, step: int, rows: list[dict[str, np.ndarray[Any, Any]]]) -> None:
    """All of it in one file, which is complete or the one before."""
    leaves = [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(state)]
    arrays = {f"leaf{i}": np.asarray(x) for i, x in enumerate(leaves)}
    curves = {f"curve/{name}": np.stack([row[name] for row in rows]) for name in rows[-1]}
    temporary = path.with_suffix(".partial.npz")
    np.savez(temporary, step=step, **arrays, **curves)  # pyright: ignore[reportArgumentType]
    temporary.replace(path)


def _load(path: Path, like: Any) -> tuple[State, int, list[dict[str, np.ndarray[Any, Any]]]]:
    with np.load(path) as file:
        shapes, structure = jax.tree.flatten(like)
        leaves = [jnp.asarray(file[f"leaf{i}"]) for i in range(len(shapes))]
        leaves = [jax.random.wrap_key_data(x) if _is_key(shape) else x for x, shape in zip(leaves, shapes, strict=True)]
        names = [name for name in file.files if name.startswith("curve/")]
        curves = {name.removeprefix("curve/"): file[name] for name in names}
        rows = [{name: values[i] for name, values in curves.items()} for i in range(len(next(iter(curves.values()))))]
        return jax.tree.unflatten(structure, leaves), int(file["step"]), rows


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
