"""The NBA graph (Dai and Wang 2021): players of a season, joined if they follow one another on Twitter."""

from pathlib import Path
from typing import Any

import numpy as np

from funcbilevel.tasks.data.dataset import Array, Batch, Dataset, Graph, scaler
from funcbilevel.tasks.data.fetch import CACHE, fetch_all, given, reading

VARIABLE = "FUNCBILEVEL_NBA_DIR"
URL = "https://raw.githubusercontent.com/yazdanimehdi/FairBiNN/d9679ba3a568c0053b6e98536fad4e424d7e2e88/data/NBA/"
SHA256 = {
    "nba.csv": "fe295195cff01f20b785fe9de1e24062123cb146bdae080ce8b3ea8315d45b80",
    "nba_relationship.txt": "14c73245e5d6b6457cce7504e2bb0ded6b81155e25bf0e7d23793df7c01b4873",
}
MEND = f"{VARIABLE} or --data must name a directory with {' and '.join(SHA256)}; without either they are downloaded"


def load(
    directory: str | Path | None = None,
    num_train: int = 100,
    validation: float = 1 / 3,
    seed: int = 0,
    use_attributes: bool = True,
) -> Dataset:
    """The data to predict whether a player earns more than the median. Attribute: from overseas or not.

    403 players; 313 have a label. As in the literature 100 of these are the training part; the rest is divided into
    validation and test part, and not used as both.

    Args:
        directory: where nba.csv and nba_relationship.txt are; by default FUNCBILEVEL_NBA_DIR, and if that is not set
            either, they are downloaded from FairBiNN's repository into a cache, and their checksums compared.
        num_train: labelled nodes in the training part.
        validation: the validation part's share of the other labelled nodes.
        seed: of that division.
        use_attributes: whether the country is a feature of its player, too.

    Raises:
        ValueError: there are too few labelled nodes.
        UserError: a file is missing or damaged, or the download failed.
    """
    folder = given(directory, VARIABLE) or fetch_all(URL, SHA256, CACHE / "nba")
    frame = _players(folder / "nba.csv")
    edges = _edges(folder / "nba_relationship.txt", frame["user_id"].tolist())
    label = frame["SALARY"].to_numpy()
    labelled = np.random.default_rng(seed).permutation(np.flatnonzero(label >= 0))
    if not 0 < num_train < len(labelled) - 1:
        raise ValueError(f"num_train must be from 1 to {len(labelled) - 2}, got {num_train}.")
    num_held_out = max(1, round(validation * (len(labelled) - num_train)))
    parts = np.split(labelled, (num_train, num_train + num_held_out))
    others = ["user_id", "SALARY", *([] if use_attributes else ["country"])]
    features = frame.drop(columns=others).to_numpy(float)
    low, extent = scaler(features[parts[0]])
    x = Graph(((features - low) / extent).clip(-1.0, 2.0).astype(np.float32), normalised(edges, len(frame)))
    groups = (frame["country"].to_numpy() > 0).astype(np.int32)[:, None]

    def part(rows: Array) -> Batch:
        weight = np.zeros(len(frame), np.float32)
        weight[rows] = 1.0
        return Batch(x, (label > 0).astype(np.float32), groups, weight)

    train, held_out, test = (part(rows) for rows in parts)
    return Dataset("nba", train, held_out, test, ("country",), (2,))


def _players(path: Path) -> Any:
    import pandas as pd  # noqa: PLC0415

    with reading(path, MEND):
        frame: Any = pd.read_csv(path)
        if missing := [name for name in ("user_id", "SALARY", "country") if name not in frame.columns]:
            raise ValueError(f"the columns {', '.join(missing)} are missing")
        if not np.isfinite(frame.to_numpy(float)).all():
            raise ValueError("all columns must hold finite numbers")
        if frame.empty or frame["user_id"].duplicated().any():
            raise ValueError("user_id must name each player once")
    return frame


def _edges(path: Path, users: list[int]) -> Array:
    """Pairs of the players' numbers."""
    with reading(path, MEND):
        lines = path.read_text(encoding="utf-8").splitlines()
        pairs = [tuple(map(int, line.split())) for line in lines if line.strip()]
        node_of = {user: node for node, user in enumerate(users)}
        for number, pair in enumerate(pairs, start=1):
            if len(pair) != 2 or not set(pair) <= node_of.keys():
                raise ValueError(f"pair {number} must be two user_id of nba.csv, got {' '.join(map(str, pair))}")
        if not pairs:
            raise ValueError("it holds no pairs")
    return np.array([[node_of[user] for user in pair] for pair in pairs])


def normalised(edges: Array, n: int) -> Array:
    """D^-1/2 (A + I) D^-1/2 of the undirected graph with these edges, pairs of node numbers, [n, n]."""
    a = np.eye(n)
    a[edges[:, 0], edges[:, 1]] = a[edges[:, 1], edges[:, 0]] = 1.0
    root = np.sqrt(a.sum(axis=1))
    return (a / root[:, None] / root).astype(np.float32)
