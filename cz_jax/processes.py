"""Several processes that make one run: how they meet, how each notices that another is gone.

Process 0 listens at the coordinator's address. Every other process keeps a connection to it on which both sides say
every few seconds that they are alive; a process that is killed breaks it at once, a host that is cut off falls silent.
The connections of jax.distributed go through the same address: its client aborts the process with a stack trace as soon
as the connection to its service breaks, and takes no callback in Python (jaxlib 0.10). Here it does not see it break.
So nothing may hold Python's global lock while it waits for that service; JAX's own preemption service does, and is off.

Nothing is authenticated or encrypted, as with jax.distributed itself: the address belongs into a private network.
"""

import asyncio
import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

from cz_jax.errors import ConfigError, Preempted, UserError

LOST = 75  # exit status where another process of the run is gone: EX_TEMPFAIL, start all of them again
JOIN_SECONDS = 300  # what the processes have to meet
ALIVE_SECONDS = 2.0
SILENT_SECONDS = 40.0  # after which a process that says nothing is gone
PATIENCE_SECONDS = 10.0  # what the others have to end by themselves once one has said that it ends with an error
HOLD_SECONDS = 2.0  # in which an error turns out to be another process's end
HEARTBEAT_SECONDS = 100  # of jax.distributed, which comes in only where this file fails
PORT = 8476  # of process 0 on a TPU slice, as JAX has it
HELLO = re.compile(rb"cz-jax/1 (alive|jax) (\d{1,6}) (\d{1,6})\n")

Ended = Callable[[str, int], None]


def place(coordinator: str | None, processes: int | None, process: int | None) -> tuple[str, int, int] | None:
    """(address of process 0, how many processes, which one this is), as told or as a TPU slice of several hosts says in
    its environment; None for a run of one process. ConfigError for a part of the three."""
    told = (coordinator, processes, process)
    if None not in told:
        if not 0 <= process < processes:
            raise ConfigError(f"--process {process} of --processes {processes}", "they count from 0", "--process 0")
        return told
    if told != (None, None, None):
        raise ConfigError(
            "--coordinator, --processes and --process go together",
            "",
            "--coordinator 10.0.0.1:8476 --processes 2 --process 0",
        )
    hosts, number = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","), os.environ.get("TPU_WORKER_ID", "")
    if len(hosts) < 2:
        return None
    if os.environ.get("MEGASCALE_NUM_SLICES", "1") != "1":
        raise ConfigError(
            f"MEGASCALE_NUM_SLICES={os.environ['MEGASCALE_NUM_SLICES']}: several slices do not find each other here",
            "TPU_WORKER_HOSTNAMES names the hosts of one",
            f"--coordinator {hosts[0]}:{PORT} with --processes and --process counted over all slices",
        )
    if not number.isdecimal() or int(number) >= len(hosts):
        raise ConfigError(
            f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts and TPU_WORKER_ID is {number!r}",
            "a slice of several hosts numbers them from 0",
            f"TPU_WORKER_ID=0, or --coordinator {hosts[0]}:{PORT} --processes {len(hosts)} --process 0",
        )
    return f"{hosts[0]}:{PORT}", len(hosts), int(number)


@contextlib.contextmanager
def joined(coordinator: str | None, processes: int | None, process: int | None, ended: Ended) -> Iterator[None]:
    """Makes this process one of several of a run while the block lasts; to be entered before any device is asked for.
    For a run of one process (see `place`) it does nothing.

    `ended(text, status)` is called in another thread, and must end this process at once, where another one is gone
    (status LOST) or has ended with an error (its status). An error of the block itself is told to the others.
    ConfigError where the processes do not meet.
    """
    where = place(coordinator, processes, process)
    if where is None:
        yield
        return
    watch = Watch(*where, ended)
    try:
        _initialize(watch, *where)
        yield
        import jax

        jax.distributed.shutdown()
    except BaseException as e:
        if not isinstance(e, KeyboardInterrupt):
            time.sleep(HOLD_SECONDS)  # a collective fails a moment before it is known whose end that was
        watch.leave(_status(e))
        raise
    watch.leave(0)


