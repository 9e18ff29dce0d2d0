"""Fair classification: losses and metrics against fairlearn and by hand, the methods' updates, data, and commands."""

import itertools
import json
import zlib
from pathlib import Path

import fairlearn.metrics
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcbilevel as fb
from funcbilevel import cli
from funcbilevel.tasks import fairness
from funcbilevel.tasks._experiment import statistics, store
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks.data import nba, synthetic
from funcbilevel.tasks.data.dataset import Batch, Graph
from funcbilevel.tasks.fairness import losses as loss_functions
from funcbilevel.tasks.fairness import (
    methods,
    networks,
    outside,
    outside_report,
    protocols,
    report,
    runs,
    summary,
    train,
)
from funcbilevel.tasks.fairness.problem import Game, Hyper, Setting

ROOT = Path(__file__).parents[1]
SMALL = Setting((5, 1), (4,), 2, batch_size=20)


def draw(n=200, num_groups=(2,), seed=0, zero_weights=False):
    """(logits, batch) with rates that differ between groups."""
    rng = np.random.default_rng(seed)
    groups = np.stack([rng.integers(k, size=n) for k in num_groups], axis=1)
    logits = rng.normal(size=n) + 0.5 * groups.sum(axis=1)
    weight = (rng.uniform(size=n) < 0.7 if zero_weights else np.ones(n)).astype(np.float32)
    y = (rng.uniform(size=n) < 0.4).astype(np.float32)
    x = rng.normal(size=(n, 3)) + groups.sum(axis=1, keepdims=True)
    batch = Batch(x.astype(np.float32), y, groups.astype(np.int32), weight)
    return jnp.asarray(logits, jnp.float32), jax.tree.map(jnp.asarray, batch)


# Metrics.


@pytest.mark.parametrize("zero_weights", [False, True])
@pytest.mark.parametrize("num_groups", [(2,), (4,)])
def test_metrics_are_those_of_fairlearn(num_groups, zero_weights):
    logits, batch = draw(num_groups=num_groups, zero_weights=zero_weights)
    measured = loss_functions.measure(logits, batch, num_groups)
    rows = np.asarray(batch.weight) > 0
    y, s = np.asarray(batch.y)[rows], np.asarray(batch.groups)[rows, 0]
    z = np.asarray(logits)[rows]
    decision, p = (z > 0).astype(int), np.asarray(jax.nn.sigmoid(z))

    def soft(chosen):
        mean = lambda y_true, y_pred: np.mean(y_pred)
        frame = fairlearn.metrics.MetricFrame(
            metrics=mean, y_true=y[chosen], y_pred=p[chosen], sensitive_features=s[chosen]
        )
        return frame.difference()

    by_group = fairlearn.metrics.MetricFrame(
        metrics={"accuracy": lambda a, b: np.mean(a == b), "opportunity": fairlearn.metrics.true_positive_rate},
        y_true=y,
        y_pred=decision,
        sensitive_features=s,
    )
    expected = {
        "accuracy": np.mean(decision == y),
        "dp_gap": fairlearn.metrics.demographic_parity_difference(y, decision, sensitive_features=s),
        "eo_gap": fairlearn.metrics.equalized_odds_difference(y, decision, sensitive_features=s),
        "dp_gap_soft": soft(y >= 0),
        "eo_gap_soft": max(soft(y == 0), soft(y == 1)),
        "opportunity_gap": by_group.difference()["opportunity"],
        "worst_group_accuracy": by_group.group_min()["accuracy"],
        "calibration_error": sum(
            abs(np.sum(p[bins == b] - y[bins == b])) / len(y) for bins in [(10 * p).astype(int)] for b in range(10)
        ),
    }
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        assert float(measured[name]) == pytest.approx(value, abs=2e-6), name
    assert expected["dp_gap"] > 0.05


def test_metrics_of_several_attributes_are_the_worst():
    logits, batch = draw(num_groups=(2, 3))
    both = loss_functions.measure(logits, batch, (2, 3))
    apart = [
        loss_functions.measure(logits, batch._replace(groups=batch.groups[:, [a]]), (k,)) for a, k in enumerate((2, 3))
    ]
    for name in ("dp_gap", "dp_gap_soft", "eo_gap"):
        assert both[name] == max(m[name] for m in apart)
    assert both["worst_group_accuracy"] == min(m["worst_group_accuracy"] for m in apart)


# Losses.


def by_hand(name, logits, batch, num_groups):
    """The losses' definitions in plain loops."""
    p, y, w = (np.asarray(a, float) for a in (jax.nn.sigmoid(logits), batch.y, batch.weight))
    ce = -(y * np.log(p) + (1 - y) * np.log1p(-p))
    total = 0.0
    for a, k in enumerate(num_groups):
        s = np.asarray(batch.groups)[:, a]

        def rates(values, rows, s=s, k=k):
            return [np.mean(values[rows & (s == g)]) for g in range(k) if np.any(rows & (s == g))]

        def pairs(values, rows, power):
            means = rates(values, rows)
            differences = [abs(m - n) ** power for i, m in enumerate(means) for n in means[:i]]
            return np.mean(differences) if differences else 0.0

        on = w > 0
        if name == "demographic-parity":
            total += pairs(p, on, 2)
        elif name == "absolute-parity":
            total += pairs(p, on, 1)
        elif name == "equalized-odds":
            total += 0.5 * (pairs(p, on & (y == 0), 2) + pairs(p, on & (y == 1), 2))
        elif name == "equal-opportunity":
            total += pairs(p, on & (y == 1), 2)
        elif name == "worst-group":
            total += max(rates(ce, on))
        else:
            twice = 1 / (1 + np.exp(-p))
            total += 0.5 * (np.mean(twice[on & (s == 0)]) - np.mean(twice[on])) ** 2
    return total


@pytest.mark.parametrize("num_groups", [(2,), (4, 2)])
@pytest.mark.parametrize("name", loss_functions.LOSSES)
def test_losses_by_hand(name, num_groups):
    logits, batch = draw(60, num_groups, zero_weights=True)
    loss = loss_functions.LOSSES[name]
    value = float(loss(logits, batch, num_groups))
    assert value == pytest.approx(by_hand(name, logits, batch, num_groups), rel=2e-5)
    assert value > 1e-5
    gradient = jax.grad(loss)(logits, batch, num_groups)
    assert np.any(gradient != 0)
    np.testing.assert_array_equal(gradient[np.asarray(batch.weight) == 0], 0)
    # A step against the gradient makes it smaller.
    assert loss(logits - 0.1 * gradient / jnp.linalg.norm(gradient), batch, num_groups) < value


@pytest.mark.parametrize("name", loss_functions.LOSSES)
def test_losses_survive_absent_groups(name):
    logits, batch = draw(40, (3,))
    present = batch._replace(groups=jnp.minimum(batch.groups, 1))
    loss = loss_functions.LOSSES[name]
    with_absent, without = (jax.value_and_grad(loss)(logits, present, (k,)) for k in (3, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), with_absent, without)
    alone = batch._replace(groups=jnp.full_like(batch.groups, 2))
    value, gradient = jax.value_and_grad(loss)(logits, alone, (3,))
    assert np.all(np.isfinite(gradient))
    if name == "worst-group":
        assert value == pytest.approx(float(loss_functions.accuracy_loss(logits, batch)), rel=1e-6)
    else:
        assert value == 0.0
    nobody = batch._replace(weight=jnp.zeros(40))
    assert np.all(np.isfinite(jax.grad(loss)(logits, nobody, (3,))))


# More than two classes.


