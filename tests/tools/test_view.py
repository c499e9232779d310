"""The page: its data are the graph's, it asks the network for nothing, no name can inject anything, and it works."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fxpress.ir.cost import measure_cost
from fxpress.ir.graph import Graph
from fxpress.ir.groups import find_groups
from fxpress.ir.trace import trace
from fxpress.passes.analyse.sensitivity import GroupSensitivity, Sensitivity
from fxpress.passes.report import Report, Row
from fxpress.tools.view import build_page
from fxpress.tools.view.blocks import blocks_of
from fxpress.tools.view.data import page_data
from fxpress.tools.view.page import embed
from torch import Tensor, nn

import fxpress

IMAGE = torch.zeros(2, 3, 8, 8)
HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1> http://evil.example/ \u2028 '\"&"


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv2(self.bn1(self.conv1(x)).relu())).relu()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(Block(8), Block(8))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), Block(16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(Net().eval(), IMAGE)


class Page(HTMLParser):
    """Elements, attributes and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.scripts[0])
        return content


# Data -----------------------------------------------------------------------------------------------------------------


def test_data_are_the_graph(graph: Graph) -> None:
    data = Page(build_page(graph, "net")).data
    cost, groups = graph.analyse(measure_cost), graph.analyse(find_groups)
    assert [node["name"] for node in data["nodes"]] == [node.name for node in graph.nodes]
    for row, node in zip(data["nodes"], graph.nodes, strict=True):
        assert [data["nodes"][i]["name"] for i in row["inputs"]] == [n.name for n in node.all_input_nodes]
        assert row["macs"] == cost.per_node[node.name].macs
        assert row["params"] == cost.per_node[node.name].params
    assert data["totals"]["macs"] == cost.macs
    assert data["totals"]["params"] == sum(p.numel() for p in Net().parameters())
    assert data["totals"]["cuttable_macs"] == groups.cuttable_macs
    free = [group for group in data["groups"] if group["cuttable"]]
    assert [group["name"] for group in free] == [group.name for group in groups.groups]
    assert {data["nodes"][i]["name"] for i in free[0]["members"]} == set(groups.groups[0].members)
    assert data["batch"] == 2


def test_nodes_are_described(graph: Graph) -> None:
    rows = {row["name"]: row for row in page_data(graph, "net")["nodes"]}
    conv = rows["layer2_0"]
    assert (conv["title"], conv["kind"], conv["detail"], conv["path"]) == ("Conv2d", "conv", "3×3 /2", "layer2.0")  # noqa: RUF001
    assert conv["shapes"] == [[2, 16, 3, 3]]
    assert conv["dtypes"] == ["float32"]
    assert "test_view.py" in conv["source"]
    kinds = {row["kind"] for row in rows.values()}
    assert {"input", "output", "conv", "norm", "act", "join", "pool", "linear"} <= kinds
    assert rows["output"]["shapes"] == [[2, 5]]


def test_an_uncut_network_keeps_all_and_a_cut_one_says_how_many(graph: Graph, tmp_path: Path) -> None:
    data = page_data(graph, "net")
    assert data["totals"]["kept"] == 1
    assert all(row["channels"] == row["before"] for row in data["nodes"])
    compiled = fxpress.compile(graph, [{"prune-channels": {"ratio": 0.5}}], None)
    compiled.save(tmp_path / "m.fxp")
    cut = page_data(fxpress.load(tmp_path / "m.fxp").graph, "cut", compiled.report)
    rows = {row["path"]: row for row in cut["nodes"]}
    assert (rows["stem"]["channels"], rows["stem"]["before"]) == (4, 8)
    assert (rows["layer2.0"]["channels"], rows["layer2.0"]["before"]) == (8, 16)
    assert (rows["fc"]["channels"], rows["fc"]["before"]) == (5, 5)
    assert 0.5 <= cut["totals"]["kept"] < 0.6
    assert cut["original"] == {"params": data["totals"]["params"], "macs": data["totals"]["macs"]}
    assert [row[0] for row in cut["report"]["rows"]] == ["trace", "prune-channels"]
    assert all(len(row) == len(cut["report"]["columns"]) for row in cut["report"]["rows"])


