"""Flowgrove: online reinforcement learning of flow-matching models.

Import it before torch: then it sets PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True and GOMP_SPINCOUNT=10000 where
the environment says nothing about torch's allocator and the waiting of its threads, and in runs of several machines
TRITON_CACHE_DIR where it is not set (`flowgrove.process` says why).

Imports run one way, from a line of this table to the lines below it or along one line, never in a circle:

    __main__
    cli
    commands
    compare
    bench doctor profiler
    trainer
    iteration
    report
    run
    tuning update evaluation cost
    setup
    rollout credit split_evidence
    plan rewards
    models tiny
    passes rates
    joining
    device machine ranks
    recipe data
    paths
    errors files hub process pulse spans
"""

from flowgrove.process import settle

settle()
