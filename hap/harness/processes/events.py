"""Lines of progress, as a run tells them to whoever listens; knows nothing of what is done."""

from collections.abc import Callable


class Event(str):
    """A line of progress; `fraction` of the stage is done, where that is known."""

    fraction: float | None

    def __new__(cls, text: str, fraction: float | None = None) -> "Event":
        """A string that carries the fraction."""
        event = super().__new__(cls, text)
        event.fraction = fraction
        return event


Say = Callable[[Event], None]


def silent(event: Event) -> None:
    """Says nothing."""
