"""`torch.export` of a model that is fit for it, with errors that name the module and the operator."""

from __future__ import annotations

import hashlib
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from hwsearch.errors import InvalidInput, UntraceableModel


def check_types(model: torch.nn.Module) -> None:
    """Raises InvalidInput naming the first parameter or buffer that is uninitialised, complex or float but not fp32."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise InvalidInput(f"{name} is not initialised; run the model once before it is traced")
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype is not torch.float32):
            raise InvalidInput(
                f"{name} of the model is {str(tensor.dtype).removeprefix('torch.')}; expected float32: "
                "call model.float() and give float32 inputs, precisions are hwsearch's to choose"
            )


def export_program(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """The exported model. Raises UntraceableModel naming the innermost module that fails, the operator and the line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs)
    except Exception as error:
        path, cls = _culprit(model, args, kwargs)
        raise UntraceableModel(
            f"torch.export cannot trace module {path or '(the model itself)'} ({cls}): {first_line(error)}"
            f"{_user_frame(error)}. Rewrite that operator without data-dependent Python (torch.where, torch.cond), "
            "or leave the module out of the model that is searched."
        ) from error


def _culprit(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, str]:
    """The innermost submodule that cannot be exported by itself, with the inputs it gets in a real run."""
    seen: dict[str, tuple[torch.nn.Module, Any, Any]] = {}
    handles = []
    for path, module in model.named_modules():

        def hook(mod: torch.nn.Module, a: Any, k: Any, path: str = path) -> None:
            seen.setdefault(path, (mod, a, k))

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    found = ""
    while True:
        inside = [p for p in seen if p and (not found or p.startswith(f"{found}.")) and p != found]
        children = [p for p in inside if not any(p.startswith(f"{q}.") for q in inside)]
        failing = next((p for p in children if not _exports(*seen[p])), None)
        if failing is None:
            return found, type(seen[found][0] if found else model).__name__
        found = failing


def _exports(module: torch.nn.Module, args: Any, kwargs: Any) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.export(module, args, kwargs)
    except Exception:
        return False
    return True


def first_line(error: BaseException) -> str:
    """What an error says first, to be quoted within another message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(". ")


def _user_frame(error: BaseException) -> str:
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(own) and frame.line and Path(frame.filename).exists():
            return f", at {Path(frame.filename).name}:{frame.lineno}: `{frame.line}`"
    return ""


def weights_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """16 hex digits that change with any name, shape, type or value."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
