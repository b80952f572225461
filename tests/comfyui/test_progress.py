from qwenvl.comfyui import progress


def counted(monkeypatch, *counts, unit="tokens", thinking=""):
    """What is told after counts at so many seconds each: (seconds, done)."""
    made = progress.Live()
    for seconds, done in counts:
        monkeypatch.setattr(progress.time, "monotonic", lambda seconds=seconds: seconds)
        made.count(done, unit, thinking)
    return made.told("7")


def test_before_anything_is_made_nothing_is_claimed():
    assert progress.Live().told("7") == {"node": "7", "thinking": "", "done": None, "unit": "", "per_s": None}


def test_one_token_has_no_speed_yet(monkeypatch):
    told = counted(monkeypatch, (10.0, 1))
    assert (told["done"], told["per_s"]) == (1, None)


def test_the_speed_is_that_of_the_tokens_after_the_first(monkeypatch):
    """However long the pictures took before it."""
    assert counted(monkeypatch, (100.0, 1), (102.0, 21))["per_s"] == 10.0
    assert counted(monkeypatch, (100.0, 1), (101.0, 11), (104.0, 21))["per_s"] == 5.0


def test_answers_are_counted_like_tokens(monkeypatch):
    told = counted(monkeypatch, (1.0, 0), (3.0, 4), unit="answers")
    assert (told["done"], told["unit"], told["per_s"]) == (4, "answers", 2.0)


def test_a_clock_that_stands_still_gives_no_speed(monkeypatch):
    assert counted(monkeypatch, (1.0, 0), (1.0, 4))["per_s"] is None


def test_the_thought_is_told_beside_the_text(monkeypatch):
    assert counted(monkeypatch, (1.0, 1), thinking="I see")["thinking"] == "I see"
