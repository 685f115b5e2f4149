"""The tls stand-in makes what the official plugin makes, judged by openssl."""

import datetime
import subprocess
from pathlib import Path

import pytest

from toolchain.providers.tls import CertRequest, LocallySignedCert, PrivateKey, SelfSignedCert


def openssl(*arguments: str, stdin: str = "") -> str:
    return subprocess.run(["openssl", *arguments], input=stdin, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"algorithm": "RSA", "rsaBits": 2048}, "2048 bit"),
        ({"algorithm": "ECDSA", "ecdsaCurve": "P256"}, "prime256v1"),
        ({"algorithm": "ED25519"}, "ED25519"),
    ],
)
def test_each_kind_of_key_is_read_by_openssl(inputs: dict[str, object], said: str) -> None:
    _, outputs = PrivateKey().create("key", {**PrivateKey.defaults, **inputs})
    assert said in openssl("pkey", "-noout", "-text", stdin=outputs["privateKeyPem"])
    assert "PUBLIC KEY" in outputs["publicKeyPem"]
    assert outputs["publicKeyOpenssh"].startswith(("ssh-", "ecdsa-"))


def test_a_signed_certificate_leads_to_its_authority(tmp_path: Path) -> None:
    key = PrivateKey().create("key", {"algorithm": "RSA", "rsaBits": 2048})[1]["privateKeyPem"]
    server_key = PrivateKey().create("server", {"algorithm": "RSA", "rsaBits": 2048})[1]["privateKeyPem"]
    authority = SelfSignedCert().create(
        "authority",
        {
            "privateKeyPem": key,
            "subject": {"commonName": "an authority"},
            "allowedUses": ["cert_signing"],
            "validityPeriodHours": 48,
            "isCaCertificate": True,
        },
    )[1]["certPem"]
    request = CertRequest().create(
        "request",
        {
            "privateKeyPem": server_key,
            "subject": {"commonName": "a.test"},
            "dnsNames": ["a.test"],
            "ipAddresses": ["10.0.0.1"],
        },
    )[1]
    certificate = LocallySignedCert().create(
        "server",
        {
            "certRequestPem": request["certRequestPem"],
            "caCertPem": authority,
            "caPrivateKeyPem": key,
            "allowedUses": ["server_auth", "digital_signature"],
            "validityPeriodHours": 24,
        },
    )[1]
    (tmp_path / "authority").write_text(authority)
    (tmp_path / "server").write_text(certificate["certPem"])
    files = "-CAfile", str(tmp_path / "authority"), str(tmp_path / "server")
    assert "OK" in openssl("verify", "-purpose", "sslserver", "-verify_hostname", "a.test", *files)
    assert "OK" in openssl("verify", "-verify_ip", "10.0.0.1", *files)


@pytest.mark.parametrize(("days_left", "early_days", "stale"), [(40, 30, False), (20, 30, True), (-1, 0, True)])
def test_a_certificate_asks_for_its_renewal_inside_its_window(days_left: int, early_days: int, stale: bool) -> None:
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days_left)
    state = {"validityEndTime": end.isoformat(), "earlyRenewalHours": early_days * 24}
    assert bool(SelfSignedCert().stale(state)) is stale
