"""The safetensors files of a model folder as one set of named, memory-mapped tensors."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from torch import Tensor

from engine.checkpoint.header import TensorInfo, read_header
from engine.checkpoint.mapping import MappedFiles
from engine.errors import CheckpointError

INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pdparams", ".pdmodel", ".pdiparams", ".pkl")
FLOATS = ("BF16", "F16", "F32")
"""Dtypes (safetensors' names) of unquantized tensors."""

_FILE_NAME = re.compile(r"[^/\\\0]{1,200}\.safetensors")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


class CheckpointReader:
    """Tensors of one folder of safetensors files, read where and when they are asked for.

    Opening reads and checks every file's header, no data. Tensors come as views of the mapped file: only the pages
    that are touched are read, and nothing stays in memory that the caller does not copy.

    Raises:
        CheckpointError: the folder has no weights or only pickled ones, a shard is missing, renamed or truncated, or
            the index and the files contradict each other.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = MappedFiles()
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder; expected a model folder with safetensors files")
        index = self.folder / INDEX
        self._tensors = self._read_index(index) if index.exists() else self._read_files()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """File, dtype and shape of a tensor. Raises CheckpointError if there is none of that name."""
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}") from None

    def read(self, name: str, *, shape: tuple[int, ...], dtypes: Collection[str]) -> Tensor:
        """A view of a tensor in the mapped file, after checking its shape and dtype.

        Args:
            name: the tensor's name in the files.
            shape: the shape it must have.
            dtypes: the dtypes it may have, in safetensors' names. Paddle's bf16 is numpy's uint16, and files may label
                it so; where "BF16" is expected, "U16" is taken for it.

        Raises:
            CheckpointError: there is no such tensor, or it is not what was expected.
        """
        info = self.info(name)
        if info.dtype == "U16" and "BF16" in dtypes:
            info = dataclasses.replace(info, dtype="BF16")
        if info.shape != shape or info.dtype not in dtypes:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}; "
                f"expected {' or '.join(dtypes)} {list(shape)}"
            )
        return self._files.view(info)

    def release(self) -> None:
        """Let go of the memory of what was read. Views handed out before stay valid."""
        self._files.release()

    def close(self) -> None:
        """Close the files. Views handed out before stay valid; reading opens the files again."""
        self._files.close()

    def _read_index(self, index: Path) -> dict[str, TensorInfo]:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{index} can't be read as an index: expected a JSON object with a weight_map of tensor names to "
                f"files ({type(error).__name__}: {error})"
            ) from None
        headers: dict[str, dict[str, TensorInfo]] = {}
        for file in sorted(set(files.values())):
            if not _FILE_NAME.fullmatch(file):
                raise CheckpointError(
                    f"{index} names the file {file!r:.80}; expected NAME.safetensors without a folder"
                )
            if not (self.folder / file).exists():
                raise CheckpointError(self._missing_shard(index, file, known=set(files.values())))
            headers[file] = read_header(self.folder / file)
        for name, file in files.items():
            if name not in headers[file]:
                raise CheckpointError(f"{index} places tensor {name!r} in {file}, which does not hold it")
        return {name: headers[file][name] for name, file in files.items()}

    def _missing_shard(self, index: Path, file: str, *, known: set[str]) -> str:
        strangers = sorted(p.name for p in self.folder.glob("*.safetensors") if p.name not in known)
        hint = f"; {', '.join(strangers)} is there but not in the index: was it renamed?" if strangers else ""
        return f"{self.folder} lacks {file}, which {index.name} names{hint or '; fetch it again'}"

    def _read_files(self) -> dict[str, TensorInfo]:
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(self._no_weights())
        for file in files:
            if match := _SHARD.fullmatch(file.name):
                stem, count = match[1], match[3]
                shards = [f"{stem}-{i:05d}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
                if missing := [shard for shard in shards if not (self.folder / shard).exists()]:
                    raise CheckpointError(
                        f"{self.folder} lacks {', '.join(missing[:5])} of {count} shards (and has no {INDEX})"
                    )
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in read_header(file).items():
                if name in tensors:
                    raise CheckpointError(
                        f"tensor {name!r} is in both {tensors[name].file.name} and {file.name} of {self.folder}, "
                        f"and there is no {INDEX} to say which counts"
                    )
                tensors[name] = info
        return tensors

    def _no_weights(self) -> str:
        pickled = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLED)
        if pickled:
            return (
                f"{self.folder} holds pickled weights ({', '.join(pickled[:3])}); they are refused, because unpickling "
                "a file runs whatever code it contains. Convert them to safetensors"
            )
        return f"{self.folder} holds no weights; expected *.safetensors files"
