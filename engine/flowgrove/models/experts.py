"""Two transformers as one module: an expert for noisy states and one for the rest (the A14B models of Wan2.2).

What trains, stores, shards, compiles, rounds or exports weights sees one tree, with the experts under the names of
their folders. A pass runs one of them, which whoever plans it names: the plan knows every step's σ on the host. Rows of
both never share a pass. Splitting the rows of a mixed one would run two half-filled passes in its place, and how many
rows each has would have to be known on the host; a pass of one expert is as full as others, reads one expert's weights,
and can be recorded.
"""

from pathlib import Path
from typing import Any

from torch import nn

from flowgrove.models.folders import part_names
from flowgrove.recipe.schema import Expert, Model

FOLDERS: dict[Expert, str] = {"high": "transformer", "low": "transformer_2"}  # in a diffusers pipeline


class Experts(nn.Module):
    """`transformer` runs states of high noise, `transformer_2` the others; both are of one class and configuration.

    `trained`: those that may train; the dtype and the LoRA configuration are those of the first of them.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, trained: tuple[Expert, ...]) -> None:
        super().__init__()
        self.transformer, self.transformer_2 = transformer, transformer_2
        self.trained = trained

    def forward(self, *inputs: Any, expert: Expert, **named: Any) -> Any:
        """What one expert gives."""
        return self[expert](*inputs, **named)

    def __getitem__(self, expert: Expert) -> Any:
        return self.get_submodule(FOLDERS[expert])

    @property
    def _parts(self) -> dict[str, Any]:
        return dict(self.named_children())

    @property
    def config(self) -> Any:
        """That of both."""
        return self.transformer.config

    @property
    def dtype(self) -> Any:
        """That of the first that trains."""
        return self[self.trained[0]].dtype

    @property
    def peft_config(self) -> Any:
        """That of the LoRA layers. Raises AttributeError where there are none."""
        return self[self.trained[0]].peft_config

    @property
    def _keep_in_fp32_modules(self) -> Any:
        return getattr(self.transformer, "_keep_in_fp32_modules", None)

    @property
    def attn_processors(self) -> dict[str, Any]:
        """Every attention processor by its name in this module."""
        return {
            f"{folder}.{name}": processor
            for folder, part in self._parts.items()
            for name, processor in part.attn_processors.items()
        }

    def set_attn_processor(self, processor: Any) -> None:
        """Sets one processor for all attention layers, or those that `attn_processors` gave."""
        for folder, part in self._parts.items():
            mine = processor
            if isinstance(processor, dict):
                start = f"{folder}."
                mine = {name.removeprefix(start): one for name, one in processor.items() if name.startswith(start)}
            part.set_attn_processor(mine)

    def set_attention_backend(self, name: str) -> None:
        """Sets the attention of both."""
        for part in self._parts.values():
            part.set_attention_backend(name)

    def enable_gradient_checkpointing(self, *function: Any) -> None:
        """Makes both compute their blocks again in a backward."""
        for part in self._parts.values():
            part.enable_gradient_checkpointing(*function)

    def disable_gradient_checkpointing(self) -> None:
        """Makes both keep all of their blocks."""
        for part in self._parts.values():
            part.disable_gradient_checkpointing()

    def enable_adapters(self) -> None:
        """Switches LoRA layers on."""
        for expert in self.trained:
            self[expert].enable_adapters()

    def disable_adapters(self) -> None:
        """Switches LoRA layers off."""
        for expert in self.trained:
            self[expert].disable_adapters()


def transformer_folders(folder: Path) -> list[str]:
    """The folders of a pipeline's transformers, the first of which every pipeline has."""
    named = part_names(folder)
    return [name for name in FOLDERS.values() if name in named or name == FOLDERS["high"]]


def trained_experts(model: Model) -> tuple[Expert, ...]:
    """The experts that a recipe trains."""
    return ("high", "low") if model.trained_experts == "both" else (model.trained_experts,)


def as_one(parts: dict[str, Any], model: Model) -> Any:
    """The transformer of `parts`, by their folders; two of them as one module."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    return Experts(**parts, trained=trained_experts(model))


def parts_of(transformer: nn.Module) -> list[Any]:
    """Both experts, or the one transformer."""
    return list(transformer.children()) if isinstance(transformer, Experts) else [transformer]


def trained_parts(transformer: Any) -> dict[str, Any]:
    """Those that train, by what the names of their weights begin with in the whole: "" for one transformer."""
    if isinstance(transformer, Experts):
        return {f"{FOLDERS[expert]}.": transformer[expert] for expert in transformer.trained}
    return {"": transformer}


def expert_of(name: str) -> tuple[Expert | None, str]:
    """The expert that a weight or layer of an `Experts` belongs to, and its name there; None: of one transformer."""
    folder, _, rest = name.partition(".")
    expert = next((one for one, its in FOLDERS.items() if its == folder), None)
    return (expert, rest) if expert is not None else (None, name)
