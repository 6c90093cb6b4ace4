"""The RWKV-6 language model: embedding, blocks of time and channel mixing, head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_rwkv6.nn.channel_mix import ChannelMix
from torch_rwkv6.nn.checkpoint import check_tensors, model_sizes
from torch_rwkv6.nn.optim import parameter_groups
from torch_rwkv6.nn.time_mix import TimeMix

__all__ = ["RWKV6", "Block", "RWKV6State"]


class RWKV6State(NamedTuple):
    """Everything an `RWKV6` remembers of B sequences; its size does not grow with their length.

    A NamedTuple of tensors, so torch.compile, torch.export and torch.utils._pytree see through
    it. Every method returns a new state.
    """

    att_shift: Tensor  # [L, B, D], the normed input of each time mixing at the last token
    wkv: Tensor  # [L, B, H, N, N], [key, value]; float32 (float64 in a float64 model)
    ffn_shift: Tensor  # [L, B, D], the normed input of each channel mixing at the last token

    def detach(self) -> RWKV6State:
        """Without its history: truncates backpropagation through time here."""
        return RWKV6State(*(x.detach() for x in self))

    def clone(self) -> RWKV6State:
        """A copy with memory of its own."""
        return RWKV6State(*(x.clone() for x in self))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RWKV6State:
        """On another device, or for a model of another dtype.

        ``wkv`` becomes float64 for float64 and float32 for every other dtype: rounding it to 16
        bits at each hand-over would add up.
        """
        wkv_dtype = None if dtype is None else torch.promote_types(dtype, torch.float32)
        return RWKV6State(
            self.att_shift.to(device=device, dtype=dtype),
            self.wkv.to(device=device, dtype=wkv_dtype),
            self.ffn_shift.to(device=device, dtype=dtype),
        )

    def select(self, rows: Tensor | Sequence[int]) -> RWKV6State:
        """The states of the given batch rows, in that order; repeats are allowed (beam search).

        Args:
            rows: indices into the batch, int32 or int64 [B'] or a list of int.

        Raises:
            IndexError: an index outside the batch (on a GPU, an assertion of the device).
        """
        index = torch.as_tensor(rows, device=self.wkv.device)
        index = index.long() if index.numel() == 0 else index  # [] would be float32
        return RWKV6State(*(x[:, index] for x in self))

    @classmethod
    def cat(cls, states: Sequence[RWKV6State]) -> RWKV6State:
        """Several states as one batch, in their order: the inverse of `select`."""
        return cls(*(torch.cat(tensors, 1) for tensors in zip(*states, strict=True)))


class Block(nn.Module):
    """One layer of RWKV-6: x + att(ln1(x)), then x + ffn(ln2(x)); ln0 in front of the first.

    ``Block`` of BlinkDL/RWKV-LM, RWKV-v5/src/model.py.

    Args:
        n_embd, layer_id, n_layer, head_size: as for `TimeMix`.
        n_ffn: as for `ChannelMix`.
        lora_mix, lora_decay, ln_x_eps, train_state: as for `TimeMix`.

    Raises:
        ValueError: as for `TimeMix` and `ChannelMix`.
    """

    def __init__(
        self,
        n_embd: int,
        layer_id: int,
        n_layer: int,
        head_size: int = 64,
        *,
        n_ffn: int | None = None,
        lora_mix: int | None = None,
        lora_decay: int | None = None,
        ln_x_eps: float = 64e-5,
        train_state: bool = False,
    ) -> None:
        super().__init__()
        self.layer_id = layer_id
        if layer_id == 0:
            self.ln0 = nn.LayerNorm(n_embd)
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)
        self.att = TimeMix(
            n_embd,
            layer_id,
            n_layer,
            head_size,
            lora_mix=lora_mix,
            lora_decay=lora_decay,
            ln_x_eps=ln_x_eps,
            train_state=train_state,
        )
        self.ffn = ChannelMix(n_embd, layer_id, n_layer, n_ffn)

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        att_shift: Tensor | None = None,  # [B, D]
        wkv: Tensor | None = None,  # [B, H, N, N]
        ffn_shift: Tensor | None = None,  # [B, D]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The residual stream after this layer, and the layer's three states.

        Args:
            x: residual stream, [B, T, D], in the dtype of the parameters; T may be 0.
            att_shift, wkv: ``shift`` and ``state`` of `TimeMix.forward`.
            ffn_shift: ``shift`` of `ChannelMix.forward`.

        Returns:
            x, [B, T, D]; att_shift, [B, D]; wkv, [B, H, N, N]; ffn_shift, [B, D].
        """
        if self.layer_id == 0:
            x = self.ln0(x)
        att, att_shift, wkv = self.att(self.ln1(x), att_shift, wkv)
        x = x + att
        ffn, ffn_shift = self.ffn(self.ln2(x), ffn_shift)
        return x + ffn, att_shift, wkv, ffn_shift


class RWKV6(nn.Module):
    """The RWKV-6 ("Finch", x060) language model.

    Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
    arXiv:2404.05892. Parameter names, shapes and initial values are those of ``RWKV`` in
    BlinkDL/RWKV-LM, RWKV-v5/src/model.py, so official checkpoints load with ``strict=True``;
    `from_state_dict` reads the sizes from them.

    State tuning: with ``train_state=True`` every layer has ``att.time_state``, the state that
    sequences start from. To train it and nothing else::

        model = RWKV6.from_state_dict(checkpoint, train_state=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("time_state"))
        optimizer = torch.optim.AdamW(model.parameter_groups(lr=1.0))

    (the official learning rate falls from 1 to 0.01).

    Args:
        vocab_size: V, number of tokens.
        n_layer: L, number of blocks.
        n_embd: D, width; a multiple of head_size.
        head_size: N, width of a head.
        n_ffn: F, hidden width of the channel mixing; None is ``int(3.5 * n_embd) // 32 * 32``.
        lora_mix: rank of the data-dependent token shift; None is 32, or 64 from n_embd 4096.
        lora_decay: rank of the data-dependent decay; None is 64, or 128 from n_embd 4096.
        ln_x_eps: epsilon of the GroupNorm after WKV6.
        train_state: adds ``att.time_state`` to every block.

    Raises:
        ValueError: a size below 1, or a head_size that does not divide n_embd.
    """

    def __init__(
        self,
        vocab_size: int,
        n_layer: int,
        n_embd: int,
        head_size: int = 64,
        *,
        n_ffn: int | None = None,
        lora_mix: int | None = None,
        lora_decay: int | None = None,
        ln_x_eps: float = 64e-5,
        train_state: bool = False,
    ) -> None:
        super().__init__()
        if vocab_size < 1 or n_layer < 1:
            raise ValueError(
                f"vocab_size, n_layer: expected at least 1, got {vocab_size} and {n_layer}"
            )
        self.vocab_size, self.n_layer = vocab_size, n_layer
        self.n_embd, self.head_size = n_embd, head_size
        self.blocks = nn.ModuleList(
            Block(
                n_embd,
                layer_id,
                n_layer,
                head_size,
                n_ffn=n_ffn,
                lora_mix=lora_mix,
                lora_decay=lora_decay,
                ln_x_eps=ln_x_eps,
                train_state=train_state,
            )
            for layer_id in range(n_layer)
        )
        self.emb = nn.Embedding(vocab_size, n_embd)
        self.ln_out = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        # ln0 scales the embedding up: from tiny values it moves fast in the first steps
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(self.head.weight, 0.5 * max(1.0, math.sqrt(vocab_size / n_embd)))

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        ln_x_eps: float = 64e-5,
        train_state: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> RWKV6:
        """The model of an official x060 checkpoint; every size is read from the tensors' shapes.

        ::

            model = RWKV6.from_state_dict(torch.load("RWKV-x060-World-1B6.pth", mmap=True))

        Args:
            state_dict: tensors under the official names; they are copied.
            ln_x_eps: epsilon of the GroupNorm, which a checkpoint does not hold.
            train_state: adds ``att.time_state``, zero, to a checkpoint that has none.
            dtype: of the parameters; None is that of ``emb.weight``.
            device: of the parameters; None is that of ``emb.weight``.

        Raises:
            TypeError: state_dict is not a mapping of names to tensors.
            ValueError: another version of RWKV, or missing, unexpected or misshapen tensors; the
                message lists all of them.
        """
        sizes = model_sizes(state_dict)
        has_state = any(name.endswith(".att.time_state") for name in state_dict)
        with torch.device("meta"):  # no memory, and none of the time that initial values take
            model = cls(**sizes, ln_x_eps=ln_x_eps, train_state=train_state or has_state)
        tensors = dict(state_dict)
        if train_state and not has_state:
            for name, p in model.named_parameters():
                if name.endswith(".att.time_state"):
                    tensors[name] = torch.zeros(p.shape)
        check_tensors(tensors, {name: p.shape for name, p in model.named_parameters()})
        emb = tensors["emb.weight"]
        model = model.to(dtype=dtype or emb.dtype).to_empty(device=device or emb.device)
        model.load_state_dict(tensors)
        return model

    def forward(
        self,
        tokens: Tensor,  # [B, T]
        state: RWKV6State | None = None,
    ) -> tuple[Tensor, RWKV6State]:  # [B, T, V]
        """Logits of the next token after every token, and the state after the last.

        Training, prefill in pieces and decoding (T = 1) are this one call: for any split of a
        sequence into pieces, with the state handed on, logits and gradients are those of the whole
        (up to rounding).
        The gradient flows through the state; `RWKV6State.detach` cuts it.

        Args:
            tokens: int64 or int32, [B, T]; T may be 0.
            state: after the piece before; it is not changed. None is the start of every sequence:
                `initial_state`.

        Returns:
            logits, [B, T, V], in the dtype of the parameters (of autocast, where it is on), and
            the state.

        Raises:
            TypeError: tokens are not integers, or state is no `RWKV6State` of the right dtypes.
            ValueError: tokens or state of another shape.
            IndexError: a token below 0 or not below vocab_size (on a GPU, an assertion of the
                device).
        """
        x, state = self.features(tokens, state)
        return self.head(x), state

    def features(
        self,
        tokens: Tensor,  # [B, T]
        state: RWKV6State | None = None,
    ) -> tuple[Tensor, RWKV6State]:  # [B, T, D]
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
        return self.ln_out(x), RWKV6State(*(torch.stack(s) for s in zip(*new, strict=True)))

    def initial_state(self, batch_size: int) -> RWKV6State:
        """What ``state=None`` stands for: zeros, and ``att.time_state`` where there is one."""
        shift = self.emb.weight.new_zeros(self.n_layer, batch_size, self.n_embd)
        wkv = [m.initial_state() for m in self.modules() if isinstance(m, TimeMix)]
        return RWKV6State(
            shift,
            torch.stack(wkv).expand(-1, batch_size, -1, -1, -1),
            torch.zeros_like(shift),
        )

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The official optimiser settings: see `torch_rwkv6.nn.parameter_groups`."""
        return parameter_groups(self, lr, weight_decay)

    def _check(self, tokens: Tensor, state: RWKV6State | None) -> None:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens: expected a torch.Tensor, got {type(tokens).__name__}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens: expected int64 or int32 token ids, got {tokens.dtype}")
        if tokens.dim() != 2:
            raise ValueError(f"tokens: expected [B, T], got shape {tuple(tokens.shape)}")
        if state is None:
            return
        if not isinstance(state, RWKV6State):
            raise TypeError(f"state: expected an RWKV6State, got {type(state).__name__}")
        heads = (self.n_embd // self.head_size, self.head_size, self.head_size)
        shift_shape = (self.n_layer, tokens.shape[0], self.n_embd)
        wkv_shape = (self.n_layer, tokens.shape[0], *heads)
        wkv_dtype = torch.promote_types(self.emb.weight.dtype, torch.float32)
        for name, x, axes, shape in (
            ("att_shift", state.att_shift, "[L, B, D]", shift_shape),
            ("wkv", state.wkv, "[L, B, H, N, N]", wkv_shape),
            ("ffn_shift", state.ffn_shift, "[L, B, D]", shift_shape),
        ):
            if not isinstance(x, Tensor):
                raise TypeError(f"state.{name}: expected a torch.Tensor, got {type(x).__name__}")
            if not x.is_floating_point():
                raise TypeError(f"state.{name}: expected floating-point values, got {x.dtype}")
            if x.device != self.emb.weight.device:
                raise ValueError(
                    f"state.{name}: expected device {self.emb.weight.device}, got {x.device} "
                    "(RWKV6State.to moves)"
                )
            if x.shape != shape:
                raise ValueError(f"state.{name}: expected {axes} = {shape}, got {tuple(x.shape)}")
        if state.wkv.dtype != wkv_dtype:
            raise TypeError(
                f"state.wkv: expected {wkv_dtype}, got {state.wkv.dtype} (RWKV6State.to converts)"
            )
