"""Altered images: the same for whoever asks, nothing but the rows asked for, labels mixed as the pixels are."""

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch.nn import functional

from kdtool.config import load_config
from kdtool.data.examples import Examples
from kdtool.errors import UsageProblem
from kdtool.pipelines.distill import distill
from kdtool.pipelines.setup import make_run
from kdtool.registry import METHODS
from kdtool.run import Silent
from kdtool.sections import AugmentSection
from kdtool.tasks._views import PIXELS, ImageViews, beta_shares, boxes, shifted, uniforms
from kdtool.tasks.image_classification import Task

ALL = {"crop": 0.125, "flip": True, "randaugment": 2, "mixup": 0.4, "cutmix": 1.0, "views": 3}


class Plain:
    """A processor that leaves pixels as they are."""

    do_normalize = False


class Usual:
    do_normalize = True
    image_mean = [0.5, 0.4, 0.3]
    image_std = [0.2, 0.3, 0.25]


def rows_of(count=20, side=16, channels=3):
    generator = np.random.default_rng(0)
    pixels = generator.random((count, channels, side, side), dtype=np.float32)
    return Examples({PIXELS: pixels, "labels": np.arange(count) % 5})


def views_of(data=None, processors=None, **settings):
    data = data if data is not None else rows_of()
    return ImageViews(Task(), data, AugmentSection(**settings), processors or {"": Plain()}, 5)


# Random numbers


def test_random_numbers_depend_on_all_arguments_and_nothing_else():
    numbers = np.arange(1000)
    drawn = uniforms(0, 1, numbers, 3)
    np.testing.assert_array_equal(uniforms(0, 1, numbers[::-1], 2), drawn[::-1, :2])
    for other in (uniforms(1, 1, numbers, 3), uniforms(0, 2, numbers, 3), uniforms(0, 1, numbers + 1000, 3)):
        assert not np.isclose(other, drawn).all(1).any()


def test_random_numbers_are_even_and_independent():
    drawn = uniforms(3, 1, np.arange(20000), 4)
    counts = np.stack([np.histogram(drawn[:, i], 20, (0, 1))[0] for i in range(4)])
    assert ((counts - 1000) ** 2 / 1000).sum(1).max() < 45  # chi-squared of 19 degrees, p = 0.0007
    together = np.corrcoef(np.concatenate([drawn[1:], drawn[:-1]], 1).T) - np.eye(8)
    assert abs(together).max() < 0.03


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_shares_have_the_moments_of_their_distribution(alpha):
    shares = beta_shares(uniforms(0, 1, np.arange(20000), 48), alpha)
    assert shares.min() >= 0
    assert shares.max() <= 1
    assert abs(shares.mean() - 0.5) < 0.01
    assert abs(shares.var() - 1 / (4 * (2 * alpha + 1))) < 0.005


# One row


def test_shift_and_mirror_are_those_drawn():
    images = torch.arange(2 * 8 * 8, dtype=torch.float32).view(1, 2, 8, 8) + 1
    fill = torch.tensor([-1.0, -2.0]).view(2, 1, 1)
    corner = shifted(images, np.array([[0.0, 0.999, 0.9]]), 0.125, True, fill)  # up by one, right by one, no mirror
    assert torch.equal(corner[0, :, 1:, :-1], images[0, :, :-1, 1:])
    assert torch.equal(corner[0, :, 0, 0], torch.tensor([-1.0, -2.0]))
    mirrored = shifted(images, np.array([[0.5, 0.5, 0.1]]), 0.125, True, fill)
    assert torch.equal(mirrored, images.flip(3))
    assert torch.equal(shifted(images, np.array([[0.5, 0.5, 0.1]]), 0.125, False, fill), images)


def test_all_shifts_are_drawn_and_beyond_the_edge_is_black():
    look = {"": Usual()}
    data = Examples({PIXELS: np.ones((400, 3, 16, 16), dtype=np.float32), "labels": np.zeros(400, dtype=np.int64)})
    batch = views_of(data, look, crop=0.125).batch(np.arange(400), "cpu")[PIXELS]
    black = -torch.tensor(Usual.image_mean) / torch.tensor(Usual.image_std)
    inside = batch[:, 0] == 1
    assert torch.allclose(batch[~inside.unsqueeze(1).expand(-1, 3, -1, -1)].unique(), black.sort().values)
    counts = inside.any(2).sum(1), inside.any(1).sum(1)
    assert {int(n) for n in counts[0]} == {int(n) for n in counts[1]} == {14, 15, 16}


