"""recordings.py and headers.py against PyAV, scipy and closed forms: every kind of file, streams, cuts, full scale."""

import io
import os
import struct
import sys
import tracemalloc

import librosa
import numpy as np
import pytest
import soundfile
from conftest import refusal
from helpers import muxed, tone
from scipy.io import wavfile

from trivox.audio import MelConfig, log_mel
from trivox.common import UserError
from trivox.recordings import PYAV_ENDINGS, SNDFILE_ENDINGS, rate_of, read_recording, read_start, read_wav, write_wav
from trivox.synthesisers import speak_espeak as speak


@pytest.fixture(scope="module")
def speech():
    return speak("The captain painted seven wooden boxes yesterday.")


@pytest.fixture
def av():
    return pytest.importorskip("av", reason="no av: pip install --no-deps -r requirements-extra.txt")


def sine(hertz, rate, seconds=0.5):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def pitch(wav, rate):
    """The frequency of the strongest partial, to a fraction of a Hz."""
    spectrum = np.abs(np.fft.rfft(wav * np.hanning(len(wav)), 16 * len(wav)))
    return spectrum.argmax() * rate / (16 * len(wav))


def no(path, **limits):
    """Why a recording is refused, with the file's name in it."""
    return refusal(lambda argv: read_wav(path, 22050, **limits))


def encoded(wav, rate, form, subtype=None):
    soundfile.write(content := io.BytesIO(), wav, rate, format=form, subtype=subtype)
    return content.getvalue()


# ------------------------------------------------------------------------------------------------------------
# What is read

@pytest.mark.parametrize("ending, rate, channels", [("wav", 22050, 1), ("flac", 44100, 2), ("mp3", 44100, 1),
                                                    ("ogg", 48000, 2), ("wav", 8000, 1)])
def test_any_file_at_any_rate(tmp_path, ending, rate, channels):
    """A tone keeps its pitch, its loudness and its length. Its second channel is silent: mono is the mean of both."""
    tone = sine(440, rate, 1.0)
    soundfile.write(tmp_path / f"a.{ending}", np.stack([tone, 0 * tone][:channels], 1), rate)
    wav = read_wav(tmp_path / f"a.{ending}", 22050)
    assert wav.dtype == np.float32 and wav.ndim == 1 and abs(len(wav) - 22050) <= 1
    assert abs(pitch(wav, 22050) - 440) < 0.5
    assert wav[2000:-2000].std() == pytest.approx(tone.std() / channels, rel=0.02)


def test_wav_round_trip(tmp_path):
    """To half a 16-bit step; what is too loud is clipped instead of wrapping round."""
    wav = np.array([0, 0.5, -0.5, 1.5, -1.5], np.float32)
    write_wav(tmp_path / "new folder" / "a.wav", wav, 22050)
    np.testing.assert_allclose(read_wav(tmp_path / "new folder" / "a.wav", 22050), wav.clip(-1, 1), atol=1.01 / 32768)


@pytest.mark.parametrize("ending", ["wav", "flac"])
@pytest.mark.parametrize("keep", [0, 20, 0.5, 0.98], ids=["emptied", "cut in its head", "half", "cut near its end"])
def test_truncated_files(tmp_path, speech, ending, keep):
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, speech, 22050)
    whole = path.read_bytes()
    path.write_bytes(whole[:keep if keep > 1 else int(keep * len(whole))])
    assert str(path) in no(path)


@pytest.mark.parametrize("content, reason", [
    (np.zeros(0), "no sample"), ([0, np.nan, 0.1], "not numbers"), ([0, np.inf, 0.1], "not numbers"),
    ([0, 3e38, 0], "no sound"), (b"RIFF of the Seine", "cannot read"), (None, "no such file"),
], ids=["empty", "nan", "inf", "too loud for any spectrum", "no audio", "missing"])
def test_unusable_files(tmp_path, content, reason):
    path = tmp_path / "a.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, np.asarray(content), 22050, subtype="FLOAT")
    said = no(path)
    assert reason in said and str(path) in said


