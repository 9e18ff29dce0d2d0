"""Data for fair classification: UCI Adult, Heritage Health, the NBA graph, and a sample drawn by scikit-learn.

Every loader returns a `Dataset`: a training, a validation and a test part whose rows have a label, of two classes or
more, and one group number for each attribute. Whatever is fitted to data (scalers) is fitted to the training part only.
"""

import hashlib
import os
import shutil
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

Array: TypeAlias = np.ndarray[Any, Any]


class Batch(NamedTuple):
    """Rows to train or to measure on.

    Attributes:
        x: what the network is called on: features [n, d], pictures [n, h, w, c], or a `Graph` of n nodes.
        y: labels, 0 or 1, or 0 to k - 1, [n].
        groups: for each attribute the number of the row's group, from 0 on, [n, num_attributes].
        weight: 1 for rows that count and 0 for those that do not (other nodes of the graph), [n].
    """

    x: Any
    y: Any
    groups: Any
    weight: Any


class Graph(NamedTuple):
    """A graph with n nodes.

    Attributes:
        features: of the nodes, [n, d].
        adjacency: D^-1/2 (A + I) D^-1/2 with A the symmetric adjacency matrix and D the degrees of A + I, [n, n].
    """

    features: Any
    adjacency: Any


class Dataset(NamedTuple):
    """A classification task with attributes by which it should be fair.

    Attributes:
        name: of the data.
        train, validation, test: disjoint rows; of a graph the same nodes with different weights.
        attributes: names of the attributes.
        num_groups: how many groups each of them has.
        num_classes: how many labels there are.
    """

    name: str
    train: Batch
    validation: Batch
    test: Batch
    attributes: tuple[str, ...]
    num_groups: tuple[int, ...]
    num_classes: int = 2


def split(n: int, fractions: Sequence[float], seed: int) -> list[Array]:
    """Disjoint random sets of row numbers, the first of them the given fractions of n, the last what remains."""
    ends = np.cumsum([round(n * fraction) for fraction in fractions])
    return np.split(np.random.default_rng(seed).permutation(n), ends)


def scaler(train: Array) -> tuple[Array, Array]:
    """(low, range) of each column of the training part; `(x - low) / range` is in [0, 1] there."""
    low, high = train.min(axis=0), train.max(axis=0)
    return low, np.where(high > low, high - low, 1.0)


def _batch(x: Array, y: Array, groups: Array) -> Batch:
    return Batch(x.astype(np.float32), y.astype(np.float32), groups.astype(np.int32), np.ones(len(y), np.float32))


def _dataset(
    name: str,
    x: Array,
    y: Array,
    groups: Array,
    parts: Sequence[Array],
    attributes: tuple[str, ...],
    num_groups: tuple[int, ...],
    num_classes: int = 2,
) -> Dataset:
    """Rows scaled by the training part and divided into `parts`: training, validation, test."""
    low, extent = scaler(x[parts[0]])
    x = (x - low) / extent
    train, validation, test = (_batch(x[rows], y[rows], groups[rows]) for rows in parts)
    return Dataset(name, train, validation, test, attributes, num_groups, num_classes)


# UCI Adult.

ADULT_VARIABLE = "FUNCBILEVEL_ADULT_DIR"
ADULT_URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/adult/"
ADULT_SHA256 = {
    "adult.data": "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
    "adult.test": "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
}
ADULT_NUMBERS = ("age", "education-num", "capital-gain", "capital-loss", "hours-per-week")
ADULT_CATEGORIES = (
    *("workclass", "education", "marital-status", "occupation", "relationship", "race", "sex", "native-country"),
)
ADULT_EDUCATION = (9, 10, 13)
"""The lowest education-num of high school, of some college, of a bachelor's degree."""
ADULT_CLASSES = {"income": 2, "education": 1 + len(ADULT_EDUCATION)}
_ADULT_COLUMNS = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship"),
    *("race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"),
)


