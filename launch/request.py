"""What is launched, checked once; every target builds its text from this."""

import dataclasses
import re
import sys
from collections.abc import Mapping

from core_jax.code_version import COMMIT_VARIABLE, SOURCES_VARIABLE, CodeVersion
from launch.machines import Slice

# A valid name of a Compute Engine resource, a Kubernetes object and a systemd unit alike; short,
# because JobSet appends to it and pods' host names end at 63 characters.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE|_KEY$|^KEY$)", re.I)
_SECRET_VALUES = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[0-9A-Z]{16})\b"
)
_OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", COMMIT_VARIABLE,
         SOURCES_VARIABLE)  # fmt: skip

BUCKET_MOUNT = "/bucket"  # where a target mounts --bucket, on every host


class LaunchError(ValueError):
    """A launch is not what it must be; the message says what to change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One command on every host of some slices.

    Attributes:
      name: of the resources that the launch makes.
      module: what `python -m` runs.
      config: experiment file, with its variant.
      workdir: where the run lives, the same path on every host; empty for commands without one.
      arguments: further flags of the command.
      topology: of one slice.
      slices: how many; with GPUs, nodes.
      env: variables of the command.
      secrets: names of variables whose values are taken from the launching environment.
      code: the code that is sent.
      spot: machines that may be taken away.
      bucket: Cloud Storage bucket that is mounted at `BUCKET_MOUNT`.
      save_seconds: how long a save takes at most.
      grace_seconds: between SIGTERM and SIGKILL.
      max_restarts: after failures; each resumes where the last save was.
    """

    name: str
    module: str
    config: str
    topology: Slice
    code: CodeVersion
    workdir: str = ""
    arguments: tuple[str, ...] = ()
    slices: int = 1
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    spot: bool = False
    bucket: str = ""
    save_seconds: int = 60
    grace_seconds: int = 300
    max_restarts: int = 10

    def __post_init__(self):
        check_name(self.name)
        if not _MODULE.fullmatch(self.module):
            raise LaunchError(
                f"after -- comes the module to run, such as vlv_jax.train, not {self.module!r}"
            )
        self._check_text()
        self._check_variables()
        if self.bucket and not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", self.bucket):
            raise LaunchError(f"--bucket {self.bucket!r} is not a bucket's name (without gs://)")
        if self.slices < 1 or self.max_restarts < 0 or self.save_seconds < 1:
            raise LaunchError("--slices and --save_seconds are at least 1, --max_restarts 0")
        if self.grace_seconds <= self.save_seconds:
            raise LaunchError(
                f"--grace_seconds {self.grace_seconds} must be more than --save_seconds "
                f"{self.save_seconds}, or a save that SIGTERM asks for is cut short"
            )

    def _check_text(self) -> None:
        if not re.fullmatch(r"[\w.+-]*", self.code.commit):  # it stands in comments
            raise LaunchError(f"{self.code.commit!r} is not a commit")
        for text in (self.config, self.workdir, *self.arguments, *self.env.values()):
            if any(ord(c) < 32 or ord(c) == 127 for c in text):
                raise LaunchError(f"{text!r} has a line break or another control character")
            if _SECRET_VALUES.search(text):
                raise LaunchError(
                    "an argument looks like an access token; set it in the environment and name "
                    "the variable by --secret"
                )
        if "://" in self.workdir:
            raise LaunchError(
                f"--workdir {self.workdir} is an address, and a folder is needed: give --bucket "
                f"NAME and a --workdir below {BUCKET_MOUNT}"
            )

    def _check_variables(self) -> None:
        for name in (*self.env, *self.secrets):
            if not _VARIABLE.fullmatch(name):
                raise LaunchError(f"{name!r} is not a variable's name")
            if name in _OURS:
                raise LaunchError(f"{name} is set by the launch itself")
        for name in self.env:
            if _SECRET_NAMES.search(name):
                raise LaunchError(
                    f"--env {name}=... would show a secret in commands and manifests; set it in "
                    f"the environment and give --secret {name}"
                )

    @property
    def hosts(self) -> int:
        """Hosts of all slices."""
        return self.topology.hosts * self.slices

    def words(self, python: str = "python") -> tuple[str, ...]:
        """The command, word by word."""
        workdir = (f"--workdir={self.workdir}",) if self.workdir else ()
        return (
            python, "-m", self.module, f"--config={self.config}", *workdir, *self.arguments,
        )  # fmt: skip

    def variables(self) -> dict[str, str]:
        """The command's variables on every host, without the secrets."""
        return {
            "PYTHONUNBUFFERED": "1",
            COMMIT_VARIABLE: self.code.commit,
            SOURCES_VARIABLE: self.code.sources,
            **self.env,
        }


def check_name(name: str) -> None:
    """Raises LaunchError unless every service takes the name."""
    if not _NAME.fullmatch(name):
        raise LaunchError(
            f"--name {name!r} must be lower-case letters, digits and dashes, at most 40, starting "
            "with a letter"
        )


def check_place(job: Request) -> None:
    """Raises LaunchError where the working directory would go with the code or the container."""
    if job.workdir and not job.workdir.startswith("/"):
        raise LaunchError(
            f"--workdir {job.workdir} is relative: it would lie in the folder of the code, which "
            f"every start makes anew. Give one below {BUCKET_MOUNT} with --bucket, or on a file "
            "system that all hosts mount"
        )


def check_remote(job: Request) -> None:
    """Raises LaunchError where what would be sent is not a commit."""
    if not job.code.commit or "+changes" in job.code.commit:
        raise LaunchError(
            f"the code is {job.code}: a launch sends a commit, and there are changes that are "
            "not committed (or no git checkout). Commit them first"
        )


def this_python() -> str:
    """The interpreter of the launcher, which local runs use too."""
    return sys.executable or "python"