@pytest.mark.parametrize("rate", [1, 999, 1000, 1_000_000, 1_000_001])
def test_rates(tmp_path, rate):
    """Beyond any recording's the header is damaged, and resampling would take any memory."""
    soundfile.write(tmp_path / "a.wav", tone(0.01), rate)
    if 1000 <= rate <= 1_000_000:
        seconds = soundfile.info(tmp_path / "a.wav").duration
        assert len(read_wav(tmp_path / "a.wav", 22050)) == pytest.approx(seconds * 22050, abs=1)
    else:
        assert f"a.wav has a sample rate of {rate} Hz" in no(tmp_path / "a.wav")


def test_a_name_that_is_no_utf8(tmp_path, speech):
    path = tmp_path / os.fsdecode(b"a\xe9.wav")
    write_wav(path, speech, 22050)
    assert len(read_wav(path, 22050)) == len(speech)


@pytest.mark.parametrize("peak", [1.0, 1e9])
def test_what_is_read_has_a_finite_log_mel(tmp_path, peak):
    soundfile.write(tmp_path / "a.wav", np.tile([peak, -peak], 4000), 22050, subtype="FLOAT")
    assert log_mel(read_wav(tmp_path / "a.wav", 22050), MelConfig()).half().isfinite().all()



@pytest.mark.parametrize("form, subtype, rate, channels", [
    ("WAV", "PCM_16", 22050, 1), ("WAV", "PCM_24", 44100, 2), ("WAV", "FLOAT", 44100, 3), ("FLAC", "PCM_16", 44100, 2),
    ("MP3", None, 22050, 1), ("OGG", "VORBIS", 44100, 2)])
def test_blocks_are_the_whole(tmp_path, form, subtype, rate, channels):
    """To the bit what libsndfile reads at once, the mean of its channels, resampled by librosa: longer than a block."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (300_000 // channels, channels))
    (tmp_path / "a.wav").write_bytes(encoded(noise, rate, form, subtype))
    whole = soundfile.read(tmp_path / "a.wav", dtype="float32", always_2d=True)[0].mean(1)
    np.testing.assert_array_equal(read_wav(tmp_path / "a.wav", rate), whole)
    if form == "WAV":
        np.testing.assert_array_equal(read_wav(tmp_path / "a.wav", 16000),
                                      librosa.resample(whole, orig_sr=rate, target_sr=16000))


FORMS = {"aif": "AIFF", "aifc": "AIFF", "oga": "OGG", "snd": "AU", "wave": "WAV", "sph": "NIST", "8svx": "SVX",
         "sf": "IRCAM"}


@pytest.mark.parametrize("ending", SNDFILE_ENDINGS)
def test_every_ending_of_libsndfile(tmp_path, ending):
    """In capitals; without PyAV."""
    form = FORMS.get(ending[1:], ending[1:].upper())
    form, subtype = ("OGG", "OPUS") if form == "OPUS" else (form, None)
    path = tmp_path / f"A{ending.upper()}"
    path.write_bytes(encoded(sine(440, 48000), 48000, form, subtype))
    assert abs(pitch(read_wav(path, 48000), 48000) - 440) < 1


MUXED = {"m4a": ("ipod", "aac"), "mp4": ("mp4", "alac"), "aac": ("adts", "aac"), "webm": ("webm", "libopus"),
         "mka": ("matroska", "flac"), "ac3": ("ac3", "ac3"), "mp2": ("mp2", "mp2"), "wv": ("wv", "wavpack"),
         "tta": ("tta", "tta"), "mov": ("mov", "pcm_s24le"), "wav": ("wav", "adpcm_g726"), "mp3": ("ipod", "aac")}


@pytest.mark.parametrize("ending", MUXED)
def test_what_only_ffmpeg_reads(tmp_path, ending, av):
    """Files of other endings, and of libsndfile's that are something else. A second is a second, but for delays."""
    rate = 8000 if ending == "wav" else 48000
    path = tmp_path / f"a.{ending}"
    path.write_bytes(muxed(av, sine(440, rate, 1.0), rate, *MUXED[ending]))
    wav = read_wav(path, rate)
    assert wav.dtype == np.float32 and abs(len(wav) / rate - 1) < 0.06 and abs(pitch(wav, rate) - 440) < 1
    assert wav[2000:-4000].std() == pytest.approx(0.5 / 2 ** 0.5, rel=0.02)


