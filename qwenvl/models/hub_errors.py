"""Turns errors of huggingface_hub into sentences for the user that never hold a token."""

from __future__ import annotations

import errno
import re
from pathlib import Path

# A name and a password before the host in the address of a proxy or a mirror.
_LOGIN = re.compile(r"(?<=://)[^\s/@]{1,400}@")
# An error message of a library may be a page long.
_LONGEST_LINE = 1000


class TransferError(RuntimeError):
    """A download cannot go on; the message is a sentence for the user."""


def endpoint() -> str:
    """Return the address of the hub, or of the mirror in HF_ENDPOINT, without a login, for messages."""
    from huggingface_hub import constants

    return _LOGIN.sub("***@", constants.ENDPOINT)


def expected_errors() -> tuple[type[BaseException], ...]:
    """Return the errors that a download may raise, with those of the HTTP library that huggingface_hub uses."""
    from huggingface_hub.errors import HfHubHTTPError

    return TransferError, HfHubHTTPError.__bases__[0], OSError, ValueError, KeyError


def is_full_disk(error: BaseException) -> bool:
    """Tell if the disk, or the user's quota on it, is full."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def is_broken_line(error: BaseException) -> bool:
    """Tell if another try may help: neither the server has refused, nor is the disk full."""
    return not (isinstance(error, TransferError) or _status(error) or is_full_disk(error))


def _status(error: BaseException) -> int | None:
    """Return the HTTP status if a server has answered, else None."""
    return getattr(getattr(error, "response", None), "status_code", None)


def explain(error: BaseException, repo_id: str, folder: Path) -> str:
    """Explain to the user what went wrong, why, and what to do."""
    if isinstance(error, TransferError):
        return str(error)
    refused = _refusal(error, repo_id)
    if refused:
        return refused
    if is_full_disk(error):
        return f"The disk of {folder} is full. Make room and try again: what has come so far is kept."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"{folder} cannot be written to ({error.strerror}). Allow writing there, or give ComfyUI a folder that can "
            "be written to as LLM in extra_model_paths.yaml."
        )
    return (
        f"{repo_id} could not be downloaded from {endpoint()} ({type(error).__name__}: {redacted(str(error))}). Check "
        "the connection (HF_ENDPOINT may name a mirror) and try again: what has come so far is kept."
    )


def _refusal(error: BaseException, repo_id: str) -> str | None:
    """Explain the refusal of a server; None if no server has answered."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    host, status = endpoint(), _status(error)
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: accept its terms at {host}/{repo_id}, then {log_in}."
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return f"There is no {repo_id} at {host}, or it is private: check the name, or {log_in}."
    if status in (401, 403):
        return f"{host} refuses access to {repo_id} (HTTP {status}): the token is wrong or lacks the right; {log_in}."
    if status:
        return f"{host} answered HTTP {status} for {repo_id}: try again later. What has come so far is kept."
    return None


def redacted(text: str) -> str:
    """Return the first line, without tokens, and without logins and signatures in addresses."""
    line = next(iter(text.strip().splitlines()), "")[: 2 * _LONGEST_LINE]
    line = _LOGIN.sub("***@", line)
    line = re.sub(r"\?\S*", "", line)
    return re.sub(r"hf_\w+|Bearer \S+", "***", line)[:_LONGEST_LINE].rstrip(".")
