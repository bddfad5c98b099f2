"""The rig of faults, overload and hostile input: `python -m tests.faults [--row NAME] [--full] [--json FILE]`."""
