"""The operators' schemas: the contract. csrc/bindings/torch.cpp holds the same ones."""

from __future__ import annotations

import torch

import torch_rwkv6

SCHEMAS = {
    "wkv": "(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? initial_state=None, "
    "Tensor? state_map=None, Tensor? cu_seqlens=None) -> (Tensor y, Tensor final_state)",
    "wkv_backward": "(Tensor? grad_y, Tensor? grad_final_state, Tensor r, Tensor k, Tensor v, "
    "Tensor w, Tensor u, Tensor? initial_state, Tensor? state_map, Tensor? cu_seqlens) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "wkv_update": "(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor(a!) state, "
    "Tensor? state_map=None, Tensor? cu_seqlens=None) -> Tensor",
    "wkv4": "(Tensor k, Tensor v, Tensor w, Tensor u, Tensor? initial_state=None) -> "
    "(Tensor y, Tensor final_state)",
    "wkv4_backward": "(Tensor? grad_y, Tensor? grad_final_state, Tensor k, Tensor v, Tensor w, "
    "Tensor u, Tensor? initial_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "wkv4_update": "(Tensor k, Tensor v, Tensor w, Tensor u, Tensor(a!) state) -> Tensor",
    "matvec": "(Tensor x, Tensor weight) -> Tensor",
    # eager decoding on a CPU, and nothing else: see torch_rwkv6/nn/decode.py
    "decode_layer": "(Tensor x, Tensor(a!) att_shift, Tensor(b!) wkv, Tensor(c!) ffn_shift, "
    "Tensor[] parameters, float ln_eps, float ln_x_eps) -> Tensor",
}

library = torch.library.Library("rwkv6", "FRAGMENT")
if not torch_rwkv6.has_kernels:
    for name, signature in SCHEMAS.items():
        library.define(name + signature)
