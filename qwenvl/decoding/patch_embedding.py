"""The vision tower's patch embedding as a matrix product."""

from __future__ import annotations

import torch


class PatchLinear(torch.nn.Module):
    """A convolution whose stride is its kernel size, computed as the equal matrix product."""

    def __init__(self, conv: torch.nn.Conv3d) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(conv.weight.detach().flatten(1), requires_grad=False)
        self.bias = conv.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Embed N patches: (N, channels, frames, height, width) -> (N, out channels)."""
        return torch.nn.functional.linear(patches.flatten(1), self.weight, self.bias)


def patch_embedding_as_matmul(model: torch.nn.Module) -> None:
    """Replace the vision patch embedding's Conv3d, which some torch and cuDNN builds run 10 to 20 times too slow.

    transformers can do the same (`fusion_config`), but only from 5.6 on and by changing the class for
    every other user of it in the process.
    """
    for name, module in list(model.named_modules()):
        conv = getattr(module, "proj", None)
        # A hook on the Conv3d fetches weights that wait in RAM; PatchLinear has no such hook.
        if not isinstance(conv, torch.nn.Conv3d) or hasattr(conv, "_hf_hook"):
            continue
        if name.endswith("patch_embed") and conv.stride == conv.kernel_size:
            module.proj = PatchLinear(conv)
