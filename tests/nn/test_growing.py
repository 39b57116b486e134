"""Growing: the schedule, the plan of images, and continuity of both networks at either end of a fade."""

import pytest
import torch
import torch.nn.functional as F

from dgm_core.contract import DataMismatch, DataSpec
from dgm_core.nn.growing import (
    GrowingCritic,
    Growth,
    Stage,
    ToPixels,
    double,
    growth,
    halve,
    plan,
    sides_of,
    widths_of,
)

SIZES = ((4, 4), (8, 8), (16, 16), (32, 32))
FADES = ((0.125, 0.25), (0.5, 0.75))
# The same float64 operations in another order.
EXACT = {"rtol": 0, "atol": 1e-12}


def test_windows_meet_and_cover_training() -> None:
    g = Growth(SIZES, FADES)
    assert g.first == 1
    assert g.sides == {8: 1, 16: 2, 32: 3}
    assert [g.window(k) for k in (1, 2, 3)] == [(0.0, 0.125), (0.125, 0.5), (0.5, 1.0)]


def test_fading_is_linear_between_its_ends_and_held_outside() -> None:
    g = Growth(SIZES, FADES)
    assert [g.stage(1, t).alpha for t in (0.0, 0.1, 0.9)] == [1, 1, 1]
    assert [g.stage(2, t).alpha for t in (0.0, 0.125, 0.15625, 0.25, 0.4, 0.9)] == [0, 0, 0.25, 1, 1, 1]
    assert g.stage(3, 0.625) == Stage(3, 0.5)


@pytest.mark.parametrize("stage", [Stage(1, 1.0), Stage(2, 0.25), Stage(2, 1.0), Stage(3, 0.5), Stage(3, 1.0)])
def test_a_stage_is_one_number(stage: Stage) -> None:
    assert Growth(SIZES, FADES).at(stage.level - 1 + stage.alpha) == stage


def test_a_fade_that_has_just_begun_is_the_stage_before() -> None:
    """As one number they are the same, as functions too."""
    assert Growth(SIZES, FADES).at(2 - 1 + 0.0) == Stage(1, 1.0)


@pytest.mark.parametrize(
    ("fades", "message"),
    [
        (((0.1, 0.2),) * 4, "names 4 grids"),
        (((0.0, 0.2),), "0 < start"),
        (((0.3, 0.2),), "0 < start"),
        (((0.1, 0.4), (0.3, 0.5)), "without overlap"),
        (((0.1, 1.1),), "end ≤ 1"),
    ],
)
def test_refuses_what_is_no_schedule(fades: tuple[tuple[float, float], ...], message: str) -> None:
    with pytest.raises(DataMismatch, match=message):
        Growth(SIZES, fades)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 12, 16), (1, 4, 8), (1, 512, 512), (1, 8, 20)])
def test_refuses_sides_that_are_no_powers_of_two(shape: tuple[int, int, int]) -> None:
    with pytest.raises(DataMismatch, match="powers of two from 8 to 256"):
        growth(DataSpec("image", shape, 256), ())


def test_sides_may_differ() -> None:
    g = growth(DataSpec("image", (1, 16, 64), 256), ((0.5, 0.75),))
    assert g.sizes == ((4, 16), (8, 32), (16, 64))
    assert sides_of(DataSpec("image", (1, 16, 64), 256)) == [4, 8, 16]


def test_the_plan_counts_images() -> None:
    """1000 images a phase: 100 rounds of 10, then 50 of 20, and 25 of 40; 10,000 in all."""
    fades, sizes, rounds = plan([10, 20, 40], 1000, 10_000)
    starts = [100, 100 + 50 + 50]
    last = starts[1] + 25
    assert rounds == last + (10_000 - 4 * 1000) // 40
    assert fades == ((starts[0] / rounds, 150 / rounds), (starts[1] / rounds, last / rounds))
    assert sizes == ((0.0, 10), (starts[0] / rounds, 20), (starts[1] / rounds, 40))
    shown = 100 * 10 + 100 * 20 + (rounds - starts[1]) * 40
    assert shown == 10_000


def test_the_plan_of_one_resolution_and_of_equal_batches() -> None:
    assert plan([8], 1000, 4000) == ((), ((0.0, 8),), 500)
    assert plan([8, 8], 800, 8000) == (((0.1, 0.2),), ((0.0, 8),), 1000)


def test_widths_are_table_2s() -> None:
    sizes = [(2**k, 2**k) for k in range(2, 11)]
    assert widths_of(sizes, 512, 16_384) == [512, 512, 512, 512, 256, 128, 64, 32, 16]


