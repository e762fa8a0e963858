"""What this machine offers to gapfx."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from gapfx.kernels import native

_PACKAGES = ("gapfx", "torch", "deepspeed", "networkx", "einops", "safetensors", "typer", "rich")


def examine() -> dict[str, Any]:
    """Versions, device, processors, memory in bytes, and what each lacking part costs."""
    versions = {name: _version(name) for name in _PACKAGES}
    has_cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "packages": versions,
        "device": torch.cuda.get_device_name(0) if has_cuda else "cpu",
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "kernels": native.level() or f"torch's, the native ones are {native.missing_reason()}",
        "memory_bytes": psutil.virtual_memory().total,
        "distributed_backends": [
            name
            for name in ("gloo", "nccl")
            if getattr(torch.distributed, f"is_{name}_available")() and (name == "gloo" or has_cuda)
        ],
        "notes": [f"{name} is not installed: gapfx needs it" for name, version in versions.items() if not version],
    }


def format_findings(findings: dict[str, Any]) -> str:
    """The findings as aligned text."""
    rows = {
        "python": findings["python"],
        **{name: version or "missing" for name, version in findings["packages"].items()},
        "device": findings["device"],
        "processors": f"{findings['num_cpus']}, torch uses {findings['num_threads']}",
        "kernels": findings["kernels"],
        "memory": f"{findings['memory_bytes'] / 2**30:.1f} GiB",
        "backends": ", ".join(findings["distributed_backends"]),
    }
    width = max(map(len, rows))
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows.items()), *findings["notes"]])


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
