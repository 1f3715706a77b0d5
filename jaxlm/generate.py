"""Continue prompts with a trained model.

    jaxlm generate --workdir=runs/quickstart --prompt="Once upon" --temperature=0.8 --top_p=0.95
    jaxlm generate --workdir=runs/quickstart --prompt="Once upon" --beams=4 --length_penalty=0.6
    jaxlm generate --workdir=runs/quickstart --prompts=questions.txt --output=answers.jsonl

One text streams to the terminal. A file of prompts holds one a line, or as .jsonl objects {"prompt": ...}; out come
JSON lines in the same order, with "texts" added. Temperature 0 is greedy; --stop may be repeated. Without a prompt the
model begins a document of its own. --forced_bos and --forced_eos are token ids, -1 for none; unless given, those that
were published with an encoder-decoder. --specials=True takes the names of specials in prompts for them, and writes them
in answers: --prompt="the <extra_id_0> of" for a model of span corruption.
"""

from collections.abc import Iterator
import contextlib
import inspect
import json
import sys
from typing import Any

from etils import epath

from jaxlm import config, lm, program
from jaxlm.data.tokenizers import well_formed
from jaxlm.lookup import Mistake

OPTIONS = {  # those of `LM.generate`, by the same names and with the same defaults; a type where that is None
    name: option.default
    for name, option in inspect.signature(lm.LM.generate).parameters.items()
    if option.kind is option.KEYWORD_ONLY and name not in ("stream", "first")
} | dict(stop=[], forced_bos=int, forced_eos=int)


def read_prompts(path: str) -> list[dict[str, Any]]:
    """The prompts of a .txt file (one a line) or a .jsonl file, as objects with "prompt".

    Raises `Mistake` naming file and line for a line that holds none.
    """
    file = epath.Path(path)
    if not file.is_file():
        raise Mistake(f"--prompts: no file at {path}")
    lines = file.read_bytes().split(b"\n")  # what else ends lines to Python may stand in a prompt
    lines = lines if lines[-1] else lines[:-1]
    return [_record(line.removesuffix(b"\r"), f"{path}, line {n}", file.suffix) for n, line in enumerate(lines, 1)]


def _record(line: bytes, where: str, kind: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if where.endswith(" line 1") else "utf-8")  # the mark of an encoding is no text
    except UnicodeDecodeError as e:
        raise Mistake(f"{where}: not UTF-8 ({e.reason} at byte {e.start})") from None
    if kind != ".jsonl":
        return dict(prompt=text)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise Mistake(f"{where}: not JSON ({e})") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise Mistake(f'{where}: no object with a text in "prompt"')
    well_formed(where, json.dumps(record, ensure_ascii=False))  # else the answers could not be written
    return record


def answers(model: lm.LM, records: list[dict[str, Any]], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each record with its "texts", as soon as its batch is done."""
    for at in range(0, len(records), options["batch"]):
        part = records[at : at + options["batch"]]
        texts = model.generate([record["prompt"] for record in part], **options, first=at)
        for record, found in zip(part, texts):
            yield record | dict(texts=[found] if isinstance(found, str) else found)


def main(argv: list[str]) -> int:
    """Stream the continuation of one prompt, or write those of a file."""
    flags: dict[str, Any] = dict(prompt=str, prompts=str, output=str, step="newest", specials=False) | OPTIONS
    args = config.parse(__doc__ or "", argv, config=False, **flags)
    options = {name: getattr(args, name) for name in OPTIONS}
    if args.prompts is not None and args.prompt is not None:
        raise Mistake("--prompt and --prompts were both given; one of them, please")
    output = epath.Path(args.output) if args.output else None
    if output:
        program.output("--output", args.output)
    well_formed("--prompt", args.prompt or "")
    records = [dict(prompt=args.prompt or "")] if args.prompts is None else read_prompts(args.prompts)
    model = lm.load(args.workdir, step=args.step, specials=args.specials)
    if args.prompts is None and not args.output and options["num_return_sequences"] == options["beams"] == 1:
        sys.stdout.write(args.prompt or "")
        model.generate(args.prompt or "", **options, stream=lambda piece: print(piece, end="", flush=True))
        print()
        return 0
    with output.open("w") if output else contextlib.nullcontext(sys.stdout) as file:
        for record in answers(model, records, options):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    program.run("generate", main)
