"""Heritage Health (2011): members of an insurance and their Charlson index, which predicts mortality."""

from pathlib import Path
from typing import Any

import numpy as np

from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks.data.dataset import Dataset, divided, split
from funcbilevel.tasks.data.fetch import given, reading

VARIABLE = "FUNCBILEVEL_HEALTH_CSV"
AGES = tuple(f"age_{decade}5" for decade in range(9))
MEND = f"Heritage Health cannot be downloaded, so name your copy of the table by --data or {VARIABLE}"
_NEEDED = ("YEAR_t", "sexMISS", "age_MISS", *AGES, "sexMALE", "sexFEMALE", "CharlsonIndexI_max")
_DROPPED = (
    *("DaysInHospital", "MemberID_t", "YEAR_t", "trainset", *AGES, "sexMALE", "sexFEMALE"),
    *(f"CharlsonIndexI_{statistic}" for statistic in ("max", "min", "ave", "range", "stdev")),
)


def load(
    path: str | Path | None = None,
    validation: float = 0.16,
    test: float = 0.2,
    seed: int = 0,
    use_attributes: bool = True,
) -> Dataset:
    """The data to predict whether the Charlson index is above zero. Attribute: nine ages.

    The competition's licence forbids passing its data on, so the file is the user's: the table of one row per member
    and year that is common in the literature, with columns YEAR_t, sexMISS, age_MISS, age_05 ... age_85, sexMALE,
    sexFEMALE, CharlsonIndexI_max, and features. Year Y3 is used, and rows whose sex and age are known.

    Args:
        path: the .csv file; by default FUNCBILEVEL_HEALTH_CSV.
        validation, test: shares of these parts; the rest is the training part.
        seed: of that division.
        use_attributes: whether age is a feature, too.

    Raises:
        UserError: there is no such file, columns are missing or hold no numbers, or no rows are left.
    """
    import pandas as pd  # noqa: PLC0415

    if (file := given(path, VARIABLE)) is None:
        raise UserError(f"{MEND}.")
    with reading(file, MEND):
        frame: Any = pd.read_csv(file, low_memory=False)
        if missing := [name for name in _NEEDED if name not in frame.columns]:
            raise ValueError(f"the columns {', '.join(missing)} are missing")
        frame = frame[(frame["YEAR_t"] == "Y3") & (frame["sexMISS"] == 0) & (frame["age_MISS"] == 0)]
        if frame.empty:
            raise ValueError("no row of year Y3 has a known sex and age")
        features = frame.drop(columns=[name for name in _DROPPED if name in frame.columns])
        used = [*features.columns, *_NEEDED[1:]]
        if others := [name for name in dict.fromkeys(used) if not _is_numeric(frame[name])]:
            raise ValueError(f"the columns {', '.join(others)} must hold finite numbers")
    y = (frame["CharlsonIndexI_max"] > 0).to_numpy(float)
    age = frame[list(AGES)].to_numpy().argmax(axis=1)
    sex = frame["sexFEMALE"].to_numpy(float)
    own = [age[:, None]] if use_attributes else []
    x = np.hstack([features.to_numpy(float), *own, sex[:, None]])
    tested, held_out, kept = split(len(y), (test, validation), seed)
    return divided("health", x, y, age[:, None], (kept, held_out, tested), ("age",), (len(AGES),))


def _is_numeric(column: Any) -> bool:
    try:
        return bool(np.isfinite(column.to_numpy(float)).all())
    except (ValueError, TypeError):
        return False