def draw_classes(k=3, n=90, num_groups=(2,)):
    _, batch = draw(n, num_groups, zero_weights=True)
    rng = np.random.default_rng(1)
    y = rng.integers(k, size=n)
    logits = rng.normal(size=(n, k)) + 0.5 * np.asarray(batch.groups).sum(axis=1, keepdims=True) * np.arange(k)
    return jnp.asarray(logits, jnp.float32), batch._replace(y=jnp.asarray(y, jnp.float32))


@pytest.mark.parametrize("num_groups", [(2,), (4, 2)])
@pytest.mark.parametrize("name", sorted(loss_functions.LOSSES.keys() - {"published-parity", "worst-group"}))
def test_losses_of_classes_are_means_of_one_against_the_rest(name, num_groups):
    logits, batch = draw_classes(num_groups=num_groups)
    value = float(loss_functions.LOSSES[name](logits, batch, num_groups))
    p = jax.nn.softmax(logits)
    of_class = [
        by_hand(name, jnp.log(p[:, c] / (1 - p[:, c])), batch._replace(y=batch.y == c), num_groups) for c in range(3)
    ]
    assert value == pytest.approx(np.mean(of_class), rel=1e-4)
    assert max(of_class) > 1.2 * min(of_class)


def test_cross_entropy_of_classes():
    logits, batch = draw_classes()
    log_p = np.asarray(logits, float) - np.log(np.exp(np.asarray(logits, float)).sum(axis=1, keepdims=True))
    losses = -log_p[np.arange(90), np.asarray(batch.y, int)]
    on = np.asarray(batch.weight) > 0
    assert float(loss_functions.accuracy_loss(logits, batch)) == pytest.approx(losses[on].mean(), rel=1e-5)
    s = np.asarray(batch.groups)[:, 0]
    worst = max(losses[on & (s == g)].mean() for g in (0, 1))
    assert float(loss_functions.worst_group_loss(logits, batch, (2,))) == pytest.approx(worst, rel=1e-5)
    # A softmax of (0, z) is a sigmoid of z.
    z, two = draw()
    pair = jnp.stack([jnp.zeros_like(z), z], axis=1)
    np.testing.assert_allclose(
        loss_functions.cross_entropies(pair, two.y), loss_functions.cross_entropies(z, two.y), rtol=2e-5
    )
    assert loss_functions.demographic_parity(pair, two, (2,)) == pytest.approx(
        float(loss_functions.demographic_parity(z, two, (2,))), rel=1e-4
    )
    with pytest.raises(ValueError, match=r"two classes, \[n\], got shape \(200, 2\)"):
        loss_functions.published_demographic_parity(pair, two, (2,))


def test_metrics_of_classes_are_those_of_fairlearn():
    logits, batch = draw_classes(4, 400)
    measured = loss_functions.measure(logits, batch, (2,))
    rows = np.asarray(batch.weight) > 0
    y, s, z = np.asarray(batch.y)[rows], np.asarray(batch.groups)[rows, 0], np.asarray(logits)[rows]
    label, p = z.argmax(axis=1), np.asarray(jax.nn.softmax(z))
    mean = lambda y_true, y_pred: np.mean(y_pred)
    frame = lambda metric, truth, values: fairlearn.metrics.MetricFrame(
        metrics=metric, y_true=truth, y_pred=values, sensitive_features=s
    ).difference()
    rest = [(y == c, label == c, p[:, c]) for c in range(4)]
    parity, odds = fairlearn.metrics.demographic_parity_difference, fairlearn.metrics.equalized_odds_difference
    assert float(measured["accuracy"]) == pytest.approx(np.mean(label == y), abs=1e-6)
    expected = {
        "dp_gap": max(parity(truth, chosen, sensitive_features=s) for truth, chosen, _ in rest),
        "eo_gap": max(odds(truth, chosen, sensitive_features=s) for truth, chosen, _ in rest),
        "dp_gap_soft": max(frame(mean, truth, soft) for truth, _, soft in rest),
        "opportunity_gap": max(frame(fairlearn.metrics.true_positive_rate, truth, chosen) for truth, chosen, _ in rest),
    }
    for name, value in expected.items():
        assert float(measured[name]) == pytest.approx(value, abs=2e-6), name


# Networks.


@pytest.mark.parametrize(
    ("position", "names"),
    [
        (1, ["fairness_0", "fairness_1", "accuracy_0", "accuracy_1"]),
        (2, ["accuracy_0", "fairness_0", "fairness_1", "accuracy_1"]),
        (3, ["accuracy_0", "accuracy_1", "fairness_0", "fairness_1"]),
    ],
)
def test_position(position, names):
    row = networks.layers((8, 1), (4, 1), position)
    assert [name for name, _ in row] == names
    params = networks.MLP(row).init(jax.random.key(0), jnp.ones((2, 3)))["params"]
    widths = [3, *(width for _, width in row)]
    assert [params[name]["kernel"].shape for name in names] == list(itertools.pairwise(widths))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (((8, 1), (4,), 0), "position must be from 1 .* to 3"),
        (((8, 1), (4,), 4), "position must be from 1 .* to 3"),
        (((8, 1), (4,), 3), r"must be 1 wide, got widths \[8, 1, 4\]"),
        (((8, 0), (4,), 2), "all of them at least 1"),
        (((8, 1), (), 2), "at least one width each"),
        (((8, 1), (4,), 2, 3), r"must be 3 wide, got widths \[8, 4, 1\]"),
        (((8, 1), (5,), 2, 2, "fairness_0"), "even width.*one of accuracy_0, got 'fairness_0'"),
        (((8, 2), (4,), 2, 2, "accuracy_1"), "must be 1 wide"),
        (((8, 1), (4,), 2, 2, "accuracy_1"), "one of accuracy_0, fairness_0, got 'accuracy_1'"),
    ],
)
def test_bad_layers(args, message):
    with pytest.raises(ValueError, match=message):
        networks.layers(*args)


def test_networks_and_their_parts():
    row = networks.layers((6, 1), (5,), 2)
    rng = np.random.default_rng(0)
    edges = rng.integers(7, size=(12, 2))
    graph = Graph(jnp.asarray(rng.normal(size=(7, 3)), jnp.float32), jnp.asarray(nba.normalised(edges, 7)))
    inputs = {networks.MLP: jnp.ones((4, 3)), networks.CNN: jnp.ones((4, 8, 8, 2)), networks.GCN: graph}
    for kind, x in inputs.items():
        network = networks.network(x, row)
        assert isinstance(network, kind)
        params = network.init(jax.random.key(0), x)
        assert network.apply(params, x).shape == (7 if kind is networks.GCN else 4,)
        _, follower, _ = fb.partition(params, networks.is_followers)
        assert [leaf.shape[-1] for leaf in jax.tree.leaves(follower)] == [5, 5]
    # A graph's nodes in another order: the same logits in that order. Neighbours matter, strangers do not.
    logits = network.apply(params, graph)
    order = rng.permutation(7)
    shuffled = Graph(graph.features[order], graph.adjacency[order][:, order])
    np.testing.assert_allclose(network.apply(params, shuffled), logits[order], rtol=1e-4, atol=1e-6)
    lonely = Graph(graph.features, jnp.eye(7))
    assert not np.allclose(network.apply(params, lonely), logits, atol=1e-4)


