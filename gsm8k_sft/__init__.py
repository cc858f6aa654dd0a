__version__ = "0.1.0"

import os

# OpenMP threads that wait by spinning take the cores from those that work: with two training processes on two cores, 60 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
