"""A mixture of experts is the sum over its experts, and drops nothing."""

import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import axes, hlo
from jaxlm.models import Blueprint
from jaxlm.nn.moe import MoE
from jaxlm.objectives import clm

B, T, D, F, E = 2, 9, 8, 12, 5


def layer(chosen=2, renormalised=True):
    return MoE(D, F, E, chosen, renormalised=renormalised, std=0.5, out_std=0.5, rngs=nnx.Rngs(0))


def dense_sum(moe, x_BTD):
    """All experts for all tokens, times the weight that the router gives them."""
    prob = jax.nn.softmax(jnp.einsum("btd,de->bte", x_BTD, moe.router_DE[...]))
    lowest = jnp.sort(prob, axis=-1)[..., -moe.chosen][..., None]
    weight = jnp.where(prob >= lowest, prob, 0.0)
    weight = weight / weight.sum(-1, keepdims=True) if moe.renormalised else weight
    gate, up = (jnp.einsum("btd,edf->btef", x_BTD, w[...]) for w in (moe.gate_EDF, moe.up_EDF))
    return jnp.einsum("bte,btef,efd->btd", weight, jax.nn.silu(gate) * up, moe.down_EFD[...])


@pytest.mark.parametrize("devices, tokens", [(2, T), (1, T), (1, 1)], ids=["sorted", "all", "picked"])
@pytest.mark.parametrize("chosen, renormalised", [(1, True), (2, True), (2, False), (E, False)])
def test_it_is_the_dense_sum_over_experts(chosen, renormalised, devices, tokens):
    moe, x_BTD = layer(chosen, renormalised), jax.random.normal(jax.random.key(1), (B, tokens, D))
    graph, params = nnx.split(moe)
    both = lambda run: jax.value_and_grad(lambda p, x: (run(nnx.merge(graph, p), x) ** 2).sum(), argnums=(0, 1))  # noqa: E731
    with axes.on(axes.mesh(devices=jax.devices()[:devices])):
        got = jax.jit(both(lambda m, x: m(x)[0]))(params, x_BTD)
    want = jax.jit(both(dense_sum))(params, x_BTD)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_what_devices_share_of_an_expert_is_summed_once_a_token():
    """Forward, and again for the gradient of what goes in; not for each of the chosen experts."""
    moe = MoE(D, 16, 4, 2, renormalised=True, std=0.5, out_std=0.5, rngs=nnx.Rngs(0))
    graph, params = nnx.split(moe)
    loss = lambda p, x: (nnx.merge(graph, p)(x)[0] ** 2).sum()  # noqa: E731
    mesh = axes.mesh(fsdp=2, tensor=4)
    with axes.on(mesh):
        placed = jax.device_put(params, axes.shardings(params, mesh))
        x_BTD = axes.put({"x": np.ones((4, 32, D), np.float32)}, 4, mesh)["x"]
        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(placed, x_BTD).compile().as_text()
    tokens = 4 * 32 // 2 // 4  # of one device, which keeps their sums alone
    assert sorted(_sizes(text, "reduce-scatter")) == [tokens * 2, tokens * D, tokens * D], (
        "2: the weights of the chosen"
    )
    assert max(_sizes(text, "all-reduce")) <= 4 * D * 16 // 4, "the gradients of parameters alone are summed whole"


def _sizes(program, kind):
    """How many elements come out of each collective of a kind."""
    lines = re.findall(rf"= (.*?) {kind}(?:-start)?\(", program)
    shapes = [shape for line in lines for shape in re.findall(r"\w+\[([\d,]+)\]", line)]
    return [np.prod([int(n) for n in shape.split(",")]) for shape in shapes]


def test_no_token_is_dropped_when_all_choose_one_expert():
    moe = layer(chosen=1)
    moe.router_DE[...] = jnp.zeros((D, E)).at[:, 3].set(1.0)
    x_BTD = jnp.abs(jax.random.normal(jax.random.key(1), (B, T, D)))
    y_BTD, routing = moe(x_BTD)
    np.testing.assert_allclose(y_BTD, dense_sum(moe, x_BTD), atol=1e-5)
    assert jnp.abs(y_BTD).min(axis=(0, 2)).min() >= 0 and jnp.abs(y_BTD).sum(-1).min() > 0
    assert routing.balance > 2, "all at one expert"


def test_an_even_router_has_balance_one_and_padding_does_not_count():
    moe = layer()
    moe.router_DE[...] = jnp.zeros((D, E))
    x_BTD = jax.random.normal(jax.random.key(1), (B, T, D))
    assert moe(x_BTD)[1].balance == pytest.approx(1.0)
    assert moe(x_BTD)[1].z == pytest.approx(np.log(E) ** 2, rel=1e-5)
    moe, real_BT = layer(), jnp.arange(T)[None].repeat(B, 0) < 5
    want = moe(x_BTD[:, :5])[1]
    got = moe(x_BTD.at[:, 5:].set(9.0), real_BT)[1]
    np.testing.assert_allclose([got.balance, got.z], [want.balance, want.z], rtol=1e-5)


