"""The smallest plain PyTorch that does what each method does, and the cases that set both side by side."""

from by_hand import (  # noqa: F401  # each enters its cases
    averages,
    batches,
    convolutional,
    image_operations,
    losses,
    partial,
    passes,
    precision,
    steps,
    transformers,
)
from by_hand._cases import CASES, HOSTS, Case, Entry, forward_backward, seeded, snapshot

NO_COST = {
    "batch_size_warmup": "host arithmetic, a factor a step",
    "cosine": "host arithmetic, a factor a step",
    "linear_to_zero": "host arithmetic, a factor a step",
    "power_cool": "host arithmetic, a factor a step",
    "warmup_stable_decay": "host arithmetic, a factor a step",
    "type_rates": "read once, when groups are made; adds groups, each an optimizer call a step",
    "zero_init_residual": "runs once, before the first step",
    "dirac_init": "runs once, before the first step",
    "shampoo": "timed by optimizer_step.py, beside the bare products of the same blocks",
    "soap": "timed by optimizer_step.py, beside the bare products of the same blocks",
}

__all__ = ["CASES", "HOSTS", "NO_COST", "Case", "Entry", "forward_backward", "seeded", "snapshot"]
