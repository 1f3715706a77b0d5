"""The alphabet: names check shapes and place arrays."""

import logging

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from jaxlm import axes
from jaxlm.lookup import Mistake


@pytest.fixture(scope="module")
def mesh():
    return axes.mesh(data=2, fsdp=2, tensor=2)


def test_a_name_says_its_axes():
    assert axes.of("wq_DNH") == "DNH" and axes.of("x_BTD") == "BTD"
    assert axes.of("scale") is None and axes.of("my_Width") is None


def test_a_shape_that_breaks_its_name_is_an_error_with_both():
    @axes.shaped
    def f(x_BTD, w_DF=None):
        return x_BTD

    f(jnp.ones((1, 2, 3)), w_DF=jnp.ones((3, 4)))
    with pytest.raises(TypeError, match=r"x_BTD has shape \(2, 3\)"):
        f(jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="w_DF has D=5, but D=3 elsewhere"):
        f(jnp.ones((1, 2, 3)), jnp.ones((5, 4)))


def test_one_table_places_parameters_and_activations(mesh):
    assert axes.spec("DNH", (8, 4, 2), mesh) == P("fsdp", "tensor", None)
    assert axes.spec("DNH", (3, 8, 4, 2), mesh) == P(None, "fsdp", "tensor", None), "stacked layers"
    assert axes.spec("BTD", (8, 16, 8), mesh) == P(("data", "fsdp"), "tensor", None), "B took fsdp, so D goes without"


def test_tokens_are_split_by_what_the_other_letters_leave():
    mesh = axes.mesh(sequence=2, tensor=2)
    assert axes.spec("BTD", (8, 16, 8), mesh) == P("data", ("sequence", "tensor"), None)
    assert axes.spec("BTF", (8, 16, 8), mesh) == P("data", "sequence", "tensor")
    assert axes.spec("BNTH", (8, 2, 16, 4), mesh) == P("data", "tensor", "sequence", None)
    assert axes.spec("BNTH", (8, 3, 16, 4), mesh) == P("data", None, ("sequence", "tensor"), None), "heads in no half"
    assert axes.spec("BTD", (8, 6, 8), mesh) == P("data", "sequence", None), "as far as they divide it"


def test_stages_split_layers_and_outside_of_them_rows_and_widths():
    mesh = axes.mesh(data=2, stage=2, fsdp=2)
    assert axes.spec("DNH", (4, 8, 4, 2), mesh) == P("stage", "fsdp", None, None)
    assert axes.spec("VD", (32, 8), mesh) == P(None, ("fsdp", "stage"))
    assert axes.spec("BTD", (8, 16, 8), mesh) == P(("stage", "data", "fsdp"), None, None)
    with pytest.raises(Mistake, match=r"config.mesh.stage=2 does not divide the 3 layers of wq_DNH; what does: 1, 3"):
        axes.spec("DNH", (3, 8, 4, 2), mesh, name="wq_DNH")


def test_an_axis_that_does_not_divide_is_not_split_and_the_log_says_so_once(mesh, caplog):
    with caplog.at_level(logging.INFO, "jaxlm"):
        for _ in range(2):
            assert axes.spec("NH", (5, 2), mesh, name="odd_NH") == P(None, None)
    assert caplog.text.count("odd_NH: axis N of size 5 does not divide over tensor=2") == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(data=16), "does not fit 8 devices"),
        (dict(data=-1, fsdp=3), "does not fit 8 devices"),
        (dict(data=-1, fsdp=-1), "does not fit 8 devices"),
        (dict(data=0), "config.mesh.data=0 is not 1 or more"),
        (dict(sequence=-2), "config.mesh.sequence=-2 is not 1 or more"),
        (dict(slices=0), "config.mesh.slices=0 is not 1 or more"),
        (dict(slices=2), "config.mesh.slices=2, but the devices are of 1"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_names_sizes_and_devices(sizes, message):
    with pytest.raises(Mistake, match=message):
        axes.mesh(**sizes)


def test_a_mesh_of_fewer_devices_leaves_the_rest_idle():
    assert axes.mesh(data=3).size == 3


def test_rules_with_unknown_letters_or_axes_are_refused(mesh):
    with pytest.raises(Mistake, match=r"config.rules has no 'Q'"):
        axes.check_rules({"Q": "data"}, mesh)
    with pytest.raises(Mistake, match=r"config.rules\['D'\] has no 'tensors'; did you mean 'tensor'"):
        axes.check_rules({"D": "tensors"}, mesh)


def test_a_batch_is_put_together_from_the_rows_of_this_process(mesh):
    tokens = np.arange(24).reshape(8, 3)
    placed = axes.put({"tokens": tokens}, 8, mesh)["tokens"]
    np.testing.assert_array_equal(placed, tokens)
    assert placed.sharding.spec == P(("data", "fsdp"))
    assert axes.local_rows(8, mesh) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert axes.local_rows(3, mesh) == [(0, 3)], "rows that do not divide are everywhere"


def test_weights_are_cut_around_the_width():
    assert axes.cut("DNH") == ("D", "NH") and axes.cut("NHD") == ("NH", "D") and axes.cut("FD") == ("F", "D")


def test_every_letter_of_a_factored_statistic_is_left_whole(mesh):
    tree = {"wq_DNH": jax.ShapeDtypeStruct((4,), jnp.float32)}
    assert axes.shardings(tree, mesh)["wq_DNH"].spec == P()
