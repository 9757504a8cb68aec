"""A part of a document that a command writes; the rest is written by hand."""


def replace_part(document: str, begin: str, end: str, content: str) -> str:
    """The document with other content between two marks, which stay.

    Raises:
      ValueError: it lacks a mark.
    """
    head, first, rest = document.partition(begin)
    _, last, tail = rest.partition(end)
    if not first or not last:
        raise ValueError(f"the document has no place for this: it needs {begin} and {end}")
    return f"{head}{begin}\n\n{content.strip()}\n\n{end}{tail}"
