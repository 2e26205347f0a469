"""Recordings: sound files of any kind read as mono floats, and wavs written.

libsndfile reads most kinds; PyAV (FFmpeg's libraries, `av` in requirements-extra.txt) reads the others, and what
libsndfile refuses. What neither does:

- A header that was written before its recording ended says 0, or some number near 2 or 4 GiB, for a length. Such a
  stream is read to its end: libsndfile is shown a header that says how long it is (`headers.look`).
- A file that is cut off is refused, where anything in it tells: a header that promises more than there is, an Ogg
  stream without its last page, a container that ends beyond the file. Nothing tells of a cut in what has no length:
  mp3 without a Xing, Info or VBRI frame, mp2, aac (ADTS), ac3, amr and live WebM, but a broken last frame. Nor are
  voc, avr, pvf and ircam looked into.
- Floats on a scale of integers are brought to [-1, 1], and that is said.

Shapes: wav (samples,) float32 in [-1, 1].
"""

import io
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from trivox.common import UserError
from trivox.files import write_whole
from trivox.headers import CUT, Behind, look

# What has no header, such as .raw, .vox and .gsm, is not among them: nothing would tell that it is no sound.
SNDFILE_ENDINGS = (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".snd",
                   ".caf", ".w64", ".rf64", ".sph", ".nist", ".voc", ".avr", ".svx", ".8svx", ".pvf", ".ircam", ".sf")
PYAV_ENDINGS = (".m4a", ".m4b", ".mp4", ".mov", ".3gp", ".3g2", ".aac", ".webm", ".mka", ".mkv", ".wma", ".amr",
                ".ac3", ".eac3", ".ec3", ".dts", ".mp2", ".spx", ".ape", ".wv", ".tta", ".tak", ".mpc")
AUDIO_ENDINGS = SNDFILE_ENDINGS + PYAV_ENDINGS  # in lower case: compare with path.suffix.lower()
# FFmpeg's names of what PyAV may open: others are playlists, which name other files and addresses, or no sound
PYAV_FORMATS = ("aac,ac3,aiff,amr,ape,asf,au,caf,dts,dtshd,eac3,flac,matroska,mov,mp3,mpc,mpc8,nistsphere,ogg,rm,tak,"
                "tta,voc,w64,wav,wv")
STATE_LENGTH = ("aiff", "ape", "asf", "au", "caf", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "tta", "w64", "wav",
                "wv")  # those whose headers tell how long they are
TO_INSTALL = "pip install --no-deps -r requirements-extra.txt brings it"

RATES = 1000, 1_000_000  # Hz, the lowest and the highest of recordings
STRANGERS = 8, 192_000  # channels and Hz, the most of what a stranger sends
BLOCK = 2**18  # samples of all channels that are read at once
SCALES = 2.0**15, 2.0**23, 2.0**31  # what full scale is to floats that were integers


def read_wav(path, sample_rate, max_seconds=None):
    """As `read_recording`, without full_scale: a line is printed where that is not 1. Returns (samples,) float32."""
    wav, full_scale = read_recording(path, sample_rate, max_seconds)
    if full_scale != 1:
        print(f"note: {path} holds floats on a scale of ±{full_scale:,.0f}, which are read as ±1")
    return wav


def rate_of(path):
    """The sample rate of a recording in Hz, by its header; None where that cannot be read."""
    import soundfile

    with suppress(soundfile.LibsndfileError, ValueError, TypeError):
        return soundfile.info(os.fsencode(path)).samplerate
    if av := pyav():
        with suppress(av.FFmpegError, OSError, ValueError), av.open(os.fspath(path)) as container:
            return container.streams.best("audio").rate
    return None


