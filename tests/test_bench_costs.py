"""What a step costs as work grows is measured by a table and its exponents."""

import pytest

from scripts import bench_costs


def test_an_exponent_is_the_power_that_a_cost_follows():
    sizes = [64, 128, 512]
    assert bench_costs.exponent(sizes, [0.3 * n**2 for n in sizes]) == 2.0
    assert bench_costs.exponent(sizes, [7.0] * 3) == 0.0


@pytest.mark.endurance
def test_a_table_has_a_row_a_size_and_an_exponent_a_column(monkeypatch):
    monkeypatch.setitem(bench_costs.SIZES, "batch", [8, 16])
    monkeypatch.setitem(bench_costs.ABOUT, "batch", dict(layers=1, width=64, context=32))
    monkeypatch.setattr(bench_costs, "SECONDS", 0.0)
    found = bench_costs.costs(None, "batch")  # type: ignore[arg-type]
    assert [row["size"] for row in found["rows"]] == [8, 16]
    assert found["exponents"].keys() == {"step_ms", "cpu_ms", "temporary_mb", "held_mb"}
    assert found["exponents"]["held_mb"] < 0.1 < found["exponents"]["temporary_mb"]
