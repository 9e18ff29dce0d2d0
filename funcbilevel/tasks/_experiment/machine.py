"""What a record says of where it was made: versions, machine, commit."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax

import funcbilevel as fb


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    packages = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"python": platform.python_version(), "funcbilevel": fb.__version__} | packages


@cache
def machine() -> dict[str, str | int]:
    """The kind of machine: system, processor, and the device that JAX computes on."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count() or 0,
        "device": jax.devices()[0].device_kind,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


@cache
def commit() -> str:
    """Hash of the code's commit, with + if the library was changed since; empty for an installed package."""
    package = Path(fb.__file__).parent
    if not (package.parent / ".git").exists():
        return ""

    def git(*args: str) -> str:
        command = ["git", "-C", str(package), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def every_core_a_device() -> None:
    """Seeds are spread over devices: JAX on a CPU takes all of its cores for one, unless it is told otherwise."""
    if "JAX_NUM_CPU_DEVICES" not in os.environ and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        try:
            jax.config.update("jax_num_cpu_devices", cores)
        except RuntimeError:  # JAX runs already
            return