def read_recording(path, sample_rate, max_seconds=None):
    """Read any file that libsndfile or PyAV knows as mono, the mean of its channels, at `sample_rate` Hz.

    max_seconds: a longer one is refused, by its header where that says how long it is, else as soon as it is longer.
    Returns (samples,) float32, and the full_scale that its samples were divided by: 1, but for floats on the scale of
    integers of 16, 24 or 32 bits 2^15, 2^23 or 2^31 (see `full_scale_of`).
    Raises UserError with the reason where the file is missing, damaged, cut off, too long or empty, where its samples
    are not finite, or where it cannot be told what full scale is.
    """
    return read(path, sample_rate, partial(Mono, max_seconds=max_seconds))


def read_start(path, sample_rate, seconds):
    """The first seconds of a recording that a stranger sent, as `read_recording` returns it. No more is decoded, as a
    small file can hold days. Raises UserError also where it has more channels or a higher rate than STRANGERS."""
    return read(path, sample_rate, partial(Start, seconds=seconds))


def read(path, sample_rate, make):
    """What a Mono of make's holds of a file, at `sample_rate`, and its full_scale."""
    if not Path(path).is_file():  # a pipe's writer would be waited for, for ever
        raise UserError(f"cannot read {path}: there is no such file")
    try:
        with open(path, "rb") as file:
            mono = decode(path, file, make)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    except MemoryError:  # a damaged header can ask for any
        raise UserError(f"cannot read {path}: it is damaged, or needs more memory than there is") from None
    wav, full_scale = mono.finish()
    if mono.rate != sample_rate:
        import librosa
        wav = librosa.resample(wav, orig_sr=mono.rate, target_sr=sample_rate)
    return wav, full_scale


def write_wav(path, wav, sample_rate):
    """Write (samples,) floats as a wav of 16-bit PCM, clipped to [-1, 1], whole or not at all."""
    import soundfile

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(content := io.BytesIO(), np.clip(wav, -1, 1), sample_rate, subtype="PCM_16", format="WAV")
    write_whole(Path(path), content.getvalue())


# ------------------------------------------------------------------------------------------------------------
# Decoding

class Mono:
    """A recording as it is read: blocks are mixed down at once, and held in no more memory than they need."""
    full = False  # whether what follows is not wanted

    def __init__(self, path, rate, channels, floats, max_seconds=None):
        """floats: whether the file holds floats, which alone can be on another scale."""
        if not RATES[0] <= rate <= RATES[1]:  # resampled, it would take any memory
            raise UserError(f"{path} has a sample rate of {rate} Hz, which is damage: from {RATES[0]:,} to "
                            f"{RATES[1]:,} Hz can be read")
        self.path, self.rate, self.max_seconds, self.floats = path, rate, max_seconds, floats
        self.held = bytearray()  # grows in place, where a list of blocks would need twice the memory at its end
        self.values = self.beyond = 0  # how many there were of all channels, and how many beyond HOT
        self.peak, self.whole = 0.0, floats  # whole: whether all are integers

    @property
    def samples(self):
        return len(self.held) // 4

    def expect(self, samples, least=""):
        """Raises UserError where so many samples are too long."""
        if self.max_seconds is not None and samples > self.max_seconds * self.rate:
            raise UserError(f"{least}{samples / self.rate:.1f} s are more than {self.max_seconds:.1f} s")

    def add(self, block):
        """block: (samples, channels) float32."""
        if not block.size:
            return
        self.expect(self.samples + len(block), "at least ")
        peak = float(max(block.max(), -block.min()))
        if not np.isfinite(peak):
            raise UserError(f"{self.path} holds samples that are not numbers")
        self.peak, self.values = max(peak, self.peak), self.values + block.size
        if self.whole:
            self.whole = bool((block == np.rint(block)).all())
        if self.floats and peak > HOT:
            self.beyond += np.count_nonzero(np.abs(block) > HOT)
        mixed = np.ascontiguousarray(block[:, 0] if block.shape[1] == 1 else block.mean(1))
        self.held += memoryview(mixed).cast("B")

    def finish(self):
        """(samples,) float32 with full scale at 1, and what full scale was. Raises UserError as `read_recording`."""
        if not self.held:
            raise UserError(f"{self.path} holds no sample")
        if self.peak > LOUDEST:  # of which no spectrum would be finite
            raise UserError(f"{self.path} holds samples of up to {self.peak:.3g}, which is no sound: full scale is 1")
        full_scale = full_scale_of(self.peak, self.whole, self.beyond / self.values) if self.floats else 1.0
        if full_scale is None:
            raise UserError(f"{self.path} holds floats of up to {self.peak:.4g}, of which cannot be told whether full "
                            "scale is 1, or 32,768 as of 16 bits, or another: divide them by their full scale")
        wav = np.frombuffer(self.held, np.float32)
        if full_scale != 1:
            wav /= full_scale
        return wav, full_scale


