"""A scripted engine in a process of its own, to be killed and frozen; it prints its port.

python -m tests.faults.engine_process DIALECT PORT PACE
"""

import sys

from tests.fake_engine import FakeEngine


def main() -> None:
    dialect, port, pace = sys.argv[1:]
    engine = FakeEngine(dialect)  # type: ignore[arg-type]
    engine.port, engine.pace = int(port), float(pace)
    engine.start()
    print(engine.port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
