"""What `fb.train` does about NaN: a fresh start of what caused it, or back to a checkpoint with smaller steps."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_checkpoint import Killed, bits, killed_at

import funcbilevel as fb

pytestmark = pytest.mark.filterwarnings("ignore:train. the inner solution is not a stationary point")

TARGET = jnp.array([1.0, -2.0])
TIMES_8 = fb.Rollback(8)
PROBLEM = fb.ParametricProblem(
    lambda w, u, b: jnp.sum((u - w) ** 2), lambda w, u, b: jnp.sum(jnp.cosh(u - b)) + 0.1 * jnp.sum(w**2)
)
LEAST = fb.ParametricProblem(lambda w, u, b: jnp.sum((u - w) ** 2), lambda w, u, b: jnp.sum((u - b) ** 2))


def make(outer_rate: float = 0.1, inner_rate: float = 0.3, problem: Any = PROBLEM) -> fb.BilevelSolver:
    return fb.bilevel(
        problem,
        None,
        fb.aid(fb.cg(2)),
        inner_optimizer=optax.sgd(inner_rate),
        outer_optimizer=optax.sgd(outer_rate),
        inner_steps=5,
    )


WILD = make(outer_rate=1.2)


def start(solver: fb.BilevelSolver = WILD) -> fb.BilevelState:
    return solver.init(jax.random.key(0), jnp.array([5.0, 5.0]), TARGET, jnp.zeros(2))


def sample(key: Any, step: Any) -> Any:
    return (TARGET, TARGET + 0.01 * jax.random.normal(key, (2,)))


class Pairs:
    """Batches with a position."""

    def __init__(self) -> None:
        self.i, self.pulls = 0, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.i += 1
        self.pulls += 1
        noise = np.random.default_rng(self.i).normal(size=2).astype(np.float32)
        return (np.asarray(TARGET), np.asarray(TARGET) + np.float32(0.01) * noise)

    def get_state(self) -> Any:
        return {"i": self.i}

    def set_state(self, state: Any) -> None:
        self.i = state["i"]


DATA: dict[str, Callable[[], Any]] = {
    "sampler": lambda: sample,
    "seekable": Pairs,
    "generator": lambda: (next(pairs) for pairs in itertools.repeat(Pairs())),
}


def train(
    directory: Path,
    solver: Any = WILD,
    data: Any = sample,
    policy: Any = TIMES_8,
    num_outer_steps: int = 60,
    **kw: Any,
) -> Any:
    state = kw.pop("state", None)
    state = start(solver) if state is None else state
    return fb.train(
        solver,
        state,
        data,
        num_outer_steps,
        chunk=5,
        progress=False,
        on_nonfinite=policy,
        checkpoint=fb.Checkpoint(directory, every=10),
        **kw,
    )


# Back to the last checkpoint.


@pytest.mark.parametrize("kind", DATA)
def test_a_rollback_finds_a_step_that_converges(kind: str, tmp_path: Path) -> None:
    with pytest.raises(fb.NonFiniteError):
        train(tmp_path / "alone", data=DATA[kind](), policy="raise")
    with pytest.warns(UserWarning, match="goes back") as told:
        state, metrics = train(tmp_path / "back", data=DATA[kind]())
    np.testing.assert_allclose(state.outer_params, TARGET, atol=0.4)
    assert all(len(values) == 60 and np.all(np.isfinite(values)) for values in metrics.values())
    scales = metrics["step_scale"]
    assert set(scales) <= {0.5**k for k in range(9)}
    assert np.all(np.diff(scales) <= 0)
    messages = [str(w.message) for w in told]
    assert 0.5 ** len(messages) == scales[-1] < 1
    for k, message in enumerate(messages, 1):
        assert message.startswith("train: ")
        assert "in the outer level" in message or "in the inner level" in message or "in the adjoint level" in message
        assert f"with steps of {0.5**k:.3g} of their size (rollback {k} of 8)." in message
        assert told[0].filename == __file__


@pytest.mark.parametrize("kind", DATA)
def test_a_run_that_went_back_and_is_killed_is_the_same_run(kind: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        whole = train(tmp_path / "whole", data=DATA[kind]())
        for step in (10, 25, 45):
            with pytest.raises(Killed):
                train(tmp_path / "killed", data=DATA[kind](), callback=killed_at(step))
        assert bits(train(tmp_path / "killed", data=DATA[kind]())) == bits(whole)


def test_data_with_a_position_go_back_too(tmp_path: Path) -> None:
    data = Pairs()
    with warnings.catch_warnings(action="ignore"):
        train(tmp_path, data=data)
    assert data.i == 60 < data.pulls


def test_a_diverging_inner_level_is_mended_too(tmp_path: Path) -> None:
    solver = make(inner_rate=1.5, problem=LEAST)
    with pytest.warns(UserWarning, match="goes back to its step"):
        state, metrics = train(tmp_path, solver, num_outer_steps=600)
    assert metrics["step_scale"][-1] <= 0.5
    np.testing.assert_allclose(state.inner_params, state.outer_params, atol=1e-2)


def test_a_checkpoint_that_bears_the_seeds_of_nan_is_left_behind(tmp_path: Path) -> None:
    """After one step cosh overflows at whatever is done next: only the start is good."""
    solver = make(outer_rate=0.3)
    with pytest.warns(UserWarning, match="goes back") as told:
        _, metrics = fb.train(
            solver,
            start(solver),
            sample,
            40,
            chunk=1,
            progress=False,
            on_nonfinite=fb.Rollback(12),
            checkpoint=fb.Checkpoint(tmp_path, every=1, keep=10),
        )
    assert "goes back to its step 1, and" in str(told[0].message)
    assert "goes back to its step 0, and" in str(told[1].message)
    assert metrics["outer_objective"][-1] < metrics["outer_objective"][0]


def test_it_goes_back_no_more_than_it_may(tmp_path: Path) -> None:
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(fb.NonFiniteError, match=r"It had gone back 1 times\.") as caught,
    ):
        train(tmp_path, make(outer_rate=100.0), policy=fb.Rollback(1))
    assert caught.value.metrics["step_scale"][-1] == 0.5


def test_a_healthy_run_is_left_alone(tmp_path: Path) -> None:
    solver = make(problem=LEAST)
    state, metrics = train(tmp_path / "a", solver)
    expected, history = train(tmp_path / "b", solver, policy="raise")
    assert np.all(metrics.pop("step_scale") == 1)
    assert bits((state, metrics)) == bits((expected, history))


def test_the_factor_is_that_of_both_optimizers(tmp_path: Path) -> None:
    """The first step after a rollback, by hand."""
    calm = make(problem=LEAST)
    nan_at_10 = lambda key, step: (TARGET, jnp.where((step == 10) & (key[0] >= 0), jnp.nan, TARGET))
    data = lambda key, step: nan_at_10(jax.random.key_data(key), step)
    passed: list[int] = []

    def once(state: Any, metrics: Any) -> None:
        passed.append(int(state.step))

    with pytest.warns(UserWarning, match="goes back"), pytest.raises(fb.NonFiniteError) as caught:
        train(tmp_path, calm, data=data, policy=fb.Rollback(1, factor=0.25), callback=once)
    assert passed == [5, 10]  # not with the chunks that broke
    smaller = make(outer_rate=0.025, inner_rate=0.075, problem=LEAST)
    state, _ = fb.train(calm, start(calm), data, 10, chunk=5, progress=False)
    with pytest.raises(fb.NonFiniteError) as by_hand:
        fb.train(smaller, state, data, 5, chunk=5, progress=False)
    np.testing.assert_allclose(caught.value.state.outer_params, by_hand.value.state.outer_params, rtol=1e-5)


def test_other_solvers_are_made_by_the_user(tmp_path: Path) -> None:
    """A stochastic method, and a step under vmap."""

    def soba(scale: float) -> fb.BilevelSolver:
        return fb.soba(LEAST, inner_optimizer=0.2 * scale, linear_optimizer=0.2 * scale, outer_optimizer=300.0 * scale)

    def seeds(scale: float) -> fb.BilevelSolver:
        solver = make(outer_rate=1.2 * scale)
        return solver._replace(step=jax.vmap(solver.step, in_axes=(0, None, None)))

    states = jax.vmap(lambda w: WILD.init(jax.random.key(0), w, TARGET, jnp.zeros(2)))(
        jnp.array([[0.0] * 2, [5.0] * 2])
    )
    one_pair = lambda key, step: (TARGET, TARGET)
    for name, maker, state in (("soba", soba, start(soba(1.0))), ("seeds", seeds, states)):
        with pytest.raises(
            ValueError, match=r"the solver is not straight from fb.bilevel.*fb.Rollback\(\.\.\., solver="
        ):
            train(tmp_path / name, maker(1.0), state=state)
        with pytest.warns(UserWarning, match="goes back"):
            end, metrics = train(
                tmp_path / name,
                maker(1.0),
                one_pair,
                fb.Rollback(4, 0.1, solver=maker),
                num_outer_steps=100,
                state=state,
            )
        assert metrics["step_scale"].shape == metrics["outer_objective"].shape
        assert np.all(metrics["step_scale"][-1] < 1)
        assert np.all(np.isfinite(end.outer_params))


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"on_nonfinite is fb.Rollback, but checkpoint is None"):
        fb.train(WILD, start(), sample, 1, on_nonfinite=fb.Rollback(1))
    with pytest.raises(ValueError, match="Rollback: max_times must be at least 1, got 0"):
        fb.Rollback(0)
    for factor in (0.0, 1.0, 2):
        with pytest.raises(ValueError, match=r"Rollback: factor must be a number in \(0, 1\), got"):
            fb.Rollback(1, factor)
    with pytest.raises(TypeError, match=r"Rollback: factor must be a number in \(0, 1\), got 'x'"):
        fb.Rollback(1, "x")  # pyright: ignore
    with pytest.raises(TypeError, match="Rollback: solver must take 1 argument"):
        fb.Rollback(1, solver=lambda: WILD)  # pyright: ignore


def test_a_maker_that_makes_something_else(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Rollback: solver must return a BilevelSolver, got float"):
        train(tmp_path, policy=fb.Rollback(1, solver=lambda scale: scale))  # pyright: ignore


# On, from fresh moments and warm starts.


def with_adam(estimator: Any = None, problem: Any = LEAST) -> fb.BilevelSolver:
    return fb.bilevel(
        problem,
        None if problem is LEAST else fb.from_function(lambda key, x: jnp.zeros(2), lambda theta, x: theta + 0 * x),
        fb.aid(fb.cg(2)) if estimator is None else estimator,
        inner_optimizer=optax.adam(0.1),
        outer_optimizer=optax.adam(optax.exponential_decay(0.1, 100, 0.9)),
        inner_steps=5,
    )


ADAM = with_adam()
FUNCTIONAL = fb.FunctionalProblem(
    lambda w, v, b: jnp.sum((v - w) ** 2), lambda w, v, b: jnp.sum((v - b) ** 2), inputs=lambda b: b
)
LEARNED = with_adam(fb.funcid(fb.learned_adjoint(optax.adam(0.1), 20)), FUNCTIONAL)


def poisoned(solver: fb.BilevelSolver, level: str, value: float) -> fb.BilevelState:
    state = solver.init(jax.random.key(0), jnp.zeros(2), TARGET, jnp.zeros(2))

    def fill(x: jax.Array) -> jax.Array:
        return jnp.full_like(x, value) if jnp.issubdtype(x.dtype, jnp.floating) else x + 7

    return state._replace(**{level: jax.tree.map(fill, getattr(state, level))})


def plain(key: Any, step: Any) -> Any:
    return (TARGET, TARGET)


KINDS: dict[str, Callable[[], Any]] = {"sampler": lambda: plain, "iterator": lambda: itertools.repeat((TARGET, TARGET))}


CAUSES: dict[str, tuple[fb.BilevelSolver, str, float]] = {
    "inner moments": (ADAM, "inner_opt_state", np.inf),
    "outer moments": (ADAM, "outer_opt_state", np.inf),
    "adjoint": (LEARNED, "estimator_state", np.nan),
    "adjoint's moments": (LEARNED, "estimator_state", 1e38),
}


@pytest.mark.parametrize("data", KINDS)
@pytest.mark.parametrize("cause", CAUSES)
def test_what_caused_it_is_reset(cause: str, data: str) -> None:
    solver, level, value = CAUSES[cause]
    given = poisoned(solver, level, value)
    with pytest.warns(UserWarning, match="goes on from fresh moments of the optimizers and a fresh warm start") as told:
        state, metrics = fb.train(solver, given, KINDS[data](), 400, chunk=20, progress=False, on_nonfinite="continue")
    assert len(told) == 1
    np.testing.assert_allclose(state.outer_params, TARGET, atol=0.1)
    finite = np.all([metrics[f"{name}_finite"] for name in ("inner", "adjoint", "outer")], axis=0)
    assert not finite[:20].all()
    assert finite[20:].all()
    counts = jax.tree.leaves(jax.tree.map(lambda x: x if x.dtype == jnp.int32 else None, state.inner_opt_state))
    assert all(count >= 5 * 380 for count in counts)  # schedules go on


def test_conjugate_gradients_need_no_reset() -> None:
    """They start at zero where their warm start is worse, or broken."""
    given = poisoned(ADAM, "estimator_state", np.nan)
    state, metrics = fb.train(ADAM, given, plain, 400, chunk=20, progress=False)
    assert metrics["adjoint_finite"].all()
    np.testing.assert_allclose(state.outer_params, TARGET, atol=0.1)


def test_one_bad_batch_resets_nothing() -> None:
    """The warm start and the moments outlive it."""
    bad = lambda key, step: (TARGET, jnp.where(step == 7, jnp.nan, TARGET))
    with pytest.warns(UserWarning, match="outer level at outer step 7") as told:
        state, _ = fb.train(ADAM, start(ADAM), bad, 20, chunk=20, progress=False, on_nonfinite="continue")
    assert "fresh" not in str(told[0].message)
    assert np.any(state.outer_opt_state[0].nu > 0)


def test_of_several_seeds_the_broken_one_is_reset() -> None:
    clean = ADAM.init(jax.random.key(0), jnp.zeros(2), TARGET, jnp.zeros(2))
    many = ADAM._replace(step=jax.vmap(ADAM.step, in_axes=(0, None, None)))
    states = jax.tree.map(lambda *xs: jnp.stack(xs), clean, poisoned(ADAM, "inner_opt_state", np.inf))
    with pytest.warns(UserWarning, match="of seed 1.*fresh moments"):
        state, metrics = fb.train(many, states, plain, 60, chunk=20, progress=False, on_nonfinite="continue")
    alone, history = fb.train(ADAM, clean, plain, 60, chunk=20, progress=False)
    np.testing.assert_allclose(state.outer_params[0], alone.outer_params, rtol=1e-4)
    np.testing.assert_allclose(metrics["outer_objective"][:, 0], history["outer_objective"], rtol=1e-3)
    assert metrics["inner_finite"][20:].all()


def test_a_solver_that_cannot_be_started_again_goes_on_as_it_is() -> None:
    def init(*_: Any) -> Any:
        raise TypeError("once only")

    solver = ADAM._replace(init=init)
    with pytest.warns(UserWarning, match="inner level") as told:
        fb.train(solver, poisoned(ADAM, "inner_opt_state", np.inf), plain, 5, progress=False, on_nonfinite="continue")
    assert "fresh" not in str(told[0].message)