class Start(Mono):
    """The first seconds of a recording, whatever its header says of the others."""

    def __init__(self, path, rate, channels, floats, seconds):
        if channels > STRANGERS[0] or rate > STRANGERS[1]:
            raise UserError(f"{path} has {channels} channels at {rate:,} Hz: at most {STRANGERS[0]} at "
                            f"{STRANGERS[1]:,} Hz can be read")
        super().__init__(path, rate, channels, floats)
        self.wanted = round(seconds * rate)

    @property
    def full(self):
        return self.samples >= self.wanted

    def add(self, block):
        super().add(block[:self.wanted - self.samples])


HOT = 8.0  # +18 dB: mixes that were not limited go so far, and are left as they are
QUIET = 128.0  # -48 dB of 16 bits: recordings on an integer scale have higher peaks
OVERSHOOT = 1.5  # how far above full scale resampled integers get
LOUDEST = OVERSHOOT * SCALES[-1]


def full_scale_of(peak, whole, beyond):
    """Full scale of a recording of floats: 1.0, 2.0**15, 2.0**23, 2.0**31, or None where it cannot be told.

    peak: the largest magnitude. whole: whether all samples are integers. beyond: the share of samples above HOT.

    Up to HOT it is 1, but not of integers of 2 and more, which are next to silence on some other scale. Between HOT and
    QUIET anything could be meant. Above, it is a scale of integers that the peak comes to within a range that leaves
    the others out, 30 dB below the wider ones; and some samples besides the peak have to say so, if they are not
    integers: one broken sample is no scale.
    """
    if peak <= 1 or peak <= HOT and not whole:
        return 1.0
    for scale, least in zip(SCALES, (QUIET, SCALES[1] / 32, SCALES[2] / 32)):
        if least < peak <= OVERSHOOT * scale and (whole or beyond > 0.01):
            return scale
    return None


def decode(path, file, make):
    """The Mono of an open file, by libsndfile or PyAV. make: a function from its path, rate, number of channels and
    whether it holds floats to an empty one. Raises UserError where it is cut off, or neither reads it."""
    import soundfile

    ending = Path(path).suffix.lower()
    if ending in PYAV_ENDINGS and not (av := pyav()):
        raise UserError(f"cannot read {path}: {ending} needs PyAV, which is not installed: {TO_INSTALL}, or convert "
                        "it to wav or flac")
    source, stated = look(path, file)
    if ending in PYAV_ENDINGS:  # at once, as mpg123, which is in libsndfile, takes AAC for a broken mp3
        return by_pyav(av, path, file, make)
    try:
        sound = soundfile.SoundFile(source or os.fsencode(path))  # the name may be no UTF-8
    except (soundfile.LibsndfileError, ValueError, TypeError) as e:
        why = getattr(e, "error_string", str(e)) or "it is damaged"
        why = "Format not recognised." if "not a regular file" in why else why  # mpg123 of what is no mp3
    else:
        with sound:
            if sound.format != "RAW":  # which libsndfile takes anything for that is named .au, .snd, .vox or .gsm
                return by_libsndfile(path, sound, stated, make)
        why = "Format not recognised."
    if not (av := pyav()):
        raise UserError(f"cannot read {path}: {why.rstrip('.')}; PyAV, which reads more kinds, is not installed: "
                        f"{TO_INSTALL}")
    try:
        return by_pyav(av, path, file, make)
    except Unreadable:
        raise UserError(f"cannot read {path}: {why}") from None


