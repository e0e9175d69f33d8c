"""One request to the Hub: tried again when that may help, explained in one sentence when it does not."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from warmerge.errors import RemoteError, UsageError, WarmergeError, plain

ATTEMPTS = 4
_FIRST_WAIT = 0.5
_LONGEST_BACKOFF = 32.0
# The Hub counts requests over five minutes, so this is the longest that it has reason to ask for.
_LONGEST_WAIT = 330.0
_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_T = TypeVar("_T")


@dataclass(frozen=True)
class Place:
    """What a request is about, for its messages: as the user named it, its repository, the revision that was asked for
    (None: the default), the commit once that is known; and whether something is to be written there."""

    label: str
    repo: str
    asked: str | None = None
    commit: str | None = None
    writing: bool = False


def ask(
    request: Callable[[], _T],
    place: Place,
    *,
    attempts: int = ATTEMPTS,
    progress: Callable[[], int] = lambda: 0,
    pause: Callable[[float], object] | None = None,
) -> _T:
    """What `request` returns, asked again a few times when the Hub is busy or the connection breaks.

    Args:
        attempts: how often at most; counted anew whenever `progress` has grown.
        progress: how much has been received; a request that broke in the middle is worth more patience.
        pause: waits so many seconds (time.sleep); where it returns something true, the last error is raised.

    Raises:
        UsageError: there is no such repository.
        RemoteError: anything else that the Hub or the network answers.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # The root of the HTTP library's errors: that of httpx in huggingface_hub 1, of httpx2 in huggingface_hub 2.
    http_error = cast(type[Exception], HfHubHTTPError.__mro__[1])
    tried, reached = 0, progress()
    while True:
        try:
            return request()
        except (http_error, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            # These two only say where it happened; an upload's error comes as a plain RuntimeError.
            wrapped = isinstance(error, LocalEntryNotFoundError) or type(error) is RuntimeError
            found = error.__cause__ if wrapped and error.__cause__ else error
            status, wait = status_of(found), _wait(found)
            broken = status is None and isinstance(found, (http_error, ConnectionError))
            if progress() > reached:
                tried, reached = 0, progress()
            tried += 1
            wait = min(_FIRST_WAIT * 2 ** (tried - 1), _LONGEST_BACKOFF) if wait is None else wait
            # An address that takes seconds to say nothing will not say more the next time.
            hopeless = type(found).__name__ == "ConnectTimeout" and not reached
            may_help = (broken and not hopeless) or status in _TRY_AGAIN
            if tried >= attempts or wait > _LONGEST_WAIT or not may_help:
                raise explained(found, place, broken) from error
            if wait > 5 and status == 429:
                logging.getLogger(__name__).warning("%s: the Hub asks to wait %g s", plain(place.label), wait)
            if (pause or time.sleep)(wait):
                raise explained(found, place, broken) from error


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error is about, if any."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _wait(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait, in either of the headers that it uses for it."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    after, limit = headers.get("Retry-After", ""), headers.get("RateLimit", "")
    match = re.fullmatch(r"\s*(\d+)\s*", after) or re.search(r"\br=0;t=(\d+)", limit)
    return float(match[1]) if match else None


def explained(error: BaseException, place: Place, broken: bool) -> WarmergeError:
    """One sentence. The error's own text, with its addresses and request ids, is left to --debug."""
    from huggingface_hub import constants, get_token

    hub, has_token = constants.ENDPOINT, get_token() is not None
    what = _missing(error, place, hub, has_token)
    if isinstance(what, WarmergeError):
        return what
    if what is None and status_of(error) is None:
        what = _unanswered(error, place, hub, broken)
    return RemoteError(f"{plain(place.label)} {what or _answered(error, place, hub, has_token)}")


_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def _missing(error: BaseException, place: Place, hub: str, has_token: bool) -> str | WarmergeError | None:
    """What the Hub says is not there, or not for us; None where it says something else."""
    from huggingface_hub import errors

    repo, asked = place.repo, place.asked or "main"
    if isinstance(error, errors.GatedRepoError):  # first: it is a RepositoryNotFoundError too
        then = "with the account of your token" if has_token else f"and {_LOG_IN}"
        return f"is gated: accept its licence at {hub}/{repo} {then}"
    if isinstance(error, errors.RepositoryNotFoundError):
        then = f"check that your token may {'write there' if place.writing else 'read it'}" if has_token else _LOG_IN
        if place.writing:
            return UsageError(f"{repo}: no such model on the Hub, or none that you may see; {then}")
        what = f"no local folder {place.label!r} and no such model on the Hub"
        return UsageError(f"{what}; check the name, or if it is private, {then}")
    if isinstance(error, errors.RevisionNotFoundError) and place.commit is not None:
        return f"changed while it was read: its commit {place.commit[:12]} is no longer there; run the command again"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {asked!r}; {hub}/{repo}/tree/main lists its branches and tags"
    if isinstance(error, errors.DisabledRepoError):
        return f"has been disabled on the Hub; {hub}/{repo} may say why"
    if isinstance(error, errors.EntryNotFoundError) and status_of(error) == 404:
        return f"lists a file that the Hub does not have; look at {hub}/{repo}/tree/{place.commit or asked}"
    return None


def _answered(error: BaseException, place: Place, hub: str, has_token: bool) -> str:
    """What the HTTP status says."""
    status, said = status_of(error), str(getattr(error, "server_message", None) or "")
    access = "write" if place.writing else "read"
    cannot = f"cannot be {'written' if place.writing else 'read'}"
    if status == 401 and not has_token:
        return f"{cannot} without a token; {_LOG_IN}"
    if status == 401:
        public = "" if place.writing else ", or unset it for a public model"
        return f"{cannot}: the Hub does not accept your token; {_LOG_IN} anew{public}"
    if status in (402, 403, 413) and re.search(r"storage|quota|limit", said, re.IGNORECASE):
        return f"{cannot}: {plain(said)} ({hub}/settings/billing shows what you use)"
    if status == 403:
        return f"{cannot}: your token may not; give it {access} access to {place.repo} at {hub}/settings/tokens"
    if status == 404:  # the Hub's own carry a code, and were told apart above
        return f"{cannot}: {hub} does not answer as the Hub does (status 404); check HF_ENDPOINT and the proxy"
    if status == 429:
        wait = _wait(error)
        when = "later" if wait is None else f"in {wait:g} s"
        return f"{cannot}: too many requests; try again {when}" + ("" if has_token else f", and {_LOG_IN}")
    why = f" ({plain(said)})" if place.writing and said else ""
    return f"{cannot}: the Hub answered with status {status}{why}; try again later"


def _unanswered(error: BaseException, place: Place, hub: str, broken: bool) -> str:
    """What is wrong where there was no answer, or none of the Hub's."""
    kind, unreachable = type(error).__name__, f"{hub} cannot be reached ({type(error).__name__})"
    if broken and (place.commit is not None or place.writing):
        cannot = "cannot be written" if place.writing else "cannot be read on"
        return f"{cannot}: {unreachable}; check the network and run the command again"
    if broken:
        then = "or add --offline (HF_HUB_OFFLINE=1) to use what is in the Hub's cache"
        return f"is no local folder, and {unreachable}; check the name and the network, {then}"
    if isinstance(error, OSError) and error.errno is not None and not place.writing:
        return f"cannot be put in the Hub's cache ({error.strerror}); make room, or set HF_HOME to another disk"
    cannot = f"cannot be {'written' if place.writing else 'read'}"
    return f"{cannot}: {hub} does not answer as the Hub does ({kind}); check HF_ENDPOINT and the proxy"
