"""Labelled images for training and evaluation: opening them, splitting them, and preparing them for a network."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform
from torch import Tensor
from torch.utils.data import Dataset, Subset

from growkit.errors import GrowkitError, first_line
from growkit.seeds import seeded
from growkit.text import some
from growkit.train import posterize
from growkit.train.augment import refuse_other_augmentation
from growkit.train.distributed import by_leader, size
from growkit.train.erasing import Erasing
from growkit.train.folders import FolderReader, Pictures, open_folders, open_val_folder
from growkit.train.loading import STAND_INS, in_order
from growkit.train.normalise import Normalisation
from growkit.train.progress import StartProgress, start_nothing
from growkit.train.resident import Decoded, Resident
from growkit.train.settings import FitSettings

TIMM_DATASETS = ("torch", "hfds")
STREAMS = ("tfds", "wds", "hfids")
FOLDERS = ("torch/folder", "torch/image_folder")  # torchvision would pair classes of train and val by number


def _as_they_are(images: Tensor) -> Tensor:
    return images


@dataclass(frozen=True)
class Data:
    """Images to train on and to evaluate on.

    train, val   map-style datasets of (image (C, H, W), label), or both Resident; those of `open_data` give uint8
                 images, and Erased ones where training images may be erased
    classes      class names in label order; empty if the dataset does not name them
    identity     what must be unchanged when a run is resumed, besides the sizes and the classes
    unreadable   training images found unreadable so far, one line with the reason for each, as ordered keys; at each
                 save of a run, those of all its processes, including from before it was resumed
    normalised   turns images (N, C, H, W) of the datasets into network input, on the device; Resident ones do so
                 themselves
    """

    train: Dataset[Any]
    val: Dataset[Any]
    classes: list[str]
    identity: Mapping[str, Any] = field(default_factory=dict)
    unreadable: dict[str, None] = field(default_factory=dict)
    normalised: Callable[[Tensor], Tensor] = _as_they_are

    def remarks(self, record: Path) -> list[str]:
        """Return what to print after training: at most one line, on unreadable images; `record` names all of them."""
        if not self.unreadable:
            return []
        count, first = len(self.unreadable), next(iter(self.unreadable))
        more = f"; all are named in {record}" if count > 1 else ""
        return [
            f"warning: training images that could not be read: {count}, the next took their place; "
            f"the first: {first}{more}"
        ]


def open_data(
    data: str,
    data_config: Mapping[str, Any],
    settings: FitSettings,
    *,
    training: bool = True,
    tell: StartProgress = start_nothing,
) -> Data:
    """Open an ImageFolder directory (train/, val/) or a timm dataset such as 'torch/cifar10'.

    Lists the files, reads no image. Training images are augmented as `settings` says, those for
    evaluation are resized and cropped as `data_config` says. With settings.cache the first batch
    decodes all images of its split, once for all runs that use the returned Data.

    Args:
        data: directory, or timm dataset string whose files lie in settings.data_dir.
        data_config: what timm.data.resolve_model_data_config gives; see `channel_config`.
        settings: augmentation and where datasets lie.
        training: whether there must be training images; without, there need not be a train/.
        tell: receives the progress of decoding when images are cached.

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
    train, val, classes, files = _opened(data, settings, mode, training=training)
    preprocessing = {name: config[name] for name in ("input_size", "mean", "std", "interpolation")}
    cropping = {name: config.get(name) for name in ("crop_pct", "crop_mode")}
    identity = {**files, **{name: str(value) for name, value in (preprocessing | cropping).items()}}
    normalised = Normalisation(config["mean"], config["std"])
    val.transform = _Converted(mode, create_transform(**preprocessing, **cropping, normalize=False))
    if not training:
        return Data(train=train, val=val, classes=classes, identity=identity, normalised=normalised)
    augment = _augmentation(settings, preprocessing)
    if settings.cache == "none":
        train.transform = _Converted(mode, augment)
        return Data(train=train, val=val, classes=classes, identity=identity, normalised=normalised)
    train.transform = val.transform

    def kept(split: Any, stand_ins: int, what: str) -> Resident:
        read = partial(in_order, stand_ins=stand_ins, settings=settings)
        begin = partial(tell, f"decoding the {what} images")
        return Resident(Decoded(split, read, config["input_size"], settings.cache, begin), normalised)

    train, val = kept(train, STAND_INS, "training"), kept(val, 0, "validation")
    return Data(train=train, val=val, classes=classes, identity=identity)


def _opened(
    data: str, settings: FitSettings, mode: str, *, training: bool
) -> tuple[Any, Any, list[str], dict[str, str]]:
    """Open both splits, without transforms; return them, the class names, and what tells these files from others.

    Without `training` the first is empty.
    """
    path, (prefix, slash, _) = Path(data), data.lower().partition("/")
    named = slash and not path.is_dir()
    if named and prefix in STREAMS:
        raise GrowkitError(
            f"--data {data}: a stream cannot be read in a repeatable order; use a dataset with"
            " random access (an image folder, torch/..., hfds/...)"
        )
    if named and data.lower() in FOLDERS:
        path = Path(settings.data_dir)
    elif named and prefix in TIMM_DATASETS:
        splits = ("train", settings.val_split) if training else (settings.val_split,)
        first, *others = (_timm_dataset(data, split, settings, mode) for split in splits)
        train, val = (first, *others) if training else (Subset(first, []), first)
        return train, val, _class_names(first), {"dataset": data}
    if not training:
        val, classes = open_val_folder(path, settings.val_split, mode)
        return Subset(val, []), val, classes, {"validation files": _digest(val.reader)}
    train, val, classes = open_folders(path, settings.val_split, mode)
    return train, val, classes, {"files": _digest(train.reader), "validation files": _digest(val.reader)}


