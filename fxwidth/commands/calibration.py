"""Batches for `--data`: a file of tensors, a folder of images, or what a function of the user's returns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fxwidth.commands.faults import InputError, needing
from fxwidth.commands.models import imported

_FORMS = "a .pt or .safetensors file of tensors, a folder of images in folders, or package.module:function"
_BATCH, _BATCHES = 32, 8


def batches(text: str | None, inputs: Any) -> Iterable[Any] | None:
    """Return the batches that `--data` names.

    Args:
        text: what was typed, or None for none.
        inputs: an example of the model's inputs, by which images are scaled.

    Raises:
        InputError: there is no such thing, or it holds no tensors.
    """
    if text is None:
        return None
    path = Path(text)
    if path.is_dir():
        return _images(path, inputs)
    if path.suffix in (".pt", ".pth", ".safetensors"):
        return _from_file(path)
    module, colon, function = text.partition(":")
    if not colon:
        raise InputError(f"--data {text}: there is no such file or folder; give {_FORMS}.")
    found = imported(module, function, text)
    result: Iterable[Any] = found() if callable(found) else found
    return result


def _from_file(path: Path) -> list[Any]:
    import torch
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"--data {path}: there is no such file; give {_FORMS}.")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except Exception as error:
        raise InputError(f"--data {path} cannot be read as tensors: {str(error).strip().splitlines()[0]}") from error
    if isinstance(found, torch.Tensor):
        return list(found.split(_BATCH))
    if isinstance(found, dict):
        return [found]
    if isinstance(found, list) and found:
        return found
    raise InputError(f"--data {path} holds {type(found).__name__}; it must be a tensor or a list of batches.")


def _images(folder: Path, inputs: Any) -> list[Any]:
    with needing("torchvision"):
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
    import torch
    from torch.utils.data import DataLoader

    first = inputs[0] if isinstance(inputs, tuple) else None
    if not isinstance(first, torch.Tensor) or first.dim() != 4 or first.shape[1] != 3:
        raise InputError(f"--data {folder} is a folder of images, and this model takes none; give {_FORMS}.")
    height, width = first.shape[2:]
    steps = [
        transforms.Resize((height, width)),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    try:
        images = ImageFolder(str(folder), transforms.Compose(steps))
    except FileNotFoundError as error:
        raise InputError(f"--data {folder} holds no folders of images, one for each class: {error}") from error
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(images, batch_size=_BATCH, shuffle=True, generator=generator)
    return list(islice(_inputs_of(loader), _BATCHES))


def _inputs_of(loader: Iterable[Any]) -> Iterator[Any]:
    for images, _ in loader:
        yield (images,)
