"""What is asked wrongly of many ranks is answered in one line, by one of them, and all end."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch._dynamo  # noqa: F401  # slow to import, so once, before ranks are forked
import torch.distributed as dist
from lines import RECIPE, Lines, WideLines
from torch import nn

from stretto import cli, recipes, workloads
from stretto.measure import single  # noqa: F401  # likewise


class OtherLines(Lines):
    """A model for each rank."""

    def model(self) -> nn.Module:
        self.hidden = 7 + dist.get_rank()
        return super().model()


def asked(workload: type[Lines], *options: str) -> tuple[int, str]:
    """Exit code of the command and what it says, on a rank as torchrun starts it."""
    port = [free_port()]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT=str(port[0]), TORCHELASTIC_RUN_ID="lines",
        TORCHELASTIC_MAX_RESTARTS="0",
    )  # fmt: skip
    workloads.WORKLOADS["lines"] = workload
    recipes.WORKLOADS["lines"] = SimpleNamespace(RACES={"baseline": {"baseline": (RECIPE,)}})
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        cli.main(["train", "lines", "--device", "cpu", *options])
    return ended.value.code, said.getvalue()  # type: ignore[return-value]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port


def check(says: str, workload: type[Lines], *options: str) -> None:
    (code, said), (other, also_said) = ranks.run(asked, 2, workload, *options)
    assert code == other == 2
    assert said == "" or also_said == ""
    line = said + also_said
    assert line.startswith("stretto: ") and says in line and line.count("\n") == 1, line


@pytest.mark.parametrize("says, options", [
    ("replicas=3 does not divide the 2 ranks", ("--parallel", "hsdp", "--replicas", "3")),
    ("parallel='none' with 2 ranks, each of which would train a model of its own", ()),
    ("lines has no recipe 'muom'; known: baseline", ("--parallel", "fsdp", "--recipe", "muom")),
    ("a batch of 16 cannot be cut into 3 equal slices", ("--parallel", "fsdp", "--slices", "3")),
], ids=["mesh", "none", "recipe", "slices"])  # fmt: skip
def test_what_does_not_fit(says: str, options: tuple[str, ...], tmp_path: Path) -> None:
    check(says, Lines, *options, "--out", str(tmp_path))


def test_a_rank_that_builds_another_model(tmp_path: Path) -> None:
    says = "ranks have different models: rank 1 has 0.weight (8, 5) where rank 0 has 0.weight (7, 5)"
    check(says, OtherLines, "--parallel", "ddp", "--out", str(tmp_path))


def test_a_folder_with_the_checkpoint_of_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--parallel", "fsdp", "--out", str(tmp_path))
    found = ranks.run(trained, 2, *options)
    assert found == [0, 0]
    [record] = tmp_path.glob("lines/*/*/run.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"state": "running"}))
    check("of another model: shapes differ: 0.weight (7, 5) there, (8, 5) here", WideLines, *options)


def trained(*options: str) -> int:
    from stretto.train import launch

    def leave(code: int) -> None:
        dist.init_process_group(
            "gloo", store=dist.HashStore(), rank=0, world_size=1
        )  # that the end may destroy
        raise SystemExit(code)

    launch.leave = leave  # type: ignore[assignment]
    return asked(Lines, *options)[0]
