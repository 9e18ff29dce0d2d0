r"""The dSprites benchmark of instrumental regression (Xu et al. 2021): its data, floors, and a reference from outside.

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

import os
import shutil
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

# Pictures.

SIDE = 64
SIZES = (6, 40, 32, 32)  # scales, orientations, posX, posY, in the order of the official file
HEART = 2  # of its three shapes
URL = "https://github.com/google-deepmind/dsprites-dataset/raw/master/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
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
    path = path or os.environ.get(IMAGES_VARIABLE)
    return load_hearts(path) if path else render_hearts()


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
        FileNotFoundError: there is no such file.
        ValueError: it is another file.
    """
    expected = (3 * int(np.prod(SIZES)), SIDE, SIDE)
    advice = f"pass the official file of dSprites, {URL}"
    if not Path(path).exists():
        raise FileNotFoundError(f"path {path} does not exist; {advice}.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"path {path} is no .npz file; {advice}.")
    with zipfile.ZipFile(path) as archive:
        if "imgs.npy" not in archive.namelist():
            raise ValueError(f"path {path} has no array imgs, only {', '.join(archive.namelist())}; {advice}.")
        with archive.open("imgs.npy") as file:
            shape, fortran_order, dtype = _array_header(file)
            if shape != expected or fortran_order or dtype.itemsize != 1:
                raise ValueError(f"imgs in {path} is {list(shape)} {dtype}, expected {list(expected)} uint8; {advice}.")
            # One block is all positions of a shape at one scale and orientation; the hearts come last.
            blocks, rows = SIZES[0] * SIZES[1], SIZES[2] * SIZES[3]
            for _ in range(HEART * blocks):
                file.read(rows * SIDE**2)
            packed = np.concatenate([_packed(file.read(rows * SIDE**2)) for _ in range(blocks)])

    def take(latents: Latents) -> Array:
        return np.unpackbits(packed[np.ravel_multi_index(latents, SIZES)], axis=1)

    return Hearts("official dSprites", take)


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    form: Any = np.lib.format
    version = form.read_magic(file)
    return form.read_array_header_1_0(file) if version == (1, 0) else form.read_array_header_2_0(file)


def _packed(block: bytes) -> Array:
    return np.packbits(np.frombuffer(block, np.uint8).reshape(-1, SIDE**2), axis=1)


def download(directory: str | Path = "~/.cache/funcbilevel") -> Path:
    """Fetches the official file (26 MB) from its public home, unless it is there already; returns its path.

    Raises:
        OSError: no connection, or what came is not a whole .npz file.
    """
    path = Path(directory).expanduser() / URL.rsplit("/", 1)[-1]
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        with urllib.request.urlopen(URL) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file)
        if not zipfile.is_zipfile(partial):
            raise OSError(f"What came from {URL} is not a whole .npz file; try again, or fetch it by hand to {path}.")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


# Outcomes.


