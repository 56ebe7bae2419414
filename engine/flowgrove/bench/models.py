"""Models that a benchmark times without downloading any: the embedded pipeline, and larger transformers with random weights."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import torch

from flowgrove.errors import UserError
from flowgrove.models.folders import TINY

# The architecture of SD3 at a size that two CPU cores can train: 12 M weights, 64 picture tokens.
_MID = {"num_layers": 6, "num_attention_heads": 6, "attention_head_dim": 64, "caption_projection_dim": 384, "sample_size": 16}
NAMES = ("tiny", "sd3_mid")


@contextmanager
def bench_model(name: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """The `model` section of a recipe for the model `name`; what it writes is gone after the block. Raises UserError."""
    plain = {"adapter": "sd3", "dtype": "fp32" if device.type == "cpu" else "bf16", "gradient_checkpointing": False}
    if name == "tiny":
        yield {**plain, "path": "tiny"}
    elif name == "sd3_mid":
        with tempfile.TemporaryDirectory() as folder:
            yield {**plain, "path": str(_write_mid(Path(folder) / "pipeline")), "height": 64, "width": 64}
    else:
        raise UserError(f"--model is {name}: write one of {', '.join(NAMES)}")


def _write_mid(folder: Path) -> Path:
    """The embedded pipeline with a larger transformer of seeded random weights."""
    from diffusers import SD3Transformer2DModel

    copytree(TINY, folder, ignore=ignore_patterns("transformer"))
    config = json.loads((TINY / "transformer" / "config.json").read_text(encoding="utf-8"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        SD3Transformer2DModel.from_config({**config, **_MID}).save_pretrained(folder / "transformer")
    return folder
