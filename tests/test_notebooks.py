"Every notebook runs, the modules are what the notebooks export, and README.md is what the index says"
import os, shutil, signal, subprocess, sys, tempfile
from pathlib import Path

import nbdev.test
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

from gsm8k_sft.core.config import project_root
from gsm8k_sft.site.readme import readme_text

ROOT = project_root(Path(__file__).parent)
NOTEBOOKS = sorted(Path(p).resolve() for p in nbglob(ROOT / "nbs", as_path=True))


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
    os.environ.clear(), os.environ.update(environ)
    shutil.rmtree(own, ignore_errors=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_notebook_runs(path, surroundings):
    flags = get_config(ROOT).tst_flags.split()
    passed, _ = nbdev.test.test_nb(path, skip_flags=flags, basepath=ROOT, cell_timeout=300)
    assert passed, f"{path.name}: the failing cell is shown under 'Captured stderr'"


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for top in ("nbs", "gsm8k_sft") for p in sorted((folder / top).rglob("*"))
            if p.suffix in (".ipynb", ".py") and ".ipynb_checkpoints" not in p.parts}


def test_modules_and_notebooks_are_in_step(tmp_path):
    for name in ("nbs", "gsm8k_sft"): shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    for name in ("pyproject.toml", "settings.ini"): shutil.copy(ROOT / name, tmp_path)
    for command in ("nbdev-export", "nbdev-clean"): subprocess.run([Path(sys.executable).parent / command], cwd=tmp_path, check=True)
    before, after = contents(ROOT), contents(tmp_path)
    changed = sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    assert not changed, f"run `make prepare` and commit: {', '.join(changed)}"


def test_readme_is_the_index():
    committed = (ROOT / "README.md").read_text(encoding="utf-8")
    assert committed == readme_text(ROOT / "nbs" / "index.ipynb"), "run `make prepare` and commit README.md"
