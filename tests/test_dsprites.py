"""The dSprites data: pictures, outcomes, samples and the published test grid; the floors on small problems."""

import os
from pathlib import Path

import numpy as np
import pytest

from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks.data import dsprites, dsprites_floors, fetch

SHARED = Path(__file__).parents[2] / "shared" / "data" / "dsprite_mat.npy"
IDS = np.arange(32)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """The defaults, wherever the tests run."""
    monkeypatch.delenv(dsprites.IMAGES_VARIABLE, raising=False)
    monkeypatch.delenv(dsprites.MATRIX_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def source():
    return dsprites.render_hearts()


@pytest.fixture(scope="module")
def B():
    return np.random.default_rng(42).uniform(size=(4096, 10))


PUBLISHED = os.environ.get(dsprites.MATRIX_VARIABLE) or (str(SHARED) if SHARED.exists() else None)


@pytest.fixture(scope="module")
def published():
    if PUBLISHED is None:
        pytest.skip(f"the published outcome matrix is not here; set {dsprites.MATRIX_VARIABLE} to its path")
    return dsprites.outcome_matrix(PUBLISHED)[0]


def pictures(source, scale, orientation, pos_x, pos_y):
    return dsprites.images(source, scale, orientation, pos_x, pos_y).reshape(-1, 64, 64)


# Pictures.


def test_pictures_are_binary_and_upright(source):
    picture = pictures(source, 5, 0, 15, 15)
    assert picture.shape == (1, 64, 64)
    assert picture.dtype == np.float32
    assert set(np.unique(picture)) == {0.0, 1.0}
    rows, columns = np.nonzero(picture[0])
    assert np.ptp(columns) + 1 == 21
    assert abs(rows.mean() - 31) < 0.3
    assert columns.mean() == 31
    np.testing.assert_array_equal(picture[0], np.roll(picture[0, :, ::-1], -1, axis=1))  # symmetric about column 31
    widths = picture[0].sum(axis=1)
    assert widths[rows.max()] <= 3  # the tip is below, the lobes above
    assert widths[rows.min()] > 3


def test_scale_and_orientation(source):
    areas = pictures(source, np.arange(6), 7, 16, 16).sum(axis=(1, 2))
    assert np.all(np.diff(areas) > 0)
    assert areas[0] / areas[5] == pytest.approx(0.25, rel=0.1)
    turned = pictures(source, 5, np.arange(40), 16, 16)
    np.testing.assert_array_equal(turned[0], turned[39])  # 0 and 2 pi
    assert len(np.unique(turned.reshape(40, -1), axis=0)) == 39
    _, columns = np.nonzero(turned[10])  # a quarter: clockwise, so that the tip points to the left
    assert 32 - columns.min() > columns.max() - 32


def test_positions_are_whole_pixels(source):
    right = pictures(source, 3, 11, IDS, 9)
    down = pictures(source, 3, 11, 9, IDS)
    np.testing.assert_array_equal(right[1:], np.roll(right[:-1], 1, axis=2))
    np.testing.assert_array_equal(down[1:], np.roll(down[:-1], 1, axis=1))


@pytest.mark.parametrize("pos_y", [0, 31])
@pytest.mark.parametrize("pos_x", [0, 31])
def test_hearts_stay_inside(source, pos_x, pos_y):
    corner = pictures(source, 5, np.arange(40), pos_x, pos_y)
    centre = pictures(source, 5, np.arange(40), 16, 16)
    np.testing.assert_array_equal(corner.sum(axis=(1, 2)), centre.sum(axis=(1, 2)))
    assert not corner[:, [0, -1]].any()
    assert not corner[:, :, [0, -1]].any()


def official_file(path, sizes, shape=(64, 64), key="imgs"):
    """A small file in the official order: each picture of a heart spells its own index in its first pixels."""
    num = int(np.prod(sizes))
    imgs = np.full((3 * num, *shape), 1, np.uint8)
    hearts = np.arange(num)[:, None] >> np.arange(12) & 1
    imgs[2 * num :] = 0
    imgs[2 * num :, 0, :12] = hearts
    np.savez_compressed(path, **{key: imgs, "latents_classes": np.zeros(3)})
    return imgs


def test_official_order(tmp_path, monkeypatch):
    sizes = (2, 3, 4, 5)
    monkeypatch.setattr(dsprites, "SIZES", sizes)
    imgs = official_file(tmp_path / "small.npz", sizes).reshape(3, *sizes, 64, 64)
    monkeypatch.setenv(dsprites.IMAGES_VARIABLE, str(tmp_path / "small.npz"))
    source = dsprites.hearts()
    assert source.name == "official dSprites"
    ids = np.indices(sizes).reshape(4, -1)
    ids = ids[:, np.random.default_rng(0).permutation(ids.shape[1])]
    taken = pictures(source, *ids)
    assert taken.dtype == np.float32
    np.testing.assert_array_equal(taken, imgs[(2, *ids)])


def test_sources_by_default(source):
    assert dsprites.hearts().name == source.name == "rendered hearts"
    latents = (2, 13, 5, 20)
    np.testing.assert_array_equal(dsprites.images(dsprites.hearts(), *latents), dsprites.images(source, *latents))


def test_load_hearts_rejects_other_files(tmp_path, monkeypatch):
    monkeypatch.setattr(dsprites, "SIZES", (2, 3, 4, 5))
    official_file(tmp_path / "whole.npz", (2, 3, 4, 5))
    whole = (tmp_path / "whole.npz").read_bytes()
    middle = len(whole) // 3
    flipped = bytes([*whole[:middle], whole[middle] ^ 255, *whole[middle + 1 :]])
    official_file(tmp_path / "key", (2, 3, 4, 5), key="images")
    official_file(tmp_path / "sizes", (2, 3, 4, 4))
    np.savez(tmp_path / "grey", imgs=np.full((360, 64, 64), 7, np.uint8))
    files = {
        "text.npz": (b"version https://git-lfs.github.com/spec/v1", "is damaged or another file: File is not a zip"),
        "cut.npz": (whole[:-30], "is damaged or another file: File is not a zip file"),
        "flipped.npz": (flipped, "is damaged or another file: "),
        "empty.npz": (b"", "is damaged or another file"),
        "key.npz": (None, r"has no array imgs, only images\.npy"),
        "sizes.npz": (None, r"is \[288, 64, 64\] uint8, expected \[360, 64, 64\] uint8"),
        "grey.npz": (None, "pixels of imgs must be 0 or 1"),
    }
    for name, (content, message) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.*{message}.*; pass the official file of dSprites, https"):
            dsprites.load_hearts(tmp_path / name)
    with pytest.raises(UserError, match=r"There is no file .*nowhere\.npz; pass the official file"):
        dsprites.load_hearts(tmp_path / "nowhere.npz")
    with pytest.raises(UserError, match="is no file; pass the official file"):
        dsprites.load_hearts(tmp_path)


def test_download(tmp_path, monkeypatch):
    home = tmp_path / "home.npz"
    np.savez(home, imgs=np.zeros(3))
    content = home.read_bytes()
    monkeypatch.setattr(dsprites, "URL", home.as_uri())
    monkeypatch.setattr(dsprites, "GIT_BLOB", fetch.git_blob(content))
    path = dsprites.download(tmp_path / "cache")
    assert path.read_bytes() == content
    home.write_bytes(content[:-30])
    assert dsprites.download(tmp_path / "cache") == path  # it is there already
    with pytest.raises(UserError, match=f"has the checksum [0-9a-f]*, not {dsprites.GIT_BLOB}; try again"):
        dsprites.download(tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())
    assert list((tmp_path / "cache").iterdir()) == [path]


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        ((6, 0, 0, 0), "scale has ids from 6 to 6; pass ids from 0 to 5"),
        ((0, np.array([3, 40]), 0, 0), "orientation has ids from 3 to 40; pass ids from 0 to 39"),
        ((0, 0, -1, 0), "pos_x has ids from -1 to -1"),
        ((0, 0, 0, 0.5), "pos_y is an array of float64; pass the latent's ids"),
    ],
)
def test_images_reject_bad_ids(source, latents, message):
    with pytest.raises(ValueError, match=message):
        dsprites.images(source, *latents)


