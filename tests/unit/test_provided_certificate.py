"""A certificate that the user provides is checked as a client would check it, before anything changes."""

import datetime
import json

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from settings import SettingsError, load

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


class Authority:
    def __init__(self, end: datetime.datetime = NOW + 1000 * DAY) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority")])
        self.certificate = (
            self._builder(self.name, self.key.public_key(), end)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(self._usage(signing=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, end: datetime.datetime) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - 100 * DAY)
            .not_valid_after(end)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )

    def _usage(self, *, signing: bool) -> x509.KeyUsage:
        return x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=signing,
            crl_sign=signing,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )

    def issue(self, name: str, *, end: datetime.datetime = NOW + 100 * DAY) -> tuple[str, str]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            self._builder(subject, key.public_key(), end)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(self._usage(signing=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return certificate.public_bytes(serialization.Encoding.PEM).decode(), pem.decode()

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()


def refusal(certificate: str, key: str, authority: str) -> str:
    """Return what is said of a provided certificate for registry.docker; nothing where it is taken."""
    provided = {"certificate": certificate, "privateKey": key, "authority": authority}
    config = {
        "private-registry:certificate": json.dumps({"mode": "provided"}),
        "private-registry:providedCertificate": json.dumps(provided),
    }
    try:
        load(config, {"private-registry:providedCertificate"}, "test")
    except SettingsError as error:
        return " ".join(error.faults)
    return ""


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def test_a_good_one_is_taken(authority: Authority) -> None:
    assert refusal(*authority.issue("registry.docker"), authority.pem) == ""


def test_one_for_another_name_is_refused(authority: Authority) -> None:
    assert "is refused for registry.docker" in refusal(*authority.issue("other.docker"), authority.pem)


def test_one_of_another_authority_is_refused(authority: Authority) -> None:
    assert "lead to the authority" in refusal(*authority.issue("registry.docker"), Authority().pem)


def test_one_that_has_expired_is_refused(authority: Authority) -> None:
    said = refusal(*authority.issue("registry.docker", end=NOW - DAY), authority.pem)
    assert "must be valid today" in said


def test_the_key_of_another_is_refused(authority: Authority) -> None:
    certificate, _ = authority.issue("registry.docker")
    _, other_key = authority.issue("registry.docker")
    said = refusal(certificate, other_key, authority.pem)
    assert "is of another certificate" in said
    assert other_key.splitlines()[1] not in said
