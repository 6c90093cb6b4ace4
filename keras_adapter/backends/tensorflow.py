"""placeholder"""
from keras_adapter.backends import chunked
wkv, has_kernels = chunked.wkv, False
