"""The rig of faults, overload and hostile input: `python -m tests.faults [--row NAME] [--full] [--json FILE]`.

FAULTS_PRODUCT_DIR names another folder with a llm_inference.py, to run the rows against that one.
"""

import os
import sys

if _folder := os.environ.get("FAULTS_PRODUCT_DIR"):
    sys.path.insert(0, _folder)
