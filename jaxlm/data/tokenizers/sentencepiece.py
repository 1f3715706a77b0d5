"""SentencePiece, unigram or BPE, with byte fallback and no normalisation: every text comes back as it was.

    tok = train(texts, vocab=2048, algorithm="bpe")        pad 0, unknown 1, bos 2, eos 3, 256 bytes, then pieces
    tok.encode("for  x")                                   the ids of "for", "▁▁", "x"

Loaded models keep the normalisation that they were trained with.
"""

from collections.abc import Iterable, Sequence
import io
import itertools

from etils import epath
import sentencepiece

from jaxlm.data import tokenizers
from jaxlm.lookup import Mistake, key

MODEL = "tokenizer.model"
SPACE = "▁"  # how SentencePiece writes a space


class Tokenizer:
    """A SentencePiece model; bos and eos are added to documents where the model has them, unless told otherwise."""

    def __init__(self, model: bytes, *, add_bos: bool = True, add_eos: bool = True):
        self._model = model
        try:
            self._processor = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as e:
            raise Mistake(f"not a SentencePiece model: {e}") from e
        self.vocab: int = sp.vocab_size()
        self.bos, self.eos, self.pad = (i if i >= 0 else None for i in (sp.bos_id(), sp.eos_id(), sp.pad_id()))
        self.add_bos, self.add_eos = add_bos and self.bos is not None, add_eos and self.eos is not None
        self.fingerprint = tokenizers.fingerprint(model, self.add_bos, self.add_eos)
        none = (sp.is_control, sp.is_unknown, sp.is_unused)
        self.specials = {sp.id_to_piece(i): i for i in range(self.vocab) if any(kind(i) for kind in none)}
        self._space = self._literal_space()

    def __reduce__(self):
        return _restore, (self._model, self.add_bos, self.add_eos)

    def _literal_space(self) -> list[int] | None:
        """The bytes' ids of a literal "▁", which the model itself takes for a space; None where it has no bytes."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        prefixed = self._processor.encode("a", out_type=str)[0].startswith(SPACE)
        return ids if all(map(self._processor.is_byte, ids)) and not prefixed else None

    def encode(self, text: str) -> list[int]:
        if self._space is None or SPACE not in text:
            return self._processor.encode(text)
        first, *rest = (self._processor.encode(part) for part in text.split(SPACE))
        return [*first, *itertools.chain.from_iterable(self._space + ids for ids in rest)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self._space is None or not any(SPACE in text for text in texts):
            return self._processor.encode(texts, num_threads=1)  # whoever wants more cores starts more processes
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def pieces(self) -> list[str]:
        sp, special = self._processor, set(self.specials.values())

        def text(i: int) -> str:
            piece = sp.id_to_piece(i)
            if sp.is_byte(i):
                return chr(int(piece[3:5], 16)) if piece < "<0x80>" else "\ufffd"
            return "" if i in special else piece.replace(SPACE, " ")

        return [text(i) for i in range(self.vocab)]

    def size(self, token: int) -> int:
        if token in self.specials.values():
            return 0
        return 1 if self._processor.is_byte(token) else len(self.decode([token]).encode())

    def save(self, folder: epath.PathLike) -> None:
        files = {MODEL: self._model}
        tokenizers.save(self, folder, "sentencepiece", files, add_bos=self.add_bos, add_eos=self.add_eos)


def _restore(model: bytes, add_bos: bool, add_eos: bool) -> Tokenizer:
    return Tokenizer(model, add_bos=add_bos, add_eos=add_eos)


def load(path: epath.Path, *, add_bos: bool | None = True, add_eos: bool | None = True) -> Tokenizer:
    """Load any .model file, or a folder that `save` wrote.

    `add_bos` and `add_eos` of None are what the tokenizer_config.json beside it says, else as the model was trained:
    a text begins with bos (Llama, Gemma), and where the model has none, ends with eos (T5).
    """
    file = path / MODEL if path.is_dir() else path
    if not file.exists():
        raise Mistake(f"no SentencePiece model at {file}")
    content, config = file.read_bytes(), tokenizers.config(file.parent)
    begins = config.get("add_bos_token", True) if add_bos is None else add_bos
    ends = config.get("add_eos_token", Tokenizer(content).bos is None) if add_eos is None else add_eos
    return Tokenizer(content, add_bos=begins, add_eos=ends)


def train(
    texts: Iterable[str],
    *,
    vocab: int,
    algorithm: str = "unigram",
    sample: int = 10_000_000,
    character_coverage: float = 0.9995,
    split_digits: bool = False,
    extra: Sequence[str] = (),
) -> Tokenizer:
    """Train on a sample of about `sample` characters; raises `Mistake` when the texts do not carry that many pieces.

    Characters outside the coverage are spelt in bytes. The result depends on the texts alone.
    """
    algorithm = key("tokenizer.algorithm", algorithm, dict(unigram="unigram", bpe="bpe"))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=tokenizers.sentences(tokenizers.sample(texts, sample)),
            model_writer=model,
            model_type=algorithm,
            vocab_size=vocab,
            character_coverage=character_coverage,
            split_digits=split_digits,
            # Nothing is normalised away, and nothing is unknown.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,  # indentation is one piece
            max_sentence_length=1 << 20,  # bytes; `sentences` keeps below it, and what is longer would be left out
            num_threads=16,  # fixed, because unigram's counts are summed in the order of the threads
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            control_symbols=list(extra),  # from id 4 on; no text is turned into them
            minloglevel=2,
        )
    except RuntimeError as e:
        raise Mistake(f"SentencePiece cannot train {vocab} pieces on this text: {e}") from e
    return Tokenizer(model.getvalue())
