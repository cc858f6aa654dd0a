"The widgets: what they show, what their callbacks do, and the explorer under a real pointer in JupyterLab"
import base64, importlib.util, json, os, shutil, subprocess, sys, time, urllib.request
from pathlib import Path
import nbformat, pytest
from gsm8k_sft.evaluation.archive import unpack
from gsm8k_sft.grading.errors import grade_answer
from gsm8k_sft.core.config import load_config, project_path
from gsm8k_sft.models.loading import load_model, load_tokenizer
from gsm8k_sft.site.widgets import (
    answer_html, evaluations, explorer, filter_answers, live, pair_answers, planner, playground, read_pair, stream_pair, _text_html)

RESULTS = project_path("results")
FULL, LORA, BASE = [f"toy{name}__toy__main" for name in ("-full_main-s0__test__full", "-lora_main-s0__test__lora", "__test__base-0shot")]


def prediction(i, text, gold="#### 4", **kwargs):
    answer = {"id": f"main/test/{i}", "question": f"Question {i}?", "gold": "4", "text": text, "n_tokens": 9, "finish_reason": "stop"}
    return answer | grade_answer(text, gold) | kwargs


# Plain functions

def test_pairs_are_the_common_problems_in_the_order_of_the_first():
    a, b = [prediction(i, "#### 4") for i in (2, 0, 1)], [prediction(i, "#### 5") for i in (0, 1, 2, 3)]
    assert [p["id"][-1] for p in pair_answers(a, b)] == ["2", "0", "1"]

def test_of_several_samples_the_first_is_paired():
    drawn = [prediction(0, f"#### {k}", sample=k - 4) for k in (4, 5, 6)]
    (pair,) = pair_answers(drawn, [prediction(0, "#### 7")])
    assert pair["a"]["extracted_strict"] == "4"

ODD = ["<b>4</b> & more", "<<1+1=2>><script>", "a\x00b", "####", "<<=>>", "<<1/0=3>>", "<<1+\n1=2>>",
       "2 + 2 = 4 = 4 + 0 = 4 #### 4", "", "𝟜 × 2 = 8", "#### -5 #### 7"]

@pytest.mark.parametrize("text", ODD)
def test_marks_change_no_letter(text):
    "Without its marks, the HTML is the text"
    from html import unescape
    import re
    assert unescape(re.sub(r"<sup>.</sup>|</?span[^>]*>", "", _text_html(text))) == text.strip()

@pytest.mark.parametrize("name", [FULL, BASE])
def test_marks_change_no_letter_of_real_answers(name):
    import re
    from html import unescape
    from gsm8k_sft.evaluation.results import read_predictions
    for p in read_predictions(name, RESULTS / "toy" / "eval"):
        assert unescape(re.sub(r"<sup>.</sup>|</?span[^>]*>", "", _text_html(p["text"]))) == p["text"].strip()

def test_who_differs_depends_on_the_grader():
    (pair,) = pairs = pair_answers([prediction(0, "It is 4.")], [prediction(0, "#### 4")])
    assert filter_answers(pairs, "they differ") == [pair] and filter_answers(pairs, "they differ", metric="numeric") == []

def test_an_answer_without_number_says_so():
    (pair,) = pair_answers([prediction(0, "No idea.")], [prediction(0, "#### 4")])
    shown = answer_html(pair)
    assert "✗ no final answer; no final answer; 9 tokens" in shown and "✓ right; final answer 4" in shown

def test_damaged_or_missing_predictions_are_left_out(tmp_path):
    folder = tmp_path / "toy" / "eval"
    unpack(RESULTS / "toy", tmp_path / "toy")
    assert len(evaluations(tmp_path)) == 8
    (folder / f"{FULL}.predictions.jsonl").write_text("{}\n")
    (folder / f"{LORA}.predictions.jsonl").unlink()
    assert not {FULL, LORA} & set(evaluations(tmp_path)) and len(evaluations(tmp_path)) == 6

def test_unknown_evaluation_is_named_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="'toi' is not one of .*toy-full_main-s0"): explorer(RESULTS, "toi")
    with pytest.raises(ValueError, match="no finished evaluation here; `make demo`"): explorer(tmp_path)

def test_a_front_end_is_noticed(monkeypatch):
    for key in ("JPY_SESSION_NAME", "VSCODE_PID"): monkeypatch.delenv(key, raising=False)
    assert not live()
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    assert live()


# Callbacks, without a front end

@pytest.fixture
def box(): return explorer(RESULTS, FULL, LORA)

