"""What a recipe says of how it is computed: `engine`."""

from typing import Any, Literal

from pydantic import field_validator

from flowgrove.recipe.schema.values import Count, Section


class Engine(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the run computes; auto takes a CUDA GPU where torch sees one.
    Source: ours.
    """

    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """The implementation of the fused step, log-probability and loss.
    auto leaves it to the variable FLOWGROVE_BACKEND, else to the device. reference is PyTorch and the specification of
    the others; all agree up to rounding. Name one to rule the others out when a run misbehaves; `flowgrove doctor` says
    which are available.
    Source: ours.
    """

    token_budget: Literal["auto"] | Count = "auto"
    """The most tokens of a pass: rows × (picture + text tokens of the longest), both rows of guidance counted.
    Rollout, training and evaluation fill passes up to it. auto: on a CPU 4096; on a GPU the fastest that fits, measured
    when a run begins and remembered in the user's cache folder. Where memory runs out passes are halved and the run
    goes on. Change it after `flowgrove tune`, or to leave room for others.
    Source: ours.
    """

    share: bool = True
    """Whether a state that several trajectories share is computed once.
    false runs every trajectory and edge for itself, as the published loops do: the same samples, losses and gradients
    up to rounding, at their cost. It is for comparisons.
    Source: ours; sharing in the rollout: BranchGRPO (2509.06040).
    """

    exact_replay: bool = False
    """Whether training repeats the rollout's passes row by row, so that logp_drift is exactly 0.
    Rows that do not train run along, and the first update does not reuse the rollout's graphs. Switch it on to see
    whether rounding in other batches is what hurts; it needs share.
    Source: ours.
    """

    attention: str = "auto"
    """The attention kernel: auto, sdpa, flash, flash3, xformers, cudnn, or another name of diffusers' dispatch.
    auto and sdpa are PyTorch's own without cuDNN's kernels, whose backward has read outside its memory on an H200;
    cudnn asks for them all the same. sd3 takes sdpa and xformers alone. `flowgrove doctor` says which can run here,
    `flowgrove tune` measures them and refuses those whose results differ.
    Source: diffusers' attention dispatch.
    """

    split_lengths: bool = False
    """Whether a pass runs its texts of each length apart, without padding and without a mask.
    For models that read prompts of any length under a mask (Qwen-Image and its successors, Z-Image, HunyuanVideo-1.5,
    LTX-Video). Without one PyTorch's attention has its flash kernels, and engine.attention takes kernels that know no
    mask. The result is the same up to rounding. It is for models that one row fills a device with: a pass of several
    lengths, such as those of a prompt and of the negative one, runs the transformer once for each. Not with
    engine.cuda_graphs, engine.distributed: fsdp2 and rollout.cache. `flowgrove tune` measures it.
    Source: ours.
    """

    compile: bool | Literal["max-autotune-no-cudagraphs"] = False
    """Whether torch.compile compiles each transformer block, and how.
    true: a handful of graphs, for passes of any rows and lengths, before the first iteration: minutes that pay in long
    runs, and less the next time, since compiled code stays in the user's cache folder (TORCHINDUCTOR_CACHE_DIR), or on
    several machines where torch keeps it on each. max-autotune-no-cudagraphs: it also times several kernels for each
    product, which takes longer. CUDA graphs are engine.cuda_graphs, which goes with either. `flowgrove tune --compile`
    measures it.
    Source: PyTorch's regional compilation; the modes are torch.compile's.
    """

    cuda_graphs: bool = False
    """Whether the rollout's passes are recorded as CUDA graphs and replayed, one per shape; on a GPU only.
    It helps where launching kernels takes longer than running them: small models, few rows. Recordings hold memory.
    Source: PyTorch's CUDA graphs.
    """

    reuse_rollout_graph: Literal["auto"] | bool = "auto"
    """Whether the rollout's forward of trained steps serves the backward of the first update, whose policy it shares.
    It saves those forwards and makes their logp_drift 0, and holds their activations through the rollout. auto: as many
    as by prediction fit into the GPU's memory, or a quarter of the machine's, and only of passes that fill a quarter of
    the token budget; none with pruning by reward. true: all of them, until memory runs out. false: none.
    Source: ours.
    """

    ahead: bool = False
    """Whether the next iteration's prompts are encoded while this one's updates run.
    Its states and rewards must wait for the new weights; texts and source pictures need not. It helps where encoders
    stay loaded (data.embedding_cache) and `flowgrove profile` shows time in encode; what a prompt's encoding takes then
    comes on top of an update's memory. Encoders that wait in host memory stay there, and beside attention kernels that
    are chosen for the whole process (sdpa_flash, cudnn, _native_math, _native_efficient) nothing is encoded ahead. The
    result is the same.
    Source: ours.
    """

    distributed: Literal["none", "ddp", "fsdp2"] = "none"
    """How a run is spread over the processes that torchrun starts, one for each device.
    Each trains on its share of an iteration's prompts, and gradients are added up; the result is that of one process.
    ddp: every device holds the whole model, and one reduction adds up the gradients of an update; made for LoRA. fsdp2:
    weights, gradients, moments and averages are divided among the devices; made for full fine-tuning, and for LoRA on
    models that fill a device.
    Source: PyTorch Distributed (2006.15704), PyTorch FSDP (2304.11277); the division of prompts is ours.
    """

    reshard_after_forward: Literal["auto"] | bool = "auto"
    """Whether fsdp2 frees a block's gathered weights when a training pass has left it, and gathers them again.
    false: they stay gathered until they change, one gather an update, with the whole model in model.dtype on every
    device. true: one block at a time, two gathers a pass. auto: false where the memory prediction says that it fits.
    Rollouts and evaluations run gathered in any case.
    Source: PyTorch FSDP2's fully_shard.
    """

    shard_degree: Count | None = None
    """Among how many devices fsdp2 divides the weights; null: all of them.
    The number of devices of a machine, on several machines, divides within each and adds up gradients between them
    (HSDP): gathers then stay on the fast links, and every machine holds all weights once.
    Source: PyTorch FSDP (2304.11277), hybrid sharding.
    """

    @field_validator("compile", mode="before")
    @classmethod
    def _mode_of_compile(cls, value: Any) -> Any:
        if value in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                f"{value} records CUDA graphs of its own, which passes whose graphs are kept would overwrite: write "
                "true or max-autotune-no-cudagraphs, and engine.cuda_graphs: true"
            )
        return value
