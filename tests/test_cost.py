"""Memory and time of compiled outer steps, on the networks of benchmarks/cost.py.

XLA's memory figures are exact and repeatable; times are noisy and get a wide margin.
"""

import functools

import cost as benchmark
import jax
import jax.numpy as jnp
import optax
import pytest

import funcbilevel as fb

WIDTH, BATCH = 128, 256


@functools.cache
def temp_bytes(method, steps, depth, inner_steps=5):
    model, features = benchmark.perceptron(depth, WIDTH)
    inner, outer = benchmark.batches(BATCH)
    optimizer = optax.adam(1e-3, eps_root=1e-12)
    solver = fb.bilevel(
        benchmark.PROBLEM,
        model,
        benchmark.estimators(features, optimizer, steps)[method],
        inner_optimizer=optimizer,
        outer_optimizer=optax.sgd(1e-3),
        inner_steps=inner_steps,
    )
    state = jax.eval_shape(lambda: solver.init(jax.random.key(0), jnp.zeros((10, 1)), inner))
    return jax.jit(solver.step).lower(state, inner, outer).compile().memory_analysis().temp_size_in_bytes


def test_funcid_memory_is_flat_in_the_number_of_adjoint_steps():
    few, many = (temp_bytes("funcid-learned", steps, depth=2) for steps in (2, 100))  # one step would be no loop
    assert abs(many / few - 1) <= 0.01


def test_itd_memory_is_not_flat():  # so that the test above can fail
    assert temp_bytes("itd", 20, depth=2, inner_steps=20) > 2 * temp_bytes("itd", 5, depth=2, inner_steps=20)


def test_funcid_needs_less_memory_than_aid_and_grows_more_slowly_with_depth():
    funcid, aid = ({depth: temp_bytes(method, 5, depth) for depth in (2, 8)} for method in ("funcid-learned", "aid-cg"))
    assert all(funcid[depth] < 0.6 * aid[depth] for depth in funcid)
    assert funcid[8] - funcid[2] < 0.6 * (aid[8] - aid[2])


def test_linear_adjoint_adds_no_memory_that_grows_with_depth():
    """Beyond the inner fit there are only the features: the growth is that of `alternating`, which has no adjoint."""
    growth = {m: temp_bytes(m, 5, 8) - temp_bytes(m, 5, 2) for m in ("funcid-linear", "alternating")}
    assert growth["funcid-linear"] <= 1.01 * growth["alternating"]


@pytest.mark.slow
def test_funcid_step_takes_about_as_long_as_its_floor():
    rows = {row.name: row for row in benchmark.measure(depth=2, width=256, batch=512, steps=5, repeats=9).rows}
    assert rows["funcid-learned"].seconds_low < 1.5 * rows["floor"].seconds_low


def test_cost_reports_exact_sizes():
    x = jnp.ones((32, 32))
    result = fb.cost(lambda x: x @ x, x, repeats=3)
    assert result.argument_bytes == result.output_bytes == x.nbytes
    assert 0 < result.seconds_low <= result.seconds <= result.seconds_high
    assert result.compile_seconds > 0
    assert result.flops == pytest.approx(2 * 32**3, rel=0.1)


@pytest.mark.filterwarnings("ignore:.*alternating.* nothing will move")
def test_compare_costs_prints_a_row_per_estimator():
    problem = fb.FunctionalProblem(
        lambda w, v, batch: jnp.mean((v - w) ** 2), lambda w, v, batch: jnp.mean((v - batch[1]) ** 2)
    )
    model = fb.from_function(lambda key, x: jnp.zeros(1), lambda params, x: x @ params)
    batch = (jnp.ones((8, 1)), jnp.ones(8))
    table = fb.compare_costs(
        problem,
        model,
        {"alternating": fb.alternating(), "itd": fb.itd(2)},
        0.0,
        batch,
        batch,
        inner_optimizer=optax.sgd(0.1),
        outer_optimizer=optax.sgd(0.1),
        inner_steps=2,
        repeats=2,
    )
    lines = str(table).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[0] for line in lines[1:]] == ["alternating", "itd"]


@pytest.mark.parametrize(
    ("calls", "repeats", "message"), [({}, 3, "calls is empty"), ({"f": (jnp.sin, (1.0,))}, 0, "repeats")]
)
def test_bad_input(calls, repeats, message):
    with pytest.raises(ValueError, match=message):
        fb.measure_costs(calls, repeats)
