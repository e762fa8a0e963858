import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gapfx.errors import UserError
from gapfx.plan import Group, Phase, Plan, Weight
from gapfx.quantities import format_share
from gapfx.report import format_summary, write_report
from gapfx.report.read_run import read_run
from gapfx.schedule import Budget, phase_at
from tests.made_up_runs import LOG_EVERY, events_of, kept_of, make_plan, write_run


class Page(HTMLParser):
    """A strict reader: counts tags, checks that they close, collects text and links to elsewhere."""

    VOID = frozenset({"meta", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)
        elif tag == "wbr":
            self.words[-1] += "\u200b"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u200b ", "").split())


def read(path: Path) -> tuple[str, Page]:
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_groups_of_replicas_are_dense_one_in_each(tmp_path: Path) -> None:
    plan = make_plan("pgap", budget=Budget(rounds=1, phase_steps=50, finetune_steps=100, replicas=4))
    page = read(write_report(write_run(tmp_path / "run", plan)))[1]
    assert "1 prune; at most 1 of 4 groups is dense at once in each replica" in page.text
    groups = {g.name: (g.numel, sum(w.numel * (1 - w.sparsity) for w in g.weights)) for g in plan.groups}
    sparse = sum(kept for _, kept in groups.values())
    live = max(sparse - kept + numel for numel, kept in groups.values())
    assert f"{plan.phases[0].name}: {format_share(live / sum(group.numel for group in plan.groups))} live" in page.text


def test_the_report_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "run", make_plan()))
    html, page = read(path)
    assert path == tmp_path / "run" / "report.html"
    assert page.loaded == []
    assert "link" not in page.tags
    assert "http" not in html
    assert "@import" not in html
    assert "url(" not in html


def test_the_headline_has_metric_sparsity_and_size(tmp_path: Path) -> None:
    plan = make_plan()
    run = write_run(tmp_path / "run", plan)
    _, page = read(write_report(run))
    summary = json.loads((run / "summary.json").read_text())
    assert f"Final accuracy {summary['metrics']['final']['accuracy']:.4g}" in page.text
    assert f"Sparsity {100 * summary['sparsity_actual']:.1f} % target 90.0 %" in page.text
    kept = sum(kept_of(weight) for weight in plan.weights())
    assert f"Weights kept {kept:,} of {sum(w.numel for w in plan.weights()):,} planned" in page.text
    assert "not finished" not in page.text


def test_the_best_value_is_one_of_the_sparse_model(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_plan())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] == "eval" and line["step"] == 200:  # a group is dense here
            line["metrics"]["accuracy"] = 0.99
        if line["event"] == "eval" and line["step"] == 450:
            line["metrics"]["accuracy"] = 0.98
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, page = read(write_report(run))
    assert "best while sparse 0.98, at step 450" in page.text


def test_every_chart_and_table_of_a_gap_run_is_there(tmp_path: Path) -> None:
    plan = make_plan()
    _, page = read(write_report(write_run(tmp_path / "run", plan)))
    titles = ("Training loss", "Accuracy at evaluation", "Learning rate", "Which group is dense when")
    for title in (
        *titles,
        "Mask bits changed",
        "Weights ever explored",
        "Sparsity of each weight",
        "Settings",
        "Versions",
        "Resources",
    ):
        assert title in page.text
    for weight in plan.weights():
        assert weight.fqn in page.text
    assert "2 rounds over 4 groups" in page.text
    assert "96 \u00d7 32" in page.text
    assert "read by an embedding" in page.text
    assert "1.42 GiB" in page.text


def test_a_chart_tells_its_content_to_a_screen_reader(tmp_path: Path) -> None:
    html, page = read(write_report(write_run(tmp_path / "run", make_plan())))
    assert html.count('role="img"') >= 6
    assert html.count("<desc>") == html.count('role="img"')
    assert page.tags.count("h1") == 1


@pytest.mark.parametrize("method", ["dense", "static", "oneshot"])
def test_runs_with_few_prunes_or_none_have_a_report(tmp_path: Path, method: str) -> None:
    _, page = read(write_report(write_run(tmp_path / "run", make_plan(method))))
    assert ("This method never prunes" in page.text) == (method != "oneshot")
    assert ("Mask bits changed" in page.text) == (method == "oneshot")
    assert "Which group is dense when" in page.text


@pytest.mark.parametrize("until", [0, 3, 50, 133, 400])
def test_an_unfinished_run_says_so_and_where_it_is(tmp_path: Path, until: int) -> None:
    plan = make_plan()
    _, page = read(write_report(write_run(tmp_path / "run", plan, until=until)))
    last = until // LOG_EVERY * LOG_EVERY
    assert f"This run is not finished : step {last} of 500 ({last // 5} %)" in page.text
    assert f"in phase \u201c{plan.phases[phase_at(plan, last)].name}\u201d" in page.text


def test_a_last_line_cut_short_is_left_out_in_silence(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_plan(), until=200)
    log = run / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-30])
    assert read_run(run).notes == ()
    write_report(run)


