"""Channels last: images lie in memory pixel by pixel (NHWC). Fedyunin 2020, a tutorial of PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stretto.core import At, Batch, BatchMethod, ModelMethod, Phase, map_data
from stretto.methods._convolutions import channels_last
from stretto.methods._images import is_images


@dataclass(frozen=True)
class ChannelsLast(ModelMethod, BatchMethod):
    """Lays out kernels and images (N, C, H, W) as the convolutions of GPUs with tensor cores want them.

    Values and shapes stay; layers between pass the format on. In evaluation the kernels' format decides.
    `fully_shard` refuses kernels in this format. The trainer gives it contiguous ones, which each pass in training
    copies into that of the images; in a loop of your own, `p.data = p.data.contiguous()` before it does the same.
    Cost: a copy of each batch; kernels are copied once.
    Evidence: 1.5x on GPUs by Composer's card, in half precision. On CPUs it depends on the layers.
    Raises ValueError where no parameter has four dimensions, and where all lie so already.
    """

    phases = (Phase.LAYOUT,)

    def model(self, model: nn.Module) -> nn.Module:
        """Lay out the kernels."""
        kernels = [parameter for parameter in model.parameters() if parameter.ndim == 4]
        if not kernels:
            raise ValueError(
                f"ChannelsLast looks for kernels of four dimensions and found none in {type(model).__name__}"
            )
        for kernel in kernels:
            kernel.data = channels_last(kernel.data)
        return model

    def batch(self, batch: Batch, at: At) -> Batch:
        """Lay out the images."""
        return batch._replace(inputs=map_data(_laid_out, batch.inputs))


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if is_images(x) else x
