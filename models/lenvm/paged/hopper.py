"""Attention of a step on a Hopper GPU, by a kernel in CUDA C++ (``step_attention.cu``, which says how): Triton's
programs can neither split a prefix among their warps nor begin to read all of it before the kernel in front is done.

Compiled when it is first needed, by the compiler that torch brings for its own kernels (``cuda-bindings`` and NVRTC,
both required by torch's builds for CUDA); where that fails, Triton's kernel does it all.

A row's own tokens are mixed as a block of the prefix is, by weights of which all but one are 0: a candidate whose
values are not finite, which Triton's kernel keeps to itself, makes those of its row NaN.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from lenvm.paged.kernels import Rotation

__all__ = ["Given", "compiled", "options", "reads", "source", "step_attention", "suits"]

_log = logging.getLogger(__name__)
_HERE = Path(__file__).parent
_ARCHITECTURE = "sm_90a"

_SIZE, _ROWS, _THREADS = 32, 64, 384  # as in the kernel
# Blocks of a pass, by numbers of a head. There is memory for two passes: of 64 beside a block of the product in front.
_AT_ONCE = {64: 3, 128: 2}
_LONG = 1024  # tokens that tables have room for, from which on programs for a third of the processors are too few
_TYPES = (*[ctypes.c_void_p] * 12, *[ctypes.c_float] * 2, *[ctypes.c_uint64] * 2, ctypes.c_int)


def _product(name: str, columns: int, *, left: str, keep: bool, transposed: bool) -> str:
    """A function for ``d [64, columns] (+)= a [64, 16] b [16, columns]`` by a group of 128 threads: d in registers, b
    in shared memory, a there too or (``left="registers"``) in registers."""
    count = columns // 2  # of d, for each thread
    outs = ", ".join(f'"{"+" if keep else "="}f"(d[{i}])' for i in range(count))
    if left == "registers":
        kind, given = "const u32*", [f'"r"(a[{i}])' for i in range(4)]
        a = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        ways = f"1, 1, {int(transposed)}"
    else:
        kind, given, a = "u64", ['"l"(a)'], f"%{count}"
        ways = f"1, 1, 0, {int(transposed)}"
    d = ", ".join(f"%{i}" for i in range(count))
    instruction = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16"
    return (
        f"__device__ __forceinline__ void {name}(float* d, {kind} a, u64 b) {{\n"
        f'  asm volatile("{instruction} {{{d}}}, {a}, %{count + len(given)}, {int(keep)}, {ways};"\n'
        f'               : {outs}\n               : {", ".join(given)}, "l"(b));\n}}\n'
    )


@functools.cache
def source(dim: int) -> str:
    """The kernel's CUDA C++, for heads of ``dim`` numbers."""
    keys = _AT_ONCE[dim] * _SIZE
    products = (
        _product("scores_begin", keys, left="shared", keep=False, transposed=False),
        _product("scores", keys, left="shared", keep=True, transposed=False),
        _product("mix", 64, left="registers", keep=True, transposed=True),
    )
    kernel = (_HERE / "step_attention.cu").read_text("utf-8")
    return "\n".join([(_HERE / "hopper.cuh").read_text("utf-8"), *products, kernel])


def options(dim: int, group: int, kv_heads: int, width: int, *, norm: bool = False) -> list[str]:
    """What the compiler is told: heads have ``dim`` numbers and perhaps norms, ``group`` queries of a token share a key
    head, rows have ``width`` tokens."""
    macros = {"D": dim, "G": group, "KV": kv_heads, "WIDTH": width, "AT_ONCE": _AT_ONCE[dim], "NORM": int(norm)}
    return [f"--gpu-architecture={_ARCHITECTURE}", *(f"-D{name}={value}" for name, value in macros.items())]


