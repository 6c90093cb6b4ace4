"""Random checkpoints of every version, and the same weights under other conventions' names."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from torch_rwkv6.nn import RWKV, RWKV4, RWKV5, RWKV6

V, L, D, N = 41, 3, 32, 8  # vocabulary, layers, width, head size

VERSIONS = {
    "4": lambda L=L: RWKV4(V, L, D),
    "5.0": lambda L=L: RWKV5(V, L, D, N, gate=False, per_head=True, log_bonus=True),
    "5.1": lambda L=L: RWKV5(V, L, D, N, per_head=True, log_bonus=True),
    "5.2": lambda L=L: RWKV5(V, L, D, N),
    "6": lambda L=L: RWKV6(V, L, D, N, lora_mix=4, lora_decay=6),
}


def random_model(version: str, dtype: torch.dtype = torch.float32, n_layer: int = L) -> RWKV:
    """Every parameter random: the official initial values make most of a model a no-op."""
    torch.manual_seed(0)
    model = VERSIONS[version](n_layer)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "emb.weight":
                p.normal_()
            elif ("ln" in name and name.endswith("weight")) or "time_mix" in name:
                p.uniform_(0.2, 1.0)
            elif name.endswith("time_decay"):
                p.uniform_(-6, 1)
            elif p.dim() == 2 and "time_" not in name:
                p.normal_(std=p.shape[1] ** -0.5)
            else:
                p.normal_(std=0.3)
    return model.to(dtype).eval()


def random_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


def hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of the Hugging Face repositories of RWKV-4, 5 and 6."""
    longer = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}
    found = {}
    for name, x in weights.items():
        name = re.sub(r"^emb\.", "rwkv.embeddings.", name)
        name = re.sub(r"^(blocks|ln_out)\.", r"rwkv.\1.", name)
        name = name.replace(".ln0.", ".pre_ln.")
        name = name.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
        name = re.sub(r"time_mix_([kvrg])$", lambda m: f"time_mix_{longer[m[1]]}", name)
        found[name] = x
    return found


def web_rwkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As web-rwkv's converter writes a .st file: RWKV-4, 5.0 and 5.1 stay as they are."""
    transposed = re.compile(r"time_(maa_w[12]|decay_w[12]|state)$")
    found = {}
    for name, x in weights.items():
        new = name.replace("time_faaaa", "time_first").replace("time_maa", "time_mix")
        found[new] = (x.transpose(-2, -1) if transposed.search(name) else x).contiguous()
    return found


def fla(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A RWKV-6 under the names, shapes and orders of fla-hub's repositories."""
    found = {}

    def put(name: str, x: Tensor) -> None:
        found[name] = x.contiguous()

    for name, x in weights.items():
        if not name.startswith("blocks."):
            other = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}
            put(re.sub(r"^\w+", lambda m, o=other: o[m[0]], name), x)
    for i in range(L):
        own = {n.split(".", 2)[2]: x for n, x in weights.items() if n.startswith(f"blocks.{i}.")}
        layer = f"model.layers.{i}"
        for norm, other in (("ln0", "pre_norm"), ("ln1", "attn_norm"), ("ln2", "ffn_norm")):
            for part in ("weight", "bias"):
                if f"{norm}.{part}" in own:
                    put(f"{layer}.{other}.{part}", own[f"{norm}.{part}"])
        for part in ("weight", "bias"):
            put(f"{layer}.attn.g_norm.{part}", own[f"att.ln_x.{part}"])
        for letter in ("receptance", "key", "value", "gate"):
            put(f"{layer}.attn.{letter[0]}_proj.linear.weight", own[f"att.{letter}.weight"])
        put(f"{layer}.attn.o_proj.weight", own["att.output.weight"])
        put(f"{layer}.attn.bonus", own["att.time_faaaa"])
        lora = f"{layer}.attn.w_proj.linear.lora"
        put(f"{lora}.0.weight", own["att.time_decay_w1"].T)
        put(f"{lora}.2.weight", own["att.time_decay_w2"].T)
        put(f"{lora}.2.bias", own["att.time_decay"].flatten())
        put(f"{layer}.attn.x_proj.0.mu", own["att.time_maa_x"].flatten())
        w, k, v, r, g = own["att.time_maa_w1"].chunk(5, 1)  # [D, rank] each
        put(f"{layer}.attn.x_proj.0.linear.weight", torch.cat((r, w, k, v, g), 1).T)
        w, k, v, r, g = own["att.time_maa_w2"]  # [rank, D] each
        put(f"{layer}.attn.x_proj.2.weight", torch.cat((r, w, k, v, g)).T)
        put(
            f"{layer}.attn.x_bias",
            torch.stack([own[f"att.time_maa_{c}"].flatten() for c in "rwkvg"]),
        )
        put(f"{layer}.ffn.key.mu", own["ffn.time_maa_k"].flatten())
        put(f"{layer}.ffn.receptance.mu", own["ffn.time_maa_r"].flatten())
        for part in ("key", "receptance"):
            put(f"{layer}.ffn.{part}.linear.weight", own[f"ffn.{part}.weight"])
        put(f"{layer}.ffn.value.weight", own["ffn.value.weight"])
    return found