def adult(
    directory: str | Path | None = None,
    attributes: tuple[str, ...] = ("sex",),
    validation: float = 0.2,
    seed: int = 0,
    label: Literal["income", "education"] = "income",
) -> Dataset:
    """UCI Adult (Becker and Kohavi 1996): does a person earn more than 50,000 dollars?

    Or, with label "education", of which of four classes is their education: no diploma, high school, some college or an
    associate degree, a bachelor's degree or more? Income is then a feature in place of the two columns on education.

    Rows with a '?' are dropped (30,162 and 15,060 remain), and so is `fnlwgt`, a sampling weight. Categories are
    one-hot, sex as a single column; numbers are scaled to [0, 1] by the training part. Training and validation part
    come from adult.data, the test part is adult.test.

    Args:
        directory: where adult.data and adult.test are; by default FUNCBILEVEL_ADULT_DIR, and if that is not set
            either, they are downloaded from the UCI archive into a cache, and their checksums compared.
        attributes: among the categories, "sex" (two groups) and "race" (the file's five) for example.
        validation: the validation part's share of adult.data.
        seed: of that division.
        label: what to predict.

    Raises:
        FileNotFoundError: the directory does not hold the files.
        ValueError: there is no such attribute or label, or a file holds something else.
        OSError: the download failed.
    """
    if unknown := [name for name in attributes if name not in ADULT_CATEGORIES] or not attributes:
        raise ValueError(f"attributes must be among {', '.join(ADULT_CATEGORIES)}, got {unknown or '(none)'}.")
    if label not in ADULT_CLASSES:
        raise ValueError(f"label must be one of {', '.join(ADULT_CLASSES)}, got {label!r}.")
    directory = directory or os.environ.get(ADULT_VARIABLE)
    folder = download_adult() if directory is None else Path(directory)
    train_frame, test_frame = (read_adult(folder / name) for name in ADULT_SHA256)
    levels = {name: sorted(set(train_frame[name])) for name in ADULT_CATEGORIES}
    (x, groups, y), (x_test, groups_test, y_test) = (
        _adult_arrays(frame, levels, attributes, label) for frame in (train_frame, test_frame)
    )
    held_out, kept = split(len(y), (validation,), seed)
    parts = (kept, held_out, len(y) + np.arange(len(y_test)))
    return _dataset(
        "adult" if label == "income" else f"adult-{label}",
        np.concatenate([x, x_test]),
        np.concatenate([y, y_test]),
        np.concatenate([groups, groups_test]),
        parts,
        attributes,
        tuple(len(levels[name]) for name in attributes),
        ADULT_CLASSES[label],
    )


def read_adult(path: Path) -> "pd.DataFrame":
    """The rows of adult.data or adult.test without missing values, as texts and integers.

    Both the archive's files (no header, and one line of comment in adult.test) and copies with a header are read.
    """
    import pandas as pd  # noqa: PLC0415

    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; {ADULT_VARIABLE} must name a directory that holds it.")
    frame: Any = pd.read_csv(path, names=list(_ADULT_COLUMNS), skipinitialspace=True, comment="|", dtype=str)
    frame = frame[frame["age"] != "age"]
    frame = frame[~(frame == "?").any(axis=1)].dropna().reset_index(drop=True)
    frame["income"] = frame["income"].str.rstrip(".")
    if unknown := set(frame["income"]) - {"<=50K", ">50K"}:
        raise ValueError(f"{path}: the last column must be <=50K or >50K, got {', '.join(sorted(unknown))}.")
    return frame.drop(columns="fnlwgt").astype(dict.fromkeys(ADULT_NUMBERS, float))


def _adult_arrays(
    frame: "pd.DataFrame", levels: Mapping[str, list[str]], attributes: tuple[str, ...], label: str
) -> tuple[Array, Array, Array]:
    """(x, groups, y); a category that adult.data does not know is a row of zeros."""

    def one_hot(name: str) -> Array:
        columns = frame[name].to_numpy()[:, None] == np.array(levels[name], dtype=object)
        return columns[:, 1:] if name == "sex" else columns

    y = income = (frame["income"] == ">50K").to_numpy(float)
    features: list[Array] = []
    dropped: tuple[str, ...] = ()
    if label == "education":
        y, features = np.digitize(frame["education-num"].to_numpy(float), ADULT_EDUCATION), [income[:, None]]
        dropped = ("education", "education-num")
    features += [frame[[name]].to_numpy() for name in ADULT_NUMBERS if name not in dropped]
    features += [one_hot(name) for name in ADULT_CATEGORIES if name not in dropped]
    x = np.hstack(features).astype(float)
    groups = np.stack([np.searchsorted(levels[name], frame[name].to_numpy(str)) for name in attributes], axis=1)
    return x, groups, y.astype(float)