def test_why_not(graph: Graph) -> None:
    data = page_data(graph, "net")
    rows = {row["name"]: row for row in data["nodes"]}
    (blocked,) = [group for group in data["groups"] if not group["cuttable"]]
    assert blocked["name"] == "fc"
    assert blocked["reasons"][0]["text"] == "is an output of the network"
    assert rows["fc"]["groups"] == [blocked["id"]]
    assert rows["x"]["why"]["text"] == "is an input of the network"
    assert all(row["groups"] or row["why"] for row in rows.values() if row["kind"] not in ("size", "param"))


def scanned(graph: Graph) -> Report:
    """A report of a pass that has looked at the sensitivity of a group that is there and of one that went."""
    name = graph.analyse(find_groups).groups[0].name
    groups = (GroupSensitivity(name, 8, (2, 4), (0.04, 0.32)), GroupSensitivity("gone", 4, (1, 2), (0.0, 0.02)))
    row = Row("prune-channels", "lossy", parameters=1, macs=1)
    row.metrics["sensitivity"] = Sensitivity("kl", 64, None, (0.25, 0.5), groups).to_dict()
    return Report([Row("trace", "exact", parameters=1, macs=1), row])


def test_sensitivity_comes_with_the_groups_that_are_still_there(graph: Graph) -> None:
    (scan,) = page_data(graph, "net", scanned(graph))["sensitivity"]
    assert (scan["pass"], scan["measure"], scan["images"], scan["ratios"]) == ("prune-channels", "kl", 64, [0.25, 0.5])
    assert [group["id"] for group in scan["groups"]] == [0, None]
    assert scan["groups"][0]["values"] == [0.04, 0.32]
    assert page_data(graph, "net")["sensitivity"] == []


def test_blocks_are_modules_with_two_cards() -> None:
    graph = trace(Net(), IMAGE)
    blocks = blocks_of(graph.nodes, lambda node: isinstance(graph.layer(node), nn.Conv2d))
    assert blocks["layer1_0_conv1"] == ["layer1", "layer1.0"]
    assert blocks["layer2_1_bn1"] == ["layer2", "layer2.1"]
    assert blocks["stem"] == []
    assert blocks["layer2_0"] == ["layer2"]


def test_several_outputs_sizes_and_parameters_read_as_values() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.scale = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            a, b = (self.conv(x) * self.scale).chunk(2, 1)
            return {"a": a.reshape(a.shape[0] * 2, -1), "b": b}

    data = page_data(trace(Mixed(), IMAGE), "mixed")
    kinds = {row["kind"] for row in data["nodes"]}
    assert {"param", "shape", "input", "output", "conv"} <= kinds
    assert len(next(row for row in data["nodes"] if row["kind"] == "output")["shapes"]) == 2


# The page -------------------------------------------------------------------------------------------------------------


def test_nothing_refers_to_the_network(graph: Graph) -> None:
    text = build_page(graph, "net")
    assert not re.search(r"https?:|wss?://|@import|url\(", text)
    assert "//cdn" not in text
    for tag, attributes in Page(text).elements:
        assert not {"src", "href", "data", "srcset", "action"} & set(attributes), tag
    assert "xmlhttprequest" not in text.lower()
    assert "fetch(" not in text
    assert "innerHTML" not in text


def test_the_policy_allows_the_one_script(graph: Graph) -> None:
    import base64
    import hashlib

    page = Page(build_page(graph, "net"))
    policy = next(a["content"] or "" for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert len(page.scripts) == 2


def hostile_graph() -> Graph:
    graph = trace(Net(), IMAGE)
    for node in graph.nodes:
        node.meta["source"] = HOSTILE
        if node.op == "call_function":
            node.meta["path"] = HOSTILE
    return graph


def test_hostile_names_stay_text() -> None:
    plain, text = build_page(trace(Net(), IMAGE), "net"), build_page(hostile_graph(), HOSTILE)
    page = Page(text)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in Page(plain).elements]
    assert page.data["name"] == HOSTILE
    assert HOSTILE in {row["source"] for row in page.data["nodes"]}
    assert not re.search(r"https?://", text)


