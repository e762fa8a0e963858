"""transformers: small configurations by rule, from the defaults of each configuration class."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tools.zoo_cases.torchvision_ops import install
from tools.zoo_cases.transformers_specials import CONFIGS

install()
CONFIG_MAPPING: Any = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING

VOCABULARY = 128
IMAGE = 64
Rule = Callable[[Any], Any]


def _like(value: Any, items: Iterable[Any]) -> Any:
    """The items in a sequence of the type of `value`."""
    return tuple(items) if isinstance(value, tuple) else list(items)


def _at_most(limit: int) -> Rule:
    """A rule: whole numbers become at most `limit`, also inside sequences."""

    def shrink(value: Any) -> Any:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return _like(value, map(shrink, value))
        return min(value, limit) if type(value) is int else value

    return shrink


def _exactly(size: int) -> Rule:
    """A rule: whole numbers become `size`, also inside sequences."""

    def shrink(value: Any) -> Any:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return _like(value, map(shrink, value))
        return size if type(value) is int else value

    return shrink


def _width(value: Any) -> Any:
    """Widths above 32 become 32; widths of stages keep their proportions and begin at 8."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        numbers = [item for item in value if type(item) is int and item > 8]
        if not numbers or len(numbers) < len(value):
            return _like(value, map(_width, value))
        return _like(value, (max(8, 8 * round(item / min(numbers))) for item in numbers))
    return min(value, 32) if type(value) is int else value


def _patch(value: Any) -> Any:
    """Patches of 14 or more pixels become 16 pixels."""
    if isinstance(value, Sequence):
        return _like(value, map(_patch, value))
    return 16 if type(value) is int and value >= 12 else value


def _places(value: Any) -> Any:
    """Chosen layers become the first ones, as many as there are, at most two."""
    return _like(value, range(min(len(value), 2))) if isinstance(value, Sequence) else value


def _keep(value: Any) -> Any:
    return value


# The first pattern that matches the whole name of a field says what its value becomes.
RULES: Sequence[tuple[str, Rule]] = (
    (r"num_channels|num_codebooks|audio_channels|.*mask_time_.*|.*mask_feature_(length|min.*)", _keep),
    (r".*(sampling_rate|hop_length|temperature|max_distance|_buckets|sample_rate|_loss.*|num_frames)", _keep),
    (r"num_conv_pos_embedding_groups", _at_most(4)),
    (r"num_conv_pos_embeddings", _at_most(15)),
    (r"num_attention_layers|decoder_sparse_step|encoder_sparse_step", _at_most(2)),
    (r".*feature_layers?|head_in_index|decode_index", _keep),
    (r".*(indexes|indices|_hook_ids|encode_proj_layers)", _places),
    (r"(.*_)?(num_|n_)?(\w*_)?(layers?|depths?|blocks)(_per_\w+)?|[lrx]_layers|num_blocks.*", _at_most(2)),
    (r"(.*_)?vocab_size", _at_most(VOCABULARY)),
    (r".*(kv|key_value)\w*heads?", _at_most(2)),
    (r".*n?_?heads?|num_heads", _at_most(4)),
    (r".*head_(dim|size)|d_kv|d_head|dim_head|kv_channels", _at_most(8)),
    (r"(.*_)?(max_position_embeddings|n_positions|max_\w*positions|n_ctx|max_\w*position_embeddings)", _at_most(128)),
    (r".*(num|n)_(\w*_)?experts|zero_expert_num", _at_most(4)),
    (r".*experts_per_tok\w*|topk_group|n_group|moe_k|.*top_?k", _at_most(2)),
    (r"(.*_)?(image_size|img_size|resolution|crop_size|max_img_size)", _exactly(IMAGE)),
    (r"patch_size|tubelet_size", _patch),
    (r"(.*_)?window(_size|s)?|sliding_window|local_attention|.*chunk_size|.*chunk_length|block_size", _at_most(8)),
    (r"num_queries|two_stage_num_proposals|num_denoising|num_query_tokens|num_latents|\w*num_prompts", _at_most(8)),
    (r".*kernel\w*|.*strides?|.*padding|.*window\w*", _keep),
    (r"\w*(intermediate|ffn|feedforward|feed_forward|mlp|d_ff|dff|dim_ff)\w*", _at_most(64)),
    (r"\w*(num_codevectors_per_group|codebook_size|num_embeddings|segment_means_seq_len|num_landmarks)", _at_most(16)),
    (r"\w*num_position_embeddings|max_position\w*", _at_most(64)),
    (r"\w*(num_mel_bins|n_mels|mel_bins|input_feat_per_channel)", _at_most(16)),
    (r"\w*(dims?|sizes?|channels?|width|units?|rank|features?|filters|embd|d_model|inner|dim\w*)", _width),
)
COMPILED = [(re.compile(pattern), rule) for pattern, rule in RULES]
TOKEN = re.compile(r".*(token_id|token_index|_id|_token_ids)")


def small_fields(cls: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """Small values for the fields of a configuration class whose defaults are `known`."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        value = known.get(field.name, field.default)
        if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        if isinstance(value, bool) or value is None or value is dataclasses.MISSING:
            continue
        rule = next((rule for pattern, rule in COMPILED if pattern.fullmatch(field.name)), _keep)
        if isinstance(value, (int, list, tuple)) and rule(value) != value:
            values[field.name] = rule(value)
    return values | _tokens(cls, known) | _agreed({field.name for field in dataclasses.fields(cls)}, values)


def _agreed(names: set[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree with other fields: heads of latent attention; no cache of keys, which only generation needs."""
    found: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    if "kv_lora_rank" in names and "num_attention_heads" in values:
        found["num_key_value_heads"] = values["num_attention_heads"]
    return found


def _tokens(cls: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """Distinct small numbers for special tokens beyond the small vocabulary, from its end downwards."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        value = known.get(field.name, field.default)
        if type(value) is int and value >= VOCABULARY // 2 and TOKEN.fullmatch(field.name):
            found[field.name] = VOCABULARY - 1 - len(found)
    return found


@functools.cache
def small_config(model_type: str) -> Any:
    """The small configuration of a model type, as the rules and its specials say."""
    return _config(CONFIG_MAPPING[model_type], {}, CONFIGS.get(model_type, {}))


def _config(cls: Any, known: Mapping[str, Any], special: Mapping[str, Any]) -> Any:
    """A configuration with small ones inside; `special` holds values by field, and mappings for those inside."""
    values = dict(known) | small_fields(cls, known)
    nested: Mapping[str, Any] = getattr(cls, "sub_configs_defaults", {})
    for name, spec in nested.items():
        if hasattr(spec, "model_type"):
            changes = dict(special.get(name) or {})
            inner = CONFIG_MAPPING[changes.pop("model_type")] if "model_type" in changes else _inner_class(spec)
            own = CONFIGS.get(inner.model_type, {})
            known_inside = spec.init_kwargs if inner is _inner_class(spec) else {}
            values[name] = _config(inner, known_inside, {**own, **changes})
    values |= {name: value for name, value in special.items() if name not in nested or value is None}
    return cls(**values)


def _inner_class(spec: Any) -> Any:
    cls = spec.config_class
    return cls if hasattr(cls, "model_type") else CONFIG_MAPPING[spec.model_type]
