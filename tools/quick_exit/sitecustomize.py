"""On PYTHONPATH, this makes every Python process end sooner.

At the end Python looks for garbage several times, among some 300,000 objects in a process that has imported torch. That
is half a second of CPU time in each of the hundreds of processes that a run of the tests starts. What is frozen is left
out. Of all handlers this one is registered first, and so runs last.
"""

import atexit
import gc

atexit.register(gc.freeze)
