"""Make tests/goldens/*.npz: tiny random models of transformers, and what they answer.

    python scripts/make_goldens.py [NAME ...]      in an environment of its own: torch, transformers, numpy

Each file holds a model's config.json, its weights under "w:NAME" (float16 values, so that they are small and exact) and
what it answers in float32: to a prompt of 310 tokens, and to two short rows alone. Padded on the left or on the right,
transformers answers the same, which is checked here.

Encoder-decoders, and the decoders of WRITERS, also say what `model.generate` writes: "cases" is JSON, two prompts and
the keywords of `generate` for each; "written" the tokens [case, row, token] before the one that ends a row, -1 behind
them. No answer depends on a near tie: it stays when logits are shaken.
"""

import inspect
import itertools
import json
from pathlib import Path
import sys

import numpy as np
import torch  # type: ignore
import transformers as tf  # type: ignore

V, LONG = 40, 310
SIZES = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=512,
)  # fmt: skip
KV = dict(num_key_value_heads=2)
WRITERS = ("gpt2", "llama", "gemma2", "mixtral")
NEW, EARLY = 12, 5  # tokens that a row may get, and those that it gets at least where `min_new_tokens` is set
SHAKEN, SHAKES = 5e-4, 64  # how far logits are moved, and how often


def decoders() -> dict:
    """Every variant of a decoder: name -> (class, config)."""
    llama3 = dict(
        rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )  # fmt: skip
    yarn = dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=128)
    linear = dict(rope_type="linear", rope_theta=10_000.0, factor=2.0)
    gpt2 = tf.GPT2Config(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=512, n_inner=48)
    llama = lambda **more: (tf.LlamaForCausalLM, tf.LlamaConfig(**SIZES, **KV, **more))  # noqa: E731
    qwen2 = tf.Qwen2Config(**SIZES, **KV, tie_word_embeddings=True)
    windows = dict(use_sliding_window=True, sliding_window=50, max_window_layers=1)
    gemma = dict(head_dim=16, sliding_window=30, query_pre_attn_scalar=24)
    rope = dict(
        full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
        sliding_attention=dict(rope_type="default", rope_theta=1e4),
    )  # fmt: skip
    gemma3 = dict(gemma, rope_parameters=rope)
    experts = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=16, norm_topk_prob=True)
    return {
        "gpt2": (tf.GPT2LMHeadModel, gpt2),
        "llama": llama(),
        "llama-3": llama(rope_parameters=llama3, tie_word_embeddings=True),
        "llama-linear": llama(rope_parameters=linear, attention_bias=True),
        "llama-yarn": llama(rope_parameters=yarn, head_dim=16),
        "mistral": (tf.MistralForCausalLM, tf.MistralConfig(**SIZES, **KV, sliding_window=37)),
        "qwen2": (tf.Qwen2ForCausalLM, qwen2),
        "qwen2-window": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**SIZES, **KV, **windows)),
        "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config(**SIZES, **KV, **gemma)),
        "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**SIZES | dict(num_hidden_layers=7), **KV, **gemma3)),
        "mixtral": (tf.MixtralForCausalLM, tf.MixtralConfig(**SIZES, **KV, num_local_experts=4)),
        "qwen3-moe": (tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig(**SIZES, **KV, **experts)),
        "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**SIZES, **KV, head_dim=16)),
    }


def encoders() -> dict:
    """Every variant of an encoder."""
    ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
    roberta = tf.RobertaConfig(**SIZES | dict(max_position_embeddings=514), **ids, type_vocab_size=1)
    sizes = dict(vocab_size=V, dim=32, n_layers=3, n_heads=4, hidden_dim=48)
    modern = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=40)
    return {
        "bert": (tf.BertForPreTraining, tf.BertConfig(**SIZES)),
        "bert-model": (tf.BertModel, tf.BertConfig(**SIZES)),
        "roberta": (tf.RobertaForMaskedLM, roberta),
        "distilbert": (tf.DistilBertForMaskedLM, tf.DistilBertConfig(**sizes)),
        "modernbert": (tf.ModernBertForMaskedLM, tf.ModernBertConfig(**SIZES | dict(num_hidden_layers=5), **modern)),
    }


