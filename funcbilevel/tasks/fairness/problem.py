r"""Fair classification by one network whose layers belong to two players (Yazdani-Jahromi et al. 2024, FairBiNN).

The leader owns the accuracy layers omega, the follower the fairness layers theta, disjoint parts of one network:

.. math::
    L_{out}(\omega, \theta) &= \text{cross entropy} + \beta\,\eta\,\text{unfairness}, \\
    L_{in}(\omega, \theta) &= \eta\,\text{unfairness} + \alpha\,\text{cross entropy} .

FairBiNN has alpha = beta = 0. The Lagrangian is one objective on the same network, cross entropy + eta unfairness, for
all layers. Many runs (cells: a setting of eta and of the rates, and a seed) train at once in one compiled program.

With several losses, parity and equalized odds or parity by sex and by race, unfairness is their sum and one follower
minimises it, or each loss has a follower with layers of its own: theta = (theta_1, ..., theta_m), and

.. math::
    \theta_j \text{ minimises } L_j = \eta\,\text{unfairness}_j + \alpha\,\text{cross entropy},
    \quad\text{the other players' layers held fixed.}

Labels in {0, ..., k - 1}, k > 2, are classified by a softmax, and one layer may be self-attention over the columns
(`ColumnAttention`).

What the theory does not cover. The article assumes that every layer is linear with a Lipschitz activation and has
bounded outputs (assumption 4, lemma 5), that the leader's loss is strictly convex near its optimum (assumption 2) and
that the follower's steps are as small as it takes (assumption 3); its section 5 excludes softmax and attention.

- The softmax by itself is no obstacle, whatever that section says: its Jacobian diag(p) - p p' has a norm of at most
  1/2, and cross entropy of logits is Lipschitz too. Multiclass training is as far inside the theory as binary training.
- Dot-product attention is one: no linear map with an activation but a softmax of products of its inputs, times them,
  and not Lipschitz on an unbounded domain (Kim et al. 2021). On a bounded one, such as columns scaled to [0, 1], it
  is, with a constant that depends on the norms of its weights and on the number of columns: nothing bounds it here.
- Strict convexity is proved for no network with hidden layers; it is an assumption about the solution found.
- Several followers play a Nash game below the leader; its equilibrium need be neither unique nor attained by gradient
  steps, one after the other or together. The article has one follower and one loss.

References:
    Yazdani-Jahromi et al., *Fair Bilevel Neural Network (FairBiNN): On Balancing fairness and accuracy via Stackelberg
    Equilibrium*, NeurIPS 2024, https://arxiv.org/abs/2410.16432
    Kim, Papamakarios, Mnih, *The Lipschitz constant of self-attention*, ICML 2021, https://arxiv.org/abs/2006.04710
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax

import funcbilevel as fb
from funcbilevel.tasks.data.dataset import Batch
from funcbilevel.tasks.fairness.losses import Loss, accuracy_loss
from funcbilevel.tasks.fairness.networks import Layers, layers, seen_by


class Setting(NamedTuple):
    """What decides the compiled program.

    Attributes:
        accuracy_widths, fairness_widths, position: of `layers`; by default the public code's five layers.
        loss: the follower's, a name of `LOSSES`.
        batch_size: rows per step, drawn without replacement in each epoch; None for all.
        inner_batch_size: rows of the follower's steps, drawn apart; None: it sees the leader's rows.
        update: `alternating` lets the follower move first (sequential), or both at once after one forward pass.
        inner_steps: the follower's steps per step of the leader.
        solver_steps, damping: of the linear solver of `aid-cg` and `aid-neumann`.
        step_size: of the Neumann series.
        penalty: lambda of `penalty-value`, whose second follower takes `inner_steps` steps too.
        leader_decay, follower_decay, decay_epochs: factors of the rates every so many epochs.
        weight_decay: the leader's and the follower's L2 penalty is weight_decay/2 |parameters|^2.
        losses: several in place of `loss`; unfairness is their sum.
        followers: `one` minimises that sum. Else (in sequential `alternating`) each loss has a follower with fairness
            layers and an Adam of its own; `inner_steps` are those of each. They step `together`, all from the same
            point, or one after the other, each seeing the steps of those before it: `round-robin`.
        attention: the layer, fairness_0 for example, that is self-attention over the columns; None for none.
        num_classes: of the labels.
    """

    accuracy_widths: tuple[int, ...] = (101, 101, 101, 1)
    fairness_widths: tuple[int, ...] = (101,)
    position: int = 2
    loss: str = "demographic-parity"
    batch_size: int | None = 200
    inner_batch_size: int | None = None
    update: Literal["sequential", "simultaneous"] = "sequential"
    inner_steps: int = 1
    solver_steps: int = 5
    damping: float = 0.01
    step_size: float = 0.1
    penalty: float = 10.0
    leader_decay: float = 1.0
    follower_decay: float = 1.0
    decay_epochs: int = 50
    weight_decay: float = 0.0
    losses: tuple[Loss, ...] = ()
    followers: Literal["one", "together", "round-robin"] = "one"
    attention: str | None = None
    num_classes: int = 2

    @property
    def row(self) -> Layers:
        """The network's layers."""
        return layers(self.accuracy_widths, self.fairness_widths, self.position, self.num_classes, self.attention)

    @property
    def terms(self) -> tuple[Loss, ...]:
        """The losses that make up the unfairness."""
        return self.losses or (Loss(self.loss),)

    @property
    def num_followers(self) -> int:
        """How many players there are below the leader."""
        return 1 if self.followers == "one" else len(self.losses)


