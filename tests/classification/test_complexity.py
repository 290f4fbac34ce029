"""Parameters and FLOPs, as printed by the command."""

import pytest

from spatial_mamba.classification import complexity

from .micro_models import PARAMETERS


@pytest.mark.parametrize(
    ("variant", "gflops"),
    [
        ("tiny", 4.5),
        pytest.param("small", 7.1, marks=pytest.mark.slow),
        pytest.param("base", 15.8, marks=pytest.mark.slow),
    ],
)
def test_complexity_command(variant: str, gflops: float, capsys: pytest.CaptureFixture) -> None:
    assert complexity.main([f"spatialmamba_{variant}"]) == 0
    name, size, counted, measured = capsys.readouterr().out.splitlines()[-1].split()
    assert (name, size, counted) == (f"spatialmamba_{variant}", "224", f"{PARAMETERS[variant]:,}")
    assert float(measured) == pytest.approx(gflops, rel=0.02)
