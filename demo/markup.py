"""Qwen's control tokens, and prompts as the chat template writes them after pictures are expanded to tokens."""

from collections.abc import Sequence

from pixels import Grid

TEXT_END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
THINK, NO_THINK = "<think>\n", "<think>\n\n</think>\n\n"

# In the order of Qwen's vocabulary. SPECIAL ones are skipped when decoding, PLAIN ones are kept.
SPECIAL = (
    TEXT_END,
    TURN_START,
    TURN_END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE_PAD,
    VIDEO_PAD,
)
PLAIN = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)

Turn = tuple[str, str]


def image_tokens(grid: Grid) -> str:
    return VISION_START + IMAGE_PAD * (grid[0] * grid[1]) + VISION_END


def video_tokens(grid: Grid, seconds: Sequence[float], wrapped: bool) -> str:
    """Write one group per pair of frames. transformers 5 puts a pair of vision tokens around all, 4.57 does not."""
    pads = VISION_START + VIDEO_PAD * (grid[0] * grid[1]) + VISION_END
    groups = "".join(f"<{second:.1f} seconds>{pads}" for second in seconds)
    return VISION_START + groups + VISION_END if wrapped else groups


def prompt_text(turns: Sequence[Turn], system: str | None, lead: str) -> str:
    """Write the prompt up to where the model begins to write: the last turn's answer is left out.

    Args:
        turns: (question, answer) pairs, oldest first.
        system: the system message, if any.
        lead: what the template puts at the start of the answer, such as "<think>".
    """
    text = f"{TURN_START}system\n{system}{TURN_END}\n" if system else ""
    for question, answer in turns[:-1]:
        text += f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n{answer}{TURN_END}\n"
    return f"{text}{TURN_START}user\n{turns[-1][0]}{TURN_END}\n{TURN_START}assistant\n{lead}"
