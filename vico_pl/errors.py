"""The error of a record or shard that cannot be used."""


class RecordError(ValueError):
    """A record that cannot be used. The text is the reason, `kind` one word to count it under."""

    def __init__(self, reason: str, *, kind: str = "") -> None:
        """Leave `kind` empty where the caller that catches the error knows it better."""
        super().__init__(reason)
        self.kind = kind
