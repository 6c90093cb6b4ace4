"""The language model that all versions share: embedding, blocks of two mixes, head."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_rwkv6.arguments import integer
from torch_rwkv6.checks import check_offsets, check_values
from torch_rwkv6.nn.carry import box_for, call, packed, stateful, takes_update, to_update
from torch_rwkv6.nn.decode import decode_
from torch_rwkv6.nn.fast_path import is_traced, linear
from torch_rwkv6.nn.initial_values import with_initial_weight
from torch_rwkv6.nn.optim import parameter_groups
from torch_rwkv6.nn.recomputed import recomputed
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
    @packed
    def forward(
        self,
        x: Tensor,  # [B, T, D]
        att_shift: Tensor | None = None,  # [B, D]
        wkv: Tensor | None = None,  # [B, H, N, N]; RWKV-4: [B, 3, D]
        ffn_shift: Tensor | None = None,  # [B, D]
        *,
        update: bool = False,
        cu_seqlens: Tensor | None = None,  # [M + 1]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The residual stream after this layer, and the layer's three states.

        Args:
            x: residual stream, [B, T, D], in the dtype of the parameters; T may be 0.
            att_shift, wkv: ``shift`` and ``state`` of the time mixing's forward.
            ffn_shift: ``shift`` of the channel mixing's forward.
            update: writes the new states to the memory of the old ones, and returns those: for
                inference, without autograd.
            cu_seqlens: B is 1, and x is M sequences packed one after the other, as in
                `torch_rwkv6.wkv`; the states have M rows then.

        Returns:
            x, [B, T, D]; att_shift, [B, D]; wkv, as it came; ffn_shift, [B, D].
        """
        if self.ln0 is not None:
            x = self.ln0(x)
        if update:
            att_shift, wkv, ffn_shift = to_update(att_shift, wkv, ffn_shift)
            packs = cu_seqlens is not None
            y = None if packs else decode_(self, x, att_shift, wkv, ffn_shift)
            if y is not None:
                return y, att_shift, wkv, ffn_shift
        options: dict[str, Any] = {"update": update, "cu_seqlens": cu_seqlens}
        att, att_shift, wkv = call(self.att, self.ln1(x), att_shift, wkv, **options)
        x = x + att
        ffn, ffn_shift = call(self.ffn, self.ln2(x), ffn_shift, **options)
        return x + ffn, att_shift, wkv, ffn_shift


