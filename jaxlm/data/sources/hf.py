"""Data sets of the Hugging Face Hub, or folders like them, streamed: `hf:NAME:SPLIT?config=CONFIG&field=text`.

    hf:Salesforce/wikitext/wikitext-2-raw-v1:train        hf:ORG/NAME/CONFIG:SPLIT is the same as ?config=CONFIG
    hf:rajpurkar/squad:train?template={question} {answers.text.0}
    hf:data/mine:validation                               a folder with train.jsonl, validation.jsonl (or csv, parquet)

Nothing is kept on disk. It needs the extra hf; no data set's own code is run.
"""

from collections.abc import Iterator, Mapping
from functools import partial
import itertools
from pathlib import Path
from typing import Any

from etils import epath

from jaxlm.data import files
from jaxlm.data.records import Text, documents
from jaxlm.data.sources import Document, Fault, Report, Source
from jaxlm.lookup import Mistake

TIMEOUT = 10  # seconds for the Hub to answer whether it has the data set


def source(
    path: str, *, config: str | None = None, field: str | None = None, template: str | None = None,
    revision: str | None = None,
) -> Source:  # fmt: skip
    """One split of a data set, at a `revision` of the Hub's (a branch, a tag, a commit)."""
    text = Text(field, template)
    name, colon, split = path.rpartition(":")
    if not (name and colon and split):
        raise Mistake(f"hf:{path} needs a name and a split, as in hf:rajpurkar/squad:train")
    try:
        import datasets
    except ImportError as e:
        raise Mistake(f"the source hf: needs the extra hf: pip install 'jaxlm[hf]' ({e})") from e
    if Path(name).is_dir():
        found = [epath.Path(file) for file in sorted(Path(name).rglob("*")) if file.is_file()]
        name, identity, commit = str(Path(name).absolute()), partial(files.inputs, found), None
    else:
        if name.count("/") == 2 and config is None:
            name, _, config = name.rpartition("/")
        commit = _commit(name, revision, path)
        identity = partial(dict, revision=commit)
    try:
        rows: Any = datasets.load_dataset(name, config, split=split, streaming=True, revision=commit)
    except Exception as e:  # of many kinds: unknown configuration or split, files of no known format
        why = " ".join(str(e).splitlines()[:3])
        raise Mistake(f"hf cannot open {name!r}, configuration {config or 'default'!r}, split {split!r}: {why}") from e
    if rows.column_names:  # unknown where nothing but reading would tell
        text.check(f"hf:{path}: the data set", rows.column_names)
        rows = rows.select_columns(text.columns)  # pictures and sound need not be decoded
    return Source(partial(_documents, rows, path, text, commit is not None), identity)


def _commit(name: str, revision: str | None, path: str) -> str:
    """The commit of a data set on the Hub; raises `Mistake` where there is none, or no Hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT).sha or ""
    except (HFValidationError, HfHubHTTPError) as e:
        why = next(filter(None, str(e).splitlines()), "")
        raise Mistake(f"hf:{path}: neither a folder here nor a data set of the Hub ({why})") from e
    except Exception as e:  # no network, no answer, offline by HF_HUB_OFFLINE
        raise Mistake(f"hf:{path}: no such folder here, and the Hugging Face Hub cannot be asked ({e})") from e


def _documents(rows: Any, path: str, text: Text, hub: bool, report: Report) -> Iterator[Document]:
    yield from documents(_numbered(rows, path, hub, report), text, report)


def _numbered(rows: Any, path: str, hub: bool, report: Report) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each example with where it stands. Nothing can be read behind one that the library fails at."""
    examples = iter(rows)
    for number in itertools.count():
        try:
            row = next(examples)
        except StopIteration:
            return
        except Exception as e:  # of many kinds: text that is no JSON, damaged files, the network
            line = next(iter(str(e).splitlines()), type(e).__name__)
            why = f"hf:{path}: example {number} and what follows cannot be read ({line})"
            if hub and not isinstance(e, ValueError):  # a bad connection must not cost the rest
                raise Mistake(f"{why}; the same command goes on from where it was") from e
            return report(Fault("unreadable rest", why))
        yield f"hf:{path}, example {number}", row
