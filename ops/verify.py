"""`ops verify`: does the registry do what it is for? Each step as a client takes it, and what is wrong where one fails.

The client trusts nothing but the stack's authority, and needs no Docker daemon.
Source of the protocol: https://github.com/opencontainers/distribution-spec/blob/main/spec.md
"""

import datetime
import gzip
import hashlib
import io
import json
import os
import socket
import ssl
import subprocess
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from ops.stack import OpsError, Registry

TIMEOUT_SECONDS = 10
WARNING_DAYS = 30
AUTHORITY_WARNING_DAYS = 180  # all clients have to be told
NODE_PORT_SECONDS = 10
HOSTS_FILE_SECONDS = 6  # the daemon, a Go program, reads the hosts file again after five
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass(frozen=True)
class Result:
    """One step that went well."""

    step: str
    said: str
    seconds: float
    warning: bool = False


@dataclass(frozen=True)
class _Image:
    config: bytes
    layer: bytes
    manifest: bytes

    @property
    def digest(self) -> str:
        return _digest(self.manifest)


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _small_image() -> _Image:
    """Return an image of one small file that no registry has yet."""
    content = f"{uuid.uuid4()}\n".encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        info = tarfile.TarInfo("verify")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    layer = gzip.compress(archive.getvalue(), mtime=0)
    rootfs = {"type": "layers", "diff_ids": [_digest(archive.getvalue())]}
    config = json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}).encode()
    described = [
        {"mediaType": kind, "size": len(data), "digest": _digest(data)} for kind, data in ((CONFIG, config), (LAYER, layer))
    ]
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described[0], "layers": described[1:]}
    return _Image(config, layer, json.dumps(manifest).encode())


