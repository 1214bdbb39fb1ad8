"""Where the recorded cases are. The tests run on the installed package, from outside the source tree:

    pip install WHEEL pytest numpy torch transformers
    pytest bindings/python/tests
"""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of recorded cases."""
    return REPOSITORY / "crates/moe-runner/tests/golden"


@pytest.fixture(scope="session")
def tiny_moe() -> Path:
    """The small language model of this repository."""
    return REPOSITORY / "models/tiny-moe"


def pytest_report_header() -> str:
    import moe_runner

    return f"moe_runner {moe_runner.__version__} of {os.path.dirname(moe_runner.__file__)}"
