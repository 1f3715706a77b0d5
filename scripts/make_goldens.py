"""Make tests/goldens/*.npz: tiny random models of transformers, and what they answer.

    python scripts/make_goldens.py [NAME ...]      in an environment of its own: torch, transformers, numpy

Each file holds a model's config.json, its weights under "w:NAME" (float16 values, so that they are small and exact) and
what it answers in float32: to a prompt of 310 tokens, and to two short rows alone. Padded on the left or on the right,
transformers answers the same, which is checked here.
"""

import inspect
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
