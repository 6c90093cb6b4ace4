"""RWKV-6 weights as a GGUF file, the format of llama.cpp, through the package gguf.

Names, shapes and which tensors stay in float32 are those of llama.cpp's own conversion
(ggml-org/llama.cpp, conversion/rwkv.py and base.py). The file has no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from torch_rwkv6.nn import RWKV6

KINDS = ("F32", "BF16", "Q8_0")  # of gguf.GGMLQuantizationType
NORM_EPS = 1e-5
# From the official names to Hugging Face's, which gguf knows
RENAMED = (
    (r"^emb\.", "rwkv.embeddings."),
    (r"^ln_out\.", "rwkv.ln_out."),
    (r"^blocks\.0\.ln0\.", "rwkv.blocks.0.pre_ln."),
    (r"^blocks\.", "rwkv.blocks."),
    (r"\.att\.", ".attention."),
    (r"\.ffn\.", ".feed_forward."),
)
TRANSPOSED = ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2")
# Matrices that stay in float32
SMALL = ("time_mix_first", "time_mix_w1", "time_mix_decay_w1", "time_mix_decay_w2")
FUSED = tuple(f"att.time_maa_{x}" for x in "wkvrg")  # one tensor in the file, in this order


def write_gguf(model: RWKV6, path: Path, kind: str) -> None:
    """Writes the model's weights to a file; its matrices in the kind of KINDS."""
    import gguf

    arch = gguf.MODEL_ARCH.RWKV6
    name_map = gguf.get_tensor_name_map(arch, model.n_layer)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    block = model.blocks[0]
    writer.add_context_length(2**20)  # there is no limit
    writer.add_embedding_length(model.n_embd)
    writer.add_block_count(model.n_layer)
    writer.add_feed_forward_length(block.ffn.key.weight.shape[0])
    writer.add_layer_norm_eps(NORM_EPS)
    writer.add_wkv_head_size(model.head_size)
    writer.add_time_mix_extra_dim(block.att.time_maa_w2.shape[1])
    writer.add_time_decay_extra_dim(block.att.time_decay_w1.shape[1])
    writer.add_head_count(0)  # is asked for, and not used
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(model.vocab_size)
    matrices = gguf.GGMLQuantizationType[kind]
    for name, x in _tensors(model, name_map):
        small = x.ndim != 2 or name.split(".")[-2] in SMALL
        own = gguf.GGMLQuantizationType.F32 if small else matrices
        writer.add_tensor(name, gguf.quants.quantize(x, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: RWKV6, name_map: Any) -> Iterator[tuple[str, Any]]:
    """llama.cpp's names, and float32 arrays of the shapes that it wants."""
    tensors = dict(model.named_parameters())
    for i in range(model.n_layer):
        mixes = [_array(tensors.pop(f"blocks.{i}.{name}")) for name in FUSED]
        yield f"blk.{i}.time_mix_lerp_fused.weight", np.stack(mixes)[:, None, None]  # [5, 1, 1, D]
    for name, x in tensors.items():
        if name.endswith(TRANSPOSED):
            x = x.transpose(-1, -2)
        for official, other in RENAMED:
            name = re.sub(official, other, name)
        found = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        yield found if found.endswith((".weight", ".bias")) else f"{found}.weight", _array(x)


def _array(x: Tensor) -> Any:
    """Without the axes of length 1 in front."""
    x = x.detach().float()
    return np.ascontiguousarray((x.flatten() if x.shape[0] == 1 else x).numpy())
