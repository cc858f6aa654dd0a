"What a fresh clone relies on: make's targets, pins, badges, licences; the house's rules; nothing here is slow to import"
import ast, json, re, shlex, shutil, subprocess, sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try: import tomllib
except ImportError: import tomli as tomllib

from gsm8k_sft.core.config import project_root

ROOT = project_root(Path(__file__).parent)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
URL = PROJECT["urls"]["Repository"]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
TARGETS = "demo check test test-all train evaluate sweep figures report docs plan bench prepare gemma smoke-gemma clean".split()

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


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_dependency_is_pinned_within_its_bounds(python):
    pinned = pins(python)
    asked = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    assert not [name for name in pinned if name.startswith(("nvidia", "cuda")) or name == "triton"]
    assert "+" not in pinned["torch"]


def test_ruff_finds_nothing():
    found = subprocess.run([sys.executable, "-m", "ruff", "check", "-q", "gsm8k_sft", "tests"], cwd=ROOT, capture_output=True, text=True)
    assert not found.returncode, found.stdout


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


def test_chapters_that_users_run_begin_without_a_warning():
    "gsm8k_sft silences bitsandbytes, which transformers and peft import"
    for path in (ROOT / "nbs").glob("*.ipynb"):
        code = "\n".join(source(c) for c in cells(path) if c["cell_type"] == "code")
        names = re.findall(r"^(?:from|import) (gsm8k_sft|transformers|peft)\b", code, re.M)
        assert names[:1] in ([], ["gsm8k_sft"]), path.name


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


# The house's rules

PACKAGE = ROOT / "gsm8k_sft"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_modidx.py")
BIN = Path(sys.executable).parent


