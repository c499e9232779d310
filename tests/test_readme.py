"""What the README shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fxpress import Pipeline


def blocks(repository: Path, language: str) -> list[str]:
    """Code blocks of one language in the README."""
    text = (repository / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_python_runs(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for example in blocks(repository, "python"):
        exec(compile(example, "README.md", "exec"), {})  # noqa: S102 - our own text
    shown = capsys.readouterr().out
    assert "Cannot be cut: fc" in shown
    assert "prune-channels" in shown
    assert (tmp_path / "resnet18.fxp").stat().st_size > 1_000_000


@pytest.mark.parametrize("language", ["yaml", "toml"])
def test_pipelines_are_valid(repository: Path, tmp_path: Path, language: str) -> None:
    for text in blocks(repository, language):
        path = tmp_path / f"pipeline.{language}"
        path.write_text(text, encoding="utf-8")
        assert [one.name for one in Pipeline.load(path)][-1] == "emit"


def test_links_lead_somewhere(repository: Path) -> None:
    for page in [repository / "README.md", *repository.glob("*/README.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(repository)}: {target}"


def test_every_pass_is_described(repository: Path) -> None:
    from fxpress.passes.registry import PASSES

    described = set(re.findall(r"^\| `([a-z0-9-]+)` \|", (repository / "README.md").read_text(encoding="utf-8"), re.M))
    assert set(PASSES) <= described
