"""The frame of every evaluation: what a protocol is, what it gets, and what it gives back.

To add a protocol, write one file in protocols/ with an options class and one function, and name it in
`protocols/__init__.py`:

    @dataclass
    class SharpnessOptions(Options):                             # runs.options.Options; may be empty
        sharpness_radius: float = config_option('Sharpness', 0.05, 'radius of the ball', float, low=0)

    @register_protocol('sharpness', SharpnessOptions)
    def sharpness(ev: Evaluation) -> Result:
        '''Flatness of the loss around the weights.'''            # the first line is the help text
        rows = []
        for model in ev.models:
            losses, indices = [], []
            with ev.progress(f'sharpness {model.label}', len(ev.loader(model))) as bar:
                for batch in ev.batches(model):                  # this process's pixels in [0, 1], labels, indices
                    losses.append(...)                           # model.network takes these pixels
                    bar.update()
            values = ev.gather(indices, loss=losses)             # of all processes, in the order of the data, once each
            rows.append({'model': model.label, 'loss': values['loss'].mean()})
        return Result(
            columns={'loss': Column('loss', '.3f')},             # keys of rows; model comes first by itself
            rows=rows,
            notes=['Loss: mean over images of ...'],             # what fixes the numbers, printed below tables
            details={...},                                       # anything for the JSON file
            figures={'': draw(rows)},                            # '' is PROTOCOL.png, 'x' is PROTOCOL-x.png
        )

Rules: names of options are unique over all protocols (`all` has every flag at once). A protocol runs on every process
and gives the same result on each; only the main one writes. It raises ValueError for wrong input, with the remedy, and
NotApplicable where the data given is of another kind (`all` then goes on without it). Heavy or rare libraries are
imported inside the function. A long computation keeps what is done in `ev.store(...)`, keyed by image. Figures come
from `plotting.py`, which holds the colours.
"""
from collections.abc import Callable
from dataclasses import dataclass, fields

from alignmix_lab.runs.options import Options, near_names

from .config import EvalConfig
from .context import Evaluation
from .result import Result


class NotApplicable(ValueError):
    """The data or models given are not of the kind that a protocol measures."""


@dataclass(frozen=True)
class Protocol:
    """An evaluation.

    Attributes:
        name: Its name on the command line and of its files.
        options: Dataclass of its own options.
        run: Computes the result.
        in_all: Whether `all` runs it.
        needs_models: Whether it takes --model; the others get an empty list.
        timed: Whether it measures time, so that the machine and options of speed decide on its result too.
    """
    name: str
    options: type[Options]
    run: Callable[[Evaluation], Result]
    in_all: bool = True
    needs_models: bool = True
    timed: bool = False

    @property
    def help(self) -> str:
        return (self.run.__doc__ or '').strip().partition('\n')[0]


_protocols: dict[str, Protocol] = {}


def register_protocol(
        name: str,
        options: type[Options],
        in_all: bool = True,
        needs_models: bool = True,
        timed: bool = False,
) -> Callable[[Callable], Callable]:
    """Make a function the protocol `name`.

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
        _protocols[name] = Protocol(name, options, run, in_all, needs_models, timed)
        return run
    return register


def list_protocols() -> list[str]:
    """Names of all protocols, in the order in which `all` runs them."""
    return list(_protocols)


def get_protocol(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        ValueError: There is none; lists those that are.
    """
    if name not in _protocols:
        known = [*_protocols, 'all']
        raise ValueError(f'unknown protocol {name!r}{near_names(name, known)}; there are {", ".join(known)}')
    return _protocols[name]


def options_class(name: str) -> type[EvalConfig]:
    """Dataclass of all options of a protocol, or of all of them for 'all'."""
    chosen = [p for p in _protocols.values() if p.in_all] if name == 'all' else [get_protocol(name)]
    bases = (EvalConfig, *(protocol.options for protocol in chosen))
    return dataclass(type(f'{name.capitalize()}Config', bases, {'__doc__': f'Options of {name}.'}))
