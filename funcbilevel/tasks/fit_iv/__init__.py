"""Nonlinear instrumental regression of a user's own table: `funcbilevel fit iv`. The estimator is `funcbilevel.iv`."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from funcbilevel.tasks._experiment.command import Task
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.grid import Track, Unit, complete
from funcbilevel.tasks._experiment.options import Options
from funcbilevel.tasks._experiment.store import Result, Run, Store
from funcbilevel.tasks.data.fetch import reading, sha256
from funcbilevel.tasks.fit_iv import report

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class FitIV(Options):
    """A table's outcome as a nonlinear function of treatments, by instruments: a curve beside two-stage least squares.

    Rows with missing values are left out; columns of texts become indicators of their values.
    """

    task = "fit-iv"
    counts = ("num_steps",)
    data: Path
    """The table: a .csv file with a header."""
    outcome: str
    """Column of the outcome."""
    treatment: tuple[str, ...]
    """Columns of the treatments, numbers."""
    instruments: tuple[str, ...]
    """Columns of the instruments: they move the treatments, and the outcome through nothing else."""
    covariates: tuple[str, ...] = ()
    """Columns that are observed and may move the outcome too."""
    num_steps: int = 300
    """Outer steps at the most; training ends earlier where the validation loss no longer falls."""
    num_members: int = 20
    """Networks, each on a bootstrap sample; the bands come from their spread."""

    def check(self) -> None:
        """Raises a UserError that names an option out of range."""
        super().check()
        if self.num_members < 2:
            raise UserError(f"--num-members must be at least 2, got {self.num_members}.")
        names = [self.outcome, *self.treatment, *self.instruments, *self.covariates]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"a column must have one role only, got {', '.join(twice)} in two.")

    def settings(self) -> dict[str, Any]:
        """The options that decide the numbers; of the file its name and a checksum."""
        return super().settings() | {"data": self.data.name, "sha256": sha256(self.data.read_bytes())}

    def work(self, directory: Path, track: Track) -> None:
        """Adds what is missing to runs.jsonl."""
        table = read(self)
        settings = {name: value for name, value in self.settings().items() if name != "seed"}
        linear = [Run(name, 0, {**settings, "n": len(table.Y)}) for name in (report.TWO_STAGE, report.LEAST_SQUARES)]
        runs = [*linear, Run(report.NEURAL, self.seed, {**settings, "n": len(table.Y)})]

        def make(unit: Unit) -> list[Result]:
            (run,) = unit.runs
            if run.method == report.NEURAL:
                callback = track(run.method, 2 * self.num_steps)  # the ridge is chosen in a first training
                return [neural(table, self.num_steps, self.num_members, self.seed, callback)]
            return [linear_model(table, run.method)]

        complete(Store(directory, self.task), runs, make)


@dataclass(frozen=True)
class Table:
    """The columns by their roles: Y a series, the others frames of numbers."""

    Y: "pd.Series"
    X: "pd.DataFrame"
    Z: "pd.DataFrame"
    W: "pd.DataFrame"


def read(options: FitIV) -> Table:
    """The rows that have all columns.

    Raises:
        UserError: there is no such file or column, the outcome or a treatment holds no numbers, or few rows are left.
    """
    import pandas as pd  # noqa: PLC0415

    with reading(options.data, "pass a .csv file with a header"):
        frame: Any = pd.read_csv(options.data)
    roles = [[options.outcome], options.treatment, options.instruments, options.covariates]
    names = [name for role in roles for name in role]
    if missing := [name for name in names if name not in frame.columns]:
        columns = ", ".join(map(str, frame.columns))
        raise UserError(f"{options.data} has no column {', '.join(missing)}; its columns are {columns}.")
    frame = frame[names].dropna()
    if len(frame) < 30:
        raise UserError(f"{options.data} has {len(frame)} rows without missing values; it takes at least 30.")
    for name in (options.outcome, *options.treatment):
        if not pd.api.types.is_numeric_dtype(frame[name]):
            raise UserError(f"the column {name} must hold numbers, got {frame[name].iloc[0]!r}.")
    texts = [name for name in names if not pd.api.types.is_numeric_dtype(frame[name])]

    def numbers(role: Sequence[str]) -> Any:
        encoded = [name for name in role if name in texts]
        return pd.get_dummies(frame[list(role)], columns=encoded, drop_first=True).astype(float) if role else frame[[]]

    return Table(frame[options.outcome].astype(float), *map(numbers, roles[1:]))


def linear_model(table: Table, method: str) -> Result:
    """Slopes by two-stage or ordinary least squares, with robust 95% intervals.

    Raises:
        UserError: columns are linearly dependent, or there are fewer instruments than treatments.
    """
    from linearmodels.iv import IV2SLS  # noqa: PLC0415

    exogenous = table.W.assign(const=1.0)
    try:
        if method == report.TWO_STAGE:
            fitted: Any = IV2SLS(table.Y, exogenous, table.X, table.Z).fit()
        else:
            fitted = IV2SLS(table.Y, exogenous.join(table.X), None, None).fit()
    except ValueError as error:
        raise UserError(f"the linear model cannot be fitted: {str(error).rstrip('.')}; leave out a column.") from error
    intervals = fitted.conf_int()
    return Result(report.slopes({x: (fitted.params[x], *intervals.loc[x]) for x in table.X.columns}))


def neural(table: Table, num_steps: int, num_members: int, seed: int, callback: Any = None) -> Result:
    """Average derivatives, first stage and, beside the record, the curve of each treatment, by `NeuralIV`."""
    from funcbilevel.iv import NeuralIV, WeakInstrumentWarning  # noqa: PLC0415

    model = NeuralIV(num_steps=num_steps, num_members=num_members, random_state=seed, callback=callback)
    given = None if table.W.empty else table.W
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeakInstrumentWarning)  # the report says it
        model.fit(table.X, table.Z, table.Y, given)
    derivatives = model.average_derivatives(table.X, given)
    metrics = report.slopes(dict(zip(table.X.columns, zip(*derivatives, strict=True), strict=True)))
    for name, f, r2 in zip(table.X.columns, *model.first_stage_, strict=True):
        metrics |= {f"{name}: first-stage F": f, f"{name}: partial R2": r2}
    metrics |= {"validation_loss": model.validation_loss_.mean(), "steps": model.steps_}
    return Result(metrics | {"score": model.score(table.X, table.Z, table.Y, given)}, {"curves": curves(model, table)})


SHOWN_ROWS = 500
"""Rows over which curves are averaged."""


def curves(model: Any, table: Table) -> dict[str, Any]:
    """Treatment -> values and, at each of them, the mean over rows of the structural function with its 95% band."""
    rows = np.random.default_rng(0).permutation(len(table.X))[:SHOWN_ROWS]
    X, W = table.X.iloc[rows], None if table.W.empty else table.W.iloc[rows]
    lines: dict[str, Any] = {}
    for column, (name, values) in enumerate(table.X.items()):
        points = grid(values.to_numpy())
        band = model.partial_dependence(X, points, W, column=column)
        of_band: Mapping[str, Sequence[float]] = {key: a.tolist() for key, a in band._asdict().items()}
        lines[str(name)] = {"value": points.tolist(), **of_band, "mean": float(values.mean())}
    return {"curves": lines, "mean_outcome": float(table.Y.mean())}


def grid(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Where a curve is drawn: at the values that occur between the 2% and 98% quantiles, or at 41 between these."""
    low, high = np.quantile(values, (0.02, 0.98))
    there = np.unique(values[(values >= low) & (values <= high)])
    return there if len(there) <= 41 else np.linspace(low, high, 41)


TASK = Task("iv", report.report, fit=FitIV, records="fit-iv")
