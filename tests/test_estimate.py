"""What a run will take: bytes by kind, phase and stage, traffic, and the ranks that a memory needs, by hand."""

from __future__ import annotations

import dataclasses

import pytest

from gapfx.activations import Activations
from gapfx.device_profile import PROFILES, Profile
from gapfx.errors import UserError
from gapfx.estimate import Setup, Sizes, dense_estimate, dense_plan, estimate, smallest_ranks, step_seconds
from gapfx.flops import ForwardFlops, training_flops
from gapfx.forecast import Question, describe, parse_bytes
from gapfx.plan import Group, Plan, Weight
from gapfx.runtime.deepspeed_config import BUCKET_SIZE
from gapfx.schedule import Budget, with_schedule

WEIGHTS = [Weight(f"{index}.weight", (100, 80), 0.9) for index in range(4)]
PLAN = with_schedule(
    Plan((Group("first", tuple(WEIGHTS[:2])), Group("last", tuple(WEIGHTS[2:]))), sparsity=0.9),
    "gap",
    Budget(1, 10, 20),
)
SIZES = Sizes.of(PLAN, 40_000)  # 32,000 planned, 8,000 others
LIVE = 16_000 + 1_600


def test_weights_count_by_their_live_values_in_each_phase() -> None:
    phases = list(estimate(PLAN, SIZES, Setup()))
    assert [each.live for each in phases] == pytest.approx([0.55, 0.55, 0.1])
    assert [each.rank.values for each in phases] == pytest.approx([4 * (LIVE + 8_000)] * 2 + [4 * (3_200 + 8_000)])
    assert Sizes(32_000, 8_000, 8_000) == SIZES


@pytest.mark.parametrize(
    ("zero", "values", "gradients", "masters", "moments"),
    [(0, 1, 1, 0, 1), (1, 1, 1 + 2 / 4, 1 / 4, 1 / 4), (2, 1, 3 / 4, 1 / 4, 1 / 4), (3, 1 / 4, 3 / 4, 1 / 4, 1 / 4)],
)
def test_each_stage_cuts_what_it_cuts(
    zero: int, values: float, gradients: float, masters: float, moments: float
) -> None:
    count = LIVE + 8_000
    first = next(estimate(PLAN, SIZES, Setup(ranks=4, zero=zero, value_bytes=2)))
    found = first.rank
    assert (found.values, found.gradients) == pytest.approx((2 * count * values, 2 * count * gradients))
    assert (found.masters, found.moments) == pytest.approx((4 * count * masters, 8 * count * moments))
    assert found.buckets == (2 * BUCKET_SIZE if zero == 3 else 0)
    assert found.masks == (3 * 1_000 if zero == 3 else 4_000 + 2 * 1_000)
    assert found.densified == 2 * 8_000
    passes, of_masks = (3, 2 * 4_000) if zero == 3 else (2, 0)
    assert first.traffic == pytest.approx((passes * 2 * count + of_masks) * 3 / 4)


def test_the_form_masked_and_dense_training_hold_all_weights() -> None:
    masked = next(estimate(PLAN, SIZES, Setup(is_compact=False)))
    dense = dense_estimate(PLAN, SIZES, Setup())
    assert masked.rank.values == dense.rank.values == 4 * 40_000
    assert (masked.rank.masks, dense.rank.masks) == (12_000, 0)
    assert dense.live == 1


def test_an_update_by_the_gradient_holds_one_sparse_group_dense_before_it() -> None:
    plan = with_schedule(PLAN, "rigl", Budget(1, 10, 20, update_steps=20))
    first, second = estimate(plan, SIZES, Setup())
    held, count, masks = 3_200 + 8_000, 1_600 + 16_000 + 8_000, 4_000 + 2 * 4_000
    assert second.scoring == pytest.approx(3 * 4 * count + masks + 4 * (3 * held + 16_000))
    assert (first.scoring, first.peak, second.peak) == (0, first.rank.state, second.scoring)
    in_form_masked = list(estimate(plan, SIZES, Setup(is_compact=False)))[1]
    assert in_form_masked.scoring == pytest.approx(3 * 4 * 40_000 + masks + 4 * (3 * held + 16_000))


def test_rigl_needs_the_memory_of_its_updates_and_set_does_not() -> None:
    peaks = {
        method: max(
            each.peak
            for each in estimate(with_schedule(PLAN, method, Budget(1, 10, 20, update_steps=5)), SIZES, Setup())
        )
        for method in ("static", "set", "rigl")
    }
    assert peaks["static"] == peaks["set"] < peaks["rigl"] < dense_estimate(PLAN, SIZES, Setup()).peak


