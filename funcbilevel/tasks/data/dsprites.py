r"""The dSprites benchmark of instrumental regression (Xu et al. 2021): pictures, outcomes and samples.

The treatment x is a noisy 64x64 picture of a heart. The instruments are three of the heart's four latents; the
fourth, its height posY, moves both the picture and the outcome:

.. math::
    y = f(x) + (posY - 16) + \epsilon, \qquad f(x) = \frac{\tfrac{1}{10} \| x^\top B \|^2 - 5000}{1000},
    \qquad \epsilon \sim N(0, 0.5^2) .

What counts is the mean squared error to f on 588 pictures without noise. The hearts are drawn here, by default, or
read from the official file, pixel by pixel.

References:
    Xu, Chen, Srinivasan, de Freitas, Doucet, Gretton, *Learning Deep Features in Instrumental Variable Regression*,
    ICLR 2021, https://arxiv.org/abs/2010.07154.

    Matthey, Higgins, Hassabis, Lerchner, *dSprites*, 2017, https://github.com/google-deepmind/dsprites-dataset.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np

from funcbilevel.tasks.data.fetch import CACHE, fetch, git_blob, given, reading

Array: TypeAlias = np.ndarray[Any, Any]

# Pictures.

SIDE = 64
SIZES = (6, 40, 32, 32)  # scales, orientations, posX, posY, in the order of the official file
HEART = 2  # of its three shapes
FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
URL = f"https://github.com/google-deepmind/dsprites-dataset/raw/5bf82753677a7ae171b2f8926bbcd806b9ac583a/{FILE}"
GIT_BLOB = "d98996d3f8ee1550e06b9d4ed78d0beb478910d5"
"""The file's checksum as the tree of that repository's commits names it; the file has one version only."""
IMAGES_VARIABLE = "FUNCBILEVEL_DSPRITES"
MATRIX_VARIABLE = "FUNCBILEVEL_DSPRITES_MATRIX"

SCALES = np.linspace(0.5, 1, 6)
ORIENTATIONS = np.linspace(0, 2 * np.pi, 40)
POSITIONS = np.linspace(0, 1, 32)


class Latents(NamedTuple):
    """Ids of the hearts' latents, in the order of the official file.

    Attributes:
        scale: from 0 to 5, [n].
        orientation: from 0 to 39, [n].
        pos_x: column, from 0 to 31, [n].
        pos_y: row, from 0 (up) to 31, [n].
    """

    scale: Array
    orientation: Array
    pos_x: Array
    pos_y: Array


class Hearts(NamedTuple):
    """Where the pictures of hearts come from.

    Attributes:
        name: what to say of it beside a result.
        take: pictures of these latents, zeros and ones, [n, 64, 64].
    """

    name: str
    take: Callable[[Latents], Array]


def hearts(path: str | Path | None = None) -> Hearts:
    """The official hearts if `path`, or else FUNCBILEVEL_DSPRITES, says where their file is; else drawn ones."""
    file = given(path, IMAGES_VARIABLE)
    return load_hearts(file) if file else render_hearts()


def images(source: Hearts, scale: Any, orientation: Any, pos_x: Any, pos_y: Any) -> Array:
    """Pictures of the latents with these ids, each [n] or a number, row by row: [n, 4096], float32.

    Raises:
        ValueError: an id is out of range, or not an integer.
    """
    ids = np.atleast_1d(*np.broadcast_arrays(scale, orientation, pos_x, pos_y))
    for name, values, size in zip(Latents._fields, ids, SIZES, strict=True):
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name} is an array of {values.dtype}; pass the latent's ids, integers below {size}.")
        if values.size and not 0 <= values.min() <= values.max() < size:
            raise ValueError(
                f"{name} has ids from {values.min()} to {values.max()}; pass ids from 0 to {size - 1}, not values."
            )
    return source.take(Latents(*ids)).reshape(-1, SIDE**2).astype(np.float32)


def render_hearts() -> Hearts:
    """The hearts of dSprites, drawn: 21 pixels wide at scale 1, upright at orientation 0, turned clockwise.

    The area's centroid is at pixel 16 + posX of row 16 + posY, so that the heart stays inside the frame. A pixel is
    one if its centre lies in the heart. The official pictures differ in some pixels of the edge.
    """
    patches = np.stack([[_patch(scale, angle) for angle in ORIENTATIONS] for scale in SCALES])
    offsets = np.arange(patches.shape[-1]) + 16 - patches.shape[-1] // 2

    def take(latents: Latents) -> Array:
        pictures = np.zeros((len(latents.scale), SIDE, SIDE), patches.dtype)
        rows = latents.pos_y[:, None, None] + offsets[:, None]
        columns = latents.pos_x[:, None, None] + offsets
        which = np.arange(len(pictures))[:, None, None]
        pictures[which, rows, columns] = patches[latents.scale, latents.orientation]
        return pictures

    return Hearts("rendered hearts", take)


def _patch(scale: float, angle: float, width: float = 21.0, radius: int = 12) -> Array:
    """A heart around the centre of a small picture, [2 * radius + 1, 2 * radius + 1], uint8."""
    t = np.arange(256) * (2 * np.pi / 256)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y
    centroid = np.sum((y + np.roll(y, -1)) * cross) / (3 * np.sum(cross))
    column, row = scale * width / 32 * np.stack([x, centroid - y])  # rows count downwards
    column, row = np.cos(angle) * column - np.sin(angle) * row, np.sin(angle) * column + np.cos(angle) * row
    axis = np.arange(-radius, radius + 1)
    return _inside(axis[None, :, None], axis[:, None, None], column, row).astype(np.uint8)


def _inside(px: Array, py: Array, x: Array, y: Array) -> Array:
    """Whether points are in the polygon with vertices x, y, [v]: a ray from there crosses it an odd number of times."""
    x1, y1 = np.roll(x, -1), np.roll(y, -1)
    straddles = (y > py) != (y1 > py)
    beyond = px < x + (py - y) * (x1 - x) / np.where(y1 == y, 1, y1 - y)
    return np.sum(straddles & beyond, axis=-1) % 2 == 1


def load_hearts(path: str | Path) -> Hearts:
    """The hearts of the official file, which `download` fetches, one bit a pixel in memory (126 MB).

    Raises:
        UserError: there is no such file, it is damaged, or it is another one.
    """
    expected = (3 * int(np.prod(SIZES)), SIDE, SIDE)
    with reading(Path(path), f"pass the official file of dSprites, {URL}"), zipfile.ZipFile(path) as archive:
        if "imgs.npy" not in archive.namelist():
            raise ValueError(f"it has no array imgs, only {', '.join(archive.namelist())}")
        with archive.open("imgs.npy") as file:
            shape, fortran_order, dtype = _array_header(file)
            if shape != expected or fortran_order or dtype.itemsize != 1:
                raise ValueError(f"imgs is {list(shape)} {dtype}, expected {list(expected)} uint8")
            # One block is all positions of a shape at one scale and orientation; the hearts come last.
            blocks, rows = SIZES[0] * SIZES[1], SIZES[2] * SIZES[3]
            for _ in range(HEART * blocks):
                file.read(rows * SIDE**2)
            packed = np.concatenate([_packed(file.read(rows * SIDE**2)) for _ in range(blocks)])
            if file.read(1):  # at the end the archive's own checksum is compared, too
                raise ValueError("imgs is longer than it says")

    def take(latents: Latents) -> Array:
        return np.unpackbits(packed[np.ravel_multi_index(latents, SIZES)], axis=1)

    return Hearts("official dSprites", take)


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    form: Any = np.lib.format
    version = form.read_magic(file)
    return form.read_array_header_1_0(file) if version == (1, 0) else form.read_array_header_2_0(file)


def _packed(block: bytes) -> Array:
    pixels = np.frombuffer(block, np.uint8)
    if pixels.max(initial=0) > 1:
        raise ValueError("pixels of imgs must be 0 or 1")
    return np.packbits(pixels.reshape(SIZES[2] * SIZES[3], -1), axis=1)


def download(directory: Path = CACHE) -> Path:
    """Fetches the official file (26 MB) from its public home, unless it is there already; returns its path.

    Raises:
        UserError: no connection, or what came has another checksum.
    """
    path = directory.expanduser() / FILE
    fetch(URL, path, GIT_BLOB, git_blob)
    return path


# Outcomes.


def outcome_matrix(path: str | Path | None = None) -> tuple[Array, str]:
    """The matrix B of the outcome, [4096, 10], and a text that says which it is.

    Args:
        path: a .npy file with B or its transpose; by default FUNCBILEVEL_DSPRITES_MATRIX, and if that is not set
            either, B is drawn from U(0, 1), as the published one was.

    Raises:
        UserError: there is no such file, it is damaged, or it holds something else.
    """
    file = given(path, MATRIX_VARIABLE)
    if file is None:
        seed = 42
        return np.random.default_rng(seed).uniform(size=(SIDE**2, 10)), f"drawn from U(0,1), seed {seed}"
    mend = f"{MATRIX_VARIABLE} or --matrix must name a .npy file with the matrix or its transpose"
    with reading(file, mend), file.open("rb") as opened:
        if opened.read(6) != b"\x93NUMPY":
            raise ValueError("it is no .npy file")
        opened.seek(0)
        matrix: Any = np.load(opened)
        if matrix.shape == (10, SIDE**2):
            matrix = matrix.T
        _check_matrix(matrix)
    return matrix, f"published file {file.name}"


def _check_matrix(B: Array) -> None:
    """Raises a ValueError if B is not [4096, 10] and finite."""
    real = np.issubdtype(B.dtype, np.floating) or np.issubdtype(B.dtype, np.integer)
    if B.shape != (SIDE**2, 10) or not real or not np.isfinite(B).all():
        raise ValueError(
            f"The outcome matrix B must be finite and [{SIDE**2}, 10], got {list(B.shape)} {B.dtype}; "
            "pass what outcome_matrix() returns first."
        )


def structural(images: Array, B: Array) -> Array:
    """f of pictures [n, 4096], with B of [4096, 10]: [n]."""
    _check_matrix(B)
    return (np.mean((images @ B) ** 2, axis=1) - 5000) / 1000


# Samples.


class Sample(NamedTuple):
    """Independent draws.

    Attributes:
        z: instruments, the values of scale, orientation and posX, [n, 3], float32.
        x: noisy pictures, [n, 4096], float32.
        y: outcomes, [n], float32.
    """

    z: Array
    x: Array
    y: Array


class Data(NamedTuple):
    """A training sample, its first half for the inner level and its second half for the outer.

    Attributes:
        z_inner, z_outer: instruments, [n / 2, 3], float32.
        x_inner, x_outer: noisy pictures, [n / 2, 4096], float32.
        y_inner, y_outer: outcomes, [n / 2], float32.
    """

    z_inner: Array
    x_inner: Array
    y_inner: Array
    z_outer: Array
    x_outer: Array
    y_outer: Array


class Clean(NamedTuple):
    """The published test set.

    Attributes:
        x: pictures without noise, [588, 4096], float32.
        y: f of them, [588].
    """

    x: Array
    y: Array


def generate(n: int, seed: int, source: Hearts, B: Array) -> Data:
    """A training sample of even size n.

    Raises:
        ValueError: n is odd or less than 2.
    """
    if n < 2 or n % 2:
        raise ValueError(f"n must be even and at least 2, one half for each level, got {n}.")
    sample = _draw(n, np.random.default_rng(seed), source, B)
    return Data(*(a[: n // 2] for a in sample), *(a[n // 2 :] for a in sample))


def validation(num: int, seed: int, source: Hearts, B: Array) -> Sample:
    """Draws of the same law as, and independent of, those of `generate` with the same seed.

    Raises:
        ValueError: num is less than 1.
    """
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}.")
    return _draw(num, np.random.default_rng([seed, 1]), source, B)


def _draw(n: int, rng: np.random.Generator, source: Hearts, B: Array) -> Sample:
    pos_x, pos_y, scale, orientation = (rng.integers(size, size=n) for size in (32, 32, 6, 40))
    x = images(source, scale, orientation, pos_x, pos_y)
    x += np.float32(0.1) * rng.standard_normal(x.shape, np.float32)
    y = structural(x, B) + (pos_y - 16) + 0.5 * rng.standard_normal(n)
    z = np.stack([SCALES[scale], ORIENTATIONS[orientation], POSITIONS[pos_x]], axis=1)
    return Sample(z.astype(np.float32), x, y.astype(np.float32))


def test_set(source: Hearts, B: Array) -> Clean:
    """The published grid: every fifth posX and posY, scales 0, 3, 5 and orientations 0, 10, 20, 30."""
    places = np.arange(0, 32, 5)
    grid = np.meshgrid(places, places, [0, 3, 5], [0, 10, 20, 30], indexing="ij")
    pos_x, pos_y, scale, orientation = (ids.ravel() for ids in grid)
    x = images(source, scale, orientation, pos_x, pos_y)
    return Clean(x, structural(x, B))
