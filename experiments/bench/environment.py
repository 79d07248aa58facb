"""What a machine has: its device, and the versions of what is measured on it."""

import importlib.metadata
import os
import pathlib
import platform
import re
from collections.abc import Iterator

from experiments.bench.results import Row

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "peft", "triton"),
    *("tokamax", "flash-attn", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)


def device_name() -> str:
    """The accelerator's own name; of a CPU its model and cores."""
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = re.search(r"model name\s*:\s*(.+)", text).group(1)
    except (OSError, AttributeError):
        model = platform.processor() or platform.machine()
    return f"CPU {model}, {len(os.sched_getaffinity(0))} cores"


def environment() -> Iterator[Row]:
    """Rows of what is here, and of what is not."""
    import jax

    devices = jax.devices()
    yield _row("device", f"{len(devices)} x {device_name()}, platform {devices[0].platform}")
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        yield _row("memory", f"{stats['bytes_limit'] / 2**30:.1f} GiB of a device for JAX")
    yield _row("python", platform.python_version())
    versions, missing = {}, []
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    for package, version in versions.items():
        yield _row(package, version)
    yield _row("not installed", ", ".join(missing) or "nothing that is looked for")
    yield _row("runtime", " ".join(devices[0].client.platform_version.split()))


def facts() -> tuple[list[Row], str]:
    """The rows, and the device's name."""
    return list(environment()), device_name()


def _row(what: str, found: str) -> Row:
    return {"section": "environment", "what": what, "found": found}
