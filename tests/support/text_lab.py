"""Small tokenizers: one token a byte, and the special tokens of the real ones."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from policies.prompts.locations import LOCATION_TOKENS
from policies.prompts.pi052 import paligemma
from policies.prompts.tokenizer import Tokenizer as PolicyTokenizer

PI_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
SMOL_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<global-img>",
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
)


def bytes_tokenizer(special: tuple[str, ...], more: tuple[str, ...] = ()) -> Tokenizer:
    entries = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *more]
    raw = Tokenizer(models.BPE(vocab={entry: index for index, entry in enumerate(entries)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return raw


def pi_tokenizer() -> PolicyTokenizer:
    return paligemma(bytes_tokenizer(PI_SPECIAL, (*LOCATION_TOKENS, *(f"unused {i}" for i in range(3000)))))


def smol_tokenizer() -> PolicyTokenizer:
    return PolicyTokenizer(bytes_tokenizer(SMOL_SPECIAL))
