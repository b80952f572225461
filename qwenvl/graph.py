"""A decode step as one CUDA graph, captured by hand.

Not through torch.compile's graph trees: they fail under the cudaMallocAsync allocator, which ComfyUI sets by default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

WARM_UPS = 3
# A captured step must give the logits of the same step run eagerly, within this share of the largest one.
TOLERANCE = 0.02


class CaptureError(RuntimeError):
    """A step could not be captured, or what was captured is not the step."""


class CapturedStep:
    """tokens (B,) -> the next tokens, in place, by one launch.

    Args:
        logits: computes the logits of the tokens, and stores what the step stores; run again it does the same again.
        choose: logits -> next tokens.
        count: advances the state by one token.
        tokens: (B,) int64, read and overwritten.
        state: every other tensor that the step changes, keys and values apart.
        random: the generator that choose draws from.

    Raises:
        CaptureError: with the reason. Everything is then as it was, and the step can be run eagerly.
    """

    def __init__(
        self,
        logits: Callable[[torch.Tensor], torch.Tensor],
        choose: Callable[[torch.Tensor], torch.Tensor],
        count: Callable[[], None],
        tokens: torch.Tensor,
        state: Sequence[torch.Tensor],
        random: torch.Generator | None,
    ) -> None:
        self._logits, self._choose, self._count, self._tokens = logits, choose, count, tokens
        self._state, self._random = [tokens, *state], random
        before = [each.clone() for each in self._state]
        drawn = None if random is None else random.get_state()

        def restore() -> None:
            for each, value in zip(self._state, before, strict=True):
                each.copy_(value)
            if random is not None and drawn is not None:
                random.set_state(drawn)

        try:
            expected = logits(tokens).clone()
            restore()
            self._graph, self._seen_logits = self._capture(restore)
            restore()
            self()
            found = self._seen_logits.float()
            error = (found - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-6)
            if not error <= TOLERANCE:
                raise CaptureError(f"the captured step's logits differ by {error:.2g} of the largest")
        except RuntimeError as error:
            raise error if isinstance(error, CaptureError) else CaptureError(str(error).splitlines()[0]) from error
        finally:
            restore()

    def __call__(self) -> None:
        self._graph.replay()

    def _run(self) -> torch.Tensor:
        logits = self._logits(self._tokens)
        chosen = self._choose(logits)
        self._count()
        self._tokens.copy_(chosen)
        return logits

    def _capture(self, restore: Callable[[], None]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        # Warmed up on the stream of the capture, so that libraries have their workspaces there already.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._run()
                restore()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if self._random is not None:
            graph.register_generator_state(self._random)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            logits = self._run()
        return graph, logits


class ReadLater:
    """Reads tokens from the device some steps late, so that the device never waits for the host."""

    def __init__(self, batch: int, lag: int) -> None:
        self._host = [torch.empty(batch, dtype=torch.long, pin_memory=True) for _ in range(lag + 1)]
        self._ready = [torch.cuda.Event() for _ in range(lag + 1)]
        self._sent = self._taken = 0

    def send(self, tokens: torch.Tensor) -> None:
        slot = self._sent % len(self._host)
        self._host[slot].copy_(tokens, non_blocking=True)
        self._ready[slot].record()
        self._sent += 1

    @property
    def waiting(self) -> int:
        return self._sent - self._taken

    def take(self) -> list[int]:
        slot = self._taken % len(self._host)
        self._ready[slot].synchronize()
        self._taken += 1
        return self._host[slot].tolist()
