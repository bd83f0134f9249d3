"""The child process of the probe: one JSON request per line on stdin, one JSON answer per line on stdout."""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

from data_tools.damage import find_damage
from data_tools.probe import ProbeCaps, probe
from data_tools.reasons import Reason, Refusal
from data_tools.sandbox import Limits, die_with_parent, limit_self


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"facts": …}, {"damage": …} or {"reason": …, "detail": …} for one video."""
    try:
        if request["what"] == "damage":
            found = find_damage(request["path"], request["version"], request["stream"], request["max_pixels"])
            return {"damage": [[str(start), None if end is None else str(end)] for start, end in found]}
        facts = probe(request["path"], request["version"], ProbeCaps(**request["caps"]))
    except Refusal as refusal:
        return {"reason": str(refusal.reason), "detail": refusal.detail}
    except MemoryError:
        return {"reason": str(Reason.CRASHED), "detail": "needs more memory than a video may use"}
    except OSError as error:
        return {"reason": str(Reason.UNREADABLE), "detail": f"{error.strerror or error}"}
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        # Whatever odd metadata trips in the bindings is a fault of this one file, and is named as such.
        return {"reason": str(Reason.DAMAGED), "detail": f"{type(error).__name__}: {error}"}
    return {"facts": facts.as_json()}


def main() -> None:
    """Serve until stdin ends."""
    import av

    av.logging.set_level(av.logging.PANIC)
    memory, parent = map(int, sys.argv[1:3])
    die_with_parent(parent)
    requests, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    # Nothing but an answer may reach the parent: whatever a library prints goes to the error stream.
    os.dup2(2, 1)
    limit_self(Limits(memory=memory, cpu_seconds=resource.RLIM_INFINITY))
    for line in requests:
        request = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        budget = int(used.ru_utime + used.ru_stime) + 1 + request["cpu_seconds"]
        resource.setrlimit(resource.RLIMIT_CPU, (budget, resource.RLIM_INFINITY))
        answers.write(json.dumps(answer(request)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
