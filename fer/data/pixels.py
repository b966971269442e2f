"""The images of a split on the device, a batch at a time: from its own memory, or read ahead by other processes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fer.data.dataset import Split
from fer.device import index_on


class Pixels:
    """uint8 images by their index in the split.

    A GPU holds the whole split where that takes no more than `data_share` of its free memory; else `readers` processes
    read ahead from the file. A CPU reads the memory-mapped file, which the system keeps in memory.
    """

    def __init__(self, split: Split, device: torch.device, data_share: float, readers: int):
        self.split, self.device, self.readers = split, device, readers
        self.resident: Tensor | None = None
        self.streams = device.type == "cuda"
        if self.streams:
            free, _ = torch.cuda.mem_get_info(device)
            if len(split) * split.images[0].nbytes <= data_share * free:
                self._load()

    def _load(self) -> None:
        self.streams, step = False, 1024
        shape = (len(self.split), *self.split.images.shape[1:])
        self.resident = torch.empty(shape, dtype=torch.uint8, device=self.device)
        for first in range(0, len(self.split), step):
            part = np.arange(first, min(first + step, len(self.split)))
            self.resident[first : first + step] = self.split.pixels(part).to(self.device)

    def __call__(self, index: np.ndarray) -> Tensor:
        """uint8 [B, H, W] or [B, H, W, 3]."""
        if self.resident is not None:
            return self.resident[index_on(self.device, index)]
        return self.split.pixels(index).to(self.device)

    def ahead(self, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Each batch in turn; while the device works on one, the next are read where they come from a file."""
        if not self.streams:
            yield from map(self, batches)
            return
        file = _File(Path(str(self.split.images.filename)), self.split.rows)  # type: ignore[attr-defined]
        loader = DataLoader(
            file,
            sampler=batches,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.readers,
            prefetch_factor=4 if self.readers else None,
            pin_memory=self.device.type == "cuda",
        )
        for pixels in loader:
            yield pixels.to(self.device, non_blocking=True)


class _File(Dataset):
    """Opened anew in each reader: a memory map does not travel."""

    def __init__(self, path: Path, rows: np.ndarray):
        self.path, self.rows = path, rows
        self.images: np.ndarray | None = None

    def __getitem__(self, index: np.ndarray) -> Tensor:
        if self.images is None:
            self.images = np.load(self.path, mmap_mode="r")
        return torch.from_numpy(self.images[self.rows[index]])
