"""The goldens of scripts/make_goldens.py, and the Hugging Face folder that each stands for."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

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
