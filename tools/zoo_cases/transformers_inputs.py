"""transformers: inputs of a forward by recipe, from what the configuration says about sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LENGTH = 12
FRAMES = 4
SAMPLES = 4000
Tensors = dict[str, Tensor]
Recipe = Callable[[Any, int], Tensors]


def field(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that the configuration or one inside it has."""
    for part in _parts(config):
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None:
            yield from _parts(inner)


def text(config: Any, size: int) -> Tensors:
    """Token ids away from the special tokens, which lie at both ends of the vocabulary."""
    num_tokens = min(int(field(config, "vocab_size", default=64)), 100)
    ids = torch.randint(min(4, num_tokens - 1), num_tokens, (size, LENGTH))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text_to_text(config: Any, size: int) -> Tensors:
    """Token ids for an encoder and a decoder."""
    return {**text(config, size), "decoder_input_ids": text(config, size)["input_ids"]}


def _square(value: Any) -> tuple[int, int]:
    if isinstance(value, Mapping):
        return int(value["height"]), int(value["width"])
    if isinstance(value, Sequence):
        sides = [int(side) for side in value]
        return sides[-2 if len(sides) > 1 else 0], sides[-1]
    return int(value), int(value)


def pixels(config: Any, size: int) -> Tensors:
    """Images of the size that the configuration names, else 64 pixels."""
    height, width = _square(field(config, "image_size", "img_size", "input_size", "crop_size", default=64))
    channels = int(field(config, "num_channels", "in_channels", "in_chans", default=3))
    return {"pixel_values": torch.randn(size, channels, height, width)}


def large_pixels(config: Any, size: int) -> Tensors:
    """Images of 128 pixels, for deep pyramids."""
    return {"pixel_values": torch.randn(size, 3, 128, 128)}


def pixels_and_mask(config: Any, size: int) -> Tensors:
    """Images with a mask that marks every pixel as part of them."""
    found = pixels(config, size)["pixel_values"]
    return {"pixel_values": found, "pixel_mask": torch.ones(found.shape[0], *found.shape[2:], dtype=torch.long)}


def pixels_and_text(config: Any, size: int) -> Tensors:
    """An image and a sentence a sample."""
    return {**text(config, size), **pixels(config, size)}


def pixels_to_text(config: Any, size: int) -> Tensors:
    """Images for an encoder, token ids for a decoder."""
    return {**pixels(config, size), "decoder_input_ids": text(config, size)["input_ids"]}


def pixels_text_to_text(config: Any, size: int) -> Tensors:
    """Images and token ids for an encoder, token ids for a decoder."""
    return {**pixels(config, size), **text_to_text(config, size)}


def video(config: Any, size: int) -> Tensors:
    """Short films."""
    frames = int(field(config, "num_frames", "frames_per_clip", default=FRAMES))
    found = pixels(config, size)["pixel_values"]
    return {"pixel_values": torch.randn(size, frames, *found.shape[1:])}


def video_of_videos(config: Any, size: int) -> Tensors:
    """Short films under the name `pixel_values_videos`."""
    return {"pixel_values_videos": video(config, size)["pixel_values"]}


def films_and_text(config: Any, size: int) -> Tensors:
    """A short film and a sentence a sample."""
    return {**text(config, size), **video(config, size)}


def _num_mels(config: Any) -> int:
    names = ("num_mel_bins", "input_feat_per_channel", "n_mels", "feature_size", "input_dim", "num_mels", "mel_bins")
    return int(field(config, *names, default=16))


def frames_of_features(config: Any, size: int) -> Tensors:
    """Spectrogram frames: [size, time, mel bins]."""
    return {"input_features": torch.randn(size, 64, _num_mels(config))}


def bands_of_features(config: Any, size: int) -> Tensors:
    """Spectrograms: [size, mel bins, time], as long as the configuration's positions."""
    time = 2 * int(field(config, "max_source_positions", default=32))
    return {"input_features": torch.randn(size, _num_mels(config), time)}


def features_to_text(config: Any, size: int) -> Tensors:
    """Spectrogram frames for an encoder, token ids for a decoder."""
    return {**frames_of_features(config, size), "decoder_input_ids": text(config, size)["input_ids"]}


def bands_to_text(config: Any, size: int) -> Tensors:
    """Spectrograms for an encoder, token ids for a decoder."""
    return {**bands_of_features(config, size), "decoder_input_ids": text(config, size)["input_ids"]}


def wave(config: Any, size: int) -> Tensors:
    """Sound: [size, samples]."""
    return {"input_values": torch.randn(size, SAMPLES)}


