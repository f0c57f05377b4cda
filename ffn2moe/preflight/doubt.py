"""Mark a line of a check as a warning."""


class Doubt(str):
    """A line about what may go wrong."""

    __slots__ = ()
