"""The one exception family of the package, defined at the bottom of the import order."""


class RestoreError(ValueError):
    """A user's mistake: what was wrong, what was expected and what to do, in one sentence.

    On one line, whatever names, keys and messages of other programs it repeats.
    """

    def __init__(self, sentence: object = "") -> None:
        super().__init__(" ".join(str(sentence).splitlines()))
