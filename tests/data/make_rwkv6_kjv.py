"""Made rwkv6-kjv.pth and rwkv6-kjv-expected-logits.npy, the checkpoint of tests/test_checkpoint.py.

    python examples/train_lm.py --n-layer 2 --n-embd 64 --head-size 32 --lora-mix 8 \
        --lora-decay 8 --batch-size 16 --length 32 --lr 6e-3 --steps 1500 --out run
    pip install rwkv==0.8.32
    python tests/data/make_rwkv6_kjv.py run/model.pth

The weights are rounded to bfloat16, as official checkpoints are; the logits, [T, V] after every
byte of the prompt, are those that the package rwkv (another implementation, by BlinkDL) computes
from them in float32 on a CPU. The text is the King James Bible.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
from rwkv.model import RWKV

PROMPT = b"And God said, Let there be light"

here = Path(__file__).parent
weights = torch.load(sys.argv[1], weights_only=True)
# cloned: a view would be saved with all of its storage
weights = {name: x.to(torch.bfloat16).clone() for name, x in weights.items()}
torch.save(weights, here / "rwkv6-kjv.pth")
with tempfile.TemporaryDirectory() as folder:
    # handed over as float32: from a bfloat16 file the package would round ln0(emb) to bfloat16
    path = Path(folder) / "float32.pth"
    torch.save({name: x.float() for name, x in weights.items()}, path)
    model = RWKV(model=str(path), strategy="cpu fp32")
logits, _ = model.forward(list(PROMPT), None, full_output=True)
np.save(here / "rwkv6-kjv-expected-logits.npy", logits.float().numpy())
