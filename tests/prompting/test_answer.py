from itertools import pairwise

import pytest

from qwenvl.prompting.answer import TextStream, Writer, certain, cut_before, split_thinking
from qwenvl.request import Answer, Sampling


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
    assert not any("\ufffd" in entry for entry in seen)


def test_a_character_that_never_ends_does_not_hold_the_text_back(demo):
    (start,) = demo.tokenizer.encode("🙂", add_special_tokens=False)[:1]
    hello = demo.tokenizer.encode("hello", add_special_tokens=False)
    stream = TextStream(demo.tokenizer)
    stream.push([start] * 6)
    stream.push(hello)
    assert stream.text.endswith("hello")


@pytest.mark.parametrize(
    ("text", "stops", "before", "sure"),
    [
        ("a b c", (), "a b c", "a b c"),
        ("a b c", ("b",), "a ", "a b c"),
        ("a b c", ("c", "a b"), "", "a b c"),
        ("see E", ("END", "EE"), "see E", "see "),
        ("see EN", ("END",), "see EN", "see "),
        ("see ENX", ("END",), "see ENX", "see ENX"),
        ("see EN", ("NO", "END", "N?"), "see EN", "see "),
        ("see --", ("---",), "see --", "see "),
    ],
)
def test_a_stop_cuts_the_text_and_its_beginning_is_held_back(text, stops, before, sure):
    assert cut_before(text, stops) == before
    assert certain(text, stops) == sure


def write(demo, text, thinks=False, **settings):
    """A writer that is given the text token by token until it has enough."""
    writer = Writer(demo.tokenizer, thinks, Sampling(**settings))
    seen = []
    for token in demo.tokenizer.encode(text, add_special_tokens=False):
        enough = writer.push([token])
        seen.append(writer.so_far)
        if enough:
            break
    return writer, seen


def test_the_answer_and_the_thought_grow_apart(demo):
    writer, seen = write(demo, "I see.\n</think>\n\na red circle", thinks=True)
    assert writer.end() == Answer("a red circle", "I see.")
    for name in ("text", "thinking"):
        growing = [getattr(entry, name) for entry in seen]
        assert all(later.startswith(earlier) for earlier, later in pairwise(growing))
    assert [entry.thinking for entry in seen if entry.text] == ["I see."] * len([1 for entry in seen if entry.text])
    assert not writer.ended


def test_a_mark_that_the_model_writes_itself_is_never_shown(demo):
    writer, seen = write(demo, "<think>\nI see.\n</think>\n\na red circle")
    assert not any("<" in entry.text + entry.thinking for entry in seen)
    assert writer.end() == Answer("a red circle", "I see.")


def test_the_text_ends_before_a_stop_that_no_live_text_has_shown(demo):
    writer, seen = write(demo, "a red circle END of it", stop=("END", "nothing"))
    assert writer.ended
    assert writer.end() == Answer("a red circle")
    assert not any("E" in entry.text for entry in seen)


def test_a_stop_within_the_thought_stops_nothing(demo):
    writer, _ = write(demo, "one END two\n</think>\n\nthree END four", thinks=True, stop=("END",))
    assert writer.end() == Answer("three", "one END two")


def test_a_thought_is_over_budget_at_that_token_and_an_answer_can_follow(demo):
    writer, _ = write(demo, "I see one image.", thinks=True, thinking_budget=3, max_new_tokens=4)
    assert (writer.ended, writer.over_budget, writer.tokens) == (True, True, 3)
    assert writer.end() is None
    closing = demo.tokenizer.decode(writer.close_thought())
    assert closing.endswith("</think>\n\n")
    assert not writer.ended
    for token in demo.tokenizer.encode("a red circle on a blue background"):
        if writer.push([token]):
            break
    assert writer.tokens == 3 + 4
    assert writer.end() == Answer("a red circle on", "I see one")


def test_a_thought_within_the_budget_leaves_the_answer_all_its_tokens(demo):
    writer, _ = write(demo, "I.\n</think>\n\n" + "a red circle " * 9, thinks=True, thinking_budget=50, max_new_tokens=5)
    assert writer.ended
    assert not writer.over_budget
    assert writer.end().thinking == "I."
    assert len(demo.tokenizer.encode(writer.end().text)) == 5


def test_a_thought_that_the_model_ends_without_an_answer_counts_as_over_budget(demo):
    for budget in (0, 50):
        writer, _ = write(demo, "I see", thinks=True, thinking_budget=budget)
        writer.push([])
        assert (writer.ended, writer.over_budget) == (True, budget > 0)


def test_a_stop_that_is_longer_than_the_text_holds_back_what_begins_it():
    assert certain("xab", ["ab" + "c" * 10**6]) == "x"
