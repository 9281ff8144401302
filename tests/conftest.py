"""What all tests share: where the golden numbers and the real data are."""

import gc
import os
import resource
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from minimind_jax.huge_pages import give_back

# Tests compile many tiny programs once each: compiled plainly they take a third of the time and less memory. Read when
# JAX is first imported, and by the processes that tests start.
PLAIN = ["backend_optimization_level=0", "cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):  # later ones end the process at a flag that they no longer know
    PLAIN.append("cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(f"--xla_{flag}" for flag in PLAIN))
# Every program counts, small ones too: the processes of a test session, and runs in them, compile the same ones.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Half a million objects of libraries stay for good; looking through them again and again took a tenth of the time.
gc.set_threshold(100_000, 50, 100)
# Signals are tested: `nohup make test`, or a shell's `&`, would have them ignored by every process that tests start.
for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)
COMPILED_MEGABYTES = 1000  # a process that has grown by more drops its compiled programs, of which it makes thousands

pytest_plugins = ["worlds"]  # a tiny world to train in

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def megabytes_left():
    """[resident when programs were last dropped]: what libraries hold, a gigabyte and more, stays whatever is done."""
    return [0]


@pytest.fixture(scope="module", autouse=True)
def bounded_memory(megabytes_left):
    """Compiled programs take a megabyte or two each for as long as JAX keeps them; they come back from its cache."""
    yield
    if "jax" in sys.modules and _resident_megabytes() > megabytes_left[0] + COMPILED_MEGABYTES:
        sys.modules["jax"].clear_caches()
        gc.collect()
        give_back()
        megabytes_left[0] = _resident_megabytes()


def _resident_megabytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20
    except OSError:  # no Linux
        return 0


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
