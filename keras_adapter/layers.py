class RWKV6TimeMix: pass
class RWKV6ChannelMix: pass