def test_a_view_does_not_depend_on_the_batch_it_is_in():
    views = views_of(processors={"": Usual()}, **ALL)
    numbers = np.arange(60)
    whole = views.batch(numbers, "cpu")
    for part in (numbers[7:12], numbers[40:41], numbers[::-1]):
        for key, value in views.batch(part, "cpu").items():
            assert torch.equal(value, whole[key][torch.from_numpy(part.copy())]), key


def test_epochs_take_views_in_turn_or_new_ones():
    rows = [3, 5]
    assert [views_of(crop=0.1, views=2).numbers(rows, epoch).tolist() for epoch in range(3)] == [
        [3, 5],
        [23, 25],
        [3, 5],
    ]
    assert views_of(crop=0.1).numbers(rows, 7).tolist() == [143, 145]
    images = [views_of(crop=0.25).batch(np.array([3 + 20 * view]), "cpu")[PIXELS] for view in range(4)]
    assert not any(torch.equal(images[0], other) for other in images[1:])


def test_the_seed_changes_the_views():
    one, other = (views_of(crop=0.25, flip=True, seed=seed).batch(np.arange(9), "cpu")[PIXELS] for seed in (0, 1))
    assert not torch.equal(one, other)


# Teachers


def test_a_teacher_with_its_own_processor_sees_the_same_alterations():
    data = rows_of()
    data.columns["teacher0." + PIXELS] = data.columns[PIXELS].repeat(2, 2).repeat(2, 3)
    views = views_of(data, {"": Plain(), "teacher0.": Plain()}, flip=True, randaugment=2, mixup=0.4)
    batch = views.batch(np.arange(20), "cpu")
    small = functional.avg_pool2d(batch["teacher0." + PIXELS], 2)
    apart = (small - batch[PIXELS]).abs().mean((1, 2, 3))
    assert float(apart.median()) < 0.1
    plain = views_of(data, {"": Plain(), "teacher0.": Plain()}, flip=True).batch(np.arange(20), "cpu")
    assert torch.equal(plain["teacher0." + PIXELS][:, :, ::2, ::2], plain[PIXELS])


# RandAugment


@pytest.mark.parametrize("channels", [1, 3])
def test_operations_keep_the_range_and_change_images(channels):
    data = rows_of(channels=channels)
    views = views_of(data, randaugment=2, magnitude=15)
    made = views.batch(np.arange(20), "cpu")[PIXELS]
    before = torch.from_numpy(data.columns[PIXELS])
    assert made.min() >= 0
    assert made.max() <= 1
    assert made.dtype == torch.float32
    assert int(((made - before).abs().amax((1, 2, 3)) > 1e-3).sum()) >= 12
    assert torch.equal(before, torch.from_numpy(rows_of(channels=channels).columns[PIXELS])), (
        "rows were changed in place"
    )


def test_without_kornia_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "kdtool.tasks._randaugment", raising=False)
    monkeypatch.delattr("kdtool.tasks._randaugment", raising=False)
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(UsageProblem, match="needs kornia") as caught:
        views_of(randaugment=1)
    assert "kdtool[augment]" in caught.value.hint


# Mixtures


def constant():
    """Row i is an image of the value i / 20."""
    pixels = np.repeat(np.arange(20, dtype=np.float32) / 20, 3 * 256).reshape(20, 3, 16, 16)
    return Examples({PIXELS: pixels, "labels": np.arange(20)})


@pytest.mark.parametrize("settings", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}])
def test_labels_are_mixed_as_the_pixels_are(settings):
    views = ImageViews(Task(), constant(), AugmentSection(**settings), {"": Plain()}, 20)
    batch = views.batch(np.arange(20), "cpu")
    labels = batch["labels"]
    assert labels.dtype == torch.float32
    assert torch.allclose(labels.sum(1), torch.ones(20))
    assert int((labels > 0).sum(1).max()) == 2
    seen = batch[PIXELS].mean((1, 2, 3))
    torch.testing.assert_close(seen, labels @ (torch.arange(20) / 20), rtol=1e-4, atol=1e-5)
    boxed = batch[PIXELS].flatten(1).std(1) > 1e-4
    assert bool(boxed.any()) == ("cutmix" in settings)


