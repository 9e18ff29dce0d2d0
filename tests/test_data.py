"""Data sets: what is read from their files, and one sentence on files that are missing or damaged."""

import hashlib
import http.client
import os
import re
import urllib.error

import numpy as np
import pandas as pd
import pytest

from funcbilevel import cli
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks.data import adult, health, nba, synthetic
from funcbilevel.tasks.data.dataset import split
from funcbilevel.tasks.data.fetch import fetch, git_blob


def rate_gap(part):
    """Difference of the labels' means between the two groups of the first attribute."""
    group = part.groups[:, 0]
    return abs(np.mean(part.y[group == 0]) - np.mean(part.y[group == 1]))


ROWS = {
    "adult.data": [
        "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40, "
        "United-States, <=50K",
        "50, Private, 83311, HS-grad, 9, Divorced, Sales, Husband, Black, Female, 0, 0, 13, Cuba, >50K",
        "38, ?, 215646, HS-grad, 9, Divorced, Sales, Husband, White, Male, 0, 0, 40, United-States, <=50K",
        "28, Private, 338409, Masters, 14, Divorced, Sales, Wife, White, Female, 0, 1902, 60, Cuba, >50K",
        "20, Private, 338409, Masters, 14, Divorced, Sales, Wife, Other, Male, 10, 5, 50, Cuba, <=50K",
    ],
    "adult.test": [
        "90, Never-worked, 226802, Masters, 7, Divorced, Sales, Wife, Black, Male, 0, 0, 40, Cuba, >50K.",
        "25, Private, 226802, Masters, 7, Divorced, Sales, Wife, Black, Female, 0, 0, 40, ?, <=50K.",
        "25, Private, 226802, Masters, 7, Divorced, Sales, Wife, Black, Female, 0, 0, 40, Cuba, <=50K.",
    ],
}


def write_adult(directory, header):
    for name, rows in ROWS.items():
        first = [header] if header else ["|1x3 Cross validator"] * (name == "adult.test")
        (directory / name).write_text("\n".join([*first, *rows, "", ""]))
    return directory


@pytest.mark.parametrize("header", ["", ", ".join([*adult.COLUMNS[:-1], "Y"])])
def test_adult(tmp_path, header):
    dataset = adult.load(write_adult(tmp_path, header), ("sex", "race"), validation=0.25)
    assert [len(part.y) for part in (dataset.train, dataset.validation, dataset.test)] == [3, 1, 2]
    assert dataset.num_groups == (2, 3)
    assert dataset.test.y.tolist() == [1.0, 0.0]
    assert dataset.test.groups.tolist() == [[1, 0], [0, 0]]  # Female, Male; Black, Other, White
    # five numbers, sex in one column, and 2 + 3 + 2 + 2 + 3 + 3 + 2 categories
    assert dataset.train.x.shape[1] == 5 + 1 + 17
    assert np.min(dataset.train.x) == 0.0
    assert np.max(dataset.train.x) == 1.0
    ages = np.array([39, 50, 28, 20])
    kept = sorted(split(4, (0.25,), 0)[1].tolist())
    low, high = ages[kept].min(), ages[kept].max()
    assert dataset.test.x[0, 0] == pytest.approx((90 - low) / (high - low))  # scaled by the training part alone
    assert np.sum(dataset.test.x[0, 5:] != 0) == 7  # "Never-worked" is unknown: eight categories less one
    assert np.sum(dataset.test.x[1, 5:] != 0) == 7  # "Female" is the zero of its column
    without = adult.load(tmp_path, ("sex", "race"), validation=0.25, use_attributes=False)
    assert without.train.x.shape[1] == 5 + 17 - 3
    np.testing.assert_array_equal(without.test.groups, dataset.test.groups)


def test_adult_education(tmp_path):
    dataset = adult.load(write_adult(tmp_path, ""), ("race",), validation=0.25, label="education")
    assert dataset.name == "adult-education"
    assert (dataset.num_classes, dataset.num_groups) == (4, (3,))
    labels = {39: 3, 50: 1, 28: 3, 20: 3, 90: 0, 25: 0}  # education-num 13, 9, 14, 14, and 7 in adult.test
    kept = split(4, (0.25,), 0)[1]
    assert dataset.train.y.tolist() == [list(labels.values())[i] for i in kept]
    assert dataset.test.y.tolist() == [0.0, 0.0]
    # income, four numbers, sex in one column, and 2 + 3 + 2 + 3 + 3 + 2 categories without the education's 3
    assert dataset.train.x.shape[1] == 1 + 4 + 1 + 14
    assert dataset.test.x[:, 0].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="label must be one of income, education, got 'sex'"):
        adult.load(tmp_path, label="sex")


