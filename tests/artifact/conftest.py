"""A project of its own for every test that writes figures, tables or claims."""

from pathlib import Path

import pytest
import yaml

from rgap.artifact import claims, outputs


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The root of an empty project, as the working directory."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(outputs, "ROOT", tmp_path)
    monkeypatch.setattr(claims, "CLAIMS", tmp_path / "notebooks" / "claims.yml")
    monkeypatch.setattr(claims, "LOCK", tmp_path / "build" / ".claims.lock")
    monkeypatch.setenv("RGAP_FIGURES", str(tmp_path / "figures"))
    monkeypatch.delenv("RGAP_PROFILE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write_claims(root):
    """Writes notebooks/claims.yml."""

    def write(expected: dict, files: dict | None = None) -> Path:
        content = {"outputs": files or {}, "claims": expected}
        claims.CLAIMS.write_text(yaml.safe_dump(content, sort_keys=False))
        return claims.CLAIMS

    return write
