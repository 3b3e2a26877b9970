"""Image folders, one folder per class: listing the files, and reading them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from growkit.errors import GrowkitError, first_line
from growkit.pictures import SUFFIXES, UnreadablePictureError, open_picture, read_picture, unreadable
from growkit.text import visible
from growkit.train.settings import FitSettings


def open_folders(path: Path, val_split: str, mode: str) -> tuple["Pictures", "Pictures", list[str]]:
    """Open path/train and the folder `val_split` means, as Pictures without transforms, and list their common classes.

    Raises:
        GrowkitError: a folder is missing or unusable, classes differ, or there is only one class.
    """
    shown = visible(path)
    _refuse_no_folder(path, "train/ and val/")
    names = ("train", _val_folder(path, val_split))
    put = f"put training images in {shown}/train/CLASS/ and images for evaluation in {shown}/{names[1]}/CLASS/"
    train, val = (_pictures_in(path, name, mode, put) for name in names)
    classes, others = (list(pictures.reader.class_to_idx) for pictures in (train, val))
    if classes != others:
        only = next(name for name in (*classes, *others) if (name in classes) != (name in others))
        has, lacks = names if only in classes else names[::-1]
        alike = [name for name in (*classes, *others) if name != only and name.lower() == only.lower()]
        extra = [name for name in (others if lacks == names[1] else classes) if (name in classes) != (name in others)]
        besides = f" and alone has {extra[0]}" if extra else ""
        remedy = f"rename {(alike or extra)[0]} there" if alike or extra else f"add some or remove {has}/{only}"
        raise GrowkitError(
            f"{shown}: {has}/ and {lacks}/ must hold the same classes, but {lacks}/ has no images of {only}{besides}; "
            f"{remedy}"
        )
    if len(classes) == 1:
        raise GrowkitError(f"{shown}: all images are of one class, {classes[0]}; add another to tell it from")
    return train, val, classes


def open_val_folder(path: Path, val_split: str, mode: str) -> tuple["Pictures", list[str]]:
    """Open the folder `val_split` means, as Pictures without transforms, and list its classes.

    Raises:
        GrowkitError: it is missing or unusable.
    """
    _refuse_no_folder(path, "val/")
    name = _val_folder(path, val_split)
    val = _pictures_in(path, name, mode, f"put images for evaluation in {visible(path)}/{name}/CLASS/")
    return val, list(val.reader.class_to_idx)


def _refuse_no_folder(path: Path, holding: str) -> None:
    if not path.is_dir():
        lies = "is a file" if path.exists() else "no such folder"
        raise GrowkitError(
            f"--data {visible(path)}: {lies}; give one that holds {holding}, or a timm dataset such as torch/cifar10"
        )


def _pictures_in(path: Path, name: str, mode: str, put: str) -> "Pictures":
    if not (path / name).is_dir():
        raise GrowkitError(f"{visible(path)}/{name}: no such folder; {_meant(path, name) or put}")
    return Pictures(FolderReader(path / name), mode)


def _val_folder(path: Path, val_split: str) -> str:
    """Return the folder that --val-split names, as it names a dataset's split; by default val/, or else validation/."""
    if val_split == FitSettings.val_split and ((path / "val").is_dir() or not (path / val_split).is_dir()):
        return "val"
    return val_split


def _meant(path: Path, missing: str) -> str | None:
    """Suggest what the user may have meant, judging by the folders around `path`."""
    within = sorted(entry.name for entry in _listed(path) if _is_folder(entry))
    near = (*path.absolute().parents[:2], *map(path.joinpath, within))
    if whole := next((folder for folder in near if (folder / missing).is_dir()), None):
        return f"give --data {visible(whole)}"
    if missing == "train":
        return None
    others = [visible(name) for name in within if name != "train"]
    return f"make it, or name the one to evaluate on with --val-split: {', '.join(others[:5])}" if others else None


