"""transcripts.py: a folder of recordings gets its list, by a stand-in of Whisper, whatever happens meanwhile."""

import pytest
import soundfile
from helpers import tone

from trivox import files, transcripts
from trivox.corpora import read_corpus
from trivox.recordings import write_wav


def test_transcripts_of_bare_recordings(tmp_path, monkeypatch, capsys):
    """Every recording in its line but for one that is damaged, which is told; what would break a line is no part of a
    text. Killed half-way it goes on; what another model heard is heard anew."""
    paths = [tmp_path / "wavs" / f"{n % 3}" / f"{n:03d}.wav" for n in range(40)]
    for n, path in enumerate(paths):
        write_wav(path, tone(0.01 * (n + 1)), 16000)
    (tmp_path / "wavs" / "damaged.wav").write_bytes(b"RIFF")
    left, heard, what = 20, [], "Whisper"

    def hear(wavs, rate):
        if left < len(heard) + len(wavs):
            raise KeyboardInterrupt
        heard.extend(wavs)
        return [f" it lasts|\n {len(wav)} " for wav in wavs]

    monkeypatch.setattr(transcripts, "load_recogniser", lambda name, **kw: (what, hear))
    with pytest.raises(KeyboardInterrupt):
        transcripts.transcribe(tmp_path, tmp_path / "out")
    assert len(heard) == 16 and not (tmp_path / "out" / "metadata.csv").exists()
    left, what = 28, "another"
    with pytest.raises(KeyboardInterrupt):
        transcripts.transcribe(tmp_path, tmp_path / "out")
    left, what, heard = 100, "Whisper", heard[:16]
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(transcripts, "write_whole", lambda path, content: 1 / 0 if path.name == "metadata.csv" else
                      files.write_whole(path, content))
        try:
            transcripts.transcribe(tmp_path, tmp_path / "out")
        except ZeroDivisionError:
            raise KeyboardInterrupt from None
    clips, _ = read_corpus(tmp_path, metadata=transcripts.transcribe(tmp_path, tmp_path / "out"))
    assert {clip["id"]: clip["text"] for clip in clips} == {
        f"{n % 3}/{n:03d}": f"it lasts {soundfile.info(path).frames}" for n, path in enumerate(paths)}
    assert len(heard) == 16 + 40 and "skipped wavs/damaged.wav: cannot read" in capsys.readouterr().out


def test_what_is_new_is_transcribed(tmp_path, monkeypatch, capsys):
    """And nothing else; what was corrected stays. Names that would break a line are told before."""
    heard = []
    monkeypatch.setattr(transcripts, "load_recogniser", lambda name, **kw: (
        "ears", lambda wavs, rate: [heard.append(len(wav)) or f"number {len(heard)}" for wav in wavs]))
    write_wav(tmp_path / "a" / "x.wav", tone(0.1), 16000)
    write_wav(tmp_path / "a" / "odd|name.wav", tone(0.1), 16000)
    list = transcripts.transcribe(tmp_path / "a", tmp_path / "out")
    assert list.read_text() == "x|number 1|number 1\n" and "skipped 'odd|name.wav'" in capsys.readouterr().out
    list.write_text("x|Corrected.|Corrected.\n")
    for _ in range(2):
        write_wav(tmp_path / "a" / "y.wav", tone(0.2), 16000)
        transcripts.transcribe(tmp_path / "a", tmp_path / "out")
        assert list.read_text() == "x|Corrected.|Corrected.\ny|number 2|number 2\n" and len(heard) == 2