class Verification:
    """The steps against one registry, in the order in which a client takes them."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._context = ssl.create_default_context(cadata=registry.authority)
        self._repository = f"private-registry-verify/{uuid.uuid4().hex[:12]}"
        self._image = _small_image()
        credentials = None
        if registry.username is not None and registry.password is not None:
            credentials = (registry.username, registry.password)
        self._client = httpx.Client(
            base_url=f"https://{registry.address}",
            verify=self._context,
            auth=credentials,
            timeout=httpx.Timeout(TIMEOUT_SECONDS, read=60),
            trust_env=False,
        )

    @property
    def _logs(self) -> str:
        return "`kubectl logs`" if self._registry.workload else "`docker ps --all`, `docker logs`"

    def steps(self, *, docker: bool = False) -> Iterator[tuple[str, Callable[[], Result]]]:
        """Yield each step's name, and what takes it. One that fails raises OpsError."""
        all_steps: list[tuple[str, Callable[[], str]]] = [
            *([("volume", self._volume)] if self._registry.volume else []),
            *([("pod", self._pod)] if self._registry.workload else []),
            ("resolve", self._resolve),
            ("connect", self._connect),
            ("trust", self._trust),
            ("log in", self._log_in),
            ("push", self._push),
            ("pull", self._pull),
            ("delete", self._delete),
        ]
        if docker:
            all_steps.append(("docker", self._docker))
        for name, take in all_steps:
            yield name, lambda name=name, take=take: self._timed(name, take)  # type: ignore[misc]

    def _timed(self, name: str, take: Callable[[], str]) -> Result:
        start = time.monotonic()
        said = take()
        return Result(name, said, time.monotonic() - start, warning=said.startswith("warning"))

    def _volume(self) -> str:
        from ops.volume import check

        return check(self._registry)

    def _pod(self) -> str:
        from ops.workload import check

        assert self._registry.workload is not None
        return check(self._registry.workload["namespace"], self._registry.workload["name"])

    def _resolve(self) -> str:
        host = self._registry.host
        try:
            found = socket.getaddrinfo(host, self._registry.port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise OpsError(
                f"{host} does not resolve: {error.strerror}.",
                f"Add {host} to your DNS, with the address of any node."
                if self._registry.workload
                else f"Add {host} to your DNS, or set private-registry:trust.hostsFile to true and run `pulumi up`.",
            ) from None
        return f"{host} is {', '.join(sorted({str(entry[4][0]) for entry in found}))}"

    def _connect(self) -> str:
        host, port = self._registry.host, self._registry.port
        # The pod is ready, but each node's kube-proxy hears of it in its own time.
        deadline = time.monotonic() + (NODE_PORT_SECONDS if self._registry.workload else 0)
        while True:
            try:
                socket.create_connection((host, port), timeout=TIMEOUT_SECONDS).close()
            except ConnectionRefusedError:
                if time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                raise OpsError(
                    f"Nothing listens on {host}:{port}.",
                    f"See whether the registry runs and what it says ({self._logs}), then run `pulumi up`.",
                ) from None
            except OSError as error:
                raise OpsError(
                    f"{host}:{port} cannot be reached: {error}.", "See whether a firewall or a route is in the way."
                ) from None
            return f"{host}:{port} is open"

    def _trust(self) -> str:
        host, port = self._registry.host, self._registry.port
        try:
            with (
                socket.create_connection((host, port), timeout=TIMEOUT_SECONDS) as connection,
                self._context.wrap_socket(connection, server_hostname=host) as channel,
            ):
                der = channel.getpeercert(binary_form=True)
        except ssl.SSLCertVerificationError as error:
            raise _untrusted(host, error) from None
        except (ssl.SSLError, OSError) as error:
            raise OpsError(
                f"{host}:{port} does not speak TLS: {error}.", "Another program has the port, or a proxy is in between."
            ) from None
        assert der is not None
        now = datetime.datetime.now(datetime.UTC)
        certificate = x509.load_der_x509_certificate(der)
        last = certificate.not_valid_after_utc
        days = (last - now).days
        end = f"valid until {last:%Y-%m-%d}, {days} days"
        authority_days = (end_of_authority(certificate, self._registry.authority) - now).days
        if authority_days < AUTHORITY_WARNING_DAYS and authority_days > days:
            return f"warning: {end}; the authority itself ends in {authority_days} days, and every client will need a new one"
        if days < WARNING_DAYS:
            return f"warning: {end}; run `pulumi up` to renew it, from certificate.renewBeforeDays before its end"
        return f"signed by the stack's authority, {end}"

    def _request(self, method: str, url: str, **arguments: object) -> httpx.Response:
        try:
            return self._client.request(method, url, **arguments)  # type: ignore[arg-type]
        except httpx.HTTPError as error:
            raise OpsError(
                f"{method} {url} got no answer: {error}.", "See what the registry says: its pod's or its container's log."
            ) from None

    def _expect(self, response: httpx.Response, status: int, doing: str) -> httpx.Response:
        if response.status_code == status:
            return response
        raise _refused(response, doing)

    def _log_in(self) -> str:
        self._expect(self._request("GET", "/v2/"), 200, "logging in")
        return f"as {self._registry.username}" if self._registry.username else "not needed: access is anonymous"

    def _push(self) -> str:
        for blob in (self._image.config, self._image.layer):
            answer = self._request("POST", f"/v2/{self._repository}/blobs/uploads/")
            location = self._expect(answer, 202, "pushing").headers["Location"]
            answer = self._request("PUT", location, params=_with_digest(location, blob), content=blob)
            self._expect(answer, 201, "pushing")
        answer = self._request(
            "PUT",
            f"/v2/{self._repository}/manifests/latest",
            content=self._image.manifest,
            headers={"Content-Type": MANIFEST},
        )
        self._expect(answer, 201, "pushing")
        return f"{self._repository}:latest"

    def _pull(self) -> str:
        answer = self._request("GET", f"/v2/{self._repository}/manifests/latest", headers={"Accept": MANIFEST})
        manifest = self._expect(answer, 200, "pulling").content
        layer = self._request("GET", f"/v2/{self._repository}/blobs/{_digest(self._image.layer)}")
        self._expect(layer, 200, "pulling")
        if _digest(manifest) != self._image.digest or _digest(layer.content) != _digest(self._image.layer):
            raise OpsError(
                "What was pulled is not what was pushed: the digests differ.",
                "Look for a proxy that changes answers, and check the filesystem that holds the images.",
            )
        return self._image.digest

    def _delete(self) -> str:
        answer = self._request("DELETE", f"/v2/{self._repository}/manifests/{self._image.digest}")
        self._expect(answer, 202, "deleting")
        return "done"

    def _docker(self) -> str:
        """Do the same with the daemon: log in, tag, push, remove, pull."""
        reference = f"{self._registry.address}/{self._repository}:docker"
        with tempfile.TemporaryDirectory() as folder:  # the user's own logins stay as they are
            environment = {**os.environ, "DOCKER_CONFIG": folder}

            def docker(*arguments: str, stdin: bytes = b"") -> str:
                command = ["docker", *arguments]
                deadline = time.monotonic() + HOSTS_FILE_SECONDS
                while True:
                    is_last = time.monotonic() > deadline  # where one takes long, another begins when the file was read again
                    run = subprocess.run(command, input=stdin, env=environment, capture_output=True, check=False)
                    if b"no such host" not in run.stderr or is_last:
                        break
                    time.sleep(0.5)
                if run.returncode:
                    said = run.stderr.decode(errors="replace").strip().splitlines()[-1:]
                    raise _docker_failed(arguments[0], said[0] if said else "it said nothing", self._registry)
                return run.stdout.decode().strip()

            if self._registry.username is not None and self._registry.password is not None:
                user = ("--username", self._registry.username, "--password-stdin")
                docker("login", *user, self._registry.address, stdin=self._registry.password.encode())
            local = docker("import", "-", stdin=gzip.decompress(self._image.layer))
            try:
                docker("tag", local, reference)
                docker("push", "--quiet", reference)
                docker("rmi", "--force", reference, local)
                docker("pull", "--quiet", reference)
                pulled = docker("image", "inspect", "--format", "{{index .RepoDigests 0}}", reference)
            finally:
                subprocess.run(["docker", "rmi", "--force", reference, local], capture_output=True, check=False)
        self._request("DELETE", f"/v2/{self._repository}/manifests/{pulled.rpartition('@')[2]}")
        return "logged in, tagged, pushed, removed, pulled"


def _with_digest(location: str, blob: bytes) -> httpx.QueryParams:
    return httpx.URL(location).params.set("digest", _digest(blob))


def end_of_authority(certificate: x509.Certificate, trusted_pem: str) -> datetime.datetime:
    """Return the end of the authority that signed a certificate; of the last one where another is in between."""
    trusted = x509.load_pem_x509_certificates(trusted_pem.encode())

    def signed(authority: x509.Certificate) -> bool:
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    signers = [authority for authority in trusted if signed(authority)]
    return max(authority.not_valid_after_utc for authority in signers or trusted)


def _untrusted(host: str, error: ssl.SSLCertVerificationError) -> OpsError:
    """Explain by OpenSSL's code: https://docs.openssl.org/master/man3/X509_STORE_CTX_get_error/"""
    if error.verify_code == 10:
        return OpsError(f"The certificate of {host} has expired.", "Run `pulumi up`: it renews the certificate.")
    if error.verify_code in (62, 64):
        return OpsError(
            f"The certificate is not for {host}: {error.verify_message}.",
            "Add the name to private-registry:certificate.names or addresses, and run `pulumi up`.",
        )
    return OpsError(
        f"The certificate of {host} is not of this stack's authority: {error.verify_message}.",
        "Another registry answers there, or this stack was not brought up since its authority changed: run `pulumi up`.",
    )


def _refused(response: httpx.Response, doing: str) -> OpsError:
    """Explain an answer by its status and Distribution's error body."""
    what = f"The registry refused {doing}: {response.status_code} {response.reason_phrase}."
    if response.status_code == 401:
        return OpsError(
            f"{what} The user name or the password is wrong.",
            "If the stack's users were changed, run `pulumi up`; the registry then takes the new ones.",
        )
    if response.status_code == 405:
        return OpsError(f"{what} It is read-only.", "Take it out of maintenance mode, or wait for the garbage collection.")
    if "no space left on device" in response.text:
        return OpsError(f"{what} Its disk is full.", "Grow the disk, or delete images and collect garbage.")
    if "read-only file system" in response.text:
        return OpsError(f"{what} Its filesystem is read-only.", "Check the disk: a filesystem with errors is remounted so.")
    return OpsError(f"{what} {response.text[:200].strip()}", "See what the registry says: its pod's or its container's log.")


def _docker_failed(verb: str, said: str, registry: Registry) -> OpsError:
    what = f"`docker {verb}` failed: {said}."
    if "x509" in said or "certificate" in said:
        file = f"/etc/docker/certs.d/{registry.address}/ca.crt"
        return OpsError(what, f"The daemon does not trust the authority: write the stack's authorityCertificate to {file}.")
    if "no such host" in said:
        return OpsError(what, f"The daemon's host does not resolve {registry.host}: add it to its hosts file.")
    return OpsError(what, "See whether the Docker daemon answers: `docker info`.")
