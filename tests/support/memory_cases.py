"""What torch's allocator has held at once."""

from torch.profiler import ProfilerActivity, profile


def allocated(run):
    """Most bytes alive at once beyond those at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in prof.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    live = most = 0
    for _, size in changes:
        live += size
        most = max(most, live)
    return most
