r"""Methods from outside: what one would try before a bilevel problem, on the networks' data, divisions and seeds.

Group thresholds decide by s(x) >= t_g of the row's group g, where s are somebody's scores. Of all thresholds whose
rates of positive decisions differ by at most a tolerance on the validation part, they have the most right decisions
there:

.. math::
    \max_t \sum_i 1[\,1[s(x_i) \ge t_{g_i}] = y_i\,]
    \quad\text{with}\quad \max_g r_g - \min_g r_g \le \text{tolerance}, \quad r_g = P(s(x) \ge t_g \mid g) .

They see the group when they decide, and so does fairlearn's ThresholdOptimizer (Hardt et al. 2016), which may toss a
coin between two thresholds. Where the attribute must not be used, only methods remain that see it in training alone:
fairlearn's ExponentiatedGradient (Agarwal et al. 2018), a lottery over classifiers trained on reweighted rows.

Several attributes are one here, their groups' combinations: equal rates in these are equal rates by each attribute.

References:
    Hardt, Price, Srebro, *Equality of Opportunity in Supervised Learning*, NeurIPS 2016,
    https://arxiv.org/abs/1610.02413; Agarwal et al., *A Reductions Approach to Fair Classification*, ICML 2018,
    https://arxiv.org/abs/1803.02453
"""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.grid import Track, Unit
from funcbilevel.tasks._experiment.methods import Method, table
from funcbilevel.tasks._experiment.store import Result, Run
from funcbilevel.tasks.data.dataset import Array, Batch, Dataset
from funcbilevel.tasks.fairness.losses import measure
from funcbilevel.tasks.fairness.networks import logits_of
from funcbilevel.tasks.fairness.runs import Plan, Source, majority_accuracy, settings_of, without_later
from funcbilevel.tasks.fairness.train import sweep

# Group thresholds.

GRID = 1000
"""Rates of positive decisions that are tried as the lowest of the groups'."""


class Cuts(NamedTuple):
    """Every way to divide a group's rows by their scores, by ascending rate.

    Attributes:
        rates: of positive decisions, [c].
        right: right decisions, [c].
        thresholds: rows with scores from these on are positive, [c].
    """

    rates: Array
    right: Array
    thresholds: Array


def cuts(scores: Array, y: Array) -> Cuts:
    """The cuts of rows with scores, [n], and labels 0 or 1, [n]; rows of equal score are on one side."""
    order = np.argsort(-scores, kind="stable")
    sorted_scores, truth = np.asarray(scores, float)[order], y[order] > 0.5
    chosen = np.concatenate([[0], np.flatnonzero(np.diff(sorted_scores) < 0) + 1, [len(order)]])
    hits = np.concatenate([[0], np.cumsum(truth)])[chosen]
    edges = np.concatenate([[np.inf], sorted_scores, [-np.inf]])
    right = hits + np.sum(~truth) - (chosen - hits)
    return Cuts(chosen / len(order), right, (edges[chosen] + edges[chosen + 1]) / 2)


def _best(of: Cuts, low: float, high: float) -> int:
    """The number of the cut with the most right decisions among rates from low to high; without any the nearest."""
    first, last = np.searchsorted(of.rates, low, "left"), np.searchsorted(of.rates, high, "right")
    if first == last:
        return int(np.argmin(np.abs(of.rates - low)))
    return int(first + np.argmax(of.right[first:last]))


