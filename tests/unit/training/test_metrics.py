"""Names, pairs and files of what is reported."""

import json
import math

import pytest
import torch

from megatron_mtpd.losses.report import LossReport
from megatron_mtpd.training.metrics import FULL_NAMES, MetricsWriter, chart_layout, full_name, metrics_from_report


class Recorder:
    """A SummaryWriter that remembers."""

    def __init__(self):
        self.scalars, self.texts, self.layout, self.closed = {}, {}, None, False

    def add_scalar(self, tag, value, iteration):
        self.scalars[tag, iteration] = value

    def add_text(self, tag, text):
        self.texts[tag] = text

    def add_custom_scalars(self, layout):
        self.layout = layout

    def flush(self): ...

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("lm loss", "lm loss"),
        ("ce/1", "cross_entropy/head_1"),
        ("car/12", "cumulative_acceptance_rate/head_12"),
        ("ar/2 validation", "acceptance_rate/head_2 validation"),
        ("ar/2 validation-web", "acceptance_rate/head_2 validation-web"),
        ("tokens/step", "tokens_per_step/greedy"),
        ("tokens/step sampled validation", "tokens_per_step/sampled validation"),
        ("grad-norm", "grad_norm/trunk"),
        ("iteration-time", "iteration-time"),
        ("iter-energy/gpu", "iter-energy/gpu"),
    ],
)
def test_full_names(tag, name):
    assert full_name(tag) == name


def report(num_heads=2):
    """A report whose every field is another number."""
    scalars = {"main_loss", "main_tokens", "tokens_per_step", "tokens_per_step_sampled"}
    return LossReport(
        *[
            torch.tensor(100.0 * i) if name in scalars else 100.0 * i + torch.arange(1.0, 1 + num_heads)
            for i, name in enumerate(LossReport._fields, 1)
        ]
    )


def test_every_metric_is_a_sum_with_its_own_count():
    r = report()
    metrics = {name: tuple(pair.tolist()) for name, pair in metrics_from_report(r).items()}
    assert metrics["lm loss"] == (r.main_loss, r.main_tokens)
    for k in (0, 1):
        assert metrics[f"ce/{k + 1}"] == (r.cross_entropy[k], r.tokens[k])
        assert metrics[f"kd/{k + 1}"] == (r.distillation[k], r.tokens[k])
        assert metrics[f"ar/{k + 1}"] == (r.cumulative[k], r.reached[k])  # conditional: of those reached
        assert metrics[f"car/{k + 1}"] == (r.cumulative[k], r.drafted[k])
        assert metrics[f"overlap/{k + 1}"] == (r.overlap[k], r.drafted[k])
    assert metrics["tokens/step"] == (r.tokens_per_step, r.drafted[-1])
    assert len(metrics) == 1 + 2 * 5 + 2


def test_one_json_record_an_iteration(tmp_path):
    file = tmp_path / "new" / "metrics.jsonl"
    recorder = Recorder()
    writer = MetricsWriter(recorder, file, num_heads=2, heads_grad_norm=lambda: 0.5)
    writer.add_scalar("lm loss", torch.tensor(2.0), 1)
    writer.add_scalar("lm loss vs samples", 2.0, 8)  # another step counter: dropped
    writer.add_scalar("grad-norm", 1.5, 1)
    writer.add_scalar("ar/1", float("nan"), 1)  # nothing was reached
    writer.add_scalar("lm loss", 1.0, 2)
    assert [json.loads(line)["iteration"] for line in file.read_text().splitlines()] == [1]
    writer.add_scalar("lm loss validation", 3.0, 2)
    writer.add_scalar("lm loss validation ppl", 3.0, 2)
    writer.close()
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert first.pop("time") > 0
    assert first == {
        "iteration": 1,
        "lm loss": 2.0,
        "lm perplexity": math.exp(2.0),
        "grad_norm/trunk": 1.5,
        "grad_norm/heads": 0.5,
        "acceptance_rate/head_1": None,
    }
    assert second["lm perplexity validation"] == math.exp(3.0)
    assert recorder.scalars["lm loss", 2] == 1.0
    assert recorder.scalars["grad_norm/heads", 1] == 0.5
    assert recorder.closed


def test_a_resumed_run_appends(tmp_path):
    for iteration in (1, 2):
        writer = MetricsWriter(None, tmp_path / "m.jsonl", num_heads=1)
        writer.add_scalar("lm loss", 1.0, iteration)
        writer.add_text("config", "ignored without TensorBoard")
        writer.close()
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 2


def test_without_a_norm_of_the_heads_none_is_shown(tmp_path):
    recorder = Recorder()
    writer = MetricsWriter(recorder, None, num_heads=1)
    writer.add_scalar("grad-norm", 1.0, 1)
    writer.add_text("a", "b")
    assert list(recorder.scalars) == [("grad_norm/trunk", 1)]
    assert recorder.texts == {"a": "b"}


def test_every_metric_of_every_head_is_in_a_chart():
    import re

    charts = [pattern for chart in chart_layout(3)["Validation"].values() for pattern in chart[1]]
    for metric in FULL_NAMES.values():
        for k in (1, 2, 3):
            assert sum(bool(re.search(p, f"{metric}/head_{k} validation")) for p in charts) == 1
    assert not any(re.search(p, "cross_entropy/head_1") for p in charts)  # training has charts of its own
