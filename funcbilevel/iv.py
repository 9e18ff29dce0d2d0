r"""Nonlinear instrumental regression on a table of data, as a scikit-learn estimator: `NeuralIV`.

The outcome Y depends on treatments X, which something unseen moves as well, and on covariates W. Instruments Z move X,
and Y only through X and W. With networks psi of X and xi of W,

.. math::
    f(x, w) = u^\top (\psi_\omega(x) \otimes \xi_\omega(w)), \qquad
    \min_\omega \min_u E\,(Y - u^\top (h_\omega(Z, W) \otimes \xi_\omega(W)))^2 + \lambda \|u\|^2, \qquad
    h_\omega = E[\psi_\omega(X) | Z, W],

a functional bilevel problem, solved by FuncID with an adjoint linear in the features of the network h. It needs the
extra `tasks`.

References:
    Petrulionyte, Mairal, Arbel, NeurIPS 2024, https://arxiv.org/abs/2403.20233, section 4.1;
    Xu, Chen, Srinivasan, de Freitas, Doucet, Gretton, *Learning Deep Features in Instrumental Variable Regression*,
    ICLR 2021, https://arxiv.org/abs/2010.07154.
"""

import warnings
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from funcbilevel.tasks._experiment.install import install_command
from funcbilevel.tasks._instrumental.ensemble import Best, Programs, fit, programs
from funcbilevel.tasks._instrumental.methods import Setting
from funcbilevel.tasks._instrumental.problem import Array, Batch, Data

try:
    from sklearn.base import BaseEstimator
    from sklearn.utils import RegressorTags, Tags, check_array, check_consistent_length, check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    raise ModuleNotFoundError(
        f"funcbilevel.iv needs {package}; install it with: {install_command('tasks')}", name=package
    ) from error

_FLOAT: Any = np.float64

METHODS: dict[str, tuple[tuple[str, float], ...]] = {
    "funcid-linear": (("ridge_ratio", 1.0),),
    "funcid-learned": (("learning_rate", 1e-2),),
    "dfiv": (),
    "aid-cg": (("damping", 0.1),),
}
"""What `NeuralIV(method=...)` takes, with the hyper-parameters of its own."""
WEAK, PRECISE = 10.0, 104.7
"""First-stage F below which instruments are weak (Staiger and Stock 1997), and from which on the usual 95% interval of
2SLS has its level (Lee, McCrary, Moreira, Porter 2022)."""


class WeakInstrumentWarning(UserWarning):
    """The instruments say little about a treatment."""


class Band(NamedTuple):
    """An estimate with an interval at each point, all of one shape.

    Attributes:
        estimate: the mean over the ensemble.
        low, high: normal interval, from the ensemble's standard deviation.
    """

    estimate: Array
    low: Array
    high: Array


class FirstStage(NamedTuple):
    """How strong the instruments are in a linear first stage, by treatment, [k] each.

    Attributes:
        f_statistic: of the instruments' joint significance beside the covariates.
        partial_r2: the share of what the covariates leave of the treatment that the instruments explain.
    """

    f_statistic: Array
    partial_r2: Array


