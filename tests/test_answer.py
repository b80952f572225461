from itertools import pairwise

import pytest

from qwenvl.answer import TextStream, split_thinking


@pytest.mark.parametrize(
    ("text", "thinks", "thinking", "answer"),
    [
        ("An answer.", False, "", "An answer."),
        ("<think>\nHm.\n</think>\n\nAn answer.", False, "Hm.", "An answer."),
        ("Hm.\n</think>\n\nAn answer.", True, "Hm.", "An answer."),
        ("<think>\n\n</think>\n\nAn answer.", False, "", "An answer."),
        ("Hm, still thin", True, "Hm, still thin", None),
        ("<think>\nHm", False, "Hm", None),
        ("a </think> b </think> c", True, "a", "b </think> c"),
        ("a </think> b", False, "", "a </think> b"),
    ],
)
def test_the_think_block_is_split_from_the_answer(text, thinks, thinking, answer):
    assert split_thinking(text, thinks) == (thinking, answer)


def test_characters_of_several_tokens_appear_whole_and_text_only_grows(demo):
    text = "Prompt: 图片 🙂 naïve — ok"
    ids = demo.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text.encode()) // 3
    stream, seen = TextStream(demo.tokenizer), [""]
    for token in ids:
        stream.push([token])
        seen.append(stream.text)
    assert stream.end() == text
    assert stream.tokens == len(ids)
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen))
    assert not any("\ufffd" in each for each in seen)


def test_a_character_that_never_ends_does_not_hold_the_text_back(demo):
    (start,) = demo.tokenizer.encode("🙂", add_special_tokens=False)[:1]
    hello = demo.tokenizer.encode("hello", add_special_tokens=False)
    stream = TextStream(demo.tokenizer)
    stream.push([start] * 6)
    stream.push(hello)
    assert stream.text.endswith("hello")
