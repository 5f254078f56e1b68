"""A Hugging Face tokenizer.json, read without the transformers library: no network, no code from the folder.

Special tokens are never added by themselves; each policy writes its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding
from tokenizers import Tokenizer as RawTokenizer

from manyhands.errors import Corrupt, InvalidInput, NotFound

TOKENIZER_FILE = "tokenizer.json"


class Encoded:
    """A text's tokens."""

    def __init__(self, raw: Encoding) -> None:
        self._raw = raw

    @property
    def ids(self) -> list[int]:
        """The tokens as numbers."""
        ids: list[int] = self._raw.ids
        return ids

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """(l,) int64."""
        return np.asarray(self.ids, dtype=np.int64)

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """(l, 2) int64, the characters [begin, end) a token stands for. Made when asked for: it costs as much as the tokens,
        and only prompts with targets need it."""
        return np.asarray(self._raw.offsets, dtype=np.int64).reshape(-1, 2)


class Tokenizer:
    """Attributes:
    vocabulary: Entries of the base vocabulary, V; tokens added on top do not count.
    num_ids: All ids are below it, those of added tokens too.
    """

    def __init__(self, raw: RawTokenizer, added: Sequence[str] = ()) -> None:
        """added: Strings that must be one token each; they get the ids the vocabulary has for them."""
        self._raw = raw
        if added:
            raw.add_tokens(list(added))
        self.vocabulary = raw.get_vocab_size(with_added_tokens=False)
        self.num_ids = 1 + max(raw.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def load(cls, folder: Path, added: Sequence[str] = ()) -> Tokenizer:
        """Raises NotFound, or Corrupt for a file that cannot be read."""
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise NotFound(f"{path} is not there; a tokenizer is a folder with {TOKENIZER_FILE}", field="tokenizer")
        return cls.parse(path.read_bytes(), added, source=str(path))

    @classmethod
    def parse(cls, content: bytes, added: Sequence[str] = (), *, source: str) -> Tokenizer:
        """Of a tokenizer.json; Corrupt, naming source, where it is none."""
        try:
            return cls(RawTokenizer.from_buffer(content), added)
        except Exception as error:  # The library raises nothing narrower.
            raise Corrupt(f"{source} is no tokenizer: {error}", field="tokenizer") from None

    def encode(self, text: str) -> Encoded:
        return Encoded(self._raw.encode(text, add_special_tokens=False))

    def decode(self, tokens: Iterable[int], *, with_special: bool = False) -> str:
        text: str = self._raw.decode(list(tokens), skip_special_tokens=not with_special)
        return text

    def id_of(self, token: str) -> int:
        """InvalidInput if the vocabulary lacks it."""
        found = self._raw.token_to_id(token)
        if found is None:
            raise InvalidInput(f"has no token {token!r}; this is another model's tokenizer", field="tokenizer")
        return int(found)