def _initialize(watch: "Watch", address: str, processes: int, process: int) -> None:
    import jax

    near = watch.meet()
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            near, processes, process, coordinator_bind_address=near, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as e:
        raise ConfigError(f"the processes of this run do not meet at {address}: {e}") from None


def _status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 143 if isinstance(error, Preempted) else 130
    return 2 if isinstance(error, UserError) else 1


class Watch:
    """This process's connections to the others, in a thread of their own. `address`: where process 0 listens."""

    def __init__(self, address: str, processes: int, process: int, ended: Ended):
        host, _, port = address.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError(f"--coordinator {address} is not HOST:PORT", "", "--coordinator 10.0.0.1:8476")
        self._address, self._host, self._port = address, host.strip("[]"), int(port)
        self._processes, self._process, self._call = processes, process, ended
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task] = set()
        self._left = False
        self._loop = asyncio.new_event_loop()
        self._all_here, self._service_port = asyncio.Event(), 0
        threading.Thread(target=self._loop.run_forever, name="processes", daemon=True).start()

    def meet(self, seconds: float = JOIN_SECONDS) -> str:
        """Returns once all processes are here: the address at which this one reaches jax.distributed's service, and
        at which process 0 is to start it. ConfigError, with the numbers of those who did not come."""
        return asyncio.run_coroutine_threadsafe(self._meet(seconds), self._loop).result()

    def leave(self, status: int) -> None:
        """Tells the others that this process ends by itself, so that its silence is no loss."""
        self._left = True
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._leave(status), self._loop).result(3)

    async def _meet(self, seconds: float) -> str:
        near = "127.0.0.1"
        if self._process == 0:
            self._service_port = _free_port()
            everywhere = None if self._host not in ("localhost", "::1") and not self._host.startswith("127.") else near
            try:
                await asyncio.start_server(self._answer, everywhere, self._port)
            except OSError as e:
                raise ConfigError(
                    f"process 0 cannot listen at {self._address}: {e.strerror or e}",
                    "another run, or what is left of one, has the port",
                    "--coordinator with another port, for every process",
                ) from None
            port = self._service_port
            self._seen()
        else:
            await self._reach_process_0(seconds)
            server = await asyncio.start_server(self._forward, near, 0)
            port = server.sockets[0].getsockname()[1]
        try:
            await asyncio.wait_for(self._all_here.wait(), seconds)
        except TimeoutError:
            missing = ", ".join(str(i) for i in range(1, self._processes) if i not in self._writers)
            told = f"process {missing} did not come" if self._process == 0 else "process 0 still waits for others"
            raise ConfigError(
                f"{told} within {seconds:.0f} s", f"all {self._processes} are started with the same --coordinator"
            ) from None
        return f"{near}:{port}"

    async def _reach_process_0(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while True:
            try:
                reader, writer = await self._say_hello("alive")
                answer = (await asyncio.wait_for(reader.readline(), SILENT_SECONDS)).decode("ascii", "replace").strip()
                if answer:
                    break
            except (OSError, TimeoutError):
                pass
            if time.monotonic() > until:
                raise ConfigError(
                    f"nobody answers at {self._address}, {seconds:.0f} s long",
                    "process 0 is not started, or a firewall is between",
                    f"--coordinator with an address of process 0, and --processes {self._processes} for every process",
                )
            await asyncio.sleep(0.5)
        if answer != "ok":
            raise ConfigError(f"process 0 at {self._address} refuses this process: {answer}")
        self._keep(0, reader, writer)

    async def _say_hello(self, kind: str):
        reader, writer = await asyncio.wait_for(asyncio.open_connection(self._host, self._port), 10)
        writer.write(f"cz-jax/1 {kind} {self._process} {self._processes}\n".encode())
        return reader, writer

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Process 0: a connection of another process, or of somebody who is none."""
        try:
            hello = HELLO.fullmatch(await asyncio.wait_for(reader.readline(), 10))
        except (OSError, ValueError, TimeoutError):
            hello = None
        if hello is None:
            writer.close()
        elif hello[1] == b"jax":
            await self._pass_on(reader, writer)
        else:
            process, refused = int(hello[2]), self._refusal(int(hello[2]), int(hello[3]))
            writer.write(f"{refused or 'ok'}\n".encode())
            if refused:
                writer.close()
            else:
                self._keep(process, reader, writer)
                self._seen()

    def _refusal(self, process: int, processes: int) -> str:
        if processes != self._processes:
            return f"it has --processes {self._processes}, this one {processes}"
        if process in self._writers:
            return f"it has another process {process} already"
        return "" if 0 < process < processes else f"there is no process {process}"

    def _seen(self) -> None:
        if len(self._writers) == self._processes - 1:
            self._all_here.set()
            for writer in self._writers.values():
                writer.write(b"begin\n")

    def _keep(self, process: int, reader, writer) -> None:
        self._writers[process] = writer
        for work in (self._listen(process, reader, writer), self._stay_alive(writer)):
            task = self._loop.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _stay_alive(self, writer) -> None:
        while not writer.is_closing():
            writer.write(b"alive\n")
            await asyncio.sleep(ALIVE_SECONDS)

    async def _listen(self, other: int, reader, writer) -> None:
        """Until process `other` says that it ends, or is gone, or tells of one that is."""
        why = ""
        while not why:
            try:
                line = await asyncio.wait_for(reader.readline(), SILENT_SECONDS)
            except TimeoutError:
                why = f"nothing was heard of it for {SILENT_SECONDS:.0f} s"
                break
            except (OSError, ValueError):
                line = b""
            word, _, rest = line.decode("ascii", "replace").strip().partition(" ")
            if not line:
                why = "it was killed, or its host went away"
            elif word == "begin":
                self._all_here.set()
            elif word == "end":
                writer.close()
                return await self._told_end(other, rest)
            elif word == "lost":
                number, _, why = rest.partition(" ")
                other = int(number) if number.isdecimal() else other
        if not self._left:
            self._send(f"lost {other} {why}")
            await asyncio.sleep(0.3)  # so that the others hear whom, before they see this process go
            self._call(f"process {other} of {self._processes} is gone: {why}; all of them end", LOST)

    async def _told_end(self, other: int, status: str) -> None:
        if status.isdecimal() and int(status):
            await asyncio.sleep(PATIENCE_SECONDS)
            if not self._left:
                self._call(f"process {other} ended with status {status}; its own output says why", int(status))

    def _send(self, line: str) -> None:
        for writer in self._writers.values():
            if not writer.is_closing():
                writer.write(f"{line}\n".encode())

    async def _leave(self, status: int) -> None:
        self._send(f"end {status}")
        listening = [t for t in self._tasks if t.get_coro().__name__ == "_listen"]
        if listening:
            await asyncio.wait(listening, timeout=2)

    async def _pass_on(self, reader, writer) -> None:
        """Process 0: what a process's jax.distributed client says, to the service, and back."""
        for _ in range(600):
            try:
                service = await asyncio.open_connection("127.0.0.1", self._service_port)
                break
            except OSError:  # it starts when all are here
                await asyncio.sleep(0.1)
        else:
            return writer.close()
        await _both_ways((reader, writer), service)

    async def _forward(self, reader, writer) -> None:
        """The others: the same, from the own client to process 0."""
        try:
            far = await self._say_hello("jax")
            await _both_ways((reader, writer), far, on_loss=SILENT_SECONDS)
        except (OSError, TimeoutError):
            writer.close()


async def _both_ways(near, far, on_loss: float = 0.0) -> None:
    """Copies bytes both ways until one side ends, then closes the other: `near` only `on_loss` seconds after `far`."""
    upwards = asyncio.ensure_future(_copy(near[0], far[1]))
    downwards = asyncio.ensure_future(_copy(far[0], near[1]))
    done, rest = await asyncio.wait((upwards, downwards), return_when=asyncio.FIRST_COMPLETED)
    far[1].close()
    if upwards not in done:
        await asyncio.wait((upwards,), timeout=on_loss)
    near[1].close()
    for task in rest:
        task.cancel()


async def _copy(reader, writer) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