def pyav():
    """The module av, or None where it is not installed. It is loaded where it is needed: it takes 0.2 s."""
    try:
        import av
    except ImportError:
        return None
    return av


class Unreadable(UserError):
    """PyAV does not know what a file is."""


def by_libsndfile(path, sound, stated, make):
    """The Mono of an open SoundFile. stated: whether its number of frames is to be believed."""
    import soundfile

    mono = make(path, sound.samplerate, sound.channels, sound.subtype in ("FLOAT", "DOUBLE"))
    stated = stated and sound.frames < 2**62  # which stands for unknown
    if stated:
        mono.expect(sound.frames)
    with suppress(soundfile.LibsndfileError):
        sound.seek(0)  # as soundfile.read does: mpg123 rounds mono in another way after it
    sound.seekable = lambda: False  # after each read soundfile would seek, which resets decoders and fails at some ends
    size = max(1, BLOCK // sound.channels)
    block = np.empty((min(size, max(sound.frames, 1)), sound.channels), np.float32)
    try:
        while len(some := sound.read(out=block)):
            mono.add(some)
            if mono.samples == sound.frames or mono.full:
                break
    except (soundfile.LibsndfileError, ValueError) as e:
        why = getattr(e, "error_string", str(e)).strip(". ")
        raise UserError(f"cannot read {path}: it is cut off or damaged ({why})") from None
    # where mp3 has no count of the samples that pad its last frame, it ends up to a frame before what is promised
    if stated and not mono.full and mono.samples < sound.frames - (1152 if sound.format == "MP3" else 0):
        raise UserError(f"cannot read {path}: {CUT}")
    return mono


def by_pyav(av, path, file, make):
    """The Mono of an open file, by FFmpeg's libraries. Raises Unreadable where they do not know it."""
    whole = Behind(b"", file, 0, os.fstat(file.fileno()).st_size)
    try:
        container = av.open(whole, metadata_errors="ignore", options={"format_whitelist": PYAV_FORMATS})
    except (av.FFmpegError, ValueError) as e:
        raise Unreadable(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    with container:
        if not (stream := container.streams.best("audio")) or not stream.codec_context:
            raise Unreadable(f"cannot read {path}: it holds no sound that can be decoded")
        context = stream.codec_context
        mono = make(path, stream.rate or 0, context.layout.nb_channels, context.name.startswith("pcm_f"))
        seconds = 0
        if container.format.name in STATE_LENGTH:  # of others FFmpeg estimates it
            if stream.duration:
                seconds = float(stream.duration * stream.time_base)
            elif container.duration and len(container.streams) == 1:
                seconds = container.duration / av.time_base
        mono.expect(seconds * mono.rate)
        try:
            for frame in container.decode(stream):
                if frame.sample_rate != mono.rate:
                    raise UserError(f"cannot read {path}: its sample rate changes from {mono.rate} to "
                                    f"{frame.sample_rate} Hz")
                values, channels = frame.to_ndarray(), frame.layout.nb_channels
                values = values.T if frame.format.is_planar else values.reshape(-1, channels)
                middle = 128 if values.dtype == np.uint8 else 0
                full = 1 if values.dtype.kind == "f" else 2.0 ** (8 * values.dtype.itemsize - 1)
                mono.add((np.ascontiguousarray(values, np.float32) - middle) / np.float32(full))
                if mono.full:
                    return mono
        except (av.FFmpegError, ValueError) as e:
            raise UserError(f"cannot read {path}: it is cut off or damaged ({getattr(e, 'strerror', None) or e})"
                            ) from None
        if mono.samples < (seconds - 0.25) * mono.rate:  # delays of codecs, which some count in, are less
            raise UserError(f"cannot read {path}: {CUT}")
    return mono
