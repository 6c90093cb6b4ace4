"""RWKV-6's two mixing layers for Keras, with the weights of torch_rwkv6.nn under the same names."""

from keras_adapter.layers.channel_mix import RWKV6ChannelMix
from keras_adapter.layers.time_mix import RWKV6TimeMix

__all__ = ["RWKV6ChannelMix", "RWKV6TimeMix"]
