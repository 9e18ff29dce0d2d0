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
    Grimm, Barreto, Singh, Silver, *The Value Equivalence Principle for Model-Based Reinforcement Learning*, NeurIPS
    2020, https://arxiv.org/abs/2011.03506;
    Nikishin, Abachi, Agarwal, Bacon, *Control-Oriented Model-Based Reinforcement Learning with Implicit
    Differentiation*, AAAI 2022, https://arxiv.org/abs/2106.03273 (OMD).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import funcbilevel as fb
from funcbilevel.tasks.rl.environments import Environment

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


def init_ensemble(key: Any, environment: Environment, width: int, size: int) -> Layers:
    """Random value functions, which are never trained: every array has a leading axis of `size`."""
    sizes = (environment.observation_size, width, width, 1)
    return jax.lax.map(lambda key: init_mlp(key, sizes), jax.random.split(key, size))


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
        ensemble: of the random value functions, the same at every step.
    """

    transition: Transition
    target_params: Any
    ensemble: Any = ()


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
        return self._error_as_seen(omega, batch, lambda observation: observation)

    def value_error(self, omega: Any, v: jax.Array, batch: Batch) -> jax.Array:
        """The squared difference of both targets: value equivalence at the current value function."""
        return 0.5 * jnp.mean((self.model_target(omega, batch) - self.true_target(batch)) ** 2)

    def ensemble_error(self, omega: Any, v: jax.Array, batch: Batch) -> jax.Array:
        """The squared error of the reward, and of random value functions of the next observation, summed over them."""
        values = jax.vmap(mlp, (0, None), 1)  # [n, size, 1]
        return self._error_as_seen(omega, batch, lambda observation: values(batch.ensemble, observation)[..., 0])

    def _error_as_seen(self, omega: Any, batch: Batch, seen: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The squared error of the reward, and of what is seen of the next observation, [n, ...]."""
        transition = batch.transition
        next_observation, reward = self.predict(omega, transition.observation, transition.action)
        errors = jnp.sum((seen(next_observation) - seen(transition.next_observation)) ** 2, axis=-1)
        return 0.5 * jnp.mean(errors + (reward - transition.reward) ** 2)

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
    """The model is fitted to the targets of the current value function.

    Its gradient is half of that of FuncID with the pointwise adjoint and a correction of 1, which has one such term for
    each of the two networks; Adam does not see the factor.
    """
    return fb.FunctionalProblem(bellman.model_error, bellman.value_error, _inputs)


def ensemble_problem(bellman: Bellman) -> fb.FunctionalProblem:
    """VEP as published: the model is fitted to random value functions (Grimm et al. 2020; Nikishin et al. 2022)."""
    return fb.FunctionalProblem(bellman.model_error, bellman.ensemble_error, _inputs)


def reward_alone(bellman: Bellman) -> Bellman:
    """The same, but no gradient reaches the dynamics network, which stays as it was drawn."""

    def predict(omega: Any, observation: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        next_observation, reward = bellman.predict(omega, observation, action)
        return jax.lax.stop_gradient(next_observation), reward

    return bellman._replace(predict=predict)


def model_free_problem(bellman: Bellman) -> fb.FunctionalProblem:
    """Soft double Q-learning: both levels at the true transitions, so that there is nothing for a model to do."""
    return fb.FunctionalProblem(bellman.true_error, bellman.true_error, _inputs)
