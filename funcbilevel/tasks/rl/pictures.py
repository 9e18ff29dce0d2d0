"""Animations of recorded episodes."""

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

EVERY = 4
"""Recorded states are those of every fourth step of the environment."""
SCALE = 2
COLOURS = [255, 255, 255, 40, 40, 40, 200, 110, 60, 170, 170, 170]


def animate(task: str, states: Sequence[Sequence[float]], path: Path) -> None:
    """The states of an episode, every fourth, as a GIF; a caption says which, and of what."""
    last = EVERY * (len(states) - 1)
    frames = [
        _captioned(PICTURES[task](state), f"{task}, the best run after training: step {EVERY * i} of {last}")
        for i, state in enumerate(states)
    ]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=80, loop=0)


def _captioned(picture: "Image", text: str) -> "Image":
    """The picture in double size above a line of text, which is broken where it is wider."""
    from PIL import ImageDraw  # noqa: PLC0415

    width, height = (SCALE * size for size in picture.size)
    lines = textwrap.wrap(text, width // 7)
    image, _ = _paper(width, height + 16 * len(lines) + 6)
    image.paste(picture.resize((width, height)), (0, 0))
    pen = ImageDraw.Draw(image)
    pen.fontmode = "1"  # no shades between the palette's colours
    for i, line in enumerate(lines):
        pen.text((6, height + 16 * i), line, fill=1)
    return image


def _paper(width: int, height: int) -> Any:
    """(image, pen) in four colours."""
    from PIL import Image, ImageDraw  # noqa: PLC0415

    image = Image.new("P", (width, height), 0)
    image.putpalette(COLOURS)
    return image, ImageDraw.Draw(image)


def cartpole(state: Sequence[float]) -> "Image":
    """Cart and pole, 240 by 120 pixels."""
    width, height, ground, unit = 240, 120, 100, 40  # `unit` pixels per metre
    x, _, theta, _ = state
    image, pen = _paper(width, height)
    middle = width / 2 + unit * x
    pen.line([(0, ground), (width, ground)], fill=3)
    for edge in (-2.4, 2.4):
        pen.line([(width / 2 + unit * edge, ground - 6), (width / 2 + unit * edge, ground + 6)], fill=3, width=2)
    pen.rectangle([middle - 16, ground - 10, middle + 16, ground + 6], fill=1)
    tip = (middle + 70 * math.sin(theta), ground - 10 - 70 * math.cos(theta))
    pen.line([(middle, ground - 10), tip], fill=2, width=6)
    return image


def pendulum(state: Sequence[float]) -> "Image":
    """The pendulum, 120 by 120 pixels; it stands upright at angle 0."""
    size, length = 120, 50
    theta = state[0]
    tip = (size / 2 - length * math.sin(theta), size / 2 - length * math.cos(theta))
    image, pen = _paper(size, size)
    middle = size / 2
    pen.ellipse([middle - length, middle - length, middle + length, middle + length], outline=3)
    pen.line([(middle, middle), tip], fill=2, width=8)
    pen.ellipse([middle - 4, middle - 4, middle + 4, middle + 4], fill=1)
    return image


PICTURES: dict[str, Callable[[Sequence[float]], "Image"]] = {"cartpole": cartpole, "pendulum": pendulum}