@pytest.mark.parametrize("ending", PYAV_ENDINGS)
def test_what_to_install(tmp_path, ending, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / f"a{ending}").write_bytes(b"something")
    said = no(tmp_path / f"a{ending}")
    assert f"{ending} needs PyAV" in said and "requirements-extra.txt" in said and "convert" in said


@pytest.mark.parametrize("content", [b"#EXTM3U\n#EXTINF:3,\nhttp://127.0.0.1:9/a.ts\n",
                                     b"ffconcat version 1.0\nfile a.wav\n", bytes(range(256)) * 20])
@pytest.mark.parametrize("ending", ["wav", "m4a", "mp3", "au"])
def test_what_is_no_recording(tmp_path, content, ending, av):
    """Playlists are not followed, and nothing is taken for samples without a header."""
    write_wav(tmp_path / "a.wav", tone(0.1), 22050)
    (tmp_path / f"b.{ending}").write_bytes(content)
    assert "cannot read" in no(tmp_path / f"b.{ending}")


# ------------------------------------------------------------------------------------------------------------
# Streams, cuts and length

def field(content, mark, skip, number, form):
    """The content with another number, `skip` bytes after a mark."""
    content = bytearray(content)
    struct.pack_into(form, content, content.rindex(mark) + skip, number)
    return bytes(content)


RIFF = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # the end of Wave64's names of chunks


@pytest.mark.parametrize("form, mark, skip, coded, sizes", [
    ("WAV", b"data", 4, "<I", [0, 2**32 - 1, 2**31 - 1, 2**31, 0x7FFFF000, 0x7FFFEFFE, 2**31 - 45, 2**32 - 37]),
    ("AU", b".snd", 8, ">I", [0, 2**32 - 1, 0x7FFFFFFF]), ("AIFF", b"SSND", 4, ">I", [0, 8, 0x7F000008, 2**32 - 1]),
    ("W64", b"data" + RIFF, 16, "<Q", [0, 24, 2**63 - 1, 2**64 - 1]),
    ("RF64", b"ds64", 16, "<Q", [0, 2**63, 2**64 - 1]), ("CAF", b"data", 4, ">Q", [0, 4, 2**64 - 1])])
def test_streams_are_read_to_their_end(tmp_path, form, mark, skip, coded, sizes):
    """Whatever a writer has put for a length that it did not know. One that was known is kept to."""
    whole = encoded(tone(0.3), 22050, form, "PCM_16")
    path, wav = tmp_path / "a.wav", np.round(tone(0.3) * 32768) / 32768
    for size in sizes:
        path.write_bytes(field(whole, mark, skip, size, coded))
        np.testing.assert_allclose(read_wav(path, 22050), wav, atol=1.01 / 32768, err_msg=hex(size))
        assert "0.3 s are more than 0.2 s" in no(path, max_seconds=0.2)
    path.write_bytes(whole[:-2])
    assert "a.wav: it is cut off, its header promises more samples than it holds" in no(path)


@pytest.mark.parametrize("form, codec", [("wav", "pcm_s16le"), ("flac", "flac"), ("mp3", "libmp3lame"),
                                         ("caf", "pcm_s16be"), ("ogg", "libopus"), ("matroska", "flac"),
                                         ("w64", "pcm_f32le")])
