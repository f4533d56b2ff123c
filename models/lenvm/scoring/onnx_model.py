"""An exported value model in ONNX Runtime: the session, and the keys and values that stay on its device. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from lenvm._pages import reserved
from lenvm.backbones import load_tokenizer
from lenvm.config import GRAPH_FILE, LenVMConfig
from lenvm.errors import ArtifactError, InvalidRequestError
from lenvm.export.artifact import ExportInfo

__all__ = ["KeyValueStore", "OnnxModel"]

_SIDES = ("keys", "values")


class OnnxModel:
    """A folder that ``lenvm export`` wrote, loaded.

    Args:
        folder: the export.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: of the CPU provider; default: ``$OMP_NUM_THREADS``, else the cores that this process may use.

    Raises:
        ArtifactError: no export, damaged, or one that ONNX Runtime cannot load.
        InvalidRequestError: the device is not there.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu", threads: int | None = None) -> None:
        self.backbone_dir = self.folder = Path(folder)
        self.config = LenVMConfig.load(self.folder)
        self.info = ExportInfo.load(self.folder)
        self.config.verify_files(self.folder)
        self.device = device
        self.device_type, self.device_id, providers = _providers(device)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or _threads()
        options.log_severity_level = 3
        # Threads that go on spinning after a forward take the cores from whatever else the service does.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session = onnxruntime.InferenceSession(self.folder / GRAPH_FILE, options, providers=providers)
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            raise ArtifactError(
                f"ONNX Runtime cannot load {self.folder / GRAPH_FILE} ({_line(error)}): export the checkpoint again"
            ) from error
        if self.device_type == "cuda" and "CUDAExecutionProvider" not in self.session.get_providers():
            # ONNX Runtime goes on with the CPU where CUDA's libraries are missing, a hundred times slower.
            raise InvalidRequestError(f"ONNX Runtime cannot use {device!r}: check CUDA and cuDNN", param="device")
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.folder, weights=False)
        return self._tokenizer

    @property
    def context(self) -> int:
        """Longest sequence in tokens."""
        return self.info.context


class KeyValueStore:
    """Keys and values of a pool's slots, ``[slots, kv_heads * head_dim]`` for each layer, and a forward over them.

    Each tensor is bound both as an input of the graph and as its output: a forward stores in place.
    """

    def __init__(self, model: OnnxModel) -> None:
        info = model.info
        self.model = model
        self.slots = 0
        self.bins = model.config.head.num_bins
        self._binding = model.session.io_binding()
        names = [f"{what}.{layer}" for what in _SIDES for layer in range(info.layers)]
        self._tensors: dict[str, Any] = dict.fromkeys(names)
        self._arrays: dict[str, NDArray[Any]] = {}  # on the CPU: the tensors' own memory
        self._feeds: dict[str, Any] = {}

    @property
    def on_cpu(self) -> bool:
        """True where the host sees the memory."""
        return self.model.device_type == "cpu"

    def read(self, slots: NDArray[np.int64]) -> NDArray[Any]:
        """A copy of ``[B, tokens]`` slots: ``[B, 2, layers, kv_heads, tokens, head_dim]``. On the CPU only."""
        info = self.model.info
        sides = [[self._arrays[f"{what}.{layer}"][slots] for layer in range(info.layers)] for what in _SIDES]
        both = np.asarray(sides).reshape(2, info.layers, *slots.shape, info.kv_heads, info.head_dim)
        return np.ascontiguousarray(both.transpose(2, 0, 1, 4, 3, 5))

    def restore(self, slots: NDArray[np.int64], stored: NDArray[Any]) -> None:
        """Fill ``[B, tokens]`` slots with what :meth:`read` gave. On the CPU only."""
        info = self.model.info
        flat = stored.transpose(1, 2, 0, 4, 3, 5).reshape(2, info.layers, *slots.shape, info.kv_heads * info.head_dim)
        for side, what in enumerate(_SIDES):
            for layer in range(info.layers):
                self._arrays[f"{what}.{layer}"][slots] = flat[side, layer]

    def resize(self, slots: int) -> None:
        """Make room for so many slots; what was stored stays. On the CPU a slot takes memory when it is first written.

        Raises OSError where the system has no address space for that.
        """
        info = self.model.info
        size, dtype = (slots, info.kv_heads * info.head_dim), np.dtype(info.dtype)
        for name, held in self._tensors.items():
            # Zeros, not empty: padded places are multiplied by 0, and 0 x NaN of stale memory is NaN.
            if self.on_cpu:
                array = reserved(math.prod(size) * dtype.itemsize).view(dtype).reshape(size)
            else:
                array = np.zeros(size, dtype=dtype)
            if held is not None:
                array[: self.slots] = self._arrays[name] if self.on_cpu else held.numpy()
            tensor = self._tensors[name] = self._tensor(array)
            self._arrays[name] = array
            self._binding.bind_ortvalue_input(f"past_{name}", tensor)
            self._binding.bind_ortvalue_output(f"present_{name}", tensor)
        self.slots = slots

    def forward(self, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """Run the graph over new tokens (see ``lenvm.export.graph``); ``[wanted, 1 + n]``: value logits, log-probs."""
        # Kept: the binding does not keep its tensors alive, nor a tensor on the CPU its array.
        self._feeds = {name: self._tensor(np.ascontiguousarray(array)) for name, array in feeds.items()}
        for name, tensor in self._feeds.items():
            self._binding.bind_ortvalue_input(name, tensor)
        count = len(feeds["wanted"])
        outputs = {"logits": np.empty(count, dtype=np.float32)}
        if self.bins:
            outputs["bin_logprobs"] = np.empty((count, self.bins), dtype=np.float32)
        bound = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in outputs.items()}
        for name, tensor in bound.items():
            self._binding.bind_ortvalue_output(name, tensor)
        self.model.session.run_with_iobinding(self._binding)
        return np.concatenate([array.reshape(count, -1) for array in outputs.values()], axis=1, dtype=np.float64)

    def _tensor(self, array: NDArray[Any]) -> Any:
        """On the CPU the tensor is the array's own memory."""
        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self.model.device_type, self.model.device_id)


def _threads() -> int:
    """What torch takes too: ``$OMP_NUM_THREADS``, else the cores that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _providers(device: str) -> tuple[str, int, list[Any]]:
    """Device type and number, and the execution providers for it."""
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (kind == "cpu" and number):
        raise InvalidRequestError(f"unknown device {device!r}: use cpu, cuda or cuda:N", param="device")
    if kind == "cpu":
        return "cpu", 0, ["CPUExecutionProvider"]
    at = int(number or 0)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise InvalidRequestError(
            f"this ONNX Runtime has no CUDA provider for {device!r}: install onnxruntime-gpu, or use --device cpu",
            param="device",
        )
    return "cuda", at, [("CUDAExecutionProvider", {"device_id": at}), "CPUExecutionProvider"]


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:160]