def download_adult(directory: str | Path = "~/.cache/funcbilevel/adult") -> Path:
    """Fetches adult.data and adult.test (6 MB) from the UCI archive, unless they are there; returns the directory.

    Raises:
        OSError: no connection, or a file's SHA-256 is not `ADULT_SHA256`.
    """
    folder = Path(directory).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for name, expected in ADULT_SHA256.items():
        fetch(ADULT_URL + name, folder / name, expected)
    return folder


def fetch(url: str, path: Path, sha256: str) -> None:
    """Downloads a file unless it is there; whatever fails, no half of it stays behind.

    Raises:
        OSError: no connection, or another checksum.
    """
    if path.exists():
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file)
        got = hashlib.sha256(partial.read_bytes()).hexdigest()
        if got != sha256:
            raise OSError(
                f"What came from {url} has SHA-256 {got}, not {sha256}; try again, or fetch it by hand to {path}."
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# Heritage Health.

HEALTH_VARIABLE = "FUNCBILEVEL_HEALTH_CSV"
HEALTH_AGES = tuple(f"age_{decade}5" for decade in range(9))
_HEALTH_DROPPED = (
    *("DaysInHospital", "MemberID_t", "YEAR_t", "trainset"),
    *(f"CharlsonIndexI_{statistic}" for statistic in ("max", "min", "ave", "range", "stdev")),
)


def health(path: str | Path | None = None, validation: float = 0.16, test: float = 0.2, seed: int = 0) -> Dataset:
    """Heritage Health (2011): is the Charlson index, which predicts mortality, above zero? Attribute: nine ages.

    The competition's licence forbids passing its data on, so the file is the user's: the table of one row per member
    and year that is common in the literature, with columns YEAR_t, sexMISS, age_MISS, age_05 ... age_85, sexMALE,
    sexFEMALE, CharlsonIndexI_max, and features. Year Y3 is used, and rows whose sex and age are known.

    Args:
        path: the .csv file; by default FUNCBILEVEL_HEALTH_CSV.
        validation, test: shares of these parts; the rest is the training part.
        seed: of that division.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: columns are missing, or no rows are left.
    """
    import pandas as pd  # noqa: PLC0415

    path = path or os.environ.get(HEALTH_VARIABLE)
    if not path or not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no file {path or '(none given)'}: Heritage Health cannot be downloaded; name your copy by "
            f"the option or by {HEALTH_VARIABLE}."
        )
    frame: Any = pd.read_csv(path)
    needed = ("YEAR_t", "sexMISS", "age_MISS", *HEALTH_AGES, "sexMALE", "sexFEMALE", "CharlsonIndexI_max")
    if missing := [name for name in needed if name not in frame.columns]:
        raise ValueError(f"{path}: the columns {', '.join(missing)} are missing.")
    frame = frame[(frame["YEAR_t"] == "Y3") & (frame["sexMISS"] == 0) & (frame["age_MISS"] == 0)]
    if frame.empty:
        raise ValueError(f"{path}: no row of year Y3 has a known sex and age.")
    y = (frame["CharlsonIndexI_max"] > 0).to_numpy(float)
    age = frame[list(HEALTH_AGES)].to_numpy().argmax(axis=1)
    sex = frame["sexFEMALE"].to_numpy(float)
    dropped = (*_HEALTH_DROPPED, *HEALTH_AGES, "sexMALE", "sexFEMALE")
    features = frame.drop(columns=[name for name in dropped if name in frame.columns])
    x = np.hstack([features.to_numpy(float), age[:, None], sex[:, None]])
    tested, held_out, kept = split(len(y), (test, validation), seed)
    return _dataset("health", x, y, age[:, None], (kept, held_out, tested), ("age",), (len(HEALTH_AGES),))


# The NBA graph.

NBA_VARIABLE = "FUNCBILEVEL_NBA_DIR"
NBA_URL = "https://raw.githubusercontent.com/yazdanimehdi/FairBiNN/d9679ba3a568c0053b6e98536fad4e424d7e2e88/data/NBA/"
NBA_SHA256 = {
    "nba.csv": "fe295195cff01f20b785fe9de1e24062123cb146bdae080ce8b3ea8315d45b80",
    "nba_relationship.txt": "14c73245e5d6b6457cce7504e2bb0ded6b81155e25bf0e7d23793df7c01b4873",
}