def test_bad_lines_in_the_middle_are_counted_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_plan())
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines()
    bad = ['{"event": "step", "st', "[1, 2]", '{"event": "step", "step": "five"}', "null", '{"event": 3, "step": 1}']
    log.write_text("\n".join([*lines[:3], *bad, *lines[3:]]))
    _, page = read(write_report(run))
    assert "5 lines of metrics.jsonl could not be read" in page.text
    assert len(read_run(run).steps) == 100


def test_values_that_are_not_finite_never_reach_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_plan())
    log = run / "metrics.jsonl"
    text = re.sub(r'"loss": [0-9.]*[02468],', '"loss": NaN,', log.read_text())
    text = re.sub(r'"accuracy": [0-9.]+', '"accuracy": Infinity', text)
    log.write_text(text.replace('"delta2": 0', '"delta2": -Infinity, "was": 0'))
    html, page = read(write_report(run))
    assert re.search(r"\b(nan|inf|infinity)\b", page.text, re.IGNORECASE) is None
    assert re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', html, re.IGNORECASE) is None


def test_a_loss_that_was_not_finite_is_said_in_words(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_plan(), until=100)
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"event": "step", "step": 105, "phase": 2, "loss": NaN, "lr": 0.001, "seconds": 50}\n')
    _, page = read(write_report(run))
    assert "1 value was not finite" in page.text


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\"\x00\x1b"
    plan = Plan((Group(evil, (Weight(evil, (4, 4), 0.5),)),), phases=(Phase(evil, 0, 100, (0,), (0,)),))
    run = write_run(tmp_path / "<b>run", plan)
    (run / "config.json").write_text(json.dumps({evil: evil}))
    (run / "metrics.jsonl").write_text(json.dumps({"event": "eval", "step": 5, "metrics": {evil: 0.5}}))
    html, page = read(write_report(run))
    assert page.tags.count("script") == 1
    assert "b" not in page.tags
    assert "<script>alert" not in html
    assert "\x00" not in html


def test_steps_repeated_after_a_resume_count_once(tmp_path: Path) -> None:
    plan = make_plan()
    events = list(events_of(plan))
    first = [event for event in events if event["step"] <= 230]
    second = [event for event in events if event["step"] > 200]
    run = write_run(tmp_path / "run", plan)
    lines = [*first, {"event": "resume", "step": 200}, *second]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = read_run(run)
    assert [step.step for step in seen.steps] == list(range(LOG_EVERY, 501, LOG_EVERY))
    assert len(seen.prunes) == 8
    assert "Resumed once" in read(write_report(run))[1].text


def test_three_hundred_weights_become_columns_with_a_table_below(tmp_path: Path) -> None:
    html, page = read(write_report(write_run(tmp_path / "run", make_plan(num_groups=12, per_group=25))))
    assert "weight, in the order of the plan" in page.text
    assert 'class="bar-row"' not in html
    assert page.tags.count("tr") > 300
    assert len(html) < 600_000


def test_long_logs_are_thinned(tmp_path: Path) -> None:
    budget = Budget(rounds=2, phase_steps=10_000, finetune_steps=20_000)
    run = write_run(tmp_path / "run", make_plan(budget=budget))
    assert len(read_run(run).steps) == 20_000
    assert write_report(run).stat().st_size < 400_000


@pytest.mark.parametrize("missing", ["config.json", "plan.json", "metrics.jsonl"])
def test_a_missing_file_costs_its_part_of_the_report_alone(tmp_path: Path, missing: str) -> None:
    run = write_run(tmp_path / "run", make_plan())
    (run / missing).unlink()
    _, page = read(write_report(run))
    assert "Final accuracy" in page.text
    assert "blocks.0.attn.qkv.weight" in page.text


@pytest.mark.parametrize("name", ["config.json", "plan.json", "summary.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"half": ', "\x00", '{"per_weight": 3, "metrics": [], "versions": 1}'])
def test_a_broken_file_is_named_and_never_stops_the_report(tmp_path: Path, name: str, content: str) -> None:
    run = write_run(tmp_path / "run", make_plan())
    (run / name).write_text(content)
    _, page = read(write_report(run))
    is_readable = content.startswith('{"per') and name != "plan.json"
    assert (f"{name} could not be read" in page.text.lower()) != is_readable


def test_a_folder_without_a_run_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="is not a run directory"):
        format_summary(tmp_path / "nowhere")


def test_summary_of_a_finished_run(tmp_path: Path, golden: Any) -> None:
    golden("report_summary", format_summary(write_run(tmp_path / "run", make_plan())))


def test_summary_of_an_unfinished_run_says_so(tmp_path: Path) -> None:
    text = format_summary(write_run(tmp_path / "run", make_plan(), until=133))
    assert "Not finished: step 130 of 500 (26 %), in phase \u201cround 1 group 3\u201d." in text
    assert "Latest accuracy" in text
