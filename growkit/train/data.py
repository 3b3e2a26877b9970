"""Labelled images in batches that depend only on (seed, epoch, image), never on workers or luck."""

import copy
import hashlib
import os
import random
import signal
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, default_collate

from growkit.errors import GrowkitError, first_line
from growkit.pictures import UnreadablePictureError, unreadable
from growkit.train.distributed import part, rank, size
from growkit.train.erasing import Erased, ErasedBatch, Erasing, together
from growkit.train.folders import FolderReader, Pictures, open_folders
from growkit.train.normalise import Normalisation
from growkit.train.resident import Decoded, Resident, crop_and_flip, refuse_other_augmentation
from growkit.train.settings import AUTO, FitSettings

TIMM_DATASETS = ("torch", "hfds", "tfds", "wds", "hfids")
STAND_INS = 10  # images after an unreadable one that are tried in its place; timm's number
MOST_UNREADABLE = 0.1  # of the training images; more is no accident, and training would be on another data set
BATCHES_AHEAD = 1  # on a GPU, besides the one that is worked on
FEW = 2  # unreadable images are no share yet


def _as_they_are(images: Tensor) -> Tensor:
    return images


@dataclass(frozen=True)
class Data:
    """Images to train on and to evaluate on.

    train, val   map-style datasets of (image tensor (C, H, W), label), or both resident
    classes      class names in label order; empty where the dataset does not name them
    identity     what a resumed run must find again, besides the sizes and the classes
    unreadable   training images met so far that could not be read, a line with the reason for each, as keys in order
    normalised   makes what the network takes of images (N, C, H, W) of `train` and `val`, on the device
    """

    train: Dataset[Any]
    val: Dataset[Any]
    classes: list[str]
    identity: Mapping[str, Any] = field(default_factory=dict)
    unreadable: dict[str, None] = field(default_factory=dict)
    normalised: Callable[[Tensor], Tensor] = _as_they_are

    @property
    def remarks(self) -> list[str]:
        """What is to be said after training: at most one line, about unreadable images."""
        if not self.unreadable:
            return []
        count, first = len(self.unreadable), next(iter(self.unreadable))
        return [
            f"warning: training images that could not be read: {count}, the next took their place; the first: {first}"
        ]


def open_data(data: str, data_config: Mapping[str, Any], settings: FitSettings) -> Data:
    """Open an ImageFolder directory (train/, val/) or a timm dataset such as 'torch/cifar10'.

    Lists the files, reads no image. Training images are augmented as `settings` says, those for
    evaluation are resized and cropped as `data_config` says. With settings.cache the first batch
    decodes all images of its split, once for all runs that use what this returns.

    Args:
        data: directory, or timm dataset string whose files lie in settings.data_dir.
        data_config: what timm.data.resolve_model_data_config gives; see `channel_config`.
        settings: augmentation and where datasets lie.

    Raises:
        GrowkitError: nothing usable is there, or cached images are to be augmented by more than crops and flips;
            the message names the path or the option, and the remedy.
    """
    if settings.cache != "none":
        refuse_other_augmentation(settings)
    config = channel_config(data_config)
    if (channels := config["input_size"][0]) not in (1, 3):
        raise GrowkitError(f"--data {data}: the model reads {channels} channels, and images have 1 or 3")
    mode = "L" if channels == 1 else "RGB"
    prefix, slash, _ = data.partition("/")
    if slash and prefix.lower() in TIMM_DATASETS and not Path(data).is_dir():
        train = _timm_dataset(data, "train", settings, mode)
        val = _timm_dataset(data, settings.val_split, settings, mode)
        classes = _class_names(train)
        files: dict[str, str] = {"dataset": data}
    else:
        train, val, classes = open_folders(Path(data), settings.val_split, mode)
        files = {"files": _digest(train.reader.samples, train.reader.root)}
    preprocessing = {name: config[name] for name in ("input_size", "mean", "std", "interpolation")}
    normalised = Normalisation(config["mean"], config["std"])
    try:
        augment = create_transform(
            **preprocessing,
            is_training=True,
            normalize=False,
            scale=(settings.scale_min, 1.0),
            hflip=settings.hflip,
            color_jitter=settings.color_jitter or None,
            auto_augment=settings.aa,
        )
    except (AssertionError, ValueError, KeyError) as error:  # timm's ways to refuse a policy
        raise GrowkitError(
            f"--aa {settings.aa}: no policy that timm knows ({error}); give rand-m9-mstd0.5, augmix-m3, original or v0"
        ) from None
    cropping = {name: config.get(name) for name in ("crop_pct", "crop_mode")}
    identity = {**files, **{name: str(value) for name, value in (preprocessing | cropping).items()}}
    val.transform = _Converted(mode, create_transform(**preprocessing, **cropping, normalize=False))
    if settings.cache == "none":
        if settings.reprob:
            augment.transforms.append(Erasing(settings.reprob))
        train.transform = _Converted(mode, augment)
        return Data(train=train, val=val, classes=classes, identity=identity, normalised=normalised)
    train.transform = val.transform
    kept, judged = (
        Resident(
            Decoded(split, partial(_in_order, split, stand_ins, settings), config["input_size"], settings.cache),
            normalised,
        )
        for split, stand_ins in ((train, STAND_INS), (val, 0))
    )
    return Data(train=kept, val=judged, classes=classes, identity=identity)


