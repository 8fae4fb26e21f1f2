"""The catalogue of methods, and the readers of a recipe's short and JSON forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from stretto.core import Method, Recipe, change, nearest
from stretto.methods import _cards, _pages, _reading
from stretto.methods.adamw import AdamW
from stretto.methods.adaptive_gradient_clipping import AdaptiveGradientClipping
from stretto.methods.alibi import ALiBi
from stretto.methods.alternating_flip import AlternatingFlip
from stretto.methods.aug_mix import AugMix
from stretto.methods.batch_size_warmup import BatchSizeWarmup
from stretto.methods.bfloat16 import BFloat16
from stretto.methods.binary_cross_entropy import BinaryCrossEntropy
from stretto.methods.blur_pool import BlurPool
from stretto.methods.cautious_weight_decay import CautiousWeightDecay
from stretto.methods.channels_last import ChannelsLast
from stretto.methods.colout import ColOut
from stretto.methods.cosine import Cosine
from stretto.methods.cutmix import CutMix
from stretto.methods.cutout import Cutout
from stretto.methods.dice import Dice
from stretto.methods.dirac_init import DiracInit
from stretto.methods.document_packing import DocumentPacking
from stretto.methods.either import Either
from stretto.methods.ema import EMA
from stretto.methods.ema_nesterov import EMANesterov
from stretto.methods.factorize import Factorize
from stretto.methods.fix_res import FixRes
from stretto.methods.float8 import Float8
from stretto.methods.gated_linear_units import GatedLinearUnits
from stretto.methods.ghost_batch_norm import GhostBatchNorm
from stretto.methods.gradient_clipping import GradientClipping
from stretto.methods.gradient_value_clipping import GradientValueClipping
from stretto.methods.gyro_dropout import GyroDropout
from stretto.methods.hyperball import Hyperball
from stretto.methods.label_smoothing import LabelSmoothing
from stretto.methods.layer_freezing import LayerFreezing
from stretto.methods.linear_to_zero import LinearToZero
from stretto.methods.lion import Lion
from stretto.methods.logit_soft_cap import LogitSoftCap
from stretto.methods.lookahead import Lookahead
from stretto.methods.low_precision_norm import LowPrecisionNorm
from stretto.methods.mixup import MixUp
from stretto.methods.muon import Muon
from stretto.methods.ngram_embeddings import NGramEmbeddings
from stretto.methods.patch_dropout import PatchDropout
from stretto.methods.patch_whitening import PatchWhitening
from stretto.methods.power_cool import PowerCool
from stretto.methods.primal_averaging import PrimalAveraging
from stretto.methods.progressive_layer_drop import ProgressiveLayerDrop
from stretto.methods.progressive_resizing import ProgressiveResizing
from stretto.methods.qk_norm import QKNorm
from stretto.methods.rand_augment import RandAugment
from stretto.methods.random_token_dropping import RandomTokenDropping
from stretto.methods.residual_scalars import ResidualScalars
from stretto.methods.rotary_positions import RotaryPositions
from stretto.methods.sam import SAM
from stretto.methods.schedule_free import ScheduleFree
from stretto.methods.selective_backprop import SelectiveBackprop
from stretto.methods.sequence_length_warmup import SequenceLengthWarmup
from stretto.methods.sgd import SGD
from stretto.methods.shampoo import Shampoo
from stretto.methods.short_convolution import ShortConvolution
from stretto.methods.sliding_window import SlidingWindow
from stretto.methods.soap import SOAP
from stretto.methods.squared_relu import SquaredReLU
from stretto.methods.squeeze_excite import SqueezeExcite
from stretto.methods.stochastic_depth import StochasticDepth
from stretto.methods.swa import SWA
from stretto.methods.test_time_augmentation import TestTimeAugmentation
from stretto.methods.token_smearing import TokenSmearing
from stretto.methods.type_rates import TypeRates
from stretto.methods.unpadding import Unpadding
from stretto.methods.update_floor import UpdateFloor
from stretto.methods.value_embeddings import ValueEmbeddings
from stretto.methods.warmup_stable_decay import WarmupStableDecay
from stretto.methods.weight_standardization import WeightStandardization
from stretto.methods.z_loss import ZLoss
from stretto.methods.zero_init_residual import ZeroInitResidual

CATALOGUE: dict[str, type[Method]] = {
    method.name: method
    for method in (
        # data and schedules
        WarmupStableDecay, Cosine, LinearToZero, PowerCool, BatchSizeWarmup,
        # convolutional models
        BlurPool, SqueezeExcite, WeightStandardization, GhostBatchNorm, ChannelsLast, PatchWhitening, Factorize,
        # transformers
        ALiBi, GatedLinearUnits, LogitSoftCap, ResidualScalars, TokenSmearing, SlidingWindow, DocumentPacking,
        RotaryPositions, SquaredReLU, QKNorm, ShortConvolution, NGramEmbeddings, ValueEmbeddings,
        # depth, tokens and precision
        StochasticDepth, ProgressiveLayerDrop, LayerFreezing, RandomTokenDropping, PatchDropout, Unpadding,
        BFloat16, Float8, LowPrecisionNorm, GyroDropout,
        # first values and rates of parameters
        ZeroInitResidual, DiracInit, TypeRates,
        # batches
        ProgressiveResizing, AlternatingFlip, RandAugment, AugMix, ColOut, Cutout, CutMix,
        SequenceLengthWarmup, MixUp, Either,
        # losses, passes, selection
        BinaryCrossEntropy, Dice, ZLoss, SAM, SelectiveBackprop,
        LabelSmoothing,
        # the step
        AdamW, SGD, Muon, Shampoo, SOAP, Lion, Hyperball, CautiousWeightDecay, UpdateFloor,
        ScheduleFree, PrimalAveraging, EMANesterov, Lookahead,
        GradientClipping, GradientValueClipping, AdaptiveGradientClipping,
        # averages and prediction
        FixRes, TestTimeAugmentation,
        EMA, SWA,
    )
}  # fmt: skip


def find(name: str) -> type[Method]:
    """The method of this name, in any case, with or without hyphens. Raises ValueError with the nearest."""
    plain = {_plain(known): method for known, method in CATALOGUE.items()}
    if _plain(name) not in plain:
        raise ValueError(f"there is no method {name!r}; {nearest(name.strip().lower(), CATALOGUE)}")
    return plain[_plain(name)]


def parse(text: str) -> Recipe:
    """A recipe from its short form: "mixup:alpha=0.4, muon:lr=0.02:weight_decay=0.1".

    Methods between commas, fields between colons; brackets protect both: `either:first=(mixup:alpha=0.4)`.
    Raises ValueError for unknown methods and fields, with the nearest names, and for values of another type.
    """
    return Recipe(*(_parse_method(piece) for piece in _reading.split(text, ",") if piece))


def from_json(data: Mapping[str, Any]) -> Recipe:
    """A recipe from what `Recipe.to_json` gave, or the same with fields left out. Raises as `parse` does."""
    methods = data.get("methods") if isinstance(data, Mapping) else None
    if not isinstance(methods, list):
        raise ValueError('a recipe in JSON is {"methods": [{"method": name, field: value, ...}, ...]}')
    return Recipe(*map(_method_from_json, methods))


def card(name: str) -> str:
    """What there is to know about one method, as plain text."""
    lines = _pages.render(_pages.page(_cards.card(find(name))))
    return "\n".join((head + text).rstrip() for head, text, _ in lines)


def cards() -> list[_cards.Card]:
    """What there is to know about each method, in parts."""
    return [_cards.card(method) for method in CATALOGUE.values()]


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "").replace("-", "")


def _parse_method(text: str) -> Method:
    name, *assignments = _reading.split(_reading.unwrap_brackets(text), ":")
    if "=" in name:
        raise ValueError(f"{name!r} is no method; a field follows its method after a colon: method:{name}")
    method = find(name)
    values: dict[str, Any] = {}
    for assignment in assignments:
        field, equals, value = assignment.partition("=")
        if not equals:
            first = next((f.name for f in dataclasses.fields(method)), "field")  # type: ignore[arg-type]
            raise ValueError(f"{method.name}: {assignment!r} names no field; write {first}={assignment}")
        if field.strip() in values:
            raise ValueError(f"{method.name}: {field.strip()} is given twice")
        values[field.strip()] = _reading.literal(value.strip())
    return _make(method, values)


def _method_from_json(data: Any) -> Method:
    if not isinstance(data, Mapping) or not isinstance(data.get("method"), str):
        raise ValueError(f'a method in JSON is {{"method": name, field: value, ...}}, not {data!r}')
    return _make(find(data["method"]), {key: value for key, value in data.items() if key != "method"})


def _make(method: type[Method], values: dict[str, Any]) -> Method:
    read = _reading.read_fields(method, values, _nested)
    required = [f.name for f in dataclasses.fields(method) if f.default is dataclasses.MISSING]  # type: ignore[arg-type]
    if missing := [name for name in required if name not in read]:
        raise ValueError(f"{method.name} needs {' and '.join(missing)}")
    return change(method(**{name: read.pop(name) for name in required}), **read)


def _nested(value: Any) -> Method:
    return _parse_method(value) if isinstance(value, str) else _method_from_json(value)


__all__ = ["CATALOGUE", "card", "cards", "find", "from_json", "parse"]  # and each method by its class name
