"""Pipelines from Python, YAML and TOML, and their schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fxpress.passes.emit.emit import Emit
from fxpress.passes.fuse.fold_batchnorm import FoldBatchnorm
from fxpress.passes.registry import PASSES, all_passes, find_pass

from fxpress import OptionError, Pipeline

ENTRIES: list[Any] = ["fold-batchnorm", {"insert-masks": {"ratio": 0.5}}, {"emit": {"layout": "contiguous"}}]
YAML = """
seed: 3
passes:
  - fold-batchnorm
  - insert-masks: {ratio: 0.5}
  - emit:
      layout: contiguous
"""
TOML = """
seed = 3
passes = ["fold-batchnorm", {insert-masks = {ratio = 0.5}}, {emit = {layout = "contiguous"}}]
"""
TOML_TABLES = """
seed = 3
[[passes]]
fold-batchnorm = {}
[[passes]]
insert-masks = {ratio = 0.5}
[[passes]]
[passes.emit]
layout = "contiguous"
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text"), [("p.yaml", YAML), ("p.yml", YAML), ("p.toml", TOML), ("t.toml", TOML_TABLES)]
)
def test_files_say_the_same_as_python(tmp_path: Path, name: str, text: str) -> None:
    loaded = Pipeline.load(write(tmp_path, name, text))
    assert loaded == Pipeline(ENTRIES, seed=3)
    assert loaded.fingerprint() == Pipeline(ENTRIES, seed=3).fingerprint()
    assert Pipeline.of(str(tmp_path / name)) == Pipeline.of(tmp_path / name) == loaded


def test_round_trip() -> None:
    pipeline = Pipeline(ENTRIES, seed=3)
    assert Pipeline.from_dict(pipeline.to_dict()) == pipeline
    assert pipeline.to_dict() == {"seed": 3, "passes": ENTRIES}
    assert next(type(one) for one in pipeline) is FoldBatchnorm
    assert len(pipeline) == 3


def test_fingerprint_tells_options_and_seeds_apart() -> None:
    pipelines = [Pipeline(ENTRIES), Pipeline(ENTRIES, seed=1), Pipeline(ENTRIES[:2]), Pipeline(["emit"]), Pipeline()]
    assert len({pipeline.fingerprint() for pipeline in pipelines}) == len(pipelines)
    assert Pipeline([Emit()]).fingerprint() == Pipeline([{"emit": {"engine": "auto"}}]).fingerprint()


@pytest.mark.parametrize("source", ["emit", Emit(), {"emit": None}, [Emit()], ["emit"], {"passes": ["emit"]}])
def test_what_compile_accepts(source: Any) -> None:
    assert Pipeline.of(source) == Pipeline([Emit()])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["fold-batchnrom"], "no pass 'fold-batchnrom': did you mean 'fold-batchnorm'?"),
        (["zzzz"], "no pass 'zzzz': passes: fold-batchnorm"),
        ([{"emit": {"engin": "torch"}}], "pass 'emit' has no option 'engin': did you mean 'engine'?"),
        ([{"emit": {"engine": "tpu"}}], "pass 'emit', option 'engine': given 'tpu', allowed: 'auto' or 'torch'"),
        ([{"emit": "torch"}], "options of pass 'emit' are 'torch'"),
        ([{"emit": None, "layout": "auto"}], "one pass is given with the keys 'emit', 'layout'"),
        ([3], "a pass is given as 3"),
        ([{}], "a pass is given as {}"),
        (7, "'passes' is a int"),
        ([None], "a pass is given as None"),
    ],
)
def test_bad_passes(source: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Pipeline.of(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.yaml", "passes: [emit", "p.yaml, line 1 is not valid YAML"),
        ("p.yaml", "passes:\n  - emit: {layout: auto\n  - x", "is not valid YAML"),
        ("p.yaml", "", "a pipeline is empty"),
        ("p.yaml", "- emit", "a pipeline is a list"),
        ("p.yaml", "passes: emit", "'passes' is a str ('emit')"),
        ("p.yaml", "seed: 3", "a pipeline needs 'passes'"),
        ("p.yaml", "pases: [emit]", "no 'pases': did you mean 'passes'?"),
        ("p.yaml", "seed: -1\npasses: [emit]", "'seed' is -1; allowed: an integer >= 0"),
        ("p.yaml", "seed: x\npasses: [emit]", "'seed' is 'x'"),
        ("p.yaml", "passes: [!!python/object/apply:os.getcwd []]", "is not valid YAML"),
        ("p.yaml", "passes:\n  - emit:\n    layout: auto", "Indent the options under the pass's name"),
        ("p.yaml", "passes: \x00", "is not valid"),
        ("p.yaml", "passes: [emit]\nseed: 1\nseed: 2", "p.yaml, line 3 is not valid YAML: key 'seed' is there twice"),
        ("p.yaml", "passes: [{emit: {engine: auto, engine: torch}}]", "key 'engine' is there twice"),
        ("p.yaml", "? [a]\n: 1", "is not valid YAML"),
        ("p.toml", "passes = [emit]", "is not valid"),
        ("p.json", "{}", "no pipeline file; allowed: .yaml, .yml or .toml"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Pipeline.load(write(tmp_path, name, text))
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_taken_over_from_an_anchor(tmp_path: Path) -> None:
    text = "passes:\n  - distill: &d {epochs: 3, lr: 0.01}\n  - distill: {<<: *d, epochs: 1}\n"
    first, second = Pipeline.load(write(tmp_path, "p.yaml", text))
    assert (first.epochs, second.epochs, second.lr) == (3, 1, 0.01)
    text = "passes:\n  - distill: &d {epochs: 3}\n  - distill: {<<: *d, lr: 0.1, lr: 0.2}\n"
    with pytest.raises(OptionError, match="key 'lr' is there twice"):
        Pipeline.load(write(tmp_path, "p.yaml", text))


def test_missing_and_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"there is no pipeline file .*nothing\.yaml"):
        Pipeline.load(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(OptionError, match=r"binary\.yaml"):
        Pipeline.load(tmp_path / "binary.yaml")


def test_registry_names_classes_and_files_agree() -> None:
    for name, place in PASSES.items():
        cls = find_pass(name)
        words = name.split("-")
        assert cls.name == name
        assert cls.__name__ == "".join(word.capitalize() for word in words)
        assert place.partition(":")[0].endswith(".".join(["", "_".join(words)]))
        assert cls.summary().endswith(".")


def test_schema_covers_every_pass_and_its_options() -> None:
    schema = Pipeline.schema()
    *names, configured = schema["properties"]["passes"]["items"]["anyOf"]
    assert {entry["const"] for entry in names} <= set(PASSES)
    assert list(configured["properties"]) == list(PASSES)
    for name, cls in all_passes().items():
        options = configured["properties"][name]
        options = options["anyOf"][0] if "anyOf" in options else options
        assert set(options["properties"]) == set(cls.model_fields)
        assert not options["additionalProperties"]
        assert all("description" in option for option in options["properties"].values()), name


def test_packaged_pipelines_are_valid(repository: Path) -> None:
    files = sorted((repository / "passes" / "pipelines").glob("*.yaml"))
    assert {"demo.yaml", "statistics.yaml"} <= {file.name for file in files}
    for file in files:
        assert len(Pipeline.load(file)) > 0
