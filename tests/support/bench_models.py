"""The benchmarks' models at a size for a test."""

from flowgrove.bench.models import write_qwen
from policy_cases import CPU


def small_qwen(folder, **model):
    """A recipe's `model` section of the bench's Qwen-Image with two blocks, written to `folder`."""
    changes = {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 64}
    write_qwen(folder, changes, CPU, {"base_dim": 8, "num_res_blocks": 1})
    return {"adapter": "qwen_image", "path": str(folder), "dtype": "fp32", "height": 32, "width": 32, **model}
