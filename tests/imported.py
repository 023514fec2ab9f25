"""What the processes of `processes.Ranks` are forked from has imported, so that none has to."""

import gc
import importlib

NAMES = ["deepspeed", "torch._inductor.compile_fx", "scipy.stats", "pandas", "mtfast.commands"]
NAMES += ["faulty", "dying"]  # with whose functions tests call `Ranks`

modules = {name: importlib.import_module(name) for name in NAMES}
_ = modules["deepspeed"].ops.__compatible_ops__  # compiles, to see what can be
# A collection in a fork would copy the pages of all of this, to find that none of it is garbage.
gc.collect()
gc.freeze()