def pairs() -> dict:
    """Every variant of an encoder-decoder."""
    sizes = dict(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4)
    sizes |= dict(decoder_start_token_id=0)
    gated = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    bart = dict(
        vocab_size=V, d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=512,
    )  # fmt: skip
    return {
        "bart": (tf.BartForConditionalGeneration, tf.BartConfig(**bart, scale_embedding=True)),
        "t5": (tf.T5ForConditionalGeneration, tf.T5Config(**sizes)),
        "t5-1.1": (tf.T5ForConditionalGeneration, tf.T5Config(**sizes, **gated)),
        "mt5": (tf.MT5ForConditionalGeneration, tf.MT5Config(**sizes)),
    }


def ask_pair(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Logits of the decoder's rows about the encoder's, of other lengths; the same where the encoder's is padded."""
    rng = np.random.default_rng(0)
    out = {}
    with torch.no_grad():
        for name, length, written in (("prompt", LONG, 40), ("first", 9, 6), ("second", 5, 7)):
            tokens, decoder = (torch.tensor(rng.integers(3, V, (1, n))) for n in (length, written))
            answer = model(tokens, decoder_input_ids=decoder)
            out |= {name: tokens, f"{name}_decoder": decoder, f"{name}_logits": answer.logits}
            out[f"{name}_hidden"] = answer.encoder_last_hidden_state
        mask = torch.tensor([[1] * 5 + [0] * 4])
        padded = torch.nn.functional.pad(tokens, (0, 4), value=model.config.pad_token_id)
        got = model(padded, attention_mask=mask, decoder_input_ids=decoder).logits
        torch.testing.assert_close(got, out["second_logits"], atol=2e-5, rtol=0)
    return {name: x.numpy() for name, x in out.items()}


def build(cls: type, config: tf.PretrainedConfig) -> torch.nn.Module:
    """The model with weights so large that every part of it matters, each a float16 value."""
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = cls(config).eval().float()
    if getattr(config, "scale_decoder_outputs", True) is False:  # T5 1.1: the published weights have two tables
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        for name, p in model.named_parameters():
            new = torch.randn_like(p) * (0.15 if p.dim() > 1 else 0.3)
            if p.dim() == 1 and "bias" not in name:
                new += p.mean()
            p.copy_(new.half().float())
    return model


def ask_decoder(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Logits of the long prompt and of two short rows, the same however they are padded."""
    rng = np.random.default_rng(0)
    prompt, first, second = (torch.tensor(rng.integers(3, V, (1, n))) for n in (LONG, 9, 5))
    out = dict(prompt=prompt, first=first, second=second)
    with torch.no_grad():
        for name in ("prompt", "first", "second"):
            out[f"{name}_logits"] = model(out[name]).logits
        pad = torch.zeros((1, 4), dtype=torch.long)
        for side in ("left", "right"):
            row = torch.cat([pad, second] if side == "left" else [second, pad], 1)
            mask = torch.cat([pad, torch.ones_like(second)] if side == "left" else [torch.ones_like(second), pad], 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            got = model(row, attention_mask=mask, position_ids=positions).logits[mask.bool()]
            assert torch.allclose(got, out["second_logits"][0], atol=2e-5), (
                side,
                (got - out["second_logits"][0]).abs().max(),
            )
    return {name: x.numpy() for name, x in out.items()}


def ask_encoder(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Hidden states, and what heads there are, of the long prompt and two short rows; padded, they are the same."""
    rng = np.random.default_rng(0)
    body = getattr(model, model.base_model_prefix, model)
    takes = inspect.signature(body.forward).parameters
    typed = "token_type_ids" in takes and model.config.type_vocab_size > 1

    def ask(tokens, mask, types):
        more = dict(token_type_ids=types) if typed else {}
        if "position_ids" in takes and model.config.model_type != "roberta":  # it counts by itself
            more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = body(tokens, attention_mask=mask, **more)
        found = dict(hidden=hidden.last_hidden_state)
        if getattr(hidden, "pooler_output", None) is not None:
            found["pooled"] = hidden.pooler_output
        if body is not model:
            answer = model(tokens, attention_mask=mask, **more)
            found["logits"] = answer.prediction_logits if "prediction_logits" in answer else answer.logits
            if "seq_relationship_logits" in answer:
                found["next"] = answer.seq_relationship_logits
        return found

    out = {}
    with torch.no_grad():
        for name, length in (("prompt", LONG), ("first", 9), ("second", 5)):
            tokens = torch.tensor(rng.integers(3, V, (1, length)))
            types = (torch.arange(length)[None] >= length // 2).long()
            out |= {name: tokens, **({f"{name}_types": types} if typed else {})}
            out |= {f"{name}_{key}": x for key, x in ask(tokens, torch.ones_like(tokens), types).items()}
        pad = torch.full((1, 4), model.config.pad_token_id)
        none, real = torch.zeros_like(pad), torch.ones_like(tokens)
        join = lambda side, pad, x: torch.cat([pad, x] if side == "left" else [x, pad], 1)  # noqa: E731
        counts = "position_ids" in takes or model.config.model_type == "roberta"
        for side in ["left", "right"] if counts else ["right"]:
            mask = join(side, none, real)
            got = ask(join(side, pad, tokens), mask, join(side, none, types))["hidden"][mask.bool()]
            torch.testing.assert_close(got, out["second_hidden"][0], atol=2e-5, rtol=0)
    return {name: x.numpy() for name, x in out.items()}


def settings(ends: list[int], pair: bool) -> list[dict]:
    """The cases: keywords of `generate`. `ends` are two ids; the first ends some rows and not others."""
    one, two, none = (dict(eos_token_id=ids) for ids in (ends[:1], ends, None))
    free = next(i for i in range(5, V) if i not in ends)
    bos = dict(forced_bos_token_id=free + 4) if pair else {}
    forced = [  # the last token an end or none, and what a constraint says of it
        one | bos,
        none | dict(forced_eos_token_id=free) | bos,
        one | dict(forced_eos_token_id=ends[0]) | bos,
        two | dict(forced_eos_token_id=free, min_new_tokens=NEW, no_repeat_ngram_size=1, repetition_penalty=1.3) | bos,
    ]
    late, ngrams, penalty = dict(min_new_tokens=EARLY), dict(no_repeat_ngram_size=2), dict(repetition_penalty=1.3)
    alike = [none, one, two | late, one | ngrams, one | penalty, two | late | ngrams | penalty, *forced]
    beams = dict(num_beams=4, num_return_sequences=4)
    scored = [
        one | beams | dict(length_penalty=by, early_stopping=early, num_return_sequences=2)
        for by, early in itertools.product((0.0, 1.0, 2.0, -0.5), (False, True, "never"))
    ]
    odd = [
        two | dict(num_beams=3, num_return_sequences=1, early_stopping=True),
        two | dict(num_beams=3, num_return_sequences=3, early_stopping="never", length_penalty=2.0) | late | ngrams,
    ]
    return [*alike, *(beams | case for case in alike), *scored, *odd]


class Shaken(tf.LogitsProcessor):
    """Logits, each moved by up to SHAKEN."""

    def __init__(self):
        self.random = torch.Generator().manual_seed(0)

    def __call__(self, input_ids, scores):
        return scores + SHAKEN * (2 * torch.rand(scores.shape, generator=self.random) - 1)


def write(model: torch.nn.Module, prompts: list[list[int]], case: dict, **more) -> list[list[list[int]]]:
    """What `generate` writes behind each prompt, in one padded batch: rows without the token that ends them."""
    pair, longest = model.config.is_encoder_decoder, max(map(len, prompts))
    pad = model.generation_config.pad_token_id
    rows, mask = [], []
    for prompt in prompts:
        gap, real = longest - len(prompt), [1] * len(prompt)
        rows.append(prompt + [pad] * gap if pair else [pad] * gap + prompt)
        mask.append(real + [0] * gap if pair else [0] * gap + real)
    out = model.generate(
        torch.tensor(rows), attention_mask=torch.tensor(mask), do_sample=False, max_new_tokens=NEW, **case, **more
    )
    found = []
    for row in out[:, 1 if pair else longest :].tolist():
        stops = [row.index(end) for end in case["eos_token_id"] or () if end in row]
        found.append(row[: min(stops, default=NEW)])
    each = case.get("num_return_sequences", 1)
    return [found[at : at + each] for at in range(0, len(found), each)]


def steady(model: torch.nn.Module, prompts: list[list[int]], case: dict) -> list[list[list[int]]] | None:
    """The answer, if it is the same for each prompt alone and however the logits are shaken."""
    found = write(model, prompts, case)
    alone = [write(model, [prompt], case)[0] for prompt in prompts]
    shaken = write(model, prompts * SHAKES, case, logits_processor=[Shaken()])
    return found if found == alone and found * SHAKES == shaken else None


def choose_ends(model: torch.nn.Module, prompts: list[list[int]]) -> list[int]:
    """Two ids that occur in the midst of about half of the rows that are written where nothing ends them."""
    rows = []
    for beams, size, penalty in itertools.product((1, 4), (0, 2), (1.0, 1.3)):
        case = dict(num_beams=beams, num_return_sequences=beams, no_repeat_ngram_size=size, repetition_penalty=penalty)
        rows += [row for found in write(model, prompts, case | dict(eos_token_id=None)) for row in found]
    share = {i: sum(i in row[2:-2] and i not in row[:2] for row in rows) / len(rows) for i in range(3, V)}
    return sorted(share, key=lambda i: abs(share[i] - 0.5))[:2]


def ask_writer(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """What is written, in each case behind the first two prompts for which it does not depend on a near tie."""
    config = model.config
    start = dict(decoder_start_token_id=config.decoder_start_token_id) if config.is_encoder_decoder else {}
    model.generation_config = tf.GenerationConfig(pad_token_id=config.pad_token_id or 0, **start)
    rng = np.random.default_rng(0)
    draw = lambda: [rng.integers(3, V, n).tolist() for n in (9, 5)]  # noqa: E731
    cases, found, drawn = [], [], 0
    for case in settings(choose_ends(model, draw() + draw()), config.is_encoder_decoder):
        answer = None
        while answer is None:
            prompts, drawn = draw(), drawn + 1
            answer = steady(model, prompts, case)
        cases.append(dict(prompts=prompts, settings=case))
        found.append([row for rows in answer for row in rows])
    lengths = np.bincount([len(row) for rows in found for row in rows])
    print(f"  {len(cases)} cases, {drawn} pairs of prompts; rows by length: {lengths}", flush=True)
    assert lengths[:EARLY].any() and lengths[EARLY:NEW].any() and lengths[NEW]
    written = np.full((len(cases), max(map(len, found)), NEW), -1, np.int8)
    for case, rows in enumerate(found):
        for at, row in enumerate(rows):
            written[case, at, : len(row)] = row
    return dict(cases=np.array(json.dumps(cases)), written=written)


def main(wanted: list[str]) -> None:
    folder = Path(__file__).parent.parent / "tests" / "goldens"
    folder.mkdir(exist_ok=True)
    makers = [(decoders(), ask_decoder), (encoders(), ask_encoder), (pairs(), ask_pair)]
    for variants, ask in makers:
        for name, (cls, config) in variants.items():
            if wanted and name not in wanted:
                continue
            model = build(cls, config)
            answers = ask(model)
            weights = _saved(model)
            if name in WRITERS or ask is ask_pair:
                answers |= ask_writer(model)
            keep = {k: v for k, v in weights[1].items() if k not in ("transformers_version", "id2label", "label2id")}
            arrays = {f"w:{k}": v.astype(np.float16) for k, v in weights[0].items()}
            np.savez_compressed(folder / f"{name}.npz", **{"config": np.array(json.dumps(keep)), **arrays, **answers})
            print(name, (folder / f"{name}.npz").stat().st_size // 1000, "KB", flush=True)


def _saved(model: torch.nn.Module) -> tuple[dict[str, np.ndarray], dict]:
    """What save_pretrained writes: the tensors and the config."""
    import tempfile

    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors"), json.loads(Path(folder, "config.json").read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