# Outcomes.


def test_outcome_matrix(tmp_path, monkeypatch, B):
    drawn, name = dsprites.outcome_matrix()
    assert name == "drawn from U(0,1), seed 42"
    np.testing.assert_array_equal(drawn, B)
    np.save(tmp_path / "B.npy", B)
    np.save(tmp_path / "transposed.npy", B.T)
    for matrix, name in (
        dsprites.outcome_matrix(tmp_path / "B.npy"),
        dsprites.outcome_matrix(tmp_path / "transposed.npy"),
    ):
        assert name.startswith("published file")
        np.testing.assert_array_equal(matrix, B)
    monkeypatch.setenv(dsprites.MATRIX_VARIABLE, str(tmp_path / "B.npy"))
    assert dsprites.outcome_matrix()[1] == "published file B.npy"


@pytest.mark.parametrize(
    "bad", [np.ones((4096, 9)), np.ones(4096), np.full((4096, 10), np.nan), np.full((4096, 10), "1")]
)
def test_outcome_matrix_rejects(tmp_path, source, bad):
    np.save(tmp_path / "bad.npy", bad)
    with pytest.raises(
        UserError, match=r"bad\.npy .*B must be finite and \[4096, 10\].*; FUNCBILEVEL_DSPRITES_MATRIX or"
    ):
        dsprites.outcome_matrix(tmp_path / "bad.npy")
    with pytest.raises(ValueError, match=r"B must be finite and \[4096, 10\]"):
        dsprites.generate(2, 0, source, bad)