class RWKV(nn.Module):
    """The language model of every version, under the official parameter names.

    The public classes are the versions, `RWKV4`, `RWKV5` and `RWKV6`, which share this interface.

    Attributes:
        version: "4", "5.0", "5.1", "5.2" or "6".
        vocab_size, n_layer, n_embd: V, L and D.
        state_shape: of one layer and sequence of ``RWKVState.wkv``: (H, N, N), RWKV-4: (3, D).
        gradient_checkpointing: set it to True to train with less memory in more time: the backward
            pass computes every block again from its input, but for WKV, whose results are kept. A
            graph has one backward pass then: no ``retain_graph``, no second derivatives.
    """

    version: str
    gradient_checkpointing = False
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
        # ln0 scales the embedding up; from tiny values it changes fast in the first steps.
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
        """Sets the official initial values of the whole model, for instance after ``to_empty``.

        Every module in it has a ``reset_parameters`` as well, and they may be called in any order.
        """
        for module in (*self.blocks, self.emb, self.ln_out, self.head):
            module.reset_parameters()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, hooks included."""
        if not is_sharded(self):
            return super().__call__(*args, **kwargs)
        return self._carried(*args, **kwargs)

    def _carried(self, tokens: Tensor, state: RWKVState | None = None, **options: Any) -> Any:
        """A call through a wrapper that may cast tensors; the state is carried past it uncast."""
        box = box_for(self, state)
        x, new = super().__call__(tokens, state if box is None else box, **options)
        return x, new if box is None else box.take(new)

    @stateful
    @packed
    def forward(
        self,
        tokens: Tensor,  # [B, T]
        state: RWKVState | None = None,
        *,
        cu_seqlens: Tensor | None = None,  # [M + 1]
        update: bool = False,
        head: bool = True,
    ) -> tuple[Tensor, RWKVState]:  # [B, T, V]
        """Logits of the next token after every token, and the state after the last.

        Training, prefill in pieces and decoding (T = 1) all use this call. If a sequence is split
        into pieces and the state is passed on, logits and gradients equal those of the whole
        sequence, up to rounding. Gradients flow through the state; `RWKVState.detach` cuts them.

        Args:
            tokens: int64 or int32, [B, T]; T may be 0.
            state: after the piece before; it is not changed. None is the start of every sequence:
                `initial_state`.
            cu_seqlens: [M + 1], int32 or int64: B is 1, and its T tokens are M sequences packed one
                after the other, sequence m being tokens ``cu_seqlens[m]`` to ``cu_seqlens[m + 1]``.
                Each starts from its own row of the state, which has M rows; nothing of a sequence
                reaches another.
            update: what `forward_` does: it writes the new state to the memory of the old one,
                returns that, and computes logits after the last token only, [B, 1, V] (of each
                packed sequence, [1, M, V]).
            head: False leaves the head out: see `features`.

        Returns:
            logits, [B, T, V], in the dtype of the parameters (of autocast, where it is on), and
            the state.

        Raises:
            TypeError: tokens are not integers, or state is no `RWKVState` of the right dtypes.
            ValueError: tokens, state or cu_seqlens of another shape.
            IndexError: a token below 0 or not below vocab_size (on a GPU, an assertion of the
                device).
            RuntimeError: cu_seqlens does not go from 0 to T, or falls (as above).
        """
        self._check(tokens, state, cu_seqlens, update)
        layers: Sequence[Any] = [(None, None, None)] * self.n_layer
        if state is not None:
            layers = list(zip(*(s.unbind() for s in state), strict=True))
        x = self.emb(tokens)  # [B, T, D]
        new = []
        run = recomputed if self.gradient_checkpointing and torch.is_grad_enabled() else call
        for block, layer in zip(self.blocks, layers, strict=True):
            x, *layer = run(block, x, *layer, update=update, cu_seqlens=cu_seqlens)
            new.append(layer)
        if update:
            x = x[:, -1:] if cu_seqlens is None else x[:, cu_seqlens[1:].long() - 1]
        else:
            state = RWKVState(*(torch.stack(s) for s in zip(*new, strict=True)))
        x = self.ln_out(x)
        return linear(self.head, x) if head else x, state  # type: ignore[return-value]

    def features(
        self,
        tokens: Tensor,  # [B, T]
        state: RWKVState | None = None,
        *,
        cu_seqlens: Tensor | None = None,  # [M + 1]
    ) -> tuple[Tensor, RWKVState]:  # [B, T, D]
        """As `forward`, but returns the input of the head, [B, T, D], instead of logits.

        ``model.head(x[:, -1])`` then gives the last logits of a long prompt without computing those
        of all its tokens, [B, T, V].
        """
        options: dict[str, Any] = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        features: tuple[Tensor, RWKVState] = self(tokens, state, head=False, **options)
        return features

    @torch.no_grad()
    def forward_(
        self,
        tokens: Tensor,  # [B, T]
        state: RWKVState,
        cu_seqlens: Tensor | None = None,  # [M + 1]
    ) -> Tensor:  # [B, V]
        """Logits after the last token only; the state is updated in place.

        The call for inference, for prompts and for single tokens. No state is copied or stacked,
        and the head runs for the last token only. Logits and state equal those of `forward`, and
        the same modules are called, with their hooks.

        Args:
            tokens: int64 or int32, [B, T]; T from 1.
            state: `initial_state` or one that a call returned; its memory is overwritten.
            cu_seqlens: as in `forward`: tokens are M packed sequences of at least one token each,
                and the logits are those after each of them, [M, V].

        Raises:
            TypeError, ValueError, IndexError, RuntimeError: as `forward`.
        """
        if takes_update(self):
            options: dict[str, Any] = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
            logits, new = self(tokens, state, update=True, **options)
        else:  # The forward was replaced by one without the arguments update and cu_seqlens.
            self._check(tokens, state, cu_seqlens, update=True)
            if cu_seqlens is not None:
                return self._one_by_one(tokens, state, cu_seqlens)
            logits, new = self(tokens, state)
        for x, value in zip(state, new, strict=True):
            if x is not value:
                x.copy_(value)
        return logits[:, -1] if cu_seqlens is None else logits[0]

    def _one_by_one(
        self,
        tokens: Tensor,  # [1, T]
        state: RWKVState,
        cu_seqlens: Tensor,  # [M + 1]
    ) -> Tensor:  # [M, V]
        """`forward_` of each packed sequence alone."""
        logits = []
        for m, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            own = state.row(m)
            logits.append(self.forward_(tokens[:, begin:end], own))
        return torch.cat(logits)

    def initial_state(self, batch_size: int) -> RWKVState:
        """The state that ``None`` stands for: zeros, or ``att.time_state`` where there is one.

        It is a new tensor, so that `forward_` can update it.

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

    def _check(
        self,
        tokens: Tensor,
        state: RWKVState | None,
        cu_seqlens: Tensor | None,
        update: bool,
    ) -> None:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens: expected a torch.Tensor, got {type(tokens).__name__}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens: expected int64 or int32 token ids, got {tokens.dtype}")
        if tokens.dim() != 2:
            raise ValueError(f"tokens: expected [B, T], got shape {tuple(tokens.shape)}")
        rows = tokens.shape[0]
        if cu_seqlens is not None:
            rows = self._check_packed(tokens, cu_seqlens, update)
        if update and tokens.shape[1] == 0:
            raise ValueError("tokens: expected at least one token to compute logits after, got 0")
        if update and state is None:
            raise TypeError("state: expected an RWKVState to update (initial_state), got None")
        if state is not None:
            self.check_state(state, rows)
            if update and not is_traced():
                state.check_memory()

    def _check_packed(self, tokens: Tensor, cu_seqlens: Tensor, update: bool) -> int:
        """The number of packed sequences."""
        check_offsets(cu_seqlens, "tokens", tokens)
        if not is_traced():
            check_values(tokens.shape[1], 0, None, cu_seqlens)
            if update and cu_seqlens.is_cpu and bool((cu_seqlens.diff() == 0).any()):
                raise ValueError(
                    "cu_seqlens: expected at least one token in every sequence, to compute logits "
                    "after, got one without"
                )
        return cu_seqlens.shape[0] - 1

    def check_state(self, state: RWKVState, batch_size: int) -> None:
        """Checks that the state belongs to this model and to ``batch_size`` sequences.

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
