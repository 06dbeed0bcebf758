"""Names of tensors in checkpoints, and in the base."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest

from relex_stream.errors import OptionError, SourceError
from relex_stream.sources.naming import Naming

BASE = frozenset(
    [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
)


def wrapped(prefix, names=BASE):
    return [prefix + name for name in sorted(names)]


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "app.model.", "a.b.c."])
def test_a_common_prefix_is_found(prefix):
    names = Naming(BASE).of(wrapped(prefix))
    assert names == {prefix + name: name for name in sorted(BASE)}


@pytest.mark.parametrize("prefix", ["model.", "model.model."])
def test_what_lacks_the_prefix_is_not_the_models(prefix):
    keys = [*wrapped(prefix), "optimizer.state.0.exp_avg", "lr_scheduler"]
    assert sorted(Naming(BASE).of(keys).values()) == sorted(BASE)


def test_state_that_repeats_names_with_something_behind_them_is_not_the_models():
    keys = [*wrapped("app.model."), *(f"app.optim.{name}.exp_avg" for name in BASE)]
    assert set(Naming(BASE).of(keys)) == set(wrapped("app.model."))


def test_a_head_may_be_missing():
    names = BASE - {"lm_head.weight"}
    assert sorted(Naming(BASE).of(wrapped("module.", names)).values()) == sorted(names)


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ("_orig_mod.model.norm.weight", "model.norm.weight"),
        ("_fsdp_wrapped_module.model.norm.weight", "model.norm.weight"),
        ("model._fsdp_wrapped_module.norm._checkpoint_wrapped_module.weight", "model.norm.weight"),
        ("module._orig_mod.model.norm.weight", "model.norm.weight"),
    ],
)
def test_wrappers_are_taken_out_wherever_they_are(own, name):
    prefix = "module." if own.startswith("module.") else ""
    keys = [*wrapped(prefix, BASE - {name}), own]
    assert Naming(BASE).of(keys)[own] == name


def test_names_of_the_base_that_look_wrapped_are_kept():
    base = frozenset({"_orig_mod.weight", "x.weight"})
    assert Naming(base).of(["_orig_mod.weight"]) == {"_orig_mod.weight": "_orig_mod.weight"}


def test_a_prefix_that_is_given_counts():
    keys = [*wrapped("ema."), *wrapped("model.")]
    assert set(Naming(BASE, strip_prefix="ema.").of(keys)) == set(wrapped("ema."))


def test_two_prefixes_that_both_fit_are_refused():
    with pytest.raises(SourceError, match=r"'ema\.' and 'student\.'; choose one with --strip-pre"):
        Naming(BASE).of([*wrapped("ema."), *wrapped("student.")])


def test_only_a_prefix_that_was_given_leaves_out_what_lacks_it():
    keys = [*wrapped("policy."), *wrapped("ref."), "odd"]
    names = Naming(BASE, strip_prefix="policy.").of_model(keys)
    assert names == {"policy." + name: name for name in sorted(BASE)}
    found = Naming(BASE).of_model([*wrapped("policy."), "odd"])
    assert found == {**names, "odd": "odd"}


def test_a_head_beside_the_wrapped_model_is_the_models():
    head = "lm_head.weight"
    keys = [*wrapped("policy.", BASE - {head}), head]
    names = Naming(BASE, strip_prefix="policy.").of_model(keys)
    assert sorted(names.values()) == sorted(BASE)
    # But not where the prefix holds another.
    names = Naming(BASE, strip_prefix="policy.").of_model([*wrapped("policy."), head])
    assert head not in names


def test_a_prefix_that_nothing_has_is_told():
    naming = Naming(BASE, strip_prefix="policy.")
    with pytest.raises(SourceError, match=r"begins with 'policy\.': there are a\.b, c; correct"):
        naming.of_model(["a.b", "c"])
    assert naming.of_model([]) == {}


def test_replacements_are_made_in_order_behind_the_prefix():
    naming = Naming(
        BASE,
        strip_prefix="net.",
        replacements=((r"^t\.h\.(\d+)", r"model.layers.\1"), ("fc", "up")),
    )
    assert naming.of(["net.t.h.0.mlp.fc_proj.weight"]) == {
        "net.t.h.0.mlp.fc_proj.weight": "model.layers.0.mlp.up_proj.weight"
    }


def test_replacements_come_before_a_prefix_is_looked_for():
    naming = Naming(BASE, replacements=((r"\bblocks\b", "layers"),))
    keys = [name.replace("layers", "blocks") for name in wrapped("module.")]
    assert sorted(naming.of(keys).values()) == sorted(BASE)


@pytest.mark.parametrize("pattern", ["(", r"(a)\2"])
def test_a_replacement_that_cannot_be_made_is_named(pattern):
    with pytest.raises(OptionError, match="--map"):
        Naming(BASE, replacements=((pattern, r"\3"),)).of(["aa"])


def test_two_keys_for_one_name_are_refused():
    with pytest.raises(SourceError, match=r"would both be 'model\.norm\.weight'"):
        Naming(BASE).of([*wrapped(""), "model._orig_mod.norm.weight"])


def test_the_bases_own_names_stay_as_they_are():
    assert Naming().of(["module.x", "_orig_mod.y"]) == {
        "module.x": "module.x",
        "_orig_mod.y": "_orig_mod.y",
    }


def test_foreign_names_stay_to_be_complained_of():
    assert Naming(BASE).of(["a", "b"]) == {"a": "a", "b": "b"}


TORCHTITAN = Path(__file__).parents[2] / "docs/trainers/torchtitan.md"

QWEN3 = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.0.attention.qkv_linear.wq.weight": "model.layers.0.self_attn.q_proj.weight",
    "layers.0.attention.qkv_linear.wk.weight": "model.layers.0.self_attn.k_proj.weight",
    "layers.0.attention.qkv_linear.wv.weight": "model.layers.0.self_attn.v_proj.weight",
    "layers.0.attention.wo.weight": "model.layers.0.self_attn.o_proj.weight",
    "layers.0.attention.q_norm.weight": "model.layers.0.self_attn.q_norm.weight",
    "layers.0.attention.k_norm.weight": "model.layers.0.self_attn.k_norm.weight",
    "layers.0.feed_forward.w1.weight": "model.layers.0.mlp.gate_proj.weight",
    "layers.0.feed_forward.w2.weight": "model.layers.0.mlp.down_proj.weight",
    "layers.0.feed_forward.w3.weight": "model.layers.0.mlp.up_proj.weight",
    "layers.0.attention_norm.weight": "model.layers.0.input_layernorm.weight",
    "layers.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


@pytest.mark.parametrize("old", [False, True])
def test_torchtitans_names_as_its_page_maps_them(old):
    command = re.search(r"```sh\n(.*?)```", TORCHTITAN.read_text(), re.S)[1]
    words = shlex.split(command.replace("\\\n", " "))
    maps = [after for word, after in itertools.pairwise(words) if word == "--map"]
    naming = Naming(
        frozenset(QWEN3.values()),
        replacements=tuple((pattern, new) for pattern, _, new in (m.rpartition("=") for m in maps)),
    )
    names = {
        key.replace("qkv_linear.", "").replace("lm_head", "output") if old else key: name
        for key, name in QWEN3.items()
    }
    assert naming.of(names) == names
