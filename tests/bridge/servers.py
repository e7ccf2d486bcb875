"""Real engines for tests: redis-server and nats-server on loopback, in a temporary folder, each on a free port of its own.

Debian: ``apt-get install --no-install-recommends redis-server nats-server``. Clients: ``pip install -e '.[test,redis,nats]'``.
"""

import contextlib
import json
import random
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from tests.support.helpers import DEADLINE, wait_until


def free_port() -> int:
    """Return a port that is free, and that no outgoing connection is given: a restarted server has it again."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def certificate(folder: Path) -> None:
    """Write a self-signed certificate for 127.0.0.1: ``cert.pem``, which is its own authority, and ``key.pem``."""
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command.split(), *names], cwd=folder, check=True, capture_output=True)


class Server:
    """A server process, its port, and its data, which survive a :meth:`kill` and a :meth:`restart`."""

    scheme = ""

    def __init__(self, password: str | None, tls: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="engine-"))
        self.data = self.folder / "data"
        self.data.mkdir()
        self.password = password
        self.tls = tls
        if tls:
            certificate(self.folder)
        self.certificate = self.folder / "cert.pem"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        for _ in range(5):  # another test may take the port just now
            self.port = free_port()
            with contextlib.suppress(ChildProcessError):
                self.restart()
                return
        log = (self.folder / "log").read_text()
        self.close()
        raise RuntimeError(log)

    @property
    def url(self) -> str:
        """Return the URL for a bridge."""
        raise NotImplementedError

    def command(self) -> list[str]:
        raise NotImplementedError

    def answers(self) -> bool:
        """True once the server serves."""
        raise NotImplementedError

    def connection(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), DEADLINE)

    def restart(self, *, empty: bool = False) -> None:
        """Kill it if it runs, and start it on the same port with the data that it had, or with none."""
        self.kill()
        if empty:
            shutil.rmtree(self.data)
            self.data.mkdir()
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(self.command(), cwd=self.data, stdout=log, stderr=log, start_new_session=True)

        def serves() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise ChildProcessError(f"it has ended with {self.process.returncode}")
            with contextlib.suppress(OSError):
                return self.answers()
            return False

        wait_until(serves, DEADLINE)

    def kill(self) -> None:
        """End it by SIGKILL, also when it is stopped."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """Stop it: connections stay, and nothing answers. Return when each of its threads has stopped."""
        assert self.process is not None
        tasks = Path(f"/proc/{self.process.pid}/task")
        self.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.iterdir()))

    def cont(self) -> None:
        """Continue it after :meth:`stop`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.cont()

    def save(self) -> Path:
        """Kill it, copy its data, start it again, and return the copy, for :meth:`go_back`."""
        self.kill()
        copy = Path(tempfile.mkdtemp(prefix="copy-", dir=self.folder))
        shutil.copytree(self.data, copy, dirs_exist_ok=True)
        self.restart()
        return copy

    def go_back(self, copy: Path) -> None:
        """Kill it, and start it with the data that :meth:`save` has copied: it has lost what came since."""
        self.kill()
        shutil.rmtree(self.data)
        shutil.copytree(copy, self.data)
        self.restart()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class RedisServer(Server):
    """redis-server. ``persistence``: "always" and "everysec" are ``appendfsync``; "none" keeps nothing over a restart."""

    def __init__(
        self,
        *,
        persistence: str = "always",
        password: str | None = None,
        tls: bool = False,
        maxmemory: str = "",
        policy: str = "noeviction",
        replica_of: "RedisServer | None" = None,
    ) -> None:
        self.options = ["--maxmemory-policy", policy] + (["--maxmemory", maxmemory] if maxmemory else [])
        if persistence != "none":
            self.options += ["--appendonly", "yes", "--appendfsync", persistence]
        if password is not None:
            self.options += ["--requirepass", password]
        if replica_of is not None:
            self.options += ["--replicaof", "127.0.0.1", str(replica_of.port)]
        super().__init__(password, tls)

    @property
    def url(self) -> str:
        secret = f":{self.password}@" if self.password is not None else ""
        if self.tls:
            return f"rediss://{secret}127.0.0.1:{self.port}/0?ssl_ca_certs={self.certificate}"
        return f"redis://{secret}127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        ports = ["--port", str(self.port)]
        if self.tls:
            ports = ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            ports += ["--tls-cert-file", str(self.certificate), "--tls-key-file", str(self.folder / "key.pem")]
            ports += ["--tls-ca-cert-file", str(self.certificate)]
        fixed = [
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self.data),
            "--save",
            "",
            "--loglevel",
            "warning",
            "--repl-diskless-sync-delay",
            "0",
        ]
        return ["redis-server", *ports, *fixed, *self.options]

    def answers(self) -> bool:
        with contextlib.ExitStack() as stack:
            sock: socket.socket = stack.enter_context(self.connection())
            if self.tls:
                context = ssl.create_default_context(cafile=str(self.certificate))
                sock = stack.enter_context(context.wrap_socket(sock, server_hostname="localhost"))
            sock.sendall(b"PING\r\n")
            return sock.recv(64).startswith((b"+PONG", b"-NOAUTH"))  # not while it is loading

    def client(self) -> "redis.Redis":
        """Return a client, a context manager, to look at the data and to make days bad."""
        return redis.Redis.from_url(self.url)

    def take_over(self, failed: "RedisServer") -> None:
        """Become the master on the port of ``failed``, which is killed."""
        failed.kill()
        with self.client() as client:
            client.replicaof("NO", "ONE")
            client.config_set("port", failed.port)
        self.port = failed.port


