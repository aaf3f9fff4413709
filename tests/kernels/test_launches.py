"""How little one forward and one backward launch: below some 16k tokens that is what they cost."""

from __future__ import annotations

import pytest

from tests.kernels.counting import count

PARTS = ("selection", "forward", "backward")
LAUNCHES = {
    # Triton launches and operations of torch of each part.
    (2048, False): ((10, 2), (1, 0), (9, 1)),
    (2048, True): ((10, 3), (1, 0), (9, 1)),
    (131072, False): ((16, 2), (1, 0), (30, 1)),
}


@pytest.mark.parametrize(("setting", "expected"), LAUNCHES.items(), ids=str)
def test_launches(setting: tuple[int, bool], expected: tuple[tuple[int, int], ...]) -> None:
    """On `meta` tensors, so whatever waits for the device, or depends on numbers, raises."""
    length, carry = setting
    for part, (kernels, operations) in zip(PARTS, expected, strict=True):
        seen = count(length, carry=carry)[part]
        found = [sum(n for name, n in seen.items() if name.startswith(kind)) for kind in ("triton", "torch")]
        assert found == [kernels, operations], (part, dict(seen))
