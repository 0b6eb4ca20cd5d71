"""Malformed files: hand-made PNGs and tar members, and random damage."""

import struct
import tarfile
import zlib

from tests.helpers import record

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
