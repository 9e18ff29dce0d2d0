"""The parameters of one network in two disjoint parts, and what each player's optimizer gets to see."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import funcbilevel as fb

PARAMS = {"body": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "head": jnp.full(3, 2.0)}
LABELS = {
    "predicate": lambda path, leaf: path.startswith("head"),
    "predicate on the leaf": lambda path, leaf: "follower" if leaf.sum() == 6.0 and leaf.ndim == 1 else "leader",
    "tree of strings": {"body": {"kernel": "leader", "bias": "leader"}, "head": "follower"},
    "prefix of bools": {"body": False, "head": np.bool_(True)},
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_parts_are_disjoint_and_merge_is_the_inverse(labels):
    leader, follower, merge = fb.partition(PARAMS, labels)
    assert leader["head"] is None
    assert follower["body"] == {"kernel": None, "bias": None}
    assert len(jax.tree.leaves(leader)) + len(jax.tree.leaves(follower)) == len(jax.tree.leaves(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, merge(leader, follower), PARAMS)
    # merge takes any values of that structure, traced ones too, and does not mix the parts up.
    merged = jax.jit(merge)(jax.tree.map(lambda x: x + 1, leader), jax.tree.map(lambda x: -x, follower))
    expected = {"body": jax.tree.map(lambda x: x + 1, PARAMS["body"]), "head": -PARAMS["head"]}
    jax.tree.map(np.testing.assert_array_equal, merged, expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda path, leaf: False, "no leaf is the follower's.*body/bias, body/kernel, head"),
        (lambda path, leaf: "follower", "no leaf is the leader's"),
        (lambda path, leaf: 1, 'the label of \'body/bias\' must be "leader", "follower" or a bool, got 1'),
        (lambda path, leaf: None, "the label of 'body/bias' must be"),
        ({"body": "Leader", "head": True}, "must be \"leader\".*got 'Leader'"),
        ({"body": "leader"}, "labels must be a function .* or a pytree of labels with the structure of params"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        fb.partition(PARAMS, labels)


def test_merge_refuses_other_parts():
    leader, follower, merge = fb.partition(PARAMS, LABELS["predicate"])
    with pytest.raises(ValueError, match="merge: leader must have the structure"):
        merge(follower, leader)
    with pytest.raises(ValueError, match="merge: follower must have the structure"):
        merge(leader, {"head": jnp.ones(3)})


# What reaches the optimizers.


def linen_network():
    network = linen.Sequential([linen.Dense(4), linen.tanh, linen.Dense(4), linen.tanh, linen.Dense(1)])
    params = network.init(jax.random.key(0), jnp.ones((1, 3)))
    return params, lambda params, x: network.apply(params, x)[:, 0], "layers_2"


def nnx_network():
    model = fb.from_nnx(
        lambda rngs: nnx.Sequential(
            nnx.Linear(3, 4, rngs=rngs), jnp.tanh, nnx.Linear(4, 4, rngs=rngs), jnp.tanh, nnx.Linear(4, 1, rngs=rngs)
        )
    )
    params, state = model.init(jax.random.key(0), jnp.ones((1, 3)))
    return params, lambda params, x: model.apply(params, state, x)[0][:, 0], "layers/2"


def recorder():
    """An optimizer that keeps the gradient it got and changes nothing."""
    init = lambda params: jax.tree.map(jnp.zeros_like, params)
    update = lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads)
    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("make", [linen_network, nnx_network])
def test_no_gradient_reaches_the_other_player(make, x64):
    params, apply, followers = make()
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    leader, follower, merge = fb.partition(params, lambda path, leaf: followers in path)
    x = jax.random.normal(jax.random.key(1), (20, 3), jnp.float64)
    y, group = (x[:, 0] > 0).astype(float), (x[:, 1] > 0).astype(float)

    def accuracy(params):
        return jnp.mean((apply(params, x) - y) ** 2)

    def unfairness(params):
        v = apply(params, x)
        return (jnp.mean(v * group) - jnp.mean(v * (1 - group))) ** 2

    def received(accuracy_scale, eta):
        """What the leader's and the follower's optimizers get."""
        problem = fb.ParametricProblem(
            lambda omega, theta, _: eta * unfairness(merge(omega, theta)),
            lambda omega, theta, _: accuracy_scale * accuracy(merge(omega, theta)),
        )
        solver = fb.bilevel(
            problem, None, fb.alternating(), inner_optimizer=recorder(), outer_optimizer=recorder(), inner_steps=1
        )
        state = solver.init(jax.random.key(2), leader, None, follower)
        state, _ = jax.jit(solver.step)(state, (), ())
        return state.outer_opt_state, state.inner_opt_state

    of_leader, of_follower = received(1.0, 1.0)
    whole = {"accuracy": jax.grad(accuracy)(params), "unfairness": jax.grad(unfairness)(params)}
    parts = {name: fb.partition(grad, lambda path, leaf: followers in path) for name, grad in whole.items()}
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)
    jax.tree.map(close, of_leader, parts["accuracy"].leader)
    jax.tree.map(close, of_follower, parts["unfairness"].follower)
    assert all(np.any(g != 0) for g in jax.tree.leaves((of_leader, of_follower)))
    # The other player's objective, a million times as large, changes nothing.
    jax.tree.map(np.testing.assert_array_equal, received(1.0, 1e6)[0], of_leader)
    jax.tree.map(np.testing.assert_array_equal, received(1e6, 1.0)[1], of_follower)
