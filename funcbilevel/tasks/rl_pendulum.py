"""Pendulum: the functional environment of Gymnasium with discretised torque, and its picture."""

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from funcbilevel.tasks import rl

if TYPE_CHECKING:
    from PIL.Image import Image

HORIZON = 200
TORQUES = (-2.0, 0.0, 2.0)


@cache
def environment() -> rl.Environment:
    """`gymnasium.envs.phys2d.pendulum.PendulumFunctional` with three torques: episodes of 200 steps, never terminal."""
    from gymnasium.envs.phys2d.pendulum import PendulumFunctional  # noqa: PLC0415

    return rl.from_gymnasium(
        "pendulum", PendulumFunctional(), len(TORQUES), HORIZON, lambda action: jnp.asarray(TORQUES)[action][None]
    )


def picture(world: Any) -> "Image":
    """The pendulum, 120 by 120 pixels; it stands upright at angle 0."""
    from PIL import Image, ImageDraw  # noqa: PLC0415

    size, length = 120, 50
    theta = float(world[0])
    tip = (size / 2 - length * math.sin(theta), size / 2 - length * math.cos(theta))
    image = Image.new("P", (size, size), 0)
    image.putpalette([255, 255, 255, 40, 40, 40, 200, 110, 60, 170, 170, 170])
    pen, middle = ImageDraw.Draw(image), size / 2
    pen.ellipse([middle - length, middle - length, middle + length, middle + length], outline=3)
    pen.line([(middle, middle), tip], fill=2, width=8)
    pen.ellipse([middle - 4, middle - 4, middle + 4, middle + 4], fill=1)
    return image
