"""Stand-in for the tls plugin: PrivateKey, SelfSignedCert, CertRequest and LocallySignedCert.

Source of the rules: the schema of pulumi-tls 5 and terraform-provider-tls (internal/provider/common_cert.go): every input
replaces, and a certificate inside its early-renewal window plans its own replacement.

What makes keys and certificates is imported with the first of them: most runs change nothing and make none.
"""

import datetime
from collections.abc import Mapping
from typing import Any

from toolchain.providers.base import ResourceType, serve


class PrivateKey(ResourceType):
    inputs = frozenset({"algorithm", "rsaBits", "ecdsaCurve"})
    defaults = {"rsaBits": 2048, "ecdsaCurve": "P224"}
    replace_on = inputs
    secret_outputs = frozenset({"privateKeyPem", "privateKeyOpenssh", "privateKeyPemPkcs8"})

    def check(self, inputs: Mapping[str, Any]) -> list[tuple[str, str]]:
        if inputs.get("algorithm", "RSA") not in ("RSA", "ECDSA", "ED25519"):
            return [("algorithm", f"{inputs['algorithm']!r} is none of RSA, ECDSA, ED25519")]
        return []

    def create(self, name: str, inputs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        from toolchain.providers import certificates

        return certificates.private_key(inputs)


class _Certificate(ResourceType):
    """What both kinds of certificate have in common."""

    common = frozenset(
        {
            "allowedUses",
            "validityPeriodHours",
            "earlyRenewalHours",
            "isCaCertificate",
            "setSubjectKeyId",
            "maxPathLength",
        }
    )
    defaults = {"earlyRenewalHours": 0, "isCaCertificate": False, "setSubjectKeyId": False}

    def stale(self, state: Mapping[str, Any]) -> list[str]:
        if not state.get("validityEndTime"):
            return []
        end = datetime.datetime.fromisoformat(state["validityEndTime"])
        renew = end - datetime.timedelta(hours=state.get("earlyRenewalHours", 0))
        return ["readyForRenewal"] if datetime.datetime.now(datetime.UTC) >= renew else []

    def update(self, identifier: str, state: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in state.items() if key not in self.inputs}

    def kept(self, state: Mapping[str, Any], changed: frozenset[str]) -> frozenset[str]:
        return frozenset(state) - self.inputs


class SelfSignedCert(_Certificate):
    inputs = _Certificate.common | {"privateKeyPem", "subject", "dnsNames", "ipAddresses", "setAuthorityKeyId"}
    replace_on = inputs - {"earlyRenewalHours"}
    secret_outputs = frozenset({"privateKeyPem"})

    def create(self, name: str, inputs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        from toolchain.providers import certificates

        return certificates.self_signed(inputs)


class CertRequest(ResourceType):
    inputs = frozenset({"privateKeyPem", "subject", "dnsNames", "ipAddresses"})
    replace_on = inputs
    secret_outputs = frozenset({"privateKeyPem"})

    def create(self, name: str, inputs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        from toolchain.providers import certificates

        return certificates.request(inputs)


class LocallySignedCert(_Certificate):
    inputs = _Certificate.common | {"certRequestPem", "caCertPem", "caPrivateKeyPem"}
    replace_on = inputs - {"earlyRenewalHours"}
    secret_outputs = frozenset({"caPrivateKeyPem"})

    def create(self, name: str, inputs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        from toolchain.providers import certificates

        return certificates.locally_signed(inputs)


if __name__ == "__main__":
    serve(
        "tls",
        {
            "tls:index/privateKey:PrivateKey": PrivateKey(),
            "tls:index/selfSignedCert:SelfSignedCert": SelfSignedCert(),
            "tls:index/certRequest:CertRequest": CertRequest(),
            "tls:index/locallySignedCert:LocallySignedCert": LocallySignedCert(),
        },
    )
