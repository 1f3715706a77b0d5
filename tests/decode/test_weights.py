"""Weights laid out for decoding are the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import axes
from jaxlm.decode.engine import Engine
from jaxlm.decode.sampling import Sampling
from jaxlm.decode.weights import head, lay, rounded
from jaxlm.models import Blueprint
from jaxlm.nn import native
from jaxlm.nn.linear import Head, Tiled, Turned, dense
from tests import test_models as families
from tests.compiled import EITHER
from tests.trees import noisy


@pytest.mark.parametrize("name, inner", [("wq_DNH", 1), ("wo_NHD", 2), ("up_DF", 1), ("down_FD", 1), ("square_DD", 1)])
def test_a_turned_weight_multiplies_as_it_did(name, inner):
    shape = [dict(D=8, N=2, H=4, F=12)[letter] for letter in name.rpartition("_")[2]]
    stack = jax.device_put(jax.random.normal(jax.random.key(0), (3, *shape)), jax.devices()[0])
    x = jax.random.normal(jax.random.key(1), (2, 5, *shape[:inner]))
    laid = lay({"blocks": {"attn": {name: stack}}}, "float32")["blocks"]["attn"][name]
    assert len(laid) == 3 and all(isinstance(weight, Turned) for weight in laid)
    for layer, weight in enumerate(laid):
        np.testing.assert_allclose(dense(x, weight, over=inner), dense(x, stack[layer], over=inner), atol=1e-5)


@pytest.mark.parametrize("own", EITHER)
@pytest.mark.parametrize("name, inner", [("wq_DNH", 1), ("wo_NHD", 2), ("up_DF", 1), ("down_FD", 1)])
def test_a_bfloat16_weight_multiplies_as_it_did(name, inner, own, monkeypatch):
    monkeypatch.setattr(native, "ready", lambda: own)
    shape = [dict(D=40, N=2, H=24, F=33)[letter] for letter in name.rpartition("_")[2]]  # no multiple of 16 among them
    stack = jax.device_put(jax.random.normal(jax.random.key(0), (3, *shape)), jax.devices()[0])
    laid = lay({"blocks": {"attn": {name: stack}}}, "bfloat16")["blocks"]["attn"][name]
    assert len(laid) == 3 and all(isinstance(weight, Tiled if own else Turned) for weight in laid)
    for rows in (1, 5):
        x = jax.random.normal(jax.random.key(1), (rows, 1, *shape[:inner]), jnp.bfloat16)
        for layer, weight in enumerate(laid):
            rounded = stack[layer].astype(jnp.bfloat16).astype(jnp.float32)
            want = dense(x.astype(jnp.float32), rounded, over=inner)
            np.testing.assert_allclose(dense(x, weight, over=inner), want.astype(jnp.bfloat16), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("own", EITHER)
def test_a_head_laid_out_gives_the_logits_of_its_table(own, monkeypatch):
    monkeypatch.setattr(native, "ready", lambda: own)
    table_VD = jax.device_put(jax.random.normal(jax.random.key(0), (50, 24)), jax.devices()[0])
    laid = head(table_VD, "bfloat16")
    assert isinstance(laid, Tiled if own else Turned) and head(table_VD, "float32") is None
    rounded = table_VD.astype(jnp.bfloat16).astype(jnp.float32)
    for rows in (1, 3):
        x_BTD = jax.random.normal(jax.random.key(1), (rows, 1, 24), jnp.bfloat16)
        want = Head(rounded, cap=5.0)(x_BTD.astype(jnp.float32))
        np.testing.assert_allclose(Head(laid, cap=5.0)(x_BTD), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "t5", "rnn"])
def test_a_row_alone_is_continued_as_among_others(name):
    """In bfloat16, greedily."""
    sizes = dict(layers=2, width=16) | (dict(heads=2, mlp_width=24) if name == "t5" else dict(heads=2))
    section = dict(name="rnn", layers=2, width=16) if name == "rnn" else dict(name=name, context=32, **sizes)
    blueprint = Blueprint.of(section, vocab=40, dtype="bfloat16")
    params = jax.tree.map(lambda x: 8 * x, blueprint.init(0))  # so that no two logits are near each other
    engine, prompts = Engine(blueprint, params), [[3, 5, 7], [11, 2]]
    ask = lambda rows: engine.generate(rows, Sampling(temperature=0), max_new_tokens=6)  # noqa: E731
    alone = [ask([prompt])[0] for prompt in prompts]
    assert alone == ask(prompts) and len(alone[0]) == 6


def test_weights_are_as_small_as_what_products_are_computed_in():
    stack = jax.device_put({"blocks": {"up_DF": jnp.ones((2, 8, 32))}}, jax.devices()[0])
    assert sum(x.nbytes for x in jax.tree.leaves(lay(stack, "bfloat16"))) == 2 * 8 * 32 * 2


def test_a_router_chooses_alike_while_decoding():
    """Rounded, it would send some tokens to other experts than in one pass."""
    params = jax.device_put({"blocks": {"router_DE": jnp.full((2, 8, 4), 1 / 3)}}, jax.devices()[0])
    layers = lay(params, "bfloat16")["blocks"]["router_DE"]
    assert len(layers) == 2 and all(np.array_equal(layer, params["blocks"]["router_DE"][0]) for layer in layers)


def test_what_is_no_weight_shares_the_memory_of_the_stack():
    params = jax.device_put({"blocks": {"bias_NH": jnp.ones((3, 16, 16))}}, jax.devices()[0])
    layers = lay(params, "bfloat16")["blocks"]["bias_NH"]
    start = params["blocks"]["bias_NH"].unsafe_buffer_pointer()
    assert [layer.unsafe_buffer_pointer() - start for layer in layers] == [0, 1024, 2048]


@pytest.mark.parametrize("name", families.MODELS)
def test_what_products_would_round_anyway_is_rounded_before_them(name, monkeypatch):
    """To the last bit: as off the CPU, whose residual stream is float32."""
    monkeypatch.setattr(axes, "platform", lambda: "tpu")
    more = {} if name == "rnn" else dict(attention="xla")  # kernels are for devices that are not here
    model, tokens_BT = families.blueprint(name, dtype="bfloat16", **more), jnp.arange(24).reshape(2, 12) % families.V
    params = noisy(model)
    small = rounded(params, "bfloat16")
    read = jax.jit(lambda params: families.read(model.bind(params), tokens_BT))
    np.testing.assert_array_equal(read(small), read(params))
    wide = [axes.name_of(path) for path, x in jax.tree_util.tree_leaves_with_path(small) if x.dtype == jnp.float32]
    assert all(name.startswith(("bias", "scale", "router", "table", "next", "replaced")) for name in wide), wide
