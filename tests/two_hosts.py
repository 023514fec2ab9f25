"""Two hosts on one machine, for launchers that go over ssh.

A host is a set of Linux namespaces: a network with one address on a cable to the other host, and processes,
mounts, a name and an sshd of its own. What is not mounted over is the same on both, as on a cluster's shared
file system. No namespace has a name and all end with a host's first process, so that two tests can have hosts
at one time and nothing is left of them, however a test ends.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ADDRESSES = {"first": "10.77.0.1", "second": "10.77.0.2"}
PROGRAMS = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
}
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
NAMESPACES = ["--net", "--mount", "--pid", "--uts", "--ipc"]

# The first process of a host. It ends with its standard input, and all processes of the host with it. Nothing
# that it mounts is seen outside: the machine's own ssh is left alone. The host's own name is 127.0.1.1 to
# itself, as Debian has it.
BOOT = r"""
set -e
name=$1 address=$2 etc=$3 apart=$4
read -r number rest </proc/self/stat  # outside of this namespace
mount -t proc proc /proc
hostname "$name"
mount -t tmpfs none /run && mkdir /run/sshd
mount --bind "$etc/ssh" /etc/ssh
{ echo "127.0.1.1 $name"; cat "$etc/names"; } >/run/hosts && mount --bind /run/hosts /etc/hosts
if [ -d ~/.ssh ]; then mount -t tmpfs none ~/.ssh; fi
if [ -n "$apart" ]; then mount -t tmpfs none "$apart"; fi
echo "$number"
read -r connected
ip address add "$address/24" dev eth0
ip link set eth0 up && ip link set lo up
"$(command -v sshd)"
echo up
exec cat
"""

SSHD = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/key.pub
PidFile none
"""

# Without ServerAliveInterval ssh, and pdsh with it, would wait for a host that is cut off.
SSH = """
IdentityFile /etc/ssh/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
ConnectionAttempts 10
ServerAliveInterval 3
"""

# DeepSpeed launches by pdsh unless told of an MPI or Slurm. Where pdsh is not installed this does what
# DeepSpeed asks of it: pdsh -S -f 1024 -w HOST,HOST COMMAND, where %n in the command is the host's number and
# -S says that the status is the largest of the hosts'. So tests run the command that users run.
PDSH = f"""#!{sys.executable}
import subprocess, sys
hosts, command = sys.argv[5].split(","), " ".join(sys.argv[6:])
running = [subprocess.Popen(["ssh", host, command.replace("%n", str(n))]) for n, host in enumerate(hosts)]
sys.exit(max(ssh.wait() for ssh in running))
"""


class Hosts:
    """file: the hostfile."""

    def __init__(self, directory: Path, first: int) -> None:
        self.file = directory / "hosts"
        self._bin, self._first = directory / "bin", first

    def on_first(self, line: list[str], cwd: Path) -> list[str]:
        """A command that runs `line` on the first host, in the directory cwd."""
        # At the end of the path, so that a pdsh that is installed is the one that is run.
        path = os.pathsep.join((PATH, str(self._bin)))
        return [*_enter(self._first), "env", f"--chdir={cwd}", f"PATH={path}", *line]


@contextmanager
def two_hosts(directory: Path, apart: Path | None = None) -> Iterator[Hosts]:
    """Two hosts, "first" and "second", with one slot each; a test is skipped where there can be none.

    Args:
        directory: an empty one, for the hosts' files.
        apart: a directory that is another, empty one on the second host.
    """
    _look_for_what_it_takes()
    _write_files(directory)
    with ExitStack() as stack:
        hosts = {
            name: stack.enter_context(_host(name, directory, apart if name == "second" else None))
            for name in ADDRESSES
        }
        first, second = (number for _, number in hosts.values())
        _run(
            "ip",
            "link",
            "add",
            "eth0",
            "netns",
            first,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            second,
        )
        for process, _ in hosts.values():
            print("connected", file=process.stdin, flush=True)
            _expect(process)
        yield Hosts(directory, int(first))


@contextmanager
def _host(name: str, directory: Path, apart: Path | None) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process that a host runs in, and the number of the host's first one."""
    boot = ["sh", "-c", BOOT, "sh", name, ADDRESSES[name], str(directory), str(apart or "")]
    process = subprocess.Popen(
        ["unshare", *NAMESPACES, "--fork", "--kill-child", *boot],
        env=os.environ | {"PATH": PATH},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process, _expect(process)
    finally:
        process.kill()
        process.communicate()


def _expect(process: subprocess.Popen) -> str:
    line = process.stdout.readline().strip()
    assert line, f"a host could not be set up: {shlex.join(process.args[-4:])}"
    return line


def _enter(number: int | str) -> list[str]:
    return ["nsenter", f"--target={number}", *NAMESPACES]


def _look_for_what_it_takes() -> None:
    for program, package in PROGRAMS.items():
        if not shutil.which(program, path=PATH):
            pytest.skip(f"needs {program}: Debian's {package}")
    if os.geteuid() != 0:
        pytest.skip("needs root: two network namespaces")
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"needs network namespaces: {tried.stderr.strip()}")


def _write_files(directory: Path) -> None:
    ssh, bin = directory / "ssh", directory / "bin"
    ssh.mkdir(parents=True), bin.mkdir()
    for key in ("key", "host_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / key))
    (ssh / "sshd_config").write_text(SSHD)
    (ssh / "ssh_config").write_text(SSH)
    (bin / "pdsh").write_text(PDSH)
    (bin / "pdsh").chmod(0o755)
    names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
    (directory / "names").write_text(f"127.0.0.1 localhost\n{names}")
    (directory / "hosts").write_text("".join(f"{name} slots=1\n" for name in ADDRESSES))


def _run(*line: str) -> None:
    subprocess.run(line, env=os.environ | {"PATH": PATH}, check=True)
