"""Settings of every test: examples that repeat, threads that do not spin.

The number of torch's threads is that of OMP_NUM_THREADS, which torch reads when it is imported.
"""

import os

from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")
