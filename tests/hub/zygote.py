"""A process that has imported everything once and runs each command line in a fork of itself.

Reads one JSON object per line (`args`, `env`, `cwd`, `out`, `err`) and answers with the exit code.
What the libraries read when they are imported must be in this process's own environment.
"""

import json
import os
import sys
import traceback


def run(call: dict) -> int:
    os.chdir(call["cwd"])
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(call[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdin.close()
    os.environ.update(call["env"])
    from kdtool.cli.app import run as main

    return main(call["args"])


def serve() -> None:
    import datasets  # noqa: F401
    import transformers

    import kdtool.cli.app
    import kdtool.pipelines  # noqa: F401

    transformers.AutoModelForSequenceClassification, transformers.AutoTokenizer  # noqa: B018 - imported on use
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = run(json.loads(line))
            except BaseException:  # noqa: BLE001 - a fork must never come back here
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