@pytest.mark.parametrize("text", ["</script>", "<!--<script>", "]]>", "\u2028\u2029", "&lt;", "a://b", "ü"])
def test_embedded_json_comes_back(text: str) -> None:
    embedded = embed({text: [text]})
    assert json.loads(embedded) == {text: [text]}
    assert not set("<>&\u2028\u2029") & set(embedded)


# In a browser ---------------------------------------------------------------------------------------------------------


def browser_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_browser", Path(__file__).with_name("browser.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BROWSER = browser_module()
needs_chromium = pytest.mark.skipif(BROWSER.CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("browser")
    (folder / "page.html").write_text(build_page(graph, "net"), encoding="utf-8")
    browser = BROWSER.Browser(folder / "page.html", folder / "profile")
    yield browser
    browser.close()


@needs_chromium
def test_every_node_is_drawn_once_and_nothing_is_loaded(browser: Any, graph: Graph) -> None:
    drawn = browser.run(
        "[...document.querySelectorAll('.row')].map((row) => Number(row.dataset.id)).sort((a, b) => a - b)"
    )
    visible = [i for i, row in enumerate(page_data(graph, "net")["nodes"]) if row["kind"] not in ("size", "param")]
    assert drawn == visible
    assert browser.errors() == []
    assert all(address.startswith("file:") and address.endswith("page.html") for address in browser.requests())
    assert browser.run("performance.getEntriesByType('resource').length") == 0


@needs_chromium
def test_no_two_cards_overlap(browser: Any) -> None:
    script = """
    (() => {
      const cards = app.drawing.items.filter((item) => !item.way);
      const boxes = cards.map((i) => [i.x - i.w / 2, i.y, i.x + i.w / 2, i.y + i.h]);
      let overlaps = 0;
      boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b) => {
        if (a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]) overlaps++;
      }));
      return overlaps;
    })()"""
    assert browser.run(script) == 0


@needs_chromium
def test_a_click_tells_everything_and_marks_the_group(browser: Any, graph: Graph) -> None:
    index = [node.name for node in graph.nodes].index("layer1_0_conv2")
    browser.click(f'.row[data-id="{index}"]')
    text = browser.run("document.getElementById('panel').innerText.replaceAll('\\u200b', '')")
    for word in ("layer1.0.conv2", "Conv2d(8, 8", "N × 8 × 8 × 8", "test_view.py", "can be cut", "8 of 8 (100"):  # noqa: RUF001
        assert word in text
    members = browser.run("[...document.querySelectorAll('.row.member')].map((row) => Number(row.dataset.id))")
    group = graph.analyse(find_groups).of(graph.nodes[index])[0]
    names = [node.name for node in graph.nodes]
    assert {names[i] for i in members} == set(group.members)
    assert browser.run("location.hash") == "#node=layer1_0_conv2"
    browser.press("Escape")
    assert browser.run("document.querySelectorAll('.row.member').length") == 0


@needs_chromium
def test_why_not_is_shown(browser: Any, graph: Graph) -> None:
    index = [node.name for node in graph.nodes].index("fc")
    browser.run(f"app.select({index})")
    text = browser.run("document.querySelector('.why').innerText")
    assert "is an output of the network" in text


@needs_chromium
def test_keys_walk_along_edges_and_fold_blocks(browser: Any, graph: Graph) -> None:
    names = [node.name for node in graph.nodes]
    browser.run(f"app.select({names.index('stem')}); app.svg.focus()")
    browser.press("ArrowDown")
    assert names[browser.run("app.selected")] == "layer1_0_conv1"
    browser.press("ArrowUp")
    assert names[browser.run("app.selected")] == "stem"
    browser.press("ArrowDown")
    browser.press("Enter")
    assert browser.run("document.querySelector('.row[data-block]').dataset.block") == "layer1.0"
    browser.press("Enter")
    assert browser.run("document.querySelectorAll('.row[data-block]').length") == 0


@needs_chromium
def test_levels_open_and_close_blocks(browser: Any) -> None:
    browser.run("app.setLevel(1)")
    blocks = "[...document.querySelectorAll('.row[data-block]')].map((row) => row.dataset.block)"
    assert browser.run(blocks) == ["layer1", "layer2"]
    browser.click('.row[data-block="layer1"]')
    assert browser.run(blocks) == ["layer1.0", "layer1.1", "layer2"]
    browser.click('.frame-title[data-close="layer1"]')
    assert browser.run(blocks) == ["layer1", "layer2"]
    browser.run("app.setLevel(9)")
    assert browser.errors() == []


@needs_chromium
def test_search_finds_a_node_inside_a_closed_block(browser: Any) -> None:
    browser.run("app.setLevel(1); app.svg.focus()")
    browser.press("/")
    for key in "layer2.1.conv2":
        browser.press(key)
    assert browser.run("document.querySelectorAll('#hits li').length") == 1
    browser.press("Enter")
    assert browser.run("app.data.nodes[app.selected].path") == "layer2.1.conv2"
    assert browser.run("document.querySelectorAll('.row.selected').length") == 1


@needs_chromium
def test_dark_and_light(browser: Any) -> None:
    colours = []
    for _ in range(2):
        browser.click("#theme")
        colours.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] != colours[1]


