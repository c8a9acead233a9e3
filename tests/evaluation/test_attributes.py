from __future__ import annotations

import pytest
import torch

from pyrewrite.errors import CheckpointMismatchError, NonFiniteError
from pyrewrite.evaluation import AttributeClassifier, peeps_attributes
from pyrewrite.evaluation.peeps import BEARDS, FACES, GLASSES, HATS, HEADS
from pyrewrite.generators import load_generator


def agreement(name: str, count: int) -> dict[str, float]:
    generator = load_generator(name)
    truth = peeps_attributes(generator.latents(range(count)), generator.family)
    found = AttributeClassifier().predict(generator.images(range(count)))
    return {name: (found[name] == truth[name]).float().mean().item() for name in found}


def test_classifier_agrees_with_what_latents_stand_for():
    # Measured over 512 images: hat and glasses 100 %, beard and mood 99.8 %.
    assert min(agreement("peeps", 48).values()) >= 0.95


def test_classifier_agrees_on_the_progressive_generator():
    # Measured over 300 images: hat 99.3 %, glasses 98.0 %, beard 97.7 %, mood 93.0 %.
    found = agreement("peeps-progan", 64)
    assert found.pop("mood") >= 0.85
    assert min(found.values()) >= 0.93


@pytest.mark.parametrize(
    ("family", "z_dim", "rates"),
    [
        ("stylegan2", 128, {"hat": 0.2, "glasses": 0.25, "beard": 0.15, "bald": 0.8 * 4 / 16}),
        ("progan", 32, {"hat": 0.3, "glasses": 0.3, "beard": 0.3, "bald": 0.7 / 4}),
    ],
)
def test_rates_of_attributes(family, z_dim, rates):
    z = torch.randn(20_000, z_dim, generator=torch.Generator().manual_seed(0))
    found = peeps_attributes(z, family)
    for name, rate in rates.items():
        assert found[name].dtype == torch.bool
        assert found[name].float().mean().item() == pytest.approx(rate, abs=0.02)
    assert not (found["bald"] & found["hat"]).any()
    for kind, worn, names in (
        ("hat_kind", "hat", HATS),
        ("glasses_kind", "glasses", GLASSES),
        ("beard_kind", "beard", BEARDS),
    ):
        assert torch.equal(found[kind] >= 0, found[worn])
        assert found[kind].max() < len(names)
    assert torch.equal(found["head"] < 0, found["hat"])
    bald_heads = {HEADS[i] for i in found["head"][found["bald"]].unique()}
    assert bald_heads <= {"noHair1", "noHair2", "noHair3"}
    assert not any("noHair" in HEADS[i] for i in found["head"][~found["bald"] & ~found["hat"]].unique())
    assert set(found["mood"].tolist()) <= set(FACES)
    assert found["face"].min() >= 0
    assert found["face"].max() < 4
    for name, cells in (("skin", 5), ("cloth", 6)):
        assert found[name].unique().tolist() == list(range(cells))
    assert 0 <= found["hue"].min() <= found["hue"].max() <= 1
    assert {len(value) for value in found.values()} == {20_000}


def test_a_latent_is_read_alone_and_at_any_length():
    z = torch.randn(7, 128, generator=torch.Generator().manual_seed(0))
    whole = peeps_attributes(z, "peeps")
    for part in (peeps_attributes(z[3:4]), peeps_attributes(z[3:4].double() * 5), peeps_attributes(z[::3])):
        row = 0 if len(part["hat"]) == 1 else 1
        assert all(torch.isclose(part[name][row].float(), whole[name][3].float(), atol=1e-5) for name in whole)
    assert len(peeps_attributes(z[:0])["hat"]) == 0
    assert torch.equal(
        peeps_attributes(z[:, :32, None, None], "progan")["hat"], peeps_attributes(z[:, :32], "peeps-progan")["hat"]
    )


@pytest.mark.parametrize(("shape", "family"), [((3, 32), "peeps"), ((3, 128), "progan"), ((128,), "peeps")])
def test_latents_of_another_length(shape, family):
    with pytest.raises(ValueError, match=family):
        peeps_attributes(torch.zeros(shape), family)


def test_unknown_family():
    with pytest.raises(ValueError, match="'horse'"):
        peeps_attributes(torch.zeros(1, 128), "horse")


def test_pictures_of_other_sizes_types_and_ranges():
    classifier = AttributeClassifier()
    x = torch.randn(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    expected = classifier(x)
    for same in (x.double(), x.contiguous(memory_format=torch.channels_last), x.clamp(-1, 1)):
        assert torch.allclose(classifier(same), expected, atol=1e-4)
    # Area averaging: a picture whose pixels are doubled is the same picture.
    twice = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(classifier(twice), expected, atol=1e-4)
    assert classifier.predict(x[..., :65, :100])["hat"].dtype == torch.int64
    assert set(classifier.predict(x)["mood"].tolist()) <= {-1, 0, 1}
    assert {len(v) for v in classifier.predict(x[:0]).values()} == {0}
    assert {len(v) for v in classifier.predict(x.expand(90, 3, 3, 128, 128).flatten(0, 1)[..., ::2, ::2]).values()} == {
        270
    }


def test_refused(tmp_path):
    classifier = AttributeClassifier()
    for shape in ((3, 64, 64), (1, 1, 64, 64), (1, 3, 32, 64)):
        with pytest.raises(ValueError, match="expected"):
            classifier.predict(torch.zeros(shape))
    with pytest.raises(ValueError, match="uint8"):
        classifier.predict(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(NonFiniteError):
        classifier.predict(torch.full((1, 3, 64, 64), float("nan")))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointMismatchError, match=r"other\.pt"):
        AttributeClassifier(tmp_path / "other.pt")
