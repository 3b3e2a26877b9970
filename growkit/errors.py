"""Errors that a user can fix: one line that names the problem and the remedy."""

GROWS = "growkit grows timm's plain ViT and DeiT; docs/architectures.md lists the names"
MEMORY_IS_FULL = (
    *("not enough memory", "out of memory", "can't allocate memory", "cannot allocate memory"),
    *("resource temporarily unavailable", "can't start new thread"),  # threads need some, too
    *("bad allocation", "bad_alloc", "unable to mmap", "failed to map segment"),
    *("status_alloc_failed", "failed to allocate"),  # of CUDA's libraries; of ONNX Runtime's CUDA provider
)


class GrowkitError(Exception):
    """Bad usage or bad input. The message is one line: what, got, expected, what to do."""


class UnwritableError(GrowkitError):
    """A file or folder cannot be written: a full disk, no permission, a folder that is gone."""


class DamagedStateError(GrowkitError):
    """The state of a stopped run cannot be read."""


class Terminated(KeyboardInterrupt):
    """SIGTERM asked the process to end; handled like Ctrl-C's KeyboardInterrupt."""


def is_memory_full(error: BaseException) -> bool:
    """Whether an error means out of memory; torch has a dozen wordings for it, under general exception types."""
    if isinstance(error, RuntimeError | ImportError):  # torch itself is not loaded here
        said = str(error).lower()
        return type(error).__name__ == "OutOfMemoryError" or any(words in said for words in MEMORY_IS_FULL)
    return isinstance(error, MemoryError)


def first_line(error: BaseException, most: int | None = None) -> str:
    """First line of another library's error; its type where it has no message.

    A line of more than `most` characters ends with its last sentence within them, or, where that would leave less than
    a third, with a word and '...'.
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if most is None or len(line) <= most:
        return line
    sentences = line[:most].rpartition(". ")[0]
    if len(sentences) >= most / 3:
        return sentences
    words = line[: most - len(" ...")]
    return f"{words.rpartition(' ')[0] or words} ..."