def group_thresholds(scores: Array, y: Array, groups: Array, num_groups: int, tolerance: float) -> Array:
    """The thresholds of the module's head, [num_groups]; 0 for a group without rows.

    Rates may differ by one row of the smallest group more than the tolerance: else few rates would be equal.

    Arguments:
        scores, y, groups: scores, labels 0 or 1, and numbers of the groups, [n].
        num_groups: how many there are.
        tolerance: largest difference between the groups' rates of positive decisions.
    """
    present = [g for g in range(num_groups) if np.any(groups == g)]
    of_groups = [cuts(scores[groups == g], y[groups == g]) for g in present]
    allowed = tolerance + 1 / min(np.sum(groups == g) for g in present) + 1e-9
    found: tuple[tuple[bool, float], list[int]] = ((False, -np.inf), [])
    for low in np.linspace(0, 1, GRID + 1):
        places = [_best(of, low, low + tolerance) for of in of_groups]
        rates = [of.rates[i] for of, i in zip(of_groups, places, strict=True)]
        gap = max(rates) - min(rates)
        right = float(sum(of.right[i] for of, i in zip(of_groups, places, strict=True)))
        found = max(found, ((True, right) if gap <= allowed else (False, -gap), places), key=lambda pair: pair[0])
    thresholds = np.zeros(num_groups)
    thresholds[present] = [of.thresholds[i] for of, i in zip(of_groups, found[1], strict=True)]
    return thresholds


# What methods see, and what they give.


class Rows(NamedTuple):
    """A part of the data.

    Attributes:
        x: features, [n, d].
        y: labels 0 or 1, [n].
        groups: numbers of the groups of all attributes together, [n].
    """

    x: Array
    y: Array
    groups: Array


class Case(NamedTuple):
    """One seed's data and scores.

    Attributes:
        train, validation, test: the parts.
        num_groups: of all attributes together.
        seed: of whatever is random.
        model: name of a base -> that scikit-learn model, fitted to the training part.
        logits: name of a base, or "network" -> its scores on validation and test part.
    """

    train: Rows
    validation: Rows
    test: Rows
    num_groups: int
    seed: int
    model: Callable[[str], Any]
    logits: Callable[[str], tuple[Array, Array]]


class Decided(NamedTuple):
    """What a method gives, on validation and test part.

    Attributes:
        decisions: True for class 1, [n] each.
        logits: the scores below them, [n] each; None where there are none.
    """

    decisions: tuple[Array, Array]
    logits: tuple[Array, Array] | None = None


def estimator(base: str, seed: int) -> Any:
    """The scikit-learn model of this name, at its defaults."""
    if base == "logistic":
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

        return LogisticRegression(solver="newton-cholesky")
    from sklearn.ensemble import HistGradientBoostingClassifier  # noqa: PLC0415

    return HistGradientBoostingClassifier(random_state=seed)


Decide = Callable[[Case, float], Decided]


def _alone(base: str) -> Decide:
    def decide(case: Case, tolerance: float) -> Decided:
        del tolerance
        validation, test = case.logits(base)
        return Decided((validation > 0, test > 0), (validation, test))

    return decide


def _by_group(base: str) -> Decide:
    def decide(case: Case, tolerance: float) -> Decided:
        validation, test = case.logits(base)
        of = case.validation
        thresholds = group_thresholds(validation, of.y, of.groups, case.num_groups, tolerance)
        return Decided((validation >= thresholds[of.groups], test >= thresholds[case.test.groups]), (validation, test))

    return decide


