import errno

import pytest

from qwenvl.models.hub_errors import TransferError, explain, redacted


@pytest.mark.parametrize(
    "text",
    [
        "GET https://hub/owner/name?token=hf_abcDEF123 failed",
        "header Authorization: Bearer hf_abcDEF123 was refused",
        "https://cdn/x?X-Amz-Signature=5ec4e7&Key-Pair-Id=K2\nsecond line hf_abcDEF123",
        "hf_abcDEF123",
        "ProxyError: http://user:abcDEF@proxy:8080 and https://abcDEF@other/path",
        "x" * 1500 + " hf_abcDEF123",
        "x" * 990 + " hf_abcDEF123 and more",
    ],
)
def test_no_token_and_no_signature_is_left(text):
    shown = redacted(text)
    assert "abcDEF" not in shown
    assert "Signature" not in shown
    assert len(shown) <= 1000
    assert "\n" not in shown


def test_a_mirrors_login_is_not_told(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://somebody:abcDEF@mirror:8080")
    told = explain(ConnectionError("no"), "owner/name", tmp_path)
    assert "https://***@mirror:8080" in told
    assert "abcDEF" not in told


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (TransferError("As it is."), "As it is."),
        (OSError(errno.ENOSPC, "No space left on device"), "The disk of .*m is full.*is kept"),
        (PermissionError(errno.EACCES, "Permission denied"), "m cannot be written to"),
        (OSError(errno.EROFS, "Read-only file system"), "m cannot be written to .Read-only.*extra_model_paths"),
        (ConnectionError("refused by ?secret"), r"owner/name could not be downloaded .*ConnectionError: refused by \)"),
    ],
)
def test_what_happens_here_is_told_apart(tmp_path, error, says):
    import re

    assert re.search(says, explain(error, "owner/name", tmp_path / "m"))