def test_outcome_matrix_rejects_damaged_files(tmp_path, B):
    np.save(tmp_path / "B.npy", B)
    np.savez(tmp_path / "archive.npz", B=B)
    whole = (tmp_path / "B.npy").read_bytes()
    contents = {"text": b"1 2 3", "empty": b"", "cut": whole[:-100], "zip": b"PK\x03\x04", "header": whole[:9]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "archive.npz"):
        with pytest.raises(UserError, match=f"{name} is damaged or another file: .+; FUNCBILEVEL_DSPRITES_MATRIX or"):
            dsprites.outcome_matrix(tmp_path / name)
    with pytest.raises(UserError, match=r"There is no file .*nowhere; FUNCBILEVEL_DSPRITES_MATRIX or --matrix must"):
        dsprites.outcome_matrix(tmp_path / "nowhere")


def test_structural_is_the_formula(B):
    x = np.random.default_rng(1).uniform(size=(3, 4096))
    expected = [(sum(float(B[:, k] @ row) ** 2 for k in range(10)) / 10 - 5000) / 1000 for row in x]
    np.testing.assert_allclose(dsprites.structural(x, B), expected, rtol=1e-12)


def test_published_statistics(source, published):
    rng = np.random.default_rng(0)
    ids = (rng.integers(size, size=8000) for size in dsprites.SIZES)
    f = dsprites.structural(dsprites.images(source, *ids), published)
    assert f.mean() == pytest.approx(1.3, abs=0.2)
    assert f.std() == pytest.approx(4.9, abs=0.1)
    assert dsprites.test_set(source, published).y.var() == pytest.approx(34, abs=1)


# Samples.


