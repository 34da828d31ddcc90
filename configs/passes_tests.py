"""A reward: does the function that an answer holds return what it should?

An answer is run beside the one in the data, its `reference`, on a few arguments. It is code that a
model wrote, so that happens in a process of its own, with few builtins and little time.
"""

import json
import subprocess
import sys

SECONDS = 20  # for all answers of a step

RUN = """
import builtins, json, signal, sys

NAMES = "len max min sum set sorted list tuple str int float bool abs reversed any all"
SAFE = {name: getattr(builtins, name) for name in NAMES.split()}
ARGUMENTS = [(7, 3), (2, 5), (4, 4), ([3, 1, 2],), (["b", "a", "c"],), (2, [3, 1, 2]),
             ("a", ["b", "a", "c"]), (9, [3, 1, 2])]

def results(code):
    names = {"__builtins__": SAFE}
    exec(compile(code, "answer", "exec"), names)
    (function,) = [value for name, value in names.items() if name != "__builtins__"]
    found = []
    for arguments in ARGUMENTS:
        arguments = json.loads(json.dumps(arguments))
        try:
            found.append(repr((function(*arguments), arguments)))
        except Exception as error:
            found.append(type(error).__name__)
    return function.__name__, found

def stop(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, stop)
for line in sys.stdin:
    reward = 0.0
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        answer, reference = json.loads(line)
        reward = float(results(answer) == results(reference))
    except BaseException:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(reward, flush=True)
"""


def passes(completions, reference, **_):
    """Return 1 for each answer whose function does what it should and is called so, else 0."""
    answers = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    lines = "".join(json.dumps(pair) + "\n" for pair in zip(answers, reference, strict=True))
    command = [sys.executable, "-I", "-c", RUN]
    try:
        done = subprocess.run(
            command, input=lines, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        out = done.stdout
    except subprocess.TimeoutExpired as late:
        out = (late.stdout or b"").decode()
    found = [float(line) for line in out.split()]
    return found + [0.0] * (len(answers) - len(found))
