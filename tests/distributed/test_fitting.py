"""Heads in closed form over ranks."""

import pytest
import torch
from megatron.core import parallel_state

from megatron_mtpd.speculative import loading
from megatron_mtpd.speculative.fitting import fit_heads
from tests.distributed.gloo import run
from tests.unit.speculative.toys import VOCABULARY, hidden_states, prompts, toy_model

pytestmark = pytest.mark.distributed


def fit(tensor_parallel):
    """The maps, and what the model's heads then give."""
    loading.start_distributed(tensor_parallel)
    model = toy_model(2)
    some = [text for text in prompts(120, seed=4, longest=24) if len(text) > 4][:60]
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    share = len(some) // replicas
    fits = fit_heads(model, some[replica * share : (replica + 1) * share], VOCABULARY)
    weights = [weight for f in fits for weight in f.weights.values()]
    return weights, [share for f in fits for share in f.explained.values()], hidden_states(model, some[0])[2]


@pytest.mark.parametrize(("ranks", "tensor_parallel"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_fit_the_same_heads_as_one(ranks, tensor_parallel):
    """Of 60 texts, every tenth of a replica's share, and so of all of them, is held out."""
    ((weights, explained, hidden),) = run(fit, 1, 1)
    for found in run(fit, ranks, tensor_parallel):
        torch.testing.assert_close(found[0], weights, rtol=1e-3, atol=1e-3)
        assert found[1] == pytest.approx(explained, abs=1e-4)
        torch.testing.assert_close(found[2], hidden, rtol=1e-3, atol=1e-3)
