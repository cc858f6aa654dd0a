"What a fresh clone relies on: make's targets, pins, badges, licences, notebooks with outputs"
import json, re, subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try: import tomllib
except ImportError: import tomli as tomllib

from gsm8k_sft.core.config import project_root

ROOT = project_root(Path(__file__).parent)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
URL = PROJECT["urls"]["Repository"]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
TARGETS = "demo test train evaluate sweep figures report docs plan bench prepare gemma smoke-gemma clean".split()

def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])
def make(*args): return subprocess.run(["make", *args], cwd=ROOT, capture_output=True, text=True)
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT).as_posix())


def test_help_is_the_default_and_lists_every_target():
    assert make().stdout == make("help").stdout
    for target in TARGETS: assert re.search(rf"^make {target} +\S", make("help").stdout, re.M), target


def test_no_python_is_said_plainly(tmp_path):
    result = make("install", "PYTHON=false", f"VENV={tmp_path}/venv")
    assert result.returncode and "Python 3.10 or later is needed" in result.stdout
    assert not (tmp_path / "venv").exists()


def pins(python="3.11"):
    lines = [l for l in (ROOT / "constraints.txt").read_text().splitlines() if l and not l.startswith("#")]
    found = [Requirement(l) for l in lines]
    environment = {"python_version": python, "python_full_version": f"{python}.9"}
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in found if not r.marker or r.marker.evaluate(environment)}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_dependency_is_pinned_within_its_bounds(python):
    pinned = pins(python)
    asked = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    assert not [name for name in pinned if name.startswith(("nvidia", "cuda")) or name == "triton"]
    assert "+" not in pinned["torch"]


@notebooks
def test_colab_badge_and_cell(path):
    here, found = path.relative_to(ROOT).as_posix(), cells(path)
    badge = f"({URL.replace('github.com', 'colab.research.google.com/github')}/blob/main/{here})"
    assert badge in source(found[0]), f"the first cell needs the badge {badge}"
    code = [source(c) for c in found if c["cell_type"] == "code"]
    assert not code or ('"google.colab" in sys.modules' in code[0] and URL in code[0]), "the first code cell installs the project on Colab"


@notebooks
def test_notebook_is_a_chapter(path):
    found = cells(path)
    assert re.match(r"# .+\n\n> .+\n", source(found[0])), "# Title, an empty line, > subtitle"
    code = [c for c in found if c["cell_type"] == "code"]
    assert not code or any(c["outputs"] for c in code), "committed without outputs"
    for cell in code:
        assert len(source(cell).splitlines()) <= 30, source(cell)[:80]
        assert not [o for o in cell["outputs"] if o["output_type"] == "error"], source(cell)[:80]


@notebooks
def test_imports_stand_alone(path):
    "nbdev's docs run each cell that has an import, so nothing else may happen in it"
    for cell in cells(path):
        lines = [l for l in source(cell).splitlines() if cell["cell_type"] == "code" and l and not l.startswith(("#", " "))]
        imports = [l for l in lines if re.match(r"(import|from) ", l)]
        assert not imports or len(imports) == len(lines) or source(cell).startswith(("#| export", "#| hide")), source(cell)


def test_lines_of_code_end_in_sight():
    "No line of a code cell or a test is longer than 140 characters"
    lines = [(path, l) for path in NOTEBOOKS for cell in cells(path) if cell["cell_type"] == "code" for l in source(cell).splitlines()]
    lines += [(path, l) for path in sorted((ROOT / "tests").glob("*.py")) for l in path.read_text(encoding="utf-8").splitlines()]
    assert not [f"{path.name}: {l.strip()[:60]}" for path, l in lines if len(l) > 140]


def tracked():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    return [ROOT / n for n in names if n and (ROOT / n).is_file()]


def test_no_machine_in_the_repository():
    "Paths of one machine help nobody else"
    for path in tracked():
        if path.suffix in (".safetensors", ".png", ".svg") or path.name in ("tokenizer.json", "test_house.py"): continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for word in ("/work/", "/root/", "/home/", ".pyenv"): assert word not in text, f"{path}: {word}"
        assert "../shared" not in text or path == ROOT / ".ci" / "run", path


def test_what_papermill_and_packaging_need_is_there():
    assert (ROOT / "runs").is_dir(), "papermill doesn't make the folder of its output"
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
    assert "Gemma Terms of Use" in (ROOT / "NOTICE").read_text() and "MIT" in (ROOT / "NOTICE").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
