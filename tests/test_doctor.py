"""What the machine offers, as facts and as text."""

from __future__ import annotations

import json

import pytest

from gapfx import doctor


def test_findings_are_plain_data_about_this_machine() -> None:
    findings = doctor.examine()
    assert json.loads(json.dumps(findings)) == findings
    assert findings["packages"]["torch"]
    assert findings["num_cpus"] >= 1
    assert findings["memory_bytes"] > 2**26
    assert "gloo" in findings["distributed_backends"]


def test_a_package_that_is_missing_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PACKAGES", ("torch", "no-such-package-at-all"))
    findings = doctor.examine()
    assert findings["notes"] == ["no-such-package-at-all is not installed: gapfx needs it"]
    text = doctor.format_findings(findings)
    assert "no-such-package-at-all  missing\n" in text
    assert text.endswith("gapfx needs it")
