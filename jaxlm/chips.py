"""What one device of each kind can do, as its makers publish it.

    chips.of("TPU v6 lite").flops            918e12 a second, dense bfloat16
    chips.of("NVIDIA H100 80GB HBM3").hbm    80e9 bytes

Bandwidths of links: "How to Scale Your Model" (jax-ml.github.io/scaling-book, "Summary of bandwidths"), of those to the
hosts its chapter "How to Think About TPUs" (PCIe about 1.5e10 bytes/s a chip, of a v6e 32 GB/s).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device; a TPU7x chip is two."""

    flops: float  # dense bfloat16 FLOP/s
    hbm: float  # bytes of memory
    read: float  # bytes/s of memory
    clock: float = 0.0  # cycles/s; of a TPU, flops / (cycles x matrix units x their cells x 2)
    link: float = 0.0  # bytes/s one way over one link to a neighbour
    dims: int = 1  # of the torus that the links form: each adds two links
    outside: float = 0.0  # bytes/s a device to other slices or hosts
    host: float = 0.0  # bytes/s each way between a device and its host's memory, where that is published

    def within(self, group: int, slice_shape: tuple[int, ...]) -> float:
        """Bytes/s a device sends and receives in a ring over `group` neighbours: both ways along each axis of the
        torus that the group fills.
        """
        axes, reach = 0, 1
        for size in sorted(slice_shape, reverse=True):
            if reach < group:
                axes, reach = axes + 1, reach * size
        return 2 * self.link * max(1, min(axes, self.dims))


GB, TB, T = 1e9, 1e12, 1e12
CHIPS = {
    "TPU v4": Chip(275 * T, 32 * GB, 1.23 * TB, 1.05e9, 45 * GB, 3, 6.25 * GB, 15 * GB),
    "TPU v5 lite": Chip(197 * T, 16 * GB, 0.82 * TB, 1.5e9, 45 * GB, 2, 3.125 * GB, 15 * GB),
    "TPU v5": Chip(459 * T, 95 * GB, 2.77 * TB, 1.75e9, 90 * GB, 3, 6.25 * GB, 15 * GB),
    "TPU v6 lite": Chip(918 * T, 32 * GB, 1.64 * TB, 1.75e9, 90 * GB, 2, 12.5 * GB, 32 * GB),
    "TPU7x": Chip(1153 * T, 96 * GB, 3.69 * TB, 2.2e9, 90 * GB, 3, 12.5 * GB),
    "NVIDIA A100": Chip(312 * T, 80 * GB, 2.04 * TB, link=300 * GB, outside=25 * GB),
    "NVIDIA H100": Chip(989 * T, 80 * GB, 3.35 * TB, link=450 * GB, outside=50 * GB),
    "NVIDIA H200": Chip(989 * T, 141 * GB, 4.8 * TB, link=450 * GB, outside=50 * GB),
    "NVIDIA B200": Chip(2250 * T, 192 * GB, 8.0 * TB, link=900 * GB, outside=50 * GB),
}


def of(kind: str) -> Chip | None:
    """What is known of a device by its `device_kind`; None for a CPU or another device."""
    return next((chip for name, chip in CHIPS.items() if kind.startswith(name)), None)
