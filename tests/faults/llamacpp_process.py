"""llama.cpp's own server in a process of its own, to be killed and frozen.

python -m tests.faults.llamacpp_process MODEL.gguf PORT
"""

import sys
import threading

import xllamacpp


def main() -> None:
    path, port = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.model_alias = path, int(port), {"m"}
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 2048, 4, False, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    _server = xllamacpp.Server(params)
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
