"""Convert a Hugging Face folder to a workdir or a workdir to a Hugging Face folder, or compare one with transformers.

    jaxlm convert Qwen/Qwen2.5-0.5B runs/qwen                a folder, or a name on the hub, to a workdir
    jaxlm convert runs/mine exported --dtype=bfloat16 --shard=5GB --step=best      a workdir to a folder
    jaxlm convert --check exported                           its model's answers against those of transformers

What SOURCE is decides the direction. DESTINATION does not exist yet or is empty, and appears when all of it is there.
--check needs torch and transformers. It tells the largest difference of logits, an encoder's hidden states and pooled
state, for a prompt of 310 tokens, rows padded on either side, a packed row, cached decoding and the model exported
again, and exits with 1 where one is above 1e-4 or a key of the export is missing or too many.
"""

from collections.abc import Iterator
import contextlib
import json
import logging
import os
import re
from typing import Any

from etils import epath
import jax
from jax.sharding import Mesh
import tokenizers as hf_tokenizers

from jaxlm import axes, check, checkpoint, hf, lookup, marks, models, objectives, program
from jaxlm import config as configs
from jaxlm.data import tokenizers
from jaxlm.data.tokenizers import Tokenizer, huggingface
from jaxlm.lookup import Mistake
from jaxlm.paths import absolute, move

UNITS = dict(B=1, KB=10**3, MB=10**6, GB=10**9)
ON_THE_HUB = r"[\w.-]+/[\w.-]+"
FILES = ["*.safetensors", "*.json", "*.model"]
OTHERS = ["*/*", "consolidated*"]  # the same weights once more, for other programs
SPECIALS = ("bos", "eos", "pad")
SPACE = "▁"  # how SentencePiece writes a space
PROBES = ("def f(x):\n\treturn  x\n", " Grüße,   日本語 🙂 naïve", "A B\r\n\n  0x00 ∀x", "  ", "")


def to_workdir(folder: epath.PathLike, destination: epath.PathLike) -> None:
    """Make a workdir of a Hugging Face folder: config.json, tokenizer/ and a checkpoint of step 0.

    Raises `Mistake` for a folder without a tokenizer or with one that has more ids than the model, for whatever
    `hf.restore` refuses, and for a destination that is not empty.
    """
    folder = epath.Path(folder)
    section, form = models.of_hugging_face(str(folder), hf.read_config(folder))
    if not tokenizers.find(folder):
        raise Mistake(
            f"{folder} has neither {' nor '.join(tokenizers.FILES)}, and a workdir needs a tokenizer; "
            f"jaxlm.load({str(folder)!r}) takes and gives token ids without one"
        )
    tokenizer = tokenizers.load(folder)
    if tokenizer.vocab > section["vocab"]:
        raise Mistake(f"{folder}: the tokenizer has {tokenizer.vocab} ids, but vocab_size is {section['vocab']}")
    blueprint = models.Blueprint.of(section, vocab=tokenizer.vocab)
    with _appearing(destination) as half:
        ends, forced = marks.read(folder)
        ends = [i for i in ends if i < section["vocab"]]
        configs.write(dict(model=section, dtype="auto", ends=ends, forced=forced), str(half))
        tokenizer.save(half / "tokenizer")
        params = hf.restore(folder, form, blueprint.shapes, mesh=_mesh())
        with checkpoint.Checkpoints(str(half)) as checkpoints:
            checkpoints.save(0, dict(params=params))
    print(f"{destination}: {blueprint.name}, {blueprint.size:,} parameters, as step 0")


def to_folder(
    workdir: epath.PathLike, destination: epath.PathLike, *, step: str | int = "newest", dtype: str = "float32",
    shard: int = hf.SHARD,
) -> None:  # fmt: skip
    """Make a Hugging Face folder of a workdir's checkpoint, for AutoModelForCausalLM and AutoTokenizer.

    The weights are written in `dtype`, in files of at most `shard` bytes. Raises `Mistake` where transformers has no
    such model, where there is no such checkpoint, and for a destination that is not empty.
    """
    lookup.key("--dtype", dtype, hf.DTYPES)
    config = configs.read(str(workdir)).to_dict()
    lookup.key(f"{workdir}/config.json", "model", config)
    tokenizer = tokenizers.load(epath.Path(workdir) / "tokenizer")
    blueprint = models.Blueprint.of(config["model"], vocab=tokenizer.vocab)
    kind, form, written = models.to_hugging_face(blueprint)
    ids: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, name) for name in SPECIALS}
    ends = [i for i in dict.fromkeys([*config.get("ends", ()), tokenizer.eos]) if i is not None]
    how = ids | marks.write(marks.Marks(ends, config.get("forced", {})))  # what `generate` of transformers goes by
    how |= {key: value for key, value in written.items() if key == "decoder_start_token_id"}
    written |= {key: how[key] for key in ids if written[key] is None}
    with _appearing(destination) as half:
        number, params = checkpoint.restore_params(str(workdir), blueprint.shapes, step=step, mesh=_mesh())
        hf.export(half, form, params, written, dtype=dtype, shard=shard)
        (half / marks.FILE).write_text(json.dumps(how, indent=2) + "\n")
        write_tokenizer(epath.Path(workdir) / "tokenizer", tokenizer, half, blueprint.config.context, blueprint.kind)
    print(f"{destination}: {kind}, {blueprint.size:,} parameters in {dtype}, from step {number}")
    if blueprint.kind == "decoder" and objectives.both_ways(config.get("objective")):
        print(
            "WARNING: the objective `prefix` trained this model to read its prompts in both directions, and a Hugging "
            f"Face folder of {kind} has no key to say so: from it, transformers and jaxlm read prompts from the left "
            f"alone, and write worse. Generate from {workdir}"
        )