def test_adult_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv(adult.VARIABLE, str(write_adult(tmp_path, "")))
    assert len(adult.load().test.y) == 2
    with pytest.raises(ValueError, match=r"attributes must be among workclass.*got \['colour'\]"):
        adult.load(attributes=("sex", "colour"))


CUT = ROWS["adult.data"][0][:60]
BAD_ADULT = {
    "no number": (ROWS["adult.data"][1].replace("50, ", "fifty, "), "could not convert string to float: 'fifty'"),
    "no finite number": (ROWS["adult.data"][1].replace("50, ", "nan, "), "must hold finite numbers"),
    "label": (ROWS["adult.test"][0].replace(">50K.", "rich"), "the last column must be <=50K or >50K, got rich"),
    "cut off": ("\n".join([*ROWS["adult.data"][1:], CUT]), "line 5 has 7 values for 15 columns"),
    "too long": (ROWS["adult.data"][1] + ", 1", "line 1 has 16 values for 15 columns"),
    "gap": (ROWS["adult.data"][1].replace(" Cuba,", " ,"), "line 1 has 14 values for 15 columns"),
    "empty": ("", "it holds no rows"),
    "NULs": ("\0" * 100, "line 1 has 1 values for 15 columns"),
    "archive": (b"\x1f\x8b\x08\xff\xfe", "can't decode byte"),
}


@pytest.mark.parametrize("kind", BAD_ADULT)
def test_damaged_adult(tmp_path, kind):
    content, message = BAD_ADULT[kind]
    (tmp_path / "adult.data").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"adult\.data is damaged or another file: .*{message}.*; {adult.VARIABLE} or"):
        adult.load(tmp_path)


def test_groups_of_the_test_part_are_those_of_the_training_part(tmp_path):
    write_adult(tmp_path, "")
    test = tmp_path / "adult.test"
    test.write_text(test.read_text().replace("Black", "Amer-Indian-Eskimo"))
    with pytest.raises(
        UserError, match=r"adult\.test has groups of race that adult\.data has not \(Amer-Indian-Eskimo"
    ):
        adult.load(tmp_path, ("sex", "race"))


# Downloads.


def test_fetch_compares_checksums(tmp_path):
    source, target = tmp_path / "source", tmp_path / "cache" / "target"
    source.write_text("data")
    right = hashlib.sha256(b"data").hexdigest()
    with pytest.raises(
        UserError, match=f"has the checksum {right}, not 00; try again, or fetch it by hand to .*target"
    ):
        fetch(source.as_uri(), target, "00")
    assert not list(target.parent.iterdir())
    fetch(source.as_uri(), target, right)
    assert target.read_text() == "data"
    source.unlink()
    fetch(source.as_uri(), target, right)  # it is there already
    target.write_text("dat")
    with pytest.raises(UserError, match=r"target is damaged: .*; remove it, and it is downloaded again"):
        fetch(source.as_uri(), target, right)


