"""What the next rollout needs and no update changes, done while the update of this iteration runs: its prompts are
encoded (engine.ahead).

Nothing else may: states, velocities and rewards of the next iteration depend on the weights that are being trained.
"""

from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from flowgrove.models.conditioning import Conditioning
from flowgrove.models.embeddings import OffloadedEncoder
from flowgrove.models.policy import Policy
from flowgrove.models.prompts import Prompts


class Ahead:
    """Encodes prompts in a thread, on a GPU in a stream of its own. What goes wrong there is left to `take`, which then
    encodes them itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "prompts ahead", self._begin)
        self._waiting: dict[tuple[int, tuple[str, ...]], Future[Prompts]] = {}

    def _begin(self) -> None:
        """A new thread is on GPU 0, whichever this process's is."""
        if self._stream is not None:
            torch.cuda.set_device(self._stream.device)

    def start(self, policy: Policy, texts: list[str]) -> None:
        """Begins to encode `texts` for `policy`. Encoders that wait in host memory stay there: the device has no room
        for them beside an update.
        """
        if isinstance(policy.encoder, OffloadedEncoder):
            return
        self._waiting[_key(policy, texts)] = self._thread.submit(self._encode, policy, texts)

    def take(self, policy: Policy, texts: list[str]) -> Prompts:
        """The encoded texts, from what was begun, or now."""
        future = self._waiting.pop(_key(policy, texts), None)
        if future is not None and future.exception() is None:
            return self._handed_over(future.result())
        return policy.encode(texts)

    def settle(self) -> None:
        """Waits for what has been begun."""
        wait(self._waiting.values())

    @torch.no_grad()
    def _encode(self, policy: Policy, texts: list[str]) -> Prompts:
        if self._stream is None:
            return policy.encode(texts)
        self._stream.wait_stream(torch.cuda.default_stream(self.device))  # what is kept may have been encoded there
        with torch.cuda.stream(self._stream):
            prompts = policy.encode(texts)
        self._stream.synchronize()  # this thread alone waits; then what it keeps is there for any stream
        return prompts

    def _handed_over(self, prompts: Prompts) -> Prompts:
        """The same for the stream of this thread, which keeps their memory; they are done, since their thread was."""
        if self._stream is not None:
            here = torch.cuda.current_stream(self.device)
            for tensor in _tensors(prompts):
                tensor.record_stream(here)
        return prompts


def _key(policy: Policy, texts: list[str]) -> tuple[int, tuple[str, ...]]:
    return id(policy.adapter.geometry), tuple(texts)


def _tensors(prompts: Prompts) -> list[torch.Tensor]:
    parts: list[Conditioning] = [part for part in (prompts.cond, prompts.uncond) if part is not None]
    of = [tensor for part in parts for tensor in part.tensors.values()]
    return of if prompts.uncond_of is None else [*of, prompts.uncond_of]