def test_data_is_shown_at_the_stage() -> None:
    g = Growth(SIZES[:3], ((0.1, 0.2), (0.5, 0.6)))
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(g.shown(x, Stage(0, 1.0)), halve(halve(x)), **EXACT)
    assert torch.equal(g.shown(x, Stage(2, 1.0)), x)
    coarse = double(halve(halve(x)))
    torch.testing.assert_close(g.shown(x, Stage(1, 0.3)), 0.7 * coarse + 0.3 * halve(x), **EXACT)
    # At either end nothing jumps: what comes in is the coarser image, doubled.
    assert torch.equal(g.shown(x, Stage(2, 0.0)), double(g.shown(x, Stage(1, 1.0))))


def test_enlarging_repeats_pixels() -> None:
    g = Growth(SIZES[:3], ((0.1, 0.2), (0.5, 0.6)))
    x = torch.randn(2, 1, 4, 4)
    y = g.enlarged(x, Stage(0, 1.0))
    assert y.shape == (2, 1, 16, 16)
    assert torch.equal(y, x.repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert g.enlarged(y, Stage(2, 0.5)) is y


def critic() -> GrowingCritic:
    torch.manual_seed(0)

    def halving(channels: int, out: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Conv2d(channels, out, 3, padding=1), torch.nn.Tanh(), torch.nn.AvgPool2d(2))

    return GrowingCritic(2, [6, 5, 4], 0, (4, 4), halving).double()


def test_a_critic_begins_a_fade_as_the_smaller_one() -> None:
    network, x = critic(), torch.randn(5, 2, 16, 16, dtype=torch.float64)
    for level, images in ((2, x), (1, halve(x))):
        smaller = network(halve(images), Stage(level - 1, 1.0))
        torch.testing.assert_close(network(images, Stage(level, 0.0)), smaller, **EXACT)


def test_a_critic_ends_a_fade_as_the_larger_one_alone() -> None:
    """Without the coarser way in, and near the end continuously so."""
    network, x = critic(), torch.randn(5, 2, 16, 16, dtype=torch.float64)
    alone, nearly = network(x, Stage(2, 1.0)), network(x, Stage(2, 1 - 1e-9))
    h = network.blocks[1](F.leaky_relu(network.from_pixels[2](x), 0.2))
    torch.testing.assert_close(alone, network.head(network.blocks[0](h)), **EXACT)
    torch.testing.assert_close(nearly, alone, rtol=0, atol=1e-7)  # a step of 10⁻⁹ times slopes of order 10
    alone.sum().backward()
    assert network.from_pixels[1].weight.grad is None


def test_a_critic_between_the_ends_mixes_features_in_front_of_the_next_block() -> None:
    network, x = critic(), torch.randn(5, 2, 16, 16, dtype=torch.float64)
    fine = network.blocks[1](F.leaky_relu(network.from_pixels[2](x), 0.2))
    coarse = F.leaky_relu(network.from_pixels[1](halve(x)), 0.2)
    wanted = network.head(network.blocks[0](0.6 * coarse + 0.4 * fine))
    torch.testing.assert_close(network(x, Stage(2, 0.4)), wanted, **EXACT)


def test_to_pixels_mixes_images() -> None:
    torch.manual_seed(0)
    pixels = ToPixels(2, [3, 3, 3], 0).double()
    features = [torch.randn(1, 3, 4 * 2**k, 4 * 2**k, dtype=torch.float64) for k in range(3)]
    coarse, fine = pixels[1](features[1]), pixels[2](features[2])

    def at(stage: Stage) -> torch.Tensor:
        return pixels.grow(torch.zeros(1, 7), stage, lambda k, h: features[k])

    assert torch.equal(at(Stage(2, 1.0)), fine)
    assert torch.equal(at(Stage(2, 0.0)), double(at(Stage(1, 1.0))))
    torch.testing.assert_close(at(Stage(2, 0.3)), 0.7 * double(coarse) + 0.3 * fine, **EXACT)
    assert torch.equal(at(Stage(0, 1.0)), pixels[0](features[0]))


def test_networks_that_start_finer_have_no_way_in_below() -> None:
    network = GrowingCritic(1, [4, 4, 4], 2, (4, 4), lambda c, out: torch.nn.AvgPool2d(2))
    assert len(network.from_pixels) == 1
    assert network(torch.randn(3, 1, 16, 16), Stage(2, 1.0)).shape == (3,)
    assert len(ToPixels(1, [4, 4, 4], 2)) == 1
