"""Which weights get the 2:4 format on CUDA, and that a loaded model computes the same with it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gapfx import two_of_four
from gapfx.pattern import parse_pattern
from gapfx.plan import Weight
from gapfx.two_of_four import capability_of, serve, shape_refusal

NEW = (9, 0)


class Net(nn.Module):
    """Linear layers of which some fit."""

    def __init__(self) -> None:
        super().__init__()
        self.fits, self.narrow, self.other = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 64)
        self.attention = nn.MultiheadAttention(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Without the attention."""
        return self.other(self.narrow(torch.relu(self.fits(x))))


def weights() -> list[Weight]:
    return [
        Weight("fits.weight", (96, 64), 0.5, "2:4"),
        Weight("narrow.weight", (64, 96), 0.5, "2:4"),
        Weight("other.weight", (64, 64), 0.5),
        Weight("attention.in_proj_weight", (192, 64), 0.5, "2:4"),
    ]


def net(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    made = Net()
    with torch.no_grad():
        for weight in weights():
            value = made.get_parameter(weight.fqn)
            value.mul_(parse_pattern(weight.pattern).mask(value.abs(), 0.5))
    return made.to(dtype)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that would be packed; here they stay as they are."""
    seen: list[Tensor] = []

    def keep(weight: Tensor) -> Tensor:
        seen.append(weight)
        return weight

    monkeypatch.setattr(two_of_four, "packed", keep)
    return seen


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((64, 128), ""),
        ((48, 128), "2:4 takes multiples of 32 outputs and 64 inputs"),
        ((64, 96), "2:4 takes multiples of 32 outputs and 64 inputs"),
        ((64, 64, 3), "2:4 is for linear layers alone"),
    ],
)
def test_which_weights_the_format_takes(shape: tuple[int, ...], reason: str) -> None:
    assert shape_refusal(shape) == reason


def test_a_cpu_has_no_compute_capability() -> None:
    assert capability_of(torch.device("cpu")) is None


def test_linear_layers_that_fit_are_packed_and_all_others_say_why_not(packed: list[Tensor]) -> None:
    model = net(torch.bfloat16)
    value = model.fits.weight.detach()
    assert serve(model, weights(), NEW) == {
        "fits.weight": "",
        "narrow.weight": "2:4 takes multiples of 32 outputs and 64 inputs",
        "other.weight": "on CUDA the pattern 2:4 alone has faster products, this one is unstructured",
        "attention.in_proj_weight": "2:4 is for linear layers that share no weight",
    }
    [only] = packed
    assert only.data_ptr() == value.data_ptr()
    assert not model.fits.weight.requires_grad


def test_fp32_and_old_devices_stay_dense(packed: list[Tensor]) -> None:
    assert serve(net(torch.float32), weights()[:1], NEW)["fits.weight"].startswith("2:4 takes bf16 and fp16")
    reason = serve(net(torch.bfloat16), weights()[:1], (7, 5))["fits.weight"]
    assert reason == "2:4 needs compute capability 8.0, this device has 7.5"
    assert not packed


def test_what_torch_cannot_pack_stays_dense_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(weight: Tensor) -> Tensor:
        raise RuntimeError("no kernels here\nand more")

    monkeypatch.setattr(two_of_four, "packed", fail)
    model = net(torch.bfloat16)
    before = model.fits.weight
    assert serve(model, weights()[:1], NEW) == {"fits.weight": "torch refuses it: no kernels here"}
    assert model.fits.weight is before


@pytest.mark.gpu
def test_a_served_model_computes_what_the_dense_one_does() -> None:
    dense = net(torch.bfloat16).to("cuda")
    served = copy.deepcopy(dense)
    assert serve(served, weights(), torch.cuda.get_device_capability())["fits.weight"] == ""
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close(served(x), dense(x), rtol=2e-2, atol=2e-2)
