"""The RWKV-6 ("Finch", x060) language model and its layers, under the official parameter names."""

from torch_rwkv6.nn.channel_mix import ChannelMix
from torch_rwkv6.nn.model import RWKV6, Block, RWKV6State
from torch_rwkv6.nn.optim import parameter_groups
from torch_rwkv6.nn.time_mix import TimeMix

__all__ = ["RWKV6", "Block", "ChannelMix", "RWKV6State", "TimeMix", "parameter_groups"]
