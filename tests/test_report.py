import json
import math
import re
from html.parser import HTMLParser

import pytest

from mlm_jax.errors import CheckpointError
from mlm_jax.metrics import MetricsLog
from mlm_jax.report import write_report

VOID = {"meta", "br", "hr", "img", "link", "input"}
EVIL = "<script>alert('&')</script>"


class Page(HTMLParser):
    """Checks that tags close in order, and keeps (tag, attributes) and the text in <pre>."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag, **attrs):
        wanted = {key.rstrip("_"): value for key, value in attrs.items()}.items()
        return [found for name, found in self.tags if name == tag and wanted <= found.items()]

    def text(self):
        return "".join(self.texts)


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "my <run>"
    folder.mkdir()
    config = {"format": 1, "model": {"n_layers": 2, "norm": "rmsnorm"}, "train": {"steps": 2000}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def report(workdir):
    path = write_report(workdir)
    assert path == workdir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def write_run(workdir, steps, every=10, loss=lambda step: 10 / step):
    with MetricsLog(workdir) as log:
        log.write("event", 0, event="start", parameters=12_345_678, time=1.7e9)
        for step in range(every, steps + 1, every):
            speeds = {"tokens_per_s": 12345.0, "step_time_s": 0.5, "data_wait_s": 0.1}
            log.write("train", step, loss=loss(step), grad_norm=1.0, learning_rate=3e-4, **speeds)
        log.write("eval", steps, eval_loss=2.25, bits_per_byte=1.75, time=1.7e9 + 3723)


def test_a_run_on_one_page(workdir):
    write_run(workdir, 2000)
    page = report(workdir)
    facts = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", (workdir / "report.html").read_text())
    assert dict(facts) == {
        "Step": "2,000 / 2,000",
        "Training loss": "0.005",
        "Held-out loss": "2.25",
        "Bits per byte": "1.75",
        "Tokens/s": "12.3k",
        "Parameters": "12.3M",
        "Wall time": "1:02:03",
    }
    assert len(page.all("svg")) == 6
    assert "my <run>" in page.text()
    assert "model.norm" in page.text()
    assert "open" not in page.all("details")[0]


def test_a_page_needs_no_network_and_no_javascript(workdir):
    write_run(workdir, 100)
    page, source = report(workdir), (workdir / "report.html").read_text()
    assert page.all("script") == []
    assert set(re.findall(r"https?://[^\s\"'<)]+", source)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|href|on\w+)=|url\(|@import", source)


def test_what_a_model_or_a_person_wrote_is_text(workdir):
    with MetricsLog(workdir) as log:
        log.write("event", 5, event="sample", prompt=EVIL, text=EVIL + "\udc80")
        log.write("event", 5, event="baselines", baselines={EVIL: 1.5})
        log.write("eval", 5, bits_per_byte=2.0)
        done = [{"prompt": EVIL, "text": EVIL, "parses": True}, {"prompt": "a", "text": "b"}]
        log.write("event", 5, event="completions", completions=done)
    config = {"format": 1, EVIL: {EVIL: EVIL}}
    (workdir / "config.json").write_text(json.dumps(config))
    page = report(workdir)
    assert page.all("script") == []
    assert page.text().count(EVIL) == 2 + 1 + 2 + 3
    assert "1 of 1 parse" in page.text()


@pytest.mark.parametrize(
    "fields", [{"xz": 1.9, "gzip": 2.0}, {"baselines": {"xz": 1.9, "gzip": 2}}]
)
def test_baselines_are_lines_whose_names_do_not_overlap(workdir, fields):
    with MetricsLog(workdir) as log:
        log.write("event", 0, event="baselines", **fields)
        log.write("eval", 5, bits_per_byte=4.0)
    page = report(workdir)
    gzip, xz = (float(name["y"]) for name in page.all("text", class_="name"))
    assert xz - gzip >= 15
    assert len(page.all("path", class_="level")) == 2
    assert "xz 1.9" in page.text()


@pytest.mark.parametrize("rows", ["none", "no file", "event", "one", "null", "zero"])
def test_a_run_that_has_hardly_begun(workdir, rows):
    if rows != "no file":
        with MetricsLog(workdir) as log:
            if rows == "event":
                log.write("event", 0, event="start")
            elif rows != "none":
                value = {"one": 2.5, "null": math.nan, "zero": 0.0}[rows]
                log.write("train", 1, loss=value, grad_norm=value, learning_rate=value)
    page = report(workdir)
    curves = 3 if rows in ("one", "zero") else 0
    assert len(page.all("svg")) == len(page.all("circle")) == curves
    assert page.text().count("nothing logged yet") == 6 - curves


def test_steps_without_a_finite_loss_are_marked(workdir):
    with MetricsLog(workdir) as log:
        for step in range(10, 101, 10):
            log.write("train", step, loss=math.nan if step in (50, 100) else 2.5)
    marks = report(workdir).all("path", class_="lost")
    assert [mark["d"] for mark in marks] == ["M317,228v-9", "M576,228v-9"]  # half way, and the end
    assert "nan" not in (workdir / "report.html").read_text().lower()


def test_a_long_run_is_thinned_but_keeps_its_spike_and_its_end(workdir):
    odd = {7010: 50, 19_990: 45, 19_992: 1, 20_000: 40}
    write_run(workdir, 20_000, every=2, loss=lambda step: odd.get(step, 2.5))
    train, held_out, *_ = (line["points"].split() for line in report(workdir).all("polyline"))
    assert 200 <= len(train) <= 600
    assert len(held_out) == 1
    places = [tuple(map(float, place.split(","))) for place in train]
    assert places == sorted(places, key=lambda place: place[0])
    axis = 228 - 10  # SVG units for 0..50
    assert min(y for _, y in places) == 10
    assert places[-1] == pytest.approx((576, 228 - axis * 40 / 50), abs=0.1)


def test_a_spiky_gradient_norm_has_an_axis_of_decades(workdir):
    with MetricsLog(workdir) as log:
        for step, norm in enumerate([0.5, 0.5, 0.5, 900.0, 0.5], start=1):
            log.write("train", step, grad_norm=norm)
    ticks = [text for text in report(workdir).texts if re.fullmatch(r"[\d.]+", text)]
    assert {"0.1", "1", "10", "100", "1000"} <= set(ticks)


def test_work_and_memory_have_charts_where_devices_tell(workdir):
    write_run(workdir, 20)
    assert len(report(workdir).all("svg")) == 6
    with MetricsLog(workdir, resume_step=20) as log:
        log.write("event", 20, event="compiled", device_kind="cpu")
        log.write("train", 30, tflops_per_device=412.5, memory_gib=61.25, mfu=0.417)
    page = report(workdir)
    assert [svg["aria-label"] for svg in page.all("svg")][6:] == [
        "Work over steps",
        "Memory over steps",
    ]
    assert {"last 412.5", "last 61.25", "41.7%", "GiB, the most so far, of the process"} <= {
        *page.texts
    }


WATCHED = {
    "param_norms": {"blocks.mlp.up": 15.5, "norm.scale": 0.0, EVIL: 1.0},
    "grad_norms": {"blocks.mlp.up": 0.25, "norm.scale": None, EVIL: 1.0},
    "update_norms": {"blocks.mlp.up": 0.155, "norm.scale": 0.1, EVIL: 1.0},
    "activation_mean_abs": {"blocks": 1.25, "logits": 1.0},
    "activation_rms": {"blocks": 1.75, "logits": 2.0},
    "activation_max": {"blocks": 9.5, "logits": 7.0},
}
BY_LAYER = {"grad_norms": {"blocks.mlp.up": [2.0, None, 1.0]}, "activation_rms": {"blocks": [0, 0]}}


def test_what_was_watched_is_in_tables_with_a_curve_over_layers(workdir):
    with MetricsLog(workdir) as log:
        log.write("train", 5, loss=2.5, **WATCHED, by_layer=BY_LAYER)
    page = report(workdir)
    mine = [text for text in page.texts if text.strip()]
    at = mine.index("blocks.mlp.up")
    assert mine[at : at + 5] == ["blocks.mlp.up", "15.5", "0.25", "0.155", "0.01"]
    at = mine.index("norm.scale")
    assert mine[at : at + 5] == ["norm.scale", "0", "not finite", "0.1", "-"]
    at = mine.index("logits")
    assert mine[at : at + 4] == ["logits", "1", "2", "7"]
    assert page.all("script") == []
    sparks = [line["points"] for line in page.all("polyline")][-2:]
    assert sparks == ["1.0,1.0 149.0,10.0", "1.0,19.0 149.0,19.0"]


def test_a_profile_is_folded_in(workdir):
    assert "Profile" not in report(workdir).text()
    (workdir / "profile").mkdir()
    (workdir / "profile" / "operations.txt").write_text(f"Operations of step 3\n{EVIL}\n")
    page = report(workdir)
    assert f"Operations of step 3\n{EVIL}" in page.text()
    assert page.all("script") == []


def test_a_folder_that_is_no_workdir(tmp_path):
    with pytest.raises(CheckpointError, match="not the workdir of a run"):
        write_report(tmp_path)