def hold_out(data: Data, *, share: float, keep: float = 1.0, seed: int) -> tuple[Data, Data]:
    """Data to choose by, and data to test what was chosen: `share` of each class's validation images, and the others.

    Both train on the same share `keep` of each class's training images. None of those is chosen by: a source has seen
    them before, and what is grown from it would look better there than it is. Which images, depends on `seed` alone.

    Raises:
        GrowkitError: a share out of range, or a class with too few validation images; the message names it.
    """
    if not 0 < share < 1:
        raise GrowkitError(f"cannot hold out a share of {share} of the validation images; give one between 0 and 1")
    if not 0 < keep <= 1:
        raise GrowkitError(f"cannot keep a share of {keep} of the training images; give one above 0 and at most 1")
    chosen: list[int] = []
    tested: list[int] = []
    for label, own in _by_class(data.val, seed, "hold out"):
        out = max(1, round(share * len(own)))
        if out >= len(own):
            name = data.classes[label] if data.classes else label
            raise GrowkitError(
                f"class {name}: too few validation images ({len(own)}) to choose by a share of {share} and test on"
                " the rest; add images or choose by fewer"
            )
        chosen += own[:out]
        tested += own[out:]
    kept = [place for _, own in _by_class(data.train, seed, "keep") for place in own[: max(1, round(keep * len(own)))]]
    train = data.train if keep == 1 else _part(data.train, sorted(kept))
    identity = {**data.identity, "hold_out": f"share {share}, keep {keep}, seed {seed}"}
    by, on = (
        replace(data, train=train, val=_part(data.val, sorted(part)), identity=identity) for part in (chosen, tested)
    )
    return by, on


def _by_class(dataset: Any, seed: int, purpose: str) -> Iterator[tuple[int, list[int]]]:
    """Each label with the places of its images, in an order that depends on seed, purpose and label."""
    labels = torch.as_tensor(labels_of(dataset))
    for label in labels.unique().tolist():
        own = torch.nonzero(labels == label)[:, 0]
        with seeded(seed, purpose, label):
            own = own[torch.randperm(len(own))]
        yield label, own.tolist()


def _part(dataset: Any, index: list[int]) -> Dataset[Any]:
    return dataset.part(index) if isinstance(dataset, Resident) else Subset(dataset, index)


def labels_of(dataset: Any) -> list[int]:
    """The label of every image, without reading images where the dataset knows them."""
    if isinstance(dataset, Resident):
        inner = labels_of(dataset.decoded.dataset)
        return [inner[place] for place in dataset.index.tolist()]
    if isinstance(dataset, Subset):
        inner = labels_of(dataset.dataset)
        return [inner[place] for place in dataset.indices]
    reader = getattr(dataset, "reader", None)
    if isinstance(reader, FolderReader):
        return [int(label) for _, label in reader.samples]
    known = np.asarray(getattr(dataset, "targets", []))
    if known.shape == (len(dataset),):  # QMNIST's have eight columns
        return [int(label) for label in known]
    return [int(dataset[place][1]) for place in range(len(dataset))]


def channel_config(data_config: Mapping[str, Any]) -> dict[str, Any]:
    """`data_config` with one mean and std per input channel.

    timm keeps three of each for a model made with in_chans=1; a grey image is normalised by their
    averages.
    """
    config = dict(data_config)
    channels = config["input_size"][0]
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    return config


class _Converted:
    """A transform of PIL images that first gives them `mode`, as torchvision's datasets do not."""

    def __init__(self, mode: str, transform: Callable[[Image.Image], Any]):
        self.mode, self.transform = mode, transform

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(image if image.mode == self.mode else image.convert(self.mode))


