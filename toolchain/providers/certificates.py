"""What the tls stand-in makes: keys, requests and certificates."""

import datetime
import hashlib
import ipaddress
import uuid
from collections.abc import Mapping
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from toolchain.providers.base import ProviderError

CURVES: Mapping[str, type[ec.EllipticCurve]] = {
    "P224": ec.SECP224R1,
    "P256": ec.SECP256R1,
    "P384": ec.SECP384R1,
    "P521": ec.SECP521R1,
}
SUBJECT = {
    "commonName": NameOID.COMMON_NAME,
    "organization": NameOID.ORGANIZATION_NAME,
    "organizationalUnit": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "country": NameOID.COUNTRY_NAME,
    "locality": NameOID.LOCALITY_NAME,
    "province": NameOID.STATE_OR_PROVINCE_NAME,
}
KEY_USAGES = {
    "digital_signature": "digital_signature",
    "content_commitment": "content_commitment",
    "key_encipherment": "key_encipherment",
    "data_encipherment": "data_encipherment",
    "key_agreement": "key_agreement",
    "cert_signing": "key_cert_sign",
    "crl_signing": "crl_sign",
    "encipher_only": "encipher_only",
    "decipher_only": "decipher_only",
}
EXTENDED_KEY_USAGES = {"server_auth": ExtendedKeyUsageOID.SERVER_AUTH, "client_auth": ExtendedKeyUsageOID.CLIENT_AUTH}
PEM = serialization.Encoding.PEM


def _load_key(pem: str) -> CertificateIssuerPrivateKeyTypes:
    return serialization.load_pem_private_key(pem.encode(), None)  # type: ignore[return-value]


def _digest(key: object) -> hashes.SHA256 | None:
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()


def _algorithm(key: object) -> str:
    return {"RSA": "RSA", "EC": "ECDSA", "Ed": "ED25519"}[type(key).__name__.lstrip("_")[:2].replace("RS", "RSA")]


def _name(subject: Mapping[str, str] | None) -> x509.Name:
    return x509.Name([x509.NameAttribute(SUBJECT[key], value) for key, value in (subject or {}).items()])


def _alternative_names(inputs: Mapping[str, Any]) -> x509.SubjectAlternativeName | None:
    names: list[x509.GeneralName] = [x509.DNSName(name) for name in inputs.get("dnsNames", [])]
    names += [x509.IPAddress(ipaddress.ip_address(address)) for address in inputs.get("ipAddresses", [])]
    return x509.SubjectAlternativeName(names) if names else None


def private_key(inputs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
    traditional = serialization.PrivateFormat.TraditionalOpenSSL
    if inputs["algorithm"] == "RSA":
        key = rsa.generate_private_key(65537, inputs["rsaBits"])
    elif inputs["algorithm"] == "ECDSA":
        key = ec.generate_private_key(CURVES[inputs["ecdsaCurve"]]())
    else:
        key, traditional = ed25519.Ed25519PrivateKey.generate(), serialization.PrivateFormat.PKCS8

    def private(style: serialization.PrivateFormat) -> str:
        return key.private_bytes(PEM, style, serialization.NoEncryption()).decode()

    public = key.public_key()
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    outputs = {
        "privateKeyPem": private(traditional),
        "privateKeyPemPkcs8": private(serialization.PrivateFormat.PKCS8),
        "privateKeyOpenssh": "",
        "publicKeyOpenssh": "",
        "publicKeyPem": public.public_bytes(PEM, info).decode(),
    }
    if inputs["algorithm"] != "ECDSA" or inputs["ecdsaCurve"] != "P224":  # OpenSSH has no P224
        openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        outputs["privateKeyOpenssh"] = private(serialization.PrivateFormat.OpenSSH)
        outputs["publicKeyOpenssh"] = public.public_bytes(*openssh).decode() + "\n"
    digest = hashlib.sha1(public.public_bytes(serialization.Encoding.DER, info), usedforsecurity=False).hexdigest()
    return digest, outputs


def _certificate(
    inputs: Mapping[str, Any],
    subject: x509.Name,
    public_key: Any,
    alternative_names: x509.SubjectAlternativeName | None,
    issuer: x509.Certificate | None,
    issuer_key: CertificateIssuerPrivateKeyTypes,
) -> tuple[str, dict[str, Any]]:
    unsupported = set(inputs["allowedUses"]) - KEY_USAGES.keys() - EXTENDED_KEY_USAGES.keys()
    if unsupported:
        raise ProviderError(f"allowedUses has {', '.join(sorted(unsupported))}, which the stand-in does not know")
    start = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    end = start + datetime.timedelta(hours=inputs["validityPeriodHours"])
    authority = inputs.get("isCaCertificate", False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(authority, inputs.get("maxPathLength") if authority else None), True)
    )
    usages = {KEY_USAGES[use] for use in inputs["allowedUses"] if use in KEY_USAGES}
    if usages:
        flags = {usage: usage in usages for usage in KEY_USAGES.values()}
        builder = builder.add_extension(x509.KeyUsage(**flags), True)
    extended = [EXTENDED_KEY_USAGES[use] for use in inputs["allowedUses"] if use in EXTENDED_KEY_USAGES]
    if extended:
        builder = builder.add_extension(x509.ExtendedKeyUsage(extended), False)
    if alternative_names is not None:
        builder = builder.add_extension(alternative_names, False)
    if authority or inputs.get("setSubjectKeyId"):
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), False)
    if issuer is not None:
        own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        identifier = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)
        builder = builder.add_extension(identifier, False)
    certificate = builder.sign(issuer_key, _digest(issuer_key))
    return str(certificate.serial_number), {
        "certPem": certificate.public_bytes(PEM).decode(),
        "validityStartTime": start.isoformat(),
        "validityEndTime": end.isoformat(),
        "readyForRenewal": False,
        "keyAlgorithm": _algorithm(issuer_key),
    }


def self_signed(inputs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    key = _load_key(inputs["privateKeyPem"])
    subject = _name(inputs.get("subject"))
    return _certificate(inputs, subject, key.public_key(), _alternative_names(inputs), None, key)


def request(inputs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    key = _load_key(inputs["privateKeyPem"])
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(inputs.get("subject")))
    if (names := _alternative_names(inputs)) is not None:
        builder = builder.add_extension(names, False)
    request = builder.sign(key, _digest(key))
    return str(uuid.uuid4()), {
        "certRequestPem": request.public_bytes(PEM).decode(),
        "keyAlgorithm": _algorithm(key),
    }


def locally_signed(inputs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    request = x509.load_pem_x509_csr(inputs["certRequestPem"].encode())
    issuer = x509.load_pem_x509_certificate(inputs["caCertPem"].encode())
    try:
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = None
    key = _load_key(inputs["caPrivateKeyPem"])
    return _certificate(inputs, request.subject, request.public_key(), names, issuer, key)
