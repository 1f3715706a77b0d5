"""Hugging Face `tokenizers`: load any tokenizer.json; train byte-level BPE (as GPT-2) or WordPiece (as BERT).

    tok = load(Path("gpt2/"))                 bos, eos and pad from the files, or by their usual names
    tok = train(texts, vocab=32_000)          byte-level BPE: decode(encode(text)) == text

A special's name inside a text is text: no document can smuggle in an end of text.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
import json
import re

from etils import epath
import tokenizers as hf

from jaxlm.data import tokenizers
from jaxlm.lookup import Mistake, key

FILE = "tokenizer.json"
LIMIT = 1000  # characters of their own in a WordPiece vocabulary; rarer ones are unknown
BYTES = frozenset(hf.pre_tokenizers.ByteLevel.alphabet())  # how byte-level BPE spells each byte
USUAL = dict(  # by these names when a tokenizer.json comes alone
    bos=("<s>", "<bos>", "[CLS]", "<|begin_of_text|>", "<|endoftext|>"),
    eos=("</s>", "<eos>", "[SEP]", "<|end_of_text|>", "<|endoftext|>"),
    pad=("<pad>", "[PAD]", "<|finetune_right_pad_id|>"),
)


class Tokenizer:
    """A tokenizer.json and which of its tokens begin, end and pad a document."""

    def __init__(self, content: str, bos: str | None, eos: str | None, pad: str | None, add_bos: bool, add_eos: bool):
        self._state = content, bos, eos, pad, add_bos, add_eos
        try:
            self._tokenizer = hf.Tokenizer.from_str(content)
        except Exception as e:  # the library raises nothing narrower
            raise Mistake(f"not a Hugging Face tokenizer.json: {e}") from e
        self._tokenizer.encode_special_tokens = True  # a special's name in a text is text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab: int = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in sorted(added.items()) if token.special}
        self.bos, self.eos, self.pad = map(self._special, (bos, eos, pad))
        self.add_bos, self.add_eos = add_bos and self.bos is not None, add_eos and self.eos is not None
        self.fingerprint = tokenizers.fingerprint(*self._state)
        self._bytewise = "ByteLevel" in repr(self._tokenizer.decoder)

    def __reduce__(self):
        return Tokenizer, self._state

    def _special(self, name: str | None) -> int | None:
        if name is None:
            return None
        if (token := self._tokenizer.token_to_id(name)) is None:
            raise Mistake(f"the tokenizer has no token {name!r}")
        return token

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def pieces(self) -> list[str]:
        whole, special = json.loads(self._state[0]), set(self.specials.values())
        inside = whole["model"].get("continuing_subword_prefix") if whole["model"]["type"] == "WordPiece" else None
        bytewise = hf.decoders.ByteLevel() if self._bytewise else None

        def text(i: int) -> str:
            token = self._tokenizer.id_to_token(i) or ""
            if i in special or not token:
                return ""
            if inside is not None:  # a piece begins a word unless it says otherwise
                return token.removeprefix(inside) if token.startswith(inside) else f" {token}"
            return bytewise.decode([token]) if bytewise else token.replace("\u2581", " ")

        return [text(i) for i in range(self.vocab)]

    def size(self, token: int) -> int:
        piece = self._tokenizer.id_to_token(token) or ""
        if token not in self.specials.values():
            if self._bytewise and BYTES.issuperset(piece):  # a sign for each byte, also of half a character
                return len(piece)
            if re.fullmatch("<0x[0-9A-F]{2}>", piece):
                return 1
        return len(self.decode([token]).encode())

    def save(self, folder: epath.PathLike) -> None:
        content, *names = self._state
        specials = dict(zip(("bos", "eos", "pad", "add_bos", "add_eos"), names))
        tokenizers.save(self, folder, "huggingface", {FILE: content.encode()}, **specials)


def load(
    path: epath.Path,
    *,
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
    add_bos: bool | None = True,
    add_eos: bool | None = True,
) -> Tokenizer:
    """Load a tokenizer.json or the folder it is in; `add_bos` and `add_eos` of None are what tokenizer.json does.

    A bos or eos that is not named is the special that tokenizer.json puts around a text, else what the
    tokenizer_config.json beside it says, which may be none, else one of the usual names. That config's add_bos_token
    and add_eos_token are of older files and not read: transformers 5 looks at tokenizer.json alone, too.
    """
    file = path / FILE if path.is_dir() else path
    if not file.exists():
        raise Mistake(f"no {FILE} at {path}")
    content, config = file.read_text(), tokenizers.config(file.parent)
    try:
        whole = hf.Tokenizer.from_str(content)
    except Exception as e:
        raise Mistake(f"{file} is not a Hugging Face tokenizer.json: {e}") from e
    before, after = around(whole)
    if max(len(before), len(after)) > 1 and None in (add_bos, add_eos):
        raise Mistake(f"{file} puts {before} before a text and {after} behind it; jaxlm knows one token on either side")

    def name(special: str, given: str | None, added: list[str]) -> str | None:
        if given or added:
            return given or added[0]
        if f"{special}_token" in config:
            return config[f"{special}_token"]
        return next((token for token in USUAL[special] if whole.token_to_id(token) is not None), None)

    return Tokenizer(
        content,
        bos=name("bos", bos, before),
        eos=name("eos", eos, after),
        pad=name("pad", pad, []),
        add_bos=bool(before) if add_bos is None else add_bos,
        add_eos=bool(after) if add_eos is None else add_eos,
    )


def around(whole: hf.Tokenizer) -> tuple[list[str], list[str]]:
    """The names of the specials that a tokenizer's post-processor puts before a single text and behind it."""
    if whole.post_processor is None:
        return [], []
    text = hf.Tokenizer(hf.models.WordLevel({"text": 0}, unk_token="text")).encode("text")
    processed = whole.post_processor.process(text)
    at = processed.special_tokens_mask.index(0)
    return processed.tokens[:at], processed.tokens[at + 1 :]


