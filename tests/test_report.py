"""The report: what it shows of score files, trees and runs, that hostile text stays text, and that a browser agrees."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from rich.console import Console
from typer.testing import CliRunner

from svpo_kernels.cli import main as cli
from svpo_kernels.data.formats import DataError
from svpo_kernels.reasoning.drawing import COLUMN, ROW, TreeNode, choose, draw
from svpo_kernels.reasoning.report import DRAWN, OPEN, read_page, show_page, write_page
from svpo_kernels.trainer.report import METRICS

EVIL = "<script>document.title = 'taken'; console.error('ran')</script><img src=x onerror=alert(1)>\"' onclick=\"x"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Reader(HTMLParser):
    """Elements with their attributes, and the text inside each element of class `text`."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self._inside = 0

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if dict(attrs).get("class") == "text":
            self._inside, self.texts = 1, [*self.texts, ""]

    def handle_endtag(self, tag):
        self._inside = 0 if tag == "span" else self._inside

    def handle_data(self, data):
        if self._inside:
            self.texts[-1] += data


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


@pytest.fixture
def scores(tmp_path):
    """Two problems as `svpo score` writes them: one wrong from its second step on, one without a wrong step."""
    lines = [
        {"row": 1, "solution": 0, "prompt": f"2 + 2? {EVIL}", "steps": ["two", EVIL, "five"], "scores": [0.9, 0.2, 0.7],
         "aggregates": {}, "score": 0.2, "first_below": 1, "threshold": 0.5, "rank": 2, "correct": False, "answer": "5",
         "labels": [1.0, 0.0, None]},
        {"row": 1, "solution": 1, "prompt": f"2 + 2? {EVIL}", "steps": ["two", "four"], "scores": [0.9, 1.0],
         "aggregates": {}, "score": 0.9, "first_below": -1, "threshold": 0.5, "rank": 1, "correct": True},
        {"row": 2, "solution": 0, "prompt": [{"role": "user", "content": "hm"}], "steps": ["a", "b"], "scores": [0.0],
         "aggregates": {}, "score": 0.0, "first_below": 0, "threshold": 0.5, "rank": 1, "truncated": 1},
    ]
    path = tmp_path / "x.scores.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def trees(tmp_path):
    nodes = {"0": {"text": ""}, "0.1": {"text": "go left", "q_value": 0.5, "visit_count": 3, "prior": 0.25},
             "0.2": {"text": "go right", "q_value": 0.8, "visit_count": 2},
             "0.1.1": {"text": EVIL, "q_value": -0.6, "final_answer": "4", "visit_count": 1},
             "0.1.2": {"text": "left again", "q_value": 1.0, "final_answer": "5", "visit_count": 2}}
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps({"question": "which way?", "answer": "5", "rstar": nodes}) + "\n")
    return path


def test_scores_become_a_page(scores, tmp_path):
    page = read_page([scores])
    assert [problem.prompt for problem in page.problems] == [f"2 + 2? {EVIL}", "user: hm"]
    best, worst = page.problems[0].solutions
    assert best.correct and not any(step.wrong for step in best.steps)
    assert [step.wrong for step in worst.steps] == [False, True, False]
    assert [step.score for step in page.problems[1].solutions[0].steps] == [0.0, None]
    reader = read(write_page(page, tmp_path / "page.html"))
    assert [tag for tag, _ in reader.elements if tag in ("script", "img", "link", "iframe")] == []
    assert not any(name.startswith("on") for _, attributes in reader.elements for name in attributes)
    assert reader.texts == ["two", "four", "two", EVIL, "five", "a", "b"]
    marked = [attributes["data-first-wrong"] for _, attributes in reader.elements if "data-first-wrong" in attributes]
    assert marked == ["1", "0"]
    policy = next(attributes["content"] for tag, attributes in reader.elements if tag == "meta" and "http-equiv" in
                  attributes)
    assert policy.startswith("default-src 'none'") and "script" not in policy
    assert "http" not in re.sub(r"2 \+ 2\?.*", "", (tmp_path / "page.html").read_text()).replace("http-equiv", "")


