"""The mount of a Cloud Storage bucket on a host: a systemd unit of its own.

A gcsfuse that the command's unit started would be in that unit's control group: it would die with
it, and leave a dead mount ("Transport endpoint is not connected") on which every restart fails. In
its own unit it outlives the command's restarts, is mounted anew when it dies, and ends after the
command on a shutdown, whose save goes through it. A host has one, as it has one mount point.
"""

from launch.request import BUCKET_MOUNT, Request
from launch.shell import line

UNIT = "launch-bucket.service"
# Not `mountpoint` alone, which may take a mount whose gcsfuse has died for a good one.
_MOUNTED = f"mountpoint -q {BUCKET_MOUNT} && stat -t {BUCKET_MOUNT}/. >/dev/null"
# As ExecStartPre=: a bucket that does not come within TimeoutStartSec is a failed start.
WAIT = f"/bin/bash -c 'until {_MOUNTED}; do sleep 1; done'"
_UNMOUNT = f"umount --lazy {BUCKET_MOUNT}"  # also takes away what a killed gcsfuse has left


def unit(job: Request) -> str:
    """launch-bucket.service; @USER@ is filled in on the host."""
    return f"""\
[Unit]
Description=the bucket {job.bucket} at {BUCKET_MOUNT}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
User=@USER@
ExecStartPre=-+/usr/bin/{_UNMOUNT}
ExecStart=/usr/bin/env {line("gcsfuse", "--foreground", "--implicit-dirs", job.bucket, BUCKET_MOUNT)}
ExecStartPost={WAIT}
ExecStopPost=-+/usr/bin/{_UNMOUNT}
Restart=always
RestartSec=5
TimeoutStartSec=60

[Install]
WantedBy=multi-user.target
"""  # noqa: E501


def prepare() -> list[str]:
    """Shell for setup.sh: gcsfuse is there, and the mount point is a folder of this user."""
    return [
        "if ! command -v gcsfuse >/dev/null; then",
        '  echo "gcsfuse is missing on this image: install it (docs/launching.md)" >&2',
        "  exit 1",
        "fi",
        "# Nobody but its user can touch a mounted bucket, and nobody at all a dead one.",
        f"sudo systemctl stop {UNIT} 2>/dev/null || true",
        f"sudo {_UNMOUNT} 2>/dev/null || true",
        f"sudo mkdir -p {BUCKET_MOUNT}",
        f'sudo chown "$(id -u):$(id -g)" {BUCKET_MOUNT}',
    ]
