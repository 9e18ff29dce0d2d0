"""An outer step on up to 4,096 devices, on paper: what it computes, sends and holds, from compiled programs.

    python benchmarks/devices.py [--output benchmarks/results/devices]

Nothing is run. For perceptrons of several widths the step is compiled for eight (simulated) devices and two batches.
The compiled program gives, for each device, the bytes that collectives move (loops included, with 8,192 samples on each
device), the bytes of the state, and temporary memory. The operations are those of the matrix products, by formula. With
D devices of `--flops` operations per second (at `--share` of their peak), and links of `--bandwidth` bytes per second
and `--latency` seconds,

    compute = operations(batch / D) / (flops * share)
    send    = moved * (D - 1) / D / bandwidth + collectives * latency * log2(D)

where a ring's all-reduce moves its operand twice, all-gather and reduce-scatter once. The two overlap at best and add
at worst; the table has their sum. The defaults are a guess at a current accelerator in bfloat16 with a fast network.
"""

import os

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import argparse
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen

import funcbilevel as fb
from funcbilevel.tasks._experiment import figures, store, table

MEASURED_ON = 8
SAMPLES = 4096, 8192  # on each device: so many that temporary memory is that of the samples
DEVICES = (1, 8, 64, 256, 1024, 4096)
INNER_STEPS, ADJOINT_STEPS = 10, 10
SIZES = {"u8": 1, "pred": 1, "bf16": 2, "f16": 2, "u32": 4, "s32": 4, "f32": 4, "f64": 8, "u64": 8, "s64": 8}
MOVED = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0, "collective-permute": 1.0}


class Net(linen.Module):
    """A perceptron."""

    width: int
    depth: int = 8

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """One output."""
        for _ in range(self.depth):
            x = jnp.tanh(linen.Dense(self.width)(x))
        return linen.Dense(1)(x)


PROBLEM = fb.FunctionalProblem(
    lambda w, v, batch: jnp.mean((v - batch[0] @ w) ** 2), lambda w, v, batch: jnp.mean((v - batch[1]) ** 2)
)
METHODS = {
    "funcid-learned": fb.funcid(fb.learned_adjoint(optax.adam(1e-3), ADJOINT_STEPS)),
    "aid-cg": fb.aid(fb.cg(ADJOINT_STEPS, damping=1.0)),
}
LAYOUTS = {"data-parallel": fb.data_parallel, "fully-sharded": fb.fully_sharded}


class Machine(NamedTuple):
    """What a device does per second, and its links."""

    flops: float
    share: float
    bandwidth: float
    latency: float


