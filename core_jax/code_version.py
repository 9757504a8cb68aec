"""Which code this is: the commit where git knows it, and a hash of the source files always."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import subprocess
from collections.abc import Mapping

DISTRIBUTION = "vlv-massv-jax"
PACKAGES = ("core_jax", "vlv_jax", "massv_jax", "miniature")
# What a launch says about the code that it sent.
COMMIT_VARIABLE = "LAUNCH_COMMIT"
SOURCES_VARIABLE = "LAUNCH_SOURCES"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeVersion:
    """The code of a process.

    Attributes:
      release: version of the distribution, "unknown" where it is not installed.
      commit: of the checkout, with "+changes" after it where packages or configs differ from
        that commit; else the one that the launch named; empty where neither is known.
      sources: of the packages' Python files, names and contents; it needs no git.
    """

    release: str
    commit: str
    sources: str

    def __str__(self) -> str:
        return f"{self.commit or self.release} (sources {self.sources})"


@functools.cache
def code_version() -> CodeVersion:
    """The code that runs, read once a process."""
    return read_code_version(pathlib.Path(__file__).parents[1], os.environ)


def read_code_version(root: pathlib.Path, env: Mapping[str, str]) -> CodeVersion:
    """The code below a folder.

    Args:
      root: what holds the packages: a checkout, or a folder of installed packages.
      env: where a launch may name the commit that it sent.
    """
    try:
        release = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        release = "unknown"
    commit = _git_commit(root) or env.get(COMMIT_VARIABLE, "")
    return CodeVersion(release=release, commit=commit, sources=sources_hash(root))


def sources_hash(root: pathlib.Path) -> str:
    """Sixteen hexadecimal digits over the Python files of our packages."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def difference_from_launch(found: CodeVersion, env: Mapping[str, str]) -> str:
    """What is wrong where a launch named other source files than these; else empty."""
    wanted = env.get(SOURCES_VARIABLE, "")
    if not wanted or wanted == found.sources:
        return ""
    commit = env.get(COMMIT_VARIABLE, "") or "unknown"
    return (
        f"this is not the code that was launched: its source files have the hash {found.sources}, "
        f"those of the launch (commit {commit}) {wanted}. Install that commit here, or build the "
        "image from it, and launch again"
    )


def _git_commit(root: pathlib.Path) -> str:
    # Only a checkout of our own: installed packages may lie inside another project's.
    if not (root / ".git").exists():
        return ""
    commit = _git(root, "rev-parse", "HEAD")
    if not commit:
        return ""
    changed = _git(root, "status", "--porcelain", "--", *PACKAGES, "configs")
    return commit[:12] + ("+changes" if changed else "")


def _git(root: pathlib.Path, *words: str) -> str:
    """The output of a git command, empty where it fails or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
