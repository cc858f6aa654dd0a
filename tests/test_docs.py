"The docs site: built once by `make test-all`, without a fault; planted faults are found; its menus hold every chapter"
import json
from pathlib import Path

import pytest, yaml

from gsm8k_sft.core.config import project_root

pytest.importorskip("smalldocs", reason="smalldocs needs Python 3.11")
from crawl import crawl
from gsm8k_sft.site.docs import build_site

NBS = project_root(Path(__file__).parent) / "nbs"
NOTEBOOKS = [p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
FAULTS = {
    "link": ('<a href="gone.html">there</a>', "link gone.html: isn't there"),
    "image": ('<img src="gone.png" alt="a curve">', "image gone.png: isn't there"),
    "anchor": ('<a href="#gone">there</a>', "link #gone: has no such anchor"),
    "far anchor": ('<a href="other.html#gone">there</a>', "link other.html#gone: has no such anchor"),
    "root": ('<a href="/other.html">there</a>', "link /other.html: leaves the site's folder"),
    "alternative": ('<img src="other.png">', "image other.png: no alternative text"),
    "directive": ("<pre><code>#| export\nx = 1</code></pre>", "directive in the text: #| export"),
    "traceback": ("<pre>Traceback (most recent call last)\nNameError</pre>", "traceback in the text"),
    "formula": ("<p>of \\(BA\\)</p>", "formula not rendered: \\(BA\\)"),
    "script": ('<script src="https://cdn.example/x.js"></script>', "needs the network: https://cdn.example/x.js"),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONWARNINGS", "ignore")
        return build_site(tmp_path_factory.mktemp("docs") / "site")


@pytest.mark.slow # `make docs` builds and crawls the site too, and CI on each change
def test_the_site_has_no_fault(site):
    assert crawl(site) == []


@pytest.mark.slow
def test_every_chapter_is_a_page_with_its_introduction(site):
    for path in NOTEBOOKS:
        name = path.relative_to(NBS).with_name(path.stem.split("_", 1)[-1] if path.stem[0].isdigit() else path.stem).with_suffix(".html")
        page = (site / name).read_text(encoding="utf-8")
        assert "colab-badge.svg" in page, name
        subtitle = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).split("\n")[2].lstrip("> ")
        assert subtitle.split("'")[0].split("`")[0][:40] in page, name


@pytest.mark.slow
def test_the_report_search_and_both_schemes_are_there(site):
    report = (site / "report" / "index.html").read_text(encoding="utf-8")
    assert "<table" in report and "comparison.png" in report and list((site / "report").glob("*comparison.png"))
    assert len(json.loads((site / "search.json").read_text(encoding="utf-8"))) > 100
    assert "prefers-color-scheme: dark" in report
    assert "<mfrac>" in (site / "models" / "adapters.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(tmp_path, name):
    planted, expected = FAULTS[name]
    (tmp_path / "other.png").touch()
    (tmp_path / "other.html").write_text('<h2 id="here">Here</h2> <a href="index.html">home</a>')
    sound = '<a href="other.html#here">x</a> <img src="other.png" alt="y"> <p>a `#|` in a line, $5 and $6</p>'
    (tmp_path / "index.html").write_text(f"{sound}\n{planted}")
    assert crawl(tmp_path) == [f"index.html: {expected}"]


def test_an_empty_folder_is_a_fault(tmp_path):
    assert crawl(tmp_path) == [f"{tmp_path.name}: no page"]


def entries(item):
    if isinstance(item, list): return [e for i in item for e in entries(i)]
    return entries(item["contents"]) if isinstance(item, dict) else [item]


def test_the_sidebar_has_every_notebook_once():
    menu = yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    assert sorted(entries(menu)) == sorted(p.relative_to(NBS).as_posix() for p in NOTEBOOKS)
