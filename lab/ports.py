"""Ports for servers that are about to start."""

import errno
import random
import socket

from lab.debian import LabError

# Below those that Kubernetes gives to services (from 30000) and the kernel to connections (from 32768): one of these might be
# taken by another between its choice and its use.
PORTS = range(10000, 30000)


def free_port(address: str = "127.0.0.1") -> int:
    """Return a port of an address of this machine where nobody listens.

    Raises:
        LabError: it is no address of this machine's, or none of its ports is free.
    """
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as listener:
            try:
                listener.bind((address, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise LabError(f"{address} is no address of this machine's: give a port, too") from error
            else:
                return port
    raise LabError(f"{address} has no free port from {PORTS.start} to {PORTS.stop - 1}")
