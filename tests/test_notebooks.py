"Every notebook runs; 02_train by papermill, with few steps, in test_train.py"
import os, shutil, signal, sys, tempfile
from importlib.util import find_spec
from pathlib import Path

import nbdev.test
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from transformers import AttentionInterface

from gsm8k_sft.core.config import project_root
from gsm8k_sft.generation.kv_cache import IMPLEMENTATION, slot_attention
from gsm8k_sft.training.packing import PACKED, packed_attention

ROOT = project_root(Path(__file__).parent)
NOTEBOOKS = sorted(Path(p).resolve() for p in nbglob(ROOT / "nbs", as_path=True) if Path(p).name != "02_train.ipynb")


@pytest.fixture
def surroundings(monkeypatch):
    "Runs and results of the test's own, below the project as usual; what a notebook changes in this process is put back"
    (ROOT / ".cache").mkdir(exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix="test-", dir=ROOT / ".cache"))
    for key in ("RUNS", "EVAL_RESULTS"): monkeypatch.setenv(f"GSM8K_SFT_PATHS_{key}", str((own / key.lower()).relative_to(ROOT)))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT)
    environ, handlers = dict(os.environ), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items(): signal.signal(number, handler)
    for name, attention in ((IMPLEMENTATION, slot_attention), (PACKED, packed_attention)): AttentionInterface.register(name, attention)
    os.environ.clear(), os.environ.update(environ)
    shutil.rmtree(own, ignore_errors=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_notebook_runs(path, surroundings):
    if path.name == "docs.ipynb" and not find_spec("smalldocs"): pytest.skip("smalldocs needs Python 3.11")
    flags = get_config(ROOT).tst_flags.split()
    passed, _ = nbdev.test.test_nb(path, skip_flags=flags, basepath=ROOT, cell_timeout=1800)
    assert passed, f"{path.name}: the failing cell is shown under 'Captured stderr'"
