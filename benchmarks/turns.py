"""Timing of several functions side by side."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

PAUSE = 0.02
"""Seconds before each turn, in which the threads of another library that spin for more work fall asleep."""
LEAST = 0.005
"""A function is called as often as fills so many seconds, and the time divided."""


def times_in_turns(
    calls: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds per call, `repeats` of them for each name.

    With `clock=time.process_time` it is the processor's time, of all threads together: on a busy machine the better
    measure, for programs on one thread.

    The functions take turns, so that a slow moment of the machine meets all alike. Every turn blocks until the results
    are there, and that of a fast function starts with an untimed call.
    """

    def seconds(function: Callable[[], Any], number: int) -> float:
        start = clock()
        for _ in range(number):
            jax.block_until_ready(function())
        return (clock() - start) / number

    numbers: dict[str, int] = {}
    for name, function in calls.items():
        seconds(function, 1)  # compiles
        numbers[name] = max(1, int(LEAST / seconds(function, 1)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, function in calls.items():
            time.sleep(PAUSE)
            if numbers[name] > 1:
                seconds(function, 1)
            times[name].append(seconds(function, numbers[name]))
    return times
