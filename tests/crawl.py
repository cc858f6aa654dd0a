"Faults of a rendered site, found without a network: python tests/crawl.py _docs"
import re, sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup


def broken(target, path, folder, ids):
    "What is wrong with a link of the page at `path`, or nothing; `ids` are the anchors of each page"
    parts = urlsplit(target)
    if parts.scheme or parts.netloc: return ""
    if parts.path.startswith("/"): return "leaves the site's folder"
    file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if file.is_dir(): file /= "index.html"
    if not file.is_file() or not file.is_relative_to(folder): return "isn't there"
    if not parts.fragment or file not in ids: return ""
    return "" if unquote(parts.fragment) in ids[file] else "has no such anchor"


def faults(page, path, folder, ids):
    "What is wrong with the page at `path`"
    images = [(t.get("src") or "", t.get("alt") or "") for t in page("img")] + [(t.get("srcset") or "", "dark") for t in page("source")]
    fetched = [t["src"] for t in page("script", src=True)] + [t["href"] for t in page("link", rel="stylesheet")]
    links = {"link": [t["href"] for t in page("a", href=True)], "image": [t for t, _ in images], "file": fetched}
    for kind, targets in links.items():
        yield from (f"{kind} {t[:80]}: {why}" for t in targets if (why := broken(t, path, folder, ids)))
    yield from (f"image {t[:80]}: no alternative text" for t, alt in images if not alt.strip())
    yield from (f"needs the network: {t}" for t in fetched if urlsplit(t).netloc)
    for tag in page(["script", "style", "math"]): tag.decompose()
    text = "\n".join("".join(tag.strings) for tag in page("pre") + [page])
    if found := re.search(r"^\s*#\| ?[a-z_-]+", text, re.M): yield f"directive in the text: {found[0].strip()}"
    if re.search(r"^Traceback \(most recent call last\)", text, re.M): yield "traceback in the text"
    for tag in page(["pre", "code"]): tag.decompose()
    if found := re.search(r"\\[(\[].{0,30}|\$\\?\w[^$]{0,30}\\\w+", page.get_text()): yield f"formula not rendered: {found[0]}"


def crawl(folder):
    "A line for each fault of a site: page, what is wrong"
    folder = Path(folder).resolve()
    pages = {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in sorted(folder.rglob("*.html"))}
    if not pages: return [f"{folder.name}: no page"]
    ids = {path: {"", "top", *(t.get(k) for k in ("id", "name") for t in page(attrs={k: True}))} for path, page in pages.items()}
    found = {path: dict.fromkeys(faults(page, path, folder, ids)) for path, page in pages.items()}
    return [f"{path.relative_to(folder).as_posix()}: {fault}" for path, of_page in found.items() for fault in of_page]


if __name__ == "__main__":
    problems = crawl(sys.argv[1])
    print("\n".join(problems) or f"{sys.argv[1]}: {len(list(Path(sys.argv[1]).rglob('*.html')))} pages, no fault found")
    sys.exit(bool(problems))