def outcome_matrix(path: str | Path | None = None) -> tuple[Array, str]:
    """The matrix B of the outcome, [4096, 10], and a text that says which it is.

    Args:
        path: a .npy file with B or its transpose; by default FUNCBILEVEL_DSPRITES_MATRIX, and if that is not set
            either, B is drawn from U(0, 1), as the published one was.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    path = path or os.environ.get(MATRIX_VARIABLE)
    if not path:
        seed = 42
        return np.random.default_rng(seed).uniform(size=(SIDE**2, 10)), f"drawn from U(0,1), seed {seed}"
    matrix: Array = np.load(path)
    if matrix.shape == (10, SIDE**2):
        matrix = matrix.T
    _check_matrix(matrix)
    return matrix, f"published file {Path(path).name}"


def _check_matrix(B: Array) -> None:
    """Raises a ValueError if B is not [4096, 10] and finite."""
    if B.shape != (SIDE**2, 10) or not np.isfinite(B).all():
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


# Floors, and the reference from outside. Each returns its mean squared error on the test set.

RIDGES = np.logspace(-10, 2, 37)


def least_squares_floor(data: Data, test: Clean) -> float:
    """Ridge regression of y on the pixels, which takes the confounder for an effect.

    Fitted on the inner half, the ridge is the best on the outer half; then all are fitted again.
    """
    x, mean, y, y_mean = _centred(data.x_inner, data.y_inner)
    values, vectors = np.linalg.eigh(x @ x.T)
    unit = np.mean(values)
    coefficients = (vectors.T @ y)[:, None] / (values[:, None] + unit * RIDGES)
    predictions = y_mean + (data.x_outer - mean) @ (x.T @ (vectors @ coefficients))
    ridge = unit * RIDGES[np.argmin(np.mean((predictions - data.y_outer[:, None]) ** 2, axis=0))]

    x, mean, y, y_mean = _centred(np.concatenate([data.x_inner, data.x_outer]), np.append(data.y_inner, data.y_outer))
    slope = x.T @ np.linalg.solve(x @ x.T + 2 * ridge * np.eye(len(x)), y)  # twice the rows, twice the ridge
    return _test_mse(y_mean + (test.x - mean) @ slope, test)


def two_stage_floor(data: Data, test: Clean, ridge: float = 1e-6) -> float:
    """Linear two-stage least squares on the raw instruments, which explain few of the pixels' directions.

    Both stages take both halves. The ridge of the second is relative to the predicted pixels' total variance.
    """
    x, mean, y, y_mean = _centred(np.concatenate([data.x_inner, data.x_outer]), np.append(data.y_inner, data.y_outer))
    z, *_ = _centred(np.concatenate([data.z_inner, data.z_outer]), y)
    w = np.linalg.solve(z.T @ z, z.T @ x)
    # The predicted x are z w, of rank 3: (w'z'z w + r I)^-1 w'z'y = w' (z'z w w' + r I)^-1 z'y.
    normal = z.T @ z @ (w @ w.T)
    slope = w.T @ np.linalg.solve(normal + ridge * np.trace(normal) * np.eye(len(w)), z.T @ y)
    return _test_mse(y_mean + (test.x - mean) @ slope, test)


def kernel_iv(data: Data, test: Clean) -> float:
    r"""Kernel instrumental regression (KIV): both stages are ridge regressions in Gaussian kernels' spaces.

    With stage 1 the inner half, of size n, and stage 2 the outer one, marked by a tilde, of size m,

    .. math::
        \Gamma = (K_{ZZ} + n \lambda I)^{-1} K_{Z \tilde Z}, \quad
        \alpha = \Gamma (\Gamma^\top K_{XX} \Gamma + m \xi I)^{-1} \tilde y, \quad f(x) = K_{xX} \alpha ,

    which is the paper's :math:`(W W^\top + m \xi K_{XX})^{-1} W \tilde y` with :math:`W = K_{XX} \Gamma`. The ridge
    :math:`\lambda` has the least loss of stage 1 on the half of stage 2, and :math:`\xi` the least squared residual
    of f on the half of stage 1. Kernel widths are median distances; the instruments enter as they are, unscaled.

    References:
        Singh, Sahani, Gretton, *Kernel Instrumental Variable Regression*, NeurIPS 2019,
        https://arxiv.org/abs/1906.00232.
    """
    k_zz, k_zz2 = _gaussian(data.z_inner, (data.z_inner, data.z_outer))
    k_xx, k_xx2, k_xtest = _gaussian(data.x_inner, (data.x_inner, data.x_outer, test.x))

    gamma = _stage_one(k_zz, k_zz2, k_xx, k_xx2)
    values, vectors = np.linalg.eigh(gamma.T @ k_xx @ gamma)
    basis = gamma @ vectors
    ridges = len(values) * RIDGES
    alphas = basis @ ((vectors.T @ data.y_outer)[:, None] / (np.maximum(values, 0)[:, None] + ridges))
    losses = np.mean((k_xx @ alphas - data.y_inner[:, None]) ** 2, axis=0)
    return _test_mse(k_xtest.T @ alphas[:, np.argmin(losses)], test)


def _stage_one(k_zz: Array, k_zz2: Array, k_xx: Array, k_xx2: Array) -> Array:
    """Gamma with the best lambda, [n, m]: column j weighs the pictures of stage 1 into the mean one given z2_j."""
    values, vectors = np.linalg.eigh(k_zz)
    # In the eigenvectors' basis Gamma is `diag(d) rotated`, d = 1 / (values + n lambda), and the loss without its
    # constant, tr(Gamma' K_XX Gamma - 2 K_X2X Gamma), is a quadratic form in d.
    rotated = vectors.T @ k_zz2
    quadratic = (vectors.T @ k_xx @ vectors) * (rotated @ rotated.T)
    linear = np.sum((vectors.T @ k_xx2) * rotated, axis=1)
    d = 1 / (np.maximum(values, 0)[:, None] + len(values) * RIDGES)
    losses = np.sum(d * (quadratic @ d), axis=0) - 2 * linear @ d
    return vectors @ (d[:, [np.argmin(losses)]] * rotated)


def _centred(x: Array, y: Array) -> tuple[Array, Array, Array, float]:
    """x and y, in float64, without their means; x, its mean, y, its mean."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    return x - x.mean(axis=0), x.mean(axis=0), y - y.mean(), float(y.mean())


def _squared_distances(a: Array, b: Array) -> Array:
    """Between the rows of a, [n, d], and of b, [m, d]: [n, m], float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.maximum(np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1) - 2 * a @ b.T, 0)


def _gaussian(a: Array, others: Sequence[Array]) -> list[Array]:
    """Kernel matrices of a, [n, d], with each of the others, [m, d]: [n, m]; its width is a's median distance."""
    squared_width = np.median(_squared_distances(a, a))
    return [np.exp(-_squared_distances(a, b) / (2 * squared_width)) for b in others]


def _test_mse(predictions: Array, test: Clean) -> float:
    return float(np.mean((predictions - test.y) ** 2))
