"""The errors that a user can cause, each one line that says what is wrong and the way out."""


class ShoalError(Exception):
    """An error with a message meant for the user; the command prints it as one line. ``exit_code`` is 1."""

    exit_code = 1


class ConfigError(ShoalError):
    """A setting is unknown or has a value that is not allowed. The command exits with 2, before any model loads."""

    exit_code = 2

    def __init__(self, key: str, value: object, allowed: str, way_out: str = ""):
        self.key, self.value, self.allowed = key, value, allowed
        text = f"{key}={value!r} is not allowed: {allowed}."
        super().__init__(f"{text} {way_out}".rstrip())


class RunStopped(ShoalError):
    """A run can't go on (too few clients left, say). What it had is in its checkpoint. The command exits with 3."""

    exit_code = 3
