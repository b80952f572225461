import base64
import html
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl.remote import refusals
from qwenvl.remote.secret import MASK, Secret

KEY = 'sk-sEcrEt+4/2~"\\x=k9'
KEYS = [KEY, "sk-proj-4Fz9_aBcDeFgH-1234567890", "hf_AbCdEfGhIjKlMnOp", "0123456789abcdef", "a b%20c&amp;d1efgh"]


def percent(key, style="%{:02x}"):
    return "".join(style.format(ord(part)) for part in key)


def basic(before):
    return lambda key: base64.b64encode(f"{before}{key}".encode()).decode()


FORMS = {
    "plain": str,
    "in capitals": str.upper,
    "in small letters": str.lower,
    "JSON": lambda key: json.dumps(key)[1:-1],
    "JSON, every character": lambda key: percent(key, "\\u{:04x}"),
    "JSON, every character in capitals": lambda key: percent(key, "\\u{:04X}"),
    "JSON in JSON": lambda key: json.dumps(json.dumps(key)),
    "a string of Python": repr,
    "bytes of Python": lambda key: repr(key.encode()),
    "hexadecimal escapes": lambda key: percent(key, "\\x{:02x}"),
    "in an address": lambda key: quote(key, safe=""),
    "in an address, small": lambda key: quote(key, safe="").lower(),
    "in an address, every character": percent,
    "in an address, every character in capitals": lambda key: percent(key, "%{:02X}"),
    "the first characters": lambda key: percent(key[:7]) + quote(key[7:], safe=""),
    "in an address in an address": lambda key: quote(quote(key, safe=""), safe=""),
    "HTML": html.escape,
    "HTML, every character": lambda key: percent(key, "&#{};"),
    "HTML, hexadecimal": lambda key: percent(key, "&#x{:X};"),
    "hexadecimal digits": lambda key: key.encode().hex(),
    "hexadecimal digits in capitals": lambda key: key.encode().hex().upper(),
    "base64": basic(""),
    "base64 behind one": basic(":"),
    "base64 behind two": basic("u:"),
    "base64 behind a name": basic("user:"),
    "base64 of addresses": lambda key: base64.urlsafe_b64encode(f"user:{key}".encode()).decode(),
    "base64 in an address": lambda key: quote(base64.b64encode(f"user:{key}".encode()).decode(), safe=""),
    "base64 in lines": lambda key: base64.encodebytes(f"{'x' * 30}{key}".encode() * 3).decode(),
    "in lines": lambda key: f"{key[:5]}\n  {key[5:]}",
}


def parts(key, form):
    """What must not be told: the form, without what base64 has of its neighbours."""
    return form(key)[6:-6]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("form", FORMS)
def test_the_key_is_taken_out_in_every_form(key, form):
    written = FORMS[form](key)
    said = Secret(key).hidden(f"Wrong credentials '{written}', said the engine.")
    assert MASK in said
    assert said.startswith("Wrong credentials '")
    assert said.endswith("', said the engine.")
    middle = said.removeprefix("Wrong credentials '").removesuffix("', said the engine.")
    # Of base64, what stood before the key, and a few bits.
    assert len(middle.replace(MASK, "")) <= (150 if form == "base64 in lines" else 16), middle
    assert parts(key, FORMS[form]).strip() not in said


@given(st.text(), st.sampled_from(KEYS), st.sampled_from(sorted(FORMS)), st.text())
def test_whatever_stands_around_it(before, key, form, behind):
    written = FORMS[form](key)
    assert written not in Secret(key).hidden(f"{before} {written} {behind}")


@given(st.text())
def test_what_holds_no_key_stays_as_it_is(text):
    assert Secret("sk-proj-4Fz9aBcDeFgH").hidden(text) == text
    assert Secret("").hidden(text) == text


@pytest.mark.parametrize("length", range(4, 20))
def test_the_beginning_of_a_key_at_the_end_of_a_cut_is_taken_out(length):
    assert Secret(KEYS[1]).hidden(f"Wrong key {KEYS[1][:length]}") == f"Wrong key {MASK}"
    assert Secret(KEYS[1]).hidden(f"Wrong key {percent(KEYS[1][:length])}") == f"Wrong key {MASK}"


def test_words_are_cut_after_the_key_is_out_and_not_in_the_middle_of_it():
    secret = Secret(KEYS[1])
    for start in range(360, 410):
        for body in (json.dumps({"error": "." * start + KEYS[1]}), "." * start + percent(KEYS[1])):
            assert "sk-p" not in refusals.words(body, secret.hidden)
            assert "%73%6b" not in refusals.words(body, secret.hidden)
    tags = "<p>" * 30_000
    for start in range(1 << 16, (1 << 16) - 40, -1):
        assert "sk-p" not in refusals.words(tags[: start - 1] + " " + KEYS[1] * 3, secret.hidden)


def test_several_in_one_text_and_beside_one_another():
    secret = Secret(KEYS[1])
    assert secret.hidden(f"{KEYS[1]}{KEYS[1]} and {percent(KEYS[1])}") == f"{MASK}{MASK} and {MASK}"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("proxy http://user:pass@10.0.0.1:8080 failed", "proxy http://***@10.0.0.1:8080 failed"),
        ("https://token@host/path", "https://***@host/path"),
        ("http://host/a@b", "http://host/a@b"),
        ("write to me@host", "write to me@host"),
    ],
)
def test_the_login_of_an_address_is_taken_out_whatever_the_key_is(said, told):
    assert Secret("").hidden(said) == Secret(KEY).hidden(said) == told


def test_a_short_key_is_taken_out_of_the_words_of_others_and_not_of_our_sentences():
    secret = Secret("key")
    assert secret.hidden("wrong key!") == f"wrong {MASK}!"
    assert secret.hidden_sentence("The engine refuses the key.") == "The engine refuses the key."


def test_an_answer_has_no_key_and_while_it_comes_no_beginning_of_one():
    secret, told = Secret(KEYS[1]), []
    answer = f"It is {KEYS[1]}, or {KEYS[1].upper()}."
    for end in range(len(answer) + 1):
        told.append(secret.certain(answer[:end]))
    assert all("sk-" not in entry for entry in told)
    assert told[-1] == secret.hidden_answer(answer) == f"It is {MASK}, or {MASK}."


@pytest.mark.parametrize("key", ["", "EMPTY", "ollama", "lm-studio", "not-needed", "sk-no-key-required", "token-abc1"])
def test_words_that_are_no_secret_stay_in_answers(key):
    for text in (f"This is {key}.", f"This is {key[:3]}"):
        assert Secret(key).hidden_answer(text) == Secret(key).certain(text) == text


def test_the_work_is_proportional_to_the_text():
    """A text of nothing but escapes or beginnings of a key is gone through a few times, not once for each of them."""
    for piece in ("%25", "\\\\", "&amp;", "sk-proj-", "://", "://a", " "):
        said = Secret(KEYS[1]).hidden(piece * (65536 // len(piece)))
        assert len(said) <= 65536 + 3
