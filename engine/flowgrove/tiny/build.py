"""Rebuilds the embedded pipeline: `python -m flowgrove.tiny.build --out DIR`, about a quarter of an hour on two cores.

A StableDiffusion3Pipeline of real diffusers and transformers classes, small enough to ship: an f4 VAE (8×8×4 latents),
two CLIP text encoders and a T5 encoder, trained together with an SD3 transformer of 16 picture tokens. It is mediocre
on purpose: `NOISY_CAPTIONS` of its captions have one detail wrong, as captions from the web do, and training stops
early. So it draws most things, and follows its prompt loosely; that is what the reward can mend.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from flowgrove.passes.allocator import keep_freed_memory
from flowgrove.tiny.pictures import Scene, confuse, held_out, pair_scenes, render, single_scenes

CLIP_TOKENS, T5_TOKENS = 10, 9  # the longest sentence has 8 words, plus start and end
WIDTH, LAYERS, HEAD_WIDTH, TEXT_WIDTH = 96, 3, 32, 64
NOISY_CAPTIONS, EMPTY_CAPTIONS = 0.35, 0.1
VAE_STEPS, FLOW_STEPS = 1500, 1000


def build_tokenizers(sentences: list[str]) -> tuple[CLIPTokenizer, CLIPTokenizer, T5Tokenizer]:
    """Tokenizers in which every word of `sentences` is one token; other words fall into letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    byte_pairs = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    byte_pairs.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    byte_pairs.train_from_iterator(sentences, trainer)
    trained = json.loads(byte_pairs.to_str())["model"]
    vocab, merges = trained["vocab"], [tuple(pair) for pair in trained["merges"]]
    for letter in letters:
        vocab.setdefault(letter + "</w>", len(vocab))
    first, second = (CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_TOKENS) for _ in range(2))
    words = sorted({word for sentence in sentences for word in sentence.split()})
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -8.0),
        *((c, -10.0) for c in letters),
        *(("▁" + w, -3.0) for w in words),
    ]
    return first, second, T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS)


def build_pipeline(sentences: list[str]) -> StableDiffusion3Pipeline:
    """The untrained pipeline."""
    tokenizer, tokenizer_2, tokenizer_3 = build_tokenizers(sentences)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH // 2,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=TEXT_WIDTH // 2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(tokenizer_3),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=WIDTH // HEAD_WIDTH,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer_2=tokenizer_2,
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=tokenizer_3,
    )


def train_vae(vae: AutoencoderKL, scenes: list[Scene], steps: int, generator: random.Random) -> None:
    """Reconstruction (L1) with a slight pull towards N(0, I);
    then the shift and scale that make latents zero-mean and unit-variance.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        pictures = render(generator.choices(scenes, k=48), generator) * 2 - 1
        posterior = vae.encode(pictures).latent_dist
        error = (vae.decode(posterior.sample()).sample - pictures).abs().mean()
        loss = error + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        _step(optimizer, loss)
        schedule.step()
        if step % 250 == 0:
            print(f"vae {step}/{steps}: L1 {error.item():.4f}", flush=True)
    with torch.no_grad():
        latents = vae.encode(render(generator.choices(scenes, k=512), generator) * 2 - 1).latent_dist.mean
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )


def train_flow(pipe: StableDiffusion3Pipeline, scenes: list[Scene], steps: int, generator: random.Random) -> None:
    """Flow matching (v = ε − x0, logit-normal σ) of transformer and text encoders together;
    leaves the averaged weights in place.
    """
    parts = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    parameters = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.99))
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=200)
    average = [p.detach().clone() for p in parameters]
    for step in range(steps):
        batch = generator.choices(scenes, k=128)
        latents = _encode(pipe.vae, render(batch, generator))
        noise, sigma = torch.randn_like(latents), torch.sigmoid(1.1 * torch.randn(len(batch)))
        mixed = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
        captions = [_caption(scene, generator) for scene in batch]
        embeds, _, pooled, _ = pipe.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        velocity = pipe.transformer(mixed, embeds, pooled, sigma * 1000, return_dict=False)[0]
        loss = mse_loss(velocity, noise - latents)
        _step(optimizer, loss)
        warmup.step()
        torch._foreach_lerp_(average, parameters, 1 - min(0.998, (step + 1) / (step + 10)))
        if step % 100 == 0:
            print(f"flow {step}/{steps}: loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)


def _encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    with torch.no_grad():
        return (vae.encode(pictures * 2 - 1).latent_dist.sample() - vae.config.shift_factor) * vae.config.scaling_factor


def _caption(scene: Scene, generator: random.Random) -> str:
    draw = generator.random()
    if draw < EMPTY_CAPTIONS:
        return ""
    return (confuse(scene, generator) if draw < EMPTY_CAPTIONS + NOISY_CAPTIONS else scene).caption


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pipeline to")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--flow-steps", type=int, default=FLOW_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(arguments.seed)
    generator, start = random.Random(arguments.seed), time.monotonic()
    single, pairs = single_scenes(), pair_scenes()
    pipe = build_pipeline([scene.caption for scene in single + pairs])
    # about as many of either kind
    shown = 16 * [s for s in single if not held_out(s)] + [s for s in pairs if not held_out(s)]
    train_vae(pipe.vae, shown, arguments.vae_steps, generator)
    train_flow(pipe, shown, arguments.flow_steps, generator)
    pipe.to(torch.float16).save_pretrained(arguments.out)
    print(f"wrote {arguments.out} after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
