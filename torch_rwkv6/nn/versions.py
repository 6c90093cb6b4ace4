"""The language models RWKV-4, RWKV-5 and RWKV-6: which mixes they are made of."""

from __future__ import annotations

from torch import nn

from torch_rwkv6.nn.channel_mix import ChannelMix, ChannelMix4, ChannelMix5
from torch_rwkv6.nn.rwkv import RWKV
from torch_rwkv6.nn.time_mix import TimeMix
from torch_rwkv6.nn.time_mix4 import TimeMix4
from torch_rwkv6.nn.time_mix5 import TimeMix5

__all__ = ["RWKV4", "RWKV5", "RWKV6"]


class RWKV6(RWKV):
    """The RWKV-6 ("Finch", x060) language model.

    Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
    arXiv:2404.05892. Parameter names, shapes and initial values are those of ``RWKV`` in
    BlinkDL/RWKV-LM, RWKV-v5/src/model.py, so official checkpoints load with ``strict=True``;
    `torch_rwkv6.models.load` reads the sizes from them.

    State tuning: with ``train_state=True`` every layer has ``att.time_state``, the state that
    sequences start from. To train it and nothing else::

        model = torch_rwkv6.models.load(checkpoint, train_state=True)
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
        TypeError: a size that is no integer.
        ValueError: a size below 1, or a head_size above 256 or that does not divide n_embd.
    """

    version = "6"

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
        def mixes(layer_id: int) -> tuple[nn.Module, nn.Module]:
            att = TimeMix(
                n_embd,
                layer_id,
                n_layer,
                head_size,
                lora_mix=lora_mix,
                lora_decay=lora_decay,
                ln_x_eps=ln_x_eps,
                train_state=train_state,
            )
            return att, ChannelMix(n_embd, layer_id, n_layer, n_ffn)

        super().__init__(vocab_size, n_layer, n_embd, mixes)
        self.head_size = head_size


class RWKV5(RWKV):
    """The RWKV-5 ("Eagle") language model: 5.2 (x052), and its forerunners 5.0 and 5.1.

    Peng et al., arXiv:2404.05892. It runs on the WKV6 operator, with one decay for all tokens.

    Args:
        vocab_size, n_layer, n_embd, head_size, n_ffn, ln_x_eps, train_state: as for `RWKV6`.
        gate, per_head, log_bonus: as for `TimeMix5`; as they are, the model is 5.2.

    Raises:
        TypeError, ValueError: as for `RWKV6`.
    """

    def __init__(
        self,
        vocab_size: int,
        n_layer: int,
        n_embd: int,
        head_size: int = 64,
        *,
        n_ffn: int | None = None,
        ln_x_eps: float = 64e-5,
        gate: bool = True,
        per_head: bool = False,
        log_bonus: bool = False,
        train_state: bool = False,
    ) -> None:
        def mixes(layer_id: int) -> tuple[nn.Module, nn.Module]:
            att = TimeMix5(
                n_embd,
                layer_id,
                n_layer,
                head_size,
                ln_x_eps=ln_x_eps,
                gate=gate,
                per_head=per_head,
                log_bonus=log_bonus,
                train_state=train_state,
            )
            return att, ChannelMix5(n_embd, layer_id, n_layer, n_ffn)

        super().__init__(vocab_size, n_layer, n_embd, mixes)
        self.head_size = head_size
        self.version = "5.0" if not gate else "5.1" if per_head else "5.2"


class RWKV4(RWKV):
    """The RWKV-4 language model.

    Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048. Parameter
    names, shapes and initial values of BlinkDL/RWKV-LM, RWKV-v4neo/src/model.py.

    Args:
        vocab_size, n_layer, n_embd: as for `RWKV6`.
        n_ffn: F, hidden width of the channel mixing; None is ``4 * n_embd``.

    Raises:
        TypeError: a size that is no integer.
        ValueError: a size below 1.
    """

    version = "4"

    def __init__(
        self, vocab_size: int, n_layer: int, n_embd: int, *, n_ffn: int | None = None
    ) -> None:
        super().__init__(
            vocab_size,
            n_layer,
            n_embd,
            lambda layer_id: (
                TimeMix4(n_embd, layer_id, n_layer),
                ChannelMix4(n_embd, layer_id, n_layer, n_ffn),
            ),
        )