def train(
    texts: Iterable[str],
    *,
    vocab: int,
    algorithm: str = "bpe",
    lowercase: bool = False,
    sample: int = 50_000_000,
    min_frequency: int = 2,
    extra: Sequence[str] = (),
) -> Tokenizer:
    """Train byte-level BPE ("bpe") or "wordpiece", perhaps in `lowercase`, on a sample of about `sample` characters."""
    build = key("tokenizer.algorithm", algorithm, dict(bpe=_byte_level_bpe, wordpiece=_wordpiece))
    pieces = list(tokenizers.sentences(tokenizers.sample(texts, sample)))
    tokenizer = build(pieces, vocab, min_frequency, lowercase, list(extra))
    if tokenizer.vocab > vocab:
        raise Mistake(f"tokenizer.vocab={vocab} is too small: {algorithm} needs {tokenizer.vocab} for its alphabet")
    return tokenizer


def _byte_level_bpe(texts: list[str], vocab: int, min_frequency: int, lowercase: bool, extra: list[str]) -> Tokenizer:
    if lowercase:
        raise Mistake('tokenizer.lowercase is for algorithm="wordpiece": byte-level BPE keeps every text as it is')
    end = "<|endoftext|>"
    trained = hf.Tokenizer(hf.models.BPE())
    trained.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=min_frequency,
        special_tokens=[end, *extra],
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    return Tokenizer(trained.to_str(), bos=end, eos=end, pad=None, add_bos=True, add_eos=True)


def _wordpiece(texts: list[str], vocab: int, min_frequency: int, lowercase: bool, extra: list[str]) -> Tokenizer:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *extra]
    normalizer = hf.normalizers.BertNormalizer(lowercase=lowercase)
    counts = Counter(c for text in texts for c in normalizer.normalize_str(text) if not c.isspace())
    alphabet = sorted(sorted(counts), key=lambda c: -counts[c])[:LIMIT]

    def tokenizer(pieces: dict[str, int]) -> hf.Tokenizer:
        made = hf.Tokenizer(hf.models.WordPiece(pieces, unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizer, hf.pre_tokenizers.BertPreTokenizer()
        made.decoder = hf.decoders.WordPiece(prefix="##")
        return made

    # The trainer numbers the characters inside words in the order of a hash table, another one in each run, and breaks
    # ties by these numbers. Among the specials they have fixed ones; a second tokenizer has the true specials only.
    trainer = hf.trainers.WordPieceTrainer(
        vocab_size=vocab,
        min_frequency=min_frequency,
        special_tokens=specials + [f"##{c}" for c in alphabet],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    trained = tokenizer({"[UNK]": 0})
    trained.train_from_iterator(texts, trainer)
    final = tokenizer(trained.get_vocab())
    final.add_special_tokens(specials)
    return Tokenizer(final.to_str(), bos="[CLS]", eos="[SEP]", pad="[PAD]", add_bos=True, add_eos=True)
