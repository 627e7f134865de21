"""A sample of the requests with their answers, as JSON Lines for `vismem drift`; off unless `FOLDER` is set.

Each process writes files of its own into the folder, which others may share. No answer waits for it or fails by it:
what cannot be written is lost, and counted. Users' own words stand there: only the owner may read the files.
"""

import hashlib
import json
import logging
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from errno import EFBIG, ENOSPC
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from PIL import Image
from prometheus_client import Counter

from vismem.runtime.images import look_of, pixels_sha256, upright

# Variables of the server's environment: the folder, the share of the requests, the folder's largest size in megabytes,
# and, if it is 1, that images are kept too.
FOLDER, SHARE, MEGABYTES, IMAGES = (f"VISMEM_REQUEST_{name}" for name in ("LOG", "SHARE", "LOG_MB", "IMAGES"))
FORMAT = 1  # of a line; its fields are those of `vismem.validation.requests.Line`
FILES, PICTURES = "requests-*.jsonl", "images"
PENDING, TEXT = 64_000_000, 10_000  # pixels that wait to be hashed, as of one large request; what a text counts as
PARTS = 16  # of the folder's largest size: one is what a process writes before it deletes old files again

logger = logging.getLogger(__name__)


class RequestLog:
    """Writes in a thread of its own. Which requests are in the sample depends on their content alone.

    So all replicas choose the same ones, and one that is asked again is logged again: repeats can be counted.
    """

    def __init__(
        self, folder: Path, share: float, most_bytes: int, images: bool, served: Mapping[str, str], count: Counter
    ) -> None:
        """`served`: what every line says of the model; `count`: lines by `outcome`, written or lost."""
        self.folder, self.share, self.most, self.images = folder, share, most_bytes, images
        self.served, self.count = served, count
        self.waiting: SimpleQueue[tuple[Sequence[Image.Image], dict[str, Any], int] | None] = SimpleQueue()
        self.pending, self.lock = 0, threading.Lock()
        self.file: int | None = None  # descriptor
        self.since = 0  # bytes written since old files were last deleted
        self.warned = False
        self.thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self.thread.start()

    @classmethod
    def from_environment(cls, served: Mapping[str, str], count: Counter) -> "RequestLog | None":
        """As the variables say; None where there is no folder. ValueError for a share or a size that is no number."""
        get = os.environ.get
        if not (folder := get(FOLDER)):
            return None
        size = int(get(MEGABYTES, "1000")) * 1_000_000
        return cls(Path(folder), float(get(SHARE, "0.05")), size, get(IMAGES) == "1", served, count)

    def add(self, images: Sequence[Image.Image], line: Mapping[str, Any]) -> None:
        """Hand over an answered request, with its `question`. It returns at once, and raises nothing."""
        size = TEXT + sum(image.width * image.height for image in images)
        with self.lock:
            taken = self.thread.is_alive() and (not self.pending or self.pending + size <= PENDING)
            self.pending += size * taken
        if taken:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            self.waiting.put((images, {"format": FORMAT, "time": now, **self.served, **line}, size))
        else:
            self.count.labels("lost").inc()

    def close(self) -> None:
        """Write what waits, and end."""
        self.waiting.put(None)
        self.thread.join()

    # --- the thread that writes ---

    def _run(self) -> None:
        while (item := self.waiting.get()) is not None:
            images, line, size = item
            try:
                self._write(images, line)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next request is tried
                self.count.labels("lost").inc()
                if not self.warned:
                    logger.warning("requests are not logged in %s: %s", self.folder, error)
                self.warned = True
            with self.lock:
                self.pending -= size

    def _write(self, images: Sequence[Image.Image], line: dict[str, Any]) -> None:
        seen = [upright(image) for image in images]
        hashes = [pixels_sha256(image) for image in seen]
        request = hashlib.sha256(b"".join(hashes) + line["question"].encode("utf-8", "surrogatepass"))
        if int.from_bytes(request.digest()[:8]) >= self.share * 2**64:
            return
        line |= {"request": request.hexdigest(), "images": []}
        for sha256, image in zip(hashes, seen, strict=True):
            facts = {"width": image.width, "height": image.height, "look": look_of(image).hex()}
            line["images"].append({"sha256": sha256.hex(), **facts})
            if self.images:
                self._keep(image, self.folder / PICTURES / f"{sha256.hex()}.png")
        data = json.dumps(line).encode() + b"\n"
        file = self._reserve(len(data))
        before = os.fstat(file).st_size
        try:
            if os.write(file, data) < len(data):
                raise OSError(ENOSPC, os.strerror(ENOSPC))
        except OSError:
            os.ftruncate(file, before)  # a line is there whole or not at all
            raise
        self.count.labels("written").inc()

    def _keep(self, image: Image.Image, path: Path) -> None:
        """Save an image under the hash of its pixels; one that is there is only marked as used now."""
        if path.is_file():
            return os.utime(path)
        self._reserve(1_000 + 4 * image.width * image.height)  # no PNG of it is larger
        path.parent.mkdir(mode=0o700, exist_ok=True)
        partial = path.with_name(uuid.uuid4().hex)
        try:
            partial.touch(0o600)
            image.info.clear()  # a profile may be larger than the pixels
            image.save(partial, "PNG")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, size: int) -> int:
        """The file that lines go to, once there is room for `size` bytes more, for which old files are deleted."""
        self.since += size
        if self.file is None or self.since > self.most // PARTS or not os.fstat(self.file).st_nlink:
            if self.file is not None:
                os.close(self.file)
                self.file = None
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room(max(size, self.most // PARTS))
            name = FILES.replace("*", f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex[:8]}")
            self.file = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            self.since = size
        return self.file

    def _make_room(self, size: int) -> None:
        """Delete the oldest files and images, whoever wrote them, until `size` bytes more fit; OSError if none does."""
        if size > self.most:
            raise OSError(EFBIG, f"a request of {size} bytes, and the folder may hold {self.most}")
        found = []
        for path in (*self.folder.glob(FILES), *self.folder.glob(f"{PICTURES}/*")):
            with suppress(FileNotFoundError):  # another process was quicker
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(held for _, held, _ in found) + size
        for _, held, path in sorted(found):
            if total <= self.most:
                return
            path.unlink(missing_ok=True)
            total -= held
