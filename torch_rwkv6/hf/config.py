"""The sizes and settings of an RWKV-6, as transformers keeps them in config.json."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from torch_rwkv6.nn import RWKV6

__all__ = ["RWKV6Config"]


class RWKV6Config(PreTrainedConfig):
    """Configuration of `RWKV6Model` and `RWKV6ForCausalLM`.

    It also reads the config.json of ``RWKV/v6-Finch-*-HF``, ``RWKV/rwkv-6-world-*`` and
    ``fla-hub/rwkv6-*-finch``, which have the same ``model_type``.

    Args:
        vocab_size, hidden_size, num_hidden_layers: V, D and L.
        head_size: N.
        intermediate_size: F, ``n_ffn`` of `torch_rwkv6.nn.RWKV6`.
        lora_mix, lora_decay, ln_x_eps, train_state: as for `torch_rwkv6.nn.RWKV6`.
        use_cache: whether calls return the states.
        bos_token_id, eos_token_id, pad_token_id: 0 is the end of text in the World vocabulary.
        tie_word_embeddings: the head has the weight of the embedding. No official checkpoint does.
        kwargs: of transformers' ``PreTrainedConfig``.
    """

    model_type = "rwkv6"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  the Trainer adds a list

    vocab_size: int = 65536
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    head_size: int = 64
    intermediate_size: int | None = None
    lora_mix: int | None = None
    lora_decay: int | None = None
    ln_x_eps: float = 64e-5
    train_state: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # What follows from other settings is not kept, and neither are fla's names for them.
        kwargs.pop("num_attention_heads", None)
        kwargs.pop("auto_map", None)  # a repository's own code, which is not saved with it
        if kwargs.get("num_heads"):
            self.head_size = self.hidden_size // kwargs.pop("num_heads")
        self.lora_mix = kwargs.pop("proj_low_rank_dim", self.lora_mix)
        self.lora_decay = kwargs.pop("gate_low_rank_dim", self.lora_decay)
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """What kind of cache transformers makes for each layer."""
        return ["linear_attention"] * self.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """H, which peft wants to know."""
        return self.hidden_size // self.head_size

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "num_attention_heads": self.num_attention_heads}

    def new_model(self) -> RWKV6:
        """A new `torch_rwkv6.nn.RWKV6` of these sizes.

        Raises:
            TypeError, ValueError: as `torch_rwkv6.nn.RWKV6`.
        """
        return RWKV6(
            self.vocab_size,
            self.num_hidden_layers,
            self.hidden_size,
            self.head_size,
            n_ffn=self.intermediate_size,
            lora_mix=self.lora_mix,
            lora_decay=self.lora_decay,
            ln_x_eps=self.ln_x_eps,
            train_state=self.train_state,
        )

    def take_sizes(self, model: Any) -> None:
        """Sets the sizes to those of a model, and train_state if it has ``time_state``."""
        att, ffn = model.blocks[0].att, model.blocks[0].ffn
        self.vocab_size, self.hidden_size = model.emb.weight.shape
        self.num_hidden_layers, self.head_size = len(model.blocks), att.time_faaaa.shape[1]
        self.intermediate_size = ffn.key.out_features
        self.lora_mix = att.time_maa_w2.shape[1]
        self.lora_decay = att.time_decay_w2.shape[0]
        self.train_state = self.train_state or att.time_state is not None