def _augmentation(settings: FitSettings, preprocessing: Mapping[str, Any]) -> Any:
    """timm's augmentation of single images, up to uint8 ones.

    Raises:
        GrowkitError: timm knows no such policy.
    """
    posterize.use_in_policies()
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
    if settings.reprob:
        augment.transforms.append(Erasing(settings.reprob))
    return augment


def hold_out(data: Data, *, share: float, keep: float = 1.0, seed: int) -> tuple[Data, Data]:
    """Split the validation images into `share` of each class to choose by, and the rest to test the choice on.

    Both returned Data train on the same share `keep` of each class's training images. Training images are never used
    to choose: the source has seen them, so a model grown from it would look better there than it is. Which images go
    where depends on `seed` alone.

    Raises:
        GrowkitError: a class with too few validation images; the message names it.
    """
    chosen: list[int] = []
    tested: list[int] = []
    for label, own in _by_class(data.val, seed, "hold out"):
        out = max(1, round(share * len(own)))
        if out >= len(own):
            name = data.classes[label] if data.classes else label
            fewer = " or choose by fewer, with a lower --hold-out" if len(own) > 1 else ", or leave the class out"
            raise GrowkitError(
                f"class {name}: too few validation images ({len(own)}) to choose by a share of {share} and test on"
                f" the rest; add images{fewer}"
            )
        chosen += own[:out]
        tested += own[out:]
    train = data.train
    if keep < 1:
        by_class = _by_class(data.train, seed, "keep")
        train = _part(train, sorted(place for _, own in by_class for place in own[: max(1, round(keep * len(own)))]))
    identity = {**data.identity, "hold_out": share, "share": keep, "split_seed": seed}
    by, on = (
        replace(data, train=train, val=_part(data.val, sorted(part)), identity=identity) for part in (chosen, tested)
    )
    return by, on


def _by_class(dataset: Any, seed: int, purpose: str) -> Iterator[tuple[int, list[int]]]:
    """Yield each label with the indices of its images, in an order that depends on seed, purpose and label."""
    labels = torch.as_tensor(labels_of(dataset))
    for label in labels.unique().tolist():
        own = torch.nonzero(labels == label)[:, 0]
        with seeded(seed, purpose, label):
            own = own[torch.randperm(len(own))]
        yield label, own.tolist()


def _part(dataset: Any, index: list[int]) -> Dataset[Any]:
    return dataset.part(index) if isinstance(dataset, Resident) else Subset(dataset, index)


def labels_of(dataset: Any) -> list[int]:
    """Return the label of every image, without reading images if the dataset knows its labels."""
    if isinstance(dataset, Resident):
        return labels_of(dataset.decoded.dataset)
    if isinstance(dataset, Subset):
        inner = labels_of(dataset.dataset)
        return [inner[place] for place in dataset.indices]
    reader = getattr(dataset, "reader", None)
    listed: Any = getattr(reader, "iter_targets", None)
    known = np.asarray([*listed()] if listed else getattr(dataset, "targets", []))
    # QMNIST's have eight columns, and a missing one is None
    if known.shape == (len(dataset),) and np.issubdtype(known.dtype, np.integer):
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
    """A transform that first converts PIL images to `mode`, which torchvision's datasets do not do."""

    def __init__(self, mode: str, transform: Callable[[Image.Image], Any]):
        self.mode, self.transform = mode, transform

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(image if image.mode == self.mode else image.convert(self.mode))


def _timm_dataset(data: str, split: str, settings: FitSettings, mode: str) -> Any:
    download = settings.dataset_download
    if download and size() > 1:  # else one would unpack what another is still fetching

        def fetch() -> None:
            _named(data, split, settings, download=True)

        by_leader(fetch)
        download = False
    dataset = _named(data, split, settings, download=download)
    if not isinstance(dataset, ImageDataset):
        return dataset
    columns = getattr(getattr(dataset.reader, "dataset", None), "column_names", ["label"])
    if "label" not in columns:
        raise GrowkitError(f"--data {data}: no column is called label, only {some(columns)}; use a copy with that one")
    return Pictures(dataset.reader, mode)


def _named(data: str, split: str, settings: FitSettings, *, download: bool) -> Any:
    """Open the timm dataset of this name.

    Raises:
        GrowkitError: there is no such data set or split, or its files are missing.
    """
    try:
        return create_dataset(
            data, root=settings.data_dir, split=split, is_training=split == "train", download=download
        )
    except Exception as error:  # every dataset library has its own errors
        reason = first_line(error)
        raise GrowkitError(
            f"--data {data}, split {split}: {reason} (files are looked for in --data-dir {settings.data_dir}; "
            + ("" if data.startswith("hf") else "--dataset-download fetches them, ")
            + "--val-split names the split)"
        ) from error


def _class_names(dataset: Any) -> list[str]:
    by_name = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if by_name:
        return [str(name) for name in sorted(by_name, key=by_name.__getitem__)]
    return [str(name) for name in getattr(dataset, "classes", [])]


def _digest(reader: FolderReader) -> str:
    """Hash the list of files and labels; moving the folder does not change the hash."""
    within = len(reader.root) + 1
    lines = (f"{name[within:].replace(os.sep, '/')}\t{label}\n" for name, label in reader.samples)
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()[:16]


def size_of(dataset: Dataset[Any]) -> int:
    """Number of images."""
    assert isinstance(dataset, Sized)
    return len(dataset)
