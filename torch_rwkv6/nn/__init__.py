"""The RWKV language models and their layers, under the official parameter names."""

from torch_rwkv6.nn.channel_mix import ChannelMix, ChannelMix4, ChannelMix5
from torch_rwkv6.nn.int8 import Int8Linear, quantize_int8_
from torch_rwkv6.nn.optim import parameter_groups
from torch_rwkv6.nn.rwkv import RWKV, Block
from torch_rwkv6.nn.state import RWKVState
from torch_rwkv6.nn.time_mix import TimeMix
from torch_rwkv6.nn.time_mix4 import TimeMix4
from torch_rwkv6.nn.time_mix5 import TimeMix5
from torch_rwkv6.nn.versions import RWKV4, RWKV5, RWKV6

__all__ = [
    "RWKV",
    "RWKV4",
    "RWKV5",
    "RWKV6",
    "Block",
    "ChannelMix",
    "ChannelMix4",
    "ChannelMix5",
    "Int8Linear",
    "RWKVState",
    "TimeMix",
    "TimeMix4",
    "TimeMix5",
    "parameter_groups",
    "quantize_int8_",
]
