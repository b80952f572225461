"""The demo model's tokenizer: byte-level BPE in the layout of Qwen's, trained on the language of its world."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import phrases
from conversations import Author, box_answer, images_answer
from markup import PLAIN, SPECIAL, TEXT_END, TURN_END
from pixels import Sizes
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from words import Writer
from world import COLORS, SHAPES, pick_figure, with_article

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
VOCABULARY = 1024

# Qwen's own pattern. It makes every digit a token of its own, so that coordinates can be learned.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(folder: Path, seed: int = 7) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into the folder."""
    tokenizer = _with_control_tokens(_trained(_corpus(random.Random(seed))))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps(_config(tokenizer), indent=1)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")


def _pipeline(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(**byte_level)])
    tokenizer.decoder = decoders.ByteLevel(**byte_level)
    tokenizer.post_processor = processors.ByteLevel(**byte_level)
    return tokenizer


def _trained(corpus: Iterator[str]) -> Tokenizer:
    tokenizer = _pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(PLAIN),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def _with_control_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Add the control tokens after the words, as in Qwen's vocabulary."""
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    return tokenizer


def _config(tokenizer: Tokenizer) -> dict[str, object]:
    """Return tokenizer_config.json as Qwen writes it; transformers 4.57 and 5 both read it."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(tokenizer.token_to_id(token)): {"content": token, **flags, "special": token in SPECIAL}
        for token in SPECIAL + PLAIN
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "errors": "replace",
        "model_max_length": 8192,
        "pad_token": TEXT_END,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _corpus(rng: random.Random) -> Iterator[str]:
    yield from _questions()
    yield from _world_words()
    yield from _answers(rng)
    author = Author(rng, Writer(rng), (4, 4), Sizes(8))
    for _ in range(30_000):
        draft = author.text_draft()
        yield from (draft.question, draft.answer, draft.thought, "user\n", "assistant\n", "system\n")


def _questions() -> Iterator[str]:
    """Yield every fixed wording, often enough that its words become tokens."""
    pools = [value for name, value in vars(phrases).items() if name.isupper()]
    for pool in pools:
        for text in (pool,) if isinstance(pool, str) else pool:
            yield from (text,) * 80


def _world_words() -> Iterator[str]:
    for color in COLORS:
        words = f"{with_article(color)} {color} {color.upper()} on {with_article(color)} background {color}"
        yield from (words, color) * 200
    for shape in SHAPES:
        yield from (
            f"a {shape}, then a {shape} It shows {shape} {shape.upper()} ON A BACKGROUND",
            shape,
        ) * 300


def _answers(rng: random.Random) -> Iterator[str]:
    for _ in range(3_000):
        figure = pick_figure(rng)
        yield images_answer([figure.caption] * rng.randint(1, 4)) + "; video 1:"
        yield box_answer(figure, 128, 128)
        yield f"<{rng.uniform(0, 30):.1f} seconds>"
        yield "I see one image. I see a video. It starts with"