def _timm_dataset(data: str, split: str, settings: FitSettings, mode: str) -> Any:
    try:
        dataset = create_dataset(
            data,
            root=settings.data_dir,
            split=split,
            is_training=split == "train",
            download=settings.dataset_download,
        )
    except Exception as error:  # every dataset library has its own kinds
        reason = first_line(error)
        raise GrowkitError(
            f"--data {data}, split {split}: {reason} (files are looked for in --data-dir"
            f" {settings.data_dir}; --dataset-download fetches them, --val-split names the split)"
        ) from error
    if isinstance(dataset, IterableDataset):
        raise GrowkitError(
            f"--data {data}: a stream cannot be read in a repeatable order; use a dataset with"
            " random access (an image folder, torch/..., hfds/...)"
        )
    return Pictures(dataset.reader, mode) if isinstance(dataset, ImageDataset) else dataset


def _class_names(dataset: Any) -> list[str]:
    by_name = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if by_name:
        return [str(name) for name in sorted(by_name, key=by_name.__getitem__)]
    return [str(name) for name in getattr(dataset, "classes", [])]


def _digest(samples: list[tuple[str, int]], root: str) -> str:
    """Hash of the list of files and labels; the same after the folder was moved."""
    lines = (f"{Path(name).relative_to(root).as_posix()}\t{label}\n" for name, label in samples)
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()[:16]


@contextmanager
def seeded(*parts: int | str, device: torch.device | None = None) -> Iterator[None]:
    """Inside, every random draw is a function of `parts` alone; afterwards all is as before.

    Covers the generators of Python, NumPy, torch on the CPU and, given a CUDA `device`, there.
    """
    with _random_kept(device):
        _seed(*parts, device=device)
        yield