def test_attention_over_columns():
    row = networks.layers((6, 3), (4,), 2, 3, "fairness_0")
    assert row == (("accuracy_0", 6), ("fairness_0_attention", 4), ("accuracy_1", 3))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32)
    network = networks.network(x, row)
    params = network.init(jax.random.key(0), x)
    _, follower, _ = fb.partition(params, networks.is_followers)
    assert len(jax.tree.leaves(follower)) == 2 + 4 * 2  # u, v; kernel and bias of query, key, value, output
    # By hand, the columns being the six units of the first layer.
    p = jax.tree.map(lambda leaf: np.asarray(leaf, float), params["params"])
    hidden = np.maximum(np.asarray(x) @ p["accuracy_0"]["kernel"] + p["accuracy_0"]["bias"], 0)
    block = p["fairness_0_attention"]
    tokens = hidden[:, :, None] * block["scales"] + block["offsets"]
    heads = block["MultiHeadDotProductAttention_0"]
    q, k, v = (
        np.einsum("ntw,whe->nthe", tokens, heads[name]["kernel"]) + heads[name]["bias"]
        for name in ("query", "key", "value")
    )
    scores = np.exp(np.einsum("nthe,nshe->nhts", q, k) / np.sqrt(2))
    mixed = np.einsum("nhts,nshe->nthe", scores / scores.sum(axis=-1, keepdims=True), v)
    out = np.einsum("nthe,hew->ntw", mixed, heads["out"]["kernel"]) + heads["out"]["bias"]
    expected = np.maximum(out.mean(axis=1), 0) @ p["accuracy_1"]["kernel"] + p["accuracy_1"]["bias"]
    np.testing.assert_allclose(network.apply(params, x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"columns of features \[n, d\], got inputs \(4, 8, 8, 2\)"):
        networks.network(jnp.ones((4, 8, 8, 2)), row)


# Updates.

RATES = Hyper(eta=3.0, leader_rate=0.1, follower_rate=0.2)


def recorder(rate):
    """Gradient descent that keeps the gradient it got."""
    init = lambda params: jax.tree.map(jnp.zeros_like, params)
    update = lambda grads, state, params=None: (jax.tree.map(lambda g: -rate * g, grads), grads)
    return optax.GradientTransformation(init, update)


def play_solver(method, setting):
    """The solver of `play`."""
    _, batch = draw(30)
    logits = networks.logits_of(networks.layers(*setting[:3]), batch.x)
    unfair = lambda z, batch: loss_functions.demographic_parity(z, batch, (2,))
    return methods.METHODS[method].build(Game(logits, unfair, RATES, setting, recorder(0.1), recorder(0.2)))


def play(method, hyper=RATES, setting=SMALL, steps=1, rates=(0.1, 0.2)):
    """(accuracy loss and unfairness of two parts, the parts at the start, the state after the steps)."""
    _, batch = draw(30)
    dtype = jnp.result_type(float)
    batch = batch._replace(x=batch.x.astype(dtype), y=batch.y.astype(dtype), weight=batch.weight.astype(dtype))
    network = networks.network(batch.x, networks.layers(*setting[:3]))
    params = jax.tree.map(lambda p: 3.0 * p, network.init(jax.random.key(0), batch.x))  # else the gap is tiny
    leader, follower, merge = fb.partition(params, networks.is_followers)
    logits = lambda omega, theta, x: network.apply(merge(omega, theta), x)
    unfair = lambda z, batch: loss_functions.demographic_parity(z, batch, (2,))
    game = Game(logits, unfair, hyper, setting, *(recorder(rate) for rate in rates))
    solver = methods.METHODS[method].build(game)
    state = solver.init(jax.random.key(1), leader, None, follower)
    for _ in range(steps):
        state, metrics = jax.jit(solver.step)(state, batch, batch)
    accuracy = lambda omega, theta: loss_functions.accuracy_loss(logits(omega, theta, batch.x), batch)
    unfairness = lambda omega, theta: unfair(logits(omega, theta, batch.x), batch)
    assert np.isfinite(metrics["outer_objective"]) or np.inf in hyper
    return accuracy, unfairness, leader, follower, state


def assert_close(a, b, rtol=1e-4):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


def moved(params, gradient, rate):
    return jax.tree.map(lambda p, g: p - rate * g, params, gradient)


def test_sequential_and_simultaneous_update():
    for update in ("sequential", "simultaneous"):
        accuracy, unfairness, omega, theta, state = play("alternating", setting=SMALL._replace(update=update))
        g_theta = jax.tree.map(lambda g: 3.0 * g, jax.grad(unfairness, argnums=1)(omega, theta))
        assert_close(state.inner_opt_state, g_theta)
        assert_close(state.inner_params, moved(theta, g_theta, 0.2))
        seen = moved(theta, g_theta, 0.2) if update == "sequential" else theta
        assert_close(state.outer_opt_state, jax.grad(accuracy)(omega, seen))
        assert_close(state.outer_params, moved(omega, state.outer_opt_state, 0.1))


@pytest.mark.parametrize("update", ["sequential", "simultaneous"])
def test_alternating_does_not_leak(update):
    """With a follower that stays where it is, the leader's gradient does not know eta; the leaky one does."""
    still = {"setting": SMALL._replace(update=update), "rates": (0.1, 0.0)}
    results = [play("alternating", RATES._replace(eta=eta), **still)[-1] for eta in (1.0, 1e5)]
    jax.tree.map(np.testing.assert_array_equal, *(state.outer_opt_state for state in results))
    assert not np.allclose(*(jax.tree.leaves(state.inner_opt_state)[0] for state in results))


def test_leaky_alternating_adds_the_followers_gradient():
    accuracy, unfairness, omega, theta, state = play("leaky-alternating")
    theta_after = moved(theta, jax.tree.map(lambda g: 3 * g, jax.grad(unfairness, argnums=1)(omega, theta)), 0.2)
    assert_close(state.inner_params, theta_after)
    leak = jax.grad(unfairness)(omega, theta)
    expected = jax.tree.map(lambda g, leak: g + 3 * leak, jax.grad(accuracy)(omega, theta_after), leak)
    assert_close(state.outer_opt_state, expected)
    assert max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(leak)) > 1e-3
    # In the second step the follower's parameters before its step are those after the first.
    second = play("leaky-alternating", steps=2)[-1]
    leak = jax.grad(unfairness)(state.outer_params, state.inner_params)
    g = jax.grad(accuracy)(state.outer_params, second.inner_params)
    assert_close(second.outer_opt_state, jax.tree.map(lambda g, leak: g + 3 * leak, g, leak))


@pytest.mark.parametrize("method", ["lagrangian", "single-objective", "frozen-follower", "alternating"])
def test_simultaneous_steps_keep_nan_out(method):
    setting = SMALL._replace(update="simultaneous")
    *_, state = play(method, setting=setting)
    _, batch = draw(30)
    solver, batch = play_solver(method, setting), jax.tree.map(jnp.asarray, batch)
    step = jax.jit(solver.step)
    broken, metrics = step(state, batch, batch._replace(x=batch.x.at[3, 1].set(jnp.nan)))
    flags = ("inner_finite", "adjoint_finite", "outer_finite")
    assert [bool(metrics[flag]) for flag in flags] == [False, True, False]
    assert int(broken.step) == int(state.step) + 1
    kept = ("outer_params", "inner_params", "outer_opt_state", "inner_opt_state")
    for name in kept:
        jax.tree.map(np.testing.assert_array_equal, getattr(broken, name), getattr(state, name))
    after, metrics = step(broken, batch, batch)
    assert all(metrics[flag] for flag in flags)
    assert not np.allclose(jax.tree.leaves(after.outer_params)[0], jax.tree.leaves(state.outer_params)[0])


@pytest.mark.parametrize("update", ["sequential", "simultaneous"])
def test_a_level_that_breaks_alone_does_not_hold_up_the_level_below(update):
    setting = SMALL._replace(update=update)
    *_, omega, theta, state = play("alternating", RATES._replace(leader_fairness=np.inf), setting)
    jax.tree.map(np.testing.assert_array_equal, state.outer_params, omega)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.inner_params))
    assert not np.allclose(jax.tree.leaves(state.inner_params)[0], jax.tree.leaves(theta)[0])
    # The other way round the leader waits: its gradient may be fine, but it comes after a follower that is not.
    *_, omega, theta, state = play("alternating", RATES._replace(follower_accuracy=np.inf), setting)
    jax.tree.map(np.testing.assert_array_equal, (state.outer_params, state.inner_params), (omega, theta))


