"""The same hypergradients by funcbilevel and by its peers, side by side in one process.

    pip install -c constraints.txt -e ".[peers]" && pip install -c constraints.txt --no-deps betty-ml boat-torch higher
    python benchmarks/peers.py --output benchmarks/results/peers/runs.jsonl
    python benchmarks/peers.py --report benchmarks/results/peers/runs.jsonl > benchmarks/results/peers/table.md

boat-torch asks for an older NumPy than ours and betty-ml (0.1.1) writes its requirements so that pip 24.1 and later
refuse it: hence --no-deps, and an older pip for the latter. What is not installed is left out.

Same problem (peers_problems.py), inner solution, number of linear-solver products or unrolled steps, tolerance of
conjugate gradients where there is one, dtype and threads (as many as the process may use: `taskset -c 0` gives one). A
peer's time counts if its hypergradient is right: its relative error to ours in float64 is at most ten times that of
ours in float32, or 1e-5. Run it again to go on where it stopped: what the file holds is not measured again.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peers_jax
from peers_problems import STATEMENTS, Case, case
from turns import times_in_turns

from funcbilevel.tasks._experiment import store

METHODS = tuple(peers_jax.OURS)
MODULES = {
    "jaxopt": "peers_jax",
    "optimistix": "peers_jax",
    "torchopt": "peers_torch",
    "betty-ml": "peers_torch",
    "boat-torch": "peers_torch",
    "hypergrad": "peers_torch",
    "hypertorch": "peers_torch",
    "torch.compile": "peers_torch",
}
STATED = ("hypertorch", "torch.compile")
"""Not on PyPI, or no library: stated in peers_torch.py, in terms of PyTorch."""
OURS = "funcbilevel"
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
ROUNDING = 1e-5
"""An error in float32 that is not held against anyone."""


def builders(peer: str) -> dict[str, Callable[[Case], Callable[[], Any]]]:
    """Method -> how the peer computes it."""
    return import_module(MODULES[peer]).PEERS[peer]


def installed(peer: str) -> str | None:
    """The version of a peer, or None."""
    try:
        return version("torch" if peer in STATED else peer)
    except PackageNotFoundError:
        return None


def has(peer: str, method: str) -> bool:
    """Whether the peer offers the method (asked without importing PyTorch)."""
    return method in OFFERS[peer]


OFFERS: Mapping[str, Sequence[str]] = {
    "jaxopt": ("aid-cg", "itd"),
    "optimistix": ("aid-cg", "itd"),
    "torchopt": METHODS,
    "betty-ml": ("aid-cg", "aid-neumann"),
    "boat-torch": METHODS,
    "hypergrad": METHODS,
    "hypertorch": METHODS,
    "torch.compile": METHODS,
}


# Measuring.


def to_numpy(gradient: Any) -> np.ndarray:
    return np.asarray(gradient.detach() if hasattr(gradient, "detach") else gradient, np.float64).reshape(-1)


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b|."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def reference(name: str, method: str, steps: int) -> np.ndarray:
    """Our hypergradient in float64."""
    with jax.enable_x64(True):
        return to_numpy(peers_jax.OURS[method](case(name, steps, np.float64))())


def measure(
    name: str, method: str, peers: Iterable[str], steps: int, repeats: int, clock: str = "wall"
) -> Iterator[store.Record]:
    """One record per peer, and one of ours: error, and median time next to ours in the same turns."""
    exact, sized = reference(name, method, steps), case(name, steps)
    ours = peers_jax.OURS[method](sized)
    our_error = relative_error(to_numpy(ours()), exact)
    calls: dict[str, Callable[[], Any]] = {OURS: ours}
    errors: dict[str, float] = {OURS: our_error}
    failures: dict[str, str] = {}
    for peer in peers:
        try:
            function = builders(peer)[method](sized)
            errors[peer] = relative_error(to_numpy(function()), exact)
            calls[peer] = function
        except Exception as error:  # whatever a peer raises is its result
            failures[peer] = f"{type(error).__name__}: {_first_line(error)}"
    times = times_in_turns(calls, repeats, CLOCKS[clock])
    ours_seconds = float(np.median(times[OURS]))
    settings = settings_of(name, OURS, steps, clock)
    for peer in (OURS, *peers):
        if peer in failures:
            yield _record(method, settings | {"peer": peer, "failure": failures[peer]}, {"agrees": 0.0}, 0.0)
            continue
        low, seconds, high = (float(q) for q in np.quantile(times[peer], (0.25, 0.5, 0.75)))
        agrees = errors[peer] <= max(10 * our_error, ROUNDING)
        metrics = {
            "seconds": seconds,
            "seconds_low": low,
            "seconds_high": high,
            "our_seconds": ours_seconds,
            "ratio": float(np.median(np.array(times[peer]) / np.array(times[OURS]))),
            "error": errors[peer],
            "our_error": our_error,
            "agrees": float(agrees),
        }
        yield _record(method, settings | {"peer": peer}, metrics, sum(times[peer]))


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "Error: " in line]
    return (told or lines or [""])[-1 if told else 0].strip()[:200]


def settings_of(name: str, peer: str, steps: int, clock: str) -> dict[str, Any]:
    threads = len(os.sched_getaffinity(0))
    return {"problem": name, "peer": peer, "steps": steps, "dtype": "float32", "threads": threads, "clock": clock}


def _record(method: str, settings: Mapping[str, Any], metrics: Mapping[str, Any], seconds: float) -> store.Record:
    peer = settings["peer"]
    record = store.record("peers", method, 0, settings, metrics, seconds)
    own = {} if peer in (OURS, *STATED) else {peer: installed(peer) or ""}
    torch = {"torch": installed("torch") or ""} if MODULES.get(peer) == "peers_torch" else {}
    record["versions"] = record["versions"] | own | torch
    return record


def missing(
    name: str, method: str, peers: Iterable[str], steps: int, clock: str, done: Iterable[store.Record]
) -> tuple[str, ...]:
    """The peers that offer the method, are installed, and have no line in `done`."""
    there = [{k: v for k, v in r["settings"].items() if k != "failure"} for r in done if r["method"] == method]
    return tuple(
        p for p in peers if has(p, method) and installed(p) and settings_of(name, p, steps, clock) not in there
    )


def run(args: argparse.Namespace) -> None:
    """Measures what the output file does not hold yet."""
    from cost import progress  # noqa: PLC0415

    if absent := [p for p in args.peers if not installed(p)]:
        print(f"not installed, left out: {', '.join(absent)}", file=sys.stderr)
    if any(MODULES[p] == "peers_torch" and installed(p) for p in args.peers):
        import torch  # noqa: PLC0415

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_flush_denormal(True)  # as XLA does
    args.output.parent.mkdir(parents=True, exist_ok=True)
    done = list(store.read(args.output)) if args.output.exists() else []
    work = [
        (name, method, peers)
        for name in args.problems
        for method in args.methods
        if (peers := missing(name, method, args.peers, args.steps, args.clock, done))
    ]
    with progress(len(work)) as advance:
        for name, method, peers in work:
            advance(f"{name}, {method}: {', '.join(peers)}")
            for record in measure(name, method, peers, args.steps, args.repeats, args.clock):
                store.append(args.output, [record])
            jax.clear_caches()
            advance("", 1)


# The report.


def report(records: Sequence[store.Record]) -> str:
    """A Markdown document: ratios per method, summaries, and what did not agree.

    Of records with several numbers of steps or threads, those that have them as the last one.
    """
    alike = ("steps", "dtype", "threads", "clock")
    shown = [r for r in records if all(r["settings"][k] == records[-1]["settings"][k] for k in alike)]
    results = {(r["method"], r["settings"]["problem"], r["settings"]["peer"]): r for r in shown}
    problems = [p for p in STATEMENTS if any(key[1] == p for key in results)]
    parts = ["# Peers", "", _preamble(records)]
    for method in METHODS:
        peers = [p for p in MODULES if any(key[0] == method and key[2] == p for key in results)]
        if not peers:
            continue
        parts += [f"## {method}", "", _row("problem", "ours, ms", *peers, "fastest / ours")]
        parts.append(_row(*["---"] * (len(peers) + 3)))
        best: dict[str, float] = {}
        for problem in (p for p in problems if (method, p, OURS) in results):
            ours = results[method, problem, OURS]["metrics"]
            found = [results.get((method, problem, peer)) for peer in peers]
            counted = [r["metrics"]["ratio"] for r in found if r and r["metrics"]["agrees"]]
            best[problem] = min(counted, default=float("nan"))
            cells = [_cell(r) for r in found]
            parts.append(_row(problem, f"{1e3 * ours['seconds']:.3g}", *cells, f"{best[problem]:.2f}"))
        ratios = [x for x in best.values() if np.isfinite(x)]
        if ratios:
            lost = ", ".join(f"{p} ({x:.2f})" for p, x in best.items() if x < 1)
            parts += ["", f"Fastest peer over ours: median {np.median(ratios):.2f}, least {min(ratios):.2f}."]
            parts += [f"Slower than a peer on: {lost}." if lost else "Faster than every peer on every problem.", ""]
    wrong = [r for r in results.values() if not r["metrics"]["agrees"]]
    if wrong:
        parts += ["## What did not agree", ""]
        parts += [f"- {_complaint(r)}" for r in wrong]
    return "\n".join(parts).rstrip() + "\n"


def _preamble(records: Sequence[store.Record]) -> str:
    machine, settings = records[-1]["machine"], records[-1]["settings"]
    versions: dict[str, str] = {}
    for record in records:
        versions |= record["versions"]
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"One hypergradient at a given inner solution: {settings['steps']} products of the linear solver, or "
        f"{settings['steps']} unrolled gradient steps; {settings['dtype']}, threads: {settings['threads']}, "
        f"{machine['cpu']} ({machine['cpu_count']} cores). Numbers are the peer's time over ours "
        f"({settings['clock']} clock), medians of turns in one process; a time counts only if the gradient is right, "
        "and `error` is the relative error to float64 of one that is not. A dash: the peer does not offer it.\n\n"
        "Conjugate gradients end early where the relative residual is rounding error: ours by themselves, jaxopt's, "
        "torchopt's and hypertorch's by a tolerance; the others make every product. Two peers are stated here: "
        "hypertorch's methods, and torch.func's products compiled to one graph by torch.compile.\n\n"
        f"{listed}.\n"
    )


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(record: store.Record | None) -> str:
    if record is None:
        return "-"
    metrics = record["metrics"]
    if "seconds" not in metrics:
        return "raises"
    return f"{metrics['ratio']:.2f}" if metrics["agrees"] else f"error {metrics['error']:.0e}"


def _complaint(record: store.Record) -> str:
    settings, metrics = record["settings"], record["metrics"]
    where = f"{settings['peer']}, {record['method']}, {settings['problem']}"
    if "failure" in settings:
        return f"{where}: {settings['failure']}"
    return f"{where}: relative error {metrics['error']:.1e}, ours {metrics['our_error']:.1e}"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--output", type=Path, help="JSON lines; what the file holds already is not measured again")
    group.add_argument("--report", type=Path, help="print the Markdown report of this file and measure nothing")
    parser.add_argument("--problems", nargs="+", choices=STATEMENTS, default=list(STATEMENTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--peers", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    text = "processor: of all threads together; for a busy machine, with one thread"
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help=text)
    args = parser.parse_args(argv)
    for name in ("steps", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if args.report is None:
        run(args)
    else:
        print(report(list(store.read(args.report))), end="")


if __name__ == "__main__":
    main()
