"""What a TPU host gets: the code, a script that runs the command, and a systemd unit around it.

A unit, not a command of an ssh session: a lost session would end the run, and SIGTERM of a host
that is stopped reaches units only. systemd sends it to the trainer itself (the script execs it),
waits for the save, and starts the unit again after a failure or a reboot; the run then resumes.
"""

from launch import bucket
from launch.request import Request
from launch.shell import Verbatim, exports, here_document, line, need_secrets

_END = "END_OF_FILE"
# Stands at the end of a setup: one that was cut short is no install.
_INSTALLED = "installed"
# What a secret's value may hold: systemd would read quotes, spaces and backslashes in it.
_PLAIN = "A-Za-z0-9._~+/=:@-"


def run_script(job: Request) -> str:
    """run.sh: the command, in the code's folder."""
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", 'cd "$(dirname "$0")/code"']
    lines += exports(job.variables())
    lines.append("# exec: SIGTERM must reach the trainer, not a shell that waits for it.")
    lines.append(line("exec", *job.words("../venv/bin/python")))
    return "\n".join(lines) + "\n"


def setup_script(job: Request) -> str:
    """setup.sh: installs the code and starts the unit; running it again is harmless."""
    lines = [
        "#!/usr/bin/env bash",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        f"rm -f {_INSTALLED}",
        "# What runs saves and ends before its code goes.",
        f"sudo systemctl stop {job.name} 2>/dev/null || true",
        "rm -rf code && mkdir code && tar -xzf code.tar.gz -C code",
        "if [ ! -x venv/bin/python ]; then",
        "  if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then",
        "    python3 -m venv venv",
        "  else  # images with an older Python",
        "    python3 -m pip install --quiet --user uv",
        "    python3 -m uv venv --quiet --seed --python 3.11 venv",
        "  fi",
        "fi",
        "venv/bin/python -m pip install --quiet -e './code[tpu]'",
    ]
    units = [f"{job.name}.service"]
    if job.bucket:
        lines += bucket.prepare()
        units.insert(0, bucket.UNIT)
    for one in units:
        lines += [
            f'sed -e "s|@HOME@|$PWD|g" -e "s|@USER@|$(id -un)|g" {one} |',
            f"  sudo tee /etc/systemd/system/{one} >/dev/null",
        ]
    lines.append("sudo systemctl daemon-reload")
    for one in units:
        lines += [
            f"sudo systemctl enable --quiet {one}",
            f"sudo systemctl reset-failed {one} 2>/dev/null || true",
            f"sudo systemctl restart {one}",
        ]
    lines.append(f"touch {_INSTALLED}")
    return "\n".join(lines) + "\n"


def unit(job: Request) -> str:
    """NAME.service; @HOME@ and @USER@ are filled in on the host."""
    secrets = "EnvironmentFile=@HOME@/secrets.env\n" if job.secrets else ""
    # Wants=, not Requires=: a start that fails for its sake would never be tried again.
    after = " ".join(["network-online.target", *([bucket.UNIT] if job.bucket else [])])
    wait = f"ExecStartPre={bucket.WAIT}\nTimeoutStartSec=300\n" if job.bucket else ""
    return f"""\
[Unit]
Description={job.module} of the launch {job.name}
Wants={after}
After={after}
StartLimitIntervalSec=infinity
StartLimitBurst={job.max_restarts + 1}

[Service]
User=@USER@
{wait}ExecStart=/bin/bash @HOME@/run.sh
{secrets}KillSignal=SIGTERM
KillMode=mixed
TimeoutStopSec={job.grace_seconds}
Restart=on-failure
RestartSec=20
LimitNOFILE=1048576

[Install]
WantedBy=multi-user.target
"""


def staging(job: Request) -> list[str]:
    """Shell that makes "$stage/NAME.tar.gz": scripts, units, the code, and the secrets."""
    lines = [
        *need_secrets(job.secrets),
        'stage=$(mktemp -d)',
        "trap 'rm -rf \"$stage\"' EXIT",
        f'mkdir "$stage/{job.name}"',
        line("git", "archive", "--format=tar.gz",
             Verbatim(f'--output="$stage/{job.name}/code.tar.gz"'), job.code.commit),
    ]  # fmt: skip
    files = [
        ("run.sh", run_script(job)),
        ("setup.sh", setup_script(job)),
        (f"{job.name}.service", unit(job)),
    ]
    if job.bucket:
        files.append((bucket.UNIT, bucket.unit(job)))
    for file, text in files:
        path = Verbatim(f'"$stage/{job.name}/{file}"')
        lines.append(here_document(path, text, end=_END))
    if job.secrets:
        lines.append("# Values go by a file that only you can read, never by a command line.")
        lines.append(f'(umask 077 && : > "$stage/{job.name}/secrets.env")')
    for name in job.secrets:
        lines += [
            f'case "${name}" in',
            f"  *[!{_PLAIN}]*)",
            f'    echo "{name} has a character that systemd would change" >&2',
            "    exit 1",
            "    ;;",
            "esac",
            f'printf \'{name}=%s\\n\' "${name}" >> "$stage/{job.name}/secrets.env"',
        ]
    lines.append(f'tar -czf "$stage/{job.name}.tar.gz" -C "$stage" {job.name}')
    return lines


def install_command(job: Request) -> str:
    """What a host does with the archive."""
    name = job.name
    return (
        f"umask 077 && tar -xzf {name}.tar.gz && rm {name}.tar.gz && bash {name}/setup.sh"
    )


def unit_state_command(name: str) -> str:
    """Prints missing (not set up to the end), active, activating, inactive (done) or failed."""
    return (
        f"if [ -e {name}/{_INSTALLED} ]; then "
        f"systemctl show {name} --property=ActiveState --value; else echo missing; fi"
    )


def logs_command(name: str) -> str:
    """Follows the log of a host."""
    return f"journalctl --unit={name} --output=cat --lines=200 --follow"