def _shared(dim: int) -> int:
    """Bytes of shared memory: queries, three rings of two passes of keys and values, and to begin at a multiple of
    1,024."""
    return _ROWS * dim * 2 + 3 * 4 * _AT_ONCE[dim] * _SIZE * dim * 2 + 1024


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of the bindings gives beside its status: one thing, or a list.

    Raises:
        RuntimeError: the status is an error's.
    """
    status, *rest = result
    if int(status) != 0:
        raise RuntimeError(status.name)
    return rest[0] if len(rest) == 1 else rest


def _filled(size: int, fill: Callable[[bytes], tuple[Any, ...]]) -> bytes:
    """So many bytes, which the bindings write into an object of ours. One byte alone (an empty log's end) is not asked
    for: Python has each such object but once, and every ``b" "`` of the process would change with it."""
    if size <= 1:
        return b""
    room = b" " * size
    _checked(fill(room))
    return room


def compiled(text: str, told: list[str]) -> tuple[bytes, str]:
    """The machine code of a source, and what the compiler said.

    Raises:
        ImportError: there are no bindings.
        RuntimeError: the compiler refused it, or there is none.
    """
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), b"step_attention.cu", 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(told), [option.encode() for option in told])
        log = _filled(
            _checked(nvrtc.nvrtcGetProgramLogSize(program)), functools.partial(nvrtc.nvrtcGetProgramLog, program)
        )
        said = log.rstrip(b"\0 ").decode("utf-8", "replace")
        if int(status) != 0:
            raise RuntimeError(f"{status.name}: {said}")
        return _filled(
            _checked(nvrtc.nvrtcGetCUBINSize(program)), functools.partial(nvrtc.nvrtcGetCUBIN, program)
        ), said
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@functools.cache
def _kernel(device: int, dim: int, group: int, kv_heads: int, width: int, norm: bool) -> Any | None:
    """The loaded function; None where it cannot be had, which is said once for each reason."""
    try:
        from cuda.bindings import driver

        with torch.cuda.device(device):
            code, _ = compiled(source(dim), options(dim, group, kv_heads, width, norm=norm))
            function = _checked(driver.cuModuleGetFunction(_checked(driver.cuModuleLoadData(code)), b"step_attention"))
            kinds = driver.CUfunction_attribute
            for kind, value in (
                (kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, _shared(dim)),
                (kinds.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),  # see layer_kernels.carved
            ):
                _checked(driver.cuFuncSetAttribute(function, kind, value))
            return function
    except Exception as error:  # bindings, library, compiler and driver each have errors of their own
        _warn(str(error).partition("\n")[0])
        return None


@functools.cache
def _warn(error: str) -> None:
    _log.warning("attention of decoding steps runs by Triton, and slower: %s", error)


class Given(NamedTuple):
    """What attention is given, as :func:`lenvm.paged.kernels.step_attention` says; each row has ``width`` tokens."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    pool_keys: torch.Tensor
    pool_values: torch.Tensor
    tables: torch.Tensor
    prefix_lens: torch.Tensor
    width: int
    rotation: Rotation


class _Shape(NamedTuple):
    device: int
    dim: int
    group: int
    kv_heads: int
    width: int
    norm: bool


def _shape(given: Given) -> _Shape:
    query, keys, norm = given.query, given.keys, given.rotation.q_norm is not None
    return _Shape(query.get_device(), query.shape[2], len(query) // len(keys), len(keys), given.width, norm)


def suits(given: Given) -> bool:
    """Whether this attention can be taken here, and is faster so."""
    query, kv_heads = given.query, len(given.keys)
    if not query.is_cuda or torch.cuda.get_device_capability(query.device) != (9, 0) or not reads(given):
        return False
    # A long prefix is one program's, where Triton's kernel gives shares of it to several.
    programs = len(given.tables) * -(-given.width * len(query) // kv_heads // _ROWS) * kv_heads
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    if given.tables.shape[1] * _SIZE > _LONG and 3 * programs < processors:
        return False
    return _kernel(*_shape(given)) is not None


def reads(given: Given) -> bool:
    """Whether the kernel reads tensors of these types and layouts, which it gets as addresses."""
    query, keys, values, pool_keys, pool_values, tables, prefix_lens, width, rotation = given
    heads, tokens, dim = query.shape
    kv_heads, group = len(keys), len(query) // len(keys)
    line, element = (heads + 2 * kv_heads) * dim, query.element_size()
    queries = width * group
    most = max((min(at + _ROWS, queries) - 1) // group - at // group + 1 for at in range(0, queries, _ROWS))
    kept = (rotation.kept_keys, rotation.kept_values)
    norms = [x for x in (rotation.q_norm, rotation.k_norm) if x is not None]
    return (
        all(x.dtype == torch.bfloat16 for x in (query, keys, values, pool_keys, pool_values, *kept, *norms))
        and tables.dtype == prefix_lens.dtype == torch.int32
        and rotation.cos.dtype == rotation.sin.dtype == torch.float32
        and dim in _AT_ONCE
        and pool_keys.shape[2] == _SIZE
        and len(tables) * width == tokens
        and most <= _SIZE  # tokens whose queries one block of threads has
        # One token's products lie side by side, and so do one block's keys.
        and all(x.stride() == (dim, line, 1) for x in (query, keys, values))
        and len(norms) in (0, 2)
        and all(x.data_ptr() % 16 == 0 for x in (query, *norms))
        and keys.data_ptr() - query.data_ptr() == heads * dim * element
        and values.data_ptr() - keys.data_ptr() == kv_heads * dim * element
        and pool_keys.stride()[1:] == (_SIZE * dim, dim, 1)
        and pool_values.stride() == pool_keys.stride()
        and all(x.is_contiguous() for x in (tables, prefix_lens, rotation.cos, rotation.sin, *kept, *norms))
    )


def step_attention(given: Given, scaling: float) -> torch.Tensor:
    """:func:`lenvm.paged.kernels.step_attention` where it :func:`suits`. May be launched before the kernel in front is
    done.

    Raises:
        RuntimeError: the driver refused the launch.
    """
    from cuda.bindings import driver

    query, keys, _, pool_keys, pool_values, tables, prefix_lens, width, rotation = given
    heads, tokens, dim = query.shape
    shape = _shape(given)
    out = torch.empty((tokens, heads, dim), dtype=query.dtype, device=query.device)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = len(tables) * -(-width * shape.group // _ROWS), len(keys), 1
    config.blockDimX, config.blockDimY, config.blockDimZ = _THREADS, 1, 1
    config.sharedMemBytes = _shared(dim)
    config.hStream = torch.cuda.current_stream(query.device).cuda_stream
    early = driver.CUlaunchAttribute()
    early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    value = driver.CUlaunchAttributeValue()
    value.programmaticStreamSerializationAllowed = 1
    early.value = value
    config.attrs, config.numAttrs = [early], 1
    norms = (0 if norm is None else norm.data_ptr() for norm in (rotation.q_norm, rotation.k_norm))
    values = (
        query.data_ptr(), pool_keys.data_ptr(), pool_values.data_ptr(), tables.data_ptr(), prefix_lens.data_ptr(),
        out.data_ptr(), rotation.cos.data_ptr(), rotation.sin.data_ptr(), *norms, rotation.kept_keys.data_ptr(),
        rotation.kept_values.data_ptr(), scaling * 1.4426950408889634, rotation.eps, pool_keys.stride(0),
        pool_keys.stride(1), tables.shape[1],
    )  # fmt: skip
    with torch.cuda.device(query.device):
        _checked(driver.cuLaunchKernelEx(config, _kernel(*shape), (values, _TYPES), 0))
    return out
