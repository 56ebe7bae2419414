"""Flowgrove: online reinforcement learning of flow-matching models.

Importing it sets PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True for this process: passes differ in size, and
segments that cannot grow leave memory between them that no pass fits into. Nothing is set where the user has set the
allocator, or where torch was imported before, which settles it.
"""

import os
import sys

# the names that torch reads; PYTORCH_ALLOC_CONF is the newer one for every kind of device
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

if "torch" not in sys.modules and not any(name in os.environ for name in _ALLOCATOR):
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
