"""The language model that all versions share: embedding, blocks of two mixes, head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_rwkv6.nn.decode import decode_
from torch_rwkv6.nn.linear import Linear
from torch_rwkv6.nn.optim import parameter_groups
from torch_rwkv6.nn.state import RWKVState

__all__ = ["RWKV", "Block"]


class Block(nn.Module):
    """One layer: x + att(ln1(x)), then x + ffn(ln2(x)); ln0 in front of the first.

    ``Block`` of BlinkDL/RWKV-LM, RWKV-v5/src/model.py.

    Args:
        att: time mixing of some version, such as `TimeMix`.
        ffn: channel mixing of some version, such as `ChannelMix`.
        n_embd: width D.
        first: whether this is the first layer, which has ln0.
    """

    att: Any  # a time mixing, with forward_, initial_state and state_shape

    def __init__(self, att: nn.Module, ffn: nn.Module, n_embd: int, first: bool) -> None:
        super().__init__()
        self.ln0 = nn.LayerNorm(n_embd) if first else None
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)
        self.att, self.ffn = att, ffn

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        att_shift: Tensor | None = None,  # [B, D]
        wkv: Tensor | None = None,  # [B, H, N, N]; RWKV-4: [B, 3, D]
        ffn_shift: Tensor | None = None,  # [B, D]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The residual stream after this layer, and the layer's three states.

        Args:
            x: residual stream, [B, T, D], in the dtype of the parameters; T may be 0.
            att_shift, wkv: ``shift`` and ``state`` of the time mixing's forward.
            ffn_shift: ``shift`` of the channel mixing's forward.

        Returns:
            x, [B, T, D]; att_shift, [B, D]; wkv, as it came; ffn_shift, [B, D].
        """
        if self.ln0 is not None:
            x = self.ln0(x)
        att, att_shift, wkv = self.att(self.ln1(x), att_shift, wkv)
        x = x + att
        ffn, ffn_shift = self.ffn(self.ln2(x), ffn_shift)
        return x + ffn, att_shift, wkv, ffn_shift

    def forward_(
        self,
        x: Tensor,  # [B, T, D]
        att_shift: Tensor,  # [B, D], updated in place
        wkv: Tensor,  # [B, H, N, N] or [B, 3, D], updated in place
        ffn_shift: Tensor,  # [B, D], updated in place
    ) -> Tensor:  # [B, T, D]
        """As `forward`, but updates the states in place: for inference, without autograd."""
        if self.ln0 is not None:
            x = self.ln0(x)
        y = decode_(self, x, att_shift, wkv, ffn_shift)
        if y is not None:
            return y
        x = x + self.att.forward_(self.ln1(x), att_shift, wkv)
        ffn, last = self.ffn(self.ln2(x), ffn_shift)
        ffn_shift.copy_(last)
        return x + ffn


