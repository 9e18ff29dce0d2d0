r"""A two-link arm whose torque is the sum of a leader's and a follower's: one tracks, the other saves energy.

The leader's controller omega tracks a reference with the arm's end point, the follower's correction theta is added to
its torque and saves energy and keeps the end point out of a zone. With the weight w,

.. math::
    L_{out}(\omega, \theta) &= \text{tracking}, \\
    L_{in}(\omega, \theta) &= \text{tracking} + w\,(\text{energy} + \text{intrusion}),

all of one differentiable rollout. The control (`lagrangian`) is the weighted reward: L_in as the one objective of both
networks. Many runs (cells: a setting of w and of the rates, and a seed) train at once in one compiled program.

References:
    Spong, Hutchinson, Vidyasagar, *Robot Modeling and Control*, Wiley 2006, section 7.4 (the arm);
    Flash and Hogan, *The coordination of arm movements*, J. Neuroscience 5, 1985 (reaching with minimum jerk).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import funcbilevel as fb

# The arm: two uniform rods in an inclined plane, a point mass at the end. q are the angles of the shoulder, from the
# horizontal, and of the elbow, from the upper arm; [2] everywhere.


class Arm(NamedTuple):
    """Lengths in m, masses in kg, viscous friction in N m s, gravity along the plane in m/s^2.

    The plane is inclined by 12 degrees: upright, nearly all torque would go into holding the arm.
    """

    lengths: tuple[float, float] = (0.5, 0.5)
    masses: tuple[float, float] = (1.0, 1.0)
    payload: Any = 0.0
    friction: float = 0.1
    gravity: float = 2.0


def _inertias(arm: Arm) -> tuple[Any, Any, Any]:
    """Of the upper arm with all beyond it at the elbow, of the forearm about the elbow, and their coupling."""
    (l1, l2), (m1, m2), m = arm.lengths, arm.masses, arm.payload
    return m1 * l1**2 / 3 + (m2 + m) * l1**2, m2 * l2**2 / 3 + m * l2**2, l1 * l2 * (m2 / 2 + m)


def mass_matrix(arm: Arm, q: jax.Array) -> jax.Array:
    """M(q), [2, 2]: the kinetic energy is 1/2 dq^T M dq."""
    a, b, c = _inertias(arm)
    c = c * jnp.cos(q[1])
    return jnp.array([[a + b + 2 * c, b + c], [b + c, b]])


def coriolis(arm: Arm, q: jax.Array, dq: jax.Array) -> jax.Array:
    """dM/dt dq - 1/2 d_q (dq^T M dq), the Coriolis and centrifugal torques."""
    h = _inertias(arm)[2] * jnp.sin(q[1])
    return h * jnp.array([-(2 * dq[0] + dq[1]) * dq[1], dq[0] ** 2])


def gravity(arm: Arm, q: jax.Array) -> jax.Array:
    """d_q V, the torques that hold the arm."""
    (l1, l2), (m1, m2), m = arm.lengths, arm.masses, arm.payload
    upper, fore = l1 * jnp.cos(q[0]), l2 * jnp.cos(q[0] + q[1])
    fore = (m2 / 2 + m) * fore
    return arm.gravity * jnp.array([(m1 / 2 + m2 + m) * upper + fore, fore])


def acceleration(arm: Arm, q: jax.Array, dq: jax.Array, torque: jax.Array) -> jax.Array:
    """The d^2q/dt^2 of M d^2q/dt^2 + coriolis + gravity + friction dq = torque."""
    (m11, m12), (_, m22) = mass_matrix(arm, q)
    r = torque - coriolis(arm, q, dq) - gravity(arm, q) - arm.friction * dq
    return jnp.array([m22 * r[0] - m12 * r[1], m11 * r[1] - m12 * r[0]]) / (m11 * m22 - m12**2)


def advance(arm: Arm, q: jax.Array, dq: jax.Array, torque: jax.Array, dt: float) -> tuple[jax.Array, jax.Array]:
    """(q, dq) a time dt later, by one step of the semi-implicit Euler method."""
    dq = dq + dt * acceleration(arm, q, dq, torque)
    return q + dt * dq, dq


def end_point(arm: Arm, q: jax.Array) -> jax.Array:
    """Where the end point is, (x, y) in m from the shoulder."""
    l1, l2 = arm.lengths
    whole = q[0] + q[1]
    return jnp.array([l1 * jnp.cos(q[0]) + l2 * jnp.cos(whole), l1 * jnp.sin(q[0]) + l2 * jnp.sin(whole)])


def jacobian(arm: Arm, q: jax.Array) -> jax.Array:
    """d end_point / d q, [2, 2]."""
    l1, l2 = arm.lengths
    whole = q[0] + q[1]
    upper = l1 * jnp.array([-jnp.sin(q[0]), jnp.cos(q[0])])
    fore = l2 * jnp.array([-jnp.sin(whole), jnp.cos(whole)])
    return jnp.stack([upper + fore, fore], axis=1)


def inverse_kinematics(arm: Arm, p: jax.Array) -> jax.Array:
    """The angles with the end point at p, the elbow bent by a positive angle, so that it hangs below."""
    l1, l2 = arm.lengths
    cosine = (p @ p - l1**2 - l2**2) / (2 * l1 * l2)
    elbow = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
    shoulder = jnp.arctan2(p[1], p[0]) - jnp.arctan2(l2 * jnp.sin(elbow), l1 + l2 * jnp.cos(elbow))
    return jnp.stack([shoulder, elbow])


# What is to be done.

STEPS, DT = 25, 0.04
"""Control steps of an episode, and their length in s."""
ZONE = 0.7
"""People work beyond this x, in m; the references do not know."""


class Episodes(NamedTuple):
    """References to follow, from rest to rest.

    Attributes:
        position: [n, steps + 1, 2], in m.
        velocity: [n, steps + 1, 2], in m/s.
    """

    position: jax.Array
    velocity: jax.Array


@partial(jax.jit, static_argnums=1)
def draw_episodes(key: jax.Array, n: int) -> Episodes:
    """Random references, each with even odds a straight reach between two points or one turn of an ellipse.

    Their way is run with the profile of minimum jerk, s(t) = 10 t^3 - 15 t^4 + 6 t^5.
    """
    kind, points, shape, turn = jax.random.split(key, 4)
    r, angle = jax.random.uniform(
        points,
        (2, n, 2, 1),
        minval=jnp.array([0.45, -1.0])[:, None, None, None],
        maxval=jnp.array([0.7, 1.0])[:, None, None, None],
    )
    ends = r * jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)  # [n, 2, 2]
    axes = jax.random.uniform(shape, (n, 1, 2), minval=0.08, maxval=0.22)
    tilt, first = jax.random.uniform(turn, (2, n, 1), maxval=2 * jnp.pi)

    t = jnp.linspace(0.0, 1.0, STEPS + 1)[None]
    s, ds = t**3 * (10 - 15 * t + 6 * t**2), 30 * t**2 * (1 - t) ** 2 / (STEPS * DT)
    reach = ends[:, :1] + s[..., None] * (ends[:, 1:] - ends[:, :1])
    d_reach = ds[..., None] * (ends[:, 1:] - ends[:, :1])

    phase = first + 2 * jnp.pi * s
    circle = axes * jnp.stack([jnp.cos(phase), jnp.sin(phase)], axis=-1)
    d_circle = axes * (2 * jnp.pi * ds[..., None]) * jnp.stack([-jnp.sin(phase), jnp.cos(phase)], axis=-1)
    rotation = jnp.stack([jnp.cos(tilt), jnp.sin(tilt), -jnp.sin(tilt), jnp.cos(tilt)], axis=-1).reshape(n, 2, 2)
    reaches = jax.random.bernoulli(kind, 0.5, (n, 1, 1))
    return Episodes(
        jnp.where(reaches, reach, ends[:, :1] + circle @ rotation), jnp.where(reaches, d_reach, d_circle @ rotation)
    )


VALIDATION, TEST = (1 << 20, 64), (1 << 21, 128)
"""Seeds and numbers of the held-out episodes."""
SHOWN = 4
"""Episodes of which paths are kept."""


def held_out(part: tuple[int, int]) -> Episodes:
    """The validation or the test episodes, the same for all runs."""
    return draw_episodes(jax.random.key(part[0]), part[1])


# The two controllers. Torques are in N m.

TORQUE = 3.0
"""Unit of the networks' outputs."""
FEATURES = 14