def test_arrows_run_down_only():
    result = subprocess.run([BIN / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def imported(tree):
    "Name in the module -> where it comes from, for what is imported from this package"
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("gsm8k_sft")):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_private_names_and_attributes_stay_in_their_module(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = imported(tree)
    private = [source for source in names.values() if source.rpartition(".")[2].startswith("_")]
    assert not private, f"{path.name} takes {private}: make it public, on the lower floor"
    targets = [t for n in ast.walk(tree) if isinstance(n, ast.Assign | ast.AugAssign | ast.AnnAssign)
               for t in (n.targets if isinstance(n, ast.Assign) else [n.target])]
    changed = [ast.unparse(t) for t in targets if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id in names]
    changed += [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in ("setattr", "patch.object")
                and isinstance(n.args[0], ast.Name) and n.args[0].id in names]
    assert not changed, f"{path.name} sets {changed}: give a switch to what it changes"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_module_imports_its_own_package_by_relative_names(path):
    "nbdev makes them so at the top of a module, if the last line of a list of names is longer than `from gsm8k_sft.x import (`"
    top = ast.parse(path.read_text(encoding="utf-8")).body
    left = [n.module for n in top if isinstance(n, ast.ImportFrom) and not n.level and n.module.startswith("gsm8k_sft")]
    assert not left, f"{path.name}: {', '.join(left)}; break the list of names earlier"


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for top in ("nbs", "gsm8k_sft") for p in sorted((folder / top).rglob("*"))
            if p.suffix in (".ipynb", ".py") and ".ipynb_checkpoints" not in p.parts}


def test_modules_and_notebooks_are_in_step(tmp_path):
    for name in ("nbs", "gsm8k_sft"): shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    for name in ("pyproject.toml", "settings.ini"): shutil.copy(ROOT / name, tmp_path)
    for command in ("nbdev-export", "nbdev-clean"): subprocess.run([BIN / command], cwd=tmp_path, check=True)
    before, after = contents(ROOT), contents(tmp_path)
    changed = sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    assert not changed, f"run `make prepare` and commit: {', '.join(changed)}"


def test_no_module_is_left_over():
    "Each module comes from a notebook that says so"
    for path in MODULES:
        if path.name == "__init__.py": continue
        found = re.search(r"File to edit: (\S+\.ipynb)", path.read_text(encoding="utf-8"))
        assert found and (path.parent / found[1]).exists(), path


def test_readme_is_the_index():
    from gsm8k_sft.site.readme import readme_text
    committed = (ROOT / "README.md").read_text(encoding="utf-8")
    assert committed == readme_text(ROOT / "nbs" / "index.ipynb"), "run `make prepare` and commit README.md"


def test_contributing_names_the_floors_of_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("| floor |")[2].partition("\n\n")[0]
    floors = [re.findall(r"\w+", line.split("|")[1]) for line in table.splitlines()[2:]]
    assert floors == [re.findall(r"\w+", layer) for layer in layers]


@pytest.mark.parametrize("path", [*NOTEBOOKS, *ROOT.glob("*.md")], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8") if path.suffix == ".md" else "\n".join(
        source(c) for c in cells(path) if c["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text):
        if re.match(r"\w+:", target): continue
        assert (path.parent / target).exists(), f"{path.name}: the link to {target} leads nowhere"


def advised():
    "Place and text of whatever tells a user to set something: prose, and messages of the package"
    for path in [*NOTEBOOKS, *ROOT.glob("*.md"), *MODULES]:
        if path.suffix != ".ipynb": yield path.name, path.read_text(encoding="utf-8")
        elif path.name != "log.ipynb": yield path.name, "\n".join(source(c) for c in cells(path) if c["cell_type"] == "markdown")


def test_settings_that_are_advised_exist():
    from gsm8k_sft.core.config import load_config
    known, missing = load_config(training=False), object()
    found = {(name, key) for name, text in advised()
             for key in re.findall(r"(?<![\w.{])((?:train|model|data|evaluation|lora_config)\.[a-z_0-9.]+)=(?![=\s])", text)}
    assert len(found) > 50
    wrong = [(name, key) for name, key in found if OmegaConf.select(known, key, default=missing, throw_on_missing=False) is missing]
    assert not wrong, wrong


def test_commands_that_are_advised_can_be_given():
    "Their overrides go together, and say no more than is needed"
    from gsm8k_sft.core.config import load_config
    from gsm8k_sft.training.graphs import choose_speedup
    found = 0
    for name, text in advised():
        for command in re.findall(r"^ {4}(accelerate launch .*-m gsm8k_sft\.train(?:[^\n]*\\\n)*[^\n]*)", text, re.M):
            words = shlex.split(command.replace("\\\n", " "))
            given = {k: words[words.index(f"--{k}") + 1] for k in ("preset", "tuning", "overrides") if f"--{k}" in words}
            cfg, bare = load_config(**given, training=False), load_config(**{**given, "overrides": ""}, training=False)
            assert choose_speedup(cfg, 2_000_000_000, True, 2) == choose_speedup(bare, 2_000_000_000, True, 2) == "compile", (name, command)
            found += 1
    assert found >= 2


def test_the_training_notebook_is_short():
    assert len(cells(ROOT / "nbs" / "02_train.ipynb")) <= 45


def test_half_of_the_code_cells_show_something():
    poor = []
    for path in NOTEBOOKS:
        code = [c for c in cells(path) if c["cell_type"] == "code" and source(c).strip()]
        shown = sum(bool(c["outputs"]) for c in code)
        if len(code) < 4: continue # prose: the log
        if 2 * shown < len(code): poor.append(f"{path.relative_to(ROOT)}: {shown} of {len(code)} code cells show something")
    assert not poor, "; ".join(poor)


def test_the_house_stays_small():
    "Lines of the package: 9,792 at f65ec86; checks, statistics, data sets, export, Ray, GPUs, clusters took the rest. Tracked files."
    assert sum(len(p.read_text(encoding="utf-8").splitlines()) for p in MODULES) <= 12_109
    names = [p.relative_to(ROOT).as_posix() for p in tracked()]
    assert len(names) <= 400
    assert sum(n.startswith("results/") for n in names) <= 60 and sum(n.startswith("figures/") for n in names) <= 60
