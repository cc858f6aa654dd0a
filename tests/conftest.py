"The surroundings of all tests: no display, and notebooks after the quick tests"
import os

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("HF_HUB_OFFLINE", None) # the tests' hub is a server of their own

SLOW = ("test_widgets.py", "test_docs.py", "test_processes.py", "test_train.py", "test_notebooks.py")


def pytest_collection_modifyitems(items):
    "Quick files first, so that a slip shows in seconds; the order within a file stays"
    items.sort(key=lambda item: next((i for i, name in enumerate(SLOW, 1) if item.path.name == name), 0))
