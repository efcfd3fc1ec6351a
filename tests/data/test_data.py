"""Data sets in their own layouts, splits that don't leak, and batches that are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from robust_prune.data import (
    Augmentation,
    ImageTensors,
    Split,
    as_split,
    crop_and_flip,
    from_iterable,
    open_data,
    open_for,
    synthetic_images,
)
from robust_prune.errors import DataError, UsageError
from tests.conftest import OwnNet, tiny_resnet


def paint(path: Path, value: int, size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def image_folder(root: Path, testing: str = "test", n: int = 12) -> Path:
    for split, count in (("train", n), (testing, 3)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                paint(root / split / name / f"{i}.png", 100 * label + i)
    return root


@pytest.mark.parametrize("testing", ["test", "val"])
def test_an_image_folder(tmp_path: Path, testing: str) -> None:
    splits = open_data(image_folder(tmp_path, testing))
    assert (splits.classes, splits.input_size) == (2, (3, 16, 20))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (22, 2, 6)
    images, labels = splits.test.take(6, seed=0)
    assert images.shape == (6, 3, 16, 20)
    assert torch.equal((images.mean((1, 2, 3)) * 255 > 50).long(), labels)


@pytest.mark.parametrize("unlabelled", ["test/7.png", "test/images/7.png", "test/cat/7.txt"])
def test_a_test_folder_without_labels_leaves_the_testing_to_val(
    tmp_path: Path, unlabelled: str
) -> None:
    folder = image_folder(tmp_path, "val")
    (folder / unlabelled).parent.mkdir(parents=True)
    if unlabelled.endswith(".png"):
        paint(folder / unlabelled, 9)
    splits = open_data(folder)
    assert len(splits.test) == 6
    assert splits.notes[0] == "test images come from val/"
    assert "test/ has no images" in splits.notes[1]


def test_hidden_files_and_folders_are_neither_classes_nor_images(tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "test" / ".ipynb_checkpoints").mkdir()
    paint(folder / "test" / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png", 0)
    (folder / "test" / "dog" / "._0.png").write_bytes(b"not a picture")
    splits = open_data(folder)
    assert (splits.classes, len(splits.test)) == (2, 6)
    images, labels = splits.test.take(6, seed=0)
    assert torch.equal((images.mean((1, 2, 3)) * 255 > 50).long(), labels)


def test_training_and_validation_images_are_disjoint_and_the_carve_is_the_datas_own(
    tmp_path: Path,
) -> None:
    folder = image_folder(tmp_path, n=30)

    def values(split: object) -> set[int]:
        images, _ = split.take(len(split), seed=0)  # type: ignore[attr-defined, arg-type]
        return {round(float(v) * 255) for v in images[:, 0, 0, 0]}

    one, two = open_data(folder), open_data(folder)
    assert not values(one.train) & values(one.validation)
    assert len(values(one.train) | values(one.validation)) == 60
    assert values(one.validation) == values(two.validation)
    assert open_data(folder, split_seed=1).source["split_seed"] == 1
    assert values(open_data(folder, split_seed=1).validation) != values(one.validation)


def test_tiny_imagenet_in_its_original_layout(tmp_path: Path) -> None:
    wnids = ["n02", "n01"]
    (tmp_path / "wnids.txt").write_text("\n".join(wnids))
    for i, wnid in enumerate(wnids):
        for k in range(12):
            paint(tmp_path / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", 40 + 100 * i, (64, 64))
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("x\t0\t0\t1\t1\n")
    lines = []
    for k, wnid in enumerate(("n01", "n02", "n01", "n99")):
        paint(tmp_path / "val" / "images" / f"val_{k}.JPEG", 140 if wnid == "n01" else 40, (64, 64))
        lines.append(f"val_{k}.JPEG\t{wnid}\t0\t0\t62\t62")
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines))
    splits = open_data(tmp_path)
    assert (splits.classes, splits.input_size, len(splits.test)) == (2, (3, 64, 64), 3)
    images, labels = splits.test.take(3, seed=0)
    assert torch.equal(labels, (images.mean((1, 2, 3)) * 255 < 90).long())  # n01 is class 0
    train_images, train_labels = splits.train.take(10, seed=0)
    assert torch.equal(train_labels, (train_images.mean((1, 2, 3)) * 255 < 90).long())


def test_svhn_in_its_own_mat_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for split, n in (("train", 30), ("test", 6)):
        scipy.io.savemat(
            tmp_path / f"{split}_32x32.mat",
            {
                "X": rng.integers(0, 255, (32, 32, 3, n), dtype=np.uint8),
                "y": (np.arange(n) % 10 + 1).reshape(-1, 1).astype(np.uint8),  # 10 means digit 0
            },
        )
    # the sums are those of the original files
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *a, **k: True)
    splits = open_data("svhn", data_root=tmp_path)
    assert (splits.classes, splits.input_size, len(splits.test)) == (10, (3, 32, 32), 6)
    assert not splits.train.flip
    assert sorted(splits.test.take(6, seed=0)[1].tolist()) == [1, 2, 3, 4, 5, 6]


def test_a_missing_named_data_set_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--download"):
        open_data("cifar10", data_root=tmp_path)


def test_digits_test_images_are_other_writers_and_never_in_training() -> None:
    splits = open_data("digits", input_size=(1, 8, 8))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1167, 130, 500)
    images, _ = splits.train.take(1167, seed=0)
    assert images.shape == (1167, 1, 8, 8)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert open_data("digits").input_size == (1, 32, 32)
    assert open_data("digits", channels=3).input_size == (3, 32, 32)


def test_order_and_augmentation_repeat_for_a_seed() -> None:
    train = open_data("digits", input_size=(1, 16, 16)).train

    def epoch(seed: int) -> torch.Tensor:
        return torch.cat([b[0] for b in train.batches(100, seed=seed, augment=Augmentation())])

    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(2))


def test_reading_from_disk_equals_reading_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder(tmp_path)
    memory = open_data(folder, workers=0).test.take(6, seed=0)
    monkeypatch.setattr("robust_prune.data.opening.IN_MEMORY_BYTES", 0)
    disk = open_data(folder, workers=1)
    assert torch.equal(memory[0], disk.test.take(6, seed=0)[0])
    batch, _ = next(disk.train.batches(8, seed=0, augment=Augmentation()))
    assert batch.shape == (8, 3, 16, 20)


def test_shifts_move_images_by_whole_pixels_and_flips_mirror() -> None:
    images = torch.rand(200, 1, 16, 16)
    moved = crop_and_flip(images, torch.Generator().manual_seed(0), flip=True)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for i in range(200):
        candidates = [
            padded[i, :, top : top + 16, left : left + 16] for top in range(5) for left in range(5)
        ]
        assert any(torch.equal(moved[i], c) or torch.equal(moved[i], c.flip(2)) for c in candidates)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)), r"must lie in \[0, 1\]"),
        ((torch.rand(4, 8, 8), torch.zeros(4, dtype=torch.long)), r"\[N, C, H, W\]"),
        ((torch.rand(4, 3, 8, 8), torch.zeros(4)), "must be 4 integers"),
        ((torch.rand(4, 3, 8, 8), torch.zeros(3, dtype=torch.long)), "must be 4 integers"),
        (torch.rand(4, 3, 8, 8)[0, 0, 0, 0], "must be"),
        ({"images": 1}, "must be"),
        ((torch.rand(0, 3, 8, 8), torch.zeros(0, dtype=torch.long)), "holds no images"),
    ],
)
def test_bad_batches_are_explained(batch: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_split([batch])


def test_every_kind_of_user_data() -> None:
    images, labels = torch.rand(40, 3, 8, 8), torch.arange(40) % 4
    loader = DataLoader(TensorDataset(images, labels), batch_size=7, shuffle=True)
    batches = [(images[:20], labels[:20]), (images[20:], labels[20:])]
    bytes_ = (images * 255).byte()
    for data in (loader, (images, labels), batches, iter(batches), TensorDataset(images, labels)):
        splits = from_iterable(data)
        assert (len(splits.train), len(splits.validation)) == (36, 4)
        got = torch.cat([b[0] for b in splits.train.batches(10)])
        assert got.shape == (36, 3, 8, 8)
    assert float(as_split((bytes_, labels)).take(40, 0)[0].max()) <= 1

    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(images, labels, strict=True)

    assert len(as_split(DataLoader(Stream(), batch_size=10))) == 40
    with pytest.raises(DataError, match="only once"):
        as_split(iter([]))
    with pytest.raises(DataError, match="holds no images"):
        from_iterable(TensorDataset(images[:0], labels[:0]))
    with pytest.raises(DataError, match="holds no images"):
        as_split(TensorDataset(images[:0], labels[:0])).take(4, seed=0)


def test_arrays_of_numpy_are_taken_too() -> None:
    images = np.random.default_rng(0).random((4, 8, 8, 3)).transpose(0, 3, 1, 2)
    split = as_split([(images, np.arange(4))])
    found, labels = split.take(4, 0)
    assert found.dtype == torch.float32
    assert sorted(labels.tolist()) == [0, 1, 2, 3]


def test_a_folder_is_opened_at_the_size_that_is_given(tmp_path: Path) -> None:
    model, folder = OwnNet(), image_folder(tmp_path)
    assert open_for(model, folder).input_size == (3, 16, 20)
    assert open_for(model, folder, input_size=(3, 24, 24)).input_size == (3, 24, 24)
    known = tiny_resnet()
    assert open_for(known, folder, input_size=(3, 24, 24)).input_size == known.spec.input_size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_images_of_any_float_type_come_in_float32(dtype: torch.dtype) -> None:
    images, labels = torch.rand(24, 3, 8, 8).to(dtype), torch.arange(24) % 4
    for data in ((images, labels), [(images, labels)], TensorDataset(images, labels)):
        found, _ = as_split(data).take(24, seed=0)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.sort(0)[0], images.float().sort(0)[0])


def test_of_few_images_none_are_kept_back(tmp_path: Path) -> None:
    few, enough = (open_data(image_folder(tmp_path / str(n), n=n)) for n in (1, 10))
    assert (len(few.train), few.validation) == (2, None)
    assert few.train.take(2, seed=0)[0].shape == (2, 3, 16, 20)
    assert (len(enough.train), len(enough.validation)) == (18, 2)


def test_own_test_images_count_whatever_the_data_is(tmp_path: Path) -> None:
    own = torch.rand(5, 3, 16, 20), torch.zeros(5, dtype=torch.long)
    folder = image_folder(tmp_path)
    for data in (folder, open_data(folder), (torch.rand(24, 3, 16, 20), torch.arange(24) % 2)):
        splits = open_for(OwnNet(), data, test=own)
        assert torch.equal(splits.test.take(5, seed=0)[0].sort(0)[0], own[0].sort(0)[0])
    assert open_for(OwnNet(), None) is None
    with pytest.raises(UsageError, match="give data too"):
        open_for(OwnNet(), None, test=own)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    (folder / "test" / "cat" / "0.png").write_bytes(b"not a picture")
    test = open_data(folder).test
    with pytest.raises(DataError, match=r"0\.png: can't be decoded") as alone:
        test.take(6, seed=0)
    worker = Split(test.dataset, workers=1)
    with pytest.raises(DataError) as told:
        worker.take(6, seed=0)
    assert str(told.value) == str(alone.value)


GREYS = np.linspace(0, 1, 320).reshape(16, 20)


@pytest.mark.parametrize(
    ("pixels", "suffix"),
    [
        (np.round(GREYS * 65535).astype(np.uint16), ".png"),
        (np.round(GREYS * 65535).astype(np.int32), ".tiff"),
        (GREYS.astype(np.float32), ".tiff"),
    ],
)
def test_wide_grey_values_are_scaled_and_not_clipped(
    tmp_path: Path, pixels: Any, suffix: str
) -> None:
    for split, n in (("train", 12), ("test", 1)):
        for i in range(2 * n):
            path = tmp_path / split / "ab"[i % 2] / f"{i}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    splits = open_data(tmp_path)
    assert splits.input_size == (1, 16, 20)
    images, _ = splits.test.take(2, seed=0)
    expected = torch.from_numpy(GREYS).float().expand(2, 1, 16, 20)
    torch.testing.assert_close(images, expected, rtol=0, atol=0.51 / 255)


@pytest.mark.parametrize("mode", ["1", "LA"])
def test_grey_images_of_other_modes_have_one_channel(tmp_path: Path, mode: str) -> None:
    for path in image_folder(tmp_path).rglob("*.png"):
        with Image.open(path) as image:
            image.convert(mode).save(path)
    assert open_data(tmp_path).input_size == (1, 16, 20)


@pytest.mark.parametrize("value", [70000, -1, float("nan"), 3.0])
def test_grey_values_of_unknown_range_are_refused(tmp_path: Path, value: float) -> None:
    folder = image_folder(tmp_path)
    kind = np.int32 if isinstance(value, int) else np.float32
    Image.fromarray(np.full((16, 20), value, kind)).save(folder / "test" / "cat" / "9.tiff")
    with pytest.raises(DataError, match=r"9\.tiff: grey values of mode"):
        open_data(folder).test.take(7, seed=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: (p / "cat").mkdir(), "needs train/<class>/"),
        (lambda p: ((p / "train").mkdir(), (p / "test").mkdir()), "no class folders"),
        (
            lambda p: (
                (p / "train" / "a").mkdir(parents=True),
                (p / "test" / "b").mkdir(parents=True),
            ),
            "'b' is not in train",
        ),
        (
            lambda p: (
                (p / "train" / "a").mkdir(parents=True),
                (p / "test" / "a").mkdir(parents=True),
            ),
            "no images",
        ),
        (
            lambda p: (image_folder(p), (p / "train" / "bird").mkdir()),
            "train/bird: no images in this class folder",
        ),
    ],
)
def test_folders_that_are_no_image_folder(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        open_data(tmp_path)


def test_synthetic_images_are_images() -> None:
    images = synthetic_images(5, (3, 20, 24), seed=1)
    assert images.shape == (5, 3, 20, 24)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    assert torch.equal(images, synthetic_images(5, (3, 20, 24), seed=1))


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_do_not_depend_on_where_one_begins_or_who_reads_them(
    in_memory: bool, tmp_path: Path
) -> None:
    """Skipping, sharing out and worker processes leave every image as it would have been."""
    pixels = torch.randint(0, 256, (22, 12, 12, 3), generator=torch.Generator().manual_seed(0))
    items = [(Image.fromarray(p.byte().numpy()), i % 3) for i, p in enumerate(pixels)]

    def split(workers: int) -> Split:
        views = [ImageTensors(items, (3, 8, 8), training, True) for training in (False, True)]
        return Split(views[0], in_memory=in_memory, workers=workers, training_view=views[1])

    what = Augmentation(cutout=3, randaugment=True)

    def read(workers: int = 0, **more: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        torch.manual_seed(len(more))  # what was drawn before does not matter
        return list(split(workers).batches(8, seed=3, augment=what, **more))

    whole = read()
    assert [len(labels) for _, labels in whole] == [8, 8, 6]
    for found, expected in zip(read(start=1), whole[1:], strict=True):
        assert torch.equal(found[0], expected[0])
    for found, expected in zip(read(workers=2), whole, strict=True):
        assert torch.equal(found[0], expected[0])
    shares = [read(share=(rank, 2)) for rank in (0, 1)]
    for mine, theirs, (_, labels) in zip(*shares, whole, strict=True):
        assert torch.equal(mine[1], labels[0::2])
        assert torch.equal(theirs[1], labels[1::2])


class Counting(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Says which of its images were decoded; the first `plain` are made of bytes."""

    def __init__(self, n: int, plain: int) -> None:
        bytes_ = torch.randint(256, (n, 3, 4, 4)).float() / 255
        self.images = torch.cat([bytes_[:plain], torch.rand(n - plain, 3, 4, 4)])
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.decoded.append(index)
        return self.images[index], index


