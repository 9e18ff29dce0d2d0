"""Deliberate defects, each of which a test must find: `python tests/mutants.py [WORD ...]`, by hand, in ten minutes.

Each defect goes into a temporary copy of the package, where the tests named beside it run until the first one fails.
A table says what was caught; the exit code is 1 if something survived, or if the named tests fail without any defect.
With words, only the defects whose names hold one of them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """One defect: in `file` of the package the text `old`, which stands there once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def oracle(*rows: str) -> tuple[str, ...]:
    """Rows of the table of exact hypergradients."""
    return tuple(f"test_hypergradient.py::test_hypergradient[{row}]" for row in rows)


FAULTS = "test_bad_input.py::test_a_fault_in_the_middle_of_a_scan_does_not_spread"
PMAP = "test_data_parallel.py::test_pmap_over_a_spread_batch_equals_the_whole_batch"
WITNESS = "test_model.py::test_train_mode_belongs_to_the_inner_fit"
SYSTEMS = "test_bilevel.py::test_linear_systems_are_warm_started"

# What follows in the fit of L_adj; the lines before are those of the Newton step's as well.
THE_FIT = """

        def value_and_grad(params: PyTree, model_state: ModelState, *_: Any) -> Any:
            a_Q, pull_Q"""

MUTANTS = [
    # Signs and factors.
    Mutant(
        "funcid: d with the wrong sign",
        "_estimators/funcid.py",
        "system = AdjointSystem(C, d, v_P",
        "system = AdjointSystem(C, jax.tree.map(jnp.negative, d), v_P",
        oracle("funcid-linear-cosh", "funcid-pointwise-cosh"),
    ),
    Mutant(
        "funcid: g_imp with the wrong sign",
        "_estimators/funcid.py",
        "g_imp = tree_cast(cross, outer_params)",
        "g_imp = tree_cast(jax.tree.map(jnp.negative, cross), outer_params)",
        oracle("funcid-linear-cosh"),
    ),
    Mutant(
        "aid: g_imp with the wrong sign",
        "_estimators/aid.py",
        "g_imp = tree_cast(jax.tree.map(jnp.negative, cross), outer_params)",
        "g_imp = tree_cast(cross, outer_params)",
        oracle("aid-cg-cosh"),
    ),
    Mutant(
        "pointwise: a = + C^-1 d",
        "_estimators/pointwise_adjoint.py",
        "rhs = jax.tree.map(jnp.negative, tree_cast(d, working_dtype(d)))",
        "rhs = tree_cast(d, working_dtype(d))",
        oracle("funcid-pointwise-cosh"),
    ),
    Mutant(
        "learned: L_adj without its half",
        "_estimators/learned_adjoint.py",
        "(grad_P,) = pull_P(Ca)",
        "(grad_P,) = pull_P(jax.tree.map(lambda t: 2.0 * t, Ca))",
        oracle("funcid-learned-cosh"),
    ),
    Mutant(
        "learned: the reported L_adj without its half",
        "_estimators/learned_adjoint.py",
        "value = 0.5 * tree_vdot(a_P, Ca)",
        "value = tree_vdot(a_P, Ca)",
        ("test_hypergradient.py::test_one_step_of_the_learned_adjoint[softmax]",),
    ),
    Mutant(
        "cross derivative at half its size",
        "_problem.py",
        "(u,), (direction,))[1])(outer_params)",
        "(u,), (direction,))[1] * 0.5)(outer_params)",
        oracle("aid-cg-ridge"),
    ),
    Mutant(
        "head: ridge term without its half",
        "_projection.py",
        "return 0.5 * ridge * tree_vdot(V, V)",
        "return ridge * tree_vdot(V, V)",
        ("test_variable_projection.py::test_parametrize_gives_the_reduced_problem",),
    ),
    Mutant(
        "penalty: the value at theta left out",
        "_estimators/value_penalty.py",
        "return at_y - at_theta",
        "return at_y",
        oracle("penalty-value-ridge"),
    ),
    Mutant(
        "penalty: not multiplied",
        "_estimators/_penalty.py",
        "jax.grad(lambda omega: penalty * p(omega, y))",
        "jax.grad(lambda omega: p(omega, y))",
        oracle("penalty-gradient-cosh"),
    ),
    # Systems to solve.
    Mutant(
        "damping ignored",
        "_linear_solvers.py",
        "tree_add_scaled(in_working_dtype(matvec, rhs)(u), solver.damping, u)",
        "tree_add_scaled(in_working_dtype(matvec, rhs)(u), 0.0, u)",
        oracle("aid-lineax-damped-cosh"),
    ),
    Mutant(
        "ridge of the linear adjoint ignored",
        "_ridge.py",
        "D * m + ridge * D * D * Z",
        "D * m + 0.0 * D * D * Z",
        oracle("funcid-linear-ridge-least-squares"),
    ),
    Mutant(
        "warm start of a linear system ignored",
        "_linear_solvers.py",
        "solver.solve(damped, b, start)",
        "solver.solve(damped, b, None)",
        (f"{SYSTEMS}[cg]",),
    ),
    Mutant(
        "warm start of the learned adjoint ignored",
        "_estimators/learned_adjoint.py",
        f"state if warm_start else start(key, prediction_model, x_P){THE_FIT}",
        f"start(key, prediction_model, x_P){THE_FIT}",
        ("test_bilevel.py::test_the_learned_adjoint_is_warm_started",),
    ),
    Mutant(
        "cg goes on through directions of no curvature",
        "_linear_solvers.py",
        "positive = pAp > negligible * largest * pp",
        "positive = pAp != 0.0",
        ("test_right_answers.py::test_cg_stops_at_a_breakdown_with_its_best_iterate",),
    ),
    Mutant(
        "cg goes on from a warm start that is worse than zero",
        "_linear_solvers.py",
        "worse = to_start & ~(rr <= bb)",
        "worse = to_start & False",
        ("test_preconditioning.py::test_a_warm_start_is_kept_only_where_it_is_better_than_zero",),
    ),
    Mutant(
        "cg averages over flat directions",
        "_linear_solvers.py",
        "pAp > _STEEP * largest * pp",
        "pAp > 0.0",
        ("test_preconditioning.py::test_on_a_batch_with_fewer_samples_than_parameters_the_answer_is_not_noise",),
    ),
    Mutant(
        "a solver's answer to NaN is where it started",
        "_linear_solvers.py",
        'u = nan_unless(~jnp.isnan(metrics["linear_residual"]), tree_scaled(u, size))',
        "u = tree_scaled(u, size)",
        (f"{FAULTS}[aid-cg]", "test_right_answers.py::test_nan_inner_params_are_flagged_and_give_no_number"),
    ),
    Mutant(
        "stationarity divides by zero",
        "_problem.py",
        "size / jnp.where(terms > 0, terms, 1.0)",
        "size / terms",
        ("test_right_answers.py::test_a_solution_at_zero_is_stationary",),
    ),
    # Modes and keys.
    Mutant(
        "funcid evaluates the network in train mode",
        "_predictor.py",
        "return model.apply(inner_params, model_state, inputs)[0]\n\n    if model.head is None:",
        "return model.apply(inner_params, model_state, inputs, train=True, key=jax.random.key(0))[0]\n\n"
        "    if model.head is None:",
        (f"{WITNESS}[funcid-linear]",),
    ),
    Mutant(
        "aid evaluates the network in train mode",
        "_predictor.py",
        "features, _ = model.apply(inner_params, model_state, problem.inputs(batch))",
        "features, _ = model.apply(\n"
        "            inner_params, model_state, problem.inputs(batch), train=True, key=jax.random.key(0)\n        )",
        ("test_model.py::test_the_same_network_gives_the_same_hypergradient_through_every_adapter[aid-cg]",),
    ),
    Mutant(
        "the inner fit in evaluation mode",
        "_predictor.py",
        "u, model_state = model.apply(inner_params, model_state, problem.inputs(batch), train=True, key=key)",
        "u, model_state = model.apply(inner_params, model_state, problem.inputs(batch), train=False, key=key)",
        (f"{WITNESS}[alternating]",),
    ),
    Mutant(
        "one dropout key for all inner steps",
        "_fit.py",
        "step_key = None if key is None else jax.random.fold_in(key, i)",
        "step_key = key",
        (f"{WITNESS}[alternating]",),
    ),
    Mutant(
        "itd numbers its steps from zero again",
        "_fit.py",
        "steps = first_step + jnp.arange(num_steps)",
        "steps = jnp.arange(num_steps)",
        ("test_right_answers.py::test_itd_goes_back_through_each_step_s_own_minibatch", WITNESS),
    ),
    Mutant(
        "a sampler's draws from one key",
        "_draws.py",
        "return source.sample(jax.random.fold_in(key, i))",
        "return source.sample(key)",
        ("test_right_answers.py::test_a_sampler_draws_anew_for_each_step",),
    ),
    Mutant(
        "the solver's key never moves",
        "_bilevel.py",
        "            key=key,\n            outer_model_state=outer_model_state,\n"
        "            batch_form=state.batch_form,",
        "            key=state.key,\n            outer_model_state=outer_model_state,\n"
        "            batch_form=state.batch_form,",
        ("test_outer_model.py::test_each_step_has_a_key_of_its_own",),
    ),
    # The loop.
    Mutant(
        "step counter off by one",
        "_bilevel.py",
        "step=state.step + 1,",
        "step=state.step + 2,",
        ("test_train.py::test_the_chunks_change_nothing",),
    ),
    Mutant(
        "faults are not held back",
        "_bilevel.py",
        'all_levels = inner_finite & metrics["adjoint_finite"] & metrics["outer_finite"]',
        "all_levels = jnp.array(True)",
        (f"{FAULTS}[alternating]",),
    ),
    Mutant(
        "a broken inner fit is kept",
        "_bilevel.py",
        "after = tree_where(inner_finite, inner.fit, before)",
        "after = inner.fit",
        (f"{FAULTS}[alternating]",),
    ),
    Mutant(
        "an exploding inner fit is kept",
        "_bilevel.py",
        "diverged = (jnp.abs(result.value) > 1e6 * jnp.abs(result.first))",
        "diverged = (jnp.abs(result.value) > jnp.inf * jnp.abs(result.first))",
        ("test_right_answers.py::test_an_inner_fit_that_explodes_is_held_back",),
    ),
    Mutant(
        "the outer optimizer's state is lost",
        "_bilevel.py",
        "outer_opt_state=outer_opt_state,",
        "outer_opt_state=state.outer_opt_state,",
        ("test_bilevel.py::test_the_inner_level_is_warm_started",),
    ),
    Mutant(
        "the model's statistics are lost",
        "_bilevel.py",
        "model_state=after.model_state,",
        "model_state=state.model_state,",
        (f"{WITNESS}[alternating]",),
    ),
    Mutant(
        "itd differentiates through more steps than asked for",
        "_bilevel.py",
        "head = 0 if inner_steps is None else inner_steps - unroll",
        "head = 0",
        (WITNESS,),
    ),
    Mutant(
        "itd of more steps than are made is let through",
        "_bilevel.py",
        "if estimator.unroll > inner_steps:",
        "if estimator.unroll > inner_steps + 1000:",
        ("test_bad_input.py::test_bad_calls_are_refused",),
    ),
    # Devices.
    Mutant(
        "Hessian products of one device alone",
        "_problem.py",
        "lambda t: mean_over_devices(problem, curvature(t))",
        "lambda t: curvature(t)",
        (f"{PMAP}[aid-cg]",),
    ),
    Mutant(
        "the hypergradient of one device alone",
        "_bilevel.py",
        "explicit, implicit, value = mean_over_devices(problem, (hyper.explicit, hyper.implicit, hyper.outer_value))",
        "explicit, implicit, value = hyper.explicit, hyper.implicit, hyper.outer_value",
        (f"{PMAP}[alternating]",),
    ),
    Mutant(
        "the adjoint's gradient of one device alone",
        "_estimators/learned_adjoint.py",
        "mean(jax.tree.map(lambda p, q: p + q, grad_P, grad_Q))",
        "jax.tree.map(lambda p, q: p + q, grad_P, grad_Q)",
        (f"{PMAP}[funcid-learned]",),
    ),
    Mutant(
        "a fault on one device leaves the others alone",
        "_problem.py",
        "return mean_over_devices(problem, x.astype(jnp.float32)) == 1.0",
        "return mean_over_devices(problem, x.astype(jnp.float32)) > 0.0",
        ("test_data_parallel.py::test_an_infinite_value_on_one_device_holds_all_devices_back",),
    ),
    # Training and records.
    Mutant(
        "a chunk takes its first batch again and again",
        "_train.py",
        "metrics = step(carry[0], j * row + i)",
        "metrics = step(carry[0], j * row)",
        ("test_train.py::test_an_iterator_is_stepping_by_hand",),
    ),
    Mutant(
        "finished runs are made again",
        "tasks/_experiment/store.py",
        "for run in runs}.items() if key not in done]",
        "for run in runs}.items()]",
        ("test_experiment.py::test_only_what_is_missing_is_made",),
    ),
    Mutant(
        "a run recorded by another process is recorded again",
        "tasks/_experiment/store.py",
        "new = {key: pair for pair in results if (key := run_key(store.task, pair[0])) not in done}",
        "new = {run_key(store.task, pair[0]): pair for pair in results}",
        ("test_experiment.py::test_what_another_process_has_recorded_is_not_recorded_twice",),
    ),
    # Checkpoints.
    Mutant(
        "checkpoint: a changed file goes unseen",
        "_checkpoint.py",
        "if _checksum(path) != checksum:",
        "if path.stat().st_size < 0:",
        ("test_checkpoint.py::test_damage_is_told_and_nothing_is_touched[a flipped bit in the state]",),
    ),
    Mutant(
        "checkpoint: an iterator starts anew",
        "_train.py",
        "else self._feed.go_to(position)",
        'else ""',
        ("test_checkpoint.py::test_so_it_is_with_all_kinds_of_data[generator]",),
    ),
    Mutant(
        "checkpoint: the place in the data is that of the batches pulled ahead",
        "_train.py",
        "self.state, self._place = new_state, place",
        "self.state, self._place = new_state, place._replace(pulled=place.pulled + 4)",
        ("test_checkpoint.py::test_prefetching_changes_nothing",),
    ),
    Mutant(
        "rollback: always to the last checkpoint",
        "_train.py",
        'self._store.drop_last(counts["again"] - 1)',
        "self._store.drop_last(0)",
        ("test_train_recovery.py::test_a_checkpoint_that_bears_the_seeds_of_nan_is_left_behind",),
    ),
    Mutant(
        "continue: moments that broke the run are kept",
        "_train.py",
        "                self.state = fresh\n",
        "",
        ("test_train_recovery.py::test_what_caused_it_is_reset[inner moments-sampler]",),
    ),
    Mutant(
        "log: lines of steps that are made anew stay",
        "_log.py",
        "if keep < path.stat().st_size:",
        "if keep < 0:",
        ("test_log.py::test_a_resumed_run_goes_on_in_the_file",),
    ),
]


