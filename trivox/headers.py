"""The headers of sound files, read from their bytes: how long a recording is, and whether it is all there.

`look` is what there is to call, before a file is decoded. Headers are those of wav (RIFF, RIFX, RF64), Wave64, AIFF,
8SVX, CAF, .au and SPHERE, of Ogg, MP4 and Matroska, and of mp3 (Xing's, LAME's and Fraunhofer's).
"""

import io
import math
import os
import struct

from trivox.common import UserError

CUT = "it is cut off, its header promises more samples than it holds"
CHUNKS = 1000  # so many are looked at: damage can be millions of empty ones
W64 = b"riff.\x91\xcf\x11\xa5\xd6(\xdb\x04\xc1\0\0"  # what a Wave64 begins with
KBITS = {True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # of MPEG 1 layer III, by its index
         False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}  # of MPEG 2 and 2.5


def look(path, file):
    """What the bytes of an open file tell before it is decoded: (source, stated).

    source: a file that libsndfile is to read in its stead, as its header does not tell how long it is; or None.
    stated: whether the header, or that of `source`, tells it. Raises UserError where the file is cut off.
    """
    length = os.fstat(file.fileno()).st_size
    start, head = 0, file.read(16)
    if head[:3] == b"ID3" and len(head) >= 10:  # a tag before anything else; its length has 7 bits a byte
        start = 10 + sum((byte & 127) << 7 * (3 - n) for n, byte in enumerate(head[6:10]))
        file.seek(start)
        head = file.read(16)
    source, stated = None, True
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"FORM", b"caff", b".snd") or head == W64:
        if field := find_length(file, start, head, length):
            source = with_length(path, file, length, *field)
    elif head[:8] == b"NIST_1A\n":
        check_nist(path, file, start, length)
    elif head[:4] == b"OggS":
        check_ogg(path, file, length)
    elif head[4:8] == b"ftyp" or head[:4] == bytes.fromhex("1a45dfa3"):
        check_container(path, file, start, head, length)
    elif head[:1] == b"\xff" or start:
        source, stated = of_mpeg(path, file, start, length)
    return source, stated


