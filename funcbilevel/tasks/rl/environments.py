"""Environments with few actions, as pure functions of one state: the functional ones of Gymnasium."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


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
    name: str, functional: Any, num_actions: int, horizon: int, control: Callable[[jax.Array], jax.Array], **params: Any
) -> Environment:
    """The environment of a `gymnasium.experimental.functional.FuncEnv`; `control` makes its action of ours.

    `params=...` are others than the environment's own.
    """
    return Environment(
        name=name,
        observation_size=functional.observation_space.shape[0],
        num_actions=num_actions,
        horizon=horizon,
        initial=partial(functional.initial, **params),
        transition=lambda state, action: functional.transition(state, control(action), None, **params),
        observation=lambda state: functional.observation(state, None, **params),
        reward=lambda state, action, after: jnp.asarray(
            functional.reward(state, control(action), after, None, **params)
        ),
        terminal=lambda state: jnp.asarray(functional.terminal(state, None, **params)),
    )


@cache
def cartpole() -> Environment:
    """Gymnasium's `CartPole-v1` as a pure function: reward 1 per step, at most 500 of them.

    In `gymnasium.envs.phys2d.cartpole.CartPoleFunctional` the `polemass_length` is the sum of mass and length, 0.6,
    which makes it another pole; here it is their product, 0.05, as in `CartPole-v1`.
    """
    from gymnasium.envs.phys2d.cartpole import CartPoleFunctional, CartPoleParams  # noqa: PLC0415

    pole = CartPoleParams.masspole * CartPoleParams.length
    params = CartPoleParams(polemass_length=pole)
    return from_gymnasium("cartpole", CartPoleFunctional(), 2, 500, lambda action: action, params=params)


TORQUES = (-2.0, 0.0, 2.0)


@cache
def pendulum() -> Environment:
    """`gymnasium.envs.phys2d.pendulum.PendulumFunctional` with three torques: episodes of 200 steps, never terminal."""
    from gymnasium.envs.phys2d.pendulum import PendulumFunctional  # noqa: PLC0415

    return from_gymnasium(
        "pendulum", PendulumFunctional(), len(TORQUES), 200, lambda action: jnp.asarray(TORQUES)[action][None]
    )


ENVIRONMENTS: dict[str, Callable[[], Environment]] = {"cartpole": cartpole, "pendulum": pendulum}
