"""A read-only object server for benchmarks: one folder as one bucket, with ranges, tags and listings, on loopback."""

from __future__ import annotations

import contextlib
import http.server
import os
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve `folder` as bucket ``bench``; yields the address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 2**16
        # As stores do; else the body of a small answer waits 40 ms for the client to confirm its header.
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            """Quiet."""

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _list(self, prefix: str) -> None:
            """All objects below a prefix, in one page."""
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            names = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
            rows = [
                f"<Contents><Key>{name}</Key><Size>{size}</Size><ETag>&quot;{size}&quot;</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for name, size in names
                if name.startswith(prefix)
            ]
            head = "<Name>bench</Name><IsTruncated>false</IsTruncated>"
            text = f"<ListBucketResult>{head}{''.join(rows)}</ListBucketResult>".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def _answer(self, *, body: bool) -> None:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            if "list-type" in query:
                self._list(query.get("prefix", [""])[0])
                return
            name = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).removeprefix("/bench/")
            path = (folder / name).resolve()
            if not path.is_relative_to(folder.resolve()) or not path.is_file():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            size = path.stat().st_size
            start, stop = 0, size
            wanted = self.headers.get("Range", "")
            if wanted.startswith("bytes="):
                low, _, high = wanted[6:].partition("-")
                start, stop = int(low), min(size, int(high) + 1 if high else size)
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.send_header("Content-Length", str(stop - start))
            self.send_header("ETag", f'"{size}"')
            self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
            self.end_headers()
            self.wfile.flush()
            if body:
                with path.open("rb") as file:
                    while start < stop:
                        start += os.sendfile(self.connection.fileno(), file.fileno(), start, stop - start)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
