"""The tokens that begin and end what a published model writes, as transformers keeps them beside its weights.

    read(FOLDER)        Marks(ends=[2], forced=dict(bos=0, eos=2))      a BART: 2 ends a text, which 0 has to begin
    write(marks)        {"eos_token_id": 2, "forced_bos_token_id": 0, "forced_eos_token_id": 2}

Nothing else of generation_config.json is taken: temperature, beams and penalties are `LM.generate`'s own to choose.
"""

from typing import Any, NamedTuple

from etils import epath

from jaxlm import hf
from jaxlm.config import read_json

FILE = "generation_config.json"


class Marks(NamedTuple):
    """Ids that end a text; and, of an encoder-decoder, what its text has to begin and, at its longest, end with."""

    ends: list[int]
    forced: dict[str, int]  # "bos" and "eos", where there is one


def read(folder: epath.PathLike) -> Marks:
    """The marks of a Hugging Face folder: generation_config.json's, else config.json's."""
    config, path = hf.read_config(folder), epath.Path(folder) / FILE
    given = read_json(path) if path.exists() else config
    ends = next((found["eos_token_id"] for found in (given, config) if found.get("eos_token_id") is not None), [])
    forced: dict[str, Any] = {}
    if config.get("is_encoder_decoder"):  # where there are both files, config.json's are not in force
        forced = {name: given.get(f"forced_{name}_token_id") for name in ("bos", "eos")}
        if given.get("force_bos_token_to_be_generated"):  # as early BARTs say it
            forced["bos"] = given.get("bos_token_id")
    return Marks(_ids(ends), {name: min(_ids(ids)) for name, ids in forced.items() if ids is not None})


def write(marks: Marks) -> dict[str, Any]:
    """The same for export, as keys of generation_config.json."""
    ends = marks.ends if len(marks.ends) > 1 else next(iter(marks.ends), None)
    return dict(eos_token_id=ends) | {f"forced_{name}_token_id": token for name, token in marks.forced.items()}


def _ids(ids: int | list[int]) -> list[int]:
    return [ids] if isinstance(ids, int) else list(ids)
