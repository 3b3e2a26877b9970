"""Settings of every test: examples that repeat, 80 columns, threads that neither spin nor outnumber the cores.

The number of torch's threads is that of OMP_NUM_THREADS, which torch reads when it is imported.
"""

import os

from hypothesis import settings

os.environ["COLUMNS"] = "80"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")
