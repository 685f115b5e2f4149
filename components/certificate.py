"""RegistryCertificate: the authority that clients trust, and the server's certificate."""

from collections.abc import Sequence
from typing import TypedDict

import pulumi
import pulumi_tls as tls

from settings import Certificate

KEY_BITS = 4096
SERVER_USES = ["digital_signature", "key_encipherment", "server_auth"]
AUTHORITY_USES = ["cert_signing", "crl_signing", "digital_signature"]


class CertificatePair(TypedDict):
    """The server's certificate with its chain, and its private key, a secret; both in PEM."""

    certificate_pem: pulumi.Output[str]
    private_key_pem: pulumi.Output[str]


class RegistryCertificate(pulumi.ComponentResource):
    """RSA 4096, signed with SHA-256, named by common name and alternative names (today's clients read only the latter).

    With an authority, the server's certificate is renewed without the clients noticing, as they trust the authority. A
    self-signed certificate is its own authority; a provided one is taken as it is.
    """

    authority_pem: pulumi.Output[str]
    """What clients have to trust: one certificate, or several while one authority takes over from another."""
    certificate_pem: pulumi.Output[str]
    """The server's certificate, with its chain if it has one."""
    private_key_pem: pulumi.Output[str]
    """The server's private key; secret. It stays the same when the certificate is renewed."""

    def __init__(
        self,
        name: str,
        settings: Certificate,
        *,
        hostname: str,
        provided: pulumi.Output[dict[str, str]] | None = None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("private-registry:index:RegistryCertificate", name, None, opts)
        if provided is not None:
            self.authority_pem = pulumi.Output.unsecret(provided["authority"])
            self.certificate_pem = pulumi.Output.unsecret(provided["certificate"])
            self.private_key_pem = pulumi.Output.secret(provided["privateKey"])
        elif settings.mode == "self-signed":
            self._self_signed(name, settings, hostname)
        else:
            self._signed_by_authority(name, settings, hostname)
        self.register_outputs({"authority_pem": self.authority_pem, "certificate_pem": self.certificate_pem})

    def _private_key(self, name: str) -> tls.PrivateKey:
        return tls.PrivateKey(f"{name}-key", algorithm="RSA", rsa_bits=KEY_BITS, opts=pulumi.ResourceOptions(parent=self))

    def _self_signed(self, name: str, settings: Certificate, hostname: str) -> None:
        key = self._private_key(f"{name}-server")
        certificate = tls.SelfSignedCert(
            f"{name}-server",
            private_key_pem=key.private_key_pem,
            subject=tls.SelfSignedCertSubjectArgs(common_name=hostname),
            dns_names=_names(settings, hostname),
            ip_addresses=list(settings.addresses),
            allowed_uses=SERVER_USES,
            validity_period_hours=settings.validity_days * 24,
            early_renewal_hours=settings.renew_before_days * 24,
            opts=pulumi.ResourceOptions(parent=self),
        )
        self.authority_pem = self.certificate_pem = certificate.cert_pem
        self.private_key_pem = key.private_key_pem

    def _signed_by_authority(self, name: str, settings: Certificate, hostname: str) -> None:
        authorities = {generation: self._authority(name, generation, settings) for generation in settings.authority.generations}
        authority_key, authority = authorities[settings.authority.generation]
        key = self._private_key(f"{name}-server")
        request = tls.CertRequest(
            f"{name}-server",
            private_key_pem=key.private_key_pem,
            subject=tls.CertRequestSubjectArgs(common_name=hostname),
            dns_names=_names(settings, hostname),
            ip_addresses=list(settings.addresses),
            opts=pulumi.ResourceOptions(parent=self),
        )
        certificate = tls.LocallySignedCert(
            f"{name}-server",
            cert_request_pem=request.cert_request_pem,
            ca_cert_pem=authority.cert_pem,
            ca_private_key_pem=authority_key.private_key_pem,
            allowed_uses=SERVER_USES,
            set_subject_key_id=True,
            validity_period_hours=settings.validity_days * 24,
            early_renewal_hours=settings.renew_before_days * 24,
            opts=pulumi.ResourceOptions(parent=self),
        )
        # In the order of their generations, so that clients are not told anew when another one of them begins to sign.
        trusted = [one.cert_pem for _, one in authorities.values()]
        self.authority_pem = pulumi.Output.all(*trusted).apply("".join)
        self.certificate_pem = certificate.cert_pem
        self.private_key_pem = key.private_key_pem

    def _authority(self, name: str, generation: int, settings: Certificate) -> tuple[tls.PrivateKey, tls.SelfSignedCert]:
        """Return an authority's key and certificate. The first one has the name that it had when there was only one."""
        suffix = "" if generation == 1 else f"-{generation}"
        key = self._private_key(f"{name}-authority{suffix}")
        common_name = "Authority of a private registry" + ("" if generation == 1 else f", generation {generation}")
        certificate = tls.SelfSignedCert(
            f"{name}-authority{suffix}",
            private_key_pem=key.private_key_pem,
            subject=tls.SelfSignedCertSubjectArgs(common_name=common_name),
            is_ca_certificate=True,
            set_subject_key_id=True,
            allowed_uses=AUTHORITY_USES,
            validity_period_hours=settings.authority_validity_days * 24,
            opts=pulumi.ResourceOptions(parent=self),
        )
        return key, certificate

    @property
    def pair(self) -> CertificatePair:
        """The certificate and its key, as the components that serve with them take both."""
        return {"certificate_pem": self.certificate_pem, "private_key_pem": self.private_key_pem}


def _names(settings: Certificate, hostname: str) -> Sequence[str]:
    return list(dict.fromkeys([hostname, *settings.names]))
