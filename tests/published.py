"""Small tokenizers as others publish them: a tokenizer.json of words, with and without specials around a text."""

import json

import tokenizers as hf
from tokenizers import processors

SPECIALS = ["<s>", "</s>", "<unk>", "[CLS]", "[SEP]", "<|endoftext|>"]


def template(before, after):
    """What puts these specials around a text."""
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, "$B", *after],
        special_tokens=[(token, SPECIALS.index(token)) for token in {*before, *after}],
    )


BYTES = processors.ByteLevel(trim_offsets=False)
AROUND = {  # whose tokenizer.json has such a post-processor -> it, and what it puts before and behind a text
    "none": (None, None, None),
    "gpt2": (BYTES, None, None),
    "llama-2": (template(["<s>"], []), "<s>", None),
    "llama-3": (processors.Sequence([BYTES, template(["<|endoftext|>"], [])]), "<|endoftext|>", None),
    "t5": (template([], ["</s>"]), None, "</s>"),
    "bert": (template(["[CLS]"], ["[SEP]"]), "[CLS]", "[SEP]"),
    "old bert": (processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3)), "[CLS]", "[SEP]"),
    "bart": (processors.RobertaProcessing(("</s>", 1), ("<s>", 0)), "<s>", "</s>"),
}


def with_tokenizer(folder, size=40, *, around="none", config=None, specials=SPECIALS):
    """Put a tokenizer.json of `size` words, w6 the first that is no special, and perhaps its config into a folder."""
    words = [*specials, *(f"w{i}" for i in range(len(specials), size))]
    whole = hf.Tokenizer(hf.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=specials[2]))
    whole.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    whole.add_special_tokens([*specials])
    if (post := AROUND[around][0]) is not None:
        whole.post_processor = post
    folder.mkdir(exist_ok=True)
    whole.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
