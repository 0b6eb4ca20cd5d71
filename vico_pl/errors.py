"""What ends a record, a recipe or a run: errors, checks of settings, and signals."""

import errno
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # end a run after the step, with a checkpoint


class RecordError(ValueError):
    """A record that cannot be used. The text is the reason, `kind` one word to count it under.

    `kind` is empty where the caller that catches the error knows it better.
    """

    def __init__(self, reason: str, *, kind: str = "") -> None:
        super().__init__(reason)
        self.kind = kind


def is_out_of_files(error: Exception) -> bool:
    """Say whether process or machine may open no more files: no fault of the file that was to be opened."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def check_settings(section: str, config: object, **rules: tuple[bool, str]) -> None:
    """Check a section of a recipe; a rule is whether the field of its name is valid, and what is expected.

    Raises:
        ValueError: a field is not valid.
    """
    for name, (is_valid, expected) in rules.items():
        if not is_valid:
            raise ValueError(f"{section}.{name} is {getattr(config, name)!r}; expected {expected}")
