"""A test-time-training memory for Moshi, and instruments for long generation.

Plain torch: nothing below this package knows Lightning or TensorBoard.
"""

import os

import torch

# moshi reads this once, when it is imported; on a CPU its first forward would otherwise spend
# 30 to 45 s in torch.compile for a gain that a short run never sees
if not torch.cuda.is_available():
    os.environ.setdefault("NO_TORCH_COMPILE", "1")
