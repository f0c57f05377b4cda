"""A PostgreSQL server of the tests' own: a temporary cluster of an unprivileged user, on a free port of loopback."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

USER, PASSWORD = "ffn2moe", "a secret"
QUOTED = "a%20secret"  # in an address


@dataclass(frozen=True)
class Postgres:
    """A server that answers; `address` names one of its databases, made at once."""

    port: int
    programs: Path

    def address(self, database: str, scheme: str = "postgresql") -> str:
        self.sql(f'CREATE DATABASE "{database}"', "postgres")
        return f"{scheme}://{USER}:{QUOTED}@127.0.0.1:{self.port}/{database}"

    def sql(self, command: str, database: str) -> str:
        """What psql answers."""
        where = ("-h", "127.0.0.1", "-p", str(self.port), "-U", USER, "-d", database)
        done = subprocess.run(
            [self.programs / "psql", "-qAt", *where, "-c", command],
            env={**os.environ, "PGPASSWORD": PASSWORD},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A server that is stopped at the end; the test is skipped, with the remedy, where PostgreSQL is not installed."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed; Debian, Ubuntu: apt install postgresql")
    user = _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="ffn2moe-postgres-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [programs / program, *arguments],
            user=user,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=(folder / "log").open("ab"),  # not a pipe: the server would hold it open
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, (folder / "log").read_text()

    try:
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        (folder / "log").touch()
        if user is not None:
            os.chown(folder, user, -1)
        data = str(folder / "data")
        run("initdb", "-D", data, "-U", USER, "-A", "scram-sha-256", f"--pwfile={folder / 'password'}", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "start", "-w", "-D", data, "-o", options)
        try:
            yield Postgres(port, programs)
        finally:
            run("pg_ctl", "stop", "-w", "-m", "immediate", "-D", data)
    finally:
        shutil.rmtree(folder)


def _programs() -> Path | None:
    """The folder of initdb and pg_ctl; Debian does not put it on PATH."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
    return folders[-1] if folders else None


def _unprivileged() -> int | None:
    """Whom the server runs as: nobody in particular if this is root, which PostgreSQL refuses; else None, ourselves."""
    return pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
