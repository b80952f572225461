"""The demo model's architecture, and a faster vision attention for training it on a CPU."""

import types
from collections.abc import Sequence
from pathlib import Path

import torch
from markup import IMAGE_PAD, TEXT_END, TURN_END, VIDEO_PAD, VISION_END, VISION_START
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

HIDDEN = 128
_INIT = 0.04


def make_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3VLConfig:
    """Configure a Qwen3-VL with all parts of large ones: merger, deepstack, interleaved M-RoPE, grouped queries."""
    token_id = tokenizer.convert_tokens_to_ids
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "initializer_range": _INIT,
            "bos_token_id": token_id(TEXT_END),
            "eos_token_id": token_id(TURN_END),
            "pad_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0, 2],
            "hidden_act": "gelu_pytorch_tanh",
            "initializer_range": _INIT,
        },
        image_token_id=token_id(IMAGE_PAD),
        video_token_id=token_id(VIDEO_PAD),
        vision_start_token_id=token_id(VISION_START),
        vision_end_token_id=token_id(VISION_END),
        tie_word_embeddings=True,
    )


def make_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3VLForConditionalGeneration:
    config = make_config(tokenizer)
    config._attn_implementation = "sdpa"
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        places = model.model.visual.pos_embed.weight
        places.copy_(_waves(round(places.shape[0] ** 0.5), places.shape[1]))
    return model


def read_model(folder: Path) -> Qwen3VLForConditionalGeneration:
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def _waves(side: int, width: int) -> torch.Tensor:
    """Return sines over a square, (side * side, width). From random values the tower hardly learns positions."""
    at = torch.linspace(0, 1, side)
    turns = torch.pi * torch.logspace(-1, 3, width // 4, base=2)
    angles = at[:, None] * turns
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    down = line[:, None].expand(-1, side, -1)
    right = line[None].expand(side, -1, -1)
    return 0.5 * torch.cat([down, right], dim=-1).flatten(0, 1)


def _attend(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **_: object,
) -> torch.Tensor:
    """Compute Qwen3VLVisionAttention.forward, with all pictures of one length in one call."""
    total = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).view(total, 3, self.num_heads, -1).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    lengths = cu_seqlens.diff()
    unique = lengths.unique().tolist()
    if len(unique) == 1:
        return self.proj(_attend_alike((query, key, value), unique[0], self.scaling))
    places = [_places(cu_seqlens[:-1][lengths == length], length) for length in unique]
    parts = [
        _attend_alike([x.index_select(0, place) for x in (query, key, value)], length, self.scaling)
        for place, length in zip(places, unique, strict=True)
    ]
    back = torch.cat(places).argsort()
    return self.proj(torch.cat(parts).index_select(0, back))


def _places(starts: torch.Tensor, length: int) -> torch.Tensor:
    """Return the indices of all patches of the pictures that begin at `starts`."""
    return (starts[:, None] + torch.arange(length)).flatten()


def _attend_alike(projected: Sequence[torch.Tensor], length: int, scaling: float) -> torch.Tensor:
    """Attend within pictures of `length` patches: (N * length, heads, width) -> (N * length, heads * width)."""
    query, key, value = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in projected)
    mixed = functional.scaled_dot_product_attention(query, key, value, scale=scaling)
    return mixed.transpose(1, 2).flatten(0, 1).flatten(1)


def _embed(self: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Compute Qwen3VLVisionPatchEmbed.forward as one matrix product: the convolution's stride equals its kernel."""
    weight = self.proj.weight.view(self.embed_dim, -1)
    return functional.linear(hidden_states.to(weight.dtype), weight, self.proj.bias)


def speed_up(model: Qwen3VLForConditionalGeneration) -> None:
    """Do the same arithmetic in fewer, larger operations. Only for training: saved weights do not depend on it."""
    tower = model.model.visual
    for block in tower.blocks:
        block.attn.forward = types.MethodType(_attend, block.attn)
    tower.patch_embed.forward = types.MethodType(_embed, tower.patch_embed)


def hidden_matrices(model: Qwen3VLForConditionalGeneration) -> list[torch.nn.Parameter]:
    """Return what Muon trains: matrices between hidden states, without embeddings and mergers."""
    apart = ("embed", "lm_head", "merger")
    return [p for name, p in model.named_parameters() if p.ndim == 2 and not any(part in name for part in apart)]