def write_tokenizer(saved: epath.Path, tokenizer: Tokenizer, folder: epath.Path, context: int, kind: str) -> None:
    """Write a saved tokenizer as transformers reads it; where it has none like it, print that.

    transformers adds to a text what we do: bos, and eos behind it where it is not a decoder (of this `kind`) that goes
    on with the text.
    """
    spec = json.loads((saved / tokenizers.SPEC).read_text())
    if spec["kind"] == "huggingface":
        names = {name: spec["load"][name] for name in SPECIALS}
        content = (saved / "tokenizer.json").read_text()
    elif spec["kind"] == "sentencepiece":
        model = (saved / "tokenizer.model").read_bytes()
        (folder / "tokenizer.model").write_bytes(model)
        names, content = of_sentencepiece(model)
        spelt = hf_tokenizers.Tokenizer.from_str(content)
        spelt.encode_special_tokens = True
        if any(spelt.encode(text).ids != tokenizer.encode(text) for text in PROBES):
            content = ""  # it normalises texts in a way of its own; transformers has to make what it can of the model
    else:
        print(f"the folder has no tokenizer: transformers has none like {spec['kind']}")
        return
    config = {f"{name}_token": token for name, token in names.items()}  # None as well: none of the usual names
    config |= dict(model_max_length=context, clean_up_tokenization_spaces=False)
    if content:
        (folder / "tokenizer.json").write_text(_surrounding(content, tokenizer, kind))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        config |= dict(add_bos_token=tokenizer.add_bos, add_eos_token=tokenizer.add_eos and kind != "decoder")
    (folder / tokenizers.CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _surrounding(content: str, tokenizer: Tokenizer, kind: str) -> str:
    """A tokenizer.json that adds to a text what the tokenizer does; as it is where it does so already."""
    whole = hf_tokenizers.Tokenizer.from_str(content)
    added = (tokenizer.bos if tokenizer.add_bos else None, tokenizer.eos if tokenizer.add_eos else None)
    bos, eos = ([] if i is None else [str(whole.id_to_token(i))] for i in added)
    before, after = huggingface.around(whole)
    if before == bos and (after == eos or (kind == "decoder" and not after)):
        return content
    eos = [] if kind == "decoder" else eos
    processors = hf_tokenizers.processors
    template = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, "$B", *eos],
        special_tokens=[(str(whole.id_to_token(i)), i) for i in dict.fromkeys(added) if i is not None],
    )
    others = [] if whole.post_processor is None or before or after else [whole.post_processor]
    whole.post_processor = processors.Sequence([*others, template]) if others else template
    return whole.to_str(pretty=True)


