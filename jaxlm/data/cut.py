"""Cut a long text into pieces that a machine can hold, after the end of a line where there is one."""

from collections.abc import Iterator


def cut(text: str, limit: int) -> Iterator[str]:
    """Yield consecutive pieces of at most `limit` characters; end to end they are `text`."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    yield text[start:]
