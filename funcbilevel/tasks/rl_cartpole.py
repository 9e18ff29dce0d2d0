"""CartPole: the functional environment of Gymnasium, and its picture."""

import math
from functools import cache
from typing import TYPE_CHECKING, Any

from funcbilevel.tasks import rl

if TYPE_CHECKING:
    from PIL.Image import Image

HORIZON = 500


@cache
def environment() -> rl.Environment:
    """`gymnasium.envs.phys2d.cartpole.CartPoleFunctional`: reward 1 per step, at most 500 of them.

    Its `polemass_length` is 0.6 (mass *plus* length) where the classic environment has 0.05: another pole.
    """
    from gymnasium.envs.phys2d.cartpole import CartPoleFunctional  # noqa: PLC0415

    return rl.from_gymnasium("cartpole", CartPoleFunctional(), 2, HORIZON, lambda action: action)


def picture(world: Any) -> "Image":
    """Cart and pole, 240 by 120 pixels."""
    from PIL import Image, ImageDraw  # noqa: PLC0415

    width, height, ground, unit = 240, 120, 100, 40  # `unit` pixels per metre
    x, _, theta, _ = (float(value) for value in world)
    image = Image.new("P", (width, height), 0)
    image.putpalette([255, 255, 255, 40, 40, 40, 200, 110, 60, 170, 170, 170])
    pen, middle = ImageDraw.Draw(image), width / 2 + unit * x
    pen.line([(0, ground), (width, ground)], fill=3)
    for edge in (-2.4, 2.4):
        pen.line([(width / 2 + unit * edge, ground - 6), (width / 2 + unit * edge, ground + 6)], fill=3, width=2)
    pen.rectangle([middle - 16, ground - 10, middle + 16, ground + 6], fill=1)
    tip = (middle + 70 * math.sin(theta), ground - 10 - 70 * math.cos(theta))
    pen.line([(middle, ground - 10), tip], fill=2, width=6)
    return image
