"""The private registry: settings, components, outputs."""

import pulumi

import settings
from components.certificate import RegistryCertificate
from components.configuration import first_user, registry_users
from components.image import RegistryImage

config = pulumi.Config()
driver = ceph_key = None
# Each target's SDK is imported only where it is used: importing one takes longer than all else that the program does.
try:
    stack = settings.of_stack()
    if stack.storage.rbd is not None:
        from components.cluster import rbd_driver

        driver = rbd_driver(stack.storage.rbd)
except ValueError as error:
    raise pulumi.RunError(str(error)) from None

push_credentials = config.get_secret_object("pushCredentials")
provided = config.get_secret_object("providedCertificate")
certificate = RegistryCertificate("certificate", stack.certificate, hostname=stack.hostname, provided=provided)
ssh_private_key = config.get_secret("sshPrivateKey")
image = RegistryImage("image", stack.image, credentials=push_credentials, ssh_private_key=ssh_private_key)
users = registry_users(config.get_secret_object("users"), certificate.private_key_pem)
pair = {"certificate_pem": certificate.certificate_pem, "private_key_pem": certificate.private_key_pem}
if stack.target == "docker":
    from components.container import RegistryContainer

    RegistryContainer("registry", stack, image=image.reference, users=users, **pair)
else:
    from components.workload import RegistryWorkload

    if stack.storage.rbd is not None:
        from components.volume import RbdVolume

        given = config.get_secret("cephKey")
        ceph_key = RbdVolume("volume", stack.storage, ssh_private_key=ssh_private_key, ceph_key=given).key
        pulumi.export("volume", f"{stack.storage.rbd.pool}/{stack.storage.rbd.image}")
    inputs = {"pull_credentials": push_credentials, "ceph_key": ceph_key, "driver": driver}
    RegistryWorkload("registry", stack, image=image.reference, users=users, **pair, **inputs)
    pulumi.export("workload", {"namespace": stack.kubernetes.namespace, "name": stack.kubernetes.name})
if stack.trust.docker or stack.trust.hosts_file:
    from components.trust import ClientTrust

    ClientTrust("trust", stack, authority_pem=certificate.authority_pem)

pulumi.export("address", stack.address)
pulumi.export("authorityCertificate", certificate.authority_pem)
if not stack.access.anonymous:
    user = first_user(users)
    pulumi.export("username", pulumi.Output.unsecret(user["username"]))
    pulumi.export("password", pulumi.Output.secret(user["password"]))
    pulumi.export("login", pulumi.Output.unsecret(user["username"]).apply(f"docker login {stack.address} --username {{}}".format))
