import pytest

from qwenvl.log import amount, gigabytes


def test_gigabytes_are_those_of_disks_with_as_many_digits_as_asked():
    assert (gigabytes(3_140_000_000), gigabytes(3_140_000_000, 2), gigabytes(0)) == ("3.1 GB", "3.14 GB", "0.0 GB")


@pytest.mark.parametrize(
    ("count", "total", "words"),
    [
        (3.14e9, None, "3.1 GB"),
        (1e9, None, "1.0 GB"),
        (0.9e9, None, "900.0 MB"),
        (0, None, "0.0 MB"),
        (5e6, 2.9e9, "0.0 of 2.9 GB"),
        (2.1e9, 8.9e9, "2.1 of 8.9 GB"),
        (0, 2.9e6, "0.0 of 2.9 MB"),
    ],
)
def test_an_amount_is_in_the_unit_of_the_largest_of_it(count, total, words):
    assert amount(count, total) == words
