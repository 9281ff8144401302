"""What all tests share: where the golden numbers and the real data are."""

import os
from pathlib import Path

import pytest

# Tests compile many tiny programs once each: less optimisation halves their time. Read when JAX is first imported.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Golden numbers made by MiniMind's own PyTorch code in float32."""
    return ROOT / "tests" / "fixtures"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Third-party text that is not part of the project: $MINIMIND_SHARED, or `shared` beside the checkout."""
    folder = Path(os.environ.get("MINIMIND_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no third-party data at {folder}; set MINIMIND_SHARED to its folder to run this test")
    return folder
