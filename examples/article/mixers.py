"""Language models that differ only in how they mix tokens: the contenders of compare_mixers.py.

All are called as ``logits, state = model(tokens, state)``, as `torch_rwkv6.nn.RWKV6` is: a
sequence may come in pieces, and ``state`` is all that a model keeps of the previous tokens. The
families differ in its size: a few vectors (LSTM, GRU, RWKV-4), a matrix per head (RWKV-6), or
something for every token so far (attention, AFT).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from torch_rwkv6.nn import RWKV4, RWKV6

NAMES = ("lstm", "gru", "attention", "aft", "rwkv4", "rwkv6")
TITLES = dict(zip(NAMES, ("LSTM", "GRU", "attention", "AFT", "RWKV-4", "RWKV-6"), strict=True))


def build(
    name: str, vocab_size: int, n_layer: int, n_embd: int, head_size: int, max_len: int
) -> nn.Module:
    """The model so named, as wide as RWKV-6 and with as many parameters.

    The hidden width of its feed-forward halves makes up for what its mixer lacks or has too much.
    ``max_len`` is the longest sequence of AFT, whose position biases are a table.
    """
    rwkv6 = RWKV6(vocab_size, n_layer, n_embd, head_size, lora_mix=16, lora_decay=16)
    if name == "rwkv6":
        return rwkv6
    mixer = {
        "lstm": lambda: Recurrent(nn.LSTM, n_embd),
        "gru": lambda: Recurrent(nn.GRU, n_embd),
        "attention": lambda: Attention(n_embd, head_size),
        "aft": lambda: AFT(n_embd, max_len),
    }

    def model(n_ffn: int) -> nn.Module:
        if name == "rwkv4":
            return RWKV4(vocab_size, n_layer, n_embd, n_ffn=n_ffn)
        return LanguageModel(vocab_size, n_layer, n_embd, mixer[name], n_ffn)

    one, two = parameters(model(1)), parameters(model(2))
    return model(max(n_embd, 1 + round((parameters(rwkv6) - one) / (two - one))))


def parameters(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


class LanguageModel(nn.Module):
    """The architecture of RWKV4 and RWKV6 around any mixer."""

    def __init__(
        self,
        vocab_size: int,
        n_layer: int,
        n_embd: int,
        mixer: Callable[[], nn.Module],
        n_ffn: int,
    ) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab_size, n_embd)
        self.blocks = nn.ModuleList(
            Block(n_embd, mixer(), MLP(n_embd, n_ffn), first=layer == 0) for layer in range(n_layer)
        )
        self.ln_out = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(self.head.weight, 0.5 * max(1.0, math.sqrt(vocab_size / n_embd)))

    def forward(
        self,
        tokens: Tensor,  # [B, T]
        state: list[Any] | None = None,  # of the piece before
    ) -> tuple[Tensor, list[Any]]:  # [B, T, V]
        x = self.emb(tokens)  # [B, T, D]
        new = []
        for block, layer in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            x, layer = block(x, layer)
            new.append(layer)
        return self.head(self.ln_out(x)), new


class Block(nn.Module):
    """x + att(ln1(x)), then x + ffn(ln2(x)); ln0 in front of the first block."""

    def __init__(self, n_embd: int, att: nn.Module, ffn: nn.Module, first: bool) -> None:
        super().__init__()
        self.ln0 = nn.LayerNorm(n_embd) if first else nn.Identity()
        self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.att, self.ffn = att, ffn

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        x = self.ln0(x)
        y, state = self.att(self.ln1(x), state)
        x = x + y
        return x + self.ffn(self.ln2(x)), state


class MLP(nn.Module):
    """The Transformer's feed-forward half, with RWKV's squared ReLU."""

    def __init__(self, n_embd: int, n_ffn: int) -> None:
        super().__init__()
        self.key = nn.Linear(n_embd, n_ffn, bias=False)
        self.value = nn.Linear(n_ffn, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(torch.relu(self.key(x)).square())


class Recurrent(nn.Module):
    """torch's LSTM or GRU. State: h (and c), [1, B, D]."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], n_embd: int) -> None:
        super().__init__()
        self.cell = cell(n_embd, n_embd, batch_first=True)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return self.cell(x, state)


class Attention(nn.Module):
    """Causal softmax attention with the sinusoidal positions of Vaswani et al., arXiv:1706.03762.

    State: keys and values of all tokens so far, [B, H, S, N] (the KV cache).
    """

    def __init__(self, n_embd: int, head_size: int) -> None:
        super().__init__()
        self.n_head = n_embd // head_size
        self.query = nn.Linear(n_embd, n_embd, bias=False)
        self.key = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(n_embd, n_embd, bias=False)
        self.output = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        B, T, D = x.shape
        before = 0 if state is None else state[0].shape[2]
        placed = x + sinusoids(before, T, D).to(x)  # [B, T, D]
        q, k, v = (
            matrix(y).view(B, T, self.n_head, -1).transpose(1, 2)  # [B, H, T, N]
            for matrix, y in ((self.query, placed), (self.key, placed), (self.value, x))
        )
        if state is not None:
            k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)  # [B, H, S, N]
        mask = torch.ones(T, before + T, dtype=torch.bool).tril(before) if before else None
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.output(y.transpose(1, 2).reshape(B, T, D)), (k, v)


def sinusoids(first: int, length: int, width: int) -> Tensor:
    """Encodings of the positions from ``first`` on, [length, width]."""
    position = torch.arange(first, first + length)[:, None]  # [T, 1]
    angle = position * 10000 ** (-torch.arange(0, width, 2) / width)  # [T, D / 2]
    return torch.cat((angle.sin(), angle.cos()), 1)[:, :width]


class AFT(nn.Module):
    """Causal AFT-full, Zhai et al., arXiv:2105.14103 (see aft.py), with a table of biases.

    State: exp(k) v and exp(k) of all tokens so far, [B, S, D], and the m that k is taken
    relative to, [B, 1, D].
    """

    def __init__(self, n_embd: int, max_len: int) -> None:
        super().__init__()
        self.query = nn.Linear(n_embd, n_embd, bias=False)
        self.key = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(n_embd, n_embd, bias=False)
        self.output = nn.Linear(n_embd, n_embd, bias=False)
        self.w = nn.Parameter(torch.zeros(max_len, max_len))

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        q, k, v = self.query(x), self.key(x), self.value(x)  # [B, T, D]
        m = k.detach().amax(1, keepdim=True)  # [B, 1, D]: cancels, but keeps exp(k) finite
        if state is not None:
            num, den, old = state
            m = torch.maximum(m, old)
            num, den = num * (old - m).exp(), den * (old - m).exp()
        k = (k - m).exp()
        kv = k * v
        if state is not None:
            kv, k = torch.cat((num, kv), 1), torch.cat((den, k), 1)  # [B, S, D]
        S, T = k.shape[1], x.shape[1]
        weight = self.w[S - T : S, :S].exp().tril(S - T)  # [T, S]
        y = torch.sigmoid(q) * (weight @ kv) / (weight @ k)
        return self.output(y), (kv, k, m)
