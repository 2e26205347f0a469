"""Texts as models read them: lines of files, bytes, states of a frozen encoder."""

import hashlib
import json
import re
import shutil
import unicodedata
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from trivox.common import UserError
from trivox.espeak import phonemes
from trivox.files import lines_of, padded, whole_file
from trivox.weights import pretrained, weight_files


def numbered_lines(path, limit=None):
    """The lines of a text file that are not blank: [(number, line)]. Raises UserError where the file is missing or has
    none, and names the line that is no UTF-8 or has more than `limit` bytes."""
    lines = [(number, line) for number, line in enumerate(map(str.strip, lines_of(Path(path))), 1) if line]
    for number, line in lines:
        if limit and (size := len(line.encode())) > limit:
            raise UserError(f"line {number} of {path} has {size} bytes; the text encoder reads {limit}: break it up")
    if not lines:
        raise UserError(f"{path} has no line of text")
    return lines


def read_lines(path, limit=None):
    """The same lines alone."""
    return [line for _, line in numbered_lines(path, limit)]


# ------------------------------------------------------------------------------------------------------------
# Bytes and states, for the flow TTS and the codec LM

MAX_TEXT_BYTES = 256  # what the text encoder reads


def text_ids(text):
    """Byte ids as ByT5 numbers them (Xue et al., 2022): UTF-8 bytes + 3, then end-of-text 1; 0 is padding."""
    return [byte + 3 for byte in text.encode()] + [1]


class TextFeatures:
    """Texts to what a model reads of them: byte ids (B, L) int64, or a frozen ByT5's hidden states (B, L, E) float32.

    encoder: "bytes", or a ByT5 of the hub or of a local folder. `fill_cache` keeps states in a file; the states of any
    other text are computed when they are asked for. phonemes: a voice of espeak-ng, whose phonemes of a text are read
    instead of its letters; then calling this raises UserError for a text that the voice cannot say.
    """

    def __init__(self, encoder, device="cpu", phonemes=""):
        self.encoder, self.device, self.phonemes = encoder, device, phonemes
        self.states, self.spans = None, {}  # the cache: (bytes of all texts, E) float16, and {text: (start, end)} in it

    def __call__(self, texts, multiple=1):
        """Returns (features, their number of steps padded to a multiple of `multiple`; lengths (B,))."""
        features, length = self.stored(texts, multiple)
        return features.float() if features.is_floating_point() else features, length

    def stored(self, texts, multiple=1):
        """The same, but float16 where states are kept so."""
        if self.encoder == "bytes":
            items = [np.array(text_ids(phonemes(text, self.phonemes) if self.phonemes else text)) for text in texts]
        elif all(text in self.spans for text in texts):
            items = [self.states[slice(*self.spans[text])] for text in texts]
        else:
            items = [states.numpy() for states in self.encode(texts)]
        length = [len(item) for item in items]
        return padded(items, -(-max(length) // multiple) * multiple), torch.tensor(length)

    @torch.inference_mode()
    def encode(self, texts):
        """The frozen encoder's states, a list of (L, E) float32 on the CPU."""
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text_ids(t)) for t in texts], batch_first=True)
        states = self.byt5(input_ids=ids.to(self.device), attention_mask=(ids != 0).to(self.device)).last_hidden_state
        return [s[:n].float().cpu() for s, n in zip(states, (ids != 0).sum(1).tolist())]

    @cached_property
    def byt5(self):
        from transformers import T5EncoderModel

        encoder = pretrained(T5EncoderModel.from_pretrained, self.encoder, f"the text encoder {self.encoder}",
                             "config.json and the weights (1.2 GB)")
        return encoder.eval().to(self.device)

    def unread(self, text):
        """The symbols of a text that the voice of `phonemes` has no sound for, each once: a string."""
        some = [c for c in dict.fromkeys(text) if not c.isascii() and unicodedata.category(c)[0] == "S"]
        return "".join(c for c in some if not phonemes(c, self.phonemes).strip())

    def tell_language(self, language):
        """Say where the voice of `phonemes` is of another language than the texts are."""
        names = {"cmn": "zh", "nb": "no"}  # one language, two codes
        voice, language = (names.get(code, code) for code in (re.split("[-+]", self.phonemes)[0], language))
        if self.phonemes and voice != language:
            print(f"note: texts in {language} are read in the phonemes of espeak-ng's voice {self.phonemes}: another "
                  "--phonemes, such as de, reads them in those of theirs")

    def check(self, folder, texts):
        """Raises UserError where the voice of `phonemes` cannot say all texts of the data set in `folder`."""
        phonemes("a", self.phonemes)  # of an unknown voice, that is said alone
        unsaid = []
        for text in tqdm(dict.fromkeys(texts), "phonemes", leave=False):
            try:
                phonemes(text, self.phonemes)
            except UserError as e:
                unsaid.append(e)
        if unsaid:
            raise UserError(f"{len(unsaid)} of the texts of {folder} have no phonemes; of the first it is said: "
                            f"{unsaid[0]}; take these clips out of the corpus and prepare it anew, or train on "
                            "letters: --phonemes ''")

    def fill_cache(self, folder, texts, mode, write, width):
        """Keep the states of all `texts` and of the empty one in `folder`, unless the encoder is "bytes". Raises
        UserError where they are not `width` wide, and for a text that the voice of `phonemes` cannot say.

        mode: "on", "off", or "auto" for where they take at most half of the free disk. `write` is true in the one
        process that computes and writes them; the others call this after it, with false.
        """
        if self.phonemes:
            self.check(folder, texts)
        if self.encoder == "bytes" or mode == "off":
            return
        texts = sorted({"", *texts}, key=lambda t: (len(t.encode()), t))
        ends = np.cumsum([len(text_ids(t)) for t in texts])
        files = weight_files(self.encoder)
        made_of = [self.encoder, texts] + ([width, files] if files else [])
        path = Path(folder) / f"text_{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]}.f16"
        size = int(ends[-1]) * width * 2
        if write and not (path.exists() and path.stat().st_size == size):
            if path.exists():
                print(f"note: {path} has {path.stat().st_size:,} bytes instead of {size:,}, and is not used")
            if (found := self.byt5.config.d_model) != width:
                raise UserError(f"the states of {self.encoder} are {found} wide, but the config asks for {width}: "
                                f"--byt5_width {found}")
            free = shutil.disk_usage(folder).free
            keep = mode == "on" or size < free / 2
            print(f"states of {self.encoder} for {len(texts):,} texts: {size / 1e9:.2f} GB, {free / 1e9:.1f} GB free; "
                  f"{'kept in ' + str(path) if keep else 'computed anew at each step'}")
            if not keep:
                return
            with whole_file(path) as file:
                for i in tqdm(range(0, len(texts), 32), "text states", leave=False):  # sorted, so with little padding
                    for text, states in zip(texts[i:], self.encode(texts[i:i + 32])):
                        if not states.half().isfinite().all():
                            raise UserError(f"the states of {self.encoder} for {text!r} are not finite in float16: "
                                            "take --cache_text off, or leave that text out")
                        file.write(states.half().numpy().tobytes())
        if path.exists() and path.stat().st_size == size:
            self.states = np.asarray(np.memmap(path, np.float16, "r")).reshape(-1, width)
            self.spans = {t: (end - len(text_ids(t)), end) for t, end in zip(texts, ends.tolist())}
