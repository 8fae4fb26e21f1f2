"""A model that fits on no rank starts sharded, with the values of one process."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import ranks
import torch
from test_parallel import MODELS, gpt
from torch import Tensor, nn

from stretto import shards
from stretto.core import stream
from stretto.methods import parse
from stretto.models.gpt import GPT
from stretto.train import scattered
from stretto.train.parallel import Execution, start


def make(name: str, recipe: str = "") -> nn.Module:
    with stream(3):
        model = MODELS[name]()
    return parse(recipe).model(model, 5) if recipe else model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: shards.whole(tensor.detach()).clone() for name, tensor in named}


def started(name: str, recipe: str, options: dict[str, Any]) -> dict[str, Tensor]:
    execution = Execution(device="cpu", meta=True, **options)
    model = start(functools.partial(make, name, recipe), execution, execution.mesh())
    found = tensors(model)
    model(torch.zeros(2, 4, dtype=torch.int64) if name != "resnet" else torch.zeros(2, 1, 6, 6))
    return found


SURGERY = "rotary_positions, zero_init_residual, gated_linear_units"


@pytest.mark.parametrize("name, recipe, options", [
    ("gpt", "", {"parallel": "fsdp"}),
    ("gpt", "", {"parallel": "tp"}),
    ("gpt", SURGERY, {"parallel": "tp+fsdp", "tensor": 2}),
    ("gpt", "factorize:min_size=16", {"parallel": "fsdp"}),
    ("resnet", "", {"parallel": "hsdp", "replicas": 2}),
    ("llama", "", {"parallel": "tp+fsdp", "tensor": 2}),
    ("gpt2", "", {"parallel": "tp+fsdp", "tensor": 2}),
    ("bert", "", {"parallel": "tp+fsdp", "tensor": 2}),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*returned a view tensor:UserWarning")
def test_values_and_buffers_are_those_of_a_plain_start(
    name: str, recipe: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scattered, "WINDOW", 1 << 10)
    monkeypatch.setattr(scattered, "SMALL", 64)  # so that these small models are cut
    expected = tensors(make(name, recipe))
    for found in ranks.run(started, 4, name, recipe, options):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), key


def large() -> nn.Module:
    return GPT(vocabulary=256, length=64, width=256, depth=8, heads=4)


def high_water(meta: bool) -> tuple[int, int]:
    """How much more memory than before a rank had at the highest, and the model's size, in bytes."""
    execution = Execution("fsdp", device="cpu", meta=meta)
    start(gpt, execution, execution.mesh())  # imports
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts anew
    model = start(large, execution, execution.mesh())
    return _status("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters())


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def test_no_rank_ever_holds_the_model() -> None:
    """A quarter of it beside the window of two matrices, where a plain start holds all.

    In a process of its own: what tests before have freed would be used again, and nothing be seen to grow.
    """
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 16)
    }  # larger tensors are given back when freed
    measured = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert measured.returncode == 0, measured.stderr
    plain, sharded = json.loads(measured.stdout)
    size = plain[0][1]
    assert size > 25e6
    assert min(high for high, _ in plain) > 0.9 * size
    assert max(high for high, _ in sharded) < 0.6 * size, [high / size for high, _ in (*plain, *sharded)]


def tied(options: dict[str, Any]) -> tuple[bool, list[str]]:
    execution = Execution(device="cpu", meta=True, **options)
    model: Any = start(functools.partial(make, "gpt2"), execution, execution.mesh())
    return model.lm_head.weight is model.transformer.wte.weight, [
        name for name, _ in model.named_parameters()
    ]


@pytest.mark.parametrize("parallel", ["fsdp", "tp"])
def test_tied_weights_stay_tied(parallel: str) -> None:
    names = [name for name, _ in make("gpt2").named_parameters()]
    assert ranks.run(tied, 2, {"parallel": parallel}) == [(True, names)] * 2


if __name__ == "__main__":
    scattered.WINDOW = 1 << 21
    print(json.dumps([ranks.run(high_water, 4, meta) for meta in (False, True)]))
