"""Registry of mixing methods by name, like timm's of models."""
import argparse
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .base import Mix
from .choice import MixChoice

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


def create_mix(name: str | Mapping[str, float], **options: Any) -> Mix:
    """Create a mixing method by name, or a choice of several.

    Args:
        name: A name of :func:`list_mixes`; case, '-' and '_' do not matter. A mapping of names to weights draws one of
            the methods at each step, in proportion to its weight and the same on all ranks.
        **options: Options of the method, see its class; with several, 'method.option'.

    Raises:
        ValueError: Unknown name or option (the valid ones are listed), or a value out of range.

    Example:
        >>> create_mix('Dense-MultiMix', n=500)
        DenseMultiMix(n=500)
        >>> create_mix({'mixup': 0.5, 'cutmix': 0.3, 'none': 0.2}, **{'mixup.alpha': 0.8})
        MixChoice(0.3 * CutMix(), 0.5 * Mixup(alpha=0.8), 0.2 * NoMix())
    """
    if not isinstance(name, str):
        return _create_choice(name, options)
    cls = _find(name)
    valid = inspect.signature(cls).parameters
    unknown = sorted(set(options) - set(valid))
    if unknown:
        listed = ', '.join(f'{p.name}={p.default!r}' for p in valid.values()) or 'none'
        raise ValueError(f'mix {cls.name!r} has no option {", ".join(unknown)}; its options: {listed}')
    mix = cls(**options)
    mix.options = dict(options)
    return mix


def _find(name: str) -> type[Mix]:
    if canonical(name) not in _MIXES:
        raise ValueError(f'unknown mix {name!r}; available: {", ".join(list_mixes())}')
    return _MIXES[canonical(name)]


def _create_choice(weights: Mapping[str, float], options: dict[str, Any]) -> Mix:
    """Create the choice, or the method itself if no other has a weight."""
    # By name and not as given: YAML sorts mappings, and a resumed run must draw the same.
    names = {canonical(name): _find(name).name for name in sorted(weights, key=canonical)}
    numbers = [float(weights[name]) for name in sorted(weights, key=canonical)]
    if len(names) < len(weights) or not (0 < sum(numbers) < math.inf and min(numbers) >= 0):
        raise ValueError(
            'several methods need a weight each, 0 or more and not all 0, and no method twice; got '
            + ' '.join(f'{name}={weight}' for name, weight in weights.items()))
    own: dict[str, dict[str, Any]] = {name: {} for name in names.values()}
    for key, value in options.items():
        method, _, option = key.partition('.')
        if canonical(method) not in names or not option:
            raise ValueError(
                f'option {key!r} belongs to none of {", ".join(own)}: with several methods an option is written '
                f'method.option, such as {next(iter(own))}.alpha')
        own[names[canonical(method)]][option] = value
    mixes = {name: create_mix(name, **kwargs) for name, kwargs in own.items()}
    chances = {name: number / sum(numbers) for name, number in zip(mixes, numbers, strict=True) if number}
    chosen = {name: mixes[name] for name in chances}
    return MixChoice(chosen, chances) if len(chosen) > 1 else next(iter(chosen.values()))


def with_probability(
        mix: str | Mapping[str, float],
        options: dict[str, Any],
        prob: float,
) -> tuple[str | Mapping[str, float], dict[str, Any]]:
    """Arguments of :func:`create_mix` for a mix that acts in a share of the steps, like timm's --mixup-prob.

    Args:
        mix: Name, or names and weights.
        options: Options of the method or methods.
        prob: Probability of a step of the mix; the others are steps of mix 'none'.

    Raises:
        ValueError: `prob` is not a probability.

    Example:
        >>> with_probability('cutmix', dict(alpha=0.5), 0.75)
        ({'cutmix': 0.75, 'none': 0.25}, {'cutmix.alpha': 0.5})
    """
    if not 0 <= prob <= 1:
        raise ValueError(f'the probability of mixing must be from 0 to 1, got {prob}')
    if prob == 1:
        return mix, options
    if isinstance(mix, str):
        mix, options = {mix: 1.0}, {f'{mix}.{key}': value for key, value in options.items()}
    weights = {name: prob * weight for name, weight in mix.items()}
    none = next((name for name in mix if canonical(name) == 'none'), 'none')
    weights[none] = weights.get(none, 0.0) + (1 - prob) * sum(mix.values())
    return weights, options


class ParseMix(argparse.Action):
    """Flag of one method, or of several with weights: `--mix mixup=0.5 cutmix=0.3 none=0.2`."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = [word.partition('=') for word in values]
        if len(values) == 1 and not pairs[0][1]:
            setattr(namespace, self.dest, values[0])
            return
        try:
            weights = {name: float(weight) for name, _, weight in pairs}
        except ValueError:
            weights = {}
        if len(weights) < len(values):
            parser.error(
                f'{option_string} takes one method, or several with a weight each, such as mixup=0.5 cutmix=0.5; got '
                f'{" ".join(values)!r} (words that belong to no flag go before it)')
        setattr(namespace, self.dest, weights)