class FolderReader:
    """Lists the pictures folder/CLASS/* as (path, label), by class and in timm's natural order, without reading any.

    Hidden files and those without one of SUFFIXES are skipped. Unlike timm's reader it refuses folders within classes:
    timm would take their names for classes, and their links may lead back up.

    samples        (path, label) of each picture
    class_to_idx   label of each class

    Raises:
        GrowkitError: a picture outside a class, a class without pictures, a name that cannot be printed, a folder that
            cannot be listed, or none at all; the message names it.
    """

    def __init__(self, folder: Path):
        self.root = str(folder)
        shown = visible(self.root)
        entries = _listed(folder)
        loose = [entry.name for entry in entries if _is_picture(entry)]
        if loose:
            raise GrowkitError(
                f"{shown}/{visible(min(loose))}: belongs to no class; put images into one folder per class,"
                f" as in {shown}/cat/"
            )
        classes = sorted((entry.name for entry in entries if _is_folder(entry)), key=_natural)
        if not classes:
            raise GrowkitError(f"{shown}: holds no images; put them into one folder per class, as in {shown}/cat/")
        self.class_to_idx = {name: label for label, name in enumerate(classes)}
        self.samples: list[tuple[str, int]] = []
        for name, label in self.class_to_idx.items():
            if not name.isprintable():  # it would become a label, also in files with one label per line
                raise GrowkitError(f"{shown}/{visible(name)}: a class whose name cannot be printed; rename it")
            self.samples += [(path, label) for path in _pictures(folder / name)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.samples[index]

    def iter_targets(self) -> Iterator[int]:
        """Yield the labels in order, as timm's reader of hfds/... does."""
        return (label for _, label in self.samples)


def _pictures(folder: Path) -> list[str]:
    """Paths of the pictures of one class, in timm's order."""
    shown = visible(folder)
    entries = _listed(folder)
    within = [entry.name for entry in entries if _is_folder(entry)]
    if within:
        raise GrowkitError(
            f"{shown}/{visible(min(within))}: a folder within a class; put its images into {shown}/ or remove it"
        )
    found = sorted((entry.path for entry in entries if _is_picture(entry)), key=_natural)
    if not found:
        raise GrowkitError(f"{shown}: holds no images; add some or remove the folder ({' '.join(SUFFIXES)} are read)")
    return found


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """List the entries of `folder` that are not hidden."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise GrowkitError(
            f"{visible(folder)}: cannot be listed ({error.strerror}); allow it or take the folder away"
        ) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_picture(entry: os.DirEntry[str]) -> bool:
    """Judge by the suffix: a broken link or a pipe counts as a picture, and reading it says that it is unreadable."""
    return os.path.splitext(entry.name)[1].lower() in SUFFIXES and not _is_folder(entry)


def _natural(text: str) -> tuple[list[int | str], str]:
    """Sort key for timm's order, 9 before 10, which also orders names that are equal to timm (cat, Cat)."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text.lower())], text


class Pictures(Dataset[Any]):
    """(transform(picture), label) for what a reader lists: a FolderReader, or timm's for a dataset such as hfds/...

    timm's own dataset replaces an unreadable image with the next one and only logs it; here an unreadable image raises
    UnreadablePictureError, and the caller decides.
    """

    def __init__(self, reader: Any, mode: str):
        self.reader, self.mode = reader, mode
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            source, label = self.reader[index]  # a path, or from timm's readers an open file
            label = int(label)
        except (OSError, RuntimeError, TypeError, ValueError) as error:  # the last three of what is None in hfds/
            reason = f"{type(error).__name__}: {first_line(error, 160)}"
            raise UnreadablePictureError(unreadable(f"image {index}", reason)) from None
        if isinstance(source, str):
            picture = open_picture(source, self.mode)
        else:
            with source:
                picture = read_picture(source, self.mode, f"image {index}")
        return self.transform(picture) if self.transform else picture, label
