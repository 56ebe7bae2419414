"""Tiny random reward models in the folders that real ones come in, pictures for them,
and a server on loopback that answers as it is told.
"""

import base64
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from flowgrove.recipe.loading import parse_recipe
from flowgrove.rewards.registry import Rewards
from planner_cases import recipe_content

PROMPTS = ["a red cat", "two dogs", "a red cat", "", "a red cat"]
MEAN, STD = [0.4, 0.5, 0.3], [0.2, 0.25, 0.3]  # no two alike, unlike CLIP's own


def pictures(count, height, width, seed=0):
    """Smooth random pictures on the 8-bit grid, fp32 [count, 3, height, width]."""
    coarse = torch.rand(
        count, 3, max(2, height // 5), max(2, width // 5), generator=torch.Generator().manual_seed(seed)
    )
    return (torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") * 255).round() / 255


def as_pil(pictures):
    return [Image.fromarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()) for picture in pictures]


def clip_tokenizer(longest=12):
    """Letters, alone and at the end of a word; the end of a text has the highest number."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=longest)


def clip_folder(folder, size=28, crop=None, seed=0):
    """A tiny random CLIP with tokenizer and processor, saved as `transformers` saves one;
    it reads `size`×`size` pictures.
    """
    tokenizer = clip_tokenizer()
    shared = {"num_hidden_layers": 2, "projection_dim": 20, "hidden_act": "gelu"}
    text = {
        **shared,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 12,
    }
    text |= {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        **shared,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": 7,
    }
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20))
    with torch.no_grad():
        # the library's own start hides mistakes: small weights, biases of 0, norms of 1
        for value in model.parameters():
            value.copy_(
                torch.randn_like(value) * (0.4 if value.ndim < 2 else 1.5 / value.shape[-1] ** 0.5) + (value.ndim == 1)
            )
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size=crop or {"height": size, "width": size}, image_mean=MEAN, image_std=STD
    )
    processor.save_pretrained(folder)
    return folder


def rewards_of(*entries, device="cpu"):
    """The rewards of a recipe that lists `entries`."""
    return Rewards(parse_recipe(recipe_content(reward=list(entries))), torch.device(device))


def reward_of(**entry):
    """The one scorer that an entry makes."""
    (scorer,) = rewards_of(entry).scorers.values()
    return scorer


def same_on_a_gpu(tolerance, **entry):
    """A reward's scores on a GPU are those on the CPU, for pictures on either."""
    batch, prompts = pictures(5, 40, 60), ["a red cat", "two dogs", "a red cat", "", "dogs"]
    exact, rewards = rewards_of(entry)(batch, prompts), rewards_of(entry, device="cuda")
    for where in ("cpu", "cuda"):
        torch.testing.assert_close(rewards(batch.to(where), prompts), exact, atol=tolerance, rtol=0)


def pixels_of(png):
    """base64 PNG → uint8 [H, W, 3]; anything else than an RGB PNG is an error."""
    image = Image.open(io.BytesIO(base64.b64decode(png, validate=True)))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


class Server(ThreadingHTTPServer):
    """Calls `behave(handler, content, number)` for every POST; `asked` holds what came: (path, headers, JSON)."""

    daemon_threads = True

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave, self.asked, self.lock = behave, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, dict(self.headers), content))
            number = len(self.server.asked)
        self.server.behave(self, content, number)

    def log_message(self, *arguments):
        """Quiet."""

    def reply(self, answer, status=200, **headers):
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(behave):
    server = Server(behave)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
