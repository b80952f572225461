"""The Muon optimizer (Jordan et al., 2024) for small matrices on a CPU.

torch.optim.Muon orthogonalises in bfloat16, which is slow on most CPUs. This one works in float32 and takes all
matrices of one shape through the iteration together.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch

# Coefficients of the quintic Newton-Schulz iteration: they push every singular value towards 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(stack: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Return approximately the nearest semi-orthogonal matrices.

    Args:
        stack: (N, R, C) with R <= C, float32.
        rounds: Newton-Schulz iterations.

    Returns:
        (N, R, C) with singular values near 1.
    """
    x = stack / (stack.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """An optimizer with momentum whose step is orthogonalised. For 2-d parameters only."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[tuple(sorted(param.shape))].append(param)
            for params in by_shape.values():
                self._step_together(params, group)

    def _step_together(self, params: list[torch.nn.Parameter], group: dict) -> None:
        wide = [_lying(self._nesterov(param, group["momentum"])) for param in params]
        for param, update in zip(params, orthogonalise(torch.stack(wide)), strict=True):
            rows, columns = param.shape
            param.mul_(1 - group["lr"] * group["weight_decay"])
            scale = max(1.0, rows / columns) ** 0.5
            param.add_(update.T if rows > columns else update, alpha=-group["lr"] * scale)

    def _nesterov(self, param: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        state = self.state[param]
        if "average" not in state:
            state["average"] = torch.zeros_like(param)
        state["average"].lerp_(param.grad, 1 - momentum)
        return param.grad.lerp(state["average"], momentum)


def _lying(matrix: torch.Tensor) -> torch.Tensor:
    """Transpose the matrix if it has more rows than columns."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
