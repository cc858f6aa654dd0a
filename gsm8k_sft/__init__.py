__version__ = "0.2.0"

import logging, os

# OpenMP threads that wait by spinning take the cores from those that work: beside three busy processes on two cores, training ran three times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# On a machine without a GPU it warns, at import, of CPU kernels that nobody asked for; peft and transformers import it unasked.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
