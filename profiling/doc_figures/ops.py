"""What the op benchmark found."""

from collections.abc import Iterator

from doc_figures.registry import Row, Rows, block, numbers, only, table, version

CPU, GPU = "ops_cpu.csv", "ops_nvidia_h200.csv"
_CASES = (  # of the benchmark, how the docs call them, and what the contenders' names end in
    ("flow_step", "noise drawn", "`flow_step`, noise drawn", ""),
    ("flow_step", "noise given", "`flow_step`, noise given", ""),
    ("flow_logprob", "forward", "`flow_logprob`, forward", ""),
    ("flow_logprob", "forward+backward", "`flow_logprob`, forward+backward", ""),
    ("grpo_loss", "forward+backward", "`grpo_loss_and_grad`", ""),
    ("grpo_loss", "forward+backward", "`grpo_loss`, then autograd", " autograd"),
)
_SMALL, _LARGE = "flux_720", "wide"


def _measured(rows: Rows, op: str, case: str, contender: str, shape: str = _SMALL, dtype: str = "bf16") -> Row:
    return only(rows, op=op, case=case, contender=contender, shape=shape, dtype=dtype)


@block("docs/ops.md", GPU)
def ops_on_a_gpu(rows: Rows) -> str:
    """Inside a CUDA graph; eager and compiled stand once for the loss, in the line of the single pass."""
    heads = (
        "op", "eager", "compiled", "`triton`", "`cuda`", "`triton`, `cuda`: × eager", "× compiled",
        "512 × 131,072: % of a copy's bandwidth",
    )  # fmt: skip
    lines = []
    for op, case, name, way in _CASES:
        plain = [_measured(rows, op, case, contender) for contender in ("eager", "compiled")]
        ours = [_measured(rows, op, case, backend + way) for backend in ("triton", "cuda")]
        large = [_measured(rows, op, case, backend + way, _LARGE) for backend in ("triton", "cuda")]
        lines.append(
            (
                name,
                *("" if way else f"{row['graph_us']:.1f}" for row in plain),
                *(f"{row['graph_us']:.1f}" for row in ours),
                ", ".join(f"{row['graph_speedup_vs_eager']:.1f}" for row in ours),
                ", ".join(f"{row['graph_speedup_vs_compiled']:.2f}" for row in ours),
                ", ".join(f"{row['graph_percent_of_copy']:.0f}" for row in large),
            )
        )
    return table(heads, lines)


@block("docs/ops.md", CPU)
def ops_on_two_cores(rows: Rows) -> str:
    lines = []
    for op, case, name, way in _CASES:
        if way:
            continue
        for dtype in ("bf16", "fp32"):
            each = [_measured(rows, op, case, who, dtype=dtype) for who in ("eager", "compiled", "cpu")]
            gains = f"{each[-1]['speedup_vs_eager']:.1f}", f"{each[-1]['speedup_vs_compiled']:.2f}"
            lines.append((name, dtype, *(f"{row['median_us'] / 1e3:.2f}" for row in each), *gains))
    return table(("op", "v", "eager", "compiled", "`cpu`", "× eager", "× compiled"), lines)


@numbers("docs/ops.md", GPU, CPU)
def ops(gpu: Rows, cpu: Rows) -> Iterator[tuple[str, ...]]:
    first, rounds = gpu[0], [row["rounds"] for row in gpu]
    versions = version(first["torch"]), version(first["triton"]), first["compiler"].removeprefix("CUDA ")
    yield "One NVIDIA H200, torch {}, Triton {}, CUDA {}, v in bf16", *versions
    yield "medians of {} to {} interleaved rounds inside", f"{min(rounds)}", f"{max(rounds)}"
    large, small = (
        [row["graph_copy_gb_per_s"] / 1e3 for row in gpu if (row["shape"], row["dtype"]) == (shape, "bf16")]
        for shape in (_LARGE, _SMALL)
    )
    if f"{min(large):.1f}" != f"{max(large):.1f}":
        raise ValueError("the sentence on the copy's bandwidth has one number for the large shape")
    yield (
        "the copy moved {} TB/s at the large shape, {} to {} at the small one",
        *(f"{value:.1f}" for value in (large[0], min(small), max(small))),
    )
    step = [_measured(gpu, "flow_step", "noise drawn", name) for name in ("eager", "compiled", "triton", "cuda")]
    host = (f"{row['median_us']:.0f}" for row in step if row["contender"] != "compiled")
    yield "takes {} µs eager, {} `triton`, {} `cuda`", *host
    launches = (f"{row['launches']}" for row in step)
    yield "Such a step is {} launches eager, {} compiled, {} `triton`, {} `cuda`", *launches
    yield "AVX-512, torch {}, medians of {} interleaved runs", version(cpu[0]["torch"]), f"{cpu[0]['rounds']}"