def test_buttons_step_and_stop_at_the_ends(box):
    w = box.controls
    first = w["pane"].value
    w["previous"].click()
    assert w["pane"].value == first and w["place"].value == "1 of 500"
    w["next"].click()
    assert w["pane"].value != first and w["place"].value == "2 of 500" and "synthetic-main/test/1:" in w["pane"].value

def test_filters_and_runs_redraw(box):
    w = box.controls
    w["right"].value, w["steps"].value = "they differ", 2
    n = len(filter_answers(read_pair(FULL, LORA, RESULTS), "they differ", "any", 2))
    assert w["place"].value == f"1 of {n}" and ", 2 steps" in w["pane"].value
    w["second"].value = BASE
    assert w["steps"].value == 2 and w["right"].value == "they differ" and "base, zero-shot" in w["pane"].value
    w["right"].value, w["kind"].value = "both right", "cut at the limit"
    assert w["place"].value == "none" and "passes this filter" in w["pane"].value
    for name in ("next", "previous"): w[name].click()
    w["right"].value, w["kind"].value = "all", "any"
    assert w["place"].value.startswith("1 of ")

def test_evaluations_that_do_not_pair_are_told_in_the_pane(box):
    w = box.controls
    w["second"].value = next(n for n in dict(map(reversed, w["second"].options)) if n.startswith("gemma"))
    assert "were not asked and graded alike" in w["pane"].value and w["place"].value == "none"
    w["next"].click()
    w["second"].value = FULL
    assert w["place"].value == "1 of 500"

def test_predictions_that_vanish_are_told_in_the_pane(tmp_path):
    unpack(RESULTS / "toy", tmp_path / "toy")
    w = explorer(tmp_path, FULL, LORA).controls
    (tmp_path / "toy" / "eval" / f"{BASE}.predictions.jsonl").unlink()
    w["second"].value = BASE
    assert "is not one of" in w["pane"].value and "<div" not in w["pane"].value


# The playground

@pytest.fixture(scope="module")
def toy():
    cfg = load_config("toy", training=False)
    return load_model(cfg), load_tokenizer(cfg)

def test_modes_are_put_back_when_nobody_reads_on(toy):
    model, tokenizer = toy
    model.train()
    try:
        answers = stream_pair(model, model, tokenizer, "What is 2 + 2?", max_new_tokens=8)
        next(answers)
        assert not model.training
        answers.close()
        assert model.training
    finally: model.eval()

def test_playground_answers_and_says_what_is_wrong(toy):
    model, tokenizer = toy
    w = playground(model, model, tokenizer, ("<one>", "two"), max_new_tokens=8).controls
    w["ask"].click()
    assert "the question is empty" in w["state"].value
    w["question"].value = "Tom has 3 bags of 4 apples. How many apples has he?"
    w["ask"].click()
    assert w["state"].value == "done" and "&lt;one&gt;" in w["pane"].value and not w["ask"].disabled
    w["question"].value = "How many? " * 5000
    w["ask"].click()
    assert "positions" in w["state"].value and not w["ask"].disabled


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
NEEDED = {
    "Chromium": CHROMIUM,
    "jupyterlab": importlib.util.find_spec("jupyterlab"),
    "websocket-client": importlib.util.find_spec("websocket"),
}
MISSING = [what for what, there in NEEDED.items() if not there]

def wait(what, get, seconds=90, told=str):
    "What `get` returns, once it is something"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := get(): return value
        except (OSError, ValueError, KeyError): pass
        time.sleep(0.2)
    raise TimeoutError(f"no {what} within {seconds} s; {told()}")


class Page:
    "A tab of Chromium, by the DevTools protocol"
    def __init__(self, profile):
        import websocket
        port = wait("Chromium", lambda: (profile / "DevToolsActivePort").read_text().split()[0])
        def tab():
            tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list"))
            return next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page")
        self.socket, self.n = websocket.create_connection(wait("tab", tab), suppress_origin=True, timeout=60), 0

    def __call__(self, method, **params):
        self.n += 1
        self.socket.send(json.dumps({"id": self.n, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.n: pass
        return answer.get("result", {})

    def js(self, expression):
        return self("Runtime.evaluate", expression=expression, returnByValue=True).get("result", {}).get("value")

    def wait(self, what, get):
        "As `wait`, but a failure tells what the page shows"
        return wait(what, get, told=lambda: f"the page shows:\n{self.js('document.body.innerText')}")

    def click(self, selector):
        "The pointer goes to the middle of an element, once that stands still, and presses"
        find = f"""(() => {{
            const e = document.querySelector({json.dumps(selector)});
            if (!e) return null;
            e.scrollIntoView({{block: 'center'}});
            const r = e.getBoundingClientRect();
            return r.width ? [r.x + r.width / 2, r.y + r.height / 2] : null }})()"""
        seen = []
        def still(): seen.append(self.js(find)); return seen[-1] if seen[-1:] == seen[-2:-1] else None
        x, y = self.wait(selector, still)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="none" if kind == "mouseMoved" else "left", clickCount=1)

    def screenshot(self, path): Path(path).write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))


