"""What a recipe says of its prompts: `data`."""

from typing import Annotated, Literal

from pydantic import Field

from flowgrove.recipe.schema.values import Section, Text


class Data(Section):
    prompts: Text
    """The prompts that are trained on: a file, a folder of a dataset, or the name of a public set.
    Formats: text (a prompt per line), jsonl, json, csv, tsv, parquet, a folder of datasets.save_to_disk. Sets: hpdv2,
    hpdv2_benchmark, pickapic_v1, pickapic_v1_test, pickapic_v2, pickapic_v2_test, drawbench, parti_prompts, from the
    local Hugging Face cache. Every pass over the prompts takes a new seeded order.
    Source: ours.
    """

    eval_prompts: Text | None = None
    """Held-out prompts that evaluations draw, in any format of data.prompts; null: no evaluation.
    Each evaluation draws all of them, so some dozens to a few hundred are enough. Take prompts that data.prompts does
    not hold: else the curve does not tell learning from memorising.
    Source: ours.
    """

    prompts_per_iteration: Annotated[int, Field(ge=1, le=100_000)] = 8
    """The prompts of an iteration, each with a group of rollout.group_size samples.
    All of them enter every update, so that more of them make the gradient less noisy; cost and stored states grow
    linearly with it. Published runs take 32 to 48; raise it before update.lr where the reward jumps up and down.
    Source: GRPO (2402.03300), the batch of questions.
    """

    prompt_key: str | None = None
    """The column or field that holds the prompt; null: prompt, caption or text, whichever comes first.
    Text files and public sets have no use for it. It holds for data.prompts and data.eval_prompts, and for the prompts
    of `flowgrove sample`.
    Source: ours.
    """

    metadata: list[Text] | Literal["all"] | None = None
    """The other columns of a prompt's row that reach its rewards: names, or all; null: none.
    Rewards that take them say which they read; GenEval's are tag, include and exclude. all leaves out the columns that
    hold the prompt, pictures, videos and negative prompts. Text files and public sets have none. It holds for
    data.prompts and data.eval_prompts.
    Source: ours.
    """

    embedding_cache: Text = "auto"
    """Where embeddings of prompts are kept on disk: auto, none or a folder.
    auto: text encoders whose files hold up to 1 GiB stay on the device, as all do with none. Of larger ones every
    prompt is encoded once, into flowgrove/embeddings in the user's cache folder (XDG_CACHE_HOME or ~/.cache), and they
    are freed; where that would take more than 20 GiB of disk, they wait in host memory instead. Name a folder to share
    embeddings between runs of several machines, or to allow more than 20 GiB.
    Source: ours.
    """