def pieces(method: str, layout: str, width: int, batch: int) -> dict[str, float]:
    """Of one compiled step on 8 devices, for each of them."""
    mesh = jax.make_mesh((MEASURED_ON,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    solver = fb.bilevel(
        *(PROBLEM, fb.from_linen(Net(width)), METHODS[method]),
        inner_optimizer=optax.adam(1e-3),
        outer_optimizer=optax.adam(1e-3),
        inner_steps=INNER_STEPS,
    )
    placed = LAYOUTS[layout](solver, mesh)
    data = (jax.ShapeDtypeStruct((batch, width), jnp.float32), jax.ShapeDtypeStruct((batch, 1), jnp.float32))
    omega = jnp.zeros((width, 1))
    state = jax.eval_shape(lambda inner: solver.init(jax.random.key(0), omega, inner), data)
    program = jax.jit(placed.step).lower(state, data, data).compile()
    moved, collectives = 0.0, 0
    memory: Any = program.memory_analysis()
    for kind, size, times in sent(str(program.as_text())):
        moved += MOVED[kind] * size * times
        collectives += times
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(state.inner_params)),
        "operations": operations(width, batch // MEASURED_ON, method),
        "moved": moved,
        "collectives": collectives,
        "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if hasattr(x.dtype, "itemsize")),
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def operations(width: int, samples: int, method: str) -> float:
    """Of matrix products: a pass forwards is 2 P per sample, one backwards twice that."""
    P = 8 * width**2
    training = 6.0 * P
    # The adjoint's step goes through both batches; a Hessian product is a jvp of a gradient, linearised once.
    second = 2 * training if method == "funcid-learned" else 2 * training - 2.0 * P
    return samples * (INNER_STEPS * training + ADJOINT_STEPS * second + 2 * training)


def sent(text: str) -> Iterator[tuple[str, int, int]]:
    """(kind, bytes of the result, how often) of every collective of a compiled program."""
    bodies: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = start[2]
            bodies[name] = []
            entry = name if start[1] else entry
        elif name:
            bodies[name].append(line)

    def walk(name: str, times: int) -> Iterator[tuple[str, int, int]]:
        for line in bodies[name]:
            if found := re.search(rf"= (.*?) ({'|'.join(MOVED)})(-start)?\(", line):
                shapes = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
                size = sum(SIZES[kind] * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in shapes)
                yield found[2], size, times
            count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            # A while loop without a known count is that of the conjugate gradients.
            repeats = (int(count[1]) if count else ADJOINT_STEPS) if " while(" in line else 1
            for called in re.findall(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line):
                if called in bodies and " reduce" not in line and " all-reduce" not in line:
                    yield from walk(called, times * repeats)
            for called in re.findall(r"branch_computations=\{([^}]*)\}", line):
                yield from walk(called.split(",")[0].strip().lstrip("%"), times)

    return walk(entry, 1)


def predicted(piece: dict[str, Any], machine: Machine, devices: int, samples: int) -> dict[str, float]:
    """Seconds of an outer step and bytes on each of D devices, with `samples` in a batch of each level."""
    share = samples / devices
    compute = operations(piece["width"], 1, piece["method"]) * share / (machine.flops * machine.share)
    send = piece["moved"] * (devices - 1) / devices / machine.bandwidth
    send += piece["collectives"] * machine.latency * math.log2(devices)
    state = piece["state_bytes"] / (devices if piece["layout"] == "fully-sharded" else 1)
    return {"compute": compute, "send": send, "bytes": state + piece["fixed"] + piece["per_sample"] * share}


def takes_over(piece: dict[str, Any], machine: Machine) -> float:
    """Samples on each device below which sending takes longer than computing, on many devices, without latency."""
    each = operations(piece["width"], 1, piece["method"]) / (machine.flops * machine.share)
    return piece["moved"] / machine.bandwidth / each


def measured(widths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Pieces for each method, layout and width, with temporary memory as fixed + per_sample * samples."""
    for width in widths:
        for method in METHODS:
            for layout in LAYOUTS:
                one, two = (pieces(method, layout, width, MEASURED_ON * b) for b in SAMPLES)
                slope = (two["temporary_bytes"] - one["temporary_bytes"]) / (SAMPLES[1] - SAMPLES[0])
                fixed = max(one["temporary_bytes"] - SAMPLES[0] * slope, 0.0)
                print(f"{method}, {layout}, width {width}: compiled", flush=True)
                yield {"method": method, "layout": layout, "width": width, "fixed": fixed, "per_sample": slope} | two


def _piece(record: store.Record) -> dict[str, Any]:
    return {**record["metrics"], **record["settings"], "method": record["method"]}


def table_of(made: list[store.Record]) -> str:
    """In Markdown."""
    machine, samples = Machine(**made[0]["settings"]["machine"]), made[0]["settings"]["samples"]
    rows = []
    for record in made:
        piece = _piece(record)
        at = [predicted(piece, machine, D, samples) for D in DEVICES]
        times = [f"{1e3 * (p['compute'] + p['send']):,.1f} ({p['send'] / (p['compute'] + p['send']):.0%})" for p in at]
        memory = [f"{p['bytes'] / 2**20:,.0f}" for p in at]
        name = f"{record['method']}, {piece['layout']}, {piece['parameters'] / 1e6:.1f} M"
        copies = f"{piece['moved'] / 4 / piece['parameters']:.0f}"
        rows.append((name, copies, f"{takes_over(piece, machine):,.0f}", *(f"{t}; {m}" for t, m in zip(times, memory))))
    header = ("method, layout, parameters", "parameters moved", "samples", *(f"D = {D:,}" for D in DEVICES))
    return (
        "# An outer step on many devices, on paper\n\n"
        f"Perceptrons of depth 8, {INNER_STEPS} inner steps, {ADJOINT_STEPS} of the adjoint or products, and batches "
        f"of {samples:,} samples at both levels over D devices. Each does {machine.flops / 1e12:,.0f} TFLOP/s at "
        f"{machine.share:.0%}; its links have {machine.bandwidth / 1e9:,.0f} GB/s and {1e6 * machine.latency:,.0f} "
        "microseconds (assumed). What is sent and held is taken from the compiled program.\n\n"
        "*Parameters moved*: the bytes that collectives move in an outer step, as a multiple of the parameters. "
        "*Samples*: on each device, below which sending takes longer than computing. Under D: milliseconds of the "
        "step, if sending and computing do not overlap (the share of sending); MiB on each device.\n\n"
        + table.markdown(header, rows)
    )


def draw(made: list[store.Record], path: Path) -> None:
    """Time and memory by the number of devices, for the largest network."""
    machine, samples = Machine(**made[0]["settings"]["machine"]), made[0]["settings"]["samples"]
    largest = max(record["settings"]["width"] for record in made)
    colours = dict(zip(METHODS, ("C3", "C0")))
    with figures.drawn(path, figsize=(9.0, 3.6)) as figure:
        time_axes, memory_axes = figure.subplots(1, 2)
        for record in (r for r in made if r["settings"]["width"] == largest):
            piece = _piece(record)
            at = [predicted(piece, machine, D, samples) for D in DEVICES]
            style: dict[str, Any] = {
                "color": colours[record["method"]],
                "linestyle": "-" if piece["layout"] == "data-parallel" else "--",
                "label": f"{record['method']}, {piece['layout']}",
            }
            time_axes.loglog(DEVICES, [1e3 * (p["compute"] + p["send"]) for p in at], marker="o", ms=3, **style)
            memory_axes.loglog(DEVICES, [p["bytes"] / 2**20 for p in at], marker="o", ms=3, **style)
        ideal = [1e3 * predicted(_piece(made[-1]), machine, D, samples)["compute"] for D in DEVICES]
        time_axes.loglog(DEVICES, ideal, color="0.6", linestyle=":", label="aid-cg, nothing sent")
        time_axes.set(xlabel="devices", ylabel="milliseconds of an outer step")
        memory_axes.set(xlabel="devices", ylabel="MiB on each device")
        for axes in (time_axes, memory_axes):
            axes.set_xticks(DEVICES, [f"{D:,}" for D in DEVICES])
            axes.minorticks_off()
        time_axes.legend(frameon=False, fontsize=8)


def main(output: Path | None, widths: tuple[int, ...], samples: int, machine: Machine) -> None:
    made = []
    for piece in measured(widths):
        start = time.perf_counter()
        method, layout, width = (piece.pop(name) for name in ("method", "layout", "width"))
        settings = {"layout": layout, "width": width, "samples": samples, "machine": machine._asdict()}
        made.append(store.record("devices", method, 0, settings, piece, time.perf_counter() - start))
    print(table_of(made))
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    (output / "runs.jsonl").unlink(missing_ok=True)
    store.append(output / "runs.jsonl", made)
    store.replace(output / "table.md", table_of(made).encode())
    draw(made, output / "devices.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An outer step on many devices, on paper.")
    parser.add_argument("--output", type=Path, help="directory for records, table and figure")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--samples", type=int, default=1_048_576, help="in a batch of each level, over all devices")
    parser.add_argument("--flops", type=float, default=400e12)
    parser.add_argument("--share", type=float, default=0.4)
    parser.add_argument("--bandwidth", type=float, default=100e9)
    parser.add_argument("--latency", type=float, default=5e-6)
    given = parser.parse_args()
    on = Machine(given.flops, given.share, given.bandwidth, given.latency)
    main(given.output, tuple(given.widths), given.samples, on)
