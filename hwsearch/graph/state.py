"""What modules hold beside their parameters: noted before calls, compared after them, and put back."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parameter import UninitializedBuffer

_TORCHS_OWN = frozenset(vars(torch.nn.Module())) | {"_compiled_call_impl"}
"""Attributes that every module has; its mode and its buffers are noted apart."""


class State:
    """The modes, buffers and other attributes of a module and of all modules in it, as they are when this is made."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = [
            (path, _ScriptModule(m) if isinstance(m, torch.jit.ScriptModule) else _Module(m))
            for path, m in model.named_modules()
        ]

    def changed(self) -> list[str]:
        """Paths of the buffers and attributes that are not what they were."""
        return [".".join(filter(None, (path, name))) for path, m in self._modules for name in m.changed()]

    def restore(self) -> None:
        """Make everything what it was."""
        for _, module in self._modules:
            module.restore()


class _ScriptModule:
    """Only the mode: what a ScriptModule does to its buffers is its own affair."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.training = module, module.training

    def changed(self) -> list[str]:
        return []

    def restore(self) -> None:
        self.module.train(self.training)


class _Module:
    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.training = module, module.training
        self.names = list(module._buffers)
        self.buffers = {
            name: (buffer, buffer.detach().clone())
            for name, buffer in module._buffers.items()
            if buffer is not None and not isinstance(buffer, UninitializedBuffer)
        }
        self.attributes = {k: (v, _contents(v)) for k, v in vars(module).items() if k not in _TORCHS_OWN}

    def changed(self) -> list[str]:
        own, now = self.module._buffers, self._attributes()
        buffers = [
            n for n, (b, before) in self.buffers.items() if own.get(n) is not b or not _equal(b, before)
        ]
        attributes = [n for n, held in self.attributes.items() if n not in now or not _same(now[n], *held)]
        return [
            *buffers,
            *(n for n in own if n not in self.buffers and own[n] is not None),
            *attributes,
            *(n for n in now if n not in self.attributes),
        ]

    def restore(self) -> None:
        self.module.training = self.training
        own, now = self.module._buffers, vars(self.module)
        for name in [n for n in own if n not in self.names]:
            del own[name]
        for name, (buffer, before) in self.buffers.items():
            own[name] = buffer
            if not _equal(buffer, before):
                buffer.detach().copy_(before)
        for name in [n for n in self._attributes() if n not in self.attributes]:
            del now[name]
        for name, (value, contents) in self.attributes.items():
            now[name] = value
            if not _same(value, value, contents):
                _put_back(value, contents)

    def _attributes(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self.module).items() if k not in _TORCHS_OWN}


def _contents(value: Any) -> Any:
    """What a call may change within an attribute."""
    if type(value) is torch.Tensor:
        return value.detach().clone()
    return value.copy() if type(value) in (list, dict, set) else None


def _put_back(value: Any, contents: Any) -> None:
    if type(value) is torch.Tensor:
        value.detach().copy_(contents)
    elif type(value) is list:
        value[:] = contents
    else:
        value.clear()
        value.update(contents)


def _same(now: Any, value: Any, contents: Any) -> bool:
    """Whether an attribute is still this value, and that still has these contents."""
    if now is not value:
        return False
    if type(value) is torch.Tensor:
        return _equal(value, contents)
    if type(value) is list:
        return len(value) == len(contents) and all(a is b for a, b in zip(value, contents, strict=True))
    if type(value) is dict:
        return value.keys() == contents.keys() and all(v is contents[k] for k, v in value.items())
    return type(value) is not set or bool(value == contents)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same values; NaN is equal to itself."""
    if torch.equal(a, b):
        return True
    if a.shape != b.shape or a.dtype != b.dtype or not (a.is_floating_point() or a.is_complex()):
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
