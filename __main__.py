"""The private registry: settings, components, outputs."""

import pulumi

import settings
from components.certificate import RegistryCertificate
from components.container import RegistryContainer
from components.image import RegistryImage
from components.trust import ClientTrust

config = pulumi.Config()
try:
    stack = settings.of_stack()
except settings.SettingsError as error:
    raise pulumi.RunError(str(error)) from None

certificate = RegistryCertificate(
    "certificate",
    stack.certificate,
    hostname=stack.hostname,
    provided=config.get_secret_object("providedCertificate"),
)
image = RegistryImage("image", stack.image, credentials=config.get_secret_object("pushCredentials"))
registry = RegistryContainer(
    "registry",
    stack,
    image=image.reference,
    certificate_pem=certificate.certificate_pem,
    private_key_pem=certificate.private_key_pem,
    users=config.get_secret_object("users"),
)
if stack.trust.docker or stack.trust.hosts_file:
    ClientTrust("trust", stack, authority_pem=certificate.authority_pem)

pulumi.export("address", stack.address)
pulumi.export("authorityCertificate", certificate.authority_pem)
pulumi.export("username", registry.username)
pulumi.export("password", registry.password)
pulumi.export("login", pulumi.Output.format("docker login {0} --username {1}", stack.address, registry.username))