def _quietly(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """The call without what fairlearn makes pandas say of its own future."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        return function(*args, **keywords)


def _threshold_optimizer(case: Case, tolerance: float) -> Decided:
    from fairlearn.postprocessing import ThresholdOptimizer  # noqa: PLC0415

    made: Any = ThresholdOptimizer(
        estimator=case.model("logistic"), prefit=True, predict_method="predict_proba", tol=tolerance or None
    )
    of = case.validation
    _quietly(made.fit, of.x, of.y, sensitive_features=of.groups)
    validation, test = (
        np.asarray(_quietly(made.predict, part.x, sensitive_features=part.groups, random_state=case.seed)) > 0
        for part in (case.validation, case.test)
    )
    return Decided((validation, test))


def _exponentiated_gradient(base: str) -> Decide:
    def decide(case: Case, tolerance: float) -> Decided:
        from fairlearn.reductions import DemographicParity, ExponentiatedGradient  # noqa: PLC0415

        parity: Any = DemographicParity(difference_bound=tolerance)
        made: Any = ExponentiatedGradient(estimator(base, case.seed), parity, max_iter=20)
        _quietly(made.fit, case.train.x, case.train.y, sensitive_features=case.train.groups)
        validation, test = (
            np.asarray(_quietly(made.predict, part.x, random_state=case.seed)) > 0
            for part in (case.validation, case.test)
        )
        return Decided((validation, test))

    return decide


OUTSIDE = table(
    Method(
        "thresholds", "thresholds for each group on the scores of single-objective", _by_group("network"), colour="0.6"
    ),
    Method("logistic", "logistic regression", _alone("logistic"), colour="C9"),
    Method("logistic-thresholds", "thresholds for each group on its scores", _by_group("logistic"), colour="C9"),
    Method("boosting", "boosted trees", _alone("boosting"), colour="C2"),
    Method("boosting-thresholds", "thresholds for each group on their scores", _by_group("boosting"), colour="C2"),
    Method(
        "threshold-optimizer",
        "fairlearn's ThresholdOptimizer on logistic regression",
        _threshold_optimizer,
        colour="C8",
    ),
    Method(
        "exponentiated-gradient",
        "fairlearn's ExponentiatedGradient over logistic regressions",
        _exponentiated_gradient("logistic"),
        colour="C6",
    ),
    Method(
        "exponentiated-gradient-boosting",
        "the same over boosted trees",
        _exponentiated_gradient("boosting"),
        colour="C4",
    ),
)
ON_NETWORK = "thresholds"
ALONE = ("logistic", "boosting")
"""Without a tolerance."""
NEED_ATTRIBUTE = ("thresholds", "logistic-thresholds", "boosting-thresholds", "threshold-optimizer")
"""Methods that see the group when they decide."""
OF_TOLERANCE = tuple(name for name in OUTSIDE if name not in ALONE)
OF_FAIRLEARN = ("threshold-optimizer", "exponentiated-gradient", "exponentiated-gradient-boosting")
LARGEST_TOLERANCE = 0.15
"""A little less than the gap on Adult of accuracy alone, so that all tolerances make a difference."""


def check_installed(methods: Iterable[str]) -> None:
    """Raises a UserError if one of the methods is fairlearn's, and fairlearn is not installed."""
    if (needing := [name for name in methods if name in OF_FAIRLEARN]) and find_spec("fairlearn") is None:
        raise UserError(
            f"--methods: fairlearn is not installed, which {', '.join(needing)} need; leave them out, or install it "
            'with: pip install "funcbilevel[tasks]"'
        )


# The runs of the command.


def runs(
    source: Source, methods: Iterable[str], plain: Plan, num_epochs: int, trials: int, seeds: Sequence[int]
) -> list[Run]:
    """Every method with each of its tolerances from every seed; none that needs an attribute which is removed.

    Arguments:
        source: of the data.
        methods: names of `OUTSIDE`.
        plain: the network below `thresholds`.
        num_epochs: of its training.
        trials: how many tolerances.
        seeds: of the runs.
    """
    made: list[Run] = []
    for method in methods:
        if method in NEED_ATTRIBUTE and source.attribute == "removed":
            continue
        of_data = store.plain(without_later(source.settings()))
        if method == ON_NETWORK:
            of_data = settings_of(source, plain.setting, plain.hyper, num_epochs)
        for tolerance in (None,) if method in ALONE else np.linspace(0.0, LARGEST_TOLERANCE, trials).tolist():
            own = {} if tolerance is None else {"tolerance": float(f"{tolerance:.3g}")}
            made += [Run(method, seed, of_data | own, own.get("tolerance", 0.0)) for seed in seeds]
    return made


def by_seed(run: Run) -> int:
    """Runs of a seed share their data and their fitted models."""
    return run.seed


def train(source: Source, plain: Plan, num_epochs: int, track: Track, unit: Unit) -> list[Result]:
    """Makes the runs of a unit."""
    data = {seed: source.load(seed) for seed in unit.seeds}
    cases = {seed: _case(dataset, seed, plain, num_epochs, track) for seed, dataset in data.items()}
    callback = track("outside", len(unit.runs))
    results: list[Result] = []
    for run in unit.runs:
        start = time.perf_counter()
        decide: Any = OUTSIDE[run.method].build
        metrics = measured(decide(cases[run.seed], run.how), data[run.seed])
        results.append(Result(metrics, seconds=time.perf_counter() - start))
        shown = {name: np.array([metrics[name]]) for name in ("accuracy", "dp_gap")}
        callback(None, shown | {"outer_objective": np.array([np.nan])})
    return results


def rows_of(part: Batch, num_groups: Sequence[int]) -> Rows:
    """A part of the data as scikit-learn and fairlearn take it."""
    groups = np.ravel_multi_index(tuple(np.asarray(part.groups).T), tuple(num_groups))
    return Rows(np.asarray(part.x, float), np.asarray(part.y).astype(int), np.asarray(groups))


def _case(dataset: Dataset, seed: int, plain: Plan, num_epochs: int, track: Track) -> Case:
    train, *others = (rows_of(part, dataset.num_groups) for part in (dataset.train, dataset.validation, dataset.test))

    @cache
    def model(base: str) -> Any:
        return estimator(base, seed).fit(train.x, train.y)

    @cache
    def logits(base: str) -> tuple[Array, Array]:
        if base == "network":
            return network_logits(dataset, seed, plain, num_epochs, track)
        fitted = model(base)
        validation, test = (np.asarray(fitted.decision_function(part.x)) for part in others)
        return validation, test

    return Case(train, others[0], others[1], int(np.prod(dataset.num_groups)), seed, model, logits)


def network_logits(dataset: Dataset, seed: int, plain: Plan, num_epochs: int, track: Track) -> tuple[Array, Array]:
    """Scores on validation and test part of a network trained as the plan says."""
    callback = track(f"{plain.label} below"[:17], num_epochs)
    outcome = sweep(
        plain.method, plain.setting, dataset, [(plain.hyper, seed)], num_epochs, chunk=num_epochs, callback=callback
    )
    parts: Any = outcome.parts
    omega, theta = jax.tree.map(lambda p: p[0], parts)
    validation, test = (
        np.asarray(logits_of(plain.setting.row, part.x)(omega, theta, jnp.asarray(part.x)), float)
        for part in (dataset.validation, dataset.test)
    )
    return validation, test


_measure = jax.jit(measure, static_argnums=2)
_OF_SCORES = ("dp_gap_soft", "eo_gap_soft", "calibration_error")


def measured(decided: Decided, dataset: Dataset) -> Mapping[str, float]:
    """The networks' metrics of decisions, and of the scores below them; NaN where there are no scores."""
    found: dict[str, float] = {"majority": majority_accuracy(dataset)}
    scores: Sequence[Array | None] = decided.logits or (None, None)
    parts = (("validation_", dataset.validation), ("", dataset.test))
    for (prefix, batch), decisions, logits in zip(parts, decided.decisions, scores, strict=True):
        # Decisions as logits of -1 and 1: what is measured of a network's decisions is whether its logit is above 0.
        of = dict(_measure(jnp.where(jnp.asarray(decisions), 1.0, -1.0), batch, dataset.num_groups))
        soft = {} if logits is None else _measure(jnp.asarray(logits, of["accuracy"].dtype), batch, dataset.num_groups)
        of |= {name: soft.get(name, np.nan) for name in _OF_SCORES}
        found |= {f"{prefix}{name}": float(f"{float(value):.6g}") for name, value in of.items()}
    return found
