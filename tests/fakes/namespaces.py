"""Commands that run in a namespace of their own (unshare(1)): with another host name, or with other mounts."""

import os
import shutil
import subprocess

UNKNOWN_HOST = "hostname no-such-host.invalid"
"""The machine's name resolves nowhere, as in a pod without a DNS entry."""


def namespace(*setup):
    """Return what to put before a command so that the shell commands `setup` come first, in a new UTS and mount
    namespace; None where the kernel allows no namespaces, as in most containers."""
    own_user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    script = " && ".join([*setup, 'exec "$@"'])
    prefix = ("unshare", *own_user, "--uts", "--mount", "sh", "-c", script, "sh")
    allowed = shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if allowed else None