def of_sentencepiece(model: bytes) -> tuple[dict[str, str | None], str]:
    """The names of bos, eos and pad, and a tokenizer.json that spells texts as a SentencePiece model does which
    neither normalises them nor puts a space in front.
    """
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto.FromString(model)  # type: ignore[attr-defined]
    trained, pieces = proto.trainer_spec, [(p.piece, p.score) for p in proto.pieces]
    normal = [p.piece for p in proto.pieces if p.type == p.NORMAL]
    name = lambda at: pieces[at][0] if 0 <= at < len(pieces) else None  # noqa: E731
    unknown = next(i for i, p in enumerate(proto.pieces) if p.type == p.UNKNOWN)
    if trained.model_type == trained.UNIGRAM:
        spelling: Any = hf_tokenizers.models.Unigram(pieces, unk_id=unknown, byte_fallback=trained.byte_fallback)
    else:
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        known = set(normal)
        merges = [  # in the order of the pieces that they make: SentencePiece takes the likeliest first
            (left, right) for piece in sorted(normal, key=lambda p: (-pieces[ids[p]][1], ids[p]))
            for left, right in sorted(
                ((piece[:n], piece[n:]) for n in range(1, len(piece)) if piece[:n] in known and piece[n:] in known),
                key=lambda pair: (ids[pair[0]], ids[pair[1]]),
            )
        ]  # fmt: skip
        spelling = hf_tokenizers.models.BPE(
            ids, merges, unk_token=name(unknown), fuse_unk=True, byte_fallback=trained.byte_fallback
        )
    whole = hf_tokenizers.Tokenizer(spelling)
    whole.normalizer = hf_tokenizers.normalizers.Replace(" ", SPACE)
    decoders = hf_tokenizers.decoders
    whole.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    controls = [p.piece for p in proto.pieces if p.type in (p.CONTROL, p.UNKNOWN)]
    whole.add_special_tokens([hf_tokenizers.AddedToken(piece, special=True, normalized=False) for piece in controls])
    return dict(bos=name(trained.bos_id), eos=name(trained.eos_id), pad=name(trained.pad_id)), whole.to_str(pretty=True)


def download(name: str) -> epath.Path:
    """The folder of a name on the Hugging Face hub. Raises `Mistake` where it cannot be had."""
    import huggingface_hub

    try:
        return epath.Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES, ignore_patterns=OTHERS))
    except Exception as e:  # the library raises its own, its HTTP client's and the system's
        if program.is_disk_full(e):
            raise
        why = f"{type(e).__name__}: {e}".splitlines()[0]
        raise Mistake(f"there is no folder {name}, and the hub did not give a repository of this name: {why}") from e


def locate(source: str) -> epath.Path:
    """The folder that SOURCE names, downloaded where it is a name on the hub."""
    path = epath.Path(source)
    if path.is_dir():
        return path
    if not path.exists() and re.fullmatch(ON_THE_HUB, source):
        return download(source)
    raise Mistake(
        f"SOURCE={source}: there is no such folder; it is a workdir, a Hugging Face folder or a name on the hub"
    )


def size(text: str) -> int:
    """A number of bytes such as 5GB, 200MB or 1000000."""
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text)
    if not match or not int(match[1]) or (match[2].upper() or "B") not in UNITS:
        raise Mistake(f"--shard={text}: a whole number and one of {', '.join(UNITS)}, for example 5GB")
    return int(match[1]) * UNITS[match[2].upper() or "B"]


def main(argv: list[str]) -> int:
    """Convert one way or the other, or compare."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax warns of what is not amiss
    args = configs.parse(
        __doc__ or "", argv, config=False, workdir=None, places=2, check=False, dtype=str, shard=str, step=str
    )
    options: dict[str, Any] = {
        name: value for name in ("dtype", "shard", "step") if (value := getattr(args, name)) is not None
    }
    if len(args.places) != (1 if args.check else 2):
        raise Mistake("convert takes SOURCE and DESTINATION, two folders, or --check and one Hugging Face folder")
    source = locate(args.places[0])
    importing = hf.is_folder(source)
    if options and (importing or args.check):
        raise Mistake(f"--{min(options)} says how a workdir is exported, and {source} is not to be")
    if args.check:
        if not importing:
            raise Mistake(f"--check: {source} is no Hugging Face folder: no config.json there names a model_type")
        within = True
        for (way, what), difference in check.check(source).items():
            good = difference <= check.TOLERANCE  # NaN is not
            within = within and good
            print(f"{difference:.1e} of {check.TOLERANCE:g}  {way}: {what}{'' if good else '   TOO MUCH'}", flush=True)
        return int(not within)
    if "shard" in options:
        options["shard"] = size(args.shard)
    if importing:
        to_workdir(source, args.places[1])
    else:
        to_folder(source, args.places[1], **options)
    return 0


@contextlib.contextmanager
def _appearing(destination: epath.PathLike) -> Iterator[epath.Path]:
    """A folder beside the destination that takes its place at the end, and vanishes where something goes wrong."""
    place = absolute(destination)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise Mistake(f"DESTINATION={destination}: it is there already, and not empty; name a new folder")
    half = place.with_name(f".{place.name}.{os.getpid()}")
    half.mkdir(parents=True)
    try:
        yield half
        if place.exists():
            place.rmdir()
        move(half, place)
    except BaseException:
        half.rmtree(missing_ok=True)
        raise


def _mesh() -> Mesh:
    """All devices of this host, each holding a part of every array."""
    return axes.mesh(data=1, fsdp=-1, devices=jax.local_devices())


if __name__ == "__main__":
    program.run("convert", main)