def find_length(file, start, head, length):
    """Where a header of chunks, or .au's, says how many bytes of samples follow: (position of the number, its format
    of `struct`, its value, the position that it counts from, how many of the bytes that it counts are no samples,
    whether nothing but chunks follows the number's own chunk). None where it does not say it."""
    def number(form, at):
        file.seek(at)
        raw = file.read(width := struct.calcsize(form))
        return struct.unpack(form, raw)[0] if len(raw) == width else 0

    if head[:4] == b".snd":
        begin, size = struct.unpack(">II", head[4:12].ljust(8, b"\0"))
        if begin < 24:  # it is no header
            return None
        return start + 8, ">I", size, start + begin, 0, length <= start + begin
    # name and number of a chunk take so many bytes; its number counts from the first of `counts`; chunks begin at
    # multiples of `even`
    name, form, even, counted, first = {b"caff": (4, ">Q", 1, 0, 8), b"RIFX": (4, ">I", 2, 0, 12),
                                        b"FORM": (4, ">I", 2, 0, 12), b"riff": (16, "<Q", 8, 24, 40)
                                        }.get(head[:4], (4, "<I", 2, 0, 12))
    width = struct.calcsize(form)
    at, long = start + first, None
    for _ in range(CHUNKS):
        if at + name + width > length:
            break
        file.seek(at)
        kind, size = file.read(name)[:4], number(form, at + name)
        body = at + name + width
        if kind in (b"data", b"SSND", b"BODY"):
            extra = {b"SSND": 8, b"riff": 24, b"caff": 4}.get(kind if kind == b"SSND" else head[:4], 0)
            after = body - counted + max(size, extra)
            if long and size == 2**32 - 1:  # of RF64, the number stands in the chunk ds64
                return long, "<Q", number("<Q", long), body, 0, False
            return at + name, form, size, body - counted, extra, only_chunks(file, after, length)
        if kind == b"ds64":
            long = body + 8
        at = max(body, start + even * -(-(body - counted + size - start) // even))
    return None


def only_chunks(file, at, length):
    """Whether from `at` to the end of a file there is nothing, or chunks with names of letters."""
    for _ in range(CHUNKS):
        if at + 8 > length:
            break
        file.seek(at)
        name, little, big = struct.unpack("<4sI", raw := file.read(8)) + struct.unpack(">4xI", raw)
        if not (name.isascii() and name.decode().isprintable()):
            return False
        at += 8 + min(little, big)
    return at in (length, length + 1)


def is_unknown(size, extra):
    """Whether a number of bytes is what a writer puts where it does not know it yet.

    0: GStreamer, Python's wave. Near 2 GiB: 0x7FFFF000, rounded down to whole frames, of SoX, espeak-ng and mpv;
    0x7FFFFFFF, and less the header, of LAME and the tools of Vorbis and Opus; 0x80000000 of arecord; 0x7F000000 of
    SoX's AIFF. Near 4 GiB: 0xFFFFFFFF of FFmpeg, which to .au means unknown. Of 64 bits -1, and more than can be.
    """
    return size <= extra or 0x7EFF0000 <= size <= 0x80000400 or 0xFF000000 <= size < 2**32 or size >= 2**62


def with_length(path, file, length, at, form, size, counts_from, extra, ended):
    """The file with its true length in its header, where this does not know it; None where it is right. Raises
    UserError where the file is cut off."""
    if counts_from + size <= length and (size > extra or ended):
        return None
    if not is_unknown(size, extra):
        raise UserError(f"cannot read {path}: {CUT}")
    there = max(0, length - counts_from)
    if there >= 256 ** struct.calcsize(form):
        raise UserError(f"cannot read {path}: its header does not say how long it is, and its kind cannot hold more "
                        "than 4 GiB: convert it to flac")
    file.seek(0)
    head = bytearray(file.read(min(counts_from + extra, length)))
    struct.pack_into(form, head, at, there)
    return io.BufferedReader(Behind(bytes(head), file, len(head), length))


class Behind(io.RawIOBase):
    """A file with another head: `head`, then what `file` holds from `begin` on."""

    def __init__(self, head, file, begin, length):
        self.head, self.file, self.begin, self.at = head, file, begin, 0
        self.length = len(head) + length - begin

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, to, whence=io.SEEK_SET):
        self.at = max(0, to + (0, self.at, self.length)[whence])
        return self.at

    def readinto(self, buffer):
        if self.at < len(self.head):
            some = self.head[self.at:self.at + len(buffer)]
        elif self.at < self.length:
            self.file.seek(self.begin + self.at - len(self.head))
            some = self.file.read(len(buffer))
        else:  # damaged files make decoders seek to where no file can be
            some = b""
        buffer[:len(some)] = some
        self.at += len(some)
        return len(some)


def check_nist(path, file, start, length):
    """Raises UserError where a file of NIST's SPHERE holds fewer samples than it says, unless they are compressed."""
    file.seek(start)
    lines = file.read(1024).decode("latin-1").splitlines()
    said = {words[0]: words[2] for line in lines[2:] if len(words := line.split(None, 2)) == 3}
    numbers = [lines[1].strip(), *(said.get(key, "") for key in ("sample_count", "sample_n_bytes")),
               said.get("channel_count", "1")]
    if all(map(str.isdecimal, numbers)) and "," not in said.get("sample_coding", ""):  # as in "pcm,embedded-shorten"
        begin, *factors = map(int, numbers)
        if start + begin + math.prod(factors) > length:
            raise UserError(f"cannot read {path}: {CUT}")


def check_ogg(path, file, length):
    """Raises UserError where an Ogg's last page is not whole, or does not end a stream (RFC 3533, section 6)."""
    file.seek(max(0, length - 2**17))  # a page has less than half of it
    tail = file.read()
    last = tail.rfind(b"OggS")
    if last < 0:
        return
    page = tail[last:]
    sizes = page[27:27 + page[26]] if len(page) > 26 else b""
    if len(page) < 27 or len(sizes) < page[26] or len(page) < 27 + len(sizes) + sum(sizes) or not page[5] & 4:
        raise UserError(f"cannot read {path}: it is cut off, its last page is missing")


def check_container(path, file, start, head, length):
    """Raises UserError where a box of MP4 (ISO 14496-12, section 4.2), or the segment of Matroska (RFC 8794, section
    4), ends beyond the file."""
    at, end = start, 0
    if head[4:8] == b"ftyp":
        for _ in range(CHUNKS):
            if at + 16 > length:
                break
            file.seek(at)
            size, kind, long = struct.unpack(">I4sQ", file.read(16))
            size = long if size == 1 else size
            if size < 8:  # 0: it goes to the end
                break
            at += size
            if kind in (b"moov", b"mdat", b"moof"):  # others may be no box, but what was appended
                end = at
    else:
        for kind in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
            file.seek(at)
            if file.read(4) != kind or not (first := file.read(1)) or not first[0]:
                return
            more = 8 - first[0].bit_length()  # how many bytes of its size follow
            size = int.from_bytes(first + file.read(more)) - (1 << 7 * (more + 1))
            if size == (1 << 7 * (more + 1)) - 1:  # a live stream's
                return
            at = end = at + 5 + more + size
    if end > length:
        raise UserError(f"cannot read {path}: it is cut off, its header promises more than it holds")


def of_mpeg(path, file, start, length):
    """`look` for MPEG layer III, which may begin with a frame of Xing's or Fraunhofer's that tells its length.

    mpg123 in libsndfile believes its own estimate of the length where there is none such, and reads no further. There
    it is shown a frame that promises more than a recording can have.
    """
    file.seek(start)
    data = file.read(4096)
    for i in range(len(data) - 4):
        if data[i] == 255 and (found := layer_3(data[i:i + 4])):
            break
    else:
        return None, True
    mpeg_1, mono, rate, size = found
    at = i + 4 + ((17 if mono else 32) if mpeg_1 else (9 if mono else 17))
    frames = bytes_ = 0
    if (tag := data[at:at + 4]) in (b"Xing", b"Info"):
        flags, one, two = struct.unpack(">III", data[at + 4:at + 16].ljust(12, b"\0"))
        frames, bytes_ = (one if flags & 1 else 0), (two if flags & 1 else one) if flags & 2 else 0
    elif data[i + 36:i + 40] == b"VBRI":
        tag, (bytes_, frames) = b"VBRI", struct.unpack(">II", data[i + 46:i + 54].ljust(8, b"\0"))
    if bytes_ > length:  # of the whole file, as some count the tags in
        raise UserError(f"cannot read {path}: {CUT}")
    if frames and tag != b"VBRI":
        return None, True
    header = bytearray(data[i:i + 4])
    header[1] |= 1  # no checksum
    header[2] = 0x90 | header[2] & 0x0C  # 128 or 80 kbit/s, not padded: long enough for what it holds
    *_, its_size = layer_3(header)
    shown = header + bytes(at - i - 4) + b"Xing" + struct.pack(">II", 1, frames or 2**31 // 1152)
    begin = start + i + (size if tag in (b"Xing", b"Info", b"VBRI") else 0)
    return io.BufferedReader(Behind(bytes(shown.ljust(its_size, b"\0")), file, begin, length)), bool(frames)


def layer_3(header):
    """(whether it is MPEG 1, whether it is mono, Hz, bytes of the frame) of the 4 bytes that a frame of MPEG layer III
    begins with (ISO 11172-3, section 2.4.2.3), None of any others."""
    _, kind, rates, mode = header
    if kind & 0xE6 != 0xE2 or kind & 0x18 == 8 or rates >> 4 in (0, 15) or rates & 12 == 12:
        return None
    mpeg_1 = kind & 0x18 == 0x18
    rate = (44100, 48000, 32000)[rates >> 2 & 3] >> (0 if mpeg_1 else 1 if kind & 0x10 else 2)
    size = (144 if mpeg_1 else 72) * 1000 * KBITS[mpeg_1][rates >> 4] // rate + (rates >> 1 & 1)
    return mpeg_1, mode >> 6 == 3, rate, size
