"""`torch_rwkv6.nn.RWKV6` as a model of transformers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from torch_rwkv6.hf.cache import read_states, write_states
from torch_rwkv6.hf.checkpoint import as_state_dict, needs_conversion, write_config
from torch_rwkv6.hf.config import RWKV6Config
from torch_rwkv6.hf.padding import Packing, packing_of
from torch_rwkv6.models.names import foreign_names
from torch_rwkv6.nn import RWKV6, Int8Linear
from torch_rwkv6.nn.carry import call
from torch_rwkv6.nn.recomputed import recomputed

__all__ = ["RWKV6ForCausalLM", "RWKV6Model", "RWKV6PreTrainedModel"]

# While transformers builds a model to load values into, it empties these, which the layers keep, to
# initialise what no file has.
_INITIAL_VALUES = {
    name: getattr(nn.init, name) for name in ("constant_", "orthogonal_", "uniform_", "zeros_")
}


class RWKV6PreTrainedModel(PreTrainedModel):
    """What both models share: the modules of `torch_rwkv6.nn.RWKV6`, under the official names.

    So a LoRA or a file of tensors made for one of these models fits the other.
    """

    config_class = RWKV6Config
    base_model_prefix = ""  # the model without head has the same names
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True  # a state cannot go back to an earlier token

    def __init__(self, config: RWKV6Config) -> None:
        super().__init__(config)
        with mock.patch.multiple(nn.init, **_INITIAL_VALUES):
            self._take(config.new_model())
        self.gradient_checkpointing = False
        self.post_init()

    def _take(self, model: RWKV6) -> None:
        """Makes the modules of a model this one's."""
        self.emb, self.blocks, self.ln_out = model.emb, model.blocks, model.ln_out

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The model of a local folder or file, as transformers' ``from_pretrained``.

        Args:
            pretrained_model_name_or_path: a folder that ``save_pretrained`` wrote, or whatever
                `torch_rwkv6.models.load` reads, in any naming. The latter is read as a whole first,
                and its tensors tell the sizes.
            args, kwargs: of transformers.

        Raises:
            OSError, TypeError, ValueError: as transformers, and as `torch_rwkv6.models.load`.
        """
        source = pretrained_model_name_or_path
        if not needs_conversion(source, kwargs):
            return super().from_pretrained(source, *args, **kwargs)
        loaded: Any = super().from_pretrained(None, *args, **as_state_dict(source, kwargs))
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model.name_or_path = model.config.name_or_path = str(source)
        return loaded

    def save_pretrained(
        self, save_directory: Any, *args: Any, naming: str | None = None, **kwargs: Any
    ) -> None:
        """Writes the model to a folder, as transformers' ``save_pretrained``.

        Args:
            save_directory: the folder.
            naming: None is the official names, which `torch_rwkv6.models.load` and
                ``from_pretrained`` read. For other programs, ``"RWKV"`` writes tensors and
                config.json as the ``modeling_rwkv6.py`` of ``RWKV/v6-Finch-*-HF`` wants them, and
                ``"fla-hub"`` as fla does. ``from_pretrained`` reads these as well.
            args, kwargs: of transformers.

        Raises:
            TypeError: its matrices are int8 (`torch_rwkv6.nn.quantize_int8_`).
            ValueError: another naming; or one that lacks what the model has: tuned states,
                ``ln_x_eps`` other than 64e-5.
        """
        if any(isinstance(module, Int8Linear) for module in self.modules()):
            raise TypeError("model: expected floating-point matrices, got int8: save it before")
        if naming is None:
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        config = copy.deepcopy(self.config)
        config.take_sizes(self)
        tensors = foreign_names(kwargs.pop("state_dict", None) or self.state_dict(), naming)
        if config.ln_x_eps != RWKV6Config.ln_x_eps:
            raise ValueError(f"naming: {naming} has ln_x_eps 64e-5, the model {config.ln_x_eps}")
        if config.tie_word_embeddings:  # transformers would look for the official names
            tensors = {name: x.clone() for name, x in tensors.items()}
        super().save_pretrained(save_directory, *args, state_dict=tensors, **kwargs)
        write_config(config, naming, save_directory)

    def init_weights(self) -> None:
        """Ties weights; `torch_rwkv6.nn.RWKV6` has given them their initial values already."""
        self.tie_weights(recompute_mapping=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The official initial values of what no file had."""
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is None:
            return
        loaded = [p for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
        values = [p.clone() for p in loaded]
        reset()
        for parameter, value in zip(loaded, values, strict=True):
            parameter.copy_(value)

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.emb = value

    @staticmethod
    def create_masks_for_generate(
        *, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache, **_: Any
    ) -> Tensor | None:
        """What ``generate`` passes as attention_mask: none for a single token that it wrote."""
        wrote = inputs_embeds.shape[1] == 1 and past_key_values.has_previous_state()
        return None if wrote else attention_mask

    def _features(
        self,
        input_ids: Tensor | None,  # [B, T]
        attention_mask: Tensor | None,  # [B, S], S >= T
        inputs_embeds: Tensor | None,  # [B, T, D]
        past_key_values: Cache | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        position_ids: Tensor | None,  # [B, T]
    ) -> BaseModelOutputWithPast:
        """The input of the head, [B, T, D]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected either these or inputs_embeds, got both or none")
        x = self.emb(input_ids) if inputs_embeds is None else inputs_embeds
        # transformers' own function for this would compute WKV twice
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if past_key_values is None and use_cache and not recompute:
            past_key_values = DynamicCache(config=self.config)
        packing = packing_of(attention_mask, position_ids, x)
        run = recomputed if recompute else call
        streams = []
        for i, block in enumerate(self.blocks):
            streams.append(x)
            x, *states = _run(run, packing, block, x, *read_states(past_key_values, i))
            if past_key_values is not None:
                write_states(past_key_values, i, *states)
        streams.append(self.ln_out(x))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=streams[-1],
            past_key_values=past_key_values,
            hidden_states=tuple(streams) if output_hidden_states else None,
        )


def _run(
    run: Callable[..., list[Any]],  # call or recomputed
    packing: Packing | None,
    block: nn.Module,
    x: Tensor,  # [B, T, D]
    *states: Tensor | None,  # att_shift, wkv, ffn_shift
) -> list[Any]:
    """What a block makes of x, and its new states."""
    if packing is not None:
        states = tuple(packing.pack_state(state) for state in states)
        y, *new = run(block, packing.pack(x), *states, update=False, cu_seqlens=packing.cu_seqlens)
        return [packing.unpack(y), *(packing.unpack_state(state) for state in new)]
    update = states[0] is not None and not torch.is_grad_enabled()
    return run(block, x, *states, update=update)


class RWKV6Model(RWKV6PreTrainedModel):
    """`torch_rwkv6.nn.RWKV6` without its head, as a model of transformers.

    Args:
        config: sizes and settings.
    """

    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # noqa: RUF012

    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, T]
        attention_mask: Tensor | None = None,  # [B, S], S >= T
        inputs_embeds: Tensor | None = None,  # [B, T, D]
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The input of the head, [B, T, D], as ``last_hidden_state``.

        Arguments and errors as for `RWKV6ForCausalLM.forward`.
        """
        outputs = self._features(
            input_ids, attention_mask, inputs_embeds, past_key_values, use_cache,
            output_hidden_states, kwargs.get("position_ids"),
        )  # fmt: skip
        return outputs if _as_dict(self.config, return_dict) else outputs.to_tuple()


class RWKV6ForCausalLM(RWKV6PreTrainedModel, GenerationMixin):
    """`torch_rwkv6.nn.RWKV6` as a language model of transformers.

    Args:
        config: sizes and settings.
    """

    _tied_weights_keys = {"head.weight": "emb.weight"}  # noqa: RUF012

    def _take(self, model: RWKV6) -> None:
        super()._take(model)
        self.head = model.head

    @property
    def base_model(self) -> Any:
        """The model without its head, which is no module of its own: only to be called.

        TRL calls it, to compute the loss from the head's weight without whole logits.
        """
        return functools.partial(RWKV6Model.forward, self)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, T]
        attention_mask: Tensor | None = None,  # [B, S], S >= T
        inputs_embeds: Tensor | None = None,  # [B, T, D]
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,  # [B, T]
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits of the next token after every token, and the states after the last.

        Args:
            input_ids: tokens, [B, T].
            attention_mask: 1 for a token and 0 for padding, [B, S]; its last T columns belong to
                these tokens. Padding changes no state, wherever it stands. Where it follows a
                token, the logits are those after that token.
            inputs_embeds: in place of input_ids, their embeddings [B, T, D].
            past_key_values: the states after the tokens before, a ``DynamicCache`` made with this
                model's configuration; it is updated.
            labels: the tokens themselves, or -100 where none is to be learnt: the loss is that of
                the next token.
            use_cache: whether to return the states; None is the configuration's ``use_cache``, but
                no in training.
            output_hidden_states: whether to return the input of every block and of the head.
            return_dict: False returns a tuple.
            logits_to_keep: how many of the last places to compute logits for, or which; 0 is all.
            kwargs: of the loss; and position_ids, [B, T], which the model needs only where a row
                is several texts (``packing`` of trainers): each begins at position 0, and nothing
                of one reaches another. The states are those after the last text of a row.

        Returns:
            A ``CausalLMOutputWithPast``: loss, logits [B, T, V], past_key_values, hidden_states.

        Raises:
            TypeError: past_key_values is a cache of another kind.
            ValueError: both or neither of input_ids and inputs_embeds; a mask or
                positions of another shape; several texts in a row with padding or with a cache.
        """
        outputs = self.base_model(
            input_ids, attention_mask, inputs_embeds, past_key_values, use_cache,
            output_hidden_states, True, **kwargs,
        )  # fmt: skip
        x = outputs.last_hidden_state
        last = isinstance(logits_to_keep, int)
        logits = self.head(x[:, -logits_to_keep:] if last else x[:, logits_to_keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return result if _as_dict(self.config, return_dict) else result.to_tuple()


def _as_dict(config: RWKV6Config, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)