class Hyper(NamedTuple):
    """What may differ between the cells of one program, scalars.

    Attributes:
        eta: weight of the unfairness.
        leader_rate, follower_rate: of Adam. Where both players follow one objective (`lagrangian`,
            `single-objective`), the leader's is that of all layers.
        follower_accuracy: alpha, the cross entropy's weight in the follower's objective.
        leader_fairness: beta, the unfairness' weight in the leader's objective, as a multiple of eta.
    """

    eta: Any = 1.0
    leader_rate: Any = 1e-3
    follower_rate: Any = 1e-3
    follower_accuracy: Any = 0.0
    leader_fairness: Any = 0.0


class Game(NamedTuple):
    """The two players and their network.

    Attributes:
        logits: (omega, theta, x) -> [n] or [n, k].
        fairness: (logits, batch) -> scalar.
        hyper, setting: as above.
        leader_optimizer, follower_optimizer: each for its own player's parameters.
        losses: (logits, batch) -> scalar of each follower, if there are several.
    """

    logits: Callable[[Any, Any, Any], jax.Array]
    fairness: Callable[[jax.Array, Batch], jax.Array]
    hyper: Hyper
    setting: Setting
    leader_optimizer: optax.GradientTransformation
    follower_optimizer: optax.GradientTransformation
    losses: tuple[Callable[[jax.Array, Batch], jax.Array], ...] = ()


def problem(game: Game) -> fb.ParametricProblem:
    """The bilevel problem: leader omega = outer_params, follower theta = inner_params.

    Several followers have the inner objective sum_j L_j(omega, theta_j, stop_gradient(the others')). Its gradient is
    the followers' gradients side by side, d L_j / d theta_j, so that one inner step is a step of each from the same
    point; XLA makes one forward pass of the m alike. It is a game's gradient and not that of a function of theta, and
    stop_gradient hides how the followers respond to each other: for `alternating`, and for no implicit estimator.
    """
    eta, _, _, alpha, beta = game.hyper

    def inner_objective(omega: Any, theta: Any, batch: Batch) -> jax.Array:
        losses = game.losses or (game.fairness,)

        def objective(j: int) -> jax.Array:
            mine = theta if len(losses) == 1 else seen_by(theta, j, len(losses))
            logits = game.logits(omega, mine, batch.x)
            return eta * losses[j](logits, batch) + alpha * accuracy_loss(logits, batch)

        return sum((objective(j) for j in range(1, len(losses))), objective(0))

    def outer_objective(omega: Any, theta: Any, batch: Batch) -> jax.Array:
        logits = game.logits(omega, theta, batch.x)
        return accuracy_loss(logits, batch) + beta * eta * game.fairness(logits, batch)

    return fb.ParametricProblem(inner_objective, outer_objective)