def wave_in_channels(config: Any, size: int) -> Tensors:
    """Sound: [size, 1, samples]."""
    return {"input_values": torch.randn(size, 1, SAMPLES)}


def wave_to_text(config: Any, size: int) -> Tensors:
    """Sound for an encoder, token ids for a decoder."""
    return {**wave(config, size), "decoder_input_ids": text(config, size)["input_ids"]}


def spectrogram_values(config: Any, size: int) -> Tensors:
    """Spectrograms under the name `input_values`: [size, time, mel bins]."""
    return {"input_values": torch.randn(size, int(field(config, "max_length", default=64)), _num_mels(config))}


def features_and_mask(config: Any, size: int) -> Tensors:
    """Spectrograms [size, mel bins, time] with a mask that marks every frame as sound."""
    found = torch.randn(size, _num_mels(config), 64)
    return {"input_features": found, "input_features_mask": torch.ones(size, 64, dtype=torch.long)}


def _patches(config: Any, size: int) -> tuple[Tensor, Tensor]:
    """Flattened patches of images of 4 x 4 patches one after the other, and the grid of each image."""
    side = _square(field(config, "patch_size", default=16))[0]
    channels = int(field(config, "in_channels", "num_channels", default=3))
    depth = int(field(config, "temporal_patch_size", default=1))
    return torch.randn(size * 16, channels * depth * side * side), torch.tensor([[1, 4, 4]] * size)


def patches_as_states(config: Any, size: int) -> Tensors:
    """Patches and grids, the patches under the name `hidden_states`."""
    patches, grids = _patches(config, size)
    return {"hidden_states": patches, "grid_thw": grids}


def patches_as_pixels(config: Any, size: int) -> Tensors:
    """Patches and grids, the patches under the name `pixel_values`."""
    patches, grids = _patches(config, size)
    return {"pixel_values": patches, "grid_thw": grids}


def text_in_boxes(config: Any, size: int) -> Tensors:
    """Words and their places on a page, in thousandths."""
    corner = torch.randint(0, 50, (size, LENGTH, 2))
    return {**text(config, size), "bbox": torch.cat((corner, corner + 10), 2)}


def text_in_parts(config: Any, size: int) -> Tensors:
    """Words and their places on a page, in parts of one."""
    return {**text(config, size), "bbox": text_in_boxes(config, size)["bbox"].float() / 100}


def text_in_boxes_to_text(config: Any, size: int) -> Tensors:
    """Words and their places for an encoder, token ids for a decoder."""
    return {**text_in_boxes(config, size), "decoder_input_ids": text(config, size)["input_ids"]}


def long_text(config: Any, size: int) -> Tensors:
    """Token ids of 16 tokens a sample, for models that take chunks."""
    found = text(config, size)
    return {name: torch.cat((ids, ids[:, :4]), 1) for name, ids in found.items()}


def forecast(config: Any, size: int) -> Tensors:
    """A series of one variable, its past and future with a feature of time."""
    past, future = config.context_length + max(config.lags_sequence), config.prediction_length
    return {
        "past_values": torch.randn(size, past),
        "past_time_features": torch.randn(size, past, config.num_time_features),
        "past_observed_mask": torch.ones(size, past),
        "future_values": torch.randn(size, future),
        "future_time_features": torch.randn(size, future, config.num_time_features),
    }


def channels_of_series(config: Any, size: int) -> Tensors:
    """Series of several variables: [size, time, variables]."""
    return {"past_values": torch.randn(size, config.context_length, config.num_input_channels)}


def decisions(config: Any, size: int) -> Tensors:
    """States, actions and rewards of a game."""
    return {
        "states": torch.randn(size, LENGTH, config.state_dim),
        "actions": torch.randn(size, LENGTH, config.act_dim),
        "rewards": torch.randn(size, LENGTH, 1),
        "returns_to_go": torch.randn(size, LENGTH, 1),
        "timesteps": torch.arange(LENGTH).repeat(size, 1),
        "attention_mask": torch.ones(size, LENGTH),
    }


RECIPES: Mapping[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        text,
        text_to_text,
        pixels,
        large_pixels,
        pixels_and_mask,
        pixels_and_text,
        pixels_to_text,
        pixels_text_to_text,
        video,
        video_of_videos,
        films_and_text,
        frames_of_features,
        bands_of_features,
        features_to_text,
        bands_to_text,
        wave,
        wave_in_channels,
        wave_to_text,
        spectrogram_values,
        features_and_mask,
        patches_as_states,
        patches_as_pixels,
        text_in_boxes,
        text_in_parts,
        text_in_boxes_to_text,
        long_text,
        forecast,
        channels_of_series,
        decisions,
    )
}
