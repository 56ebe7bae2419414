"""Modules whose LoRA layers ComfyUI finds by their names in diffusers (its comfy/lora.py), as far as families share
them, as regular expressions.
"""

ATTENTION = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
TIMES = r"time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]"
EMBEDDERS = rf"context_embedder|proj_out|norm_out\.linear|{TIMES}"
JOINT = rf"({ATTENTION}|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"
