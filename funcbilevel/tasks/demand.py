r"""The demand for air tickets (Hartford et al. 2017): instrumental regression on a simulation with known truth.

Sales y depend on the price p, the time of the year t and the type of customer s; something unseen, a conference say,
moves the price and the sales. The cost of fuel c moves the price only:

.. math::
    p = 25 + (c + 3) \psi(t) + v, \quad y = 100 + (10 + p) s \psi(t) - 2p + noise \cdot e, \quad
    \psi(t) = 2\,((t - 5)^4 / 600 + e^{-4 (t - 5)^2} + t / 10 - 2),

with c, v ~ N(0, 1), e ~ N(rho v, 1 - rho^2), t ~ U(0, 10), s uniform on 1..7. The bilevel problem is that of
`tasks.iv` with x = (p, t, s) and z = (c, t, s): the inner level learns E[f_omega(p, t, s) | c, t, s]. Errors are
measured on the published grid, a good part of which lies where no price was seen.

Not a finished experiment: with the settings below the instrumental methods are not trained to convergence (their
validation loss is several times the noise's), so that their order means little.

In Xu et al. (and here by default) noise = 1, of a standard deviation of y of 158: there is hardly any confounding to
undo. In the code of Hartford et al. e is added to y in units of its standard deviation, which is noise = 158.

References:
    Hartford, Lewis, Leyton-Brown, Taddy, *Deep IV: A Flexible Approach for Counterfactual Prediction*, ICML 2017;
    Xu et al., ICLR 2021, https://arxiv.org/abs/2010.07154 (DFIV), appendix.
"""

import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

import funcbilevel as fb
from funcbilevel.tasks import _records, iv
from funcbilevel.tasks._statistics import bootstrap_interval, paired_p_value

if TYPE_CHECKING:
    from rich.console import RenderableType

Array: TypeAlias = np.ndarray[Any, Any]

# Data.


def psi(t: Array) -> Array:
    """How much customers mind the price, over the year."""
    return 2 * ((t - 5) ** 4 / 600 + np.exp(-4 * (t - 5) ** 2) + t / 10 - 2)


def structural(p: Array, t: Array, s: Array) -> Array:
    """The truth: sales if the price were set to p."""
    return 100 + (10 + p) * s * psi(t) - 2 * p


class Sample(NamedTuple):
    """Observations.

    Attributes:
        z: cost, time and customer type, [n, 3].
        x: price, time and customer type, [n, 3].
        y: sales, [n].
    """

    z: Array
    x: Array
    y: Array


def simulate(n: int, rng: np.random.Generator, rho: float = 0.5, noise: float = 1.0) -> Sample:
    """n independent observations."""
    s, t = rng.integers(1, 8, n).astype(float), rng.uniform(0, 10, n)
    c, v = rng.normal(size=(2, n))
    e = rho * v + np.sqrt(1 - rho**2) * rng.normal(size=n)
    p = 25 + (c + 3) * psi(t) + v
    return Sample(np.stack([c, t, s], axis=1), np.stack([p, t, s], axis=1), structural(p, t, s) + noise * e)


def published_grid() -> Array:
    """The published 20 prices x 20 times x 7 types, [2800, 3]."""
    axes = np.linspace(10, 25, 20), np.linspace(0, 10, 20), np.arange(1.0, 8.0)
    return np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")], axis=1)


SHOWN_T, SHOWN_S = 5.0, 4.0


def shown_line() -> Array:
    """The prices at which the figure shows the curve, with its time and type, [61, 3]."""
    prices = np.linspace(10, 25, 61)
    return np.stack([prices, np.full_like(prices, SHOWN_T), np.full_like(prices, SHOWN_S)], axis=1)


class Arrays(NamedTuple):
    """What a run reads, all standardised by the means and standard deviations of the training sample.

    Attributes:
        inner, outer: the two halves of the sample; both with z, x and y.
        validation: fresh observations.
        test_x: the test grid, [2800, 3].
        shown_x: the line in the figure, [61, 3].
        y_mean, y_std: what takes y back.
    """

    inner: iv.Batch
    outer: iv.Batch
    validation: iv.Batch
    test_x: Any
    shown_x: Any
    y_mean: Any
    y_std: Any