@needs_chromium
def test_sensitivity_is_a_heat_map(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(build_page(graph, "net", scanned(graph)), encoding="utf-8")
    browser = BROWSER.Browser(tmp_path / "page.html", tmp_path / "profile")
    try:
        text = browser.run("document.getElementById('panel').innerText.replaceAll('\\u200b', '')")
        assert "Sensitivity, before prune-channels" in text
        assert "on 64 images" in text
        cells = "[...document.querySelectorAll('.heat td.cell')]"
        heat = f"{cells}.map((cell) => [cell.innerText, cell.style.getPropertyValue('--heat')])"
        assert browser.run(heat) == [["0.04", "0.595"], ["0.32", "1.000"], ["0", "0.000"], ["0.02", "0.500"]]
        bars = "[...document.querySelectorAll('.heat .meter i')]"
        widths = browser.run(f"{bars}.map((bar) => parseFloat(bar.style.width))")
        assert widths == pytest.approx([100, 100 * (0.01 / 0.18) ** 0.5], rel=1e-3)
        cells = "[...document.querySelectorAll('.heat td')].every((cell) => cell.scrollWidth <= cell.clientWidth + 1)"
        assert browser.run(cells)  # nothing is cut off
        browser.click(".heat tr[data-group] td")
        assert browser.run("document.querySelector('#panel h3').innerText").startswith("Group ")
        assert browser.run("document.querySelectorAll('.row.member').length") > 0
        assert browser.errors() == []
    finally:
        browser.close()


@needs_chromium
def test_hostile_names_run_nothing(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(build_page(hostile_graph(), HOSTILE), encoding="utf-8")
    browser = BROWSER.Browser(tmp_path / "page.html", tmp_path / "profile")
    try:
        for level in (9, 1):
            browser.run(
                f"app.setLevel({level}); app.data.nodes.forEach((node) => app.select(node.id, {{ centre: true }}))"
            )
        assert browser.run("typeof window.pwned") == "undefined"
        assert browser.run("document.querySelectorAll('img, #panel script').length") == 0
        assert HOSTILE.split("\u2028")[0].strip() in browser.run("document.getElementById('name').textContent")
        assert browser.errors() == []
        assert [address for address in browser.requests() if "page.html" not in address] == []
    finally:
        browser.close()