def test_trees_are_drawn_with_the_chosen_path(trees, tmp_path):
    page = read_page([trees])
    (problem,) = page.problems
    nodes = {node.text: node for node in problem.tree.nodes}
    assert {text for text, node in nodes.items() if node.chosen} == {"go left", "left again"}  # by visits, not by value
    assert nodes["go left"].prior == 0.25 and nodes["left again"].terminal
    assert [[step.wrong for step in solution.steps] for solution in problem.solutions] == [
        [False, False], [False], [False, True]]
    drawn = read(write_page(page, tmp_path / "page.html"))
    links = [attributes["href"] for tag, attributes in drawn.elements if tag == "a" and "n" in attributes["href"]]
    panels = {attributes["id"] for tag, attributes in drawn.elements if tag == "article"}
    assert {link.removeprefix("#") for link in links} == panels and len(panels) == 4


def test_places_of_a_tree():
    nodes = [TreeNode(-1, "a"), TreeNode(0, "b"), TreeNode(0, "c"), TreeNode(-1, "d"), TreeNode(2, "e")]
    drawing = draw(nodes)
    assert drawing.order == [0, 1, 2, 4, 3]
    assert [round((node.x - drawing.x) / COLUMN) for node in nodes] == [1, 2, 2, 1, 3]
    assert [(node.y - nodes[1].y) / ROW for node in nodes] == [0.5, 0, 1, 2, 1]
    assert drawing.y == (nodes[0].y + nodes[3].y) / 2
    choose(nodes)
    assert not any(node.chosen for node in nodes)  # neither visits nor scores: nothing is chosen
    deep = [TreeNode(i - 1, str(i)) for i in range(5000)]
    assert draw(deep).order == list(range(5000))


def test_a_large_tree_is_named_and_not_drawn(tmp_path):
    nodes = {"0": {"text": ""}} | {f"0.{i}": {"text": f"step {i}", "q_value": 0.1} for i in range(1, DRAWN + 2)}
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "5", "rstar": nodes}) + "\n")
    (problem,) = read_page([path]).problems
    assert problem.tree is None and f"{DRAWN + 1} steps and is not drawn" in problem.note
    text = write_page(read_page([path]), tmp_path / "page.html").read_text()
    assert f"{DRAWN + 1 - OPEN} more solutions" in text


def test_a_run_shows_its_curves(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": 1, "loss": 0.7, "compute/saved": 0.5}, {"step": 2, "loss": 0.25, "compute/saved": 0.75}]
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = read_page([run])
    assert page.runs[0].rows == [("loss", "0.7", "0.25"), ("compute/saved", "50.0%", "75.0%")]
    images = [attributes["src"] for tag, attributes in read(write_page(page, tmp_path / "p.html")).elements
              if tag == "img"]
    assert len(images) == 1 and images[0].startswith("data:image/png;base64,iVBOR")


def test_a_limit_is_said_and_bad_input_is_one_line(scores, trees, tmp_path):
    page = read_page([scores, trees], limit=2)
    assert len(page.problems) == 2 and any("1 of 3 problems are left out" in note for note in page.notes)
    for targets, options, error, said in (
            ([tmp_path / "none"], {}, FileNotFoundError, "no such file or run directory"),
            ([scores], {"threshold": 2}, ValueError, "threshold must be in"),
            ([scores], {"limit": 0}, ValueError, "limit must be at least 1")):
        with pytest.raises(error, match=said):
            read_page(targets, **options)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError):
        read_page([tmp_path / "empty.jsonl"])


def test_the_terminal_shows_the_same(scores):
    console = Console(width=100, record=True, file=io.StringIO())
    show_page(read_page([scores]), console)
    lines = console.export_text().splitlines()
    assert sum("first judged wrong" in line for line in lines) == 2
    assert any(line.startswith("    0.20 first judged wrong: <script>") for line in lines)  # as text, on one line


def test_the_command(trees, tmp_path):
    done = CliRunner().invoke(cli.app, ["report", str(trees), "--out", str(tmp_path / "r.html")])
    assert done.exit_code == 0 and "1 problems, 0 runs" in done.output and (tmp_path / "r.html").is_file()
    done = CliRunner().invoke(cli.app, ["report", str(trees), "--terminal"])
    assert done.exit_code == 0 and "left again" in done.output


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser(scores, tmp_path):
    """No error in the console, the step that is marked is the right one, the script of a step has not run."""
    page = write_page(read_page([scores]), tmp_path / "page.html")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    dom = Reader()
    dom.feed(done.stdout)
    assert [tag for tag, _ in dom.elements].count("script") == 0 and dom.texts.count(EVIL) == 1
    assert "<title>svpo report: x.scores.jsonl</title>" in done.stdout
    step = re.search(r'data-first-wrong="1".*?</details>', done.stdout, re.DOTALL).group(0)
    assert "first step judged wrong" in step and "&lt;script&gt;" in step