class RWKV(nn.Module):
    """The language model of every version, under the official parameter names.

    What is public are the versions: `RWKV4`, `RWKV5` and `RWKV6`. All share this interface.

    Attributes:
        version: "4", "5.0", "5.1", "5.2" or "6".
        vocab_size, n_layer, n_embd: V, L and D.
        state_shape: of one layer and sequence of ``RWKVState.wkv``: (H, N, N), RWKV-4: (3, D).
    """

    version: str
    blocks: Any  # an nn.ModuleList of Block

    def __init__(
        self,
        vocab_size: int,
        n_layer: int,
        n_embd: int,
        mixes: Callable[[int], tuple[nn.Module, nn.Module]],  # of one layer: att, ffn
    ) -> None:
        super().__init__()
        if vocab_size < 1 or n_layer < 1:
            raise ValueError(
                f"vocab_size, n_layer: expected at least 1, got {vocab_size} and {n_layer}"
            )
        self.vocab_size, self.n_layer, self.n_embd = vocab_size, n_layer, n_embd
        self.blocks = nn.ModuleList(Block(*mixes(i), n_embd, i == 0) for i in range(n_layer))
        self.state_shape: tuple[int, ...] = self.blocks[0].att.state_shape
        self.emb = nn.Embedding(vocab_size, n_embd)
        self.ln_out = nn.LayerNorm(n_embd)
        self.head = Linear(n_embd, vocab_size)
        # ln0 scales the embedding up: from tiny values it moves fast in the first steps
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(self.head.weight, 0.5 * max(1.0, math.sqrt(vocab_size / n_embd)))

    def forward(
        self,
        tokens: Tensor,  # [B, T]
        state: RWKVState | None = None,
    ) -> tuple[Tensor, RWKVState]:  # [B, T, V]
        """Logits of the next token after every token, and the state after the last.

        Training, prefill in pieces and decoding (T = 1) are this one call: for any split of a
        sequence into pieces, with the state handed on, logits and gradients are those of the whole
        (up to rounding). The gradient flows through the state; `RWKVState.detach` cuts it.

        Args:
            tokens: int64 or int32, [B, T]; T may be 0.
            state: after the piece before; it is not changed. None is the start of every sequence:
                `initial_state`.

        Returns:
            logits, [B, T, V], in the dtype of the parameters (of autocast, where it is on), and
            the state.

        Raises:
            TypeError: tokens are not integers, or state is no `RWKVState` of the right dtypes.
            ValueError: tokens or state of another shape.
            IndexError: a token below 0 or not below vocab_size (on a GPU, an assertion of the
                device).
        """
        x, state = self.features(tokens, state)
        return self.head(x), state

    def features(
        self,
        tokens: Tensor,  # [B, T]
        state: RWKVState | None = None,
    ) -> tuple[Tensor, RWKVState]:  # [B, T, D]
        """As `forward`, but [B, T, D] in front of the head.

        ``model.head(x[:, -1])`` then gives the last logits of a long prompt without those of all
        its tokens, [B, T, V].
        """
        self._check(tokens, state)
        layers: Sequence[Any] = [(None, None, None)] * self.n_layer
        if state is not None:
            layers = list(zip(*(x.unbind() for x in state), strict=True))
        x = self.emb(tokens)  # [B, T, D]
        new = []
        for block, layer in zip(self.blocks, layers, strict=True):
            x, *layer = block(x, *layer)
            new.append(layer)
        return self.ln_out(x), RWKVState(*(torch.stack(s) for s in zip(*new, strict=True)))

    @torch.no_grad()
    def forward_(
        self,
        tokens: Tensor,  # [B, T]
        state: RWKVState,
    ) -> Tensor:  # [B, V]
        """Logits after the last token only; the state is updated in place.

        The call for inference, prompts and single tokens alike: nothing is copied or stacked, and
        nothing is computed for tokens that are not asked for. Logits and state are those of
        `forward`.

        Args:
            tokens: int64 or int32, [B, T]; T from 1.
            state: `initial_state` or one that a call returned; its memory is overwritten.

        Raises:
            TypeError, ValueError, IndexError: as `forward`.
        """
        self._check(tokens, state)
        if tokens.shape[1] == 0:
            raise ValueError("tokens: expected at least one token to compute logits after, got 0")
        if state is None:
            raise TypeError("state: expected an RWKVState to update (initial_state), got None")
        x = self.emb(tokens)  # [B, T, D]
        layers = zip(*(s.unbind() for s in state), strict=True)
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block.forward_(x, *layer)
        return self.head(self.ln_out(x[:, -1]))

    def initial_state(self, batch_size: int) -> RWKVState:
        """What ``state=None`` stands for: nothing seen, and ``att.time_state`` where there is one.

        In memory of its own, so that `forward_` can update it.
        """
        shift = self.emb.weight.new_zeros(self.n_layer, batch_size, self.n_embd)
        wkv = torch.stack([block.att.initial_state() for block in self.blocks])
        wkv = wkv.repeat(1, batch_size, *(1 for _ in self.state_shape))
        return RWKVState(shift, wkv, torch.zeros_like(shift))

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The official optimiser settings: see `torch_rwkv6.nn.parameter_groups`."""
        return parameter_groups(self, lr, weight_decay)

    def _check(self, tokens: Tensor, state: RWKVState | None) -> None:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens: expected a torch.Tensor, got {type(tokens).__name__}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens: expected int64 or int32 token ids, got {tokens.dtype}")
        if tokens.dim() != 2:
            raise ValueError(f"tokens: expected [B, T], got shape {tuple(tokens.shape)}")
        if state is None:
            return
        if not isinstance(state, RWKVState):
            raise TypeError(f"state: expected an RWKVState, got {type(state).__name__}")
        weight = self.emb.weight
        shift_shape = (self.n_layer, tokens.shape[0], self.n_embd)
        wkv_shape = (self.n_layer, tokens.shape[0], *self.state_shape)
        wkv_dtype = torch.promote_types(weight.dtype, torch.float32)
        wkv_axes = "[L, B, 3, D]" if len(self.state_shape) == 2 else "[L, B, H, N, N]"
        for name, x, axes, shape in (
            ("att_shift", state.att_shift, "[L, B, D]", shift_shape),
            ("wkv", state.wkv, wkv_axes, wkv_shape),
            ("ffn_shift", state.ffn_shift, "[L, B, D]", shift_shape),
        ):
            if not isinstance(x, Tensor):
                raise TypeError(f"state.{name}: expected a torch.Tensor, got {type(x).__name__}")
            if not x.is_floating_point():
                raise TypeError(f"state.{name}: expected floating-point values, got {x.dtype}")
            if x.device != weight.device:
                raise ValueError(
                    f"state.{name}: expected device {weight.device}, got {x.device} "
                    "(RWKVState.to moves)"
                )
            if x.shape != shape:
                raise ValueError(f"state.{name}: expected {axes} = {shape}, got {tuple(x.shape)}")
        if state.wkv.dtype != wkv_dtype:
            raise TypeError(
                f"state.wkv: expected {wkv_dtype}, got {state.wkv.dtype} (RWKVState.to converts)"
            )