# Several followers.

TWO = Setting((5, 1), (4, 3), 2, followers="together", losses=(loss_functions.Loss("demographic-parity"),) * 2)


def play_followers(setting, scale=1.0, steps=1, optimizer=None):
    """As `play`, of a follower with parity and one with `scale` times equalized odds."""
    _, batch = draw(30)
    network = networks.network(batch.x, setting.row)
    params = jax.tree.map(lambda p: 2.0 * p, network.init(jax.random.key(0), batch.x))
    leader, follower, merge = fb.partition(params, networks.is_followers)
    logits = lambda omega, theta, x: network.apply(merge(omega, theta), x)
    losses = (
        lambda z, batch: loss_functions.demographic_parity(z, batch, (2,)),
        lambda z, batch: scale * loss_functions.equalized_odds(z, batch, (2,)),
    )
    if optimizer is None:
        optimizer = train.of_followers(optax.sgd(0.2), setting)
    hyper = Hyper(eta=30.0, follower_accuracy=0.5)
    game = Game(logits, loss_functions.sum_of(losses), hyper, setting, optax.sgd(0.1), optimizer, losses)
    solver = methods.METHODS["alternating"].build(game)
    state = solver.init(jax.random.key(1), leader, None, follower)
    for _ in range(steps):
        state, metrics = jax.jit(solver.step)(state, batch, batch)
    assert metrics["inner_finite"]
    accuracy = lambda omega, theta: loss_functions.accuracy_loss(logits(omega, theta, batch.x), batch)
    objectives = [
        lambda omega, theta, j=j: 30.0 * losses[j](logits(omega, theta, batch.x), batch) + 0.5 * accuracy(omega, theta)
        for j in (0, 1)
    ]
    return accuracy, objectives, leader, follower, state


@pytest.mark.parametrize("order", ["together", "round-robin"])
def test_each_follower_descends_its_own_loss_in_its_own_layers(order):
    setting = TWO._replace(followers=order, inner_steps=2)
    accuracy, objectives, omega, theta, state = play_followers(setting, steps=2)

    def step(theta, seen, j):
        """theta with follower j's layers moved by its gradient at `seen`."""
        gradient = jax.grad(objectives[j], argnums=1)(omega, seen)["params"]
        layer = f"fairness_{j}"
        return {"params": theta["params"] | {layer: moved(seen["params"][layer], gradient[layer], 0.2)}}

    for _ in range(2):
        for _ in range(2):
            first = step(theta, theta, 0)
            theta = step(first, theta if order == "together" else first, 1)
        omega = moved(omega, jax.grad(accuracy)(omega, theta), 0.1)
    assert_close((state.outer_params, state.inner_params), (omega, theta))


@pytest.mark.parametrize("order", ["together", "round-robin"])
def test_no_follower_reaches_the_layers_of_others(order):
    """The second follower's loss grows a million times, and it stays where it is: nobody else moves otherwise."""
    setting = TWO._replace(followers=order)
    turns = lambda j, rate: optax.transforms.conditionally_mask(optax.sgd(rate), lambda step: step % 2 == j)
    each = turns if order == "round-robin" else lambda j, rate: optax.sgd(rate)
    optimizer = optax.partition({0: each(0, 0.2), 1: each(1, 0.0)}, lambda theta: networks.followers_of(theta, 2))
    results = [play_followers(setting, scale, optimizer=optimizer)[-2:] for scale in (1.0, 1e6)]
    for name in ("outer_params", "inner_params"):
        jax.tree.map(np.testing.assert_array_equal, *(getattr(state, name) for _, state in results))
    start, after = results[0][0]["params"], results[0][1].inner_params["params"]
    assert not np.allclose(after["fairness_0"]["kernel"], start["fairness_0"]["kernel"], atol=1e-4)
    np.testing.assert_array_equal(after["fairness_1"]["kernel"], start["fairness_1"]["kernel"])


def test_one_follower_has_the_sum_of_the_losses():
    logits, batch = draw(60, (2, 3))
    losses = (loss_functions.Loss("demographic-parity", 1), loss_functions.Loss("equalized-odds"))
    value = loss_functions.sum_of(loss_functions.losses_of(losses, (2, 3)))(logits, batch)
    by_race = by_hand("demographic-parity", logits, batch._replace(groups=batch.groups[:, [1]]), (3,))
    assert float(value) == pytest.approx(by_race + by_hand("equalized-odds", logits, batch, (2, 3)), rel=1e-5)


def test_the_last_follower_has_the_remaining_layers():
    theta = {"params": {f"fairness_{i}": {"kernel": jnp.ones(1)} for i in range(3)}}
    assert jax.tree.leaves(networks.followers_of(theta, 2)) == [0, 1, 1]
    assert jax.tree.leaves(networks.followers_of(theta, 3)) == [0, 1, 2]


def test_lagrangian_is_gradient_descent_on_one_objective():
    accuracy, unfairness, omega, theta, state = play("lagrangian", steps=3)
    for _ in range(3):
        objective = lambda parts: accuracy(*parts) + 3.0 * unfairness(*parts)
        omega, theta = moved((omega, theta), jax.grad(objective)((omega, theta)), 0.1)
    assert_close((state.outer_params, state.inner_params), (omega, theta))


def test_controls():
    accuracy, unfairness, omega, theta, state = play("frozen-follower")
    jax.tree.map(np.testing.assert_array_equal, state.inner_params, theta)
    assert_close(state.outer_opt_state, jax.grad(lambda o: accuracy(o, theta) + 3.0 * unfairness(o, theta))(omega))
    single = [play("single-objective", RATES._replace(eta=eta))[-1] for eta in (0.0, 1e5)]
    jax.tree.map(np.testing.assert_array_equal, *(state.outer_params for state in single))
    assert_close(single[0].outer_opt_state, jax.grad(accuracy)(omega, theta))


def test_implicit_and_unrolled_see_the_followers_response(x64):
    """Follower: the output layer, trained to its optimum; both hypergradients are the total derivative."""
    setting = SMALL._replace(
        accuracy_widths=(4,), fairness_widths=(1,), position=2, inner_steps=3000, solver_steps=20, damping=0.0
    )
    hyper = RATES._replace(follower_accuracy=1.0)
    gradients = {}
    for method in ("aid-cg", "itd", "alternating", "penalty-value"):
        of = setting._replace(penalty=300.0)
        gradients[method] = play(method, hyper, of, rates=(0.1, 1.0))[-1].outer_opt_state
    flat = {name: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for name, g in gradients.items()}
    scale = np.linalg.norm(flat["itd"])
    assert np.linalg.norm(flat["aid-cg"] - flat["itd"]) < 0.02 * scale
    assert np.linalg.norm(flat["penalty-value"] - flat["itd"]) < 0.1 * scale
    assert np.linalg.norm(flat["alternating"] - flat["itd"]) > 0.2 * scale


def test_simultaneous_shares_the_forward_pass():
    _, batch = draw(30)

    def products(method, update):
        compiled = train.program(method, SMALL._replace(update=update, batch_size=None), (2,))
        hyper, keys = jax.tree.map(lambda x: jnp.array([x]), RATES), jax.random.split(jax.random.key(0), 1)
        states = compiled.init(keys, hyper, batch)
        text = compiled.epochs.lower(states, hyper, keys, batch, 0, 1).as_text()
        return text.count("stablehlo.dot_general")

    # Three layers: forward 3, to the leader's weights 2 and through layers 2; to the follower's weights 1 more and
    # through a layer 1 more, which the Lagrangian's backward pass has already. The loss makes the same number for all.
    lagrangian, both = products("lagrangian", "sequential"), products("alternating", "simultaneous")
    assert lagrangian < both < products("alternating", "sequential")
    assert products("single-objective", "sequential") == lagrangian


