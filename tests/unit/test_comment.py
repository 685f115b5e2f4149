"""`ops comment` on a stand-in for GitHub's and GitLab's APIs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ops.__main__ import app
from tests.forge import BOT, LONGEST, TOKEN, Forge, running_forge

MARK = "<!-- private-registry report dev -->"
STRANGER = {"login": "stranger", "type": "User", "username": "stranger"}


@pytest.fixture
def forge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Forge]:
    for variable in ("GITHUB_REPOSITORY", "GITHUB_API_URL", "GITHUB_TOKEN", "CI_PROJECT_ID", "CI_API_V4_URL", "GITLAB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_forge() as forge:
        yield forge


@pytest.fixture
def github(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> Forge:
    monkeypatch.setenv("GITHUB_REPOSITORY", "owner/name")
    monkeypatch.setenv("GITHUB_API_URL", forge.url)
    monkeypatch.setenv("GITHUB_TOKEN", TOKEN)
    return forge


@pytest.fixture
def gitlab(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> Forge:
    monkeypatch.setenv("CI_PROJECT_ID", "5")
    monkeypatch.setenv("CI_API_V4_URL", forge.url)
    monkeypatch.setenv("GITLAB_TOKEN", TOKEN)
    forge.user = "project_5_bot"
    return forge


def comment(folder: Path, text: str, *, fails: bool = False) -> str:
    """Run the command on a report, and return what it says."""
    (folder / "report.md").write_text(text)
    run = CliRunner().invoke(app, ["comment", str(folder / "report.md"), "--pull-request", "7"])
    assert run.exit_code == (1 if fails else 0), run.output
    return run.output


def test_the_first_report_of_a_stack_is_a_new_comment(github: Forge, tmp_path: Path) -> None:
    assert comment(tmp_path, f"{MARK}\nfine\n") == "✓ comment 100 of 7 is made\n"
    assert github.bodies == [f"{MARK}\nfine\n"]


def test_a_later_report_takes_the_place_of_the_first(github: Forge, tmp_path: Path) -> None:
    comment(tmp_path, f"{MARK}\nfine\n")
    assert comment(tmp_path, f"{MARK}\nneeds approval\n") == "✓ comment 100 of 7 is updated\n"
    assert github.bodies == [f"{MARK}\nneeds approval\n"]


def test_the_report_of_another_stack_stays(github: Forge, tmp_path: Path) -> None:
    comment(tmp_path, "<!-- private-registry report dev-2 -->\nfine\n")
    comment(tmp_path, f"{MARK}\nfine\n")
    assert len(github.comments) == 2


def test_a_comment_behind_a_hundred_others_is_found(github: Forge, tmp_path: Path) -> None:
    for number in range(100):
        github.add(f"remark {number}", STRANGER)
    github.add(f"{MARK}\nfine\n", BOT)
    assert comment(tmp_path, f"{MARK}\nneeds approval\n") == "✓ comment 200 of 7 is updated\n"


def test_a_strangers_comment_with_the_mark_is_left_alone(github: Forge, tmp_path: Path) -> None:
    github.add(f"{MARK}\nnothing to see here\n", STRANGER)
    comment(tmp_path, f"{MARK}\nfine\n")
    comment(tmp_path, f"{MARK}\nneeds approval\n")
    assert github.bodies == [f"{MARK}\nnothing to see here\n", f"{MARK}\nneeds approval\n"]


def test_with_a_persons_token_that_persons_comment_is_updated_and_no_bots(github: Forge, tmp_path: Path) -> None:
    github.user = "operator"
    github.add(f"{MARK}\nof a bot\n", BOT)
    github.add(f"{MARK}\nfine\n", {"login": "operator", "type": "User"})
    comment(tmp_path, f"{MARK}\nneeds approval\n")
    assert github.bodies == [f"{MARK}\nof a bot\n", f"{MARK}\nneeds approval\n"]


def test_on_gitlab_the_tokens_own_note_is_kept_up_to_date(gitlab: Forge, tmp_path: Path) -> None:
    gitlab.add(f"{MARK}\nnothing to see here\n", STRANGER)
    comment(tmp_path, f"{MARK}\nfine\n")
    comment(tmp_path, f"{MARK}\nneeds approval\n")
    assert gitlab.bodies == [f"{MARK}\nnothing to see here\n", f"{MARK}\nneeds approval\n"]


def test_a_report_that_is_too_long_is_shortened_at_a_lines_end_and_says_so(github: Forge, tmp_path: Path) -> None:
    lines = [f"- update `resource-{number}`" for number in range(4000)]
    comment(tmp_path, "\n".join([MARK, *lines]))
    mark, word, _, *shown = github.bodies[0].splitlines()
    assert (mark, word) == (MARK, "_This report is shortened: the whole one is in the job's artifact._")
    assert shown == lines[: len(shown)]
    assert LONGEST - len(lines[-1]) < len(github.bodies[0]) <= LONGEST


def test_a_report_that_just_fits_is_not_shortened(github: Forge, tmp_path: Path) -> None:
    whole = f"{MARK}\n" + "x" * (LONGEST - len(MARK) - 2) + "\n"
    comment(tmp_path, whole)
    assert github.bodies == [whole]


def test_a_token_that_may_not_write_is_told_with_the_mend_and_not_shown(github: Forge, tmp_path: Path) -> None:
    github.writable = False
    said = comment(tmp_path, f"{MARK}\nfine\n", fails=True)
    assert "403" in said
    assert "The token must be allowed to write comments (docs/workflows.md)." in said
    assert TOKEN not in said


def test_a_wrong_token_is_told(github: Forge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "another")
    assert "The token is wrong or has expired" in comment(tmp_path, f"{MARK}\nfine\n", fails=True)


@pytest.mark.parametrize("token", ["secret\x07word", "geheim\u00df"], ids=["control", "not-ascii"])
def test_a_token_that_is_no_header_is_refused_and_not_shown(
    token: str, github: Forge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", token)
    said = comment(tmp_path, f"{MARK}\nfine\n", fails=True)
    assert "GITHUB_TOKEN has characters that no token has." in said
    assert token not in said


def test_a_missing_token_is_named(github: Forge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GITHUB_TOKEN")
    assert "GITHUB_TOKEN is not set." in comment(tmp_path, f"{MARK}\nfine\n", fails=True)


def test_outside_of_github_and_gitlab_it_says_what_to_set(forge: Forge, tmp_path: Path) -> None:
    assert "set GITHUB_REPOSITORY to OWNER/NAME" in comment(tmp_path, f"{MARK}\nfine\n", fails=True)


def test_an_api_that_does_not_answer_is_told(github: Forge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GITHUB_API_URL", "http://127.0.0.1:1")
    assert "got no answer" in comment(tmp_path, f"{MARK}\nfine\n", fails=True)


def test_a_file_that_is_no_report_is_refused(github: Forge, tmp_path: Path) -> None:
    assert "does not begin with a mark" in comment(tmp_path, "fine\n", fails=True)
    assert github.comments == []