def test_boxes_have_the_area_asked_for_where_they_fit():
    mask, kept = boxes(np.full((3, 2), 0.5), np.array([1.0, 0.75, 0.0]), 16, 16)
    np.testing.assert_allclose(kept, [1.0, 0.75, 0.0])
    assert mask[1].sum() == 64
    _, cut = boxes(np.zeros((1, 2)), np.array([0.75]), 16, 16)
    assert cut[0] == 1 - 16 / 256  # three quarters of the box lie outside


# Whole runs

QUICK = ["eval.latency=false", "eval.reload=false", "output.plots=false", "train.lr=0.01", "train.batch_size=6"]


class Listens(Silent):
    def __init__(self):
        self.said = []

    def info(self, message):
        self.said.append(message)


@pytest.fixture
def train(models, data, tmp_path):
    """`train(NAME, ...)`: distil 18 images for 12 steps, four epochs; gives the student's tensors and what was said."""

    def call(name, *settings, method="kd", student="layers:1", teacher="vit", reporter=None, **options):
        options = {"teacher.model": str(models(teacher)), "student.model": student, "data.source": str(data("images"))}
        options |= {"method.name": method, "output.folder": str(tmp_path / name), "train.max_steps": 12}
        config = load_config("distill", None, [*QUICK, *settings], options)
        listens = reporter or Listens()
        distill(config, make_run(config, listens))
        return (tmp_path / name / "model.safetensors").read_bytes(), listens.said

    return call


VIEWS = ["augment.crop=0.25", "augment.flip=true", "augment.mixup=0.4", "augment.views=2"]


def test_a_cache_of_views_gives_what_asking_each_time_gives(train, tmp_path):
    # Adam would make full steps of the rounding that is left of gradients that are zero
    sgd = "train.optimizer=sgd"
    folder = f"train.teacher_cache_dir={tmp_path / 'cache'}"
    cold, said = train("cold", *VIEWS, folder, sgd)
    assert "teacher cache: 0% of 36 rows are there" in said
    warm, said = train("warm", *VIEWS, folder, sgd)
    assert "teacher cache: 100% of 36 rows are there" in said
    assert cold == warm
    without, _ = train("without", *VIEWS, sgd, "train.teacher_cache=false")
    plain, _ = train("plain", sgd, "train.teacher_cache=false")
    kept, asked, other = load(cold), load(without), load(plain)
    for name in kept:
        torch.testing.assert_close(kept[name], asked[name], rtol=1e-4, atol=1e-5)
    assert any(float((kept[name] - other[name]).abs().max()) > 1e-3 for name in kept), "nothing was altered"


def test_a_cache_of_other_views_is_refused(train, tmp_path):
    folder = f"train.teacher_cache_dir={tmp_path / 'cache'}"
    train("one", *VIEWS, folder)
    with pytest.raises(Exception, match="made for another run") as caught:
        train("two", *VIEWS, "augment.seed=1", folder)
    assert caught.value.why == "different views"


def test_views_without_end_have_no_cache(train):
    _, said = train("endless", "augment.crop=0.25")
    assert not any("teacher cache" in message for message in said)
    with pytest.raises(UsageProblem, match="no teacher cache can hold"):
        train("asked", "augment.crop=0.25", "train.teacher_cache=true")


def test_a_resumed_run_goes_on_with_the_same_images(train):
    class Breaks(Listens):
        def progress(self, stage, done, total, facts):
            if done == 8:
                raise RuntimeError("cut off")

    settings = ["augment.crop=0.25", "augment.cutmix=1.0", "train.log_every=1", "train.checkpoint_every=5"]
    whole, _ = train("whole", *settings)
    with pytest.raises(RuntimeError, match="cut off"):
        train("broken", *settings, reporter=Breaks())
    resumed, said = train("broken", *settings)
    assert "resuming after step 5 of 12" in said
    assert resumed == whole


def test_what_cannot_be_altered_or_mixed_is_refused_in_one_line(train, models, data, tmp_path):
    with pytest.raises(UsageProblem, match="crd cannot take the mixed labels") as caught:
        train("crd", "augment.mixup=0.4", method="crd")
    assert " kd," in caught.value.hint
    options = {"teacher.model": str(models("bert")), "student.model": "layers:1", "data.source": str(data("text"))}
    config = load_config(
        "distill", None, ["augment.flip=true", "method.name=kd"], options | {"output.folder": str(tmp_path / "text")}
    )
    with pytest.raises(UsageProblem, match="text-classification has none"):
        distill(config)


def test_most_methods_take_mixed_labels():
    assert {"none", "kd", "dkd", "fitnet", "combine"} <= {
        n for n in METHODS.names() if METHODS.info(n).facts.get("mixes")
    }