def test_what_ffmpeg_writes_into_a_pipe(tmp_path, form, codec, av):
    wav = tone(0.6)
    path = tmp_path / ("a.mka" if form == "matroska" else f"a.{form}")
    path.write_bytes(muxed(av, wav, 48000, form, codec, live=True))
    assert abs(len(read_wav(path, 48000)) - len(wav)) <= (3000 if form == "mp3" else 0)  # it has no count of padding


def test_an_empty_wav_is_no_stream(tmp_path):
    """Its length is 0, and what follows are chunks."""
    whole = encoded(tone(0.1), 22050, "WAV", "PCM_16")
    (tmp_path / "a.wav").write_bytes(whole[:40] + bytes(4) + b"LIST" + struct.pack("<I", 4) + b"INFO")
    assert "holds no sample" in no(tmp_path / "a.wav")


def test_mp3_of_which_nothing_tells_the_length(tmp_path):
    """Loud and then silent, at a variable rate, it is estimated at a half of its length, and read to its end."""
    wav = np.r_[np.random.default_rng(0).uniform(-0.5, 0.5, 22050), np.zeros(66150)].astype(np.float32)
    whole = encoded(wav, 44100, "MP3")
    second = whole.index(whole[:2], 4)  # frame: Xing's is the first
    (tmp_path / "a.mp3").write_bytes(whole[second:])
    assert abs(len(read_wav(tmp_path / "a.mp3", 44100)) - len(wav)) < 3 * 1152
    assert "are more than 1.0 s" in no(tmp_path / "a.mp3", max_seconds=1.0)


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("form, codec", [("mp3", None), ("ogg", None), ("opus", None), ("nist", None), ("m4a", "ipod"),
                                         ("mp4", "mp4"), ("webm", "webm"), ("mka", "matroska"), ("flac", None)])
def test_cuts(tmp_path, form, codec, keep, av, speech):
    """A file that promises more than there is, in whatever way its kind does so."""
    if codec:
        whole = muxed(av, speech, 48000, codec, "libopus" if form == "webm" else "aac")
    else:
        whole = encoded(speech, 24000, *{"opus": ("OGG", "OPUS")}.get(form, (form.upper(), None)))
    path = tmp_path / f"a.{form}"
    path.write_bytes(whole)
    assert len(read_wav(path, 16000))
    path.write_bytes(whole[:int(keep * len(whole))])
    assert "cut off" in no(path)


@pytest.mark.parametrize("form, seconds", [("WAV", 600), ("FLAC", 100), ("MP3", 100), ("unknown FLAC", 100)])
def test_a_long_one_is_refused_before_it_is_read(tmp_path, form, seconds):
    content = encoded(np.zeros(8000 * seconds), 8000, form.split()[-1])
    if "unknown" in form:  # 36 bits say how many samples
        content = content[:21] + bytes([content[21] & 0xF0]) + bytes(4) + content[26:]
    (tmp_path / "a.wav").write_bytes(content)
    del content
    tracemalloc.start()
    said = no(tmp_path / "a.wav", max_seconds=10)
    assert tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()
    assert "s are more than 10.0 s" in said and ("at least" in said) == ("unknown" in form)
    assert len(read_wav(tmp_path / "a.wav", 8000, seconds)) == 8000 * seconds


@pytest.mark.parametrize("form, codec", [("wav", None), ("flac", None), ("mp3", None), ("ogg", None), ("m4a", "aac"),
                                         ("webm", "libopus"), ("mka", "flac"), ("live webm", "libopus")])
