"""RWKV-6 for transformers: configuration, models and the World tokenizer, registered there.

Importing this package is enough for AutoConfig, AutoModel, AutoModelForCausalLM and AutoTokenizer
to know the folders of RWKV-6.
"""

from __future__ import annotations

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers import __version__ as _version
except ImportError as error:
    raise ImportError(
        "torch_rwkv6.hf needs the package transformers: pip install torch_rwkv6[hf]"
    ) from error

if not (5, 6) <= tuple(map(int, _version.split(".")[:2])) < (6, 0):
    raise ImportError(
        f"torch_rwkv6.hf needs transformers 5.6 or newer, below 6, got {_version}: "
        "pip install torch_rwkv6[hf]"
    )

from torch_rwkv6.hf.config import RWKV6Config
from torch_rwkv6.hf.model import RWKV6ForCausalLM, RWKV6Model, RWKV6PreTrainedModel
from torch_rwkv6.hf.tokenizer import RWKV6Tokenizer

__all__ = [
    "RWKV6Config",
    "RWKV6ForCausalLM",
    "RWKV6Model",
    "RWKV6PreTrainedModel",
    "RWKV6Tokenizer",
]

# exist_ok: fla registers classes of its own for the same model_type
AutoConfig.register(RWKV6Config.model_type, RWKV6Config, exist_ok=True)
AutoModel.register(RWKV6Config, RWKV6Model, exist_ok=True)
AutoModelForCausalLM.register(RWKV6Config, RWKV6ForCausalLM, exist_ok=True)
AutoTokenizer.register(RWKV6Config, slow_tokenizer_class=RWKV6Tokenizer, exist_ok=True)
