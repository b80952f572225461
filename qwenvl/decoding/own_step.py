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

from ..packages import release
from .kv_cache import KVCache
from .step_attention import attention_for

# What a family says of the decode step that fits, where it is this one.
DENSE = "dense"
# Rotary embeddings whose frequencies do not depend on how long the text is.
STATIC_ROPE = ("default", "linear", "yarn", "llama3")
SLIDES = "it uses sliding-window attention"


def why_not_dense(model: Any, decode: str) -> str | None:
    """The reason why the model cannot use this step, or None.

    Args:
        decode: what the model's family says of the step that fits.
    """
    if decode != DENSE:
        # Of the class: some versions of transformers answer for the text part when the instance is asked.
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
    """Whether F.rms_norm is one kernel where the tensor is: on a GPU, from 2.9 of torch on. Before that it is eight,
    and on a CPU it is slower than the parts that stand in for it."""
    return tensor.is_cuda and release(version) >= (2, 9)


def text_stack(model: Any) -> Any:
    """The part of the model that reads and writes tokens."""
    return getattr(model.model, "language_model", model.model)


def slides(stack: Any) -> bool:
    """Whether a layer of the stack attends to a window of the text only. Its layer_types alone do not tell: mixtures
    have a window without them, and some do not look at those that their config.json names."""
    config = stack.config
    window = getattr(config, "use_sliding_window", False) and getattr(config, "sliding_window", None)
    attentions = [layer.self_attn for layer in stack.layers if hasattr(layer, "self_attn")]
    return any(getattr(each, "sliding_window", window) for each in attentions)


@dataclass(slots=True)
class _Layer:
    """What one layer computes with. A fused entry is None where the modules are not plain linear layers."""

    norm_in: torch.Tensor
    norm_mid: torch.Tensor
    norm_qk: torch.Tensor | None
    qkv: nn.Linear | None
    gate_up: nn.Linear | None
    out: torch.Tensor | None
    down: torch.Tensor | None
    attention: Any
    mlp: Any


class OwnStep:
    """One token per row and step.

    Args:
        model: a transformers model for which why_not_dense is None.
        attention: what the model was loaded with.
        fused_norm: whether to call F.rms_norm; None where has_fused_norm() says so.
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
        """Room for so many tokens in each of so many rows."""
        return KVCache(batch, self._kv_heads, self._head_dim, capacity, self.dtype, self.device)

    def reach(self, positions: int) -> bool:
        """Make the rotary tables long enough; whether they are new ones. A position in decoding is the same on all
        axes of Qwen's multimodal rotary embedding, which makes it the plain one: a table indexed by position."""
        if len(self._cos) >= positions:
            return False
        inverse = self._rotary.inv_freq.float().to(self.device)
        angles = torch.arange(positions, device=self.device)[:, None].float() * inverse
        scale = getattr(self._rotary, "attention_scaling", 1.0)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        # rotate_half(x) * sin is swap_halves(x) * (-sin, sin), which saves the negation.
        tables = (torch.cat([cos, cos], -1).to(self.dtype), torch.cat([-sin, sin], -1).to(self.dtype))
        # Both or none: where memory runs out for one, every later run would take the other's length for both.
        self._cos, self._sin = tables
        return True

    def __call__(
        self, tokens: torch.Tensor, kv: KVCache, span: int | None = None, check: Callable[[], None] | None = None
    ) -> torch.Tensor:
        """Logits after one more token in each row; its keys and values are written, lens stays.

        Args:
            tokens: (B,) int64.
            kv: where the rows stand.
            span: None computes with lengths that the host knows; a number attends to that many slots under
                the mask, so that no size depends on the length and the step can be captured.
            check: called before every layer; raising in it leaves the rows as they were.

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
        """Project, rotate, store key and value; returns the queries (B, heads, dim)."""
        batch, both = hidden.shape[0], self._heads + self._kv_heads
        normed = self._norm(hidden, layer.norm_in)
        if layer.qkv is not None:
            projected = F.linear(normed, layer.qkv.weight, layer.qkv.bias)
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
            gate, up = F.linear(normed, layer.gate_up.weight).chunk(2, -1)
        else:
            gate, up = layer.mlp.gate_proj(normed), layer.mlp.up_proj(normed)
        return F.silu(gate).mul_(up)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm in transformers' order of roundings, over the last dimension."""
        if self._fused_norm:
            normed = F.rms_norm(x, x.shape[-1:], weight if weight.ndim == 1 else None, self._eps)
            return normed if weight.ndim == 1 else normed.mul_(weight)
        # The root of the sum of squares is one call where their mean is three.
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
    # Exactly these types: a quantized layer is a subclass with another weight, and is called as it is.
    return type(module) is nn.Linear and type(module.weight.data) is torch.Tensor


def _fuse(*modules: nn.Linear) -> nn.Linear | None:
    """One linear layer for several that read the same input; theirs become views of its weight."""
    if not all(_is_plain(module) for module in modules):
        return None
    # A second step for the same model finds them fused, and shares.
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
    # Past nn.Module's own bookkeeping: as a submodule it would show up in the model's state.
    object.__setattr__(modules[0], "_fused_into", fused)
    return fused


def release_fused(model: nn.Module) -> None:
    """Let go of the fused tensors, so that the model's own weights can be moved apart."""
    for module in model.modules():
        vars(module).pop("_fused_into", None)


def _transposed(module: nn.Linear) -> torch.Tensor | None:
    return module.weight.t() if _is_plain(module) and module.bias is None else None


def _add_projected(hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, module: Any) -> torch.Tensor:
    """hidden + module(x) in place, as one product where the weight is plain."""
    return hidden.addmm_(x, weight) if weight is not None else hidden.add_(module(x))