def copy(directory: Path) -> None:
    """What tests need of this repository."""
    skip = shutil.ignore_patterns("__pycache__", "results", ".*")
    for name in ("funcbilevel", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, directory / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", directory)


def run(directory: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest's exit code in that copy, and the line of the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, *(f"tests/{test}" for test in tests)],
        check=False,
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, failed[0] if failed else done.stdout.strip().rpartition("\n")[2]


def verdict(mutant: Mutant) -> tuple[str, str]:
    """Whether its tests caught it, and by what."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        copy(directory)
        file = directory / "funcbilevel" / mutant.file
        file.write_text(file.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        code, line = run(directory, mutant.tests)
    return {0: "SURVIVED", 1: "caught"}.get(code, f"ERROR {code}"), line


def main(words: list[str]) -> int:
    """Prints the table, and gives the exit code."""
    mutants = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    if not mutants:
        print(f"no defect's name holds any of {words}; without words all {len(MUTANTS)} are tried")
        return 2
    with tempfile.TemporaryDirectory() as name:
        copy(Path(name))
        code, line = run(Path(name), tuple(dict.fromkeys(test for m in mutants for test in m.tests)))
    print(f"without any defect: {line}", flush=True)
    if code:
        return 1
    caught = 0
    for m in mutants:
        start = time.perf_counter()
        result, line = verdict(m)
        caught += result == "caught"
        print(f"{result:9}{time.perf_counter() - start:5.0f} s  {m.name:52}  {line[:100]}", flush=True)
    print(f"{caught} of {len(mutants)} caught")
    return int(caught < len(mutants))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
