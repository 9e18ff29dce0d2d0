"""UCI Adult (Becker and Kohavi 1996): income and education of 48,842 people, census of the United States, 1994."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks.data.dataset import Array, Dataset, divided, split
from funcbilevel.tasks.data.fetch import CACHE, fetch_all, given, reading

if TYPE_CHECKING:
    import pandas as pd

VARIABLE = "FUNCBILEVEL_ADULT_DIR"
URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/adult/"
SHA256 = {
    "adult.data": "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
    "adult.test": "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
}
NUMBERS = ("age", "education-num", "capital-gain", "capital-loss", "hours-per-week")
CATEGORIES = (
    *("workclass", "education", "marital-status", "occupation", "relationship", "race", "sex", "native-country"),
)
COLUMNS = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship"),
    *("race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"),
)
EDUCATION = (9, 10, 13)
"""The lowest education-num of high school, of some college, of a bachelor's degree."""
CLASSES = {"income": 2, "education": 1 + len(EDUCATION)}
MEND = f"{VARIABLE} or --data must name a directory with the files of {URL}; without either they are downloaded"


def load(
    directory: str | Path | None = None,
    attributes: tuple[str, ...] = ("sex",),
    validation: float = 0.2,
    seed: int = 0,
    label: Literal["income", "education"] = "income",
    use_attributes: bool = True,
) -> Dataset:
    """The data to predict whether a person earns more than 50,000 dollars.

    Or, with label "education", which of four classes their education is: no diploma, high school, some college or an
    associate degree, a bachelor's degree or more. Income is then a feature in place of the two columns on education.

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
        use_attributes: whether the attributes are among the features, too.

    Raises:
        ValueError: there is no such attribute or label.
        UserError: a file is missing or damaged, or the download failed.
    """
    if unknown := [name for name in attributes if name not in CATEGORIES] or not attributes:
        raise ValueError(f"attributes must be among {', '.join(CATEGORIES)}, got {unknown or '(none)'}.")
    if label not in CLASSES:
        raise ValueError(f"label must be one of {', '.join(CLASSES)}, got {label!r}.")
    folder = given(directory, VARIABLE) or download()
    train_frame, test_frame = (read(folder / name) for name in SHA256)
    levels = {name: sorted(set(train_frame[name])) for name in CATEGORIES}
    for name in attributes:
        if unknown := sorted(set(test_frame[name]) - set(levels[name])):
            raise UserError(
                f"{folder / 'adult.test'} has groups of {name} that adult.data has not ({', '.join(unknown)}); {MEND}."
            )
    (x, groups, y), (x_test, groups_test, y_test) = (
        _arrays(frame, levels, attributes, label, use_attributes) for frame in (train_frame, test_frame)
    )
    held_out, kept = split(len(y), (validation,), seed)
    parts = (kept, held_out, len(y) + np.arange(len(y_test)))
    return divided(
        "adult" if label == "income" else f"adult-{label}",
        np.concatenate([x, x_test]),
        np.concatenate([y, y_test]),
        np.concatenate([groups, groups_test]),
        parts,
        attributes,
        tuple(len(levels[name]) for name in attributes),
        CLASSES[label],
    )


def download(directory: Path = CACHE / "adult") -> Path:
    """Fetches adult.data and adult.test (6 MB) from the UCI archive, unless they are there; returns the directory.

    Raises:
        UserError: no connection, or a file's SHA-256 is not `SHA256`.
    """
    return fetch_all(URL, SHA256, directory)


def read(path: Path) -> "pd.DataFrame":
    """The rows of adult.data or adult.test without missing values, as texts and numbers.

    Both the archive's files (no header, and one line of comment in adult.test) and copies with a header are read.

    Raises:
        UserError: there is no such file, or a line is cut off or holds something else.
    """
    import pandas as pd  # noqa: PLC0415

    with reading(path, MEND):
        rows = [row for row in _rows(path) if "?" not in row]
        if not rows:
            raise ValueError("it holds no rows")
        frame: Any = pd.DataFrame(rows, columns=list(COLUMNS))
        frame["income"] = frame["income"].str.rstrip(".")
        if unknown := set(frame["income"]) - {"<=50K", ">50K"}:
            raise ValueError(f"the last column must be <=50K or >50K, got {', '.join(sorted(unknown))}")
        frame = frame.drop(columns="fnlwgt").astype(dict.fromkeys(NUMBERS, float))
        if not np.isfinite(frame[list(NUMBERS)].to_numpy()).all():
            raise ValueError(f"the columns {', '.join(NUMBERS)} must hold finite numbers")
        return frame


def _rows(path: Path) -> list[list[str]]:
    """The cells of each line but comments and a header."""
    rows: list[list[str]] = []
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file, skipinitialspace=True)
        for line in lines:
            if not line or line[0].startswith("|") or line[0] == "age":
                continue
            if len(line) != len(COLUMNS) or not all(line):
                filled = sum(map(bool, line))
                raise ValueError(f"line {lines.line_num} has {filled} values for {len(COLUMNS)} columns")
            rows.append(line)
    return rows


def _arrays(
    frame: "pd.DataFrame",
    levels: Mapping[str, list[str]],
    attributes: tuple[str, ...],
    label: str,
    use_attributes: bool,
) -> tuple[Array, Array, Array]:
    """(x, groups, y); a category that adult.data does not know is a row of zeros."""

    def one_hot(name: str) -> Array:
        columns = frame[name].to_numpy()[:, None] == np.array(levels[name], dtype=object)
        return columns[:, 1:] if name == "sex" else columns

    y = income = (frame["income"] == ">50K").to_numpy(float)
    features: list[Array] = []
    dropped = () if use_attributes else attributes
    if label == "education":
        y, features = np.digitize(frame["education-num"].to_numpy(float), EDUCATION), [income[:, None]]
        dropped = (*dropped, "education", "education-num")
    features += [frame[[name]].to_numpy() for name in NUMBERS if name not in dropped]
    features += [one_hot(name) for name in CATEGORIES if name not in dropped]
    x = np.hstack(features).astype(float)
    groups = np.stack([np.searchsorted(levels[name], frame[name].to_numpy(str)) for name in attributes], axis=1)
    return x, groups, y.astype(float)
