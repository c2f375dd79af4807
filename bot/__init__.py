"""kibitz, the half that hears, answers and remembers."""

import os

__version__ = "0.1.0"

# Threads of torch (libgomp) that wait for each other sleep. They would spin, which beside another busy process on few cores
# takes 10 to 80 times as long (docs/experiments.md). Read when torch is loaded; vLLM, which has cores of its own, is spared.
THREAD_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
for _name, _value in THREAD_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
# A Python that we start, or that vLLM or torchrun starts, imports nothing from the directory in which kibitz was started: a
# `bot.py` there is the operator's own. Read when Python starts; so it is for our children, and theirs, and not for us.
os.environ["PYTHONSAFEPATH"] = "1"
