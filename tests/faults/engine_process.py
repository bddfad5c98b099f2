"""A scripted engine in a process of its own, to be killed and frozen: `python engine_process.py DIALECT PORT PACE` prints its port."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fake_engine import FakeEngine

engine = FakeEngine(sys.argv[1])  # type: ignore[arg-type]
engine.port, engine.pace = int(sys.argv[2]), float(sys.argv[3])
engine.start()
print(engine.port, flush=True)
sys.stdin.read()
