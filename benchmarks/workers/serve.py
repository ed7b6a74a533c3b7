"""A worker: one library in one process, told over a pipe what to time.

A request is a line of JSON, {"call": name, "workload": [...], "repeats": 3,
"seed": 0}; the answer {"seconds": of all repeats, "tokens": in all of them,
"lengths": of the last}, or {"error": one line}.
"""

from collections.abc import Callable
import importlib.metadata
import json
import os
import sys
import time
import traceback

from benchmarks.workloads import Workload

# (workload, seed) -> lengths of the completions, [] where there are none.
Call = Callable[[Workload, int], list[int]]


def versions(*names: str) -> dict[str, str]:
  return {name: importlib.metadata.version(name) for name in names}


def measure(call: Call, workload: Workload, repeats: int, seed: int) -> dict:
  """Calls with seeds of their own; each returns when its tokens are there."""
  counts = []
  start = time.perf_counter()
  for i in range(repeats):
    counts.append(call(workload, seed + i))
  seconds = time.perf_counter() - start
  tokens = sum(map(sum, counts))
  return dict(seconds=seconds, tokens=tokens, lengths=counts[-1])


def serve(open_: Callable[..., tuple[dict[str, Call], dict]]) -> None:
  """Answers until the pipe is closed.

  `open_`, with what the command line says, gives the calls by name, and what
  is said first: versions.
  Whatever the library prints goes to stderr, not into the pipe.
  """
  out = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)
  calls, hello = open_(*sys.argv[1:])
  out.write(json.dumps(dict(calls=list(calls), **hello)) + '\n')
  for line in sys.stdin:
    asked = json.loads(line)
    try:
      workload = Workload(*asked['workload'])
      call = calls[asked['call']]
      answer = measure(call, workload, asked['repeats'], asked['seed'])
    except Exception as error:
      traceback.print_exc()
      said = (str(error).strip().splitlines() or [''])[0]
      answer = dict(error=f'{type(error).__name__}: {said}'[:300])
    out.write(json.dumps(answer) + '\n')
  os._exit(0)  # threads of a library may wait for work for ever
