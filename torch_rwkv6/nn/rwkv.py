"""The language model that all versions share: embedding, blocks of two mixes, head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_rwkv6.arguments import integer
from torch_rwkv6.nn.carry import box_for, call, stateful, takes_update, to_update
from torch_rwkv6.nn.decode import decode_
from torch_rwkv6.nn.fast_path import is_traced, linear
from torch_rwkv6.nn.initial_values import with_initial_weight
from torch_rwkv6.nn.optim import parameter_groups
from torch_rwkv6.nn.sharded import device_of, is_sharded
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

    att: Any  # a time mixing, with initial_state and state_shape
    ffn: Any

    def __init__(self, att: nn.Module, ffn: nn.Module, n_embd: int, first: bool) -> None:
        super().__init__()
        self.ln0 = nn.LayerNorm(n_embd) if first else None
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)
        self.att, self.ffn = att, ffn

    def reset_parameters(self) -> None:
        """Sets the official initial values of the whole layer."""
        for module in (self.ln0, self.ln1, self.ln2, self.att, self.ffn):
            if module is not None:
                module.reset_parameters()

    @stateful
    def forward(
        self,
        x: Tensor,  # [B, T, D]
        att_shift: Tensor | None = None,  # [B, D]
        wkv: Tensor | None = None,  # [B, H, N, N]; RWKV-4: [B, 3, D]
        ffn_shift: Tensor | None = None,  # [B, D]
        *,
        update: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The residual stream after this layer, and the layer's three states.

        Args:
            x: residual stream, [B, T, D], in the dtype of the parameters; T may be 0.
            att_shift, wkv: ``shift`` and ``state`` of the time mixing's forward.
            ffn_shift: ``shift`` of the channel mixing's forward.
            update: writes the new states to the memory of the old ones, and returns those: for
                inference, without autograd.

        Returns:
            x, [B, T, D]; att_shift, [B, D]; wkv, as it came; ffn_shift, [B, D].
        """
        if self.ln0 is not None:
            x = self.ln0(x)
        if update:
            att_shift, wkv, ffn_shift = to_update(att_shift, wkv, ffn_shift)
            y = decode_(self, x, att_shift, wkv, ffn_shift)
            if y is not None:
                return y, att_shift, wkv, ffn_shift
        att, att_shift, wkv = call(self.att, self.ln1(x), att_shift, wkv, update=update)
        x = x + att
        ffn, last = self.ffn(self.ln2(x), ffn_shift)
        if update:
            last = ffn_shift.copy_(last)  # type: ignore[union-attr]
        return x + ffn, att_shift, wkv, last


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
        vocab_size = integer("vocab_size", vocab_size, 1)
        n_layer = integer("n_layer", n_layer, 1)
        self.vocab_size, self.n_layer, self.n_embd = vocab_size, n_layer, n_embd
        self.blocks = nn.ModuleList(Block(*mixes(i), n_embd, i == 0) for i in range(n_layer))
        self.state_shape: tuple[int, ...] = self.blocks[0].att.state_shape
        # ln0 scales the embedding up: from tiny values it moves fast in the first steps
        self.emb = with_initial_weight(
            nn.Embedding(vocab_size, n_embd), nn.init.uniform_, a=-1e-4, b=1e-4
        )
        self.ln_out = nn.LayerNorm(n_embd)
        self.head = with_initial_weight(
            nn.Linear(n_embd, vocab_size, bias=False),
            nn.init.orthogonal_,
            gain=0.5 * max(1.0, math.sqrt(vocab_size / n_embd)),
        )
        self.emb.reset_parameters()
        self.head.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the official initial values of the whole model, for instance after `to_empty`.

        Every module in it has a ``reset_parameters`` too, and any order of calls is right.
        """
        for module in (*self.blocks, self.emb, self.ln_out, self.head):
            module.reset_parameters()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, hooks included."""
        if not is_sharded(self):
            return super().__call__(*args, **kwargs)
        return self._carried(*args, **kwargs)

    def _carried(self, tokens: Tensor, state: RWKVState | None = None, **options: Any) -> Any:
        """A call whose wrapper may cast tensors, but not the state."""
        box = box_for(self, state)
        x, new = super().__call__(tokens, state if box is None else box, **options)
        return x, new if box is None else box.take(new)

    @stateful
    def forward(
        self,
        tokens: Tensor,  # [B, T]
        state: RWKVState | None = None,
        *,
        update: bool = False,
        head: bool = True,
    ) -> tuple[Tensor, RWKVState]:  # [B, T, V]
        """Logits of the next token after every token, and the state after the last.

        Training, prefill in pieces and decoding (T = 1) are this one call: for any split of a
        sequence into pieces, with the state handed on, logits and gradients are those of the whole
        (up to rounding). The gradient flows through the state; `RWKVState.detach` cuts it.

        Args:
            tokens: int64 or int32, [B, T]; T may be 0.
            state: after the piece before; it is not changed. None is the start of every sequence:
                `initial_state`.
            update: what `forward_` does: it writes the new state to the memory of the old one,
                returns that, and computes logits after the last token only, [B, 1, V].
            head: False leaves the head out: see `features`.

        Returns:
            logits, [B, T, V], in the dtype of the parameters (of autocast, where it is on), and
            the state.

        Raises:
            TypeError: tokens are not integers, or state is no `RWKVState` of the right dtypes.
            ValueError: tokens or state of another shape.
            IndexError: a token below 0 or not below vocab_size (on a GPU, an assertion of the
                device).
        """
        self._check(tokens, state, update)
        layers: Sequence[Any] = [(None, None, None)] * self.n_layer
        if state is not None:
            layers = list(zip(*(s.unbind() for s in state), strict=True))
        x = self.emb(tokens)  # [B, T, D]
        new = []
        for block, layer in zip(self.blocks, layers, strict=True):
            x, *layer = call(block, x, *layer, update=update)
            new.append(layer)
        if update:
            x = x[:, -1:]
        else:
            state = RWKVState(*(torch.stack(s) for s in zip(*new, strict=True)))
        x = self.ln_out(x)
        return linear(self.head, x) if head else x, state  # type: ignore[return-value]

    def features(
        self,
        tokens: Tensor,  # [B, T]
        state: RWKVState | None = None,
    ) -> tuple[Tensor, RWKVState]:  # [B, T, D]
        """As `forward`, but [B, T, D] in front of the head.

        ``model.head(x[:, -1])`` then gives the last logits of a long prompt without those of all
        its tokens, [B, T, V].
        """
        features: tuple[Tensor, RWKVState] = self(tokens, state, head=False)
        return features

    @torch.no_grad()
    def forward_(
        self,
        tokens: Tensor,  # [B, T]
        state: RWKVState,
    ) -> Tensor:  # [B, V]
        """Logits after the last token only; the state is updated in place.

        The call for inference, prompts and single tokens alike: nothing is copied or stacked, and
        nothing is computed for tokens that are not asked for. Logits and state are those of
        `forward`, and so are the modules that are called, with their hooks.

        Args:
            tokens: int64 or int32, [B, T]; T from 1.
            state: `initial_state` or one that a call returned; its memory is overwritten.

        Raises:
            TypeError, ValueError, IndexError: as `forward`.
        """
        if takes_update(self):
            logits, new = self(tokens, state, update=True)
        else:  # somebody replaced forward by one that knows nothing of update
            self._check(tokens, state, update=True)
            logits, new = self(tokens, state)
        for x, value in zip(state, new, strict=True):
            if x is not value:
                x.copy_(value)
        return logits[:, -1]

    def initial_state(self, batch_size: int) -> RWKVState:
        """What ``state=None`` stands for: nothing seen, and ``att.time_state`` where there is one.

        In memory of its own, so that `forward_` can update it.

        Raises:
            TypeError, ValueError: batch_size is no integer, or below 0.
        """
        if not is_traced():
            batch_size = integer("batch_size", batch_size, 0)
        norm = self.ln_out.weight
        shape = (self.n_layer, batch_size, self.n_embd)
        shift = torch.zeros(shape, dtype=norm.dtype, device=device_of(norm))
        wkv = torch.stack([block.att.initial_state() for block in self.blocks])
        wkv = wkv.repeat(1, batch_size, *(1 for _ in self.state_shape))
        return RWKVState(shift, wkv, torch.zeros_like(shift))

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The official optimiser settings: see `torch_rwkv6.nn.parameter_groups`."""
        return parameter_groups(self, lr, weight_decay)

    def _check(self, tokens: Tensor, state: RWKVState | None, update: bool) -> None:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens: expected a torch.Tensor, got {type(tokens).__name__}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens: expected int64 or int32 token ids, got {tokens.dtype}")
        if tokens.dim() != 2:
            raise ValueError(f"tokens: expected [B, T], got shape {tuple(tokens.shape)}")
        if update and tokens.shape[1] == 0:
            raise ValueError("tokens: expected at least one token to compute logits after, got 0")
        if update and state is None:
            raise TypeError("state: expected an RWKVState to update (initial_state), got None")
        if state is not None:
            self.check_state(state, tokens.shape[0])
            if update and not is_traced():
                state.check_memory()

    def check_state(self, state: RWKVState, batch_size: int) -> None:
        """Checks that the state is one of this model for so many sequences.

        Raises:
            TypeError: no RWKVState of floating-point tensors, wkv of the right dtype.
            ValueError: of another shape, or on another device.
        """
        if not isinstance(state, RWKVState):
            raise TypeError(f"state: expected an RWKVState, got {type(state).__name__}")
        weight = self.ln_out.weight
        device = device_of(weight)
        shift_shape = (self.n_layer, batch_size, self.n_embd)
        wkv_shape = (self.n_layer, batch_size, *self.state_shape)
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
            if x.device != device:
                raise ValueError(
                    f"state.{name}: expected device {device}, got {x.device} (RWKVState.to moves)"
                )
            if x.shape != shape:
                raise ValueError(f"state.{name}: expected {axes} = {shape}, got {tuple(x.shape)}")
        if state.wkv.dtype != wkv_dtype:
            raise TypeError(
                f"state.wkv: expected {wkv_dtype}, got {state.wkv.dtype} (RWKVState.to converts)"
            )