@pytest.fixture
def started(tmp_path):
    "Starts programs that end with the test"
    running = []
    def start(*command, **env):
        log = open(tmp_path / f"{len(running)}.log", "wb")
        program = subprocess.Popen(list(map(str, command)), cwd=tmp_path, env={**os.environ, **env}, stdout=log, stderr=subprocess.STDOUT)
        running.append(program)
        return program
    yield start
    for program in reversed(running):
        program.terminate()
        try: program.wait(20)
        except subprocess.TimeoutExpired: program.kill(); program.wait()

@pytest.fixture
def lab(tmp_path, started):
    "The address of a notebook with the explorer in a JupyterLab of its own"
    source = f"from gsm8k_sft.site.widgets import explorer\nexplorer({str(RESULTS)!r}, {FULL!r}, {LORA!r})"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=kernel)
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "explore.ipynb")
    own = {f"JUPYTER_{k}_DIR": str(tmp_path / k.lower()) for k in ("CONFIG", "RUNTIME", "DATA")}
    own["IPYTHONDIR"] = str(tmp_path / "ipython")
    started(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0",
            "--IdentityProvider.token=secret", f"--ServerApp.root_dir={tmp_path / 'notebooks'}",
            "--LabApp.extension_manager=readonly", "--LabApp.news_url=", **own)
    def address(): return next(json.loads(p.read_text()) for p in (tmp_path / "runtime").glob("jpserver-*.json"))["url"]
    def ready(): return wait("server file", address, 1) if list((tmp_path / "runtime").glob("jpserver-*.json")) else None
    return f"{wait('JupyterLab', ready)}lab/tree/explore.ipynb?token=secret"

FILTER = """(() => {
    const e = [...document.querySelectorAll('.widget-dropdown select')][2];
    e.value = 'they differ';
    e.dispatchEvent(new Event('change', {bubbles: true})) })()"""

@pytest.mark.slow # a browser and a Jupyter server
@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}, not found here")
def test_explorer_in_jupyterlab(lab, started, tmp_path):
    "A click on next shows the next problem; a filter shows others"
    started(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--remote-debugging-port=0", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "about:blank")
    page = Page(tmp_path / "profile")
    page("Page.navigate", url=lab)
    text = lambda: page.js("document.querySelector('.gsm8k-pair')?.innerText") or ""
    prompt = lambda: page.js("document.querySelector('.jp-InputPrompt')?.innerText.trim()")
    page.wait("kernel", lambda: page.js("document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"))
    def run():
        """The toolbar is there before the kernel listens, and goes on to a new cell then:
        back to the first, and once more, until that has begun"""
        if prompt() == "[ ]:":
            for selector in (".jp-CodeCell .jp-InputPrompt", '[data-command="notebook:run-cell-and-select-next"]'): page.click(selector)
            time.sleep(1)
        return prompt() in ("[*]:", "[1]:")
    page.wait("run", run)
    page.wait("explorer", lambda: "synthetic-main/test/0:" in text())
    before = text()
    page.click(".jupyter-button:has(.fa-arrow-right)")
    page.wait("next problem", lambda: "synthetic-main/test/1:" in text() and "2 of 500" in page.js("document.body.innerText"))
    assert text() != before
    page.click(".jupyter-button:has(.fa-arrow-left)")
    page.wait("previous problem", lambda: text() == before)
    page.js(FILTER)
    page.wait("filter", lambda: "2 of 500" not in page.js("document.body.innerText") and "✗" in text() and "✓" in text())
    if "GSM8K_SFT_SCREENSHOT" in os.environ: page.screenshot(os.environ["GSM8K_SFT_SCREENSHOT"])


def test_the_planner_plans_as_its_sliders_stand(capsys):
    from gsm8k_sft.statistics.planning import plan_text
    widget = planner()
    sliders = {slider.description: slider for slider in widget.children[:-1]}
    sliders["seeds"].value = 5
    capsys.readouterr()
    widget.f(**(values := {name: slider.value for name, slider in sliders.items()}))
    assert capsys.readouterr().out == plan_text(**values) + "\n" and "5 seeds of each" in plan_text(**values)