def test_generate(source, B):
    n, seed = 2000, 3
    data = dsprites.generate(n, seed, source, B)
    shapes = {"z": (n // 2, 3), "x": (n // 2, 4096), "y": (n // 2,)}
    for name, a in data._asdict().items():
        assert (a.shape, a.dtype) == (shapes[name[0]], np.float32), name

    # The published order of draws, and what follows from the latents.
    rng = np.random.default_rng(seed)
    pos_x, pos_y, scale, orientation = (rng.integers(size, size=n) for size in (32, 32, 6, 40))
    values = [np.linspace(0.5, 1, 6)[scale], np.linspace(0, 2 * np.pi, 40)[orientation], np.linspace(0, 1, 32)[pos_x]]
    np.testing.assert_allclose(np.concatenate([data.z_inner, data.z_outer]), np.transpose(values), rtol=1e-6)
    x, y = np.concatenate([data.x_inner, data.x_outer]), np.append(data.y_inner, data.y_outer)
    noise = x - dsprites.images(source, scale, orientation, pos_x, pos_y)
    assert noise.std() == pytest.approx(0.1, rel=0.01)
    assert noise.mean() == pytest.approx(0, abs=1e-3)
    remainder = y - dsprites.structural(x, B)
    assert np.corrcoef(remainder, pos_y)[0, 1] > 0.99
    assert np.corrcoef(remainder, pos_x)[0, 1] == pytest.approx(0, abs=0.07)
    assert (remainder - (pos_y - 16)).std() == pytest.approx(0.5, rel=0.06)
    assert (remainder - (pos_y - 16)).mean() == pytest.approx(0, abs=0.05)


def test_samples_are_reproducible_and_differ(source, B):
    first, again, other = (dsprites.generate(20, seed, source, B) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)
    fresh, same = (dsprites.validation(10, 0, source, B) for _ in range(2))
    assert [a.shape for a in fresh] == [(10, 3), (10, 4096), (10,)]
    for a, b, c in zip(fresh, same, first[:3], strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


@pytest.mark.parametrize("n", [0, 5, -2])
def test_generate_rejects_odd_sizes(source, B, n):
    with pytest.raises(ValueError, match=f"n must be even and at least 2, .* got {n}"):
        dsprites.generate(n, 0, source, B)
    with pytest.raises(ValueError, match=f"num must be at least 1, got {-abs(n)}"):
        dsprites.validation(-abs(n), 0, source, B)


def test_published_grid(source, B):
    test = dsprites.test_set(source, B)
    assert test.x.shape == (588, 4096)
    assert test.x.dtype == np.float32
    np.testing.assert_array_equal(test.y, dsprites.structural(test.x, B))
    assert len(np.unique(test.x, axis=0)) == 588
    # Orientation runs fastest, posX slowest, as in the published code.
    np.testing.assert_array_equal(test.x[[1]], dsprites.images(source, 0, 10, 0, 0))
    np.testing.assert_array_equal(test.x[[4]], dsprites.images(source, 3, 0, 0, 0))
    np.testing.assert_array_equal(test.x[[12]], dsprites.images(source, 0, 0, 0, 5))
    np.testing.assert_array_equal(test.x[[84]], dsprites.images(source, 0, 0, 5, 0))


# Floors.


@pytest.fixture(scope="module")
def small(source, B):
    return dsprites.generate(200, 0, source, B), dsprites.test_set(source, B)


def mean_mse(data, test):
    return np.mean((test.y - np.append(data.y_inner, data.y_outer).mean()) ** 2)


def test_confounding_ruins_least_squares(small):
    data, test = small
    mse = dsprites_floors.least_squares_floor(data, test)
    assert isinstance(mse, float)
    assert mse > 1.3 * mean_mse(data, test)


def test_kernel_iv_beats_the_mean(source, B, small):
    """On average: with few samples the confounder's weight varies much from one to the next."""
    _, test = small
    samples = [dsprites.generate(600, seed, source, B) for seed in range(3)]
    mse = [dsprites_floors.kernel_iv(data, test) for data in samples]
    assert all(isinstance(value, float) for value in mse)
    assert np.mean(mse) < 0.8 * np.mean([mean_mse(data, test) for data in samples])


def test_kernel_iv_solves_the_papers_equations(small, monkeypatch):
    data, test = small
    lam = 1e-3
    monkeypatch.setattr(dsprites_floors, "RIDGES", np.array([lam]))

    def gaussian(a, b, width):
        return np.exp(-np.sum(((a[:, None] - b) / width) ** 2, axis=-1) / 2)

    z, z2 = data.z_inner.astype(float), data.z_outer.astype(float)
    z_width = np.median(np.linalg.norm(z[:, None] - z, axis=-1))
    x = data.x_inner.astype(float)
    x_width = np.median(np.linalg.norm(x[:, None] - x, axis=-1))
    k_xx = gaussian(x, x, x_width)
    w = k_xx @ np.linalg.solve(gaussian(z, z, z_width) + 100 * lam * np.eye(100), gaussian(z, z2, z_width))
    alpha = np.linalg.solve(w @ w.T + 100 * lam * k_xx, w @ data.y_outer)
    predictions = np.array([gaussian(row[None], x, x_width)[0] @ alpha for row in test.x.astype(float)])
    assert dsprites_floors.kernel_iv(data, test) == pytest.approx(np.mean((predictions - test.y) ** 2), rel=1e-6)


def test_linear_floors_recover_linear_outcomes():
    """Without confounder and with y linear in x, least squares find it; with y linear in E[x | z], two stages do."""
    rng = np.random.default_rng(0)
    beta = rng.normal(size=6)
    z = rng.normal(size=(400, 3))
    confounder = rng.normal(size=400)
    x = z @ rng.normal(size=(3, 6)) + 0.1 * rng.normal(size=(400, 6)) + confounder[:, None]
    x_test = x[:50]

    def split(y):
        return dsprites.Data(z[:200], x[:200], y[:200], z[200:], x[200:], y[200:])

    plain = dsprites_floors.least_squares_floor(split(x @ beta + 2), dsprites.Clean(x_test, x_test @ beta + 2))
    assert plain < 1e-6
    # Of beta, two stages see the part in the span of the first stage's rows.
    rows = np.linalg.lstsq(z - z.mean(axis=0), x - x.mean(axis=0))[0]
    beta = rows.T @ rng.normal(size=3)
    y = x @ beta + 3 * confounder
    test = dsprites.Clean(x_test, x_test @ beta)
    two_stage, least_squares = (
        dsprites_floors.two_stage_floor(split(y), test),
        dsprites_floors.least_squares_floor(split(y), test),
    )
    assert two_stage < 0.2 * least_squares