def nba(directory: str | Path | None = None, num_train: int = 100, validation: float = 1 / 3, seed: int = 0) -> Dataset:
    """The NBA graph (Dai and Wang 2021): does a player earn more than the median? Attribute: from overseas or not.

    403 players, joined if they follow one another on Twitter; 313 have a label. As in the literature 100 of these are
    the training part; the rest is divided into validation and test part, and not used as both.

    Args:
        directory: where nba.csv and nba_relationship.txt are; by default FUNCBILEVEL_NBA_DIR, and if that is not set
            either, they are downloaded from FairBiNN's repository into a cache, and their checksums compared.
        num_train: labelled nodes in the training part.
        validation: the validation part's share of the other labelled nodes.
        seed: of that division.

    Raises:
        FileNotFoundError: the directory does not hold the files.
        OSError: the download failed.
    """
    import pandas as pd  # noqa: PLC0415

    directory = directory or os.environ.get(NBA_VARIABLE)
    folder = _download_nba() if directory is None else Path(directory)
    for name in NBA_SHA256:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"There is no file {folder / name}; {NBA_VARIABLE} must name its directory.")
    frame: Any = pd.read_csv(folder / "nba.csv")
    edges: Array = np.loadtxt(folder / "nba_relationship.txt", dtype=np.int64)
    node_of = {user: node for node, user in enumerate(frame["user_id"])}
    nodes = np.array([node_of[user] for user in edges.reshape(-1)]).reshape(edges.shape)
    label = frame["SALARY"].to_numpy()
    labelled = np.random.default_rng(seed).permutation(np.flatnonzero(label >= 0))
    if not 0 < num_train < len(labelled) - 1:
        raise ValueError(f"num_train must be from 1 to {len(labelled) - 2}, got {num_train}.")
    num_held_out = max(1, round(validation * (len(labelled) - num_train)))
    parts = np.split(labelled, (num_train, num_train + num_held_out))
    features = frame.drop(columns=["user_id", "SALARY"]).to_numpy(float)
    low, extent = scaler(features[parts[0]])
    x = Graph(((features - low) / extent).clip(-1.0, 2.0).astype(np.float32), normalised(nodes, len(frame)))
    groups = (frame["country"].to_numpy() > 0).astype(np.int32)[:, None]

    def part(rows: Array) -> Batch:
        weight = np.zeros(len(frame), np.float32)
        weight[rows] = 1.0
        return Batch(x, (label > 0).astype(np.float32), groups, weight)

    train, held_out, test = (part(rows) for rows in parts)
    return Dataset("nba", train, held_out, test, ("country",), (2,))


def normalised(edges: Array, n: int) -> Array:
    """D^-1/2 (A + I) D^-1/2 of the undirected graph with these edges, pairs of node numbers, [n, n]."""
    a = np.eye(n)
    a[edges[:, 0], edges[:, 1]] = a[edges[:, 1], edges[:, 0]] = 1.0
    root = np.sqrt(a.sum(axis=1))
    return (a / root[:, None] / root).astype(np.float32)


def _download_nba(directory: str | Path = "~/.cache/funcbilevel/nba") -> Path:
    folder = Path(directory).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for name, expected in NBA_SHA256.items():
        fetch(NBA_URL + name, folder / name, expected)
    return folder


# Drawn by scikit-learn.


def synthetic(n: int = 8000, bias: float = 1.0, seed: int = 0, num_classes: int = 2) -> Dataset:
    """`sklearn.datasets.make_classification` with a group that the label and five of 20 features go with. No download.

    A row's group is 1 with probability sigmoid(bias (2 y / (k - 1) - 1)) if there are k classes; group 1 moves five
    features by half a standard deviation, and is a feature itself.

    Args:
        n: rows in all; half are for training, a quarter each for validation and test.
        bias: how strongly label and group go together; 0 for not at all.
        seed: of the draw and of the division.
        num_classes: of the labels, k.

    Raises:
        ValueError: there are fewer than two classes.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
    from sklearn.datasets import make_classification  # noqa: PLC0415

    drawn: Any = make_classification(
        n,
        n_features=20,
        n_informative=8,
        n_redundant=4,
        n_classes=num_classes,
        flip_y=0.08,
        class_sep=0.8,
        random_state=seed,
    )
    x, y = drawn
    rng = np.random.default_rng(seed)
    group = (rng.uniform(size=n) < 1 / (1 + np.exp(-bias * (2 * y / (num_classes - 1) - 1)))).astype(float)
    x[:, rng.permutation(20)[:5]] += 0.5 * x.std() * group[:, None]
    x = np.hstack([x, group[:, None]])
    parts = split(n, (0.5, 0.25), seed)
    return _dataset("synthetic", x, y, group[:, None], parts, ("group",), (2,), num_classes)
