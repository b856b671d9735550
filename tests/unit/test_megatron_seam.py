"""What the package expects of the installed megatron-core, beside what `platform` patches and checks by itself.

Behaviour where it can be seen: a tiny model of Megatron's own class runs, and says what went on. When a newer release
fails here, the message names the module of ours that has to be adapted.
"""

import inspect
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from tests.distributed import gloo
from tests.distributed.layouts import Layout, Toy, build
from tests.distributed.toy import EOD, HEADS, SAMPLES, SEQUENCE, model_config, samples

import torch  # isort: skip  # after layouts: platform.setup comes before anything that may load Megatron
from megatron.core.models.hybrid import hybrid_model  # isort: skip
from megatron.core.optimizer import optimizer  # isort: skip
from megatron.training import argument_utils, arguments, training  # isort: skip
from megatron.training.models import hybrid as hybrid_builder  # isort: skip

from megatron_mtpd import model as ours
from megatron_mtpd.training import arguments as our_arguments


def expect(condition: bool, what: str) -> None:
    assert condition, f"megatron-core {version('megatron-core')} is not what the package was written for (0.19): {what}"


# The hidden states of all heads --------------------------------------------------------------------------------------


def facts() -> dict:
    """On one rank: what HybridModel does when it is told that it is not the last stage."""
    model = build(Layout(), Toy(megatron=True))[0][0].module
    calls: dict[str, list] = {"mtp": [], "embedding": [], "output_layer": []}
    for name, seen in calls.items():
        getattr(model, name).register_forward_pre_hook(
            lambda _module, args, kwargs, seen=seen: seen.append((args, kwargs)), with_kwargs=True
        )
    batch = {key: torch.stack([sample[key] for sample in samples(Toy())]) for key in samples(Toy())[0]}
    inputs = (batch["tokens"], batch["position_ids"], None)
    per_token = model(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"])
    output_layer_calls = len(calls["output_layer"])
    for seen in calls.values():
        seen.clear()
    model.post_process = False
    stacked = model(*inputs)
    (args, kwargs), *more = calls["mtp"]
    layer_calls: list[tuple] = []
    for layer in model.mtp.layers:
        layer.register_forward_pre_hook(lambda _module, a, k: layer_calls.append((len(a), *k)), with_kwargs=True)
    return {
        "per_token": list(per_token.shape),
        "output_layer_calls": output_layer_calls,
        "stacked": list(stacked.shape),
        "output_layer_skipped": not calls["output_layer"],
        "mtp_calls": 1 + len(more),
        "mtp_positional": len(args),
        "mtp_keywords": sorted(kwargs),
        "embedding_calls": [(len(a), sorted(k)) for a, k in calls["embedding"]],
        "first_is_main": torch.equal(stacked[:SEQUENCE], kwargs["hidden_states"]),
        "runs_again": torch.equal(stacked, model.mtp(**kwargs)),
        "layer_calls": [(positional, sorted(keywords)) for positional, *keywords in layer_calls],
    }


def test_hidden_states_of_all_heads():
    """`MTPDModel.hidden_states_of_all_heads`, `_gate_heads` and `_feed_drafts`, in model.py."""
    (found,) = gloo.run(facts, 1)
    main = "adapt MTPDModel.hidden_states_of_all_heads in megatron_mtpd/model.py"
    expect(
        found["stacked"] == [(1 + HEADS) * SEQUENCE, SAMPLES, 32] and found["output_layer_skipped"],
        f"HybridModel.forward with post_process off no longer returns the stacked hidden states [(1 + K) s, b, h] "
        f"right after the MTP block, but {found['stacked']}; {main}",
    )
    expect(found["first_is_main"], f"the first chunk is not what the MTP block was given; {main}")
    expect(found["mtp_calls"] == 1, f"the MTP block is called {found['mtp_calls']} times; {main}")
    gate = "adapt MTPDModel._gate_heads in megatron_mtpd/model.py"
    expect(
        found["mtp_positional"] == 0 and {"hidden_states", "embedding", "input_ids"} <= set(found["mtp_keywords"]),
        f"the MTP block is called with {found['mtp_keywords']}: hidden_states and embedding are not keywords; {gate}",
    )
    expect(
        found["embedding_calls"] == [(0, ["input_ids", "position_ids"])] * (1 + HEADS),
        f"the embedding is called with {found['embedding_calls']}, and not by keyword, once and once a head; {gate}",
    )
    expect(
        len(found["layer_calls"]) == HEADS
        and all(
            positional == 0 and {"hidden_states", "embedding", "input_ids"} <= set(keywords)
            for positional, keywords in found["layer_calls"]
        ),
        f"the heads are called with {found['layer_calls']}: hidden_states and embedding are not keywords, or not once "
        "a head; adapt MTPDModel._feed_drafts in megatron_mtpd/model.py",
    )
    expect(found["runs_again"], f"a second call of the MTP block gives something else; {main}")
    expect(
        found["per_token"] == [SAMPLES, SEQUENCE] and found["output_layer_calls"] == 1 + HEADS,
        "HybridModel's loss is not [b, s], or not of one pass of the output layer a head; adapt MTPDModel.forward",
    )


def test_names_that_the_model_uses():
    for name in ("process_mtp_loss", "HybridModel"):
        expect(hasattr(hybrid_model, name), f"{hybrid_model.__name__}.{name} is gone; see megatron_mtpd/model.py")
    for name in ("shared_embedding_or_output_weight", "_scale_logits"):
        expect(hasattr(hybrid_model.HybridModel, name), f"HybridModel.{name} is gone; adapt MTPDModel.logits")
    expect(
        "mtp" in optimizer.SEPARATE_GRAD_NORM_GROUPS and optimizer.GRAD_NORM_GROUP_ATTR == "grad_norm_group",
        "gradients of a group 'mtp' are no longer clipped by their own norm; adapt MTPDModel.__init__ (clip_apart)",
    )


# Building and entering ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [False, True])
def test_our_builder_hands_over_what_megatrons_does(monkeypatch, pad):
    """Our builder takes the arguments from the configuration by name: none may be missing or another."""
    given = {}
    monkeypatch.setattr(hybrid_builder, "HybridModel", lambda **kwargs: given.setdefault("megatron", kwargs))
    monkeypatch.setattr(ours, "MTPDModel", lambda **kwargs: given.setdefault("ours", kwargs))
    stage = {"pg_collection": SimpleNamespace(), "pre_process": True, "post_process": False, "vp_stage": 1}
    for toy in (Toy(tied=True, documents=True), Toy(tied=True, megatron=True)):
        config = model_config(Layout(), toy)
        config.rotary_base, config.should_pad_vocab, config.hybrid_stack_spec = 500, pad, "a spec"
        config.get_builder_cls()(config).build_model(**stage)
    expected = given["megatron"] | {"mtpd": Toy().mtpd, "eod_token_id": EOD}
    for name, value in expected.items():
        expect(name in given["ours"], f"HybridModel takes {name} now; adapt MTPDModelBuilder in megatron_mtpd/model.py")
        if name not in ("config", "pg_collection"):
            expect(
                given["ours"][name] == value, f"MTPDModelBuilder gives {name}={given['ours'][name]!r}, not {value!r}"
            )


def test_the_configuration_names_our_builder():
    config = model_config(Layout(), Toy())
    expect(
        config.get_builder_cls() is ours.MTPDModelBuilder,
        "HybridModelConfig.builder no longer names the builder; adapt MTPDModelConfig in megatron_mtpd/model.py",
    )


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (argument_utils.hybrid_config_from_args, ("args", "model_config_cls")),
        (argument_utils.pretrain_cfg_container_from_args, ("args", "model_cfg")),
        (arguments.parse_and_validate_args, ("extra_args_provider",)),
        (
            training.pretrain,
            ("cfg_container", "train_valid_test_dataset_provider", "model_type", "forward_step_func", "store"),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_functions_that_the_entry_calls(function, parameters):
    missing = set(parameters) - set(inspect.signature(function).parameters)
    expect(not missing, f"{function.__name__} no longer takes {missing}; adapt megatron_mtpd/training/pretrain.py")


def test_the_flags_come_from_the_dataclass():
    for name in ("_format_arg_name", "_build_argparse_kwargs_from_field", "build_group"):
        expect(
            callable(getattr(argument_utils.ArgumentGroupFactory, name, None)),
            f"ArgumentGroupFactory.{name} is gone; adapt megatron_mtpd/training/arguments.py",
        )
    expect(issubclass(our_arguments._MTPDFlags, argument_utils.ArgumentGroupFactory), "")


def test_globals_that_the_loop_keeps():
    """No hook tells a forward step its iteration, and none sees the globals being made: read from the source."""
    expect(
        "args.curr_iteration = iteration" in inspect.getsource(training.train),
        "the loop no longer sets args.curr_iteration; adapt forward_step (distillation schedule)",
    )
    expect(
        "set_global_variables(args)" in inspect.getsource(arguments.parse_and_validate_args)
        and "set_global_variables" not in inspect.getsource(training.pretrain),
        "tokenizer and writers are no longer made when arguments are parsed; adapt megatron_mtpd/training/pretrain.py",
    )
