"""The measure on text, against loops over positions."""

from itertools import pairwise

import pytest
import torch

from megatron_mtpd.speculative.counts import Acceptance
from megatron_mtpd.speculative.decoder import Decoder
from megatron_mtpd.speculative.generate import Request, generate
from megatron_mtpd.speculative.teacher_forced import TeacherForced, measure, per_batch
from megatron_mtpd.training.metrics import metrics_from_report
from tests.unit.speculative.toys import VOCABULARY, hidden_states, prompts, toy_model

EOD = 3


@pytest.fixture(scope="module")
def model():
    return toy_model(3)


@torch.no_grad()
def by_loops(model, texts, eod):
    """Head by head: drafts whose first k tokens all have targets in the same document, and where they first fail."""
    total = TeacherForced(Acceptance.of_heads(3), 0.0, 0, [0.0] * 3, [0] * 3, [0.0] * 3)
    counts = total.acceptance
    for text in texts:
        p = [[model.logits(h.view(1, 1, -1))[0, 0].softmax(-1) for h in depth] for depth in hidden_states(model, text)]
        for i in range(len(text) - 1):
            total.loss_sum -= p[0][i][text[i + 1]].log().item()
            total.loss_tokens += 1
            accepted = True
            for k in (1, 2, 3):
                if i + k + 1 >= len(text) or eod in text[i : i + k + 1]:
                    break
                total.heads_loss_sum[k - 1] -= p[k][i][text[i + k + 1]].log().item()
                total.heads_loss_tokens[k - 1] += 1
                total.overlap_sum[k - 1] += torch.minimum(p[k][i], p[0][i + k]).sum().item()
                counts.num_draft_tokens_per_pos[k - 1] += 1
                counts.num_reached_per_pos[k - 1] += accepted
                accepted = accepted and p[k][i].argmax() == p[0][i + k].argmax()
                counts.num_accepted_tokens_per_pos[k - 1] += int(accepted)
    counts.num_drafts = counts.num_draft_tokens_per_pos[0]
    return total


def some_texts():
    texts = [text for text in prompts(12, seed=11, longest=30) if len(text) > 1]
    return [[*texts[0][:3], EOD, *texts[0][3:], EOD, 7, 9, 11, 30, 20], *texts[1:]]


@pytest.mark.parametrize("eod", [None, EOD])
def test_counts_and_losses_are_those_of_loops(model, eod, monkeypatch):
    monkeypatch.setattr(model, "eod_token_id", eod)
    expected = by_loops(model, some_texts(), eod)
    result = measure(model, some_texts(), batch_size=5)
    assert result.acceptance == expected.acceptance
    assert result.acceptance.num_accepted_tokens_per_pos[-1] > 0
    for name in ("loss_sum", "loss_tokens", "heads_loss_sum", "heads_loss_tokens", "overlap_sum"):
        # sums of some hundred fp32 terms in another order
        assert getattr(result, name) == pytest.approx(getattr(expected, name), rel=1e-5), name
    report, last = result.report(), expected.acceptance
    assert report["main_loss"] == pytest.approx(expected.loss_sum / expected.loss_tokens, rel=1e-5)
    rate = last.num_accepted_tokens_per_pos[2] / last.num_draft_tokens_per_pos[2]
    assert report["cumulative_acceptance_rate"][2] == rate


@torch.no_grad()
def test_it_is_what_training_reports_at_validation(model, monkeypatch):
    """AR_k, CAR_k, losses and overlap of the log line, from the same forward pass with labels that validation makes."""
    monkeypatch.setattr(model, "eod_token_id", EOD)
    texts = torch.tensor(next(text * 4 for text in some_texts() if len(text) > 6)[:20]).repeat(3, 1)
    texts[1] = texts[1].flip(0)
    texts[2, :5] = 50
    labels, mask = texts.roll(-1, 1), torch.ones(3, 20)
    mask[:, -1] = 0.0
    model(texts, torch.arange(20).expand(3, -1), None, labels=labels, loss_mask=mask)
    logged = {name: (total / n).item() for name, (total, n) in metrics_from_report(model.loss_report).items()}
    report = measure(model, texts.tolist()).report()
    assert report["main_loss"] == pytest.approx(logged["lm loss"], rel=1e-6)  # one rounding to fp32
    for short, name in (
        ("ce", "heads_loss"),
        ("ar", "acceptance_rate"),
        ("car", "cumulative_acceptance_rate"),
        ("overlap", "overlap"),
    ):
        assert report[name] == pytest.approx([logged[f"{short}/{k}"] for k in (1, 2, 3)], rel=1e-6), name


def test_the_batch_does_not_matter(model):
    texts = prompts(9, seed=12, longest=20)
    one, all_together = measure(model, texts, 1), measure(model, texts, 9)
    assert one.acceptance == all_together.acceptance
    assert one.heads_loss_tokens == all_together.heads_loss_tokens
    assert one.heads_loss_sum == pytest.approx(all_together.heads_loss_sum, rel=1e-5)


def test_on_its_own_greedy_text_it_counts_what_decoding_accepts(model):
    """What is given is seen and not measured. A decoder starts a draft where the last one ended: the same ones."""
    prompt = next(text for text in prompts(12, seed=11, longest=30) if len(text) > 10)
    decoder = Decoder(model, 3, 1, len(prompt) + 64, VOCABULARY)
    found, longer = (next(generate(decoder, [Request(0, prompt, number)])) for number in (40, 48))
    text = [*prompt, *longer.tokens]
    counts = [next(per_batch(model, [text], 1, given)).acceptance for given in range(len(text))]
    assert counts[0] == counts[1] == measure(model, [text]).acceptance
    accepted = [  # by position: of those from it on, less those from the next one on
        sum(a - b for a, b in zip(x.num_accepted_tokens_per_pos, y.num_accepted_tokens_per_pos, strict=True))
        for x, y in pairwise(counts[1:])
    ]
    expected, position, tokens = Acceptance.of_heads(3), len(prompt) - 1, 1
    while tokens < 40:
        expected.add(3, accepted[position])
        tokens += accepted[position] + 1
        position += accepted[position] + 1
    assert found.acceptance == expected
    assert expected.num_accepted_tokens_per_pos[-1] > 0


def test_no_text_is_refused(model):
    with pytest.raises(ValueError, match="no text"):
        measure(model, [])
