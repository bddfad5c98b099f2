"""The fault rig's list of guards names text that stands once in llm_inference.py."""

from __future__ import annotations

from pathlib import Path

import pytest

import llm_inference

from .faults.guards_list import GUARDS, switched_off

SOURCE = Path(llm_inference.__file__).read_text()


@pytest.mark.parametrize("name", GUARDS)
def test_a_guard_can_be_switched_off(name: str) -> None:
    compile(switched_off(SOURCE, name), name, "exec")
