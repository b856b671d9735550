"""The measure on text, against loops over positions."""

import pytest
import torch

from megatron_mtpd.speculative.counts import Acceptance
from megatron_mtpd.speculative.teacher_forced import measure
from tests.unit.speculative.toys import choose, hidden_states, prompts, toy_model

EOD = 3


@pytest.fixture(scope="module")
def model():
    return toy_model(3)


@torch.no_grad()
def by_loops(model, texts, eod):
    counts, loss, tokens = Acceptance.of_heads(3), 0.0, 0
    for text in texts:
        hidden = hidden_states(model, text)
        choices = [[choose(model, h) for h in depth] for depth in hidden]
        for i in range(len(text) - 1):
            row = model.logits(hidden[0][i].view(1, 1, -1))[0, 0].log_softmax(-1)
            loss, tokens = loss - row[text[i + 1]].item(), tokens + 1
            if i + 4 < len(text) and eod not in text[i : i + 4]:
                agree = [choices[k][i] == choices[0][i + k] for k in (1, 2, 3)]
                counts.add(3, agree.index(False) if False in agree else 3)
    return counts, loss, tokens


@pytest.mark.parametrize("eod", [None, EOD])
def test_counts_and_loss_are_those_of_loops(model, eod):
    texts = [text for text in prompts(12, seed=11, longest=30) if len(text) > 1]
    texts[0] = [*texts[0][:3], EOD, *texts[0][3:], EOD, 7, 9, 11, 30, 20]
    counts, loss, tokens = by_loops(model, texts, eod)
    result = measure(model, texts, batch_size=5, eod=eod)
    assert result.acceptance == counts
    assert result.loss_tokens == tokens
    # sums of some hundred fp32 terms in another order
    assert result.loss_sum == pytest.approx(loss, rel=1e-5)
    assert result.report()["main_loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert counts.num_drafts and counts.num_accepted_tokens_per_pos[0]


def test_the_batch_does_not_matter(model):
    texts = prompts(9, seed=12, longest=20)
    one, all_together = measure(model, texts, 1), measure(model, texts, 9)
    assert one.acceptance == all_together.acceptance
    assert one.heads_loss_tokens == all_together.heads_loss_tokens
    assert one.heads_loss_sum == pytest.approx(all_together.heads_loss_sum, rel=1e-5)


def test_no_text_is_refused(model):
    with pytest.raises(ValueError, match="no text"):
        measure(model, [])
