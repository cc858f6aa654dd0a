"Timing: what takes too long is stopped, and the handler before it is back"
import signal, threading
import pytest
from gsm8k_sft.benchmarks.training import at_most

def test_a_loop_without_end_is_stopped():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match="stopped after 1 s"):
        with at_most(1):
            while True: pass
    assert signal.getsignal(signal.SIGALRM) is before

def test_other_threads_have_no_limit():
    done = []
    def work():
        with at_most(1): done.append(True)
    thread = threading.Thread(target=work)
    thread.start(), thread.join()
    assert done == [True]
