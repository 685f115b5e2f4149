"""`ops comment`: a report as one comment on a pull request of GitHub or a merge request of GitLab, kept up to date in place.

Sources: https://docs.github.com/en/rest/issues/comments and https://docs.gitlab.com/api/notes/#merge-requests.
"""

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ops.stack import OpsError

PER_PAGE = 100
TIMEOUT_SECONDS = 30
SHORTENED = "_This report is shortened: the whole one is in the job's artifact._"


class RefusedError(OpsError):
    """The API answered with an error."""

    def __init__(self, what: str, status: int) -> None:
        mends = {
            401: "The token is wrong or has expired: give another.",
            403: "The token must be allowed to write comments (docs/workflows.md).",
            404: "See whether there is such a pull request, and whether the token may read it.",
        }
        super().__init__(what, mends.get(status, "Run this again; if that does not help, the answer says why."))
        self.status = status


@dataclass(frozen=True)
class Discussion:
    """Where the comments of one pull request are."""

    url: str
    """All comments; one to be made is sent here."""
    comment: str
    """One comment, without its number."""
    method: str
    """How one is changed."""
    user: str
    """The token's user."""
    author: str
    """The key of a comment's author."""
    name: str
    """The key of a user's name."""
    headers: Mapping[str, str]
    longest: int
    """Most characters of a comment."""


def discussion(pull_request: int) -> Discussion:
    """Return where a pull request's comments are, by the variables that GitHub's or GitLab's jobs have.

    Raises:
        OpsError: there are neither.
    """
    if repository := os.environ.get("GITHUB_REPOSITORY"):
        api = os.environ.get("GITHUB_API_URL", "https://api.github.com")
        issues, user = f"{api}/repos/{repository}/issues", f"{api}/user"
        headers = {"Authorization": f"Bearer {_token('GITHUB_TOKEN')}", "Accept": "application/vnd.github+json"}
        comments = f"{issues}/{pull_request}/comments"
        return Discussion(comments, f"{issues}/comments", "PATCH", user, "user", "login", headers, 65_536)
    if project := os.environ.get("CI_PROJECT_ID"):
        api = os.environ.get("CI_API_V4_URL", "https://gitlab.com/api/v4")
        notes = f"{api}/projects/{project}/merge_requests/{pull_request}/notes"
        headers = {"PRIVATE-TOKEN": _token("GITLAB_TOKEN")}
        return Discussion(notes, notes, "PUT", f"{api}/user", "author", "username", headers, 1_000_000)
    raise OpsError(
        "There is nothing to comment on: neither GITHUB_REPOSITORY nor CI_PROJECT_ID is set.",
        "Run this in a job of GitHub or GitLab, or set GITHUB_REPOSITORY to OWNER/NAME and GITHUB_TOKEN.",
    )


def _token(variable: str) -> str:
    token = os.environ.get(variable, "").strip()
    # One that is no header is quoted in the library's error.
    if token.isascii() and token.isprintable() and token:
        return token
    what = f"{variable} has characters that no token has." if token else f"{variable} is not set."
    raise OpsError(what, "Give the job a token that may write comments (docs/workflows.md).")


def keep(file: Path, pull_request: int) -> str:
    """Write a report as a comment, in the place of the one that begins with the same mark; return what was done.

    Raises:
        OpsError: the file is no report, or the comment could not be written.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise OpsError(f"{file} cannot be read: {error}.", "Give what `ops report` printed.") from None
    mark = text.partition("\n")[0]
    if not (mark.startswith("<!-- private-registry ") and mark.endswith(" -->")):
        raise OpsError(f"{file} does not begin with a mark, such as <!-- private-registry report dev -->.", "Give a report.")
    place = discussion(pull_request)
    body = {"body": shortened(text, place.longest)}
    with httpx.Client(headers=place.headers, timeout=TIMEOUT_SECONDS) as client:
        user = _user(client, place)
        for comment in _comments(client, place):
            if str(comment["body"]).startswith(mark) and _is_of(user, comment.get(place.author) or {}, place):
                _ask(client, place.method, f"{place.comment}/{comment['id']}", json=body)
                return f"comment {comment['id']} of {pull_request} is updated"
        made = _ask(client, "POST", place.url, json=body)
        return f"comment {made['id']} of {pull_request} is made"


def shortened(text: str, longest: int) -> str:
    """Return a report in whole lines that are not longer together than a comment may be; where some are left out, it says so."""
    if len(text) <= longest:
        return text
    mark, _, rest = text.partition("\n")
    # What is cut off may be the end of a folded part: at the top the word is seen.
    head = f"{mark}\n{SHORTENED}\n\n"
    return f"{head}{rest[: longest - len(head) - 1].rpartition(chr(10))[0]}\n"


def _user(client: httpx.Client, place: Discussion) -> str | None:
    """Return whose token it is, or None where it is of no user but of a GitHub App, as the token of a job is."""
    try:
        return str(_ask(client, "GET", place.user)[place.name])
    except RefusedError as error:
        if error.status == 403:
            return None
        raise


def _is_of(user: str | None, author: Mapping[str, Any], place: Discussion) -> bool:
    """Tell whether a comment is the token's own: anyone may write one that begins with a mark, but nobody can be a bot."""
    return author.get("type") == "Bot" if user is None else author.get(place.name) == user


def _comments(client: httpx.Client, place: Discussion) -> Iterator[dict[str, Any]]:
    """Yield all comments, the oldest first."""
    for page in itertools.count(1):
        found = _ask(client, "GET", place.url, params={"per_page": PER_PAGE, "page": page, "sort": "asc"})
        yield from found
        if len(found) < PER_PAGE:
            return


def _ask(client: httpx.Client, method: str, url: str, **arguments: Any) -> Any:
    """Return the answer's content.

    Raises:
        RefusedError: the answer is an error.
        OpsError: there is no answer, or none that can be read.
    """
    try:
        answer = client.request(method, url, **arguments)
        if answer.is_success:
            return answer.json()
    except httpx.HTTPError as error:
        raise OpsError(f"{method} {url} got no answer: {error}.", "Run this again.") from None
    except ValueError:
        raise OpsError(f"{method} {url} got an answer that is no JSON.", "See whether that is the API's address.") from None
    raise RefusedError(f"{method} {url} was refused: {answer.status_code} {answer.text[:200].strip()}", answer.status_code)
