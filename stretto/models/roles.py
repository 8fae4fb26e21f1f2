"""Which module of a model is what: one table per model family, so that a method is written once.

A family is told by the class of its body, wherever that stands: inside a task's model, or inside peft's.
Classes are named, not imported, so that no library is loaded for the sake of a model that is not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from stretto.models.attach import Child, Section


@dataclass(frozen=True)
class AttentionRoles:
    """The parts of one attention layer."""

    module: nn.Module  # whose forward takes a mask of scores under the name `mask`
    query: Section
    key: Section
    value: Section
    output: nn.Module  # from the heads, side by side, to the stream
    causal: bool
    mask: str = "attention_mask"  # bool, True where attended, or added to the scores; (N or 1, H or 1, T, T)


@dataclass(frozen=True)
class MLPRoles:
    """The parts of one MLP: output(activation(input(x)))."""

    input: Child
    activation: Child
    output: Child


@dataclass(frozen=True)
class GatedMLPRoles:
    """The parts of one gated MLP: output(activation(gate(x)) * input(x))."""

    gate: Child
    input: Child
    output: Child


@dataclass(frozen=True)
class Roles:
    """The parts of a model that methods ask for; those of a stack come in its order."""

    family: str = ""
    tokens: nn.Embedding | None = None
    positions: Child | None = None  # learned positions: a layer from positions (T,) or (1, T) to vectors
    rotations: Child | None = None  # the layer that gives (cos, sin) of rotary positions
    attentions: tuple[AttentionRoles, ...] = ()
    mlps: tuple[MLPRoles, ...] = ()  # ungated ones
    gated_mlps: tuple[GatedMLPRoles, ...] = ()
    blocks: tuple[nn.Module, ...] = ()  # all in order; transformer blocks map the stream (N, T, D) to itself
    residual_ends: tuple[nn.Module, ...] = ()  # the last layer of each residual branch: its weight scales it
    stem: Child | None = None  # the first convolution of a convolutional net
    patches: nn.Module | None = None  # gives the stream of patches (N, prefix + patches, D)
    prefix: int = 0  # tokens before the patches
    heads: tuple[nn.Module, ...] = ()  # the layers that give the outputs

    @property
    def is_convolutional(self) -> bool:
        """Whether blocks map images (N, C, H, W)."""
        return self.stem is not None


Sections = tuple[Section, Section, Section]


def _separate(attention: Any, names: tuple[str, str, str], heads: tuple[int, int], size: int) -> Sections:
    query, key, value = (getattr(attention, name) for name in names)
    return (
        Section(query, "query", heads[0], size),
        Section(key, "key", heads[1], size),
        Section(value, "value", heads[1], size),
    )


def _fused(layer: nn.Module, heads: int, size: int) -> Sections:
    return (
        Section(layer, "query", heads, size, 0, 3),
        Section(layer, "key", heads, size, 1, 3),
        Section(layer, "value", heads, size, 2, 3),
    )


def _gpt(model: Any) -> Roles:
    blocks: list[Any] = list(model.blocks)
    attentions = []
    for a in (block.attention for block in blocks):
        size = a.query.out_features // a.heads
        sections = _separate(a, ("query", "key", "value"), (a.heads, a.heads), size)
        attentions.append(AttentionRoles(a, *sections, a.output, causal=True, mask="mask"))
    return Roles(
        family="GPT",
        tokens=model.tokens,
        positions=_learned(model, "positions"),
        attentions=tuple(attentions),
        mlps=tuple(_mlp(block.mlp, "input", "activation", "output") for block in blocks),
        blocks=tuple(blocks),
        residual_ends=tuple(end for block in blocks for end in (block.attention.output, block.mlp.output)),
        heads=(model.head,),
    )


def _gpt2(body: Any) -> Roles:
    blocks: list[Any] = list(body.h)
    attentions = [
        AttentionRoles(a, *_fused(a.c_attn, a.num_heads, a.head_dim), a.c_proj, causal=True)
        for a in (block.attn for block in blocks)
    ]
    return Roles(
        family="GPT-2",
        tokens=body.wte,
        positions=_learned(body, "wpe"),
        attentions=tuple(attentions),
        mlps=tuple(_mlp(block.mlp, "c_fc", "act", "c_proj") for block in blocks),
        blocks=tuple(blocks),
        residual_ends=tuple(end for block in blocks for end in (block.attn.c_proj, block.mlp.c_proj)),
    )


def _bert(body: Any) -> Roles:
    blocks: list[Any] = list(body.encoder.layer)
    attentions, mlps = [], []
    for block in blocks:
        a = block.attention.self
        heads, size = a.num_attention_heads, a.attention_head_size
        sections = _separate(a, ("query", "key", "value"), (heads, heads), size)
        end = block.attention.output.dense
        attentions.append(AttentionRoles(a, *sections, end, causal=bool(a.is_causal)))
        inner, outer = block.intermediate, block.output
        mlps.append(
            MLPRoles(Child(inner, "dense"), Child(inner, "intermediate_act_fn"), Child(outer, "dense"))
        )
    return Roles(
        family="BERT",
        tokens=body.embeddings.word_embeddings,
        positions=_learned(body.embeddings, "position_embeddings"),
        attentions=tuple(attentions),
        mlps=tuple(mlps),
        blocks=tuple(blocks),
        residual_ends=tuple(
            end for block in blocks for end in (block.attention.output.dense, block.output.dense)
        ),
    )


def _llama(body: Any) -> Roles:
    blocks: list[Any] = list(body.layers)
    attentions = []
    for a in (block.self_attn for block in blocks):
        heads = (a.config.num_attention_heads, a.config.num_key_value_heads)
        sections = _separate(a, ("q_proj", "k_proj", "v_proj"), heads, a.head_dim)
        attentions.append(AttentionRoles(a, *sections, a.o_proj, causal=True))
    return Roles(
        family="Llama",
        tokens=body.embed_tokens,
        rotations=Child(body, "rotary_emb"),
        attentions=tuple(attentions),
        gated_mlps=tuple(
            GatedMLPRoles(*(Child(block.mlp, name) for name in ("gate_proj", "up_proj", "down_proj")))
            for block in blocks
        ),
        blocks=tuple(blocks),
        residual_ends=tuple(end for block in blocks for end in (block.self_attn.o_proj, block.mlp.down_proj)),
    )


def _hf_vit(body: Any) -> Roles:
    blocks: list[Any] = list(body.layers)
    attentions = []
    for a in (block.attention for block in blocks):
        heads = (a.num_attention_heads, a.num_attention_heads)
        sections = _separate(a, ("q_proj", "k_proj", "v_proj"), heads, a.head_dim)
        attentions.append(AttentionRoles(a, *sections, a.o_proj, causal=False))
    return Roles(
        family="ViT",
        attentions=tuple(attentions),
        mlps=tuple(_mlp(block.mlp, "fc1", "activation_fn", "fc2") for block in blocks),
        blocks=tuple(blocks),
        residual_ends=tuple(end for block in blocks for end in (block.attention.o_proj, block.mlp.fc2)),
        patches=body.embeddings,
        prefix=1,
    )


def _timm_vit(model: Any) -> Roles:
    blocks: list[Any] = list(model.blocks)
    attentions = [
        AttentionRoles(a, *_fused(a.qkv, a.num_heads, a.head_dim), a.proj, causal=False, mask="attn_mask")
        for a in (block.attn for block in blocks)
    ]
    return Roles(
        family="ViT",
        attentions=tuple(attentions),
        mlps=tuple(_mlp(block.mlp, "fc1", "act", "fc2") for block in blocks),
        blocks=tuple(blocks),
        residual_ends=tuple(end for block in blocks for end in (block.attn.proj, block.mlp.fc2)),
        patches=model.patch_drop,
        prefix=model.num_prefix_tokens,
        heads=(model.head,) if isinstance(model.head, nn.Linear) else (),
    )


RESIDUAL_BLOCKS = {  # convolutional ones, each with the norm that ends its branch
    "stretto.models.resnet.ResidualBlock": "norm2",
    "torchvision.models.resnet.BasicBlock": "bn2",
    "torchvision.models.resnet.Bottleneck": "bn3",
    "timm.models.resnet.BasicBlock": "bn2",
    "timm.models.resnet.Bottleneck": "bn3",
}


def _resnet(model: Any) -> Roles:
    """ResNets and what is built on them: blocks are known by their class, the stem is the first convolution."""
    found = [(m, RESIDUAL_BLOCKS[n]) for m in model.modules() for n in _classes(m) if n in RESIDUAL_BLOCKS]
    stem = next(
        (
            Child(owner, name)
            for owner in model.modules()
            for name, child in owner.named_children()
            if isinstance(child, nn.Conv2d)
        ),
        None,
    )
    return Roles(
        family="ResNet",
        blocks=tuple(block for block, _ in found),
        residual_ends=tuple(getattr(block, end) for block, end in found),
        stem=stem,
    )


def _deeplab(model: Any) -> Roles:
    heads = [part[-1] for part in (model.classifier, model.aux_classifier) if part is not None]
    parts = _resnet(model.backbone)
    return Roles("DeepLabV3", blocks=parts.blocks, residual_ends=parts.residual_ends, stem=parts.stem,
                 heads=tuple(heads))  # fmt: skip


FAMILIES: dict[str, Callable[[Any], Roles]] = {  # class of a model's body -> how to read it
    "stretto.models.gpt.GPT": _gpt,
    "stretto.models.resnet.ResNet": _resnet,
    "transformers.models.gpt2.modeling_gpt2.GPT2Model": _gpt2,
    "transformers.models.bert.modeling_bert.BertModel": _bert,
    "transformers.models.llama.modeling_llama.LlamaModel": _llama,
    "transformers.models.vit.modeling_vit.ViTModel": _hf_vit,
    "torchvision.models.resnet.ResNet": _resnet,
    "torchvision.models.segmentation.deeplabv3.DeepLabV3": _deeplab,
    "timm.models.resnet.ResNet": _resnet,
    "timm.models.vision_transformer.VisionTransformer": _timm_vit,
}


def roles(model: nn.Module) -> Roles:
    """The parts of this model; a model of no known family has none."""
    for body in model.modules():
        for name in _classes(body):
            if name in FAMILIES:
                parts = FAMILIES[name](body)
                return parts if parts.heads else _with_heads(parts, model, body)
    return Roles()


def nothing_found(method: str, what: str, model: nn.Module) -> ValueError:
    """The error of a method that found nothing to change."""
    known = ", ".join(f"{name.split('.')[0]}'s {name.split('.')[-1]}" for name in FAMILIES)
    return ValueError(f"{method} looks for {what} and found none in {type(model).__name__}; it knows {known}")


def parameter_kinds(model: nn.Module) -> dict[str, str]:
    """Each parameter's kind: "embedding", "head", "matrix" (two or more dimensions) or "vector".

    Where the family is unknown, the head is the last Linear.
    """
    heads: tuple[Any, ...] = roles(model).heads
    if not heads:
        heads = tuple(module for module in model.modules() if isinstance(module, nn.Linear))[-1:]
    kinds: dict[str, str] = {}
    special = {id(m.weight): "embedding" for m in model.modules() if isinstance(m, nn.Embedding)}
    special |= {id(head.weight): "head" for head in heads}
    for name, parameter in model.named_parameters():
        plain = "matrix" if parameter.squeeze().ndim >= 2 else "vector"
        kinds[name] = special.get(id(parameter), plain) if parameter.ndim >= 2 else plain
    return kinds


def _classes(module: nn.Module) -> Iterator[str]:
    """The full names of a module's class and of those it inherits."""
    return (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)


def _learned(owner: nn.Module, name: str) -> Child | None:
    return Child(owner, name) if isinstance(getattr(owner, name), nn.Embedding) else None


def _mlp(owner: nn.Module, *names: str) -> MLPRoles:
    return MLPRoles(*(Child(owner, name) for name in names))


def _with_heads(parts: Roles, model: nn.Module, body: nn.Module) -> Roles:
    """The head is the last Linear outside a transformer's body, or the last one of a convolutional net."""
    inside = set() if parts.is_convolutional else set(body.modules())
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m not in inside]
    return dataclasses.replace(parts, heads=tuple(heads[-1:]))