class NatsServer(Server):
    """nats-server with JetStream, in which stored data outlive the process."""

    def __init__(
        self,
        *,
        password: str | None = None,
        token: str | None = None,
        tls: bool = False,
        max_payload: int | None = None,
        max_store: int | None = None,
        jetstream: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.token = token
        self.user = "bridge" if password is not None else None
        self.options = dict(options or {})
        if password is not None:
            self.options["authorization"] = {"user": self.user, "password": password}
        if token is not None:
            self.options["authorization"] = {"token": token}
        if max_payload is not None:
            self.options["max_payload"] = max_payload
        self.jetstream = {"max_file_store": max_store} if max_store is not None else {}
        self.has_jetstream = jetstream
        super().__init__(password, tls)

    @property
    def url(self) -> str:
        secret = f"{self.user}:{self.password}@" if self.password is not None else f"{self.token}@" if self.token else ""
        if self.tls:
            return f"tls://{secret}127.0.0.1:{self.port}?tls_ca={self.certificate}"
        return f"nats://{secret}127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        options = {**self.options, "listen": f"127.0.0.1:{self.port}"}
        if self.has_jetstream:
            options["jetstream"] = {"store_dir": str(self.data), **self.jetstream}
        if self.tls:
            options["tls"] = {"cert_file": str(self.certificate), "key_file": str(self.folder / "key.pem")}
        path = self.folder / "nats.conf"
        path.write_text(json.dumps(options, ensure_ascii=False))  # its format is a superset of JSON
        return ["nats-server", "-c", str(path)]

    def answers(self) -> bool:
        with self.connection() as sock:
            return sock.recv(64).startswith(b"INFO ")


@contextlib.contextmanager
def redis_server(**options: Any) -> Iterator[RedisServer]:
    """A running redis-server, ended at the end."""
    with contextlib.closing(RedisServer(**options)) as server:
        yield server


@contextlib.contextmanager
def nats_server(**options: Any) -> Iterator[NatsServer]:
    """A running nats-server with JetStream, ended at the end."""
    with contextlib.closing(NatsServer(**options)) as server:
        yield server


ENGINES = {"redis": redis_server, "nats": nats_server}
"""What makes a server of each engine that survives being killed."""
