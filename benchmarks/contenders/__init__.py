"""The contenders. Each is a function (work, inputs, threads) -> Job in a module of this package."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Contender:
    """`target` is "module:function" below this package, imported only in the contender's worker."""

    label: str
    target: str
    package: str = ""  # a key of REQUIREMENTS where it needs a package that is not ours
    environment: tuple[tuple[str, str], ...] = ()

    def named(self, more: str) -> Contender:
        """The same program in another role, with a table row and a process of its own."""
        return replace(self, label=f"{self.label}, {more}")

    @property
    def ours(self) -> bool:
        return self.label.startswith("torch_rwkv6")


# What to install for the contenders that come from PyPI, each in a folder of its own; packages
# are apart by spaces.
REQUIREMENTS = {
    "jax": "jax>=0.5",
    "rwkv-ops": "rwkv-ops>=0.11.3",
    "ggml": "ggml-python>=0.0.45",
    "llama.cpp": "llama-cpp-python>=0.3.36 gguf>=0.17",
}
SLOW = {"llama.cpp"}  # compiled for half an hour: installed only where it is asked for by name

OURS = Contender("torch_rwkv6", "ours:prepare")
C_INTERFACE = Contender("torch_rwkv6, C interface", "c_interface:prepare")
WITHOUT_KERNELS = Contender("torch_rwkv6, without kernels", "without_kernels:prepare")
EAGER = Contender("PyTorch loop", "eager:prepare")
COMPILED = Contender("PyTorch loop, torch.compile", "compiled:prepare_loop")
CHUNKED = Contender("PyTorch chunked", "chunked:prepare")
COMPILED_CHUNKED = Contender("PyTorch chunked, torch.compile", "compiled:prepare_chunked")
JAX = Contender("JAX lax.scan", "jax_scan:prepare", "jax")
RWKV_OPS = Contender("rwkv-ops native", "rwkv_ops_native:prepare", "rwkv-ops")
GGML = Contender("ggml rwkv_wkv6 + decays", "ggml_cpu:prepare", "ggml")
STREAM = Contender("limit: stream the tensors", "limits:stream")
STATE = Contender("limit: read + write the state", "limits:state")
FMA = Contender("limit: 2 N² FMAs a token", "limits:fma")

RIVALS = (WITHOUT_KERNELS, EAGER, COMPILED, CHUNKED, COMPILED_CHUNKED, JAX, RWKV_OPS, GGML)
# without the one that compiles for a minute
SHORT_RIVALS = tuple(rival for rival in RIVALS if rival is not COMPILED_CHUNKED)


def at_level(isa: str) -> Contender:
    """torch_rwkv6 restricted to one instruction set."""
    return replace(OURS.named(isa), environment=(("RWKV6_CPU_ISA", isa),))
