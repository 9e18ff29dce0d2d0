"""The compiled programs: acting, environment, replay buffer, learning and evaluation, over seeds and devices."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import funcbilevel as fb
from funcbilevel.tasks.rl.environments import Environment
from funcbilevel.tasks.rl.methods import TRACED, Setting, agent
from funcbilevel.tasks.rl.problem import Batch, Transition, init_ensemble, init_q, init_world_model, q_values

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
        ensemble: of the random value functions.
        rates: the settings that are `TRACED`, by name.
        world: the environment's state.
        episode_step: steps since the episode's beginning.
        buffer: [capacity, row_size].
        key: the random key of the next chunk.
    """

    learner: fb.BilevelState
    target_params: Any
    ensemble: Any
    rates: dict[str, jax.Array]
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


def init(
    environment: Environment, method: str, setting: Setting, key: Any, rates: dict[str, jax.Array] | None = None
) -> State:
    """The state before the first step; its networks are the same for every method."""
    rates = rates_of(setting) if rates is None else rates
    learner_key, model_key, world_key, key = jax.random.split(key, 4)
    k = environment.observation_size
    some = Transition(jnp.zeros((1, k)), jnp.zeros(1, jnp.int32), jnp.zeros(1), jnp.zeros((1, k)), jnp.zeros(1))
    q_key, learner_key = jax.random.split(learner_key)
    q_params = init_q(q_key, environment, setting.q_width)
    target_params = jax.tree.map(jnp.copy, q_params)  # its own buffers, to be donated
    omega = init_world_model(model_key, environment, setting.model_width)
    ensemble = init_ensemble(jax.random.fold_in(model_key, 1), environment, setting.q_width, setting.ensemble_size)
    solver, batch = agent(environment, method, setting._replace(**rates)), Batch(some, target_params, ensemble)
    return State(
        learner=solver.init(learner_key, omega, batch, q_params),
        target_params=target_params,
        ensemble=ensemble,
        rates=rates,
        world=environment.initial(world_key),
        episode_step=jnp.zeros((), jnp.int32),
        buffer=jnp.zeros((setting.capacity or setting.steps, row_size(environment)), jnp.float32),
        key=key,
    )


def rates_of(setting: Setting) -> dict[str, jax.Array]:
    """The settings that are `TRACED`, as arrays."""
    return {name: jnp.asarray(getattr(setting, name)) for name in TRACED}


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


METRICS = (
    *("inner_objective", "outer_objective", "hypergradient_norm", "explicit_norm", "implicit_norm"),
    *("inner_finite", "adjoint_finite", "outer_finite", "adjoint_inputs_match", "adjoint_objective"),
    *("linear_residual", "linear_converged", "linear_curvature"),
)
"""The solver's metrics that a run keeps, where its method has them. What others cost, XLA leaves out of the scan."""


def learn(
    environment: Environment,
    method: str,
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
    solver = agent(environment, method, setting._replace(**state.rates))
    ensemble, rates = state.ensemble, state.rates  # the same at every step, and no part of what the scan carries

    def step(state: State, x: tuple[jax.Array, Draws]) -> tuple[State, dict[str, jax.Array]]:
        i, noise = x
        theta = state.learner.inner_params
        observation = environment.observation(state.world)
        action = soft_action(theta, observation[None], noise.gumbel[None], setting.alpha)[0]
        action = jnp.where(noise.explore, noise.random_action, action)
        transition, world, episode_step = interact(environment, state.world, state.episode_step, action, noise.fresh)
        buffer = write(state.buffer, i, to_row(transition))
        batch = Batch(draw(buffer, i, noise.uniform), state.target_params, ensemble)
        learner, metrics = solver.step(state.learner, batch, batch)
        target_params = jax.tree.map(
            lambda theta, target: target + setting.tau * (theta - target), learner.inner_params, state.target_params
        )
        kept = {name: metrics[name] for name in METRICS if name in metrics}
        return State(learner, target_params, (), {}, world, episode_step, buffer, state.key), kept

    carried = state._replace(ensemble=(), rates={})
    carried, metrics = jax.lax.scan(step, carried, (first_step + jnp.arange(num_steps), noise))
    return carried._replace(ensemble=ensemble, rates=rates, key=key), jax.tree.map(
        lambda x: jnp.all(x) if x.dtype == bool else jnp.mean(x), metrics
    )


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


def rollout(environment: Environment, alpha: float, q_params: Any, key: Any) -> tuple[Any, jax.Array]:
    """The states of one episode of the soft policy, on a leading axis of `horizon`, and its length."""
    initial_key, key = jax.random.split(key)
    gumbels = jax.random.gumbel(key, (environment.horizon, environment.num_actions))

    def step(carry: Any, gumbel: jax.Array) -> tuple[Any, Any]:
        world, alive = carry
        action = soft_action(q_params, environment.observation(world)[None], gumbel[None], alpha)[0]
        after = environment.transition(world, action)
        return (after, alive & ~environment.terminal(after)), (world, alive)

    _, (worlds, alive) = jax.lax.scan(step, (environment.initial(initial_key), jnp.array(True)), gumbels)
    return worlds, jnp.sum(alive)


@cache
def episodes(environment: Environment, alpha: float) -> Callable[[Any, Any], tuple[Any, jax.Array]]:
    """`rollout` of several policies, compiled: (policies, keys) -> (states, lengths), on a leading axis."""
    return jax.jit(jax.vmap(partial(rollout, environment, alpha)))


class Programs(NamedTuple):
    """The compiled programs of a run; all take and give a leading axis of seeds.

    Attributes:
        init: `keys -> state`.
        explore: `state -> state`, the random steps.
        chunk: `(state, first step) -> (state, metrics)`, one evaluation interval of steps and the evaluation after it.
            The state is donated.
    """

    init: Callable[..., State]
    explore: Callable[[State], State]
    chunk: Callable[[State, Any], tuple[State, dict[str, jax.Array]]]


def programs(environment: Environment, method: str, setting: Setting, num_devices: int = 1) -> Programs:
    """The programs of a method; compiled once for all settings that differ in no more than steps and `TRACED`."""
    capacity = setting.capacity or setting.steps
    shared = setting._replace(steps=0, capacity=capacity, **dict.fromkeys(TRACED))
    compiled = _programs(environment, method, shared, num_devices)
    return compiled._replace(init=partial(compiled.init, rates=rates_of(setting)))


@cache
def _programs(environment: Environment, method: str, setting: Setting, num_devices: int) -> Programs:
    def chunk(state: State, first_step: Any) -> tuple[State, dict[str, jax.Array]]:
        state, metrics = learn(environment, method, setting, setting.evaluation_interval, state, first_step)
        key, evaluation_key = jax.random.split(state.key)
        returns = evaluate(environment, setting, state.learner.inner_params, evaluation_key)
        return state._replace(key=key), metrics | {"evaluation_return": jnp.mean(returns)}

    @jax.jit
    def initial(keys: Any, rates: dict[str, jax.Array]) -> State:
        # Not vmapped: jaxlib 0.10 can deadlock in several batched factorisations at a time.
        return jax.lax.map(lambda key: init(environment, method, setting, key, rates), keys)

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