def test_the_start_of_a_recording(tmp_path, form, codec, av):
    """It is what a whole reading begins with, or all of a shorter one; and of an hour no more is held."""
    live, ending = form.startswith("live"), form.split()[-1]
    wav = np.tile(tone(1.0), 60)
    muxer = {"m4a": "ipod", "mka": "matroska"}.get(ending, ending)
    content = (muxed(av, wav, 48000, muxer, codec, live) if codec else encoded(wav, 48000, form.upper()))
    (path := tmp_path / f"a.{ending}").write_bytes(content)
    whole = read_wav(path, 48000)
    assert rate_of(path) == 48000
    tracemalloc.start()
    start, full_scale = read_start(path, 48000, 2)
    assert tracemalloc.get_traced_memory()[1] < 8e6 < whole.nbytes + 4e6
    tracemalloc.stop()
    assert full_scale == 1 and np.array_equal(start, whole[:96000])
    assert np.array_equal(read_start(path, 48000, 600)[0], whole)
    assert abs(len(read_start(path, 16000, 2)[0]) - 32000) <= 1


def test_what_a_stranger_may_not_send(tmp_path, av):
    for name, wav, rate in (("a.wav", np.zeros((100, 9)), 16000), ("b.wav", np.zeros(100), 192_001),
                            ("c.ogg", np.zeros((1000, 12)), 16000)):
        soundfile.write(tmp_path / name, wav, rate)
        with pytest.raises(UserError, match="at most 8 at 192,000 Hz can be read"):
            read_start(tmp_path / name, 16000, 1)
    soundfile.write(tmp_path / "d.wav", np.zeros((100, 8)), 192_000)
    assert len(read_start(tmp_path / "d.wav", 192_000, 1)[0]) == 100
    (tmp_path / "e.m4a").write_bytes(muxed(av, tone(1.0), 48000, "ipod", "aac")[:-900])
    with pytest.raises(UserError, match="cut off"):
        read_start(tmp_path / "e.m4a", 16000, 600)


# ------------------------------------------------------------------------------------------------------------
# Full scale

@pytest.mark.parametrize("scale", [1, 2**15, 2**23, 2**31])
@pytest.mark.parametrize("loud", [1.0, 0.05], ids=["loud", "quiet"])
@pytest.mark.parametrize("channels", [1, 2])
def test_full_scale(tmp_path, capsys, speech, scale, loud, channels):
    """scipy writes integers as floats; they are read as the same sound in [-1, 1], and it is said."""
    wav = loud * speech[:22050] / np.abs(speech[:22050]).max()
    if scale == 2**15:
        wav = np.round(wav * scale) / scale
    wavfile.write(tmp_path / "a.wav", 22050, np.stack([wav * scale] * channels, 1).astype(np.float32))
    read, full_scale = read_recording(tmp_path / "a.wav", 22050)
    assert full_scale == scale
    np.testing.assert_allclose(read, wav, atol=1e-6)
    read_wav(tmp_path / "a.wav", 22050)
    assert (f"a.wav holds floats on a scale of ±{scale:,}" in capsys.readouterr().out) == (scale > 1)


@pytest.mark.parametrize("peak, full_scale", [(1.01, 1), (4, 1), (7.9, 1), (300, 2**15), (40_000, 2**15)])
def test_floats_that_are_no_integers(tmp_path, peak, full_scale):
    """Mixes that were not limited stay as they are; integers that were resampled go beyond their full scale."""
    wavfile.write(tmp_path / "a.wav", 22050, (peak * sine(440, 22050) / 0.5).astype(np.float32))
    read, found = read_recording(tmp_path / "a.wav", 22050)
    assert found == full_scale and np.abs(read).max() == pytest.approx(peak / full_scale, rel=1e-3)


@pytest.mark.parametrize("wav", [sine(440, 22050) * 50, sine(440, 22050) * 2e5, np.round(sine(440, 22050) * 6),
                                 np.r_[sine(440, 22050), 500.5]],
                         ids=["between", "16 or 24 bits", "next to silence", "one broken sample"])
def test_full_scale_that_cannot_be_told(tmp_path, wav):
    wavfile.write(tmp_path / "a.wav", 22050, wav.astype(np.float32))
    assert "a.wav holds floats of up to" in no(tmp_path / "a.wav")