# Sweeps.


@pytest.fixture(scope="module")
def data():
    return synthetic.load(n=160)


def test_cells_of_a_sweep_are_the_runs_by_themselves(data):
    method = "alternating"
    hypers = [Hyper(1.0, 0.01, 0.01), Hyper(20.0, 0.003, 0.02)]
    pairs = list(itertools.product(hypers, (3, 4)))
    together = train.sweep(method, SMALL, data, pairs, 3, chunk=2)
    assert [(cell.hyper, cell.seed) for cell in together.cells] == pairs
    assert train.program(method, SMALL, (2,)).epochs._cache_size() == 1  # two chunks of different length
    cell = together.cells[3]
    (alone,) = train.sweep(method, SMALL, data, [(cell.hyper, cell.seed)], 3, chunk=3).cells
    assert alone.metrics.keys() == cell.metrics.keys()
    assert all(cell.metrics[k] == pytest.approx(v, rel=2e-3, abs=2e-3) for k, v in alone.metrics.items())
    objectives = [cell.metrics["outer_objective"] for cell in together.cells]
    assert len(set(objectives)) == 4
    assert together.cells[0].curves["epoch"] == [2.0, 3.0]
    # What it returns is what it has measured.
    omega, theta = jax.tree.map(lambda p: p[3], together.parts)
    logits = networks.logits_of(SMALL.row, data.test.x)(omega, theta, data.test.x)
    assert cell.metrics["accuracy"] == pytest.approx(float(np.mean((logits > 0) == data.test.y)), abs=1e-6)


def test_training_learns_and_eta_narrows_the_gap(data):
    setting = SMALL._replace(batch_size=None)
    cells = train.sweep(
        "lagrangian", setting, data, [(Hyper(eta, 0.02), seed) for eta in (0.0, 100.0) for seed in (0, 1)], 60
    ).cells
    plain, fair = ([cell.metrics for cell in cells if cell.hyper.eta == eta] for eta in (0.0, 100.0))
    mean = lambda group, name: np.mean([metrics[name] for metrics in group])
    assert mean(plain, "outer_objective") < 0.6
    assert mean(fair, "train_unfairness") < 0.1 * mean(plain, "train_unfairness")


def test_separate_inner_batch_and_decay(data):
    setting = SMALL._replace(inner_batch_size=30, leader_decay=0.5, follower_decay=0.0, decay_epochs=1, inner_steps=2)
    (cell,) = train.sweep("alternating", setting, data, [(Hyper(1.0, 0.01, 0.01), 0)], 3, chunk=1).cells
    assert cell.metrics["inner_finite"] == 1.0
    # Four steps make an epoch; after it the follower's rate is zero and the leader's halved, so it goes on alone.
    longer = train.sweep("alternating", setting, data, [(Hyper(1.0, 0.01, 0.01), 0)], 1, chunk=1).cells[0]
    assert cell.curves["outer_objective"][0] == pytest.approx(longer.metrics["outer_objective"])


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("leaky", SMALL, "method must be one of single-objective, lagrangian,.*got 'leaky'"),
        ("itd", SMALL._replace(loss="parity"), "loss must be one of demographic-parity,.*got 'parity'"),
        ("itd", SMALL._replace(update="both"), "update must be 'sequential' or 'simultaneous', got 'both'"),
        ("itd", SMALL._replace(position=9), "position must be from 1"),
        ("alternating", TWO._replace(followers="both"), "followers must be one of one, together, round-robin, got"),
        ("aid-cg", TWO, "followers: together is for method alternating with the sequential update, got aid-cg"),
        ("alternating", TWO._replace(update="simultaneous"), "got alternating with the simultaneous one"),
        ("alternating", TWO._replace(losses=()), "a fairness layer for each of them, got 0 losses"),
        ("alternating", TWO._replace(fairness_widths=(4,)), r"got 2 losses and fairness_widths \(4,\)"),
        ("alternating", TWO._replace(losses=(loss_functions.Loss("odds"),) * 2), "loss must be one of.*got 'odds'"),
        ("itd", SMALL._replace(num_classes=3, loss="published-parity"), "published-parity is defined for two classes"),
    ],
)
def test_bad_setting(method, setting, message):
    with pytest.raises(ValueError, match=message):
        train.program(method, setting, (2,))


# Fronts.


def test_front_and_hypervolume():
    points = np.array([[0.8, 0.5], [0.7, 0.9], [0.6, 0.9], [0.8, 0.4], [0.7, 0.9]])
    assert statistics.pareto_front(points).tolist() == [True, True, False, False, True]
    assert statistics.hypervolume(points) == pytest.approx(0.8 * 0.5 + 0.7 * 0.4)
    assert statistics.hypervolume(points, (0.5, 0.45)) == pytest.approx(0.3 * 0.05 + 0.2 * 0.4)
    assert statistics.hypervolume(points, (0.9, 0.0)) == 0.0
    rng = np.random.default_rng(0)
    many, probes = rng.uniform(size=(20, 2)), rng.uniform(size=(200_000, 2))
    dominated = (probes[:, None] <= many).all(axis=2).any(axis=1)
    assert statistics.hypervolume(many) == pytest.approx(dominated.mean(), abs=5e-3)
    assert statistics.hypervolume(many[statistics.pareto_front(many)]) == pytest.approx(statistics.hypervolume(many))


def test_the_front_is_selected_on_validation():
    cell = lambda a, g, va, vg: {"accuracy": a, "dp_gap": g, "validation_accuracy": va, "validation_dp_gap": vg}
    # The third looks best on test, but not on validation; the fourth broke.
    cells = [cell(0.8, 0.2, 0.8, 0.2), cell(0.7, 0.1, 0.7, 0.1), cell(0.9, 0.0, 0.6, 0.3), cell(*4 * [np.nan])]
    assert summary.selected_hypervolume(cells) == pytest.approx(0.8 * 0.8 + 0.7 * 0.1)


# Commands.


def test_run(tmp_path, capsys):
    directory = tmp_path / "run"
    few = ["--num-epochs", "3", "--accuracy-widths", "6", "1", "--fairness-widths", "5", "--batch-size", "500"]
    few += ["--position", "2", "--method", "alternating"]
    cli.main(["run", "fairness", "--output-dir", str(directory), "--seed", "2", *few])
    output = capsys.readouterr()
    table = output.out.split(str(directory))[1]
    assert max(map(len, table.splitlines())) <= 80
    for word in ("4000 training, 2000 validation, 2000 test", "6 5* 1", "alternating", "parity gap", "accuracy alone"):
        assert word in table
    assert "alternating       3 outer steps, accuracy 0." in output.err
    names = ["config.json", "fairness.png", "runs-curves.jsonl", "runs.jsonl"]
    assert sorted(path.name for path in directory.glob("[!.]*")) == names
    record, alone = store.read(directory / "runs.jsonl")
    assert (alone["method"], alone["settings"]["eta"]) == ("single-objective", 0.0)
    line = next(line for line in table.splitlines() if line.startswith("accuracy "))
    assert line.split()[1:] == [f"{one['metrics']['accuracy']:.3f}" for one in (record, alone)]
    of = store.Store(directory, "fairness")
    assert store.beside(of, "curves")[store.key_of(alone)]["epoch"] == [2.0, 3.0]
    assert record["task"] == "fairness"
    assert record["method"] == "alternating"
    assert record["settings"]["dataset"] == "synthetic"
    assert {"accuracy", "dp_gap", "dp_gap_soft", "eo_gap"} <= record["metrics"].keys()
    assert f"{record['metrics']['accuracy']:.3f}" in table


