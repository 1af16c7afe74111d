"""The one exception family of the package, defined at the bottom of the import order."""


class RestoreError(ValueError):
    """A user's mistake: what must be, what was given and what to do, in one sentence on one line."""

    def __init__(self, sentence: object = "") -> None:
        super().__init__(" ".join(str(sentence).splitlines()))
