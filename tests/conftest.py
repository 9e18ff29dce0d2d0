"""Strict JAX for every test: eight simulated devices, no rank promotion, float64 where a test asks for it."""

import contextlib
import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # The tests compile far longer than they run.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
    ]
)


def _kept_programs() -> Path | None:
    """A directory of our own for compiled programs; none where the user chose one, or where it cannot be written."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return None
    directory = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "funcbilevel" / "tests"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return directory if os.access(directory, os.W_OK) else None


KEPT = _kept_programs()
KEPT_BYTES = 2**30
if KEPT:
    # From run to run, for all workers, and for the processes that tests start, which inherit the environment.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(KEPT)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Tracing makes millions of small objects that live on: a tenth of the time goes into looking through them.
gc.set_threshold(200_000, 10, 10)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
if KEPT:  # a plugin may have imported jax before
    jax.config.update("jax_compilation_cache_dir", str(KEPT))
    for name, kind in (("min_compile_time_secs", float), ("min_entry_size_bytes", int)):
        jax.config.update(f"jax_persistent_cache_{name}", kind(os.environ[f"JAX_PERSISTENT_CACHE_{name.upper()}"]))


def pytest_configure(config):
    # A program that another worker is just writing, or was killed while writing, is compiled anew.
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning")


def pytest_sessionstart(session):
    """JAX can bound its directory itself, but then reads all of it at every entry."""
    if not KEPT or hasattr(session.config, "workerinput"):
        return
    with contextlib.suppress(FileNotFoundError):  # another session is doing the same
        files = sorted((max(s.st_atime, s.st_mtime), s.st_size, f) for f in KEPT.iterdir() for s in [f.stat()])
        excess = sum(size for _, size, _ in files) - KEPT_BYTES
        for _, size, file in files:
            if excess > 0:
                file.unlink()
                excess -= size


@pytest.fixture
def x64():
    """float64 for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Every compiled program holds memory maps, of which a process may have 65,530: then LLVM crashes."""
    yield
    jax.clear_caches()
    gc.collect()
