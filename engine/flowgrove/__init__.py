"""Flowgrove: online reinforcement learning of flow-matching models.

Import it before torch: then it sets PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True and GOMP_SPINCOUNT=10000 where
the environment says nothing about torch's allocator and the waiting of its threads (`flowgrove.process` says why).
"""

from flowgrove.process import settle

settle()
