"""The private registry: settings, components, outputs."""

import pulumi

import settings
from components.certificate import RegistryCertificate
from components.cluster import rbd_driver
from components.configuration import first_user, registry_users
from components.image import RegistryImage

config = pulumi.Config()
try:
    stack = settings.of_stack()
    driver = rbd_driver(stack.storage.rbd)
except ValueError as error:
    raise pulumi.RunError(str(error)) from None
push_credentials = config.get_secret_object("pushCredentials")
provided = config.get_secret_object("providedCertificate")
certificate = RegistryCertificate("certificate", stack.certificate, hostname=stack.hostname, provided=provided)
ssh_private_key = config.get_secret("sshPrivateKey")
image = RegistryImage("image", stack.image, credentials=push_credentials, ssh_private_key=ssh_private_key)
users = registry_users(config.get_secret_object("users"), certificate.private_key_pem)
# Importing a target's SDK takes longer than all else that the program does.
if stack.target == "docker":
    from components.container import RegistryContainer

    registry: pulumi.Resource = RegistryContainer("registry", stack, image=image.reference, users=users, **certificate.pair)
else:
    from components.workload import RegistryWorkload

    ceph_key = None
    if stack.storage.rbd is not None:
        from components.volume import RbdVolume

        ceph_key = RbdVolume("volume", stack.storage, ssh_private_key=ssh_private_key, ceph_key=config.get_secret("cephKey")).key
        pulumi.export("volume", f"{stack.storage.rbd.pool}/{stack.storage.rbd.image}")
    registry = RegistryWorkload(
        "registry",
        stack,
        image=image.reference,
        users=users,
        pull_credentials=push_credentials,
        ceph_key=ceph_key,
        driver=driver,
        **certificate.pair,
    )
    pulumi.export("workload", {"namespace": stack.kubernetes.namespace, "name": stack.kubernetes.name})
    if stack.trust.daemon_set is not None:
        from components.node_trust import NodeTrust

        with_pull_secret = push_credentials is not None
        NodeTrust("node-trust", stack, certificate.authority_pem, image=image.reference, with_pull_secret=with_pull_secret)
if stack.trust.docker or stack.trust.hosts_file or stack.trust.hosts:
    from components.trust import ClientTrust

    ClientTrust("trust", stack, certificate.authority_pem, registry=registry, ssh_private_key=ssh_private_key)

pulumi.export("address", stack.address)
pulumi.export("authorityCertificate", certificate.authority_pem)
if not stack.access.anonymous:
    user = first_user(users)
    pulumi.export("username", pulumi.Output.unsecret(user["username"]))
    pulumi.export("password", pulumi.Output.secret(user["password"]))
    pulumi.export("login", pulumi.Output.unsecret(user["username"]).apply(f"docker login {stack.address} --username {{}}".format))