def test_weights_that_grow_to_saved_values_are_kept_aside_from_their_prune_on() -> None:
    plan = with_schedule(PLAN, "gap", Budget(2, 10, 20, growth="saved"))
    plain = list(estimate(with_schedule(PLAN, "gap", Budget(2, 10, 20)), SIZES, Setup(ranks=2)))
    found = list(estimate(plan, SIZES, Setup(ranks=2)))
    assert [each.rank.aside for each in found] == [0, 4 * 16_000 / 2, 4 * 16_000 / 2, 0, 0]
    assert found[1].rank.state == plain[1].rank.state + 32_000
    begun = list(estimate(dataclasses.replace(plan, start_masks="magnitude"), SIZES, Setup()))
    assert [each.rank.aside for each in begun] == [*[4 * 16_000] * 3, 0, 0]


def test_all_weights_are_kept_aside_once_early_ones_are() -> None:
    found = list(estimate(with_schedule(PLAN, "imp", Budget(1, 10, 20)), SIZES, Setup(ranks=4, zero=3)))
    assert [each.rank.aside for each in found] == [0, *[4 * 40_000 / 4] * (len(found) - 1)]


def test_start_masks_by_gradients_hold_all_weights_dense_before_the_first_step() -> None:
    found = list(estimate(with_schedule(PLAN, "snip", Budget(1, 10, 20)), SIZES, Setup()))
    engine = 3 * 4 * 40_000 + 3 * 4_000
    assert [each.scoring for each in found] == [engine + 4 * (40_000 + 32_000)]
    assert found[0].peak == found[0].scoring > found[0].rank.state
    assert dense_estimate(with_schedule(PLAN, "snip", Budget(1, 10, 20)), SIZES, Setup()).scoring == 0


def test_the_fewest_ranks_that_hold_the_state() -> None:
    setup = Setup(zero=3)
    need = max(
        each.rank.state + each.rank.densified for each in estimate(PLAN, SIZES, dataclasses.replace(setup, ranks=8))
    )
    assert smallest_ranks(PLAN, SIZES, setup, need) == 8
    assert smallest_ranks(PLAN, SIZES, setup, need - 1) == 16
    assert smallest_ranks(PLAN, SIZES, setup, 1_000) is None


def test_time_is_that_of_products_and_of_traffic() -> None:
    forward = ForwardFlops(1000, {weight.fqn: 200 for weight in WEIGHTS})
    estimates, profile = list(estimate(PLAN, SIZES, Setup(ranks=2))), PROFILES["h100"]
    assert training_flops(dense_plan(PLAN), forward) == 40 * 3 * 1000
    assert training_flops(PLAN, forward) == pytest.approx(20 * 3 * (200 + 800 * 0.55) + 20 * 3 * (200 + 800 * 0.1))
    sent = sum(each.traffic * each.phase.num_steps for each in estimates) / 40
    wanted = 3000 / profile.flops + sent / profile.bandwidth
    assert step_seconds(PLAN, forward, estimates, profile) == pytest.approx(wanted)
    wanted = 4 * 3000 / profile.flops + sent / profile.bandwidth
    assert step_seconds(PLAN, forward, estimates, profile, 4) == pytest.approx(wanted)


def test_the_text_has_a_table_a_picture_and_the_ranks() -> None:
    text = describe(
        PLAN,
        SIZES,
        Setup(zero=3),
        Question.parse("1,4", "200MB", "h100"),
        ForwardFlops(1000, {}),
        Activations(2**20, 8, 16),
    )
    assert "model state of a rank of 1, ZeRO 3:" in text
    assert "#" * 30 in text
    assert "for the backward: 2.00 MiB on 1, 512 KiB on 4 ranks" in text
    assert "191 MiB a rank hold the model state of" in text
    assert "4 ranks like h100, the batch of 16 shared:" in text
    assert (
        "operations of a rank's training, dense and counted for the sparse form: "
        "240 k and 240 k on 1, 60,000 and 60,000 on 4 ranks" in text
    )


def test_a_profile_is_known_given_or_measured() -> None:
    assert Question.parse("8", "", "h100").profile == PROFILES["h100"]
    assert Question.parse("8", "", "2.5e12:1e9").profile == Profile("2.5e12:1e9", 2.5e12, 1e9)
    here = Question.parse("8", "", "here").profile
    assert here is not None
    assert 1e8 < here.flops < 1e16
    assert 1e7 < here.bandwidth < 1e14


@pytest.mark.parametrize(("text", "wanted"), [("80GiB", 80 * 2**30), ("1.5 TB", 1.5e12), ("", 0.0)])
def test_memory_is_read_with_its_unit(text: str, wanted: float) -> None:
    assert parse_bytes(text) == wanted


@pytest.mark.parametrize(
    ("ranks", "memory", "profile", "message"),
    [
        ("0", "", "", "cannot read the ranks '0'"),
        ("8,", "", "", "cannot read the ranks"),
        ("8", "80", "", "cannot read the memory '80'"),
        ("8", "80 parsecs", "", "cannot read the memory"),
        ("8", "", "abacus", "there is no profile 'abacus'"),
        ("8", "", "0:5", "there is no profile '0:5'"),
    ],
)
def test_a_question_that_is_none_is_refused(ranks: str, memory: str, profile: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Question.parse(ranks, memory, profile)
