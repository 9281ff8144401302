"""What the server says on the standard error: one line a request, without a word of what was asked or answered."""

import asyncio
import logging
import sys

logger = logging.getLogger("minimind.serve")
_MOST = 500  # different notes: names in them are the clients'

_told: set[str] = set()


def set_up() -> None:
    """Lines with their time, of ours and of uvicorn's errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name, level in (("minimind.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(level)
    logging.getLogger("uvicorn.error").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """False for a taken address, which the command's own error names, and for answers that a second Ctrl-C ends."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(record.msg, OSError) and not isinstance(error, asyncio.CancelledError)


def once(note: str) -> None:
    """Says what was ignored or changed, the first time that it happens."""
    if note not in _told and len(_told) < _MOST:
        _told.add(note)
        logger.info("note (said once): %s", note)
