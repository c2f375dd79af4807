"""The half of kibitz that receives messages, answers and remembers."""

import os

__version__ = "0.1.0"

# Let torch's threads (libgomp) sleep while they wait for each other. By default they spin, which takes 10 to 80 times as
# long beside another busy process on few cores (docs/experiments.md). torch reads this when it is loaded. vLLM has cores
# of its own and does not get it.
THREAD_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
for _name, _value in THREAD_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
# Keep Python processes that we, vLLM or torchrun start from importing modules of the working directory: a `bot.py` there is
# the operator's own. Python reads this at its start, so it affects our children and theirs, not this process.
os.environ["PYTHONSAFEPATH"] = "1"