def features(arm: Arm, q: jax.Array, dq: jax.Array, target: Episodes) -> jax.Array:
    """What both networks see, [14]: the errors, the arm's state, and the reference's velocity now and five steps on.

    The target's position and velocity are [2, 2]: of the next control step and of the fifth.
    """
    J = jacobian(arm, q)
    error, d_error = target.position[0] - end_point(arm, q), target.velocity[0] - J @ dq
    state = jnp.concatenate([jnp.cos(q), jnp.sin(q), dq / 5])
    return jnp.concatenate([10 * error, d_error, state, target.velocity.reshape(4)])


def init_network(key: jax.Array, width: int) -> dict[str, jax.Array]:
    """A network with one hidden layer, features -> two torques, small at first."""
    hidden, output = jax.random.split(key)
    return {
        "w1": jax.random.normal(hidden, (FEATURES, width)) / FEATURES**0.5,
        "b1": jnp.zeros(width),
        "w2": 0.1 * jax.random.normal(output, (width, 2)) / width**0.5,
        "b2": jnp.zeros(2),
    }


def network(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """The torques, [2]."""
    return TORQUE * (jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"])


def init_leader(key: jax.Array, width: int) -> dict[str, Any]:
    """Omega: a spring of 60 N/m and a damper of 6 N s/m at the end point, and a network."""
    return {"log_gains": jnp.log(jnp.array([60.0, 6.0])), "network": init_network(key, width)}


def leader_torque(arm: Arm, omega: Mapping[str, Any], q: jax.Array, x: jax.Array) -> jax.Array:
    """The leader's torque: J^T (k error + d velocity error), a force at the end point, and its network's."""
    stiffness, damping = jnp.exp(omega["log_gains"])
    return jacobian(arm, q).T @ (stiffness * x[:2] / 10 + damping * x[2:4]) + network(omega["network"], x)


class Path(NamedTuple):
    """One episode: end point and angles after each control step, and the torques of both players, all [steps, 2]."""

    end_point: jax.Array
    angles: jax.Array
    leader: jax.Array
    follower: jax.Array


def rollout(arm: Arm, omega: Any, theta: Any, episode: Episodes) -> Path:
    """The arm follows one reference, from rest at its beginning; without a theta (None) the leader is alone."""

    def step(state: tuple[jax.Array, jax.Array], target: Episodes) -> tuple[tuple[jax.Array, jax.Array], Path]:
        q, dq = state
        x = features(Arm(), q, dq, target)  # the controllers do not know the payload; the features do not need it
        leader = leader_torque(arm, omega, q, x)
        follower = jnp.zeros_like(leader) if theta is None else network(theta, x)
        q, dq = advance(arm, q, dq, leader + follower, DT)
        return (q, dq), Path(end_point(arm, q), q, leader, follower)

    soon, later = np.arange(1, STEPS + 1), np.minimum(np.arange(5, STEPS + 5), STEPS)
    targets = jax.tree.map(lambda a: jnp.stack([a[soon], a[later]], axis=1), episode)
    start = inverse_kinematics(arm, episode.position[0])
    return jax.lax.scan(step, (start, jnp.zeros_like(start)), targets)[1]


class Costs(NamedTuple):
    """Means over episodes and control steps, scalars of order one.

    Attributes:
        tracking: squared distance from the reference, in (10 cm)^2.
        energy: squared torque of both joints, in (3 N m)^2: what their motors turn into heat.
        intrusion: squared depth of the end point in the zone, in (10 cm)^2.
        inside: share of the time outside the zone, that is inside the safety margin.
    """

    tracking: jax.Array
    energy: jax.Array
    intrusion: jax.Array
    inside: jax.Array


def costs(arm: Arm, omega: Any, theta: Any, episodes: Episodes) -> Costs:
    """What the two players care for, over a batch of episodes."""
    path = jax.vmap(lambda episode: rollout(arm, omega, theta, episode))(episodes)
    depth = jnp.maximum(path.end_point[..., 0] - ZONE, 0.0)
    return Costs(
        100 * jnp.mean(jnp.sum((path.end_point - episodes.position[:, 1:]) ** 2, axis=-1)),
        jnp.mean(jnp.sum((path.leader + path.follower) ** 2, axis=-1)) / TORQUE**2,
        100 * jnp.mean(depth**2),
        jnp.mean(depth == 0, dtype=depth.dtype),
    )


def weighted(of: Costs, weight: Any) -> jax.Array:
    """The weighted reward's negative: tracking + w (energy + intrusion)."""
    return of.tracking + weight * (of.energy + of.intrusion)


# The two players.


def problem(weight: Any, payload: Any = 0.0) -> fb.ParametricProblem:
    """The bilevel problem: leader omega = outer_params, follower theta = inner_params, batches are episodes."""
    arm = Arm(payload=payload)
    return fb.ParametricProblem(
        inner_objective=lambda omega, theta, batch: weighted(costs(arm, omega, theta, batch), weight),
        outer_objective=lambda omega, theta, batch: costs(arm, omega, theta, batch).tracking,
    )
