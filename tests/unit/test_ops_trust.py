"""What `ops` makes of authorities: those that a host trusts, and the one that signed a certificate."""

import datetime

import pytest
from cryptography import x509

from ops.trust import judged
from ops.verify import end_of_authority
from tests.unit.test_provided_certificate import DAY, NOW, Authority


def pem(*authorities: Authority) -> str:
    return "".join(one.pem for one in authorities)


def test_the_end_that_counts_is_that_of_the_authority_that_signed() -> None:
    ends_soon, ends_late = Authority(NOW + 10 * DAY), Authority(NOW + 900 * DAY)
    certificate = x509.load_pem_x509_certificate(ends_soon.issue("a.test")[0].encode())
    end = end_of_authority(certificate, pem(ends_late, ends_soon))
    assert end - datetime.timedelta(minutes=1) < NOW + 10 * DAY < end + datetime.timedelta(minutes=1)


WANTED = Authority()


@pytest.mark.parametrize(
    ("status", "said", "mend"),
    [
        ("folder /f\ntrust absent\n", "not all that it needs", "--fix {host}"),
        ("folder /f\ntrust foreign\nhandshake ok\n", "what another has put into /f", "Move that away"),
        (f"folder /f\ntrust ours\nhandshake ok\n{pem(WANTED)}", "an authority", None),
        (f"folder /f\ntrust ours\nhandshake untried no curl\n{pem(WANTED)}", "an authority, no curl", None),
        (f"folder /f\ntrust ours\nhandshake failed no route\n{pem(WANTED)}", "cannot use the registry: no route", "resolves"),
        (f"folder /f\ntrust ours\nhandshake ok\n{pem(Authority())}", "which is not what the stack says", "--fix {host}"),
        (f"folder /f\ntrust ours\nhandshake ok\n{pem(WANTED, Authority())}", "which is not what the stack says", "--fix {host}"),
        (f"folder /f\nconfig_path empty\ntrust ours\nhandshake ok\n{pem(WANTED)}", "config_path is empty", "Set config_path"),
        ("folder /f\ntrust ours\nhandshake ok\n-----BEGIN CERTIFICATE-----\nno\n", "a file that cannot be read", "--fix {host}"),
    ],
    # What is made anew in each process must not be in a test's name.
    ids=["absent", "foreign", "well", "untried", "failed", "another", "more", "config_path", "unreadable"],
)
def test_a_hosts_status_is_put_in_words_with_the_mend(status: str, said: str, mend: str | None) -> None:
    words, _, what_to_do = judged(status, pem(WANTED))
    assert said in words
    assert what_to_do is None if mend is None else mend in str(what_to_do)


def test_an_authority_that_ends_soon_is_told_with_its_day() -> None:
    ending = Authority(NOW + 30 * DAY)
    said, until, mend = judged(f"folder /f\ntrust ours\nhandshake ok\n{pem(ending)}", pem(ending))
    assert said.endswith("which ends soon")
    assert until == (NOW + 30 * DAY).date()
    assert "docs/trust.md" in str(mend)
