"""What is found here: torch, devices, extras and data, and what to do where something is amiss."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

EXTRAS = {
    "scikit-learn": ("sklearn", "the workload digits: pip install 'stretto[vision]'"),
    "torchvision": ("torchvision", "third-party vision models"),
    "timm": ("timm", "third-party vision models"),
    "transformers": ("transformers", "third-party language models"),
}
DATA_VARIABLE = "STRETTO_DATA"


def findings(data: Path | None = None) -> list[tuple[str, str]]:
    """Pairs (what, what was found); `data` is the data folder, else that of STRETTO_DATA."""
    import torch

    from stretto import __version__
    from stretto.workloads import WORKLOADS

    found = [
        ("stretto", __version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads on {os.cpu_count()} cores"),
        ("accelerator", _accelerator()),
    ]
    for name, (module, use) in EXTRAS.items():
        found.append((name, _extra(name, module, use)))
    found.append(("data folder", _data(data)))
    for name, workload in WORKLOADS.items():
        found.append((f"workload {name}", _workload(workload)))
    return found


def _accelerator() -> str:
    import torch

    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return "none; everything runs on the CPU"


def _extra(name: str, module: str, use: str) -> str:
    if importlib.util.find_spec(module) is None:
        return f"not installed; for {use}"
    version = importlib.metadata.version(name)
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever an import can raise is what the user wants to be told
        return f"{version}, but it cannot be imported ({str(error).splitlines()[0]}); {_way_out(name)}"
    return version


def _way_out(name: str) -> str:
    if name == "torchvision":
        return "its wheel wants the CUDA build of torch; install the build that matches your torch"
    return f"reinstall it: pip install --force-reinstall {name}"


def _data(data: Path | None) -> str:
    folder = data or (Path(os.environ[DATA_VARIABLE]) if DATA_VARIABLE in os.environ else None)
    if folder is None:
        return f"none named; give --data FOLDER or set {DATA_VARIABLE}"
    if not folder.is_dir():
        return f"{folder} is no folder"
    sets = sorted(path.name for path in folder.iterdir() if path.is_dir())
    return f"{folder}: {', '.join(sets) or 'empty'}"


def _workload(workload: type) -> str:
    try:
        made = workload()
    except ValueError as error:
        return str(error)
    if made.fingerprint == made.measured_on:
        return f"data {made.fingerprint}, on which its targets were measured"
    return (
        f"data {made.fingerprint}; its targets were measured on {made.measured_on}, so races give no verdict"
    )
