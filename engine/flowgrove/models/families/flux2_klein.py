"""The family of FLUX.2-klein, distilled or base."""

from pathlib import Path
from typing import ClassVar

from flowgrove.errors import UserError
from flowgrove.models.families.flux2 import Flux2
from flowgrove.models.folders import read_index
from flowgrove.models.geometry import Geometry
from flowgrove.recipe.schema import Model


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
    def read_geometry(cls, folder: Path, model: Model) -> Geometry:
        """The geometry that the transformer's and the VAE's configuration give. Raises UserError for guidance of a
        distilled model, which its pipeline ignores.
        """
        if read_index(folder).get("is_distilled") and model.guidance_scale > 1:
            raise UserError(
                f"model.guidance_scale is {model.guidance_scale:g}: {model.path} is distilled to draw without "
                "guidance: leave it out, or take a base model"
            )
        return super().read_geometry(folder, model)


FAMILY = Flux2Klein
