"""The operator under the names, arguments and layouts of the programs that people come from.

Each module is a face: it converts what a call site of another program passes, calls
`torch_rwkv6.wkv`, and converts the result back. docs/coming-from.md has a line for every program.
"""

from torch_rwkv6.compat import blinkdl, fla, hugging_face, vision_rwkv

__all__ = ["blinkdl", "fla", "hugging_face", "vision_rwkv"]
