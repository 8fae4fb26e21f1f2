"""Every parallelism computes what one process computes, and what does not fit is refused on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
import torch._dynamo  # slow to import, so once, before ranks are forked
import torch.nn.functional as F
from torch import Tensor, nn

from stretto import shards
from stretto.methods import parse
from stretto.models.gpt import GPT
from stretto.models.resnet import ResNet
from stretto.train import tensor_parallel  # noqa: F401  # likewise
from stretto.train.parallel import Execution, block_boundaries, parallelize

CLASSES = 24
pytestmark = pytest.mark.filterwarnings("ignore:.*returned a view tensor:UserWarning")  # outputs of BERT


def gpt() -> nn.Module:
    return GPT(CLASSES, length=8, width=16, depth=2, heads=4)


def resnet() -> nn.Module:
    return ResNet(channels=1, classes=CLASSES, widths=(4, 6))


def hugging_face(name: str) -> nn.Module:
    import transformers as t

    sizes: dict[str, Any] = {"vocab_size": CLASSES, "attn_implementation": "sdpa"}
    still = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    if name == "gpt2":
        drops = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=8, **drops, **sizes)
        )
    sizes |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=4, **sizes))
    return t.BertForMaskedLM(t.BertConfig(max_position_embeddings=8, **still, **sizes))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": gpt,
    "resnet": resnet,
    **{name: lambda name=name: hugging_face(name) for name in ("gpt2", "llama", "bert")},  # type: ignore[misc]
}
TRANSFORMERS = [name for name in MODELS if name != "resnet"]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # no zeros, so that no gradient is zero
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.train()


def sample(name: str, count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (count, 8)
    targets = torch.randint(0, CLASSES, shape, generator=generator)
    if name == "resnet":
        return torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64), targets[:, 0]
    return torch.randint(0, CLASSES, shape, generator=generator), targets


def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    outputs = model(inputs)
    return getattr(outputs, "logits", outputs)


def pass_through(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of the mean loss by name."""
    logits = outputs_of(model, inputs)
    F.cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()
    return logits.detach(), {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}  # type: ignore[misc]


def alone(name: str, parts: int) -> tuple[Tensor, dict[str, Tensor]]:
    """What so many ranks should find, in one process: the parts of a batch one after the other."""
    model, (inputs, targets) = build(name), sample(name)
    logits = []
    for x, y in zip(inputs.chunk(parts), targets.chunk(parts)):
        out = outputs_of(model, x)
        (F.cross_entropy(out.flatten(0, -2), y.flatten()) / parts).backward()
        logits.append(out.detach())
    return torch.cat(logits), {name: p.grad for name, p in model.named_parameters()}  # type: ignore[misc]


def spread(name: str, options: dict[str, Any], recipe: str = "") -> Any:
    """On a rank: its part of the logits, whole gradients, their layouts and the layouts of parameters."""
    execution = Execution(precision="float64", device="cpu", **options)
    mesh = execution.mesh()
    assert mesh is not None
    model = build(name)
    model = parallelize(parse(recipe).model(model) if recipe else model, execution, mesh)
    dims = [dim for dim in mesh.mesh_dim_names or () if dim != "tp"]
    data = [mesh.get_local_rank(dim) for dim in dims]
    parts = [mesh[dim].size() for dim in dims]
    mine, of = 0, 1
    for place, size in zip(data, parts):
        mine, of = mine * size + place, of * size
    inputs, targets = sample(name)
    logits, gradients = pass_through(model, inputs.chunk(of)[mine], targets.chunk(of)[mine])
    layouts = {n.removeprefix("module."): layout(p) for n, p in model.named_parameters()}
    grad_layouts = {n: layout(g) for n, g in gradients.items()}
    return mine, of, logits, {n: shards.whole(g) for n, g in gradients.items()}, layouts, grad_layouts


def layout(t: Any) -> str:
    return f"{t.device_mesh.mesh_dim_names} {t.placements}" if hasattr(t, "placements") else "plain"


def check(found: list[Any], name: str) -> None:
    of = found[0][1]
    logits, gradients = alone(name, of)
    for mine, _, ours, grads, layouts, grad_layouts in found:
        torch.testing.assert_close(ours, logits.chunk(of)[mine], rtol=1e-10, atol=1e-12)
        assert grads.keys() == gradients.keys() and layouts == grad_layouts
        for key, value in gradients.items():
            torch.testing.assert_close(
                grads[key], value, rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}"
            )


WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {"parallel": "ddp"}),
    "fsdp": (2, {"parallel": "fsdp"}),
    "fsdp on 4": (4, {"parallel": "fsdp"}),
    "hsdp": (4, {"parallel": "hsdp", "replicas": 2}),
    "tp": (2, {"parallel": "tp"}),
    "tp on 4": (4, {"parallel": "tp"}),
    "tp+fsdp": (4, {"parallel": "tp+fsdp", "tensor": 2}),
    "fsdp, checkpointing": (2, {"parallel": "fsdp", "checkpointing": True}),
    "tp+fsdp, checkpointing": (4, {"parallel": "tp+fsdp", "tensor": 2, "checkpointing": True}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_one_process(name: str, way: str) -> None:
    count, options = WAYS[way]
    if name == "resnet" and "tp" in way:
        pytest.skip("convolutions are not cut")
    check(ranks.run(spread, count, name, options), name)


# -- tensor parallelism


def cut_of(recipe: str, tensor: int = 2) -> dict[str, str]:
    execution = Execution("tp", device="cpu", tensor=tensor)
    model = parallelize(parse(recipe).model(gpt()) if recipe else gpt(), execution, execution.mesh())
    return {name: str(p.placements[0]) for name, p in model.named_parameters()}  # type: ignore[attr-defined]


CUT = {"attention.query.weight": "S(0)", "attention.query.bias": "S(0)", "attention.output.weight": "S(1)",
       "attention.output.bias": "R", "mlp.input.weight": "S(0)", "mlp.output.weight": "S(1)", "mlp.output.bias": "R",
       "mlp_norm.weight": "R"}  # fmt: skip


@pytest.mark.parametrize("recipe, whole", [
    ("", ""),
    ("squared_relu", ""),
    ("qk_norm", "attention"),  # taps count heads
    ("alibi", "attention"),  # a bias for each head
    ("value_embeddings", "attention"),
    ("sliding_window:window=4", "attention"),
    ("gated_linear_units", "mlp"),
])  # fmt: skip
def test_what_surgery_changed_stays_whole_and_computes_the_same(recipe: str, whole: str) -> None:
    for found in ranks.run(cut_of, 2, recipe):
        for name, placement in CUT.items():
            full = f"blocks.1.{name}"
            if full in found:
                assert found[full] == ("R" if whole and name.startswith(f"{whole}.") else placement), name
        assert found["tokens.weight"] == found["head.weight"] == "R"
    if recipe:
        found = ranks.run(logits_after_surgery, 2, recipe, "tp")
        for ours in found:
            torch.testing.assert_close(ours, logits_after_surgery(recipe, None), rtol=1e-10, atol=1e-12)


def logits_after_surgery(recipe: str, parallel: Any) -> Tensor:
    model = parse(recipe).model(build("gpt"))
    if parallel:
        execution = Execution(parallel, device="cpu")
        model = parallelize(model, execution, execution.mesh())
    return outputs_of(model, sample("gpt")[0]).detach()


def parameters_after(parallel: dict[str, Any]) -> dict[str, Tensor]:
    """Three AdamW steps with foreach kernels, which refuse parameters of several meshes."""
    model = build("gpt")
    if parallel:
        execution = Execution(device="cpu", **parallel)
        model = parallelize(model, execution, execution.mesh())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True)
    inputs, targets = sample("gpt")
    for _ in range(3):
        pass_through(model, inputs, targets)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
    return {name: shards.whole(p.detach()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("count, parallel", [
    (2, {"parallel": "tp"}), (4, {"parallel": "tp+fsdp", "tensor": 2}),
], ids=["tp", "tp+fsdp"])  # fmt: skip
def test_all_parameters_lie_on_one_mesh_so_that_foreach_steps(count: int, parallel: dict[str, Any]) -> None:
    expected = parameters_after({})
    for found in ranks.run(parameters_after, count, parallel):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


# -- blocks, precision, checkpointing, compiling


def test_blocks_are_wrapped_once_and_tied_ones_with_the_root() -> None:
    model: Any = gpt()
    first, second = model.blocks
    assert block_boundaries(model) == [first, second]
    second.mlp.input.weight = first.mlp.input.weight  # of two blocks: neither may be a group of its own
    assert block_boundaries(model) == []
    shared: Any = gpt()
    shared.blocks[1] = shared.blocks[0]  # one block at two places
    assert block_boundaries(shared) == [shared.blocks[0]]
    assert block_boundaries(nn.Sequential(nn.Linear(2, 2))) == []
    assert len(block_boundaries(hugging_face("llama"))) == len(block_boundaries(resnet())) == 2


def test_checkpointing_changes_no_name_no_gradient_and_no_statistic() -> None:
    for name in MODELS:
        plain, kept = build(name), build(name)
        kept = parallelize(kept, Execution(checkpointing=True, device="cpu"), None)
        expected, found = pass_through(plain, *sample(name)), pass_through(kept, *sample(name))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(kept.state_dict(), plain.state_dict(), rtol=0, atol=0)


def spread_bfloat16(name: str, parallel: str) -> tuple[torch.dtype, set[torch.dtype], Tensor]:
    torch.manual_seed(0)
    execution = Execution(parallel, precision="bfloat16", device="cpu")  # type: ignore[arg-type]
    model = parallelize(MODELS[name](), execution, execution.mesh())
    inputs, targets = sample(name)
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    logits, gradients = pass_through(model, inputs, targets)
    return logits.dtype, {g.dtype for g in gradients.values()}, logits


@pytest.mark.parametrize("name", ["gpt", "resnet"])
def test_bfloat16_computes_in_16_bits_and_keeps_32(name: str) -> None:
    torch.manual_seed(0)
    inputs = sample(name)[0]
    exact = MODELS[name]()(inputs.float() if inputs.is_floating_point() else inputs).detach()
    for parallel in ("ddp", "fsdp"):
        for dtype, gradients, logits in ranks.run(spread_bfloat16, 2, name, parallel):
            assert dtype == torch.float32 and gradients == {torch.float32}
            assert 1e-5 < (logits - exact).norm() / exact.norm() < 0.05


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own, about itself
@pytest.mark.parametrize("way", ["ddp", "fsdp", "tp", "tp+fsdp"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_compute_the_same(way: str, checkpointing: bool) -> None:
    count, options = WAYS[way]
    options = options | {"compile": True, "checkpointing": checkpointing}
    found = ranks.run(spread_compiled, count, options, seconds=250)
    check([outcome for outcome, _, _ in found], "gpt")
    assert [(graphs, breaks) for _, graphs, breaks in found] == [(1, [])] * count  # both blocks share one


def spread_compiled(options: dict[str, Any]) -> tuple[Any, int, list[str]]:
    from torch._dynamo.utils import counters

    counters.clear()  # of what tests before have compiled in the process that was forked
    outcome = spread("gpt", options)
    return outcome, counters["stats"]["unique_graphs"], list(counters["graph_break"])


# -- what does not fit


@pytest.mark.parametrize("options, says", [
    ({"parallel": "fdsp"}, "parallel 'fdsp' is unknown; did you mean fsdp"),
    ({"precision": "float16"}, "precision 'float16' is unknown"),
    ({"device": "gpu"}, "device 'gpu' is unknown"),
    ({"parallel": "fsdp", "replicas": 2}, "replicas is 2 with parallel='fsdp'"),
    ({"parallel": "tp", "tensor": 0}, "tensor is 0"),
    ({"parallel": "ddp", "meta": True}, "every rank holds all of it; use 'fsdp'"),
])  # fmt: skip
def test_words_and_numbers_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Execution(**options)


@pytest.mark.parametrize("options, says", [
    ({"parallel": "none"}, "parallel='none' with 3 ranks, each of which would train a model of its own"),
    ({"parallel": "hsdp", "replicas": 2}, "replicas=2 does not divide the 3 ranks"),
    ({"parallel": "tp+fsdp", "tensor": 2}, "tensor=2 does not divide the 3 ranks"),
    ({"parallel": "tp", "tensor": 2}, "tensor=2 with 3 ranks and parallel='tp'"),
    ({"parallel": "tp"}, "4 query heads cannot be shared equally by 3 tensor-parallel ranks"),
])  # fmt: skip
def test_a_mesh_that_does_not_fit_is_one_error_on_every_rank(options: dict[str, Any], says: str) -> None:
    for outcome in ranks.outcomes(refused, 3, "gpt", options):
        assert isinstance(outcome, str) and says in outcome


def refused(name: str, options: dict[str, Any]) -> str | None:
    try:
        execution = Execution(device="cpu", **options)
        parallelize(MODELS[name](), execution, execution.mesh())
    except ValueError as error:
        return str(error)
    return None


def test_models_that_roles_do_not_know_are_not_cut() -> None:
    for outcome in ranks.outcomes(refused, 2, "resnet", {"parallel": "tp"}):
        assert "tensor parallelism looks for attention and found none in ResNet" in outcome
        assert 'use parallel="fsdp"' in outcome


def test_a_world_without_a_process_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"WORLD_SIZE=2, but there is no process group; call .*init_process_group"
    ):
        Execution("fsdp").mesh()


def test_alone_nothing_is_shared_out() -> None:
    for parallel in ("ddp", "fsdp", "hsdp", "tp", "tp+fsdp"):
        execution = Execution(parallel, device="cpu")  # type: ignore[arg-type]
        model = gpt()
        assert execution.mesh() is None and parallelize(model, execution, None) is model


def sides(options: dict[str, Any]) -> dict[str, int]:
    mesh = Execution(device="cpu", **options).mesh()
    assert mesh is not None and mesh.mesh_dim_names is not None
    return dict(zip(mesh.mesh_dim_names, mesh.shape))


@pytest.mark.parametrize("options, expected", [
    ({"parallel": "hsdp"}, {"replicate": 2, "shard": 2}),
    ({"parallel": "tp+fsdp"}, {"dp": 2, "tp": 2}),
    ({"parallel": "ddp"}, {"replicate": 4}),
])  # fmt: skip
def test_a_mesh_follows_the_machines(
    options: dict[str, Any], expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two machines of two ranks
    assert ranks.run(sides, 4, options) == [expected] * 4
