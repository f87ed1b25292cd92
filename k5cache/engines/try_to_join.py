"""Can a Ray cluster be joined? A program of its own, because Ray ends a process that waits for a cluster in vain.

Its arguments are ``auto`` or HOST:PORT, and how many seconds a port may take to answer. It prints what ``auto`` stands
for, and at its end the mode of authentication and the address of the cluster.
"""

from __future__ import annotations

import os
import socket
import sys


def main(given: str, seconds: float) -> None:
    """Raises what Ray raises if it cannot be joined."""
    import ray
    from ray._private.services import canonicalize_bootstrap_address

    address = canonicalize_bootstrap_address(given)
    if given == "auto":
        print(address, flush=True)
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()
    try:
        ray._raylet.GcsClient(address=address)
    except getattr(ray.exceptions, "AuthenticationError", ()):  # not in all versions
        # As in Ray, a token goes by itself to a cluster of this machine only, to an address if its owner says so.
        if given != "auto" or "RAY_AUTH_MODE" in os.environ:
            raise
        os.environ["RAY_AUTH_MODE"] = "token"  # it is read when ray is imported
        os.execv(sys.executable, sys.orig_argv)
    joined = ray.init(address=given if given != "auto" else address, log_to_driver=False, configure_logging=False)
    print(os.environ.get("RAY_AUTH_MODE", "disabled"), joined.address_info["gcs_address"])


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
