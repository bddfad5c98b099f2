"""Conformance: is each field of a request honoured, refused by name, or silently dropped?

Decided by asking a running engine:

    python -m tests.conformance --engine llamacpp            # through us; the embedded engine is started
    python -m tests.conformance --engine vllm --base-url URL --bare --json FILE
                                                             # also the same questions to the bare engine
    python -m tests.conformance.peers --engine llamacpp --json FILE
                                                             # also through LiteLLM and to Xinference, on /v1
    python -m tests.conformance.table tests/conformance/results/*.json
                                                             # the table in Markdown; results/peers/*.json: the peers'

`sides` ask (through us, or the bare engine), `features` are the questions and how an answer is judged, `judge` makes
cells of them, `schemas` and `validity` hold the fifty schemas, `recorded` judges transcripts of engines that are not
here.
"""
