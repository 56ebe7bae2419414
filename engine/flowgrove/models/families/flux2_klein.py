"""The family of FLUX.2-klein, distilled or base."""

from pathlib import Path
from typing import ClassVar

from flowgrove.models.families.flux2 import Flux2
from flowgrove.models.folders import read_index


class Flux2Klein(Flux2):
    """Like FLUX.2-dev with three layers of Qwen3's, and guidance, in the base models, by a second row."""

    pipeline = "Flux2KleinPipeline"
    published: ClassVar = {
        "black-forest-labs/FLUX.2-klein-4B": "flux2_klein_4b",
        "black-forest-labs/FLUX.2-klein-base-4B": "flux2_klein_base_4b",
        "black-forest-labs/FLUX.2-klein-9B": "flux2_klein_9b",
        "black-forest-labs/FLUX.2-klein-base-9B": "flux2_klein_base_9b",
    }

    @classmethod
    def ignores_guidance(cls, folder: Path) -> bool:
        """Whether the model is a distilled one."""
        return bool(read_index(folder).get("is_distilled"))


FAMILY = Flux2Klein
