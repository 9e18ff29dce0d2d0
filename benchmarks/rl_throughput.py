"""Steps of environment and learning per second on CartPole: seeds together, one seed, and a loop that Python steps.

    python benchmarks/rl_throughput.py [--output FILE]

The ways take turns in one process, and medians over the rounds are reported. `spread` is what the commands do: seeds
under vmap, spread over devices, and on CPUs every core is one. `vmapped` does the same on one device. `one-seed` is
what ten sequential compiled runs come to. `python-loop` is the strongest loop of its kind: one compiled, donated call
per step of the environment, acting, environment, buffer and learning in one program. `gymnasium-loop` is the ordinary
one: the same agent on `gymnasium.make("CartPole-v1")`, with a NumPy replay buffer, and acting and learning compiled
each.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import jax
import numpy as np
import optax

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.machine import every_core_a_device
from funcbilevel.tasks.rl import methods, programs
from funcbilevel.tasks.rl.environments import cartpole
from funcbilevel.tasks.rl.problem import Batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="funcid-pointwise", choices=methods.METHODS)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=500, help="steps per seed and measurement")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON lines to append to")
    arguments = parser.parse_args()

    every_core_a_device()
    environment = cartpole()
    setting = methods.Setting()._replace(**methods.METHODS[arguments.method].hyper)

    def learner(num_steps, num_devices=1):
        def learn(state, step):
            return programs.learn(environment, arguments.method, setting, num_steps, state, step)

        return programs.spread(learn, num_devices, donate_argnums=0)

    num_devices = programs.spread_over(arguments.seeds)
    scan = learner(arguments.steps)
    ways = {
        f"spread-{arguments.seeds}": (arguments.seeds, learner(arguments.steps, num_devices), 1),
        f"vmapped-{arguments.seeds}": (arguments.seeds, scan, 1),
        "one-seed": (1, scan, 1),
        "python-loop": (1, learner(1), arguments.steps),
    }
    states = {}
    for name, (seeds, program, _) in ways.items():
        spread = num_devices if name.startswith("spread") else 1
        compiled = programs.programs(environment, arguments.method, setting, spread)
        state = compiled.explore(compiled.init(jax.random.split(jax.random.key(0), seeds)))
        states[name] = jax.block_until_ready(program(state, np.int32(setting.random_steps))[0])
    loop = gymnasium_loop(environment, arguments.method, setting)
    for _ in range(setting.random_steps + arguments.steps):
        next(loop)
    rates = {name: [] for name in (*ways, "gymnasium-loop")}
    for _ in range(arguments.rounds):
        for name, (seeds, program, calls) in ways.items():
            state, start = states[name], time.perf_counter()
            for i in range(calls):
                state, _ = program(state, np.int32(2000 + i))
            states[name] = jax.block_until_ready(state)
            rates[name].append(seeds * arguments.steps / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(arguments.steps):
            next(loop)
        rates["gymnasium-loop"].append(arguments.steps / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    reference = medians[f"spread-{arguments.seeds}"]
    for name, rate in medians.items():
        print(f"{name:<14} {rate:8.0f} steps/s   spread seeds are {reference / rate:.2f} times as fast")
        if arguments.output is not None:
            metrics = {"steps_per_second": rate, "speedup_of_spread": reference / rate, "devices": num_devices}
            settings = setting._asdict() | {"program": name}
            seconds = arguments.steps * (ways[name][0] if name in ways else 1) / rate
            record = store.record("cartpole", arguments.method, 0, settings, metrics, seconds)
            store.append(arguments.output, [record])


def gymnasium_loop(environment, method, setting):
    """Yields after every step of the agent on Gymnasium's own environment."""
    import gymnasium  # noqa: PLC0415

    solver = methods.agent(environment, method, setting)
    state = jax.jit(lambda key: programs.init(environment, method, setting, key))(jax.random.key(0))
    learner, target = state.learner, state.target_params

    @jax.jit
    def act(theta, observation, gumbel):
        return programs.soft_action(theta, observation[None], gumbel[None], setting.alpha)[0]

    def learn(learner, target, transition):
        batch = Batch(transition, target)
        learner, _ = solver.step(learner, batch, batch)
        return learner, optax.incremental_update(learner.inner_params, target, setting.tau)

    learn = jax.jit(learn, donate_argnums=(0, 1))
    env, rng = gymnasium.make("CartPole-v1"), np.random.default_rng(0)
    buffer = np.zeros((100_000, programs.row_size(environment)), np.float32)
    observation, _ = env.reset(seed=0)
    for i in itertools.count():
        gumbel = rng.gumbel(size=environment.num_actions).astype(np.float32)
        random = i < setting.random_steps or rng.uniform() < setting.epsilon
        action = rng.integers(environment.num_actions) if random else act(learner.inner_params, observation, gumbel)
        after, reward, terminal, truncated, _ = env.step(int(action))
        buffer[i % len(buffer)] = [*observation, *after, action, reward, terminal]
        observation = env.reset()[0] if terminal or truncated else after
        if i >= setting.random_steps:
            rows = buffer[rng.integers(min(i + 1, len(buffer)), size=setting.batch_size)]
            learner, target = jax.block_until_ready(learn(learner, target, programs.from_row(rows)))
        yield


if __name__ == "__main__":
    main()
