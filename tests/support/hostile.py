"""Hostile input: malformed images and tars, random damage, and a web server with scripted answers."""

import http.server
import struct
import tarfile
import threading
import zlib
from contextlib import contextmanager, suppress

from tests.support.tiny import record
from vico_pl.errors import RecordError

GOOD = record().files


def png(width, height, *, bits=8, colour=2, data=b"", interlace=0):
    """A PNG with an arbitrary header."""

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def member(name, content=b"", **fields):
    """A tar member with a valid header except for `fields`."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    padding = bytes(-len(content) % 512)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + content + padding


def whole(key):
    return b"".join(member(f"{key}.{name}", content) for name, content in GOOD.items())


def with_checksum(header):
    blank = header[:148] + b" " * 8 + header[156:512]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def keys_or_kinds(reader, samples):
    """Read samples: the key of each, or the kind of its fault."""
    found = []
    for sample in samples:
        try:
            found.append(reader(sample).key)
        except RecordError as error:
            found.append(error.kind)
    return found


def mutated(content, rng):
    """Change, cut out or repeat a few random pieces."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice([1, 1, 2, 4, 16, 300]))
        content[start:end] = rng.choice(
            [rng.randbytes(end - start), b"", bytes(end - start), bytes(content[start:end] * 2)]
        )
    return bytes(content)


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends the next scripted answer (status, announced length, body) of a path; repeats the last one."""

    def do_GET(self):
        name = self.path.partition("?")[0].lstrip("/")
        self.server.requests.append(name)
        status, length, body = self._answer(name)
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        with suppress(OSError):  # the client has disconnected
            self.wfile.write(body)

    def _answer(self, name):
        answers = self.server.answers.get(name)
        if answers:
            return answers.pop(0) if len(answers) > 1 else answers[0]
        path = self.server.folder and self.server.folder / name
        if path and path.is_file():
            return (200, path.stat().st_size, path.read_bytes())
        return (404, 0, b"")

    def log_message(self, *_):
        pass


@contextmanager
def serving(folder=None):
    """Serve the files of a folder, and `answers` where there are some; `requests` are the names asked for."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.requests, server.folder = {}, [], folder
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