def arrays(seed: int, n: int, rho: float, noise: float, num_validation: int = 2000) -> Arrays:
    """The data of one seed."""
    train_rng, validation_rng = np.random.default_rng(seed).spawn(2)
    sample = simulate(n, train_rng, rho, noise)
    fresh = simulate(num_validation, validation_rng, rho, noise)
    means, stds = (Sample(*(statistic(a, axis=0) for a in sample)) for statistic in (np.mean, np.std))

    def batch(sample: Sample, rows: slice) -> iv.Batch:
        return iv.Batch(*((a[rows] - mean) / std for a, mean, std in zip(sample, means, stds, strict=True)))

    data = Arrays(
        inner=batch(sample, slice(n // 2)),
        outer=batch(sample, slice(n // 2, None)),
        validation=batch(fresh, slice(None)),
        test_x=(published_grid() - means.x) / stds.x,
        shown_x=(shown_line() - means.x) / stds.x,
        y_mean=means.y,
        y_std=stds.y,
    )
    return jax.tree.map(lambda a: np.asarray(a, np.float32), data)


# The model.


class Net(linen.Module):
    """tanh layers: inputs [n, 3] -> features in (-1, 1), [n, widths[-1]], and a constant where asked for.

    Biases start from U(-1, 1), so that the units bend in different places.
    """

    widths: tuple[int, ...]
    constant: bool = False

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The features."""

        def biases(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -1.0, 1.0)

        for width in self.widths:
            x = linen.tanh(linen.Dense(width, bias_init=biases)(x))
        return iv.with_constant(x) if self.constant else x


def second_stage(features: jax.Array, y: jax.Array, ridge: float) -> jax.Array:
    """u, [k + 1]: the ridge regression of y on [features, 1], in closed form."""
    H = iv.with_constant(features)
    gram = H.T @ H / len(y) + ridge * jnp.eye(H.shape[1], dtype=H.dtype)
    return jax.scipy.linalg.solve(gram, H.T @ y / len(y), assume_a="pos")


def ridge_loss(features: jax.Array, y: jax.Array, ridge: float) -> jax.Array:
    """The ridge objective at its minimum over u."""
    u = second_stage(features, y, ridge)
    return jnp.mean((y - iv.with_constant(features) @ u) ** 2) + ridge * jnp.sum(u**2)


class Setting(NamedTuple):
    """What all methods have in common.

    Attributes:
        n: sample size; half of it is the inner level's.
        rho: correlation of the two disturbances.
        noise: standard deviation of the disturbance of y.
        num_outer_steps: outer steps, over which the outer learning rate falls to zero along a cosine.
        outer_widths, inner_widths: of the two networks.
        inner_steps: Adam steps on theta per outer step.
        inner_learning_rate, outer_learning_rate: of Adam.
        inner_ridge, outer_ridge: on the heads of the two levels, which are solved for.
    """

    n: int = 5000
    rho: float = 0.5
    noise: float = 1.0
    num_outer_steps: int = 100
    outer_widths: tuple[int, ...] = (64, 32)
    inner_widths: tuple[int, ...] = (64, 32)
    inner_steps: int = 10
    inner_learning_rate: float = 3e-3
    outer_learning_rate: float = 3e-3
    inner_ridge: float = 1e-5
    outer_ridge: float = 1e-4


# Methods.

Hyper: TypeAlias = Mapping[str, float]


class Method(NamedTuple):
    """A way to train.

    Attributes:
        estimator: `(features of h, setting, **the hyper-parameters that are not the setting's) -> estimator`.
        trials: the hyper-parameters between which the validation loss decides.
        chosen: which of them it chose at the default options (benchmarks/results/demand/trials.jsonl).
        instrumental: whether the outer level sees f through h. If not, y is regressed on f(x), on the whole sample.
    """

    estimator: Callable[..., fb.Estimator]
    trials: tuple[Hyper, ...]
    chosen: int
    instrumental: bool = True


def _funcid_linear(features: fb.Model, setting: Setting, ridge_ratio: float) -> fb.Estimator:
    return fb.funcid(fb.linear_adjoint(features, ridge=2 * setting.inner_ridge * ridge_ratio))


def _funcid_learned(features: fb.Model, setting: Setting, learning_rate: float) -> fb.Estimator:
    head = fb.from_linen(linen.Dense(setting.outer_widths[-1], use_bias=False, kernel_init=linen.initializers.zeros))
    optimizer = iv.adam(learning_rate, 2 * setting.inner_ridge)
    return fb.funcid(fb.learned_adjoint(optimizer, setting.inner_steps, head, features=features))


def _alternating(features: fb.Model, setting: Setting) -> fb.Estimator:
    return fb.alternating()


def _aid(features: fb.Model, setting: Setting, damping: float) -> fb.Estimator:
    return fb.aid(fb.cg(10, damping))


def _trials(own: Hyper, fourth: Hyper) -> tuple[Hyper, ...]:
    """Three trials that all methods have in common, with the method's own hyper-parameters, and one of its own."""
    common = ((3e-3, 1e-4), (1e-2, 1e-4), (1e-2, 1e-5))
    hypers = [{"outer_learning_rate": rate, "outer_ridge": ridge, **own} for rate, ridge in common]
    return (*hypers, {**hypers[1], **fourth})


SLOW: Hyper = {"outer_learning_rate": 3e-3, "outer_ridge": 1e-5}

METHODS: dict[str, Method] = {
    "funcid-linear": Method(_funcid_linear, _trials({"ridge_ratio": 1.0}, {"ridge_ratio": 10.0}), chosen=0),
    "funcid-learned": Method(_funcid_learned, _trials({"learning_rate": 1e-2}, {"learning_rate": 1e-3}), chosen=1),
    "dfiv": Method(_alternating, _trials({}, SLOW), chosen=3),
    "aid-cg": Method(_aid, _trials({"damping": 1e-2}, {"damping": 1.0}), chosen=3),
    "single-objective": Method(_alternating, _trials({}, SLOW), chosen=2, instrumental=False),
}
LINEAR = "iv2sls"


def two_stage(sample: Arrays, x: Any) -> Array:
    """Two-stage least squares, linear in p, t and s and instrumented by c, t and s: its predictions at x."""
    z, regressors, y = (np.concatenate(pair, dtype=float) for pair in zip(sample.inner, sample.outer, strict=True))
    z, regressors, x = (np.hstack([a, np.ones((len(a), 1))]) for a in (z, regressors, x))
    return x @ np.linalg.solve(z.T @ regressors, z.T @ y)


# Training and evaluation.


class Evaluation(NamedTuple):
    """How good a state is, in units of y.

    Attributes:
        test_mse: mean squared error to the truth on the published grid.
        validation_loss: mean squared error of y on fresh observations, by u'[h(z), 1], so without the truth; of
            `single-objective` by u'[f(x), 1].
        shown: the estimate along the line of the figure, [61].
    """

    test_mse: Any
    validation_loss: Any
    shown: Any


def _evaluation(data: Arrays, test: Any, validation: Any, shown: Any) -> Evaluation:
    """From standardised predictions."""
    truth = structural(*published_grid().T)
    return Evaluation(
        test_mse=((test * data.y_std + data.y_mean - truth) ** 2).mean(),
        validation_loss=((validation - data.validation.y) ** 2).mean() * data.y_std**2,
        shown=shown * data.y_std + data.y_mean,
    )


def linear_evaluation(data: Arrays) -> Evaluation:
    """That of two-stage least squares. Its validation loss is of y given x: it has no use here."""
    return _evaluation(data, *(two_stage(data, x) for x in (data.test_x, data.validation.x, data.shown_x)))


class Solver(NamedTuple):
    """A method made ready.

    Attributes:
        bilevel: the solver.
        batches: `data -> (inner batch, outer batch)`.
        evaluate: `(state, data) -> Evaluation`.
    """

    bilevel: fb.BilevelSolver
    batches: Callable[[Arrays], tuple[iv.Batch, iv.Batch]]
    evaluate: Callable[[fb.BilevelState, Arrays], Evaluation]


@cache
def _solver(method: str, setting: Setting, own: tuple[tuple[str, float], ...]) -> Solver:
    estimator, instrumental = METHODS[method].estimator, METHODS[method].instrumental
    ridge = setting.outer_ridge
    f = fb.from_linen(Net(setting.outer_widths))
    schedule: Any = optax.cosine_decay_schedule(setting.outer_learning_rate, setting.num_outer_steps)

    def make(problem: fb.FunctionalProblem, h: fb.Model, features: fb.Model, inner_steps: int) -> fb.BilevelSolver:
        return fb.bilevel(
            problem,
            h,
            estimator(features, setting, **dict(own)),
            inner_optimizer=iv.adam(setting.inner_learning_rate, 0.0),
            outer_optimizer=iv.adam(schedule, 0.0),
            inner_steps=inner_steps,
            outer_model=f,
            outer_inputs=lambda batch: batch.x,
        )

    def with_head(u: jax.Array, validation: jax.Array, state: fb.BilevelState, data: Arrays) -> Evaluation:
        test, shown = (f.apply(state.outer_params, (), x)[0] for x in (data.test_x, data.shown_x))
        return _evaluation(data, *(iv.with_constant(features) @ u for features in (test, validation, shown)))

    if instrumental:
        features = fb.from_linen(Net(setting.inner_widths, constant=True))
        h = fb.variable_projection(features, setting.outer_widths[-1], ridge=2 * setting.inner_ridge)
        problem = fb.FunctionalProblem(
            iv.inner_objective, lambda f, h, batch: ridge_loss(h, batch.y, ridge), inputs=lambda batch: batch.z
        )

        def evaluate(state: fb.BilevelState, data: Arrays) -> Evaluation:
            f_inner, _ = f.apply(state.outer_params, (), data.inner.x)
            predict = fb.predictor(problem, h, f_inner, state.inner_params, data.inner, state.model_state)
            u = second_stage(predict(data.outer.z), data.outer.y, ridge)
            return with_head(u, predict(data.validation.z), state, data)

        return Solver(make(problem, h, features, setting.inner_steps), lambda data: (data.inner, data.outer), evaluate)

    # No inner level: the explicit part of the hypergradient is the gradient, and the follower a mere zero.
    nothing = fb.from_function(lambda key, z: jnp.zeros(()), lambda theta, z: theta * jnp.ones(len(z)))
    problem = fb.FunctionalProblem(
        lambda f, h, batch: jnp.mean(h**2), lambda f, h, batch: ridge_loss(f, batch.y, ridge), inputs=lambda b: b.z
    )

    def evaluate_regression(state: fb.BilevelState, data: Arrays) -> Evaluation:
        whole = _whole(data)
        f_whole, f_validation = (f.apply(state.outer_params, (), x)[0] for x in (whole.x, data.validation.x))
        return with_head(second_stage(f_whole, whole.y, ridge), f_validation, state, data)

    return Solver(make(problem, nothing, nothing, 1), lambda data: (_whole(data), _whole(data)), evaluate_regression)


def _whole(data: Arrays) -> iv.Batch:
    return jax.tree.map(lambda inner, outer: jnp.concatenate([inner, outer]), data.inner, data.outer)


def fit(
    method: str, setting: Setting, hyper: Hyper, seeds: Sequence[int], callback: Any = None, chunk: int = 10
) -> tuple[Evaluation, dict[str, Array]]:
    """Trains all seeds in one vmap; the evaluation and the last step's metrics, each with the seeds as first axis.

    A seed is that of its data and of its initial networks, which are the same for every method.
    """
    common = {name: value for name, value in hyper.items() if name in Setting._fields}
    own = tuple(sorted((name, value) for name, value in hyper.items() if name not in common))
    solver = _solver(method, setting._replace(**common), own)
    samples = [arrays(seed, setting.n, setting.rho, setting.noise) for seed in seeds]
    data: Arrays = jax.tree.map(lambda *a: jnp.stack(a), *samples)
    batches = solver.batches(data) if METHODS[method].instrumental else jax.vmap(solver.batches)(data)

    @jax.jit
    @jax.vmap
    def start(key: jax.Array, inner_batch: iv.Batch) -> fb.BilevelState:
        return solver.bilevel.init(key, None, inner_batch)

    def mean_over_seeds(state: fb.BilevelState, metrics: dict[str, Array]) -> None:
        if callback is not None:
            callback(state, {name: values.mean(axis=1) for name, values in metrics.items()})

    state, metrics = fb.train(
        solver.bilevel._replace(step=jax.vmap(solver.bilevel.step)),
        start(jnp.stack([jax.random.key(seed) for seed in seeds]), batches[0]),
        jax.tree_util.Partial(_constant, batches),
        setting.num_outer_steps,
        chunk=chunk,
        callback=mean_over_seeds,
        progress=False,
        on_nonfinite="continue",
    )
    evaluation = jax.device_get(jax.jit(jax.vmap(solver.evaluate))(state, data))
    return evaluation, {name: values[-1] for name, values in metrics.items()}


def _constant(batches: Any, key: jax.Array, step: jax.Array) -> Any:
    return batches


# The command.

SELECTION_SEEDS = (1000, 1001)


@dataclass(frozen=True)
class Demand(_records.Options):
    """Demand for air tickets (Hartford et al. 2017): instrumental regression on a simulation, by every method."""

    task = "demand"
    seeds: int = 10
    """Number of seeds, from --seed on; each has its own data and networks."""
    n: int = 5000
    """Sample size, even; half of it is the inner level's."""
    rho: float = 0.5
    """Correlation of the disturbances of price and sales: the confounding."""
    noise: float = 1.0
    """Standard deviation of the disturbance of sales: 1 as in Xu et al., 158 as in the code of Hartford et al."""
    num_outer_steps: int = Setting().num_outer_steps
    """Outer steps of each run."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to run, beside two-stage least squares."""
    tune: bool = False
    """Choose the hyper-parameters anew, by the validation loss on two other seeds; else those chosen before."""

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {self.seeds}.")
        if self.n < 20 or self.n % 2:
            raise ValueError(f"--n must be even and at least 20, got {self.n}.")
        if not -1 <= self.rho <= 1:
            raise ValueError(f"--rho must be between -1 and 1, got {self.rho}.")
        if self.noise < 0:
            raise ValueError(f"--noise must be at least 0, got {self.noise}.")
        if self.num_outer_steps < 1:
            raise ValueError(f"--num-outer-steps must be at least 1, got {self.num_outer_steps}.")
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or len(set(self.methods)) < max(1, len(self.methods)):
            got = ", ".join(self.methods) or "none"
            raise ValueError(f"--methods must be among {', '.join(METHODS)}, each once, got {got}.")

    def run(self, directory: Path, track: _records.Track) -> "RenderableType":
        """Writes runs.jsonl (with `tune` trials.jsonl, too) and demand.png into `directory`; returns the table."""
        setting = Setting(self.n, self.rho, self.noise, self.num_outer_steps)
        seeds = tuple(range(self.seed, self.seed + self.seeds))
        results: dict[str, Result] = {}
        for method in self.methods:
            hyper = METHODS[method].trials[METHODS[method].chosen]
            if self.tune:
                hyper = _tune(directory / "trials.jsonl", method, setting, track)
            results[method] = _run(directory / "runs.jsonl", method, setting, hyper, seeds, track)
        results[LINEAR] = _run_linear(directory / "runs.jsonl", setting, seeds)
        draw(results, setting, directory / "demand.png")
        return _table(results, setting)


class Result(NamedTuple):
    """One method on all seeds.

    Attributes:
        test_mse: [seeds].
        shown: the estimates along the line of the figure, [seeds, 61].
        seconds: for all seeds, compilation included.
    """

    test_mse: Array
    shown: Array
    seconds: float


def _run(
    path: Path, method: str, setting: Setting, hyper: Hyper, seeds: Sequence[int], track: _records.Track
) -> Result:
    """Trains and adds a record per seed, whose seconds are an equal share of those of the vmap."""
    start = time.perf_counter()
    label = method if path.name == "runs.jsonl" else " ".join([method, *(f"{v:g}" for v in hyper.values())])
    evaluation, last = fit(method, setting, hyper, seeds, track(label, setting.num_outer_steps))
    seconds = time.perf_counter() - start
    settings = setting._asdict() | dict(hyper) | {"seeds_at_once": len(seeds)}
    for i, seed in enumerate(seeds):
        metrics = {name: last[name][i] for name in ("outer_objective", "inner_objective", "hypergradient_norm")}
        metrics |= {"test_mse": evaluation.test_mse[i], "validation_loss": evaluation.validation_loss[i]}
        _records.append(path, _records.record("demand", method, seed, settings, metrics, seconds / len(seeds)))
    return Result(evaluation.test_mse, evaluation.shown, seconds)


def _tune(path: Path, method: str, setting: Setting, track: _records.Track) -> Hyper:
    """Of the method's trials the one with the least mean validation loss; a run that broke counts as infinite."""
    trials = METHODS[method].trials
    for hyper in trials:
        _run(path, method, setting, hyper, SELECTION_SEEDS, track)
    # One record per trial and seed, in this order, at the end of the file.
    records = list(_records.read(path))[-len(trials) * len(SELECTION_SEEDS) :]
    losses = [record["metrics"]["validation_loss"] for record in records]
    values = np.reshape([np.inf if loss is None else loss for loss in losses], (len(trials), -1))
    return trials[int(np.argmin(values.mean(axis=1)))]


def _run_linear(path: Path, setting: Setting, seeds: Sequence[int]) -> Result:
    start = time.perf_counter()
    runs = [linear_evaluation(arrays(seed, setting.n, setting.rho, setting.noise)) for seed in seeds]
    seconds = time.perf_counter() - start
    settings = {name: getattr(setting, name) for name in ("n", "rho", "noise")}
    for seed, evaluation in zip(seeds, runs, strict=True):
        metrics = {"test_mse": evaluation.test_mse}
        _records.append(path, _records.record("demand", LINEAR, seed, settings, metrics, seconds / len(seeds)))
    return Result(np.array([run.test_mse for run in runs]), np.stack([run.shown for run in runs]), seconds)


# What is shown of it.

BASELINE = "funcid-linear"


class Row(NamedTuple):
    """A method's test MSE over the seeds; one that broke counts as infinite.

    Attributes:
        median, quartiles: of the seeds.
        interval: 95% bootstrap interval of the median.
        p_value: of the paired, two-sided Wilcoxon test against `BASELINE`; None where there is nothing to test.
    """

    median: float
    quartiles: tuple[float, float]
    interval: tuple[float, float]
    p_value: float | None


_BROKEN = 1e30  # stands for infinity, with which quantiles and ranks cannot be computed


def summarise(results: Mapping[str, Result]) -> dict[str, Row]:
    """One row per method."""
    values = {
        name: np.where(np.isfinite(result.test_mse), result.test_mse, _BROKEN).astype(float)
        for name, result in results.items()
    }
    return {name: _row(sample, values.get(BASELINE, sample)) for name, sample in values.items()}


def _row(sample: Array, baseline: Array) -> Row:
    low, median, high = np.quantile(sample, (0.25, 0.5, 0.75))
    interval = bootstrap_interval(sample)
    values = [float(np.inf if value > _BROKEN / 1e3 else value) for value in (median, low, high, *interval)]
    return Row(values[0], (values[1], values[2]), (values[3], values[4]), paired_p_value(sample - baseline))


def _table(results: Mapping[str, Result], setting: Setting) -> "RenderableType":
    from rich import box  # noqa: PLC0415
    from rich.console import Group  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    seeds = len(next(iter(results.values())).test_mse)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title_justify="left")
    table.title = (
        f"Test MSE, demand design: n = {setting.n}, rho = {setting.rho}, noise = {setting.noise:g}, {seeds} seeds"
    )
    table.add_column("method", no_wrap=True)
    for name in ("median", "quartiles", "95% of median", "p", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in summarise(results).items():
        table.add_row(
            name,
            f"{row.median:.0f}",
            "{:.0f}-{:.0f}".format(*row.quartiles),
            "{:.0f}-{:.0f}".format(*row.interval),
            "" if row.p_value is None else f"{row.p_value:.2g}",
            f"{results[name].seconds:.1f}",
        )
    note = (
        f"p: paired Wilcoxon test against {BASELINE}. seconds: all seeds together, compilation included. "
        f"The variance of the truth on the grid is {structural(*published_grid().T).var():.0f}. single-objective "
        "regresses y on f(p, t, s) and takes no notice of the confounding; iv2sls is linear."
    )
    return Group(table, "", textwrap.fill(note, 78))


COLOURS = {
    "funcid-linear": "C3",
    "funcid-learned": "C1",
    "dfiv": "C0",
    "aid-cg": "C2",
    "single-objective": "0.45",
    LINEAR: "0.7",
}
DASHES = {"dfiv": (0, (4, 3)), "funcid-learned": (0, (1, 1.5)), LINEAR: (0, (6, 2, 1, 2))}


def draw(results: Mapping[str, Result], setting: Setting, path: Path) -> None:
    """Test MSE as boxes with their seeds, and the demand curve of each method's median seed, as a PNG."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    with rc_context(style):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        boxes, curves = figure.subplots(1, 2, width_ratios=(1.15, 1))
        finite = {name: result.test_mse[np.isfinite(result.test_mse)] for name, result in results.items()}
        drawn: Any = boxes.boxplot(list(finite.values()), widths=0.6, showfliers=False, patch_artist=True)
        rng = np.random.default_rng(0)
        parts = zip(finite.items(), drawn["boxes"], drawn["medians"], strict=True)
        for i, ((name, sample), box, line) in enumerate(parts, start=1):
            box.set(facecolor=COLOURS[name], alpha=0.35, edgecolor=COLOURS[name])
            line.set(color="black")
            boxes.scatter(i + rng.uniform(-0.18, 0.18, len(sample)), sample, s=10, color=COLOURS[name], zorder=3, lw=0)
        boxes.set_yscale("log")
        boxes.set_xticks(range(1, len(finite) + 1), [name.replace("-", "\n", 1) for name in finite], fontsize=8)
        seeds = max(map(len, finite.values()))
        boxes.set(ylabel="Test MSE (log scale)", title=f"{seeds} seeds, n = {setting.n}, noise = {setting.noise:g}")

        prices = shown_line()[:, 0]
        centre, spread = 25 + 3 * psi(np.array(SHOWN_T)), np.sqrt(psi(np.array(SHOWN_T)) ** 2 + 1)
        low, high = centre - 1.645 * spread, centre + 1.645 * spread
        curves.axvspan(
            low, min(high, prices[-1]), color="0.92", lw=0, label=f"90% of the prices\nseen at t = {SHOWN_T:g}"
        )
        curves.plot(prices, structural(*shown_line().T), color="black", lw=2.2, label="truth")
        for name, result in results.items():
            order = np.argsort(np.where(np.isfinite(result.test_mse), result.test_mse, np.inf))
            median_seed = order[(len(order) - 1) // 2]
            dashes: Any = DASHES.get(name, "-")
            curves.plot(prices, result.shown[median_seed], color=COLOURS[name], lw=1.4, ls=dashes, label=name)
        curves.set(xlabel="Price", ylabel="Sales", title=f"Demand at t = {SHOWN_T:g}, s = {SHOWN_S:g}, median seeds")
        curves.set_xlim(prices[0], prices[-1])
        curves.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(path, dpi=150)
