"""How far a build is: a line that moves on a terminal, else one in the log every ten seconds."""

import logging
import os
import sys
import time

from mlm_jax.terminal import clock, short_number

log = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """Asked to stop. Finished parts are kept: the same call goes on from there."""


class Progress:
    """total: bytes of input; None where nobody knows. Use it with `with`.

    stop: is true once somebody has asked to stop, which `show`, called often, then does.
    """

    def __init__(self, total: int | None, stop: object = False):
        self.total, self.stop = total, stop
        self.documents = self.text_bytes = self.read = self.found = 0
        self._live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._every = 0.2 if self._live else 10.0
        self._begun = self._shown = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            print(f"\r\x1b[K{self.line()}", file=sys.stderr)

    def skip(self, n_bytes: int) -> None:
        """Input that an earlier start has finished: it is done, but says nothing of our speed."""
        self.found += n_bytes

    def add(self, documents: int, text_bytes: int, read: int) -> None:
        self.documents += documents
        self.text_bytes += text_bytes
        self.read += read

    def show(self) -> None:
        """Shows how far we are, unless that was done a moment ago; raises Stopped."""
        if self.stop:
            raise Stopped
        if (now := time.monotonic()) - self._shown < self._every:
            return
        self._shown = now
        if self._live:
            print(f"\r\x1b[K{self.line()}", end="", file=sys.stderr, flush=True)
        else:
            log.info("%s", self.line())

    def line(self) -> str:
        seconds = max(time.monotonic() - self._begun, 1e-9)
        fields = [
            f"{short_number(self.documents)} documents",
            f"{short_number(self.documents / seconds)} docs/s",
            f"{self.text_bytes / seconds / 1e6:.1f} MB/s",
        ]
        if self.total:
            done = min(self.found + self.read, self.total)
            left = (self.total - done) * seconds / self.read if self.read else None
            cells = round(20 * done / self.total)
            bar = "=" * cells + "." * (20 - cells)
            fields = [f"{done / self.total:4.0%}", *([bar] * self._live), *fields]
            fields.append(f"ETA {clock(left)}")
        return "  ".join(fields)