def test_run_of_two_followers_on_three_classes_with_attention(tmp_path, capsys):
    args = ["--num-classes", "3", "--losses", "demographic-parity", "equalized-odds", "--followers", "round-robin"]
    args += ["--accuracy-widths", "6", "--fairness-widths", "4", "1", "--position", "2", "--attention", "fairness_0"]
    args += ["--num-epochs", "2", "--batch-size", "500", "--method", "alternating", "--inner-steps", "1"]
    cli.main(["run", "fairness", "--output-dir", str(tmp_path / "run"), *args])
    table = capsys.readouterr().out
    for text in ("6 4a* 3**", "followers round-robin", "demographic-parity + equalized-odds"):
        assert text in table
    record, _ = store.read(tmp_path / "run" / "runs.jsonl")
    settings = record["settings"]
    assert settings["losses"] == [["demographic-parity", None], ["equalized-odds", None]]
    assert (settings["followers"], settings["attention"], settings["num_classes"]) == ("round-robin", "fairness_0", 3)
    assert settings["fairness_widths"] == [4, 3]
    assert record["metrics"]["inner_finite"] == 1.0
    assert 0.3 < record["metrics"]["majority"] < 0.4


PLANS = [runs.Plan("lagrangian", "lagrangian", Setting(), Hyper())]


