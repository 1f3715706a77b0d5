"""Weights laid out for decoding are the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.decode.weights import lay
from jaxlm.nn.linear import Turned, dense


@pytest.mark.parametrize("name, inner", [("wq_DNH", 1), ("wo_NHD", 2), ("up_DF", 1), ("down_FD", 1), ("square_DD", 1)])
def test_a_turned_weight_multiplies_as_it_did(name, inner):
    shape = [dict(D=8, N=2, H=4, F=12)[letter] for letter in name.rpartition("_")[2]]
    stack = jax.device_put(jax.random.normal(jax.random.key(0), (3, *shape)), jax.devices()[0])
    x = jax.random.normal(jax.random.key(1), (2, 5, *shape[:inner]))
    laid = lay({"blocks": {"attn": {name: stack}}}, "float32")["blocks"]["attn"][name]
    assert len(laid) == 3 and all(isinstance(weight, Turned) for weight in laid)
    for layer, weight in enumerate(laid):
        np.testing.assert_allclose(dense(x, weight, axes=inner), dense(x, stack[layer], axes=inner), atol=1e-5)


def test_weights_are_as_small_as_what_products_are_computed_in():
    stack = jax.device_put({"blocks": {"up_DF": jnp.ones((2, 8, 12))}}, jax.devices()[0])
    assert {x.dtype for x in jax.tree.leaves(lay(stack, "bfloat16"))} == {jnp.dtype("bfloat16")}


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
