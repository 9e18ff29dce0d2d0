"""Steps of environment and learning per second on CartPole: seeds together, one seed, and a loop that Python steps.

    python benchmarks/rl_throughput.py [--output FILE]

The ways take turns in one process, and medians over the rounds are reported. `one-seed` is what ten sequential compiled
runs come to. `python-loop` is the strongest loop of its kind: one compiled, donated call per step of the environment,
acting, environment, buffer and learning in one program.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from funcbilevel.tasks import _records, rl, rl_cartpole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="funcid-pointwise", choices=rl.METHODS)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=500, help="steps per seed and measurement")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON lines to append to")
    arguments = parser.parse_args()

    environment = rl_cartpole.environment()
    setting = rl.Setting()._replace(**rl.METHODS[arguments.method].chosen)
    solver = rl.agent(environment, arguments.method, setting)
    compiled = rl.programs(environment, arguments.method, setting)

    def learner(num_steps):
        def learn(state, step):
            return rl.learn(environment, solver, setting, num_steps, state, step)

        return jax.jit(jax.vmap(learn, in_axes=(0, None)), donate_argnums=0)

    scan, single = learner(arguments.steps), learner(1)
    ways = {
        f"vmapped-{arguments.seeds}": (arguments.seeds, scan, 1),
        "one-seed": (1, scan, 1),
        "python-loop": (1, single, arguments.steps),
    }
    states = {}
    for name, (seeds, program, _) in ways.items():
        state = compiled.explore(compiled.init(jax.random.split(jax.random.key(0), seeds)))
        states[name] = jax.block_until_ready(program(state, np.int32(setting.random_steps))[0])
    rates = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, (seeds, program, calls) in ways.items():
            state, start = states[name], time.perf_counter()
            for i in range(calls):
                state, _ = program(state, np.int32(2000 + i))
            states[name] = jax.block_until_ready(state)
            rates[name].append(seeds * arguments.steps / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    reference = medians[f"vmapped-{arguments.seeds}"]
    for name, rate in medians.items():
        print(f"{name:<14} {rate:8.0f} steps/s   vmapped seeds are {reference / rate:.2f} times as fast")
        if arguments.output is not None:
            metrics = {"steps_per_second": rate, "speedup_of_vmapped": reference / rate}
            settings = setting._asdict() | {"program": name}
            seconds = arguments.steps * ways[name][0] / rate
            _records.append(
                arguments.output, _records.record("cartpole", arguments.method, 0, settings, metrics, seconds)
            )


if __name__ == "__main__":
    main()
