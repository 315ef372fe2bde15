"""Errors that end a command, and the one line each of them prints.

A `UserError` is somebody's input, told in one line: what is wrong, the usual cause, the corrected call. The command
line turns it into exit status 2 without a traceback. Everything else that escapes is a defect of ours and stays loud.
"""


class UserError(Exception):
    """Bad input. `what` names the thing and the limit; `why` the usual cause; `fix` the corrected call."""

    def __init__(self, what: str, why: str = "", fix: str = ""):
        self.what, self.why, self.fix = what, why, fix
        super().__init__(" ".join(self._parts()))

    def _parts(self):
        yield one_line(self.what).rstrip(".") + "."
        if self.why:
            yield one_line(self.why).rstrip(".") + ("" if self.why.endswith("?") else ".")
        if self.fix:
            yield "Try: " + one_line(self.fix)


class ConfigError(UserError):
    """A configuration that cannot be run as written."""


class ModelFolderError(UserError):
    """A model folder that is not what it says, or that asks for more trust than we give."""


class TaskError(UserError):
    """A task source that holds nothing usable."""


class CheckpointError(UserError):
    """A run folder that cannot be resumed as it is."""


class RunStopped(UserError):
    """A run that stopped itself because going on would have trained on nonsense; the reason is the message."""


class Preempted(KeyboardInterrupt):
    """SIGTERM: somebody takes the machine away, and the run is to be saved and gone on with later."""


def one_line(text: str, limit: int = 600) -> str:
    """`text` on one line, control characters shown as escapes, cut in the middle beyond `limit` characters."""
    flat = " ".join(text.split())
    flat = "".join(c if c.isprintable() else repr(c)[1:-1] for c in flat)
    if len(flat) <= limit:
        return flat
    half = limit // 2 - 3
    return flat[:half] + " [...] " + flat[-half:]
