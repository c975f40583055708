"""Protocols and their registry.

To add a protocol, write one file in protocols/ with an options class (unless it has no options) and one function, and
import it in `protocols/__init__.py`:

    @dataclass
    class SharpnessOptions(Options):                             # runs.options.Options
        sharpness_radius: float = config_option('Sharpness', 0.05, 'radius of the ball', float, low=0)

    @register_protocol('sharpness', SharpnessOptions)
    def sharpness(ev: Evaluation) -> Result:
        '''Flatness of the loss around the weights.'''            # the first line is the help text
        rows = []
        for model in ev.models:
            loader = ev.loader(model)                            # pixels in [0, 1], labels and indices of this process
            found = ev.measure(
                f'sharpness {model.label}', loader, len(loader),
                lambda batch: {'loss': ...})                     # model.network takes these pixels
            rows.append({'model': model.label, 'loss': found['loss'].mean()})  # all images, in dataset order
        return Result(
            columns={'loss': Column('loss', '.3f')},             # keys of the rows; `model` is always the first column
            rows=rows,
            notes=['Loss: mean over images of ...'],             # definitions, printed below the table
            details={...},                                       # more for the JSON file
            figures={'': draw(rows)},                            # '' is PROTOCOL.png, 'x' is PROTOCOL-x.png
        )

Rules: option names are unique over all protocols, because `all` has every flag. A protocol runs on every process and
returns the same result on each; only the main process writes. It raises ValueError with the remedy for wrong input, and
NotApplicable if the data is of another kind (`all` then skips it). Import heavy or rare libraries inside the function.
A long computation keeps its progress in `ev.store(...)`, keyed by image. Draw with `runs/plotting.py`.
"""
from collections.abc import Callable
from dataclasses import dataclass, fields

from alignmix_lab.runs.options import Options, near_names

from .config import AllConfig, EvalConfig
from .context import Evaluation
from .result import Result


class NotApplicable(ValueError):
    """The data or the models are not of the kind that a protocol measures."""


@dataclass(frozen=True)
class Protocol:
    """An evaluation."""
    name: str  # name on the command line and of the result files
    options: type[Options]  # its own
    run: Callable[[Evaluation], Result]
    timed: bool = False  # whether it measures time, so that the result also depends on the machine
    multi_label: bool = False  # whether it also measures images with any number of labels

    @property
    def help(self) -> str:
        return (self.run.__doc__ or '').strip().partition('\n')[0]


_protocols: dict[str, Protocol] = {}


def register_protocol(
        name: str, options: type[Options] = Options, timed: bool = False,
        multi_label: bool = False) -> Callable[[Callable], Callable]:
    """Register a function as the protocol `name`.

    Raises:
        ValueError: The name, or that of an option, is taken.
    """
    owners = {option.name: 'every protocol' for option in fields(EvalConfig)}
    for other in _protocols.values():
        owners.update({option.name: other.name for option in fields(other.options)})
    taken = [f'option {option.name} of {owners[option.name]}' for option in fields(options) if option.name in owners]
    if name in ('all', *_protocols):
        taken.append(f'name {name}')
    if taken:
        raise ValueError(f'protocol {name!r}: taken already: {", ".join(taken)}')

    def register(run: Callable[[Evaluation], Result]) -> Callable[[Evaluation], Result]:
        _protocols[name] = Protocol(name, options, run, timed, multi_label)
        return run
    return register


def list_protocols() -> list[str]:
    """Names of all protocols, in the order of `all`."""
    return list(_protocols)


def get_protocol(name: str) -> Protocol:
    """Look up a protocol.

    Raises:
        ValueError: There is none of this name; the message lists those there are.
    """
    if name not in _protocols:
        known = [*_protocols, 'all']
        raise ValueError(f'unknown protocol {name!r}{near_names(name, known)}; there are {", ".join(known)}')
    return _protocols[name]


def options_class(name: str) -> type[EvalConfig]:
    """Dataclass of all options of a protocol, or of every protocol for 'all'."""
    chosen = _protocols.values() if name == 'all' else [get_protocol(name)]
    common = AllConfig if name == 'all' else EvalConfig
    bases = (common, *dict.fromkeys(protocol.options for protocol in chosen if protocol.options is not Options))
    return dataclass(type(f'{name.capitalize()}Config', bases, {'__doc__': f'Options of {name}.'}))
