"""The certificates of a lab cluster: one authority, and what it signs for the programs that talk to each other."""

import datetime
import ipaddress
import json
from base64 import b64encode
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFETIME = datetime.timedelta(days=3650)  # a lab that is left standing must not stop for this


class Authority:
    """A certificate authority in a folder; what is in there already is used again."""

    def __init__(self, folder: Path) -> None:
        """Open the authority, or make it."""
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.certificate = self._made("ca", "", "lab", ())

    def key(self, name: str) -> Path:
        """Return the file of a private key, made if there is none."""
        file = self.folder / f"{name}.key"
        if not file.exists():
            encoding, private = serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL
            pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(encoding, private, serialization.NoEncryption())
            file.touch(mode=0o600)
            file.write_bytes(pem)
        return file

    def issue(self, name: str, user: str, group: str = "", names: tuple[str, ...] = ()) -> Path:
        """Return the file of a certificate, for a client (user and group) and, where it has names, for a server."""
        return self._made(name, group, user, names)

    def kubeconfig(self, name: str, server: str) -> str:
        """Return a kubeconfig, as JSON, with which the certificate's owner reaches the server.

        The certificates are within it, so that the file can be handed to a program that has no access to this folder.
        """

        def data(file: Path) -> str:
            return b64encode(file.read_bytes()).decode()

        cluster = {"server": server, "certificate-authority-data": data(self.certificate)}
        certificate, key = self.folder / f"{name}.crt", self.key(name)
        user = {"client-certificate-data": data(certificate), "client-key-data": data(key)}
        return json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "lab", "cluster": cluster}],
                "users": [{"name": name, "user": user}],
                "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": name}}],
                "current-context": "lab",
            }
        )

    def _private(self, name: str) -> ec.EllipticCurvePrivateKey:
        key = serialization.load_pem_private_key(self.key(name).read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    def _made(self, name: str, group: str, user: str, names: tuple[str, ...]) -> Path:
        file = self.folder / f"{name}.crt"
        if file.exists():
            return file
        public = self._private(name).public_key()
        parts = [x509.NameAttribute(NameOID.COMMON_NAME, user)]
        if group:
            parts.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, group))
        subject = x509.Name(parts)
        authority = name == "ca"
        issuer = subject if authority else x509.load_pem_x509_certificate(self.certificate.read_bytes()).subject
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + LIFETIME)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._private("ca").public_key()), critical=False)
        )
        if authority:
            usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
            builder = builder.add_extension(usage, critical=True)
        else:
            usages = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_alternative, names))), critical=False)
        certificate = builder.sign(self._private("ca"), hashes.SHA256())
        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return file


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
