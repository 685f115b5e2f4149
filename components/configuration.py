"""What the registry reads when it starts: its configuration and its users.

Random values that must stay the same from one `pulumi up` to the next are derived from the server's private key, which the
state keeps: no further provider is needed, and nothing restarts without cause.
"""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

import pulumi

PASSWORD_BYTES = 18  # 144 bits, 24 characters
BCRYPT_COST = 10  # log2 of the rounds: 60 ms a check, which each push and pull pays
# bcrypt's own order of the 64 characters: https://github.com/openbsd/src/blob/master/lib/libc/crypt/bcrypt.c
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_BCRYPT_BASE64 = b"./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def _derived(private_key_pem: str, purpose: str, length: int) -> bytes:
    """Return bytes that only the holder of the private key can compute, others for each purpose (HKDF, RFC 5869)."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    hkdf = HKDF(algorithm=SHA256(), length=length, salt=None, info=f"private-registry {purpose}".encode())
    return hkdf.derive(private_key_pem.encode())


def registry_users(
    configured: pulumi.Output[dict[str, str]] | None, private_key_pem: pulumi.Output[str]
) -> pulumi.Output[dict[str, str]]:
    """Return passwords by user name: those of the stack, else one user, admin, with a password of its own."""
    if configured is not None:
        return configured
    return private_key_pem.apply(lambda pem: {"admin": admin_password(pem)})


def first_user(users: pulumi.Output[dict[str, str]]) -> pulumi.Output[dict[str, str]]:
    """Return a user that may push and pull, as username and password."""
    return users.apply(lambda everyone: {"username": min(everyone), "password": everyone[min(everyone)]})


def admin_password(private_key_pem: str) -> str:
    """Return the password of the user that there is where the stack names none."""
    return base64.urlsafe_b64encode(_derived(private_key_pem, "password of admin", PASSWORD_BYTES)).decode()


def htpasswd(users: Mapping[str, str], private_key_pem: str) -> str:
    """Return the users as an htpasswd file with bcrypt hashes, the only kind that Distribution takes."""
    import bcrypt

    lines = []
    for name, password in sorted(users.items()):
        digest = hashlib.sha256(password.encode()).hexdigest()
        salt = base64.b64encode(_derived(private_key_pem, f"salt of {name} {digest}", 16)).rstrip(b"=")
        setting = b"$2b$%d$%s" % (BCRYPT_COST, salt.translate(bytes.maketrans(_BASE64, _BCRYPT_BASE64)))
        lines.append(f"{name}:{bcrypt.hashpw(password.encode(), setting).decode()}\n")
    return "".join(lines)


def http_secret(private_key_pem: str) -> str:
    """Return the secret by which the registry signs the state of uploads; all replicas must have the same."""
    return _derived(private_key_pem, "http.secret", 32).hex()


def registry_configuration(*, anonymous: bool, secret: str | None = None, debug_address: str | None = None) -> str:
    """Return the image's config.yml with what only the running registry may know.

    Source: https://distribution.github.io/distribution/about/configuration/

    Args:
        anonymous: let everyone in.
        secret: the http.secret; left out where it comes by the environment.
        debug_address: address of health and metrics, where others than the container itself may read them.
    """
    import yaml

    configuration = yaml.safe_load((Path(__file__).parent.parent / "image/config.yml").read_text())
    if secret is not None:
        configuration["http"]["secret"] = secret
    if debug_address is not None:
        configuration["http"]["debug"]["addr"] = debug_address
    if not anonymous:
        configuration["auth"] = {"htpasswd": {"realm": "private-registry", "path": "/auth/htpasswd"}}
    return yaml.safe_dump(configuration, sort_keys=False)