def test_the_loss_has_the_routers_terms():
    sizes = dict(name="mixtral", layers=2, width=16, heads=4, kv_heads=2, head_width=4, mlp_width=32, experts=4)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 8, (2, 6)))
    batch = dict(tokens=tokens, labels=tokens, weights=jnp.ones((2, 6)), segments=jnp.ones((2, 6), jnp.int32))
    plain, more = (Blueprint.of({**sizes, "balance": b, "router_z": b}, vocab=8) for b in (0.0, 0.5))
    params = plain.init(0)
    a, b = (jax.jit(lambda p, m=model: clm.loss(m.bind(p), batch))(params) for model in (plain, more))
    _, _, added = more.bind(params).routed(tokens, segments_BT=batch["segments"])
    assert a.nll == pytest.approx(float(b.nll)) and added > 0.4
    assert b.loss - a.loss == pytest.approx(12 * float(added), rel=1e-5)


@pytest.mark.parametrize("sizes", [dict(data=2, expert=4), dict(expert=2, fsdp=2, tensor=2)], ids=str)
@pytest.mark.parametrize("even", [True, False], ids=["even", "all to one"])
def test_tokens_that_travel_to_their_experts_are_all_served_and_come_back(sizes, even):
    """However many an expert gets: there is room for every token of every device."""
    moe = MoE(D, 48, 4, 2, renormalised=True, std=0.5, out_std=0.5, rngs=nnx.Rngs(0))
    if not even:  # the last two experts, which one device has, for all
        moe.router_DE[...] = 0.1 * moe.router_DE[...].at[:, 2:].add(9.0)
    graph, params = nnx.split(moe)
    both = lambda run: jax.value_and_grad(lambda p, x: (run(nnx.merge(graph, p), x) ** 2).sum(), argnums=(0, 1))  # noqa: E731
    x = np.abs(np.random.default_rng(0).normal(size=(8, 6, D))).astype(np.float32)
    want = jax.jit(both(dense_sum))(params, jnp.asarray(x))
    mesh = axes.mesh(**sizes)
    with axes.on(mesh):
        placed, x_BTD = jax.device_put(params, axes.shardings(params, mesh)), axes.put({"x": x}, 8, mesh)["x"]
        program = jax.jit(both(lambda m, x: m(x)[0])).lower(placed, x_BTD).compile()
        got = program(placed, x_BTD)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
    operations, tensor, own = hlo.read(program.as_text() or ""), sizes.get("tensor", 1), 4 // sizes["expert"]
    sent = {op.sizes[0][1] for op in operations if op.kind == "all-to-all" and op.sizes[0][0] == "f32"}
    assert sent == {(1, tensor * 6 * min(2, own), D)}, "of each of a device's tokens as many as the other has experts"
    gathered = [shape for op in operations if op.kind == "all-gather" for _, shape in op.sizes if 48 // tensor in shape]
    assert all(np.prod(shape) <= own * D * 48 // tensor for shape in gathered), "no device has the experts of another"


def test_what_a_kernel_leaves_in_rows_behind_the_last_reaches_no_result(monkeypatch):
    """JAX promises nothing of them; a TPU's kernel does not write them."""
    moe = MoE(D, 16, 4, 2, renormalised=True, std=0.5, out_std=0.5, rngs=nnx.Rngs(0))
    graph, params = nnx.split(moe)
    x, product = np.random.default_rng(0).normal(size=(4, 6, D)).astype(np.float32), jax.lax.ragged_dot

    @jax.custom_vjp
    def unwritten(rows, w, counts):
        return forward(rows, w, counts)[0]

    def dirty(y, counts):
        return jnp.where(jnp.arange(len(y))[:, None] < counts.sum(), y, jnp.nan)

    def forward(rows, w, counts):
        return dirty(product(rows, w, counts), counts), (rows, w, counts)

    def backward(kept, d):
        rows, w, counts = kept
        ends, at = jnp.cumsum(counts), jnp.arange(len(rows))[:, None]
        whose = (at >= (ends - counts)[None]) & (at < ends[None])
        d_w = jnp.einsum("re,rd,rf->edf", whose.astype(d.dtype), rows, d)  # zeros times what was left
        return dirty(product(d, w.swapaxes(1, 2), counts), counts), d_w, None

    unwritten.defvjp(forward, backward)

    def run():
        loss = lambda p, x: (nnx.merge(graph, p)(x)[0] ** 2).sum()  # noqa: E731
        mesh = axes.mesh(data=1, expert=4)
        with axes.on(mesh):
            placed, x_BTD = jax.device_put(params, axes.shardings(params, mesh)), axes.put({"x": x}, 4, mesh)["x"]
            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(placed, x_BTD)

    want = run()
    monkeypatch.setattr(jax.lax, "ragged_dot", unwritten)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), run(), want)


@pytest.mark.parametrize("sizes", [dict(tensor=4, fsdp=2), dict(data=2, tensor=2, fsdp=2)], ids=str)
def test_experts_on_eight_devices_compute_what_one_does(sizes):
    shape = dict(name="mixtral", layers=2, width=16, heads=4, kv_heads=4, head_width=4, mlp_width=32, experts=4)
    model = Blueprint.of(shape, vocab=32)
    params = model.init(0)
    tokens = np.random.default_rng(0).integers(0, 32, (8, 12))
    run = jax.jit(lambda p, t: model.bind(p)(t)[0])
    want = run(params, tokens)
    mesh, rules = axes.mesh(**sizes), {**axes.RULES, "E": "tensor"}
    with axes.on(mesh, rules):
        placed = jax.device_put(params, axes.shardings(params, mesh, rules))
        assert placed["blocks"]["moe"]["up_EDF"].sharding.spec[1] == "tensor", "the experts themselves are split"
        got = jax.jit(lambda p, t: model.bind(p)(t)[0])(placed, tokens)
    np.testing.assert_allclose(got, want, atol=1e-5)