def test_the_checksum_that_git_uses():
    assert git_blob(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object


class Cut:
    """A response that ends early."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def read(self):
        raise http.client.IncompleteRead(b"da", 2)


@pytest.mark.parametrize(
    ("opens", "message"),
    [
        (urllib.error.URLError(OSError(-2, "Name or service not known")), "Name or service not known"),
        (urllib.error.HTTPError("http://x", 404, "Not Found", None, None), "Not Found"),
        (TimeoutError("timed out"), "timed out"),
        (Cut(), r"IncompleteRead\(2 bytes read, 2 more expected\)"),
    ],
    ids=["no network", "moved", "slow", "cut off"],
)
def test_downloads_that_fail(tmp_path, monkeypatch, opens, message):
    def urlopen(url, timeout):
        if isinstance(opens, Exception):
            raise opens
        return opens

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    pattern = rf"https://x/y cannot be downloaded \({message}\); try again, or fetch it by hand to .*/y\."
    with pytest.raises(UserError, match=pattern):
        fetch("https://x/y", tmp_path / "y", "00")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(adult.VARIABLE not in os.environ, reason="FUNCBILEVEL_ADULT_DIR is not set")
def test_the_real_adult():
    dataset = adult.load(attributes=("sex", "race"))
    assert len(dataset.train.y) + len(dataset.validation.y) == 30162
    assert len(dataset.test.y) == 15060
    assert dataset.train.x.shape[1] == 102
    assert dataset.num_groups == (2, 5)
    gap = rate_gap(dataset.test)
    assert gap == pytest.approx(0.20, abs=0.01)  # of the labels themselves


@pytest.mark.skipif(nba.VARIABLE not in os.environ, reason="FUNCBILEVEL_NBA_DIR is not set")
def test_the_real_nba():
    dataset = nba.load()
    weights = np.stack([part.weight for part in (dataset.train, dataset.validation, dataset.test)])
    assert weights.sum(axis=1).tolist() == [100, 71, 142]
    assert weights.sum(axis=0).max() == 1.0
    assert dataset.train.x.features.shape == (403, 96)
    assert np.all(np.isfinite(dataset.train.x.features))
    assert not np.array_equal(nba.load(seed=1).train.weight, dataset.train.weight)


def health_table(n=60):
    rng = np.random.default_rng(0)
    age = rng.integers(9, size=n)
    columns = {
        "MemberID_t": np.arange(n),
        "YEAR_t": np.where(np.arange(n) < 50, "Y3", "Y2"),
        "DaysInHospital": rng.integers(3, size=n),
        "trainset": 1,
        "sexMISS": np.arange(n) == 0,
        "age_MISS": np.arange(n) == 1,
        **{f"age_{k}5": age == k for k in range(9)},
        "sexMALE": np.arange(n) % 2 == 0,
        "sexFEMALE": np.arange(n) % 2 == 1,
        **{f"CharlsonIndexI_{s}": np.arange(n) % 4 for s in ("max", "min", "ave", "range", "stdev")},
        "no_Claims": rng.normal(size=n),
        "LabCount_total": rng.normal(size=n),
    }
    return pd.DataFrame({name: np.multiply(v, 1) if name != "YEAR_t" else v for name, v in columns.items()})


def test_health(tmp_path, monkeypatch):
    path = tmp_path / "health.csv"
    health_table().to_csv(path)
    monkeypatch.setenv(health.VARIABLE, str(path))
    dataset = health.load()
    parts = (dataset.train, dataset.validation, dataset.test)
    assert [len(part.y) for part in parts] == [30, 8, 10]
    assert dataset.num_groups == (9,)
    without = health.load(use_attributes=False)
    np.testing.assert_array_equal(without.test.x, np.delete(dataset.test.x, -2, axis=1))
    np.testing.assert_array_equal(without.test.groups, dataset.test.groups)
    assert sum(float(np.sum(part.y)) for part in parts) == 36 - 0  # of rows 2..49, those with row % 4 != 0
    assert dataset.train.x.shape[1] == 7  # index, sexMISS, age_MISS, two features, age, sex
    np.testing.assert_allclose(
        dataset.train.x[:, -2] * np.ptp(dataset.train.groups) + dataset.train.groups.min(),
        dataset.train.groups[:, 0],
        rtol=1e-5,
    )


BAD_HEALTH = {
    "columns": (lambda frame: frame.drop(columns=["age_45", "YEAR_t"]), "the columns YEAR_t, age_45 are missing"),
    "years": (lambda frame: frame.assign(YEAR_t="Y1"), "no row of year Y3 has a known sex and age"),
    "texts": (lambda frame: frame.assign(no_Claims="many"), "the columns no_Claims must hold finite numbers"),
    "gaps": (lambda frame: frame.assign(sexFEMALE=np.nan), "the columns sexFEMALE must hold finite numbers"),
    "nothing": (lambda frame: pd.DataFrame(), "No columns|columns .* are missing"),
}


@pytest.mark.parametrize("kind", BAD_HEALTH)
def test_damaged_health(tmp_path, monkeypatch, kind):
    change, message = BAD_HEALTH[kind]
    path = tmp_path / "health.csv"
    change(health_table()).to_csv(path, index=False)
    monkeypatch.setenv(health.VARIABLE, str(path))
    with pytest.raises(
        UserError, match=f"health.csv is damaged or another file: .*({message}).*; Heritage Health cannot"
    ):
        health.load()


# The NBA graph.


def write_nba(directory, players=None, pairs="7 8\n8 9\n9 7\n"):
    frame = pd.DataFrame(
        {"user_id": [7, 8, 9, 4], "SALARY": [1, 0, 1, -1], "AGE": [20, 30, 25, 27], "country": [0, 1, 0, 1]}
    )
    (directory / "nba.csv").write_text(frame.to_csv(index=False) if players is None else players)
    (directory / "nba_relationship.txt").write_text(pairs)
    return directory


def test_nba(tmp_path):
    dataset = nba.load(write_nba(tmp_path), num_train=1)
    weights = np.stack([part.weight for part in (dataset.train, dataset.validation, dataset.test)])
    assert weights[:, 3].tolist() == [0.0, 0.0, 0.0]  # its label is unknown
    assert weights.sum(axis=0)[:3].tolist() == weights.sum(axis=1).tolist() == [1.0, 1.0, 1.0]
    np.testing.assert_allclose(dataset.train.x.adjacency, nba.normalised(np.array([[0, 1], [1, 2], [2, 0]]), 4))
    assert dataset.train.groups[:, 0].tolist() == [0, 1, 0, 1]
    without = nba.load(tmp_path, num_train=1, use_attributes=False)
    assert without.train.x.features.shape == (4, 1)
    assert without.train.groups[:, 0].tolist() == [0, 1, 0, 1]


BAD_NBA = {
    "columns": ("nba.csv", {"players": "user_id,country\n1,2\n"}, "the columns SALARY are missing"),
    "texts": ("nba.csv", {"players": "user_id,country,SALARY\n1,x,2\n"}, "could not convert string to float"),
    "gaps": ("nba.csv", {"players": "user_id,country,SALARY\n1,2\n"}, "all columns must hold finite numbers"),
    "twice": ("nba.csv", {"players": "user_id,country,SALARY\n1,2,3\n1,2,3\n"}, "user_id must name each player once"),
    "empty": ("nba.csv", {"players": ""}, "No columns to parse"),
    "cut off": ("nba_relationship.txt", {"pairs": "7 8\n8"}, "pair 2 must be two user_id of nba.csv, got 8"),
    "strangers": ("nba_relationship.txt", {"pairs": "7 8\n8 5"}, "pair 2 must be two user_id of nba.csv, got 8 5"),
    "words": ("nba_relationship.txt", {"pairs": "<html>"}, "invalid literal for int"),
    "no pairs": ("nba_relationship.txt", {"pairs": "\n"}, "it holds no pairs"),
}


@pytest.mark.parametrize("kind", BAD_NBA)
def test_damaged_nba(tmp_path, kind):
    name, files, message = BAD_NBA[kind]
    write_nba(tmp_path, **files)
    with pytest.raises(
        UserError, match=f"{name} is damaged or another file: {message}.*; {nba.VARIABLE} or --data must"
    ):
        nba.load(tmp_path, num_train=1)


def test_normalised_adjacency():
    a = nba.normalised(np.array([[0, 1], [1, 0], [1, 2]]), 4)
    expected = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]) / np.sqrt(
        np.outer(*2 * ([2, 3, 2, 1],))
    )
    np.testing.assert_allclose(a, expected, rtol=1e-6)


# Synthetic data.


def test_synthetic_groups_go_with_labels():
    dataset = synthetic.load(n=4000, bias=1.0)
    gap = rate_gap(dataset.train)
    assert 0.3 < gap < 0.6  # sigmoid(1) - sigmoid(-1) = 0.46
    without = synthetic.load(n=4000, bias=1.0, use_attributes=False)
    np.testing.assert_array_equal(without.test.x, dataset.test.x[:, :-1])
    again = synthetic.load(n=4000, bias=1.0)
    for part, same in zip(dataset.test, again.test, strict=True):
        np.testing.assert_array_equal(part, same)


def test_synthetic_classes():
    dataset = synthetic.load(n=4000, num_classes=3)
    assert dataset.num_classes == 3
    assert np.unique(dataset.train.y).tolist() == [0.0, 1.0, 2.0]
    rates = [np.mean(dataset.train.groups[dataset.train.y == c]) for c in range(3)]
    np.testing.assert_allclose(rates, 1 / (1 + np.exp([1.0, 0.0, -1.0])), atol=0.06)
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        synthetic.load(num_classes=1)


# Commands.


@pytest.mark.parametrize(
    ("dataset", "variable", "message"),
    [
        (
            "adult",
            adult.VARIABLE,
            r"There is no file .*adult\.data; FUNCBILEVEL_ADULT_DIR or --data must name a directory",
        ),
        ("nba", nba.VARIABLE, r"There is no file .*nba\.csv; FUNCBILEVEL_NBA_DIR or --data must name a directory"),
        ("health", health.VARIABLE, "is no file; Heritage Health cannot be downloaded, so name your copy"),
        ("health", None, "Heritage Health cannot be downloaded, so name your copy of the table by --data or FUNC"),
    ],
)
def test_a_command_without_its_data(tmp_path, monkeypatch, capsys, dataset, variable, message):
    monkeypatch.delenv(health.VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "fairness", "--dataset", dataset, "--output-dir", str(tmp_path / "run")])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
