"The surroundings of all tests: no display, a share of the cores for each worker, slow files first so that no core waits at the end"
import gc, os
import pytest

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("HF_HUB_OFFLINE", None) # the tests' hub is a server of their own
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)): # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

SLOW = ("test_docs.py", "test_processes.py", "test_ray.py", "test_study.py", "test_notebooks.py", "test_train.py", "test_packing.py",
        "test_widgets.py")


def pytest_collection_modifyitems(items):
    "With several workers the long ones begin first; alone, the quick ones, so that a slip shows in seconds"
    last = len(SLOW) if "PYTEST_XDIST_WORKER" in os.environ else -1
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else last)


def pytest_collection_finish():
    "What the imports made stays until the end: the collections that trainings ask for needn't look through it each time"
    gc.collect()
    gc.freeze()


@pytest.fixture
def start(tmp_path):
    "Starts `python -m gsm8k_sft.MODULE WORDS` in the working folder; what still runs ends with the test"
    from commands import run, server
    started = []
    def begin(module, *words, **environ):
        said = tmp_path / f"said-{len(started)}"
        process = server.Process(target=run, args=(f"gsm8k_sft.{module}", words, os.getcwd(), os.environ | environ, said))
        started.append(process)
        process.said = said
        process.start()
        return process
    yield begin
    for process in started: process.kill(), process.join()