def test_of_images_in_memory_only_those_asked_for_are_decoded_and_each_once() -> None:
    data = Counting(2000, plain=2000)
    split = Split(data, in_memory=True)
    _, first = split.take(5, seed=0)
    assert sorted(data.decoded) == sorted(first.tolist())
    images, places = split.take(2000, seed=1)
    assert sorted(data.decoded) == list(range(2000))
    assert torch.equal(images, data.images[places])


def test_a_damaged_image_is_found_when_all_are_decoded() -> None:
    class Damaged(Counting):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            if index == 7:
                raise DataError("b/7.png: can't be read")
            return super().__getitem__(index)

    data = Damaged(2000, plain=2000)
    split = Split(data, in_memory=True)
    split.take(4, seed=0)
    with pytest.raises(DataError, match=r"7\.png"):
        split.decode()
    Split(data, in_memory=False).decode()  # read by workers as it is wanted


def test_a_split_without_images_gives_no_batch() -> None:
    split = Split(Counting(0, plain=0), in_memory=True)
    with pytest.raises(DataError, match="holds no images"):
        list(split.batches(4))


def test_bytes_give_way_to_floats_where_a_later_image_needs_them() -> None:
    data = Counting(600, plain=550)
    split = Split(data, in_memory=True)
    for batch in (torch.arange(550), torch.arange(600)):
        assert split._held is not None
        images, labels = split._held.at(batch)
        assert torch.equal(images, data.images[batch])
        assert torch.equal(labels, batch)


def test_images_of_several_sizes_end_in_one_line() -> None:
    sizes = [(torch.rand(3, 4, 4), 0), (torch.rand(3, 5, 4), 1)]
    split = Split(sizes, in_memory=True)  # type: ignore[arg-type]
    next(split.batches(1))
    with pytest.raises(DataError, match=r"several sizes, as \[3, 4, 4\] and \[3, 5, 4\]"):
        list(split.batches(1))


def test_images_in_memory_take_a_byte_a_pixel_where_that_loses_nothing() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8).repeat(12).view(4, 3, 16, 16)
    labels = torch.arange(4)
    for images, kept in (
        (bytes_.float() / 255, torch.uint8),
        (torch.rand(4, 3, 16, 16), torch.float32),
        (torch.cat([bytes_[:2].float() / 255, torch.rand(2, 3, 16, 16)]), torch.float32),
    ):
        split = Split(torch.utils.data.TensorDataset(images, labels), in_memory=True)
        found, names = split.take(4, seed=0)
        assert torch.equal(found[names.argsort()], images)
        assert split._held is not None
        assert split._held.images is not None
        assert split._held.images.dtype == kept
