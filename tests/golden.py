"""The goldens of scripts/make_goldens.py, and the Hugging Face folder that each stands for."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
import tokenizers as hf_tokenizers

GOLDENS = sorted(path.stem for path in (Path(__file__).parent / "goldens").glob("*.npz"))


def golden(name):
    return np.load(Path(__file__).parent / "goldens" / f"{name}.npz")


def folder_of(name, folder, **config):
    """The golden's Hugging Face folder."""
    arrays = golden(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**json.loads(str(arrays["config"])), **config}))
    weights = {key[2:]: arrays[key].astype(np.float32) for key in arrays.files if key.startswith("w:")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_tokenizer(folder, size=40):
    """Put a tokenizer.json of `size` words beside a model."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, size)}
    whole = hf_tokenizers.Tokenizer(hf_tokenizers.models.WordLevel(words, unk_token="<unk>"))
    whole.pre_tokenizer = hf_tokenizers.pre_tokenizers.WhitespaceSplit()
    whole.add_special_tokens(["<s>", "</s>"])
    whole.save(str(folder / "tokenizer.json"))
    return folder
