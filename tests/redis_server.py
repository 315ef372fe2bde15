"""A Redis or Valkey server of the tests' own."""

import itertools
import socket
import subprocess
import time

import redis

from cz_jax.swarm.redis_store import RedisStore, read_address

SAFE = ("--appendonly", "yes", "--appendfsync", "always")


class RedisServer:
    """Runs `program` in `folder` on a free port while it is entered; `kill` and `start` again keep port and data."""

    def __init__(self, program, folder, options=SAFE, password=None):
        self._program, self._folder, self._options, self._password = program, folder, options, password
        self._port, self._databases = 0, itertools.count()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc):
        self.kill()

    def url(self, database=0):
        secret = f":{self._password}@" if self._password else ""
        return f"redis://{secret}127.0.0.1:{self._port}/{database}"

    def empty_store(self):
        """A store in a database that is empty."""
        url = self.url(next(self._databases) % 16)
        with redis.Redis.from_url(url) as client:
            client.flushdb()
        return RedisStore(read_address(url))

    def client(self, database=0):
        return redis.Redis.from_url(self.url(database))

    def start(self):
        """A port may be taken between asking for it and using it: another is tried."""
        for _ in range(1 if self._port else 5):
            port = self._port or free_port()
            secret = ("--requirepass", self._password) if self._password else ()
            self.process = subprocess.Popen(
                [self._program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", "",
                 *secret, *self._options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            end = time.monotonic() + 20
            while self.process.poll() is None and time.monotonic() < end:
                try:
                    with redis.Redis(port=port, password=self._password, socket_timeout=5) as client:
                        client.ping()
                    self._port = port
                    return
                except redis.RedisError:
                    time.sleep(0.02)
            self.process.kill()
            self.process.wait()
        raise RuntimeError("the server did not start")

    def restart_with(self, *options):
        self._options = options
        self.start()

    def kill(self):
        self.process.kill()
        self.process.wait(20)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