@contextmanager
def _random_kept(device: torch.device | None = None) -> Iterator[None]:
    on_gpu = device is not None and device.type == "cuda"
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _number(*parts: int | str) -> int:
    """A seed that is a function of `parts`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch wants it below 2**63


def _seed(*parts: int | str, device: torch.device | None = None) -> None:
    seed = _number(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


class _Read(Dataset[Any]):
    """`dataset` for loaders: gives samples, each with the reason where another one stands in for it.

    An error that a worker raised would reach the user as a page of traceback, so reasons travel with the batch. In the
    place of an unreadable image comes the next one, up to `stand_ins` further on: which, depends on the image alone.
    """

    def __init__(self, dataset: Any, stand_ins: int):
        self.dataset, self.stand_ins = dataset, stand_ins

    def __getitems__(self, places: list[Any]) -> list[Any]:
        """A whole batch, as loaders ask for it."""
        return [self._read(place) for place in places]

    def _read(self, index: int) -> tuple[Any, str | None]:
        why = None
        for step in range(1 + self.stand_ins):
            place = (index + step) % len(self.dataset)
            try:
                return self.dataset[place], why
            except UnreadablePictureError as error:
                why = why or str(error)
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's, in torchvision's hands
                why = why or unreadable(f"image {place}", first_line(error, 160))
        return None, why


class _Augmented(_Read):
    """`dataset`, asked for (epoch, index): what is drawn for an image depends on these alone."""

    def __init__(self, dataset: Any, seed: int):
        super().__init__(dataset, STAND_INS)
        self.seed = seed

    def __getitems__(self, places: list[tuple[int, int]]) -> list[Any]:
        """A whole batch; NumPy takes 0.2 ms to give its state back."""
        with _random_kept():
            return [self._draw(epoch, index) for epoch, index in places]

    def _draw(self, epoch: int, index: int) -> Any:
        _seed(self.seed, "image", epoch, index)
        return self._read(index)


def _collated(read: list[tuple[Any, str | None]]) -> tuple[Any, list[str]]:
    """Samples as one batch, and why some are others than asked for; no batch where one is missing, and why."""
    missing = [why for sample, why in read if sample is None and why]
    if missing:
        return None, missing
    samples = [sample for sample, _ in read]
    if isinstance(samples[0][0], Erased):
        images, labels = (list(part) for part in zip(*samples, strict=True))
        return (together(images), default_collate(labels)), [why for _, why in read if why]
    return default_collate(samples), [why for _, why in read if why]


def _loaded(dataset: _Read, sampler: Any, settings: FitSettings, *, pin_memory: bool = False) -> Iterator[Any]:
    """Batches, with the reasons of those images in them that another one stands in for.

    Raises:
        UnreadablePictureError: an image cannot be read, nor can what may stand in for it.
    """
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=_collated, **_loading(settings, pin_memory))
    for batch, told in loader:
        if batch is None:
            more = f"; nor can the {dataset.stand_ins} images after it be read" if dataset.stand_ins else ""
            raise UnreadablePictureError(told[0] + more)
        yield batch, told


def _in_order(dataset: Any, stand_ins: int, settings: FitSettings) -> Iterator[Any]:
    """All images of `dataset` once, and what is said of those that could not be read."""
    places = torch.arange(size_of(dataset)).split(256)
    return _loaded(_Read(dataset, stand_ins), [batch.tolist() for batch in places], settings)


def _refuse_many(failed: int, read: int, lines: Collection[str]) -> None:
    """Raise UnreadablePictureError where too many of the training images could not be read to be an accident."""
    if len(lines) > FEW and failed > MOST_UNREADABLE * read:
        first = next(iter(lines))
        raise UnreadablePictureError(
            f"{failed} of the first {read} training images could not be read; the first: {first}"
        )


class _Places(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) pairs of batches `first` to `last` of a run, each epoch permuted anew: this process's part."""

    def __init__(self, data: Data, settings: FitSettings, first: int, last: int):
        self.images, self.settings, self.first, self.last = size_of(data.train), settings, first, last
        self.whole = images_per_batch(data, settings)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, order_of = torch.empty(0), -1
        for number in range(self.first, self.last):
            epoch, place = divmod(number, self.images // self.whole)
            if epoch != order_of:
                with seeded(self.settings.seed, "order", epoch):
                    order, order_of = torch.randperm(self.images), epoch
            batch = order[place * self.whole : (place + 1) * self.whole]
            yield [(epoch, index) for index in batch[part(self.whole)].tolist()]


def images_per_batch(data: Data, settings: FitSettings) -> int:
    """Images of a training batch; a dataset smaller than one is one batch.

    Raises:
        GrowkitError: the size is still to be found.
    """
    if settings.batch_size == AUTO:
        raise GrowkitError("--batch-size auto: only grow, finetune and train find it; give a number here")
    return min(settings.batch_size, size_of(data.train))


def batches_per_epoch(data: Data, settings: FitSettings) -> int:
    """Training batches in an epoch; the last images of an epoch that fill no batch are left out."""
    return size_of(data.train) // images_per_batch(data, settings)


def train_batches(
    data: Data, settings: FitSettings, first: int, last: int, *, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches number `first` up to `last` of a run: images (N, C, H, W) and labels (N,).

    On several processes each gets its part of every batch, the same images with the same augmentation as a single
    process would. Numbers run on through the epochs. Nothing before `first` is read. `device` is where they will be
    used; on a GPU the images are there already.

    Where an image cannot be read, the next one that can stands in for it, as timm has it, so that one bad file of a
    million does not end a run at night; but it is told, in data.unreadable, and many are refused: training would go on
    with other images than it was given.

    Raises:
        GrowkitError: more than MOST_UNREADABLE of the images read so far could not be, and more than FEW of them; or
            one and all STAND_INS after it. The message names one and the reason.
    """
    device = torch.device(device)
    sampler = _Places(data, settings, first, last)
    if isinstance(data.train, Resident):
        data.train.decoded.on(device)
        told = data.train.decoded.told
        data.unreadable.update(dict.fromkeys(told))
        _refuse_many(len(told), data.train.decoded.shape[0], told)
        for number, places in enumerate(sampler, start=first):
            images, labels = data.train.batch(torch.tensor([index for _, index in places]), device)
            generator = torch.Generator().manual_seed(_number(settings.seed, "crops", number))
            yield crop_and_flip(images, settings, generator, whole=sampler.whole, part=part(sampler.whole)), labels
        return
    yield from _on(device, data.normalised, _read_to_train(data, settings, sampler, device))


def _read_to_train(
    data: Data, settings: FitSettings, sampler: "_Places", device: torch.device
) -> Iterator[tuple[Tensor | ErasedBatch, Tensor]]:
    read = failed = 0
    images_of = _Augmented(data.train, settings.seed)
    for batch, told in _loaded(images_of, sampler, settings, pin_memory=device.type == "cuda"):
        read, failed = read + len(batch[-1]), failed + len(told)
        data.unreadable.update(dict.fromkeys(told))
        _refuse_many(failed, read, data.unreadable)
        yield batch


def _on(
    device: torch.device, normalised: Callable[[Tensor], Tensor], batches: Iterator[tuple[Tensor | ErasedBatch, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, images on the device as the network takes them."""
    if device.type == "cuda":
        yield from _ahead(device, normalised, batches)
        return
    for images, labels in batches:
        yield _ready(images, normalised, device), labels


def _ready(images: Tensor | ErasedBatch, normalised: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    if isinstance(images, ErasedBatch):
        return images.over(_ready(images.images, normalised, device))
    return normalised(images.to(device, non_blocking=True))


def _ahead(
    device: torch.device, normalised: Callable[[Tensor], Tensor], batches: Iterator[tuple[Tensor | ErasedBatch, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same on a GPU: each batch is copied there while the one before it is worked on.

    At most BATCHES_AHEAD are there besides the one that is worked on, however far the GPU lags behind.
    """
    copying = torch.cuda.Stream(device)
    waiting: deque[tuple[Tensor, Tensor, torch.cuda.Event]] = deque()

    def handed_out() -> Iterator[tuple[Tensor, Tensor]]:
        images, labels, copied = waiting.popleft()
        working = torch.cuda.current_stream(device)
        working.wait_event(copied)
        yield images, labels
        copying.wait_event(working.record_event())  # before another batch is copied to where this one lies

    for images, labels in batches:
        with torch.cuda.stream(copying):
            waiting.append((_ready(images, normalised, device), labels, copying.record_event()))
        if len(waiting) > 1:
            yield from handed_out()
    while waiting:
        yield from handed_out()


def val_batches(
    data: Data, settings: FitSettings, *, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images for evaluation once, in order: images (N, C, H, W) and labels (N,).

    On several processes each gets its part of them, in as many batches as the others. `device` is where they will be
    used; on a GPU the images are there already. Nothing stands in for an image
    that cannot be read: the figure would be of other images than it says.

    Raises:
        GrowkitError: an image cannot be read; the message names it and the reason.
    """
    device = torch.device(device)
    shares = _shares(size_of(data.val), settings.batch_size)
    if isinstance(data.val, Resident):
        yield from data.val.evaluation(shares, device)
        return
    read = _loaded(_Read(data.val, 0), shares, settings, pin_memory=device.type == "cuda")
    yield from _on(device, data.normalised, (batch for batch, _ in read))


def unaugmented(data: Data, count: int, *, seed: int) -> Tensor:
    """Up to `count` training images (N, C, H, W), prepared as for evaluation, drawn without their labels.

    Raises:
        GrowkitError: one of them cannot be read, or images are cached, which keeps no way to them without augmentation.
    """
    if isinstance(data.train, Resident):
        raise GrowkitError("--cache: training images in memory are not read again; leave it out")
    plain = copy.copy(data.train)
    plain.transform = data.val.transform  # type: ignore[attr-defined]
    places = np.random.default_rng(seed).permutation(size_of(plain))[:count]
    return data.normalised(torch.stack([plain[int(place)][0] for place in places]))


def _shares(images: int, batch_size: int) -> list[list[int]]:
    """Places of this process's images for evaluation, batch by batch; no batch is empty."""
    places = torch.arange(images)
    if size() == 1:
        return [batch.tolist() for batch in places.split(batch_size) if len(batch)]
    if images < size():
        raise GrowkitError(f"{images} images for evaluation do not give each of {size()} processes one; use fewer")
    # nearly equal, none below batch_size but where there are fewer images in all
    batches = places.tensor_split(max(1, images // batch_size))
    return [batch.tensor_split(size())[rank()].tolist() for batch in batches]


def size_of(dataset: Dataset[Any]) -> int:
    """Number of images."""
    assert isinstance(dataset, Sized)
    return len(dataset)


def _loading(settings: FitSettings, pin_memory: bool) -> dict[str, Any]:
    return {
        "num_workers": settings.workers,
        "pin_memory": pin_memory,
        "worker_init_fn": _quiet_worker,
        "generator": torch.Generator(),  # else a loader draws from the global one
    }


def _quiet_worker(_: int) -> None:
    """Leave Ctrl-C to the main process, which ends its workers when it is done with them, and say nothing of its death.

    Python hands images on in a thread of the worker; where the main process is killed meanwhile, that thread fails.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    shown = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, EOFError | ConnectionError):
            shown(kind, error, trace)

    sys.excepthook = show