def test_the_seed_decides_the_data():
    """The data of every kind, but the division of Adult and Heritage Health, which has an option of its own."""
    first, again, other = (runs.Source().load(seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.test.x, again.test.x)
    assert not np.array_equal(first.test.x, other.test.x)
    drawn = [run for seed in (0, 1) for run in runs.runs(runs.Source(), PLANS, 1, [seed])]
    assert len({runs.one_program(runs.Source(), run) for run in drawn}) == 2
    assert len({runs.one_program(runs.Source("adult"), run) for run in drawn}) == 1


@pytest.mark.parametrize("division", [0, 3])
def test_the_division_of_adult(monkeypatch, division):
    monkeypatch.setattr(
        runs.adult, "load", lambda path, attributes, seed, label, use_attributes: (seed, use_attributes)
    )
    source = fairness.CompareFairness(division=division, attributes=("sex", "race")).source
    assert [source.load(seed) for seed in (0, 7)] == [(division, True)] * 2
    redivided = fairness.CompareFairness(division=division, redivide=True, attribute="removed").source
    assert [redivided.load(seed) for seed in (0, 7)] == [(division, False), (division + 7, False)]
    assert redivided.by_seed
    assert runs.settings_of(redivided, Setting(), Hyper(), 1)["attribute"] == "removed"
    settings = runs.settings_of(source, Setting(), Hyper(), 1)
    assert settings.get("division", 0) == division
    assert settings["attributes"] == ["sex", "race"]


COMMITTED = sorted(path.name for path in (ROOT / "benchmarks/results").glob("fairness*"))
OUTSIDE = {"redivide": True, "seed": 20, "seeds": 10, "num_epochs": 20}
RUN_OUTSIDE = tuple(name for name in outside.OUTSIDE if name != "exponentiated-gradient-boosting")
MADE_BY = {
    "fairness": {
        "seed": 10,
        "methods": ("single-objective", "lagrangian", "aid-cg", "alternating", "leaky-alternating", "itd"),
    },
    "fairness-nba": {
        "dataset": "nba",
        "protocol": "graph",
        "methods": ("single-objective", "lagrangian", "alternating", "aid-cg"),
    },
    "fairness-outside": {**OUTSIDE, "trials": 4, "methods": ("single-objective", *RUN_OUTSIDE)},
    "fairness-outside-removed": {
        **OUTSIDE,
        "attribute": "removed",
        "trials": 8,
        "methods": ("single-objective", "lagrangian", "aid-cg", "logistic", "boosting", "exponentiated-gradient"),
    },
    "fairness-published": {"protocol": "published", "seeds": 3},
    "fairness-article": {"protocol": "article", "methods": ("single-objective", "leaky-alternating", "alternating")},
    "fairness-two-followers": {"protocol": "followers"},
    "fairness-two-followers-race": {
        "protocol": "followers",
        "attributes": ("sex", "race"),
        "losses": ("demographic-parity@sex", "demographic-parity@race"),
    },
}


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_results_are_known(name):
    """The command that made them finds nothing to do: settings that came later are left out at their defaults."""
    options = fairness.CompareFairness(**MADE_BY[name])
    options.check()
    committed = ROOT / "benchmarks/results" / name
    assert store.plain(options.settings() | {"task": "fairness"}) == json.loads((committed / "config.json").read_text())
    of = store.Store(committed, "fairness")
    assert store.missing(of, [*options.network_runs, *options.outside_runs]) == []
    assert len(store.records(of)) == len(options.network_runs) + len(options.outside_runs)
    assert len(store.beside(of, "curves")) == len(options.network_runs)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "fairness", "--losses", "parity"], "--losses must be among demographic-parity.*got 'parity'"),
        (["run", "fairness", "--losses", "equalized-odds@race"], r"one of the --attributes of adult, here \(none\)"),
        (["run", "fairness", "--num-classes", "1"], "--num-classes must be from 2 to 128.*got 1"),
        (["run", "fairness", "--label", "education"], "--label is that of adult, got education"),
        (["run", "fairness", "--attention", "accuracy_2"], "--attention must name.*accuracy_0, accuracy_1, got"),
        (["run", "fairness", "--followers", "together"], "--followers: together is for method alternating.*got aid-cg"),
        (["run", "fairness", "--method", "fair"], "--method must be among single-objective.*got fair"),
        (["run", "fairness", "--loss", "parity"], "--loss must be one of demographic-parity"),
        (["run", "fairness", "--num-epochs", "0"], "--num-epochs must be at least 1, got 0"),
        (["run", "fairness", "--position", "5"], "--position must be from 1"),
        (
            ["run", "fairness", "--accuracy-widths", "0"],
            "--accuracy-widths and --fairness-widths must hold at least one",
        ),
        (["run", "fairness", "--eta", "-1"], "--eta must be at least 0, got -1.0"),
        (["run", "fairness", "--division", "1"], "--division is that of adult and health, got 1"),
        (["run", "fairness", "--data", "."], "--data is for adult, health and nba, got it with --dataset synthetic"),
        (["run", "fairness", "--data", "/nowhere"], "--data: there is no /nowhere"),
        (["run", "fairness", "--attributes", "race"], "--attributes are those of adult"),
        (["compare", "fairness", "--methods", "dfiv"], "--methods must be among single-objective.*got dfiv"),
        (
            ["compare", "fairness", "--methods", "aid-neumann"],
            "--methods must be among single.*in protocol pareto, got",
        ),
        (
            ["compare", "fairness", "--followers", "together", "--methods", "lagrangian"],
            "--followers: no method is left with together",
        ),
        (["compare", "fairness", "--trials", "0"], "--trials must be at least 1, got 0"),
        (["compare", "fairness", "--dataset", "synthetic", "--redivide"], "--redivide is for adult and health, got it"),
        (
            ["compare", "fairness", "--attribute", "removed", "--methods", "thresholds", "threshold-optimizer"],
            "thresholds, threshold-optimizer need the attribute when they decide; pass --attribute used",
        ),
        (
            ["compare", "fairness", "--protocol", "article", "--methods", "boosting"],
            "in protocol article, got boosting",
        ),
        (["compare", "fairness", "--seeds", "0"], "--seeds must be at least 1"),
    ],
)
def test_bad_options(tmp_path, args, message):
    with pytest.raises(SystemExit, match=message):
        cli.main([*args, "--output-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.fixture
def drawn(monkeypatch):
    """Training that only draws what it would measure, by method, setting and seed."""

    def sweep(method, setting, dataset, cells, num_epochs, *, chunk, callback):
        callback(None, {name: np.full(num_epochs, 0.5) for name in ("outer_objective", "accuracy", "dp_gap")})
        names = ("accuracy", "dp_gap", "dp_gap_soft", "eo_gap")
        done = []
        for hyper, seed in cells:
            rng = np.random.default_rng(zlib.crc32(repr((method, setting, hyper, seed)).encode()))
            values = dict(zip([*names, *(f"validation_{name}" for name in names)], rng.uniform(size=8), strict=True))
            done.append(train.Cell(hyper, seed, values, {name: [0.0] for name in train.CURVES}))
        return train.Outcome(done, 1.0, 0.1)

    monkeypatch.setattr(runs, "sweep", sweep)


def test_compare(tmp_path, capsys, monkeypatch, drawn):
    variants = (
        protocols.Variant("single-objective"),
        protocols.Variant("lagrangian", {}, ({"leader_rate": 0.01}, {"leader_rate": 0.003})),
        protocols.Variant("alternating", {"update": "simultaneous"}),
    )
    protocol = protocols.Protocol(SMALL._replace(batch_size=400), variants, (1.0, 30.0), 2)
    monkeypatch.setitem(protocols.PROTOCOLS, "pareto", protocol)
    directory = tmp_path / "runs"
    args = ["compare", "fairness", "--dataset", "synthetic", "--output-dir", str(directory), "--no-costs"]
    cli.main([*args, "--seeds", "2", "--methods", "lagrangian"])
    assert len(list(store.read(directory / "runs.jsonl"))) == 8
    capsys.readouterr()
    cli.main([*args, "--seeds", "2", "--methods", *(variant.method for variant in variants)])
    output = capsys.readouterr()
    assert "lagrangian" not in output.err  # its runs are there
    records = list(store.read(directory / "runs.jsonl"))
    assert len(records) == 8 + 2 + 4
    lines = (directory / "table.md").read_text().splitlines()
    labels = [line.split("|")[1].strip() for line in lines[2:]]
    assert labels == ["single-objective", "lagrangian", "alternating, simultaneous"]
    assert [len(line.split("|")) for line in lines] == 5 * [14]
    assert lines[3].split("|")[8].strip() == "4"  # trials
    assert max(map(len, output.out.split("Means over")[0].splitlines()[1:])) <= 90
    assert (directory / "fairness.png").stat().st_size > 20_000
    # The table's difference, from the records.
    of = lambda method, seed: [r["metrics"] for r in records if r["method"] == method and r["seed"] == seed]
    volume = lambda method, seed: summary.selected_hypervolume(of(method, seed))
    difference = np.mean([volume("single-objective", s) - volume("lagrangian", s) for s in (0, 1)])
    assert lines[2].split("|")[10].strip().startswith(f"{difference:+.4f}")


# Methods from outside.


def brute_force(scores, y, groups, tolerance):
    """The most right decisions of two group thresholds whose rates differ by at most the tolerance."""
    best = -1
    for pair in itertools.product(np.append(np.unique(scores), np.inf), repeat=2):
        decision = scores >= np.array(pair)[groups]
        if abs(decision[groups == 0].mean() - decision[groups == 1].mean()) <= tolerance + 1e-9:
            best = max(best, int(np.sum(decision == (y == 1))))
    return best


@pytest.mark.parametrize("tolerance", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("decimals", [1, 6])
def test_group_thresholds_are_the_best(tolerance, decimals):
    """Up to the slack of one row; with one decimal many scores are equal."""
    rng = np.random.default_rng(decimals)
    groups = rng.integers(2, size=40)
    y = (rng.uniform(size=40) < 0.3 + 0.3 * groups).astype(int)
    scores = np.round(rng.normal(size=40) + y + 0.5 * groups, decimals)
    thresholds = outside.group_thresholds(scores, y, groups, 3, tolerance)
    assert thresholds[2] == 0  # nobody is there
    decision = scores >= thresholds[groups]
    slack = 1 / min(np.bincount(groups))
    assert abs(decision[groups == 0].mean() - decision[groups == 1].mean()) <= tolerance + slack + 1e-9
    right = np.sum(decision == (y == 1))
    assert brute_force(scores, y, groups, tolerance) <= right <= brute_force(scores, y, groups, tolerance + slack)


@pytest.fixture(scope="module")
def few():
    return synthetic.load(n=600, seed=1)


def case_of(dataset, logits=None):
    parts = [outside.rows_of(part, dataset.num_groups) for part in dataset[1:4]]
    model = outside.estimator("logistic", 0).fit(parts[0].x, parts[0].y)
    scores = tuple(model.decision_function(part.x) for part in parts[1:])
    return outside.Case(*parts, 2, 0, lambda base: model, lambda base: logits or scores)


def test_methods_from_outside_narrow_the_gap(few):
    case = case_of(few)
    found = {
        name: [outside.measured(outside.OUTSIDE[name].build(case, tolerance), few) for tolerance in (0.0, 0.5)]
        for name in ("logistic", "logistic-thresholds", "threshold-optimizer", "exponentiated-gradient")
    }
    plain = found.pop("logistic")[0]
    decided = np.asarray(case.model("logistic").predict(case.test.x))
    assert plain["accuracy"] == pytest.approx(np.mean(decided == case.test.y), abs=1e-6)
    gap = fairlearn.metrics.demographic_parity_difference(case.test.y, decided, sensitive_features=case.test.groups)
    assert plain["dp_gap"] == pytest.approx(gap, abs=1e-6)
    assert plain["dp_gap"] > 0.4
    for name, (strict, loose) in found.items():
        assert strict["validation_dp_gap"] < 0.12, name
        assert strict["validation_dp_gap"] < loose["validation_dp_gap"], name
        assert strict["accuracy"] < loose["accuracy"], name
    with_scores = found["logistic-thresholds"][0]
    assert with_scores["calibration_error"] == plain["calibration_error"] > 0
    assert all(np.isnan(found["threshold-optimizer"][0][name]) for name in ("calibration_error", "dp_gap_soft"))


def test_thresholds_are_on_the_scores_of_the_plain_network(few, monkeypatch):
    """The trained network's, for validation and test part; the same decisions as by its logits without a tolerance."""
    plan = runs.Plan("single-objective", "single-objective", SMALL, Hyper(0.0, 0.01))
    network = networks.MLP(SMALL.row).init(jax.random.key(0), few.train.x)
    leader, follower, _ = fb.partition(network, networks.is_followers)
    parts = jax.tree.map(lambda p: p[None], (leader, follower))
    calls = []

    def sweep(method, setting, dataset, cells, num_epochs, **more):
        calls.append((method, setting, cells, num_epochs))
        return train.Outcome([], 1.0, 0.1, parts)

    monkeypatch.setattr(outside, "sweep", sweep)
    track = lambda label, total: lambda state, metrics: None
    validation, test = outside.network_logits(few, 3, plan, 7, track)
    assert calls == [("single-objective", SMALL, [(plan.hyper, 3)], 7)]
    expected = networks.MLP(SMALL.row).apply(network, few.test.x)
    np.testing.assert_allclose(test, expected, rtol=1e-4, atol=1e-6)
    decided = outside.OUTSIDE["thresholds"].build(case_of(few, (validation, test)), 0.0)
    assert decided.logits[1] is test
    case = case_of(few)
    rates = [decided.decisions[0][case.validation.groups == g].mean() for g in (0, 1)]
    assert abs(rates[0] - rates[1]) < 1 / min(np.bincount(case.validation.groups)) + 1e-9


@pytest.mark.parametrize("attribute", ["used", "removed"])
def test_compare_with_methods_from_outside(tmp_path, capsys, monkeypatch, drawn, attribute):
    load = synthetic.load
    monkeypatch.setattr(runs.synthetic, "load", lambda **more: load(n=300, **more))
    args = ["compare", "fairness", "--dataset", "synthetic", "--output-dir", str(tmp_path), "--no-costs"]
    args += ["--seeds", "2", "--trials", "2", "--attribute", attribute, "--num-epochs", "1", "--methods"]
    args += ["single-objective", "lagrangian", "logistic", "logistic-thresholds", "exponentiated-gradient"]
    cli.main(args)
    shown = capsys.readouterr().out.split("synthetic by group")[0].splitlines()[1:]
    assert max(map(len, shown)) <= 80
    records = store.read(tmp_path / "runs.jsonl")
    counts = {name: sum(record["method"] == name for record in records) for name in outside.OUTSIDE}
    used = attribute == "used"
    assert {name: n for name, n in counts.items() if n} == {
        "logistic": 2,
        **({"logistic-thresholds": 4} if used else {}),
        "exponentiated-gradient": 4,
    }
    table = (tmp_path / "table.md").read_text()
    lines = {line.split("|")[1].strip(): line.split("|") for line in table.splitlines() if line.startswith("| ")}
    assert table.count("not available: needs the attribute") == (0 if used else 4)
    assert {len(line) for line in lines.values()} == {12}
    assert "logistic-thresholds" in lines
    # The area and its difference, from the records, above accuracy alone's gap and the majority's label.
    of = lambda method, seed: [r["metrics"] for r in records if r["method"] == method and r["seed"] == seed]
    alone = [of("single-objective", seed)[0] for seed in (0, 1)]
    majority = np.mean([r["metrics"]["majority"] for r in records])
    point = (majority, 1 - np.mean([m["dp_gap"] for m in alone]))
    area = lambda method, seed: 1e3 * summary.selected_hypervolume(of(method, seed), point)
    areas = [area("exponentiated-gradient", seed) for seed in (0, 1)]
    assert lines["exponentiated-gradient"][9].split()[0] == f"{np.mean(areas):.2f}"
    less = np.mean([area("exponentiated-gradient", seed) - area("lagrangian", seed) for seed in (0, 1)])
    assert lines["exponentiated-gradient"][10].split()[0] == f"{less:+.2f}"
    assert lines["exponentiated-gradient"][8].strip() == ""
    assert (tmp_path / "fairness.png").stat().st_size > 20_000


def test_lines_leave_out_what_is_about_the_majoritys_label():
    means = np.array([[0.755, 0.0], [0.84, 0.1], [0.82, 0.01], [0.83, 0.15], [0.85, 0.2]])
    assert outside_report.joined(means, 0.754).tolist() == [[0.82, 0.01], [0.84, 0.1], [0.85, 0.2]]


def test_without_fairlearn(tmp_path, monkeypatch):
    monkeypatch.setattr(outside, "find_spec", lambda name: None)
    options = fairness.CompareFairness(methods=("logistic", "threshold-optimizer"))
    with pytest.raises(UserError, match=r"fairlearn is not installed, which threshold-optimizer need.*\[tasks\]"):
        options.check()
    fairness.CompareFairness(methods=("logistic",)).check()


def test_compare_followers(tmp_path, capsys, monkeypatch, drawn):
    protocol = protocols.PROTOCOLS["followers"]
    variants = [protocol.variants[i]._replace(hyper=protocol.variants[i].hyper[:1]) for i in (1, 3)]
    assert [variant.label for variant in variants] == ["lagrangian", "alternating, together"]
    few = protocol._replace(setting=TWO._replace(batch_size=1000, losses=protocol.setting.losses, followers="one"))
    few = few._replace(setting=few.setting._replace(accuracy_widths=(5,), fairness_widths=(4, 1)), etas=(1.0, 9.0))
    few = few._replace(variants=(*variants, protocol.variants[4]), num_epochs=1)
    monkeypatch.setitem(protocols.PROTOCOLS, "followers", few)
    args = ["--dataset", "synthetic", "--protocol", "followers", "--seeds", "2", "--no-costs"]
    args += ["--followers", "one", "together", "--output-dir", str(tmp_path)]
    cli.main(["compare", "fairness", *args])
    records = list(store.read(tmp_path / "runs.jsonl"))
    assert [r["settings"].get("followers", "one") for r in records] == 4 * ["one"] + 4 * ["together"]
    table = (tmp_path / "table.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert "judge by the area" in table
    assert [line.split("|")[1].strip() for line in lines] == ["lagrangian", "alternating, together"]
    # The front is of accuracy and the larger of the two gaps.
    of = lambda method, seed: [r["metrics"] for r in records if r["method"] == method and r["seed"] == seed]
    worst = lambda m, prefix="": 1 - max(m[f"{prefix}dp_gap"], m[f"{prefix}eo_gap"])
    volumes = []
    for seed in (0, 1):
        cells = of("lagrangian", seed)
        pairs = np.array([[m["validation_accuracy"], worst(m, "validation_")] for m in cells])
        test = np.array([[m["accuracy"], worst(m)] for m in cells])
        volumes.append(statistics.hypervolume(test[statistics.pareto_front(pairs)]))
    assert float(lines[0].split("|")[9]) == pytest.approx(np.mean(volumes), abs=6e-5)
    shown = capsys.readouterr().out.split("Means over")[0].splitlines()[1:]
    assert max(map(len, shown)) <= 80
    assert shown[0].split()[:5] == ["method", "accuracy", "gap", "odds", "area"]


def test_compare_shows_each_setting_of_a_reproduction(tmp_path, capsys, monkeypatch):
    article = protocols.PROTOCOLS["article"]
    few = article._replace(setting=SMALL._replace(batch_size=1000, loss="published-parity"), num_epochs=1)
    few = few._replace(variants=(protocols.Variant("leaky-alternating"),))
    monkeypatch.setitem(protocols.PROTOCOLS, "article", few)
    args = ["--dataset", "synthetic", "--protocol", "article", "--seeds", "2", "--output-dir", str(tmp_path)]
    cli.main(["compare", "fairness", *args])
    table = (tmp_path / "table.md").read_text()
    assert [line.split("|")[3].strip() for line in table.splitlines()[2:]] == ["100", "1000"]
    costs = list(store.read(tmp_path / "costs.jsonl"))
    assert [(c["method"], c["settings"]["update"]) for c in costs] == [
        ("lagrangian", "simultaneous"),
        ("alternating", "simultaneous"),
        ("alternating", "sequential"),
    ]
    assert costs[0]["metrics"]["ratio"] == 1.0
    assert "times the Lagrangian's epoch" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["protocol"] == "article"


def test_the_report_is_of_the_records_alone(tmp_path):
    """In whatever order they stand; a method that the table does not know is shown below the others."""
    committed = ROOT / "benchmarks/results/fairness-published"
    lines = (committed / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(np.random.default_rng(0).permutation(lines)))
    made = report.report(tmp_path)  # without its config.json
    assert made.texts["table.md"] == (committed / "table.md").read_text()
    changed = [line.replace('"lagrangian"', '"fairest"') for line in lines]
    (tmp_path / "runs.jsonl").write_text("".join(changed))
    made = report.report(tmp_path)
    rows = made.texts["table.md"].splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows][-2:] == ["frozen-follower", "fairest"]
    made.figures["fairness.png"](tmp_path / "fairness.png")
