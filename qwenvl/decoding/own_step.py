"""Our own decode step for dense Qwen models: the arithmetic of transformers' forward in a third of its launches.

It reads the weights of the transformers model and adds none: fused projections are one tensor of which the
model's own layers are views, so the prefill, which stays transformers', uses the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from torch import nn

from ..cpu.linear import joined
from ..packages import release
from .kv_cache import KVCache
from .step_attention import attention_for

# The name of this decode step in the table of families.
DENSE = "dense"
# Kinds of rotary embedding whose frequencies do not depend on the length of the text.
STATIC_ROPE = ("default", "linear", "yarn", "llama3")
SLIDES = "it uses sliding-window attention"


def why_not_dense(model: Any, decode: str) -> str | None:
    """Return the reason why the model cannot use this step, or None.

    Args:
        decode: the name of the step that fits the model's family.
    """
    if decode != DENSE:
        # The class's model_type: in some versions of transformers the instance's is that of the text part.
        return f"{type(model.config).model_type} is not one of the dense families"
    stack = text_stack(model)
    config = stack.config
    if {*(getattr(config, "layer_types", None) or ["full_attention"])} != {"full_attention"} or slides(stack):
        return SLIDES
    if getattr(stack.rotary_emb, "rope_type", "default") not in STATIC_ROPE:
        return f"its rotary embedding is {stack.rotary_emb.rope_type}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if any(hasattr(module, "_hf_hook") for module in stack.modules()):
        return "it is spread over several devices"
    return None


def has_fused_norm(tensor: torch.Tensor, version: str) -> bool:
    """Return True if F.rms_norm is one kernel on the tensor's device: on a GPU, from torch 2.9 on.

    Before that it is eight kernels, and on a CPU it is slower than the operations that _norm() uses instead.
    """
    return tensor.is_cuda and release(version) >= (2, 9)


def text_stack(model: Any) -> Any:
    """Return the part of the model that reads and writes tokens."""
    return getattr(model.model, "language_model", model.model)


def slides(stack: Any) -> bool:
    """Return True if a layer of the stack attends only to a window of the text.

    layer_types of its config.json is not enough: mixtures have a window without it, and some models ignore it.
    """
    config = stack.config
    window = getattr(config, "use_sliding_window", False) and getattr(config, "sliding_window", None)
    attentions = [layer.self_attn for layer in stack.layers if hasattr(layer, "self_attn")]
    return any(getattr(attention, "sliding_window", window) for attention in attentions)


@dataclass(slots=True)
class _Layer:
    """The weights and modules of one layer; a fused entry is None if the modules cannot be one."""

    norm_in: torch.Tensor
    norm_mid: torch.Tensor
    norm_qk: torch.Tensor | None
    qkv: nn.Module | None
    gate_up: nn.Module | None
    out: torch.Tensor | None
    down: torch.Tensor | None
    attention: Any
    mlp: Any


class OwnStep:
    """Our own decode step: one token per row and call.

    Args:
        model: a transformers model for which why_not_dense is None.
        attention: the attention with which the model was loaded.
        fused_norm: True to call F.rms_norm, False to compute it from its parts, None to let has_fused_norm() decide.
    """

    name = "own step"

    def __init__(self, model: Any, attention: str, fused_norm: bool | None = None) -> None:
        stack = text_stack(model)
        config = stack.config
        self._embed = stack.embed_tokens.weight
        self._norm_out = stack.norm.weight
        self._head = model.lm_head
        self.dtype, self.device = self._embed.dtype, self._embed.device
        self._fused_norm = has_fused_norm(self._embed, torch.__version__) if fused_norm is None else fused_norm
        self._eps = config.rms_norm_eps
        self._eps_tensor = torch.tensor(self._eps, device=self.device)
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._head_dim = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        sizes = (self._heads, self._kv_heads, self._head_dim)
        self.attention = attention_for(attention, *sizes, self.dtype, self.device)
        self._layers = [self._read(layer) for layer in stack.layers]
        self._rotary = stack.rotary_emb
        self._cos = self._sin = torch.empty(0)

    def allocate(self, batch: int, capacity: int) -> KVCache:
        """Return an empty cache of `batch` rows with room for `capacity` tokens in each."""
        return KVCache(batch, self._kv_heads, self._head_dim, capacity, self.dtype, self.device)

    def reach(self, positions: int) -> bool:
        """Make the rotary tables long enough for that many positions; True if they are new tensors.

        In decoding, a position is the same on all axes of Qwen's multimodal rotary embedding. That makes it the plain
        rotary embedding: a table indexed by position.
        """
        if len(self._cos) >= positions:
            return False
        inverse = self._rotary.inv_freq.float().to(self.device)
        angles = torch.arange(positions, device=self.device)[:, None].float() * inverse
        scale = getattr(self._rotary, "attention_scaling", 1.0)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        # rotate_half(x) * sin is swap_halves(x) * (-sin, sin), which saves the negation.
        tables = (torch.cat([cos, cos], -1).to(self.dtype), torch.cat([-sin, sin], -1).to(self.dtype))
        # Assigned together: if memory ran out between the two, later runs would take the longer table for both.
        self._cos, self._sin = tables
        return True

    def __call__(
        self, tokens: torch.Tensor, kv: KVCache, span: int | None = None, check: Callable[[], None] | None = None
    ) -> torch.Tensor:
        """Compute the logits after one more token in each row; its keys and values are stored, lens stays.

        Args:
            tokens: (B,) int64.
            kv: keys, values and lengths of the rows.
            span: None computes with lengths that the host knows; a number attends to that many slots under
                the mask, so that no size depends on the length and the step can be captured.
            check: called before every layer; if it raises, the rows are as before.

        Returns:
            (B, V) in the model's dtype.
        """
        static = span is not None
        if static or not kv.even:
            kv.bias.scatter_(3, kv.lens.view(-1, 1, 1, 1), 0.0)
        attend = self.attention.at(span)
        slots_used = attend.prepare(kv, span)
        positions = kv.lens + kv.offset
        cos, sin = (table.index_select(0, positions)[:, None] for table in (self._cos, self._sin))
        hidden = F.embedding(tokens, self._embed)
        for index, layer in enumerate(self._layers):
            if check is not None:
                check()
            keys, values = kv.keys[index], kv.values[index]
            query = self._query(layer, hidden, cos, sin, kv, keys, values, static)
            attended = attend(query, keys, values, slots_used)
            hidden = _add_projected(hidden, attended, layer.out, layer.attention.o_proj)
            hidden = _add_projected(hidden, self._gated(layer, hidden), layer.down, layer.mlp.down_proj)
        return self._head(self._norm(hidden, self._norm_out))

    def _query(self, layer, hidden, cos, sin, kv, keys, values, static) -> torch.Tensor:
        """Project, rotate, and store key and value; returns the queries (B, heads, dim)."""
        batch, both = hidden.shape[0], self._heads + self._kv_heads
        normed = self._norm(hidden, layer.norm_in)
        if layer.qkv is not None:
            projected = layer.qkv.forward(normed)
        else:
            a = layer.attention
            projected = torch.cat([a.q_proj(normed), a.k_proj(normed), a.v_proj(normed)], -1)
        projected = projected.view(batch, both + self._kv_heads, self._head_dim)
        qk = projected[:, :both]
        if layer.norm_qk is not None:
            qk = self._norm(qk, layer.norm_qk)
        half = self._head_dim // 2
        rotated = torch.cat((qk[..., half:], qk[..., :half]), -1).mul_(sin).addcmul_(qk, cos)
        key, value = rotated[:, self._heads :], projected[:, both:]
        if not static and kv.even:
            keys[:, :, kv.filled] = key
            values[:, :, kv.filled] = value
        elif batch == 1:
            keys.index_copy_(2, kv.lens, key[:, :, None])
            values.index_copy_(2, kv.lens, value[:, :, None])
        else:
            keys[kv.rows, :, kv.lens] = key
            values[kv.rows, :, kv.lens] = value
        return rotated[:, : self._heads]

    def _gated(self, layer: _Layer, hidden: torch.Tensor) -> torch.Tensor:
        normed = self._norm(hidden, layer.norm_mid)
        if layer.gate_up is not None:
            gate, up = layer.gate_up.forward(normed).chunk(2, -1)
        else:
            gate, up = layer.mlp.gate_proj(normed), layer.mlp.up_proj(normed)
        return F.silu(gate).mul_(up)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Apply RMSNorm over the last dimension, rounding in the same order as transformers."""
        if self._fused_norm:
            normed = F.rms_norm(x, x.shape[-1:], weight if weight.ndim == 1 else None, self._eps)
            return normed if weight.ndim == 1 else normed.mul_(weight)
        # The norm is one call; the mean of squares would be three.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._eps_tensor, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).to(x.dtype).mul_(weight)

    def _read(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        norm_qk = None
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm.weight, attention.k_norm.weight
            rows = [query.expand(self._heads, -1), key.expand(self._kv_heads, -1)]
            norm_qk = torch.cat(rows).contiguous()
        return _Layer(
            norm_in=layer.input_layernorm.weight,
            norm_mid=layer.post_attention_layernorm.weight,
            norm_qk=norm_qk,
            qkv=_fuse(attention.q_proj, attention.k_proj, attention.v_proj),
            gate_up=_fuse(mlp.gate_proj, mlp.up_proj),
            out=_transposed(attention.o_proj),
            down=_transposed(mlp.down_proj),
            attention=attention,
            mlp=mlp,
        )


def _is_plain(module: nn.Module) -> bool:
    # No subclasses: a quantized layer is one with another kind of weight, and is called as a module.
    return type(module) is nn.Linear and type(module.weight.data) is torch.Tensor


def _fuse(*modules: nn.Linear) -> nn.Module | None:
    """Fuse linear layers with the same input: their weights become views of the fused one. None if one is not plain.

    Layers in a CPU's own form are one already, or stay apart.
    """
    if not all(_is_plain(module) for module in modules):
        return joined(list(modules))
    # A second OwnStep of the same model uses the same fused layer.
    if done := getattr(modules[0], "_fused_into", None):
        return done
    fused = nn.Linear(1, 1, bias=False, device="meta")
    fused.weight = nn.Parameter(torch.cat([module.weight.data for module in modules]), requires_grad=False)
    if modules[0].bias is not None:
        fused.bias = nn.Parameter(torch.cat([module.bias.data for module in modules]), requires_grad=False)
    sizes = [module.weight.shape[0] for module in modules]
    for module, weight in zip(modules, fused.weight.split(sizes), strict=True):
        module.weight = nn.Parameter(weight, requires_grad=False)
    if fused.bias is not None:
        for module, bias in zip(modules, fused.bias.split(sizes), strict=True):
            module.bias = nn.Parameter(bias, requires_grad=False)
    # nn.Module's own __setattr__ would make it a submodule, which would appear in the model's state.
    object.__setattr__(modules[0], "_fused_into", fused)
    return fused


def release_fused(model: nn.Module) -> None:
    """Drop the references to the fused tensors, so that the model's own weights can be moved one by one."""
    for module in model.modules():
        vars(module).pop("_fused_into", None)


def _transposed(module: nn.Linear) -> torch.Tensor | None:
    return module.weight.t() if _is_plain(module) and module.bias is None else None


def _add_projected(hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, module: Any) -> torch.Tensor:
    """Add module(x) to hidden in place, as one product if the weight is plain."""
    return hidden.addmm_(x, weight) if weight is not None else hidden.add_(module(x))
