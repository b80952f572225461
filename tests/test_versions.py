import pytest

from qwenvl.versions import release


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("2.9.1+cu128", (2, 9, 1)),
        ("2.13.0a0+git", (2, 13, 0)),
        ("5.2.0.dev0", (5, 2, 0)),
        ("2.9.0a0+50eac811a6.nv25.09", (2, 9, 0)),
        ("2.8.3+cu12torch2.7cxx11abiTRUE", (2, 8, 3)),
        ("570.86.15", (570, 86, 15)),
        ("12.8", (12, 8)),
        ("6.4.43483-a187df25c", (6, 4, 43483)),
    ],
)
def test_the_numbers_of_a_version_are_read_whatever_follows(text, numbers):
    assert release(text) == numbers


@pytest.mark.parametrize("text", ["", "unknown", "git-3f2a", "-", "1" * 5000, "2.9.x", None])
def test_what_is_no_version_is_older_than_any(text):
    """A broken installation has anything in its place, or nothing."""
    assert release(text) == (0,)


def test_the_first_of_several_digits_is_compared_as_a_number():
    assert release("5.10.1") > release("5.2") > release("4.57.1") > release("4.57")