class NeuralIV(BaseEstimator):
    """Nonlinear instrumental regression of Y on treatments X by instruments Z, with observed covariates W.

    Inputs are standardised inside. Part of the rows is left out for validation: each network of the ensemble is the one
    of its training with the least squared error of the projection E[f(X, W) | Z, W] there, which needs no truth. The
    networks are trained together in one program, each on a bootstrap sample of the other rows.

    Arguments:
        method: "funcid-linear", "funcid-learned", "dfiv" or "aid-cg": how the derivative passes through h.
        treatment_widths, covariate_widths, instrument_widths: layers of the three networks.
        linear_part: whether their features hold their inputs too, so that two-stage least squares is a special case.
        num_steps: outer steps at the most; the learning rate falls to zero over them.
        patience: training ends after so many steps in which no network got better; None: it never does.
        inner_steps: of Adam on h per outer step.
        learning_rate, inner_learning_rate: of Adam on the networks of f, and of h.
        ridge: penalty on |u|^2; of several the one with the least validation loss in a first training is taken.
        inner_ridge: penalty on the squared norm of the head of h.
        sample: "joint": both levels see all training rows; "split": half of them each, as DFIV does. Splitting avoids
            the bias of a first stage that fits its own noise, towards ordinary regression, and costs precision.
        validation_fraction: share of the rows left out for early stopping.
        num_members: networks in the ensemble.
        bootstrap: whether each is trained on a bootstrap sample; else they differ by their initial weights alone, and
            bands say nothing of the sampling error.
        random_state: an integer, a NumPy RandomState, or None.
        callback: called with (state, metrics) after every ten steps, as that of `fb.train`, to show progress.

    Attributes:
        first_stage_: `FirstStage`.
        ridge_: the one that is used.
        validation_loss_: least validation loss of each network, in units of Y squared, [num_members].
        steps_: the outer steps that were made.
        n_features_in_, feature_names_in_: of X.

    Example:
        >>> import numpy as np
        >>> from funcbilevel.iv import NeuralIV
        >>> Z, V = np.random.default_rng(0).normal(size=(2, 400, 1))
        >>> X = Z + V
        >>> Y = np.sin(X[:, 0]) - 2 * V[:, 0]
        >>> model = NeuralIV(num_members=2, num_steps=20, ridge=0.01, random_state=0).fit(X, Z, Y)
        >>> model.predict(X).shape
        (400,)
    """

    n_features_in_: int

    def __init__(
        self,
        *,
        method: str = "funcid-linear",
        treatment_widths: tuple[int, ...] = (32, 16),
        covariate_widths: tuple[int, ...] = (32, 8),
        instrument_widths: tuple[int, ...] = (64, 32),
        linear_part: bool = True,
        num_steps: int = 300,
        patience: int | None = 100,
        inner_steps: int = 10,
        learning_rate: float = 3e-3,
        inner_learning_rate: float = 3e-3,
        ridge: float | tuple[float, ...] = (1e-2, 1e-1, 1.0),
        inner_ridge: float = 1e-2,
        sample: str = "joint",
        validation_fraction: float = 0.2,
        num_members: int = 10,
        bootstrap: bool = True,
        random_state: Any = None,
        callback: Callable[[Any, dict[str, Any]], Any] | None = None,
    ) -> None:
        self.method = method
        self.treatment_widths = treatment_widths
        self.covariate_widths = covariate_widths
        self.instrument_widths = instrument_widths
        self.linear_part = linear_part
        self.num_steps = num_steps
        self.patience = patience
        self.inner_steps = inner_steps
        self.learning_rate = learning_rate
        self.inner_learning_rate = inner_learning_rate
        self.ridge = ridge
        self.inner_ridge = inner_ridge
        self.sample = sample
        self.validation_fraction = validation_fraction
        self.num_members = num_members
        self.bootstrap = bootstrap
        self.random_state = random_state
        self.callback = callback

    def fit(self, X: Any, Z: Any, Y: Any, W: Any = None) -> Self:
        """Trains the ensemble.

        Arguments:
            X: treatments, [n, k].
            Z: instruments, [n, q] or [n].
            Y: outcomes, [n].
            W: covariates, [n, r] or [n]; none by default.

        In a pipeline, whose steps get `(X, y)`, Z stands in the place of y: `pipeline.fit(X, Z, iv__Y=Y, iv__W=W)`.

        Raises:
            ValueError: an argument holds NaN, inf or too few rows, or a parameter is out of range.

        Warns:
            WeakInstrumentWarning: a first-stage F statistic is below 104.7.
        """
        self._check_parameters()
        p: Any = validate_data(self, X, dtype=np.float64, ensure_min_samples=4)
        z, y, c = _table(Z, "Z"), _outcomes(Y), _covariates(W, len(p))
        check_consistent_length(p, z, y, c)
        self.n_instruments_in_, self.n_covariates_in_ = z.shape[1], c.shape[1]
        self.first_stage_ = first_stage(p, z, c)
        names = getattr(self, "feature_names_in_", [f"column {i} of X" for i in range(p.shape[1])])
        for name, f_statistic in zip(names, self.first_stage_.f_statistic, strict=True):
            if text := weakness(name, f_statistic):
                warnings.warn(text, WeakInstrumentWarning, stacklevel=2)
        self._train(Batch(np.hstack([z, c]), p, c, y), check_random_state(self.random_state))
        return self

    def predict(self, X: Any, W: Any = None) -> Array:
        """The structural function at treatments X, [n, k], and covariates W, [n, r]: the ensemble's mean, [n]."""
        return self._members(X, W).mean(axis=0)

    def predict_interval(self, X: Any, W: Any = None, level: float = 0.95) -> Band:
        """The same with pointwise intervals, [n] each.

        Raises:
            ValueError: the ensemble has one member, or the level is not between 0 and 1.
        """
        return _band(self._members(X, W), level)

    def average_derivatives(self, X: Any, W: Any = None, level: float = 0.95) -> Band:
        """The derivative of the structural function by each treatment, averaged over rows, with intervals, [k] each."""
        batch = self._inputs(X, W)
        scaled = np.asarray(self._compiled().derivatives(self._networks, self._u, batch), float)
        return _band(scaled * self._std.y / self._std.p, level)

    def partial_dependence(self, X: Any, values: Any, W: Any = None, *, column: int = 0, level: float = 0.95) -> Band:
        """The structural function averaged over rows with one treatment set to each of `values`, [m]; [m] each.

        Arguments:
            X, W: the rows, as in `predict`.
            values: of the treatment, [m].
            column: of X, which of the treatments.
            level: of the intervals.
        """
        batch, programs = self._inputs(X, W), self._compiled()

        def at(value: float) -> Array:
            p = batch.p.copy()
            p[:, column] = (value - self._mean.p[column]) / self._std.p[column]
            return np.asarray(programs.predict(self._networks, self._u, batch._replace(p=p)), float).mean(axis=1)

        scaled = np.stack([at(value) for value in np.asarray(values, float)], axis=1)
        return _band(scaled * self._std.y + self._mean.y, level)

    def score(self, X: Any, Z: Any, Y: Any, W: Any = None) -> float:
        """1 - E (Y - E[f(X, W) | Z, W])^2 / var Y: the share of the variance that the projection explains, at most 1.

        The projected loss needs no truth. X is there for the convention only.
        """
        batch, y = self._inputs(X, W, Z), _outcomes(Y)
        check_consistent_length(batch.p, y)
        projected = np.asarray(self._compiled().project(self._networks, self._data, self._u, batch), float).mean(axis=0)
        return float(1 - np.mean((y - projected * self._std.y - self._mean.y) ** 2) / np.var(y))

    def __sklearn_tags__(self) -> Tags:
        tags: Any = super().__sklearn_tags__()
        tags.estimator_type, tags.regressor_tags, tags.target_tags.required = "regressor", RegressorTags(), True
        return tags

    def _check_parameters(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}.")
        if self.sample not in ("joint", "split"):
            raise ValueError(f"sample must be 'joint' or 'split', got {self.sample!r}.")
        for name in ("num_steps", "inner_steps", "num_members"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}.")

    def _compiled(self) -> Programs:
        covariate_widths = self.covariate_widths if self.n_covariates_in_ else ()
        setting = Setting(
            self.num_steps,
            tuple(self.treatment_widths),
            tuple(covariate_widths),
            tuple(self.instrument_widths),
            self.linear_part,
            self.inner_steps,
            self.inner_learning_rate,
            self.learning_rate,
            self.inner_ridge,
        )
        return programs(self.method, setting, METHODS[self.method], self.n_features_in_)

    def _train(self, raw: Batch, rng: np.random.RandomState) -> None:
        std = Batch(*(a.std(axis=0) for a in raw))
        self._mean, self._std = Batch(*(a.mean(axis=0) for a in raw)), Batch(*(np.where(s > 0, s, 1.0) for s in std))
        scaled = Batch(*map(_scaled, raw, self._mean, self._std))
        order = rng.permutation(len(raw.y))
        held_out = max(1, round(self.validation_fraction * len(order)))
        validation, train = order[:held_out], order[held_out:]

        def member() -> tuple[Data, int]:
            parts = [train] if self.sample == "joint" else np.array_split(train, 2)
            parts = [rng.choice(part, len(part)) if self.bootstrap else part for part in parts]
            inner, outer, left_out = (_rows(scaled, rows) for rows in (parts[0], parts[-1], validation))
            data = Data(inner, outer, left_out, points=left_out, y_mean=np.float32(0), y_std=np.float32(1))
            return data, int(rng.randint(2**31 - 1))

        members = [member() for _ in range(self.num_members)]

        def trained(chosen: list[int], ridges: Array) -> tuple[Data, Best]:
            data: Data = jax.tree.map(lambda *leaves: np.stack(leaves), *(members[i][0] for i in chosen))
            keys = jnp.stack([jax.random.key(members[i][1]) for i in chosen])
            ridges = ridges.astype(np.float32)
            best = fit(self._compiled(), keys, data, ridges, self.num_steps, self.patience, self.callback)
            if not np.isfinite(best.loss).all():
                raise RuntimeError("NeuralIV.fit: a network has no finite validation loss; lower learning_rate.")
            return data, best

        candidates = np.atleast_1d(self.ridge).astype(float)
        self.ridge_ = float(candidates[0])
        if (k := len(candidates)) > 1:
            # As many networks as in the ensemble, so that one program serves both: its first ones, with every ridge.
            groups = max(1, self.num_members // k)
            size = max(self.num_members, k)
            _, tried = trained([min(i // k, groups - 1) for i in range(size)], candidates[np.arange(size) % k])
            self.ridge_ = float(candidates[np.argmin(tried.loss[: groups * k].reshape(groups, k).mean(axis=0))])
        ridges = np.full(self.num_members, self.ridge_)
        self._data, best = trained([*range(self.num_members)], ridges)
        self.steps_, self.validation_loss_ = best.steps, best.loss * self._std.y**2
        self._networks = best.networks
        self._u = np.asarray(self._compiled().second_stage(best.networks, self._data, ridges.astype(np.float32)))

    def _inputs(self, X: Any, W: Any, Z: Any = None) -> Batch:
        """Inputs of a fitted ensemble, checked and standardised."""
        check_is_fitted(self)
        p: Any = validate_data(self, X, dtype=np.float64, reset=False)
        c = _covariates(W, len(p))
        z = None if Z is None else _table(Z, "Z")
        check_consistent_length(p, c, z)
        if c.shape[1] != self.n_covariates_in_:
            raise ValueError(f"W has {c.shape[1]} covariates, expected {self.n_covariates_in_}, as in fit.")
        if z is not None and z.shape[1] != self.n_instruments_in_:
            raise ValueError(f"Z has {z.shape[1]} instruments, expected {self.n_instruments_in_}, as in fit.")
        whole = None if z is None else _scaled(np.hstack([z, c]), self._mean.z, self._std.z)
        return Batch(whole, _scaled(p, self._mean.p, self._std.p), _scaled(c, self._mean.c, self._std.c), None)

    def _members(self, X: Any, W: Any) -> Array:
        """The predictions of each member, [num_members, n]."""
        batch = self._inputs(X, W)
        scaled = np.asarray(self._compiled().predict(self._networks, self._u, batch), float)
        return scaled * self._std.y + self._mean.y


# Tables.


def first_stage(X: Array, Z: Array, W: Array) -> FirstStage:
    """The F statistic and the partial R^2 of Z beside a constant and W in the linear regression of each column of X."""
    without = np.hstack([np.ones((len(X), 1)), W])
    rest, rank = _residuals(without, X)
    left, whole_rank = _residuals(np.hstack([without, Z]), X)
    added, degrees = whole_rank - rank, len(X) - whole_rank
    if added == 0:
        return FirstStage(np.zeros(X.shape[1]), np.zeros(X.shape[1]))
    with np.errstate(divide="ignore", invalid="ignore"):
        return FirstStage((rest - left) / added / (left / degrees), 1 - left / rest)


def _residuals(A: Array, X: Array) -> tuple[Array, int]:
    """(sums of squared residuals of X on A, [k], rank of A)."""
    coefficients, _, rank, _ = np.linalg.lstsq(A, X)
    return np.sum((X - A @ coefficients) ** 2, axis=0), int(rank)


def weakness(name: str, f_statistic: float) -> str | None:
    """What to beware of with a treatment whose first stage has this F statistic; None if nothing."""
    start = f"The F statistic of the first stage of {name} is {f_statistic:.1f}, below"
    if f_statistic < WEAK:
        return (
            f"{start} {WEAK:g}: the instruments are weak. What a curve shows is then noise, and even two-stage least "
            "squares leans towards ordinary least squares; find stronger instruments."
        )
    if f_statistic < PRECISE:
        return (
            f"{start} {PRECISE:g}: the usual interval of two-stage least squares is too short, and of a curve there "
            "may be no more to learn than its mean slope."
        )
    return None


def _table(a: Any, name: str) -> Array:
    """[n, columns], of [n] as well."""
    array = check_array(a, dtype=_FLOAT, ensure_2d=False, input_name=name)
    return array[:, None] if array.ndim == 1 else array


def _covariates(W: Any, n: int) -> Array:
    return np.empty((n, 0)) if W is None else _table(W, "W")


def _outcomes(Y: Any) -> Array:
    if Y is None:
        raise ValueError("NeuralIV requires y to be passed, but the target y is None; pass the outcomes Y, [n].")
    array = check_array(Y, dtype=_FLOAT, ensure_2d=False, input_name="Y")
    if array.shape[1:] not in ((), (1,)):
        raise ValueError(f"Y must be one outcome for each row, [n], got shape {array.shape}.")
    return array.reshape(-1)


def _scaled(a: Array, mean: Array, std: Array) -> Array:
    return ((a - mean) / std).astype(np.float32)


def _rows(batch: Batch, rows: Array) -> Batch:
    return Batch(*(a[rows] for a in batch))


def _band(members: Array, level: float) -> Band:
    if len(members) < 2:
        raise ValueError("an interval needs num_members of at least 2, got 1.")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}.")
    mean, half = members.mean(axis=0), NormalDist().inv_cdf((1 + level) / 2) * members.std(axis=0, ddof=1)
    return Band(mean, mean - half, mean + half)
