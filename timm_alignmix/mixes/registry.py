"""Registry of mixing methods by name, like timm's of models."""
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from .base import Mix

_MIXES: dict[str, type[Mix]] = {}
_MixType = TypeVar('_MixType', bound=type[Mix])


def canonical(name: str) -> str:
    """Name in the form in which names are compared: without case, '-' and '_'."""
    return name.lower().replace('-', '').replace('_', '')


def register_mix(name: str) -> Callable[[_MixType], _MixType]:
    """Register a subclass of :class:`Mix` for :func:`create_mix`, as a class decorator.

    Args:
        name: Name of the method; unlike any other without case, '-' and '_'.

    Raises:
        ValueError: The name is taken.

    Example:
        >>> @register_mix('Mix-Up')
        ... class MyMixup(Mix):
        ...     pass
        Traceback (most recent call last):
        ValueError: a mix named 'Mix-Up' is registered already: Mixup
    """
    def register(cls: _MixType) -> _MixType:
        if canonical(name) in _MIXES:
            raise ValueError(f'a mix named {name!r} is registered already: {_MIXES[canonical(name)].__qualname__}')
        cls.name = name
        _MIXES[canonical(name)] = cls
        return cls
    return register


def list_mixes() -> list[str]:
    """List the names of the registered methods, sorted.

    Example:
        >>> {'alignmix', 'multimix', 'densemultimix'} <= set(list_mixes())
        True
    """
    return sorted(cls.name for cls in _MIXES.values())


def create_mix(name: str, **options: Any) -> Mix:
    """Create a mixing method by name.

    Args:
        name: A name of :func:`list_mixes`; case, '-' and '_' do not matter.
        **options: Options of the method, see its class.

    Raises:
        ValueError: Unknown name or option (the valid ones are listed), or a value out of range.

    Example:
        >>> create_mix('Dense-MultiMix', n=500)
        DenseMultiMix(n=500)
    """
    if canonical(name) not in _MIXES:
        raise ValueError(f'unknown mix {name!r}; available: {", ".join(list_mixes())}')
    cls = _MIXES[canonical(name)]
    valid = inspect.signature(cls).parameters
    unknown = sorted(set(options) - set(valid))
    if unknown:
        listed = ', '.join(f'{p.name}={p.default!r}' for p in valid.values()) or 'none'
        raise ValueError(f'mix {cls.name!r} has no option {", ".join(unknown)}; its options: {listed}')
    mix = cls(**options)
    mix.options = dict(options)
    return mix
