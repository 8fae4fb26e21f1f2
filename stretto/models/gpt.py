"""A plain GPT-2: learned positions, pre-norm blocks, GELU. Radford et al. 2019.

Small enough to read, and plain enough that methods have something to change.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def next_token_loss(logits_NTV: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each token, (N, T): targets (N, T) int64 (-100 ignored), or dense (N, T, V)."""
    dense = targets.ndim == logits_NTV.ndim
    flat = F.cross_entropy(
        logits_NTV.flatten(0, 1), targets.flatten(0, 1), reduction="none", label_smoothing=label_smoothing
    )
    return flat.view(targets.shape[:2] if dense else targets.shape)


class Positions(nn.Embedding):
    """One learned vector a place: places (T,) -> (T, D). Raises ValueError where there are more places."""

    def forward(self, places_T: Tensor) -> Tensor:
        """Look them up."""
        if places_T.shape[-1] > self.num_embeddings:
            raise ValueError(
                f"{places_T.shape[-1]} tokens are more than this model's length of {self.num_embeddings}"
            )
        return super().forward(places_T)


class DenseAttention(nn.Module):
    """Each query with every key that the mask leaves it: (N, H, T, d) of each -> (N, H, T, d).

    The mask (N or 1, H or 1, T, T) is bool, True where attended, or added to the scores; None: all before.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Scaled dot products, softmax, sum."""
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


class Attention(nn.Module):
    """Causal self-attention of `heads` heads: (N, T, D) -> (N, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be shared by {heads} heads")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.attend: nn.Module = DenseAttention()
        self.value_embedding: nn.Module | None = None  # tokens (N, T) -> (N, T, D), added to the values

    def forward(self, x_NTD: Tensor, tokens_NT: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix each position with those before it, or those of the mask."""
        n, t, d = x_NTD.shape  # d of all heads, also where tensor parallelism leaves some here
        q, k, v = self.query(x_NTD), self.key(x_NTD), self.value(x_NTD)
        if self.value_embedding is not None:
            v = v + self.value_embedding(tokens_NT)
        q, k, v = (x.view(n, t, -1, d // self.heads).transpose(1, 2) for x in (q, k, v))
        y = self.attend(q, k, v, mask)
        return self.output(y.transpose(1, 2).reshape(n, t, -1))


class MLP(nn.Module):
    """Two layers with an activation between, four times as wide inside: (N, T, D) -> (N, T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 4 * width)
        self.activation: nn.Module = nn.GELU()
        self.output = nn.Linear(4 * width, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Each position on its own."""
        return self.output(self.activation(self.input(x_NTD)))


class Block(nn.Module):
    """Attention and MLP, each a residual branch behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x_NTD: Tensor, tokens_NT: Tensor, mask: Tensor | None = None) -> Tensor:
        """Add both branches to the stream."""
        x_NTD = x_NTD + self.attention(self.attention_norm(x_NTD), tokens_NT, mask=mask)
        return x_NTD + self.mlp(self.mlp_norm(x_NTD))


class GPT(nn.Module):
    """Tokens (N, T) int64 -> logits (N, T, vocabulary); learned positions allow T <= length.

    What needs more than one layer to see are options, None until a method gives them.
    """

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions: nn.Module = Positions(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.masks: nn.Module | None = None  # tokens (N, T) -> which attend to which, bool (N, 1, T, T)
        self.inputs: nn.Module | None = None  # (stream, its beginning, layer) -> what enters that block
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith("output.weight"):  # what ends a residual branch
                nn.init.normal_(parameter, std=0.02 / (2 * len(self.blocks)) ** 0.5)

    def forward(self, tokens_NT: Tensor) -> Tensor:
        """Logits of the token that follows each position."""
        places_T = torch.arange(tokens_NT.shape[1], device=tokens_NT.device)
        mask = None if self.masks is None else self.masks(tokens_NT)
        x = first = self.tokens(tokens_NT) + self.positions(places_T)
        for layer, block in enumerate(self.blocks):
            if self.inputs is not None:
                x = self.inputs(x, first, layer)
            x = block(x, tokens_NT, mask=mask)
        return self.head(self.norm(x))
